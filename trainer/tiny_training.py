"""Trains what the embedded default and its ablation compare, with one recipe: plain SFT, and AMVL."""

import os

import torch
from trl import SFTConfig, SFTTrainer

from .console import show_progress
from .sft_config import AMVLSFTConfig
from .sft_trainer import AMVLSFTTrainer


NUM_WORKERS = min(1, (os.cpu_count() or 1) - 1)  # processes that read rows beside the one that trains


def settings(output_dir, num_steps, batch_size, learning_rate, seed):
    """What both share: fp32, AdamW, cosine schedule with 5% warm-up, no checkpoint; a `dict` of `SFTConfig`'s fields."""
    return {
        "output_dir": str(output_dir),
        "max_steps": num_steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, num_steps // 20),
        "weight_decay": 0.01,
        "adam_beta2": 0.95,
        "seed": seed,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": max(1, num_steps // 20),
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": NUM_WORKERS,
    }


def train_sft(model, processor, rows, output_dir, num_steps, batch_size=32, learning_rate=1e-3, seed=0, **config):
    """
    Plain SFT on the answers, by TRL's stock `SFTTrainer` with its progress bar.

    Args:
        model (`PreTrainedModel`): the stock VLM, trained in place. Parameters with `requires_grad=False` (a frozen vision
            encoder) stay.
        processor (`ProcessorMixin`): its processor, with a chat template.
        rows (`datasets.Dataset`): in TRL's prompt/completion format, with `images`; shuffled here.
        output_dir (`str` or `Path`): folder that the trainer may write to.
        num_steps (`int`): optimiser steps of `batch_size` rows each, as many passes over `rows` as that takes.
        batch_size (`int`, defaults to 32): rows per step and device.
        learning_rate (`float`, defaults to 1e-3): peak of the cosine schedule.
        seed (`int`, defaults to 0): of the order of rows.
        **config: further fields of `SFTConfig`, which win over those of [`settings`].

    Returns:
        `list[float]`: the training loss in nats per answer token, logged twenty times along the run. The model is left
        in evaluation mode.
    """
    arguments = settings(output_dir, num_steps, batch_size, learning_rate, seed)
    arguments["max_length"] = None  # a cut prompt would lose image tokens
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**(arguments | config)), train_dataset=rows, processing_class=processor
    )
    show_progress(trainer)
    trainer.train()
    model.zero_grad(set_to_none=True)
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_amvl(
    model,
    processor,
    rows,
    output_dir,
    num_steps,
    batch_size=32,
    learning_rate=1e-3,
    seed=0,
    eval_rows=None,
    peft_config=None,
    **config,
):
    """
    AMVL by [`AMVLSFTTrainer`], with the recipe of [`train_sft`].

    Args:
        model ([`AMVLForConditionalGeneration`]): trained in place.
        processor ([`AMVLProcessor`]): its processor.
        rows, output_dir, num_steps, batch_size, learning_rate, seed: see [`train_sft`].
        eval_rows (`datasets.Dataset`, *optional*): evaluated eight times along the run.
        peft_config (`PeftConfig`, *optional*): trains an adapter, which is on the model afterwards.
        **config: further fields of [`AMVLSFTConfig`], which win over those of [`settings`].

    Returns:
        [`AMVLSFTTrainer`]: after training, to save from; the model is left in evaluation mode.
    """
    arguments = settings(output_dir, num_steps, batch_size, learning_rate, seed)
    arguments["check_dataset"] = False  # rows that were built a moment ago
    if eval_rows is not None:
        arguments |= {"eval_strategy": "steps", "eval_steps": max(1, num_steps // 8)}
    trainer = AMVLSFTTrainer(
        model,
        AMVLSFTConfig(**(arguments | config)),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train()
    model.zero_grad(set_to_none=True)
    model.eval()
    return trainer
