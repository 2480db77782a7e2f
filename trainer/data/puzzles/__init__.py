"""Labelled questions from photographs, without limit, in BLINK's columns: one file per family of kinds."""

from .build import FEATURES, KINDS, build_puzzles, generate_puzzles, read_sides
from .controls import chance_bounds, pixel_mean_accuracy, text_only_accuracy


__all__ = [
    "FEATURES",
    "KINDS",
    "build_puzzles",
    "chance_bounds",
    "generate_puzzles",
    "pixel_mean_accuracy",
    "read_sides",
    "text_only_accuracy",
]
