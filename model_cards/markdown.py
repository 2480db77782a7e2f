"""How cards and reports write what stands in their tables."""


def cell(text):
    """A text that cannot break a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def percent(value):
    """A share in 0..1, in per cent."""
    return f"{100 * value:.1f}%"


def points(found):
    """A `difference` of shares with its interval from `low` to `high`, in points."""
    return f"{100 * found['difference']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"
