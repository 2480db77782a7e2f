"""Trains the embedded base: a small LLaVA, from scratch, by plain SFT, on captions and questions of one look.

    python recipes/train_base.py --output_dir base

Prints how it answers questions about photographs that it has not seen, those of several steps among them, which it was not
taught. Offline, on a CPU; needs `pip install -e '.[demo]'`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from trl import TrlParser

from trainer.bars import quiet_libraries
from trainer.base import KINDS, build_base
from trainer.data.color_steps import MULTI_HOP, build_color_steps
from trainer.evaluation import accuracy_on, answer_questions, format_table, guesses
from trainer.tiny_training import train_sft


@dataclass
class BaseArguments:
    """How long, on how much."""

    output_dir: str = field(default="base", metadata={"help": "Where model, processor and table go."})
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder of photographs; those that scikit-image ships by default."}
    )
    num_train_rows: int = field(default=60000, metadata={"help": "Rows about training photographs."})
    num_test_rows: int = field(default=2600, metadata={"help": "Rows about held-out photographs."})
    num_steps: int = field(default=8000, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=64, metadata={"help": "Rows per step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak of the cosine schedule."})
    seed: int = field(default=0, metadata={"help": "Of weights, rows and their order."})


def main(arguments):
    torch.set_num_threads(1)  # the model is tiny: a second core does more for reading the rows than for its matrices
    output_dir = Path(arguments.output_dir)
    asked = (*KINDS, *MULTI_HOP)
    train_rows, test_rows, asked_rows = (
        build_color_steps(num_rows, split, arguments.seed, kinds, image_dir=arguments.image_dir)
        for num_rows, split, kinds in (
            (arguments.num_train_rows, "train", KINDS),
            (arguments.num_test_rows, "held_out", asked),
            (arguments.num_test_rows, "train", asked),  # for the constant answer, of kinds that are not taught, too
        )
    )
    model, processor = build_base(arguments.seed)
    num_weights = sum(weight.numel() for weight in model.parameters())
    print(f"{num_weights / 1e6:.2f} million weights, {len(train_rows)} rows, {arguments.num_steps} steps.")
    train_sft(
        model,
        processor,
        train_rows,
        output_dir / "sft",
        arguments.num_steps,
        arguments.batch_size,
        arguments.learning_rate,
        arguments.seed,
    )
    answers = answer_questions(model, processor, test_rows, "no_latents", description="Asking")
    columns = {**guesses(test_rows, asked_rows), "base": accuracy_on(test_rows, answers)}
    (output_dir / "sft").rmdir()  # TRL makes the folder, nothing is in it
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    (output_dir / "results.json").write_text(json.dumps(columns, indent=2) + "\n", encoding="utf-8")
    table = format_table(columns, asked)
    (output_dir / "README.md").write_text(card(arguments, num_weights, table), encoding="utf-8")
    print(f"\nHeld-out photographs, greedy, exact answers, per cent:\n\n{table}")


def card(arguments, num_weights, table):
    """The model card of the base, with its metadata."""
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["llava", "tiny"],
    )
    return f"""\
---
{data}
---

# A small LLaVA that sees

{num_weights / 1e6:.2f} million weights in stock classes of transformers: a CLIP vision encoder of three layers, a Llama of two. It is what
AMVL's demo, tests and ablation start from, and of no use for photographs of the world.

Trained from scratch by plain SFT, `python recipes/train_base.py`: {arguments.num_steps} steps of {arguments.batch_size} rows out of
{arguments.num_train_rows}, peak learning rate {arguments.learning_rate}, seed {arguments.seed}. The rows are made by
`trainer/data/color_steps.py`: eight shapes with cores of other colours on a crop of one of the photographs inside scikit-image's
wheel, with captions and questions that take one look. Questions of several steps it was never asked.

On photographs that it has not seen, greedy, exact answers, per cent ({arguments.num_test_rows} rows, a caption right only as a
whole; chance and the constant answer are of questions):

{table}
"""


if __name__ == "__main__":
    quiet_libraries()
    main(*TrlParser((BaseArguments,)).parse_args_and_config())
