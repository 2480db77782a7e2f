"""Reads rows in BLINK's columns: the benchmark itself, and the puzzles made here in its form."""

import re

from datasets import Dataset

from .reader import Draft, Reader
from .rows import FEATURES, IMAGE, BadRow, brief, is_given, message, with_rationale


FACTS = re.compile(r"\s*\[difficulty [^\]]*\]\s*$")  # what our puzzles add to an explanation


class BlinkReader(Reader):
    """
    A table with `image_1..image_4`, `prompt`, `answer` and `explanation`; `config` names some of its tasks.

    x is the images in order, then `prompt`. y is `answer`, `(A)`, or with `answer="rationale"` the explanation and the answer.
    BLINK's own split `test` hides its answers, and no row of it is kept.
    """

    format = "blink"
    hub_id = "BLINK-Benchmark/BLINK"

    def convert(self, record, subset):
        return draft_of(record, self.answer)


def draft_of(record, answer="answer"):
    """
    x and y of a row in BLINK's columns.

    Raises:
        BadRow: no question, or a hidden answer.
    """
    prompt, letter = record.get("prompt"), record.get("answer")
    if not isinstance(prompt, str):
        raise BadRow("a question that is no text", brief(prompt))
    if letter == "hidden":
        raise BadRow("a hidden answer")
    cells = [record.get(f"image_{number}") for number in range(1, 5)]
    images = [cell for cell in cells if is_given(cell)]
    explanation = record.get("explanation")
    explanation = FACTS.sub("", explanation) if isinstance(explanation, str) else explanation
    return Draft(
        images=images,
        prompt=[message("user", *[IMAGE] * len(images), prompt)],
        answer=with_rationale(explanation, letter) if answer == "rationale" else letter,
    )


def training_rows(puzzles, answer="answer"):
    """
    Puzzles as training rows, in memory; from a folder [`BlinkReader`] reads them.

    Args:
        puzzles (`Dataset`): what [`~trainer.data.puzzles.build_puzzles`] gave.
        answer (`"answer"` or `"rationale"`, defaults to `"answer"`): y is the letter, or explanation and letter.

    Returns:
        `Dataset`: columns `images`, `prompt`, `completion`, `source` and `row_id`, the last two being the kind and `idx`.
    """
    rows = []
    for record in puzzles.to_list():  # images stay bytes
        draft = draft_of(record, answer)
        row = {"images": draft.images, "prompt": draft.prompt, "completion": [message("assistant", draft.answer)]}
        rows.append({**row, "source": record["sub_task"], "row_id": record["idx"]})
    return Dataset.from_list(rows, features=FEATURES)
