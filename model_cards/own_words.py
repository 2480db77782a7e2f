"""What a person writes into a card, between two marked lines, survives every rewrite."""

import logging
import re
from pathlib import Path


logger = logging.getLogger(__name__)

START, END = (
    "<!-- own words: what stands between these two lines is kept when the card is written anew -->",
    "<!-- /own words -->",
)
MARKED = re.compile(rf"^{re.escape(START)}[ \t]*\n(.*?)^{re.escape(END)}[ \t]*$", re.M | re.S)
MARKER = re.compile(r"^<!-- /?own words\b.*$", re.M)


def section(words):
    """The section of a card, with the words of an earlier one or empty."""
    return f"{START}\n{words.strip()}\n{END}" if words.strip() else f"{START}\n{END}"


def own_words(path):
    """
    What a person wrote into a card.

    Args:
        path (`str` or `Path`): the card; none and one without the two lines hold none.

    Returns:
        `str`.

    Raises:
        ValueError: the lines are no pair, so that it is not known what to keep.
    """
    path = Path(path)
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
    found, markers = MARKED.search(text), MARKER.findall(text)
    if not markers:
        return ""
    if found is None or len(markers) != 2:
        raise ValueError(
            f"`{path}` must have the lines\n{START}\n{END}\nonce each, in this order, got {markers}: mend it, or move your words."
        )
    return found[1].strip()


def kept_words(path):
    """[`own_words`] for a run that must go on: where they are not told apart, the whole card stays beside the new one."""
    try:
        return own_words(path)
    except ValueError as error:
        aside = Path(path).with_name("README.before.md")
        if not aside.exists():
            aside.write_bytes(Path(path).read_bytes())
        logger.warning("%s The card is written anew without them; the old one is `%s`.", error, aside)
        return ""
