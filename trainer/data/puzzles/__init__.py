"""Labelled questions from photographs, without limit, in BLINK's columns: one file per family of kinds."""

from .build import FEATURES, KINDS, build_puzzles, generate_puzzles, read_sides
from .controls import chance_bounds, pixel_mean_accuracy, text_only_accuracy
from .stereo import camera_motion, stereo_pair


__all__ = [
    "FEATURES",
    "KINDS",
    "build_puzzles",
    "camera_motion",
    "chance_bounds",
    "generate_puzzles",
    "pixel_mean_accuracy",
    "read_sides",
    "stereo_pair",
    "text_only_accuracy",
]
