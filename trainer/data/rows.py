"""What a training row is, and what is said of a record that cannot be one."""

import re
import reprlib

from datasets import Features, Image, List, Value


SYSTEM_PROMPT = "You are a helpful assistant."
_CONTENT = List({"type": Value("string"), "text": Value("string")})
_MESSAGES = List({"role": Value("string"), "content": _CONTENT})
FEATURES = Features(
    {
        "images": List(Image()),
        "prompt": _MESSAGES,
        "completion": _MESSAGES,
        "source": Value("string"),
        "row_id": Value("string"),
    }
)
IMAGE = {"type": "image", "text": None}  # Arrow gives every part of a message the same keys
EARLIER_ANSWER = 8  # characters: shorter answers may well occur in an earlier turn by chance
ANSWERS = ("answer", "rationale")


class BadRow(ValueError):
    """
    A record that cannot be trained on.

    Args:
        reason (`str`): a phrase that many records share, `"an image file that is missing"`: reports count by it.
        detail (`str`, *optional*): what this record has, `"images/7.png"`.
    """

    def __init__(self, reason, detail=""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


def brief(value):
    """A value of a record as a message shows it, however long or deeply nested it is."""
    return f"{value!r:.200}" if isinstance(value, str) else f"{reprlib.repr(value):.80}"


def is_given(cell):
    """Whether a table's cell has an image: one that is empty may be `None`, or a struct of nothing."""
    return cell is not None and cell != {"bytes": None, "path": None}


def is_blank(text):
    """Whether a text has nothing to see: only spaces and control characters."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def text_part(text):
    """A part of a message that is text."""
    return {"type": "text", "text": text}


def message(role, *parts):
    """A message of texts and images: a part is a `str`, or a `dict` as [`text_part`] and `IMAGE` are."""
    return {"role": role, "content": [text_part(part) if isinstance(part, str) else part for part in parts]}


def with_images(text, placeholder, num_images):
    """
    The parts of a text in which a placeholder stands for each image; without any, the images come first.

    Args:
        text (`str`): of the user's turn.
        placeholder (`str`): what stands for one image, `"<image>"`.
        num_images (`int`): how many images the record has.

    Returns:
        `list[dict]`: parts of type image and text, empty texts left out.

    Raises:
        BadRow: another number of placeholders than of images.
    """
    pieces = text.split(placeholder)
    if len(pieces) == 1:
        pieces = [""] * num_images + pieces
    if len(pieces) - 1 != num_images:
        raise BadRow(
            "placeholders that do not match its images", f"{len(pieces) - 1} {placeholder!r} and {num_images} images"
        )
    parts = []
    for number, piece in enumerate(pieces):
        # The line break that separates a placeholder from its text is no part of the question.
        piece = _without_outer_breaks(piece) if placeholder in text else piece
        parts += [IMAGE] * (number > 0) + [text_part(piece)] * (not is_blank(piece))
    return parts


def _without_outer_breaks(text):
    head, tail = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    text = text.lstrip() if "\n" in head else text
    return text.rstrip() if "\n" in tail else text


def with_rationale(rationale, answer):
    """Rationale and answer, a line each; an answer that is no text stays as it is, for the reader to refuse."""
    if not isinstance(answer, str) or is_blank(answer):
        return answer
    if not isinstance(rationale, str) or is_blank(rationale):
        raise BadRow("no rationale")
    return f"{rationale.strip()}\n{answer}"


def check_texts(prompt, answer, num_images):
    """
    Refuses texts that cannot be trained on.

    Args:
        prompt (`list[dict]`): messages.
        answer (`Any`): y, which should be a text.
        num_images (`int`): how many images the record has.

    Raises:
        BadRow: what is wrong, in a phrase.
    """
    if not isinstance(answer, str):
        raise BadRow("an answer that is no text", brief(answer))
    if is_blank(answer):
        raise BadRow("an empty answer")
    if not num_images:
        raise BadRow("no image in the question")
    num_placeholders = sum(part["type"] == "image" for turn in prompt for part in turn["content"])
    if num_placeholders != num_images:
        raise BadRow("placeholders that do not match its images", f"{num_placeholders} and {num_images} images")
    if is_blank("".join(texts_of(prompt, "user"))):
        raise BadRow("no text in the question")
    for text in [*texts_of(prompt), answer]:
        if "<image>" in text:
            raise BadRow("placeholders that do not match its images", f"'<image>' in the text {brief(text)}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("a text that is no Unicode", str(error)) from error
    earlier = texts_of(prompt, "assistant")
    if len(answer.strip()) >= EARLIER_ANSWER and any(answer.strip() in text for text in earlier):
        raise BadRow("an answer that stands in an earlier turn", brief(answer))


def texts_of(messages, role=None):
    """The texts of messages, one after the other; of one role only, if given."""
    chosen = [message for message in messages if role is None or message["role"] == role]
    return [part["text"] for message in chosen for part in message["content"] if part["type"] == "text"]


def boxed_text(text):
    """The content of the last `\\boxed{...}`, braces inside it balanced, or `None`."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip() or None
    return None


def form_of(answer):
    """
    Which form an answer has.

    Args:
        answer (`str`): y of a row.

    Returns:
        `str`: `"letter"` (`B`, `(B)`), `"number"`, `"yes or no"`, `"word"`, `"phrase"` (five words at most), `"sentence"` (forty
        at most) or `"long text"`.
    """
    answer = answer.strip()
    if re.fullmatch(r"\(?[A-Z]\)?\.?", answer):
        return "letter"
    if re.fullmatch(r"[-+$€£]?\s?\d[\d,. ]*\s?%?", answer):
        return "number"
    if answer.lower().rstrip(".") in ("yes", "no"):
        return "yes or no"
    num_words = len(answer.split())
    return next(
        (form for most, form in ((1, "word"), (5, "phrase"), (40, "sentence")) if num_words <= most), "long text"
    )
