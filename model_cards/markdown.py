"""Any text in a card's tables, sentences and code, so that it can neither break them nor become markup."""

import json
import unicodedata


# Would show a line in another order than it is read in.
BIDIRECTIONAL = set("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
MARKUP = "\\`*[]|~$"


def one_line(text):
    """A text without line breaks, control characters and what cannot be written as UTF-8."""
    kept = (
        " " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter
        for letter in str(text)
        if unicodedata.category(letter) != "Cs" and letter not in BIDIRECTIONAL
    )
    return " ".join("".join(kept).split())


def cell(text):
    """A text that cannot break a Markdown table or sentence, nor become a link, a picture or HTML."""
    escaped = "".join(f"\\{letter}" if letter in MARKUP else letter for letter in one_line(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def sentence(text):
    """A sentence of ours with names of others in it: code stays code, nothing becomes HTML, a link or a picture."""
    return one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace("[", "\\[").replace("|", "\\|")


def code(text):
    """A text as code in a Markdown table, whatever backticks it has."""
    text = one_line(text).replace("|", "\\|")
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest or not text else ""
    return f"{fence}{space}{text}{space}{fence}"


def literal(text):
    """A text as a Python string on one line, for code that is shown."""
    return json.dumps(one_line(text), ensure_ascii=False)


def percent(value):
    """A share in 0..1, in per cent."""
    return f"{100 * value:.1f}%"


def points(found):
    """A `difference` of shares with its interval from `low` to `high`, in points."""
    return f"{100 * found['difference']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def table(heads, rows, right=()):
    """
    A Markdown table.

    Args:
        heads (`list[str]`), rows (`list[list[str]]`): cells that are safe already.
        right (`Collection[int]`, *optional*): columns of numbers.

    Returns:
        `str`.
    """
    rule = ["---:" if place in right else "---" for place in range(len(heads))]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(rule)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
