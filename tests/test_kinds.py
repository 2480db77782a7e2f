"""Scores by kind of question, and what they are compared with."""

import datasets
import pytest

from trainer.evaluation import (
    accuracy_by_kind,
    answer_text,
    chance,
    constant_answer,
    constant_answer_accuracy,
    format_table,
)


pytestmark = pytest.mark.any_release


CHOICES = {"color": ["red", "blue"], "counting": ["0", "1", "2", "3"], "walk": []}  # a caption has none


def rows_of(*pairs):
    return datasets.Dataset.from_list(
        [
            {
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
                "kind": kind,
                "choices": CHOICES[kind],
            }
            for kind, answer in pairs
        ]
    )


def test_accuracy_counts_exact_answers_by_kind_and_the_mean_weighs_kinds_alike():
    answers = ["red", "Red", "2", "top left", "top"]
    gold = ["red", "red", "2 ", "top left", "top left"]
    kinds = ["color", "color", "count", "corner", "corner"]
    scores = accuracy_by_kind(answers, gold, kinds)
    assert scores == {"color": 0.5, "count": 1.0, "corner": 0.5, "mean": 2 / 3}  # of rows it would be 3 / 5
    assert list(scores) == ["color", "count", "corner", "mean"]


@pytest.mark.parametrize(("gold", "kinds"), [(["red", "blue"], ["color"]), (["red"], ["color", "color"])])
def test_scores_of_lists_that_differ_in_length_are_refused(gold, kinds):
    with pytest.raises(ValueError, match="zip"):
        accuracy_by_kind(["red"], gold, kinds)


def test_the_answer_is_the_text_of_the_completion():
    assert [answer_text(row) for row in rows_of(("color", "red"), ("walk", "red blue"))] == ["red", "red blue"]


def test_guessing_is_right_once_in_as_many_choices_and_never_in_captions():
    found = chance(rows_of(("counting", "2"), ("walk", "red blue"), ("color", "red"), ("counting", "0")))
    assert found == {"counting": 0.25, "walk": 0, "color": 0.5} and list(found) == ["counting", "walk", "color"]


def test_the_constant_answer_is_learnt_from_some_rows_and_scored_on_others():
    taught = rows_of(*[("color", answer) for answer in ("red", "blue", "red")], ("counting", "3"), ("counting", "1"))
    answers = constant_answer(taught)
    assert answers == {"color": "red", "counting": "1"}  # among equals, the first in the alphabet
    asked = rows_of(*[("color", answer) for answer in ("blue", "blue", "red", "blue")], ("counting", "1"))
    assert constant_answer_accuracy(asked, answers) == {"color": 0.25, "counting": 1}


def test_no_constant_answers_a_caption():
    rows = rows_of(("walk", "red blue"), ("color", "red"))
    assert constant_answer_accuracy(rows, constant_answer(rows)) == {"walk": 0, "color": 1}


def test_the_table_is_markdown_aligned_and_in_per_cent():
    columns = {"base": {"color": 0.1234, "mean": 0.0}, "AMVL, prior Z": {"mean": 1.0, "color": 0.5}}
    assert format_table(columns, ["color", "mean"]).splitlines() == [
        "| kind  |  base | AMVL, prior Z |",
        "|-------|------:|--------------:|",
        "| color |  12.3 |          50.0 |",
        "| mean  |   0.0 |         100.0 |",
    ]


def test_a_table_without_a_score_is_refused():
    with pytest.raises(KeyError, match="counting"):
        format_table({"base": {"mean": 0.5}}, ["counting", "mean"])
