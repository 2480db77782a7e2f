"""Makes labelled questions from photographs, in BLINK's columns, and measures what they tell without being looked at.

    python recipes/make_puzzles.py --output_dir puzzles --num_rows 1000 --num_val_rows 500
    python recipes/make_puzzles.py --output_dir puzzles --image_dir photographs --kinds Jigsaw Counting --difficulty 0.2 0.8

`datasets.load_dataset("puzzles", "Jigsaw", split="val")` reads them back. Needs `pip install -e '.[eval]'`. With 200
and 100 rows of each of the nine kinds it took 61 seconds of one core and wrote 539 MB: pictures are not compressed.
"""

import itertools
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from trl import TrlParser

from trainer.bars import bar, quiet_libraries
from trainer.data.puzzles import (
    FEATURES,
    KINDS,
    camera_motion,
    chance_bounds,
    generate_puzzles,
    pixel_mean_accuracy,
    read_sides,
    stereo_pair,
    text_only_accuracy,
)
from trainer.data.puzzles.build import IMAGE_SIZES


SHEET_COLUMNS, SHEET_ROWS = 2, 3
ROWS_AT_ONCE = 256  # in memory before they are written
STEREO_ROWS = 100


@dataclass
class PuzzleArguments:
    """Which puzzles to make, from which photographs."""

    output_dir: str = field(metadata={"help": "Folder to write into; a new one, or an empty one."})
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder of photographs; those inside scikit-image's wheel by default."}
    )
    kinds: list[str] | None = field(default=None, metadata={"help": f"Some of {', '.join(KINDS)}; all by default."})
    num_rows: int = field(default=500, metadata={"help": "Training rows of each kind."})
    num_val_rows: int = field(default=250, metadata={"help": "Validation rows of each kind, from other photographs."})
    seed: int = field(default=0, metadata={"help": "Seed of the rows, zero or more."})
    difficulty: list[float] = field(
        default_factory=lambda: [0.5],
        metadata={"help": "From 0 to 1; of two numbers, each row draws its own between them."},
    )
    image_size: int = field(default=256, metadata={"help": "Width and height of each picture in pixels."})
    split_seed: int = field(default=5, metadata={"help": "Which photographs are for validation."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what `output_dir` holds."})


def prepare(arguments: PuzzleArguments) -> tuple[list[str], Path, dict]:
    """Reads the photographs, refuses what cannot be made before any time is spent on it, and empties the folder."""
    kinds = list(KINDS) if arguments.kinds is None else arguments.kinds
    folder = Path(arguments.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` '{folder}' is a file. Name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not arguments.overwrite:
        raise ValueError(f"`output_dir` '{folder}' is not empty. Name another folder, or pass `--overwrite`.")
    if len(arguments.difficulty) not in (1, 2):
        raise ValueError(f"`difficulty` takes one number or two, but got {arguments.difficulty}.")
    if not IMAGE_SIZES[0] <= arguments.image_size <= IMAGE_SIZES[1]:
        raise ValueError(
            f"`image_size` must be from {IMAGE_SIZES[0]} to {IMAGE_SIZES[1]}, but got {arguments.image_size}."
        )
    sides = read_sides(arguments.image_dir, arguments.image_size, arguments.split_seed)
    for kind in kinds:
        for split, num_rows in (("train", arguments.num_rows), ("val", arguments.num_val_rows)):
            generate(arguments, sides, kind, split, num_rows)  # checks, and makes no row yet
    for kind in KINDS:  # what else the folder holds is not ours to remove
        shutil.rmtree(folder / kind, ignore_errors=True)
        (folder / f"{kind}.png").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return kinds, folder, sides


def generate(arguments: PuzzleArguments, sides: dict, kind: str, split: str, num_rows: int):
    return generate_puzzles(
        kind,
        num_rows,
        split,
        seed=arguments.seed,
        difficulty=tuple(arguments.difficulty) if len(arguments.difficulty) == 2 else arguments.difficulty[0],
        image_size=arguments.image_size,
        sides=sides,
    )


def write(rows, path: Path, label: str, num_rows: int) -> None:
    """Writes rows as they are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = iter(bar(rows, desc=label, total=num_rows, unit="row"))
    with pq.ParquetWriter(path, FEATURES.arrow_schema) as writer:
        while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
            writer.write_table(datasets.Dataset.from_list(batch, features=FEATURES).with_format("arrow")[:])


def draw_sheet(rows: datasets.Dataset, path: Path) -> None:
    """Draws the first puzzles of a kind with question, options and the right answer."""
    figure = Figure(figsize=(18, 5.5 * SHEET_ROWS), layout="constrained")
    for part, row in zip(figure.subfigures(SHEET_ROWS, SHEET_COLUMNS).flat, rows, strict=False):
        images = [row[f"image_{i}"] for i in range(1, 5) if row[f"image_{i}"] is not None]
        part.suptitle(f"{row['prompt']}\n{row['answer']}  {row['explanation']}", fontsize=8, wrap=True)
        for axes, image in zip(np.atleast_1d(part.subplots(1, len(images))), images, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.axis("off")
    figure.savefig(path, dpi=80)


def report(kind: str, train: datasets.Dataset, val: datasets.Dataset) -> str:
    """One line: rows, balance over letters, chance, and what the two controls reach on the validation rows."""
    num_choices = KINDS[kind].num_choices
    letters = [val["answer"][:].count(f"({letter})") for letter in "ABCD"[:num_choices]]
    low, high = chance_bounds(len(val), 1 / num_choices)
    text, pixels = text_only_accuracy(train, val), pixel_mean_accuracy(train, val)
    return (
        f"{kind:22} {len(train):6} {len(val):5}   {'/'.join(map(str, letters)):15} {100 / num_choices:5.1f} "
        f"{100 * low:5.1f} - {100 * high:4.1f}   {100 * text:5.1f}{'' if low <= text <= high else '*':1} "
        f"{100 * pixels:6.1f}{'' if low <= pixels <= high else '*'}"
    )


def stereo_report(rows: datasets.Dataset) -> str:
    """One line: a matcher of columns on a real stereo pair, either way round, and on the first puzzles of a split."""
    left, right = stereo_pair()
    rows = rows.select(range(min(len(rows), STEREO_ROWS)))
    hits = 0
    for row in rows:
        found = camera_motion(np.asarray(row["image_1"]), np.asarray(row["image_2"]))
        hits += found == row["choices"]["AB".index(row["answer"][1])]
    return (
        f"Matching columns of pixels says that the camera moved {camera_motion(left, right)} from the left eye to the "
        f"right eye of a real stereo pair, {camera_motion(right, left)} back, and answers {hits} of {len(rows)} rows of "
        "Multi-view_Reasoning."
    )


CARD = """---
configs:
{configs}---

# Puzzles from photographs

Made by `python recipes/make_puzzles.py {command}`. The columns are those of BLINK; the pictures are photographs, and
drawings on them, whose answers are known by construction. No photograph serves both splits.
"""


def main(arguments: PuzzleArguments, command: str = "") -> None:
    kinds, folder, sides = prepare(arguments)
    lines, notes = [], []
    for kind in kinds:
        for split, num_rows in (("train", arguments.num_rows), ("val", arguments.num_val_rows)):
            path = folder / kind / f"{split}-00000-of-00001.parquet"
            write(generate(arguments, sides, kind, split, num_rows), path, f"{kind} {split}", num_rows)
        with tempfile.TemporaryDirectory() as cache:
            files = {split: str(folder / kind / f"{split}-00000-of-00001.parquet") for split in ("train", "val")}
            made = datasets.load_dataset("parquet", data_files=files, cache_dir=cache)
            draw_sheet(made["val"], folder / f"{kind}.png")
            lines.append(report(kind, made["train"], made["val"]))
            if kind == "Multi-view_Reasoning":
                notes.append(stereo_report(made["val"]))
    configs = ""
    for kind in kinds:
        configs += f"- config_name: {kind}\n  data_files:\n"
        for split in ("train", "val"):
            configs += f"  - split: {split}\n    path: {kind}/{split}-*.parquet\n"
    (folder / "README.md").write_text(CARD.format(configs=configs, command=command))
    print(
        f"{'kind':22} {'train':>6} {'val':>5}   {'letters of val':15} {'chance, its 95%':>17}   {'text':>5} {'means':>7}"
    )
    print("\n".join(lines))
    print("Accuracies in percent, on the validation rows; * lies outside what guessing gives in 95% of all cases.")
    print("\n".join(notes), end="\n" if notes else "")


if __name__ == "__main__":
    quiet_libraries()
    (parsed,) = TrlParser((PuzzleArguments,)).parse_args_and_config()
    main(parsed, " ".join(sys.argv[1:]))
