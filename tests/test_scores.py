"""Scores, chance, constant answers and intervals are what their formulas say, on planted cases."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from trainer.evaluation.scores import accuracy_by_task, chance_hits, constant_answers, paired_bootstrap, total_score


TASKS = ["a", "a", "a", "b"]


def test_a_mean_over_tasks_weighs_tasks_alike_and_a_mean_over_rows_weighs_rows_alike():
    assert accuracy_by_task([1, 0, 0, 1], TASKS) == {"a": 1 / 3, "b": 1.0}
    assert total_score([1, 0, 0, 1], TASKS, "mean over tasks") == pytest.approx(2 / 3)
    assert total_score([1, 0, 0, 1], TASKS, "mean over rows") == 0.5
    with pytest.raises(ValueError, match="`rule`.*'median'"):
        total_score([1], ["a"], "median")
    with pytest.raises(ValueError, match="`hits` is empty"):
        total_score([], [], "mean over rows")


def test_chance_follows_the_options_of_each_row():
    assert chance_hits([2, 4, 4, 2]) == [0.5, 0.25, 0.25, 0.5]
    assert total_score(chance_hits([2, 4, 4, 2]), TASKS, "mean over tasks") == pytest.approx(5 / 12)


def test_the_constant_answer_is_the_best_letter_on_these_rows():
    by_task, total = constant_answers(["A", "B", "B", "A"], TASKS, "mean over tasks")
    assert by_task == {"a": ("B", 2 / 3), "b": ("A", 1.0)} and total == ("BA", pytest.approx(5 / 6))
    assert constant_answers(["A", "B", "B", "A"], TASKS, "mean over rows")[1] == ("A", 0.5)  # the first of two as good


def test_two_identical_runs_differ_by_nothing():
    hits = np.random.default_rng(0).integers(0, 2, 50)
    for strata in (None, ["a"] * 20 + ["b"] * 30):
        assert paired_bootstrap(hits, hits, strata=strata) == (0.0, 0.0, 0.0)


def test_the_interval_is_that_of_scipy_and_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, 300).astype(float)
    second = np.where(rng.random(300) < 0.1, 1.0, first)
    difference, low, high = paired_bootstrap(first, second)
    reference = bootstrap(
        (first, second), lambda a, b, axis: b.mean(axis) - a.mean(axis), paired=True, vectorized=True,
        method="percentile", n_resamples=10000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert difference == pytest.approx(second.mean() - first.mean())
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.005)
    assert high - low < 2 * 1.96 * np.sqrt(2 * 0.25 / 300) * 0.6
    assert paired_bootstrap(first, second) == (difference, low, high)  # the same seed
    assert paired_bootstrap(second, first)[0] == -difference


def test_a_known_difference_is_covered_as_often_as_is_said():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        first = (rng.random(120) < 0.5).astype(float)
        second = np.where(first == 1, rng.random(120) < 0.9, rng.random(120) < 0.3).astype(float)  # true: +0.1
        _, low, high = paired_bootstrap(first, second, num_resamples=500)
        covered += low <= 0.1 <= high
    assert 180 <= covered <= 199


def test_rotations_drawn_together_widen_the_interval_as_if_each_question_were_one_row():
    rng = np.random.default_rng(0)
    gains = rng.integers(-1, 2, 60).astype(float)
    rows = np.repeat(gains, 4)
    together = paired_bootstrap(np.zeros(240), rows, groups=np.repeat(np.arange(60), 4).tolist())
    assert together == pytest.approx(paired_bootstrap(np.zeros(60), gains))
    apart = paired_bootstrap(np.zeros(240), rows)
    assert together[2] - together[1] > 1.7 * (apart[2] - apart[1])


def test_rows_are_drawn_within_their_task_and_tasks_weigh_alike():
    first, second = np.zeros(110), np.r_[np.ones(10), np.zeros(100)]
    strata = ["small"] * 10 + ["large"] * 100
    assert paired_bootstrap(first, second, strata=strata) == pytest.approx((0.5, 0.5, 0.5))  # no spread inside a task
    difference, low, high = paired_bootstrap(first, second)
    assert difference == pytest.approx(1 / 11) and low < difference < high


def test_rows_that_are_no_pairs_are_refused():
    for first, second, message in (([1], [1, 2], "same rows"), ([], [], "same rows")):
        with pytest.raises(ValueError, match=message):
            paired_bootstrap(first, second)
    with pytest.raises(ValueError, match="`confidence`.*95"):
        paired_bootstrap([1], [1], confidence=95)
    with pytest.raises(ValueError, match="`groups` must have one entry per row, 2, got 1"):
        paired_bootstrap([1, 0], [1, 1], groups=["a"])
    with pytest.raises(ValueError, match="`groups` has a group whose rows lie in two `strata`"):
        paired_bootstrap([1, 0], [1, 1], groups=["a", "a"], strata=["x", "y"])
