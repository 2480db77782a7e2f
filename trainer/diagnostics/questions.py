"""What a diagnosis has to know of a row besides its images: question, gold answer, options, kind; and a wrong answer."""

import random
import re
import string
from dataclasses import dataclass, field, replace

from ..collator import parts_of, split_turns, text_of
from ..evaluation.reply import read_reply


LETTERED = re.compile(r"\(?([A-Z])\)?\.?")
OPTION = re.compile(r"^[ \t]*(?:\(([A-Z])\)|([A-Z])[.)])[ \t]*(\S.*)$", re.M)
IMAGE_COLUMNS = ("images", "image")
NUM_LETTERS = 4  # of a question whose options stand in the picture


@dataclass
class Question:
    """
    A row without its images.

    Args:
        prompt, completion (`list[dict]` or `str`): x and y as the collator takes them.
        text (`str`): of the question; rows with the same text ask the same.
        gold (`str`): the text of y.
        options (`list[str]`): what can be answered: `choices` of the row, or the options "(A) ..." of a lettered question; empty
            where that is open or stands in the picture.
        kind (`str`): `kind`, otherwise `source` of the row, otherwise `"all"`.
    """

    prompt: list | str
    completion: list | str
    text: str
    gold: str
    options: list[str] = field(default_factory=list)
    kind: str = "all"

    @property
    def letter(self):
        """The gold letter of a lettered question, otherwise `None`."""
        match = LETTERED.fullmatch(self.gold)
        return match[1] if match and self.gold not in self.options else None


def read_questions(rows):
    """
    The questions of a dataset; no image is decoded.

    Args:
        rows (`datasets.Dataset`): as [`AMVLDataCollator`] takes them; columns `choices`, `kind` and `source` are read where
            there are any.

    Returns:
        `list[Question]`: one per row.

    Raises:
        ValueError: a row without a question or an answer.
    """
    bare = rows.remove_columns([name for name in IMAGE_COLUMNS if name in rows.column_names])
    return [_question(row, f"Row {index}") for index, row in enumerate(bare)]


def _question(row, name):
    prompt, completion = split_turns(row, name)
    if isinstance(prompt, str):
        text, gold = prompt, completion
    else:
        pieces = [part["text"] for turn in prompt for part in parts_of(turn) if part["type"] == "text"]
        text, gold = "\n".join(pieces), text_of(completion, f"{name}, `completion`")
    gold = gold.strip()
    options = list(row.get("choices") or [])
    if not options and (match := LETTERED.fullmatch(gold)):
        found = read_options(text)
        options = found if match[1] in string.ascii_uppercase[: len(found)] else []
    return Question(prompt, completion, text, gold, options, str(row.get("kind") or row.get("source") or "all"))


def read_options(text):
    """The last run of lines "(A) ...", "(B) ..." or "A. ...", "B. ..." of a question, in order from A; empty where there is none."""
    runs = []
    for match in OPTION.finditer(text):
        letter, option = match[1] or match[2], match[3].strip()
        if letter == "A":
            runs.append([option])
        elif runs and letter == string.ascii_uppercase[len(runs[-1]) :][:1]:
            runs[-1].append(option)
        else:
            runs.append([])  # out of order: the run before it has ended
    runs = [run for run in runs if len(run) > 1]
    return runs[-1] if runs else []


def is_right(answer, question):
    """Whether an answer is the gold text or, of a lettered question, is read as its letter."""
    answer = answer.strip()
    if answer == question.gold:
        return True
    return question.letter is not None and read_letter(answer, question) == question.letter


def read_letter(answer, question):
    """The letter that the answer to a lettered question gives, `None` where none can be read."""
    return read_reply(answer, question.options or None, NUM_LETTERS)


def said(answer, question):
    """What an answer says whatever its form: its letter, otherwise its words in one case and without marks at the end."""
    letter = None if question.letter is None else read_letter(answer, question)
    return letter or answer.casefold().strip().rstrip(".,;:!? ")


def wrong_answers(questions, seed=0):
    """
    One wrong answer for each question: another of its options; where it has none, another row's answer.

    Args:
        questions (`list[Question]`): of a dataset.
        seed (`int`, defaults to 0): of the draw.

    Returns:
        `list[str]`: never the gold answer. Of open questions the answer of a row of the same kind where one differs.

    Raises:
        ValueError: all rows of a dataset without options have one answer.
    """
    draw = random.Random(seed)
    everything = sorted({question.gold for question in questions})
    of_kind = {question.kind: set() for question in questions}
    for question in questions:
        of_kind[question.kind].add(question.gold)
    wrong = []
    for question in questions:
        if question.letter is not None:
            letters = string.ascii_uppercase[: len(question.options) or NUM_LETTERS]
            candidates = [question.gold.replace(question.letter, letter) for letter in letters]
        elif question.gold in question.options:
            candidates = question.options
        else:
            candidates = sorted(of_kind[question.kind])
            candidates = candidates if len(candidates) > 1 else everything
        candidates = [candidate for candidate in candidates if candidate != question.gold]
        if not candidates:
            raise ValueError(
                f"Every row has the answer {question.gold!r} and no `choices`: no answer can be wrong. Name other data."
            )
        wrong.append(draw.choice(candidates))
    return wrong


def with_answer(question, answer):
    """The completion of a question in its form, saying something else."""
    if isinstance(question.completion, str):
        return answer
    return [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def with_wrong_answers(questions, seed=0):
    """The questions with one of [`wrong_answers`] in the place of the gold answer."""
    return [
        replace(question, completion=with_answer(question, answer), gold=answer)
        for question, answer in zip(questions, wrong_answers(questions, seed))
    ]
