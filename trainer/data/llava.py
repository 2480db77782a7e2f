"""Reads LLaVA-style JSON: a list of records with `image` and `conversations`."""

from .reader import Draft, Reader
from .rows import BadRow, brief, message, with_images


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def turns_of(record):
    """
    Role and text of each turn of a record's `conversations`; a system turn goes.

    Raises:
        BadRow: turns that are no texts, or that do not alternate from the user to the assistant.
    """
    turns = []
    match record:
        case {"conversations": [*conversation]}:
            pass
        case _:
            raise BadRow("no `conversations`")
    for turn in conversation:
        match turn:
            case {"from": str(speaker), "value": value} if speaker in ROLES:
                if ROLES[speaker] != "system":
                    turns.append((ROLES[speaker], value))
            case _:
                raise BadRow("a turn without `from` and `value`", brief(turn))
    if not turns or [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise BadRow("turns that do not alternate from user to assistant", str([role for role, _ in turns])[:80])
    if not all(isinstance(text, str) for role, text in turns if role == "user"):
        raise BadRow("a question that is no text")
    return turns


def images_of(record):
    """A record's `image` or `images` as a list."""
    images = record.get("image") if record.get("image") is not None else record.get("images")
    return [] if images is None else images if isinstance(images, list) else [images]


class LlavaReader(Reader):
    """
    LLaVA-style JSON or JSON lines, `name` being the file, its folder, or a Hub id with `config` naming the file.

    Every question of a conversation becomes a row of its own, with the record's images and without the turns before it, which
    hold answers. `answer` makes no difference: a reply is y as it is.
    """

    format = "llava"
    json_first = True

    def convert(self, record, subset):
        images, turns = images_of(record), turns_of(record)
        pairs = [(turns[number][1], turns[number + 1][1]) for number in range(0, len(turns), 2)]
        num_shown = [question.count("<image>") for question, _ in pairs]
        # Where several questions show images, each has its own; else those of the first stand for the whole conversation.
        own = sum(map(bool, num_shown)) > 1 and sum(num_shown) == len(images)
        drafts, start = [], 0
        for (question, answer), number in zip(pairs, num_shown):
            shown = images
            if own:  # a question that shows none is about those before it
                shown = images[start : start + number] if number else images[: start or None]
            start += number
            try:
                drafts.append(Draft(shown, [message("user", *with_images(question, "<image>", len(shown)))], answer))
            except BadRow as error:
                drafts.append(error)
        return drafts
