"""Training for AMVL models. Names are imported when they are asked for: `python -m trainer.doctor` runs where the rest cannot."""

__all__ = ["AMVLDataCollator", "AMVLSFTConfig", "AMVLSFTTrainer"]


def __getattr__(name):
    if name == "AMVLDataCollator":
        from .collator import AMVLDataCollator as found
    elif name == "AMVLSFTConfig":
        from .sft_config import AMVLSFTConfig as found
    elif name == "AMVLSFTTrainer":
        from .sft_trainer import AMVLSFTTrainer as found
    else:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    globals()[name] = found
    return found


def __dir__():
    return sorted({*globals(), *__all__})
