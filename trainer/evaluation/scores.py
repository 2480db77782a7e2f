"""Scores of answers as pure functions: accuracy per task and in total, chance, constant answers, paired intervals."""

from collections import Counter, defaultdict

import numpy as np


RULES = ("mean over tasks", "mean over rows")
RESAMPLES_AT_ONCE = 1000  # each holds one count per group


def accuracy_by_task(hits, tasks):
    """
    Share of right answers by task.

    Args:
        hits (`list[float]`): score of each row, 1 where it is right.
        tasks (`list[str]`): task of each row.

    Returns:
        `dict[str, float]`: in 0..1, tasks in order of appearance.
    """
    by_task = defaultdict(list)
    for hit, task in zip(hits, tasks, strict=True):
        by_task[task].append(float(hit))
    return {task: sum(values) / len(values) for task, values in by_task.items()}


def total_score(hits, tasks, rule):
    """
    The score of a benchmark.

    Args:
        hits (`list[float]`), tasks (`list[str]`): as in [`accuracy_by_task`].
        rule (`str`): `"mean over tasks"`, unweighted, or `"mean over rows"`.

    Returns:
        `float`: in 0..1.

    Raises:
        ValueError: no row, or another rule.
    """
    if rule not in RULES:
        raise ValueError(f"`rule` must be one of {RULES}, got {rule!r}.")
    if not len(hits):
        raise ValueError("`hits` is empty: there is no score of no row.")
    values = list(accuracy_by_task(hits, tasks).values()) if rule == RULES[0] else [float(hit) for hit in hits]
    return sum(values) / len(values)


def chance_hits(num_options):
    """What guessing scores on each row: one over its number of options."""
    return [1 / number for number in num_options]


def constant_answers(gold, tasks, rule):
    """
    What always giving one letter scores: the letter that is right most often on these very rows, so an upper bound.

    Args:
        gold (`list[str]`), tasks (`list[str]`): letter and task of each row.
        rule (`str`): as in [`total_score`].

    Returns:
        `tuple[dict[str, tuple[str, float]], tuple[str, float]]`: letter and accuracy of each task, and of all. Under
        `"mean over tasks"` the second is the mean of the first, with its letters in the order of the tasks; under `"mean
        over rows"` one letter for all rows.
    """
    by_task = defaultdict(list)
    for letter, task in zip(gold, tasks, strict=True):
        by_task[task].append(letter)
    best = {task: _most_frequent(letters) for task, letters in by_task.items()}
    if rule == RULES[0]:
        letters = "".join(letter for letter, _ in best.values())
        return best, (letters, sum(score for _, score in best.values()) / len(best))
    return best, _most_frequent(gold)


def _most_frequent(letters):
    letter, number = min(Counter(letters).items(), key=lambda pair: (-pair[1], pair[0]))
    return letter, number / len(letters)


def paired_bootstrap(first, second, groups=None, strata=None, confidence=0.95, num_resamples=10000, seed=0):
    """
    Difference of two runs on the same rows, with a percentile bootstrap interval.

    Args:
        first (`array`), second (`array`): scores of the rows, in the same order.
        groups (`list`, *optional*): rows of one group are drawn together, such as the rotations of one question. By
            default every row is drawn on its own.
        strata (`list`, *optional*): with them the score is the unweighted mean over strata of their means, such as a mean over
            tasks, and groups are drawn within each.
        confidence (`float`, defaults to 0.95): of the interval.
        num_resamples (`int`, defaults to 10000), seed (`int`, defaults to 0): of the bootstrap.

    Returns:
        `tuple[float, float, float]`: mean of `second` minus mean of `first`, and the ends of its interval.

    Raises:
        ValueError: rows that are not paired, no row, a confidence outside 0..1, or a group in two strata.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            f"`first` and `second` must be scores of the same rows, got shapes {first.shape} and {second.shape}."
        )
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}.")
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` must be at least 1, got {num_resamples}.")
    differences = second - first
    groups = np.arange(len(first)) if groups is None else _numbered(groups, len(first), "groups")
    strata = np.zeros(len(first), dtype=int) if strata is None else _numbered(strata, len(first), "strata")
    if len(set(zip(groups.tolist(), strata.tolist()))) != len(set(groups.tolist())):
        raise ValueError("`groups` has a group whose rows lie in two `strata`: draw them apart.")
    rng = np.random.default_rng(seed)
    difference, resampled = 0.0, np.zeros(num_resamples)
    num_strata = strata.max() + 1
    for stratum in range(num_strata):
        inside = strata == stratum
        _, group = np.unique(groups[inside], return_inverse=True)
        sums, sizes = np.bincount(group, weights=differences[inside]), np.bincount(group).astype(float)
        difference += sums.sum() / sizes.sum() / num_strata
        shares = np.full(len(sums), 1 / len(sums))
        for start in range(0, num_resamples, RESAMPLES_AT_ONCE):
            drawn = rng.multinomial(len(sums), shares, size=min(RESAMPLES_AT_ONCE, num_resamples - start))  # (R, G)
            resampled[start : start + len(drawn)] += (drawn @ sums) / (drawn @ sizes) / num_strata
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(difference), float(low), float(high)


def paired_difference(first, second, groups=None, seed=0):
    """[`paired_bootstrap`] of two runs by name: `difference`, and `low` and `high`, 95%."""
    return dict(zip(("difference", "low", "high"), paired_bootstrap(first, second, groups, seed=seed)))


def _numbered(labels, num_rows, name):
    if len(labels) != num_rows:
        raise ValueError(f"`{name}` must have one entry per row, {num_rows}, got {len(labels)}.")
    numbers = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels])
