"""Scores by kind of question: of exact answers, of guesses, and of always saying the same."""

from collections import Counter, defaultdict


def answer_text(row):
    """The answer of a row in TRL's prompt/completion format: the text of its completion."""
    return "".join(part["text"] for part in row["completion"][0]["content"] if part["type"] == "text")


def _labels(rows):
    return rows.select_columns(["kind", "choices", "completion"])  # leaves the pictures undecoded


def _mean_by_kind(kinds, values):
    """The mean of values in 0..1 for each kind, in order of appearance."""
    by_kind = defaultdict(list)
    for kind, value in zip(kinds, values, strict=True):
        by_kind[kind].append(value)
    return {kind: sum(of_kind) / len(of_kind) for kind, of_kind in by_kind.items()}


def accuracy_by_kind(answers, gold, kinds):
    """
    Share of answers that equal the gold text, per kind.

    Args:
        answers (`list[str]`), gold (`list[str]`), kinds (`list[str]`): one entry per row.

    Returns:
        `dict[str, float]`: by kind in order of appearance, and `"mean"`, the unweighted mean over kinds.
    """
    scores = _mean_by_kind(kinds, [answer == right.strip() for answer, right in zip(answers, gold, strict=True)])
    return {**scores, "mean": sum(scores.values()) / len(scores)}


def accuracy_on(rows, answers):
    """
    [`accuracy_by_kind`] of the answers to the rows of a dataset.

    Args:
        rows (`datasets.Dataset`): with the columns `kind`, `choices` and `completion`.
        answers (`list[str]`): one per row.
    """
    return accuracy_by_kind(answers, [answer_text(row) for row in _labels(rows)], rows["kind"])


def guesses(rows, train_rows):
    """What stands beside every score: [`chance`], and the [`constant_answer`] of the training rows, by name and kind."""
    return {"chance": chance(rows), "constant": constant_answer_accuracy(rows, constant_answer(train_rows))}


def chance(rows):
    """
    Accuracy of guessing among the choices, per kind.

    Args:
        rows (`datasets.Dataset`): with the columns `kind` and `choices`.

    Returns:
        `dict[str, float]`: mean of 1 / number of choices by kind in order of appearance; 0.0 for captions, which have none.
    """
    return _mean_by_kind(rows["kind"], [1 / len(choices) if choices else 0.0 for choices in rows["choices"]])


def constant_answer(rows):
    """
    The most frequent answer per kind; among equals, the one that is first in the alphabet.

    Args:
        rows (`datasets.Dataset`): the training rows, with the columns `kind` and `completion`.

    Returns:
        `dict[str, str]`: answer by kind. [`constant_answer_accuracy`] scores it on held-out rows.
    """
    counts = defaultdict(Counter)
    for row in _labels(rows):
        counts[row["kind"]][answer_text(row)] += 1
    return {kind: min(counter, key=lambda answer: (-counter[answer], answer)) for kind, counter in counts.items()}


def constant_answer_accuracy(rows, answers):
    """
    Accuracy per kind of always giving the same answer.

    Args:
        rows (`datasets.Dataset`): the rows to score, with the columns `kind`, `choices` and `completion`.
        answers (`dict[str, str]`): what [`constant_answer`] found on the training rows.

    Returns:
        `dict[str, float]`: in 0..1 by kind in order of appearance; 0.0 for captions, which have no choices.
    """
    hits = [bool(row["choices"]) and answer_text(row) == answers[row["kind"]] for row in _labels(rows)]
    return _mean_by_kind(rows["kind"], hits)


def format_table(columns, row_names):
    """
    A table of scores as Markdown, aligned for a terminal.

    Args:
        columns (`dict[str, dict[str, float]]`): scores in 0..1 by column and row.
        row_names (`list[str]`): rows in their order.

    Returns:
        `str`: scores in per cent.
    """
    first = max(len("kind"), *map(len, row_names))
    widths = {name: max(len(name), 5) for name in columns}
    lines = [
        f"| {'kind':<{first}} | " + " | ".join(f"{name:>{widths[name]}}" for name in columns) + " |",
        f"|{'-' * (first + 2)}|" + "|".join("-" * (widths[name] + 1) + ":" for name in columns) + "|",
    ]
    for row in row_names:
        cells = (f"{100 * column[row]:>{widths[name]}.1f}" for name, column in columns.items())
        lines.append(f"| {row:<{first}} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
