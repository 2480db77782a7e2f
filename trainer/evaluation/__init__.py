"""Asks models questions and scores the answers: rows of a dataset word for word, benchmarks by the letter of an option."""

from .answering import LATENT_SOURCES, answer_questions
from .kinds import (
    accuracy_by_kind,
    accuracy_on,
    answer_text,
    chance,
    constant_answer,
    constant_answer_accuracy,
    format_table,
    guesses,
)


__all__ = [
    "LATENT_SOURCES",
    "accuracy_by_kind",
    "accuracy_on",
    "answer_questions",
    "answer_text",
    "chance",
    "constant_answer",
    "constant_answer_accuracy",
    "format_table",
    "guesses",
]
