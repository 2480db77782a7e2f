"""Trains a tiny model on numbered rows and notes which of them each batch held; as a script, under accelerate, on every process."""

import io
import json
import os
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from tiny import build_tiny_backbone

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from trainer import AMVLDataCollator, AMVLSFTConfig, AMVLSFTTrainer
from trainer.data.rows import FEATURES, message


def make_row(index, is_broken=False):
    """A row whose number is its id, and whose prompt is longer or shorter for it."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((48, 48, 3), index, np.uint8)).save(buffer, format="PNG")
    return {
        "images": [{"bytes": b"no image" if is_broken else buffer.getvalue(), "path": None}],
        "prompt": [message("user", {"type": "image", "text": None}, "What color is it?" + " red" * (index * 7 % 13))],
        "completion": [message("assistant", "red")],
        "source": "tiny",
        "row_id": str(index),
    }


def make_rows(num_rows, broken=()):
    rows = [make_row(index, index in broken) for index in range(max(num_rows, 1))]
    return datasets.Dataset.from_list(rows, features=FEATURES).select(range(num_rows))


class NotingCollator:
    """Our collator, and the numbers of its rows."""

    def __init__(self, processor):
        self.collator = AMVLDataCollator(processor)

    def __call__(self, rows):
        return self.collator(rows) | {"row_ids": torch.tensor([int(row["row_id"]) for row in rows])}


class NotingTrainer(AMVLSFTTrainer):
    """Keeps, for each step, the batches of row numbers that this process got, and how many tokens were padding."""

    def _noting(self, inputs):
        if self.state.global_step not in self.seen:
            self.seen[self.state.global_step] = []
        self.seen[self.state.global_step].append(inputs.pop("row_ids").tolist())
        self.padding += int((inputs["attention_mask"] == 0).sum())

    def training_step(self, model, inputs, *arguments, **kwargs):
        self._noting(inputs)
        return super().training_step(model, inputs, *arguments, **kwargs)

    def prediction_step(self, model, inputs, *arguments, **kwargs):
        inputs.pop("row_ids")
        return super().prediction_step(model, inputs, *arguments, **kwargs)


def run(folder, num_rows=11, shards=None, buffer=0, broken=(), resume=None, eval_rows=0, **settings):
    """
    Trains.

    Args:
        folder (`str`): of the checkpoints.
        num_rows (`int`, defaults to 11): rows.
        shards (`int`, *optional*): shards of a stream; by default the rows are map-style.
        buffer (`int`, defaults to 0): rows that a shuffled stream draws from.
        broken (`tuple`, defaults to `()`): rows whose image cannot be decoded.
        resume (`str`, *optional*): a checkpoint.
        eval_rows (`int`, defaults to 0): rows of a stream to evaluate on afterwards.
        **settings: of [`AMVLSFTConfig`].

    Returns:
        `NotingTrainer`: its `seen` are the batches of each step.
    """
    backbone, stock = build_tiny_backbone()
    processor = AMVLProcessor.from_backbone(stock)
    torch.manual_seed(0)
    model = AMVLForConditionalGeneration.from_backbone(
        backbone, num_latents=2, latent_size=4, latent_token_id=processor.latent_token_id
    )
    rows = make_rows(num_rows, broken)
    if shards:
        rows = rows.to_iterable_dataset(num_shards=shards)
        rows = rows.shuffle(seed=0, buffer_size=buffer) if buffer else rows
    quiet = {
        "report_to": "none",
        "disable_tqdm": True,
        "training_summary": False,
        "logging_strategy": "no",
        "self_test": False,
        "check_dataset": False,
    }
    args = AMVLSFTConfig(
        str(folder),
        **{"save_strategy": "no", "use_cpu": True, "bf16": False, "remove_unused_columns": False, **quiet, **settings},
    )
    trainer = NotingTrainer(
        model,
        args,
        data_collator=NotingCollator(processor),
        train_dataset=rows,
        eval_dataset=make_rows(eval_rows).to_iterable_dataset() if eval_rows else None,
        processing_class=processor,
    )
    trainer.seen, trainer.padding = {}, 0
    trainer.train(resume_from_checkpoint=resume)
    trainer.nll = trainer.evaluate()["eval_nll_no_latents"] if eval_rows else None
    return trainer


if __name__ == "__main__":
    datasets.disable_progress_bars()
    folder, specs = Path(sys.argv[1]), json.loads(sys.argv[2])
    noted = {}
    for name, spec in specs.items():
        trainer = run(folder / name, **spec)
        noted[name] = {"seen": list(trainer.seen.values()), "nll": trainer.nll, "epoch": trainer.state.epoch}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(noted))
