"""Reads TRL's own vision formats: `prompt` and `completion`, or `messages`, with `images` or `image`."""

from ..collator import parts_of, split_turns
from .llava import images_of
from .reader import Draft, Reader
from .rows import IMAGE, BadRow, message, text_part, with_images


class TRLReader(Reader):
    """
    Rows in TRL's formats, in a table or in JSON, saved to disk or on the Hub.

    x is `prompt`, or the turns of `messages` before the last; y is `completion`, or that last turn. Other columns are not read.
    Texts are made messages: an `<image>` in them stands for an image, and without any the images come first, as in TRL.
    `answer` makes no difference. An image may also stand in its part of a message, `{"type": "image", "image": path}`.
    """

    format = "trl"

    def convert(self, record, subset):
        inline = [] if images_of(record) else [*_inline_images(record)]
        try:
            prompt, completion = split_turns(record, "It")
        except (ValueError, RecursionError) as error:
            raise BadRow("a row that is not in TRL's format", str(error)) from error
        images = images_of(record) or inline
        if isinstance(prompt, str):
            return Draft(images, [message("user", *with_images(prompt, "<image>", len(images)))], completion)
        if len(completion) != 1:
            raise BadRow("not one answer", f"{len(completion)} messages in `completion`")
        parts = parts_of(completion[0])
        if any(part["type"] != "text" for part in parts):
            raise BadRow("an image in the answer")
        asked = [turn["content"] for turn in prompt if turn["role"] == "user"]
        plain = all(isinstance(text, str) for text in asked)
        numbers = [text.count("<image>") for text in asked] if plain else []
        if not any(numbers):
            numbers[:1] = [len(images)]  # all before the first of them
        turns = []
        for turn in prompt:
            content = [IMAGE if part["type"] == "image" else text_part(part["text"]) for part in parts_of(turn)]
            if plain and turn["role"] == "user":
                content = with_images(turn["content"], "<image>", numbers.pop(0))
            turns.append(message(turn["role"], *content))
        return Draft(images, turns, "".join(part["text"] for part in parts))


def _inline_images(record):
    turns = record.get("messages") or record.get("prompt")
    for turn in turns if isinstance(turns, list) else []:
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") == "image":
                yield next((part[name] for name in ("image", "path", "url") if part.get(name) is not None), None)
