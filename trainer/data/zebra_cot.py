"""Reads Zebra-CoT: problems whose images stand in the text, of which x keeps the problem alone."""

import re

from .reader import Draft, Reader
from .rows import IMAGE, BadRow, brief, is_blank, is_given, message, text_part, with_rationale


PLACEHOLDER = re.compile(r"<image_start>\s*\[(\w+?_image_\d+)\]\s*<image_end>")
PROBLEM_IMAGE = re.compile(r"problem_image_\d{1,4}")
THOUGHT = re.compile(r"^[ \t]*THOUGHT[ _]?\d+\s*:?[ \t]*", re.MULTILINE)


class ZebraCoTReader(Reader):
    """
    Zebra-CoT, a table with `Question`, `Text Reasoning Trace`, `Final Answer`, `problem_image_1..n` and `reasoning_image_1..m`;
    `config` names some of its eighteen, such as `"2D Visual Reasoning - Visual Search"`.

    x is `Question` with its problem images where their placeholders stand. y is `Final Answer`, or with `answer="rationale"`
    the trace without images and step labels, and the answer.
    """

    format = "zebra_cot"
    hub_id = "multimodal-reasoning-lab/Zebra-CoT"
    default_licence = "cc-by-nc-4.0"

    def convert(self, record, subset):
        question, answer = record.get("Question"), record.get("Final Answer")
        if not isinstance(question, str):
            raise BadRow("a question that is no text", brief(question))
        names = [name for name in record if PROBLEM_IMAGE.fullmatch(name) and is_given(record[name])]
        names.sort(key=lambda name: int(name.rpartition("_")[2]))
        pieces = PLACEHOLDER.split(question)  # text, name, text, name, ..., text
        shown = pieces[1::2]
        broken = any("<image_start>" in piece or "<image_end>" in piece for piece in pieces[::2])
        if not shown and not broken:
            pieces = [piece for name in names for piece in ("", name)] + pieces
        elif broken or sorted(shown) != sorted(names):
            raise BadRow("placeholders that do not match its images", f"{shown} in the text, {names} in the record")
        parts = []
        for number, piece in enumerate(pieces):
            if number % 2:
                parts.append(IMAGE)
            elif not is_blank(piece):
                parts.append(text_part(piece.strip()))
        if self.answer == "rationale":
            trace = record.get("Text Reasoning Trace")
            if isinstance(trace, str):
                trace = re.sub(r"(?:[ \t]*\n)+", "\n", THOUGHT.sub("", PLACEHOLDER.sub("", trace)))
            answer = with_rationale(trace, answer)
        return Draft([record[name] for name in shown or names], [message("user", *parts)], answer)
