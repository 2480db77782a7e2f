"""Answers with one verdict whether the latents of an AMVL checkpoint are used.

    python recipes/diagnose_amvl.py amvl-demo color_steps --controls sft=amvl-demo-sft
    python recipes/diagnose_amvl.py my/checkpoint data/paper --update_card --controls sft=my/sft base=HuggingFaceTB/SmolVLM-Instruct

The data is a folder that recipes/prepare_data.py or recipes/make_puzzles.py wrote, a Hub id or folder in another form named by
`--dataset_format`, or `color_steps`, questions made on the fly about held-out photographs. Writes the verdict with its tables
(`diagnosis.md`, `diagnosis.json`) and pictures into `output_dir`. Needs `pip install -e '.[eval]'`.
"""

import importlib.util
import json
import re
import sys
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, HfArgumentParser

from model_cards import update_card, weights_fingerprint
from model_cards.diagnosis import check_card
from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from trainer.bars import bar, quiet_libraries
from trainer.data.color_steps import FIRST_STEPS, build_color_steps
from trainer.data.sources import READERS, read_rows
from trainer.diagnostics import pictures
from trainer.diagnostics.diagnose import ask_control, diagnose
from trainer.diagnostics.relevance import relevance_maps
from trainer.diagnostics.report import write_report
from trainer.sft_trainer import model_type_of


MADE = "color_steps"  # on the fly
FORMATS = (*READERS, "prepared", MADE)
NUM_DRAWN = 4  # photographs with relevance maps


