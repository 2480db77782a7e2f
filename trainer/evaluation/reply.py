"""Reads which option a reply chooses, or that it cannot be told: never at random, and the same for every model."""

import re
import string
import unicodedata

from .options import AT_THE_EDGE, match_option, mentioned_options, same_option, tokens_of


LETTERS = string.ascii_uppercase
LOOK_BACK, LOOK_AHEAD = 60, 400  # characters
NOT_AN_OPTION = ""  # a reply says clearly something that is no single option: two letters, or one beyond the options

# What a statement of the answer starts with; the answer follows.
HEADS = re.compile(
    r"""
    \b(?:answer|ans|(?:correct|best|right|final|my)\s+(?:option|choice|letter|selection|one))
        \b(?!\s*(?:isn't|not\b|can't|cannot))
        (?:[^.!?\n:=]{0,60}?(?:\b(?:is|was|would\ be|should\ be|must\ be)\b(?!\s*not\b|n't)\s*:?|["']?\s*(?::|=|->|→|=>|-\s))
           |\s+(?=["'(\[]?[A-Z]["')\]]?(?:[.,;:!]|\s*$)))
  | \b(?:option|choice|response|solution|result|correct|conclusion|output)\s*(?::|=)
  | \b(?:i|we|i'd|i'll|would|to|must|should|therefore,?)\s+(?:choose|pick|select|go\s+with|opt\s+for)\b
  | (?:答案|正确选项)\s*(?:应该|应当|应|就)?\s*(?:是|为|选|:)+
  | (?:选择|应选|故选|所以选|因此选|我选|选)\s*:?
    """,
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
ADVERBS = re.compile(
    r"(?:[\s:\"']*\b(?:most\s+likely|likely|probably|clearly|definitely|therefore|thus|simply|that|the|option|choice|letter|answer|选项)\b)*[\s:]*",
    re.IGNORECASE,
)
# `(B)`, `[B]`, `"B"`, `B` followed by a mark or the end; a small letter needs brackets, a mark or to stand alone.
ENCLOSED = re.compile(r"\W*?[(\[{<\"']\s*([A-Za-z])\s*[)\]}>\"']")
MARKED = re.compile(r"\W*([A-Za-z])\s*[)\]]?(?:[.:)\]](?![A-Za-z0-9])|[,;!?](?!\w)|\s+[-–—]\s|\s*[-–—.:]*\s*(?:\n|$))")
CAPITAL = re.compile(r"\W*([A-Z])(?![A-Za-z0-9'])")
ALONE = re.compile(r"\W*(?:(?:option|choice|letter|选项)\s*\W?)?([A-Za-z])(?:[^\w+#]+\1)*[^\w+#]*", re.IGNORECASE)
# After a letter that is no article: `A because ...`, `B is closer`.
GOES_ON = re.compile(
    r"\s*(?:(?:because|since|as|for|based|given|so|due|which|is|are|was|has|shows?|would|seems|appears|matches|fits|looks)\b"
    r"|[^\sA-Za-z0-9+#-])",
)
SECOND = re.compile(
    r"\W*(?:[,/&、]|\b(?:or|and)\b|或|和)\W*(?:(?:or|and|option)\b\W*)*([A-Z])(?![A-Za-z0-9'])"
    r"(?=\W*$|\W*\n|[)\]]|\s*[,.;/]|\s+(?:or|and)\b)"
)
LISTED = re.compile(r"\s*[(\[]?[A-Z][.):\]](?!\w)")  # `A. B. C.`
REJECTED = re.compile(r"\s*(?:is|are|was|seems)\s+(?:not\b|incorrect|wrong|false)|\s+not\b|\s*(?:isn't|cannot|can't)")
CONFIRMED = re.compile(
    r"(?<![A-Za-z0-9'])[(\[]?([A-Z])[)\]]?(?![A-Za-z0-9'])(?:[^.!?\n]{0,40}?\S)?\s+is\s+(?!not\b)(?:(?:therefore|clearly|the|my|most)\s+)*"
    r"(?:(?:correct|right|best|final|appropriate|likely)\s+)?(?:answer|option|choice|one\b|correct(?=\W*(?:$|[.,;!]|\n|and|because))|right(?=\W*(?:$|[.,;!]|\n)))",
    re.MULTILINE,
)
CONCLUSIONS = re.compile(
    r"(?:\b(?:therefore|thus|hence|so|finally|in\s+conclusion|conclusion|clearly|obviously|definitely|certainly|probably)\b[,:]?(?:\s+(?:it\s+is|it's|it\s+must\s+be|i\s+say))?"
    r"|[a-z]{2}[.!?])\s+(?:option\s+)?[(\[]?([A-Z])[)\]]?[.!]?\s*$",
    re.IGNORECASE,
)
MENTIONS = re.compile(
    r"(?<![\w])[(\[]([A-Za-z])[)\]]"
    r"|\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer|[Ll]etter|选项)\s*[(\[\"']?([A-Z])(?![A-Za-z0-9'])"
    r"|\b(?:[Ii]t\s+is|[Ii]t's|think|believe|guess|say|be|but|rather|instead|probably|likely|definitely|was|is)\s+([A-Z])(?=\s*[.!,;]?\s*(?:$|\n|[.!,;]\s))"
    r"|^\W*([A-Z])(?=\s+(?:or|and|/)\s+\(?[A-Z](?![A-Za-z0-9']))"
)
NEGATED = re.compile(
    r"(?:\bnot|n't|\bnor|\bneither|\brather\s+than|\binstead\s+of|\bexcept|\bthan)\s+(?:be\s+)?(?:option\s+|choice\s+)?$",
    re.I,
)
HEDGES = re.compile(
    r"\b(?:(?:cannot|can't|can\s+not|couldn't|could\s+not)\s+(?:\w+\s+)?(?:tell|determine|say|see|identify|answer|know|decide|determined|sure)|unable|unclear|unsure|not\s+sure|not\s+possible|impossible|don't\s+know|do\s+not\s+know|whether|neither|none)\b",
    re.IGNORECASE,
)


def read_reply(text, options=None, num_options=4):
    """
    The letter of the option that a reply chooses.

    Read as an answer: a bare letter; `(B)`, `B.`, `[B]`, `**B**`, `$B$`, `B) cat`; `Answer: B`, `The answer is B` and their
    kin, also in Chinese; `\\boxed{B}`; `<answer>B</answer>`; the text of exactly one option, alone or within the reply. Of
    several statements of the answer the last counts. A thought in `<think>` is left out. Nothing is guessed: `A cat` is no A,
    `Definitely blue` no D, `A or B` nothing, and a letter beyond the options, or beside the text of another, nothing.

    Args:
        text (`str`, *optional*): the reply.
        options (`list[str]`, *optional*): texts of the options in order; `None` where they stand in the picture.
        num_options (`int`, defaults to 4): how many there are where `options` is `None`.

    Returns:
        `str` or `None`: `"A"` for the first option; `None` where no single option can be read.

    Raises:
        ValueError: no option, or more than there are letters.
    """
    options = [""] * num_options if options is None else [str(option) for option in options]
    if not 1 <= len(options) <= len(LETTERS):
        raise ValueError(f"`options` must be 1 to {len(LETTERS)} texts, got {len(options)}.")
    if text is None:
        return None
    text = plain(text)
    options = [plain(option) for option in options]
    for reading in (_short(text, options), _stated(text, options), _by_lines(text, options)):
        if reading is not None:
            return reading or None
    return _mentioned(text, options)


def plain(text):
    """A text without what only marks it up: full-width forms, thoughts, Markdown, LaTeX, tags; boxes become statements."""
    text = unicodedata.normalize("NFKC", str(text))
    for old, new in (
        ("’", "'"),
        ("‘", "'"),
        ("“", '"'),
        ("”", '"'),
        ("。", ". "),
        ("、", ", "),
        ("【", "["),
        ("】", "]"),
        ("−", "-"),
    ):
        text = text.replace(old, new)
    text = re.sub("[\u200b-\u200f\u2060\ufeff]", "", text)
    text = re.sub(r"\n\s*\n", "\n", re.sub(r"[^\S\n]+", " ", text))
    if "</think>" in text:
        text = text.rsplit("</think>", 1)[1]
    elif "<think>" in text:
        return ""  # cut off before it came to an answer
    text = re.sub(r"<\|[^|<>]*\|>|</s>|<eos>|<end_of_turn>|<end_of_utterance>", " ", text)
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname|rm|bf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\?(?:\bboxed|\bfbox|\x08oxed)\s*\{((?:[^{}]|\{[^{}]*\})*)(?:\}|$)", r"\nAnswer: \1\n", text)
    text = re.sub(
        r"<(answer|ans|final_answer|choice|option)>\s*(.*?)\s*(?:</\1>|$)", r"\nAnswer: \2\n", text, flags=re.S | re.I
    )
    text = re.sub(r"<(b|strong|em|i|u)>(.*?)</\1>", r"**\2**", text, flags=re.S | re.I)
    text = re.sub(r"\\[()\[\]]|\\[,;!]|\\quad", " ", text)
    text = re.sub(r"\${1,2}([^$\n]{1,60})\${1,2}", r"\1", text)
    text = re.sub(r"(\*\*|__|`|\*)\s*\(?([A-Z])\)?\s*\1", r"(\2)", text)
    text = re.sub(r"\*\*|__|`+|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)|^[ ]?(?:#+|>|[-*•]\s)\s*", "", text, flags=re.M)
    return text.strip()


def _letter(letter, options):
    letter = letter.upper()
    return letter if letter in LETTERS[: len(options)] else NOT_AN_OPTION


def _short(text, options):
    """What a whole text says as an answer alone: a letter, or the text of one option."""
    if match := ALONE.fullmatch(text):
        if not same_option(text, options) or match[1].upper() in LETTERS[: len(options)]:
            return _letter(match[1], options)
    found = match_option(text, options)
    return None if found is None else LETTERS[found]


def _labelled(text, options):
    """The letter that a text starts with as a label: `(B) cat`, `B. cat`, `B because ...`."""
    line = text.split("\n", 1)[0]
    for pattern in (ENCLOSED, MARKED, CAPITAL):
        if not (match := pattern.match(line)):
            continue
        letter, rest = _letter(match[1], options), line[match.end() :]
        if SECOND.match(line[match.end(1) :]):
            return NOT_AN_OPTION
        if REJECTED.match(rest):
            return None
        if LISTED.match(rest):
            return NOT_AN_OPTION
        if _lists_another(rest, letter, options):
            return NOT_AN_OPTION
        named = match_option(rest, options)
        own = letter and options[LETTERS.index(letter)]
        if named is not None and letter and LETTERS[named] != letter:
            return NOT_AN_OPTION if pattern is not CAPITAL or match[1] not in "AI" else None
        if pattern is not CAPITAL or named is not None or not rest.strip():
            return letter
        if GOES_ON.match(rest) or (
            match[1] not in "AI" and own and tokens_of(rest)[: len(tokens_of(own))] == tokens_of(own)
        ):
            return letter
        # `B cat`: a capital that is no article and that no word of the reply explains otherwise
        return None
    return None


def _lists_another(rest, letter, options):
    """Whether what follows a label has another option's label with its text, `(A) cat (B) dog`, and does not deny it."""
    for other, option in zip(LETTERS, options):
        if other != letter and option:
            label = re.compile(rf"(?<!\w)[(\[]?{other}[.):\]]\s*{re.escape(option)}(?!\w)", re.IGNORECASE)
            if any(not NEGATED.search(rest[: match.start()]) for match in label.finditer(rest)):
                return True
    return False


def _stated(text, options):
    """The last statement of the answer that can be read."""
    found = []
    for head in HEADS.finditer(text):
        start = ADVERBS.match(text, head.end()).end()
        rest = text[start : start + LOOK_AHEAD]
        line = rest.split("\n", 1)[0]
        sentence = re.split(r"[.;!?](?:\s|$)", line, maxsplit=1)[0]
        readings = (
            _short(line, options),
            _short(sentence, options),
            _labelled(line, options),
            _by_text(sentence, options),
        )
        reading = next((reading for reading in readings if reading is not None), None)
        if reading is not None:
            found.append((head.end(), reading))
    for match in CONFIRMED.finditer(text):
        if not NEGATED.search(_before(text, match.start())):
            found.append((match.end(), _letter(match[1], options)))
    if (match := CONCLUSIONS.search(text)) and match[1].isupper():
        found.append((match.end(), _letter(match[1], options)))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _by_lines(text, options):
    """The letter of the lines that are an answer: bare letters first, then letters before a text."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bare = {_letter(match[1], options) for line in lines if (match := ALONE.fullmatch(line))}
    labels = bare or {label for line in lines if (label := _labelled(line, options)) is not None}
    if len(labels) > 1:
        return NOT_AN_OPTION
    if labels:
        (label,) = labels
        others = {_letter(letter, options) for letter in _mentions(text)} - {label}
        return NOT_AN_OPTION if others and not bare and not _labelled(lines[0], options) else label
    readings = {reading for line in (lines[:1] + lines[-1:]) if (reading := _short(line, options)) is not None}
    return readings.pop() if len(readings) == 1 else None


def _before(text, place):
    return text[max(place - LOOK_BACK, 0) : place]


def _mentions(text):
    found = []
    for match in MENTIONS.finditer(text):
        letter = next(group for group in match.groups() if group)
        if not NEGATED.search(_before(text, match.start())) and not NEGATED.search(
            _before(text, match.start(match.lastindex))
        ):
            if not REJECTED.match(text[match.end() :]):
                found.append(letter.upper())
    return found


def _mentioned(text, options):
    """The one option that a text speaks of, by its letter or its text."""
    letters = {_letter(letter, options) for letter in _mentions(text)}
    by_text = _by_text(text, options)
    if len(letters) == 1:
        (letter,) = letters
        return letter if letter and by_text in (None, letter) else None
    return None if letters or text.endswith("?") else by_text


def _by_text(text, options):
    """The letter of the only option whose text stands in a text and is not denied."""
    found = mentioned_options(text, options)
    if len(found) != 1:
        return None
    (index, left_over) = found[0]
    return None if HEDGES.search(left_over) and options[index].casefold() not in AT_THE_EDGE else LETTERS[index]
