"""Model cards of AMVL checkpoints and dataset cards of the rows they were trained on."""

from .diagnosis import render_diagnosis, update_card
from .generate import render_card, render_dataset_card


__all__ = ["render_card", "render_dataset_card", "render_diagnosis", "update_card"]
