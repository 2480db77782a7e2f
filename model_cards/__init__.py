"""Model cards of AMVL checkpoints and dataset cards of the rows they were trained on."""

from .diagnosis import render_diagnosis, update_card
from .facts import TrainingFacts, read_facts
from .generate import render_card, render_dataset_card
from .provenance import weights_fingerprint
from .write import write_card


__all__ = [
    "TrainingFacts",
    "read_facts",
    "render_card",
    "render_dataset_card",
    "render_diagnosis",
    "update_card",
    "weights_fingerprint",
    "write_card",
]
