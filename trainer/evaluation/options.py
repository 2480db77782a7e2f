"""Finds the texts of options in a text."""

import re


ARTICLES = ("the", "a", "an")
LEADING_ARTICLE = re.compile(r"^[^\w(\[]*(?:the|an?)\s+(?=\w)", re.IGNORECASE)  # not the label of `A. cat`
# A number with its sign, a word with its apostrophe, one sign of Chinese.
TOKEN = re.compile(r"(?<!\w)-?\d+(?:[.,:/]\d+)*%?|[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+(?:'[^\W_]+)?")
DENIALS = ("not", "no", "never", "neither", "nor", "without", "than", "unlike", "except")
AT_THE_EDGE = ("yes", "no", "true", "false")  # words that sentences also use for something else
SIDES = re.compile(r"\b(?:right|correct)\s+(?:answer|option|choice|one)\b", re.IGNORECASE)


def tokens_of(text):
    """The words and numbers of a text, small, a leading article left out; single letters keep their case."""
    text = LEADING_ARTICLE.sub("", text)
    return [token if len(token) == 1 else token.casefold() for token in TOKEN.findall(text)]


def same_option(text, options):
    """The options whose text a text is, but for case, spaces and marks around it."""
    light = [" ".join(value.casefold().split()).strip(" .,;:!?\"'()[]") for value in (text, *options)]
    return [index for index, option in enumerate(light[1:]) if option and option == light[0]]


def match_option(text, options):
    """The index of the only option whose text a text is, but for case, marks and articles; or `None`."""
    found = same_option(text, options)
    if not found:
        words = tokens_of(text)
        found = [index for index, option in enumerate(options) if words and tokens_of(option) == words]
    return found[0] if len(found) == 1 else None


def mentioned_options(text, options):
    """
    The options whose texts stand in a text as whole words, outside of longer ones, and are not denied.

    Args:
        text (`str`): a reply.
        options (`list[str]`): texts of the options.

    Returns:
        `list[tuple[int, str]]`: index of the option, and the words of the text that belong to none.
    """
    words = [token if len(token) == 1 else token.casefold() for token in TOKEN.findall(SIDES.sub(" ", text))]
    free, found = [True] * len(words), set()
    for size, index in sorted(((len(tokens_of(option)), index) for index, option in enumerate(options)), reverse=True):
        wanted = tokens_of(options[index])
        for start in range(len(words) - size + 1) if size else ():
            span = range(start, start + size)
            twin = any(tokens_of(options[other]) == wanted for other in range(len(options)) if other != index)
            if words[start : start + size] != wanted or not (twin or all(free[place] for place in span)):
                continue
            if wanted[0] in AT_THE_EDGE and size == 1 and start not in (0, len(words) - 1):
                continue
            for place in span:
                free[place] = False
            if not _denied(words[:start]):
                found.add(index)
    left_over = " ".join(word for word, is_free in zip(words, free) if is_free)
    return [(index, left_over) for index in sorted(found)]


def _denied(before):
    while before and before[-1] in (*ARTICLES, "in", "on", "at", "of", "to", "it", "be", "just"):
        before = before[:-1]
    return bool(before) and (before[-1] in DENIALS or before[-1].endswith("n't"))
