"""Training for AMVL models."""

from .collator import AMVLDataCollator
from .sft_config import AMVLSFTConfig
from .sft_trainer import AMVLSFTTrainer


__all__ = ["AMVLDataCollator", "AMVLSFTConfig", "AMVLSFTTrainer"]
