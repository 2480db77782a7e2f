"""Model cards of AMVL checkpoints and dataset cards of the rows they were trained on."""

from .generate import render_card, render_dataset_card


__all__ = ["render_card", "render_dataset_card"]