@dataclass
class DiagnoseArguments:
    """Which checkpoint is asked what."""

    checkpoint: str = field(metadata={"help": "An AMVL checkpoint: folder or Hub id. May stand first, unnamed."})
    data: str = field(metadata={"help": "Folder, Hub id or `color_steps`. May stand second, unnamed."})
    output_dir: str | None = field(
        default=None, metadata={"help": "`diagnosis` in the checkpoint's folder by default."}
    )
    dataset_format: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(FORMATS)}; recognised by default where this project wrote it."},
    )
    dataset_split: str | None = field(
        default=None, metadata={"help": "`test` of prepared data, `held_out` photographs, `val` of others by default."}
    )
    kinds: list[str] | None = field(
        default=None,
        metadata={
            "help": "Of `color_steps`, its kinds of question; those that the embedded default learns, by default."
        },
    )
    controls: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Checkpoints to compare with, `sft=PATH base=PATH`, stock or AMVL; `sft`: trained on the same data."
        },
    )
    max_rows: int = field(default=1000, metadata={"help": "Questions to ask, drawn at random if there are more."})
    num_sweep_rows: int = field(default=256, metadata={"help": "Of them, on which temperature and slots are varied."})
    batch_size: int = field(default=64, metadata={"help": "Rows at a time."})
    max_new_tokens: int = field(default=16, metadata={"help": "Of an answer."})
    seed: int = field(default=0, metadata={"help": "Of rows, partners, noise, wrong answers and bootstrap."})
    update_card: bool = field(default=False, metadata={"help": "Write verdict and table into the checkpoint's card."})

    def __post_init__(self):
        if importlib.util.find_spec("sklearn") is None:
            raise ImportError("`scikit-learn` is needed for a diagnosis and is missing: `pip install -e '.[eval]'`.")
        least_of = {"max_rows": 2, "num_sweep_rows": 2, "batch_size": 1, "max_new_tokens": 1, "seed": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        for control in self.controls:
            name, _, path = control.partition("=")
            if not name or not path:
                raise ValueError(f"`controls` has {control!r}: name and checkpoint are needed, as in `sft=my/sft`.")
        if len({control.partition("=")[0] for control in self.controls}) < len(self.controls):
            raise ValueError(f"`controls` are {self.controls}: each needs a name of its own.")
        if self.dataset_format is not None and self.dataset_format not in FORMATS:
            raise ValueError(f"`dataset_format` must be one of {FORMATS}, got {self.dataset_format!r}.")
        if self.kinds is not None and format_of(self) != MADE:
            raise ValueError(
                f"`kinds` is {self.kinds}, but `{self.data}` has its own: leave it out, it is for {MADE!r}."
            )
        if self.update_card:
            if not (Path(self.checkpoint) / "README.md").is_file():
                raise ValueError(f"`update_card` needs a card, but `{self.checkpoint}` is no folder with a README.md.")
            check_card(Path(self.checkpoint) / "README.md")
        if self.output_dir is None:
            if not Path(self.checkpoint).is_dir():
                raise ValueError(f"`output_dir` is needed, since `{self.checkpoint}` is no folder.")
            self.output_dir = str(Path(self.checkpoint) / "diagnosis")


def format_of(arguments):
    """The form of the data: as named, or recognised from a folder that this project wrote."""
    folder = Path(arguments.data)
    if arguments.dataset_format is not None:
        return arguments.dataset_format
    if arguments.data == MADE:
        return MADE
    if (folder / "report.json").is_file():
        return "prepared"
    if folder.is_dir() and any(folder.glob("*/val-*.parquet")):
        return "blink"
    raise ValueError(
        f"`{arguments.data}` is nothing that this project wrote: name its `dataset_format`, one of {FORMATS}."
    )


def load_rows(arguments):
    """At most `max_rows` questions, drawn at random."""
    form, split = format_of(arguments), arguments.dataset_split
    if form == MADE:
        return build_color_steps(
            arguments.max_rows, split or "held_out", arguments.seed, arguments.kinds or FIRST_STEPS
        )
    if form == "prepared":
        splits = load_dataset(arguments.data)
        if (split or "test") not in splits:
            raise ValueError(f"`dataset_split` is {split or 'test'!r}, but `{arguments.data}` has {list(splits)}.")
        rows = splits[split or "test"]
    else:
        rows, report = read_rows(form, arguments.data, split=split or "val")
        print(report)
    if len(rows) > arguments.max_rows:
        rows = rows.shuffle(seed=arguments.seed).select(range(arguments.max_rows))
    return rows


def load_checkpoint(name, device):
    """Model and processor; a stock model is refused, since it has no latents."""
    if (model_type := model_type_of(name)) != "amvl":
        raise ValueError(
            f"`checkpoint` ({name}) is a stock model, `{model_type}`, and has no latents to diagnose: train it with "
            "recipes/sft_amvl.py, or name it among the `controls`."
        )
    model = AMVLForConditionalGeneration.from_pretrained(name, dtype="auto").to(device)
    return model.eval(), AMVLProcessor.from_pretrained(name)


def answer_controls(arguments, rows, device):
    """Answers of each control, one model at a time."""
    answers = {}
    for control in bar(arguments.controls, desc="Controls", leave=False, disable=not arguments.controls):
        name, _, path = control.partition("=")
        if model_type_of(path) == "amvl":
            model, processor = load_checkpoint(path, device)
        else:
            model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto").to(device).eval()
            processor = AMVLProcessor.from_backbone(path)
        answers[name] = ask_control(model, processor, rows, arguments.batch_size, arguments.max_new_tokens)
    return answers


def training_history(checkpoint):
    """What the trainer logged, from the newest `trainer_state.json` of a checkpoint's folder; empty without one."""
    folder = Path(checkpoint)
    steps = {}
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        if match := re.fullmatch(r"checkpoint-(\d+)", path.parent.name):
            steps[int(match[1])] = path
    for path in [folder / "trainer_state.json", *(steps[step] for step in sorted(steps, reverse=True))]:
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8")).get("log_history", [])
    return []


def draw(arguments, diagnosis, model, processor, rows, found):
    """Draws every picture that can be drawn; the others are named in `left_out`."""
    folder, left_out = Path(arguments.output_dir), []
    drawn = {
        "Interventions": pictures.draw_changes(diagnosis["changes"], folder / "interventions.png"),
        "Posterior against prior": pictures.draw_gap(diagnosis, folder / "gap.png"),
        "Temperature and number of slots": pictures.draw_sweeps(
            diagnosis["sweeps"], diagnosis["num_latents"], folder / "sweeps.png"
        ),
        "Cosines": pictures.draw_cosines(diagnosis["structure"], folder / "cosines.png"),
    }
    history = pictures.draw_kl_history(training_history(arguments.checkpoint), folder / "kl.png")
    if history is None:
        left_out.append("No KL over training: the checkpoint's folder has no `trainer_state.json` that logs it.")
    else:
        drawn["KL over training"] = history
    with_images = (row for row in range(len(rows)) if rows[row]["images"]) if "images" in rows.column_names else ()
    chosen = list(islice(with_images, NUM_DRAWN))  # looks at no row more, since that decodes it
    if chosen and bool((found["partners"] >= 0).any()):
        maps = relevance_maps(model, processor, rows, found["questions"], chosen, found["latents"], found["partners"])
        titles = [found["questions"][row].text for row in chosen]
        drawn["Relevance"] = pictures.draw_relevance(maps, titles, folder / "relevance.png")
    else:
        left_out.append("No relevance maps: no row has an image in `images`, or all rows have one Z.")
    diagnosis["pictures"] = {name: path.name for name, path in drawn.items()}
    diagnosis["left_out"] = left_out


def main(arguments):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = weights_fingerprint(arguments.checkpoint)  # before anybody can train on
    model, processor = load_checkpoint(arguments.checkpoint, device)
    weights = weights or weights_fingerprint(arguments.checkpoint)  # of the Hub, which are here now
    rows = load_rows(arguments)
    controls = answer_controls(arguments, rows, device)
    diagnosis, found = diagnose(
        model,
        processor,
        rows,
        controls,
        arguments.batch_size,
        arguments.seed,
        arguments.max_new_tokens,
        arguments.num_sweep_rows,
    )
    diagnosis["settings"] = {
        "checkpoint": Path(arguments.checkpoint).name if Path(arguments.checkpoint).exists() else arguments.checkpoint,
        "data": Path(arguments.data).name if Path(arguments.data).exists() else arguments.data,
        "rows": len(rows),
        "k": model.config.num_latents,
        "d": model.config.latent_size,
        "temperature": 0,
        "seed": arguments.seed,
        "max_new_tokens": arguments.max_new_tokens,
        "image budget": processor.image_budget,
    }
    diagnosis |= {"weights_sha256": weights, "pictures": {}, "left_out": []}
    # Before the pictures, so that nothing is lost if one cannot be drawn.
    write_report(diagnosis, arguments.output_dir)
    if arguments.update_card:
        update_card(Path(arguments.checkpoint) / "README.md", diagnosis)
    print(f"{diagnosis['verdict']['word']}: {diagnosis['verdict']['paragraph']}")
    draw(arguments, diagnosis, model, processor, rows, found)
    page = write_report(diagnosis, arguments.output_dir)
    print(f"\nTables and pictures: {page}")
    return diagnosis


def with_names(words):
    """The command line with names before the first two words, which may stand without."""
    names, named = [f"--{setting.name}" for setting in fields(DiagnoseArguments)][:2], []
    for name in names:
        if words and not words[0].startswith("-"):
            named += [name, words[0]]
            words = words[1:]
    return named + words


if __name__ == "__main__":
    quiet_libraries()
    main(*HfArgumentParser(DiagnoseArguments).parse_args_into_dataclasses(with_names(sys.argv[1:])))
