"""Model cards of AMVL checkpoints."""

from .generate import render_card


__all__ = ["render_card"]
