"""Measures how fast rows are read, prepared and collated, and what of a step of the embedded default that is.

    python recipes/benchmark_data.py --markdown recipes/BENCHMARKS_DATA.md
    python recipes/benchmark_data.py --only padding skipping

Small sources of every format are written to a temporary folder, with photographs of scikit-image as JPEG (512 x 384). Each is
streamed through a `DataLoader` with 1 and with 2 workers, from the first row that arrives to the last: the record is parsed,
its image found, opened, checked and decoded twice (to an eighth by the check, whole by `datasets`). Preparing reads, checks and
writes parquet, start of the processes included. The collator gets rows of the embedded default, pictures of 72 x 72 pixels in
batches of 64, once decoded and once with their decoding by `datasets`.

A step is forward, backward and optimizer of the embedded default with one thread, as it trains. What matters to a run is how long
it waits for a batch: measured in the loop of a `DataLoader` that makes a step of each batch.

Padding is counted, not timed, on lengths drawn as those of photographs and screenshots under Qwen2.5-VL's budget (256 to 1,280
tokens), questions of some 40 tokens and answers of some 20, a fifth of them rationales of some 150: eight processes, four rows in a
batch, four batches in a step. A process waits for the slowest at each batch. Skipping is what a resumed run does with the rows
of a stream that are done.
"""

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from trainer import AMVLDataCollator, AMVLSFTConfig
from trainer.base import build_base
from trainer.data.color_steps import build_color_steps
from trainer.data.mixture import Mixture
from trainer.data.photos import SCIKIT_IMAGE_PHOTOS
from trainer.data.prepare import prepare
from trainer.data.sources import READERS, read_rows
from trainer.data.step_batches import step_batches
from trainer.data.stream_batches import StreamBatches
from trainer.demo import DemoArguments
from trainer.measuring import facts_line, machine_facts, markdown_page, ratios, render, spread
from trainer.objective import amvl_loss


SIZE = (512, 384)  # pixels of a photograph
WORKERS = (1, 2)
PARTS = ("collator", "readers", "preparing", "padding", "skipping")
STEP = {"batch_size": 4, "num_batches": 4, "num_ranks": 8}  # of the table of padding


@dataclass
class DataBenchmarkArguments:
    """How much is measured."""

    num_rows: int = field(default=1000, metadata={"help": "Rows of each source, and of the collator's."})
    rounds: int = field(default=3, metadata={"help": "Rounds; the tables show the median."})
    only: list[str] | None = field(
        default=None,
        metadata={"help": "Of `collator`, `readers`, `preparing`, `padding` and `skipping`; all by default."},
    )
    markdown: str | None = field(default=None, metadata={"help": "File that the tables are also written to."})

    def __post_init__(self):
        for name, least in (("num_rows", 128), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if unknown := set(self.only or ()) - set(PARTS):
            raise ValueError(f"`only` has {sorted(unknown)}: name some of {PARTS}.")


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def photographs(number):
    """JPEG bytes of photographs, over and over."""
    root, encoded = resources.files("skimage") / "data", []
    for name in SCIKIT_IMAGE_PHOTOS:
        with (root / name).open("rb") as file, Image.open(file) as photo:
            buffer = io.BytesIO()
            photo.convert("RGB").resize(SIZE).save(buffer, format="JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return [encoded[index % len(encoded)] for index in range(number)]


def write_files(folder, images):
    (folder / "images").mkdir(parents=True)
    for number, image in enumerate(images):
        (folder / "images" / f"{number}.jpg").write_bytes(image)


def turns(*texts):
    return [{"from": who, "value": text} for who, text in zip(("human", "gpt") * 2, texts)]


def write_llava(folder, images):
    write_files(folder, images)
    records = [
        {"image": f"images/{n}.jpg", "conversations": turns("<image>\nWhat is it?", f"photo {n}")}
        for n in range(len(images))
    ]
    (folder / "rows.json").write_text(json.dumps(records))


def write_visual_cot(folder, images):
    write_files(folder, images)
    question = "<image>\nWhat is it? Please provide the bounding box coordinate of the region that helps."
    records = [
        {
            "image": [f"images/{n}.jpg", f"images/{n}.jpg###[1, 2, 3, 4]"],
            "conversations": turns(question, "[0.1, 0.2, 0.3, 0.4]", "<image>", f"photo {n}"),
        }
        for n in range(len(images))
    ]
    (folder / "viscot_363k.json").write_text(json.dumps(records))


def write_monet(folder, images):
    write_files(folder / "ReFocus", images)
    records = []
    for n in range(len(images)):
        user = [{"type": "image", "image": f"ReFocus/images/{n}.jpg"}, {"type": "text", "text": "What is it?"}]
        reply = [{"type": "text", "text": f"I look. It is \\boxed{{photo {n}}}."}]
        data = [{"role": role, "content": content} for role, content in (("user", user), ("assistant", reply))]
        records.append({"metadata": {"dataset_name": "ReFocus", "sample_id": str(n)}, "data": data})
    (folder / "ReFocus" / "train.json").write_text(json.dumps(records))


def write_table(columns_of):
    """A writer of parquet: `columns_of` gives a row's columns from its number and image."""

    def write(folder, images):
        folder.mkdir(parents=True)
        rows = [columns_of(n, {"bytes": image, "path": None}) for n, image in enumerate(images)]
        features = {
            name: datasets.Image()
            if "image" in name and name != "images"
            else datasets.List(datasets.Image())
            if name == "images"
            else datasets.Value("string")
            for name in rows[0]
        }
        table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        for part in range(2):  # a file for each worker
            table.shard(2, part).to_parquet(folder / f"train-{part:05d}-of-00002.parquet")

    return write


WRITERS = {
    "monet": write_monet,
    "visual_cot": write_visual_cot,
    "llava": write_llava,
    "refocus": write_table(
        lambda n, image: {"image": image, "question": "What is it?", "answer": f"photo {n}", "thoughts": "I look."}
    ),
    "zebra_cot": write_table(
        lambda n, image: {
            "Question": "What is it? <image_start>[problem_image_1]<image_end>",
            "Text Reasoning Trace": "THOUGHT 0: I look.",
            "Final Answer": f"photo {n}",
            "problem_image_1": image,
        }
    ),
    "trl": write_table(lambda n, image: {"images": [image], "prompt": "What is it?", "completion": f"photo {n}"}),
    "blink": write_table(lambda n, image: {"image_1": image, "prompt": "What is it?", "answer": f"photo {n}"}),
}


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------


def rows_per_second(dataset, num_workers, collate, batch_size=32, num_rows_of=len):
    """From the first batch that arrives to the last, so that the start of the workers does not count."""
    counts, start = [], None
    for batch in DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate):
        start = time.perf_counter() if start is None else start
        counts.append(num_rows_of(batch))
    return sum(counts[1:]) / (time.perf_counter() - start)


def rows_of(batch):
    return batch


def measure_readers(arguments, root):
    images = photographs(arguments.num_rows)
    table = []
    for name in READERS:
        WRITERS[name](root / name, images)
        with quiet():
            dataset, _ = read_rows(
                name, str(root / name), config="ReFocus" if name == "monet" else None, streaming=True
            )
        speeds = [
            [rows_per_second(dataset, num_workers, rows_of) for _ in range(arguments.rounds)]
            for num_workers in WORKERS
        ]
        table.append([name, *(f"{statistics.median(values):.0f}" for values in speeds)])
        print(f"read {name}", file=sys.stderr)
    return "Rows per second of a reader", ["source", "1 worker", "2 workers"], table


def measure_preparing(arguments, root):
    seconds = []
    for name in ("llava", "refocus"):
        if not (root / name).exists():
            WRITERS[name](root / name, photographs(arguments.num_rows))
    for num_proc in WORKERS:
        mixture = Mixture(
            [{"format": "llava", "name": str(root / "llava")}, {"format": "refocus", "name": str(root / "refocus")}]
        )
        start = time.perf_counter()
        with quiet():
            prepare(mixture, root / f"prepared {num_proc}", num_proc)
        seconds.append(2 * arguments.num_rows / (time.perf_counter() - start))
    row = ["llava and refocus to parquet", *(f"{value:.0f}" for value in seconds)]
    return (
        "Rows per second of `prepare`, processes started and report written",
        ["mixture", "1 process", "2 processes"],
        [row],
    )


def demo_step(processor, backbone, settings):
    """A function that makes one training step of the embedded default from a batch."""
    model = AMVLForConditionalGeneration.from_backbone(
        backbone,
        num_latents=settings.num_latents,
        latent_size=settings.latent_size,
        latent_token_id=processor.latent_token_id,
    )
    model.backbone.get_encoder(modality="image").requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step(batch):
        output = model(**batch, decode_prior=True)
        loss, _ = amvl_loss(
            output["loss"],
            (output["prior_mean"], output["prior_log_variance"]),
            (output["posterior_mean"], output["posterior_log_variance"]),
            AMVLSFTConfig.beta,
            AMVLSFTConfig.gamma,
            prior_ntp=output["prior_loss"],
            prior_ntp_weight=AMVLSFTConfig.prior_ntp_weight,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_collator(arguments):
    """Rows per second of the collator, and the share of a loop of steps that is spent waiting for batches."""
    settings = DemoArguments()
    size = settings.batch_size
    backbone, stock_processor = build_base()
    processor = AMVLProcessor.from_backbone(stock_processor)
    collator, step = AMVLDataCollator(processor), demo_step(processor, backbone, settings)
    rows = build_color_steps(arguments.num_rows // size * size).select_columns(["images", "prompt", "completion"])
    decoded = rows[:size]
    decoded = [{key: values[n] for key, values in decoded.items()} for n in range(size)]
    batch = collator(decoded)
    times = {"step": [], "collator": [], "decoding": []}
    for _ in range(10 * arguments.rounds):
        for name, function in (
            ("step", lambda: step(batch)),
            ("collator", lambda: collator(decoded)),
            ("decoding", lambda: rows[:size]),
        ):
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    speeds = [
        statistics.median(
            rows_per_second(rows, num_workers, collator, size, lambda batch: len(batch["input_ids"]))
            for _ in range(arguments.rounds)
        )
        for num_workers in WORKERS
    ]
    waits = [
        statistics.median(waiting_share(rows, num_workers, collator, step, size) for _ in range(arguments.rounds))
        for num_workers in (0, *WORKERS)
    ]
    speed = ["decoding and collator", *(f"{value:.0f}" for value in speeds)]
    table = [
        ["step, ms", f"{1000 * statistics.median(times['step']):.1f}"],
        *([f"{name} / step", spread(ratios(times, name, "step"))] for name in ("collator", "decoding")),
        *(
            [f"waiting for batches / loop, {number} workers", f"{share:.3f}"]
            for number, share in zip((0, *WORKERS), waits)
        ),
    ]
    return [
        ("Rows per second of the collator, embedded default", ["", "1 worker", "2 workers"], [speed]),
        ("The collator in the embedded default, batches of 64, one thread", ["", "median (min-max)"], table),
    ]


def waiting_share(rows, num_workers, collator, step, size):
    """The share of a loop over batches, a step each, that is spent waiting for the next batch; the first does not count."""
    batches = iter(DataLoader(rows, batch_size=size, num_workers=num_workers, collate_fn=collator))
    step(next(batches))
    waited, start = 0.0, time.perf_counter()
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - asked
        if batch is None:
            return waited / (time.perf_counter() - start)
        step(batch)


def drawn_lengths(num_rows):
    """Tokens of prompt and of answer, as they might be: `(num_rows, 2)`."""
    rng = np.random.default_rng(0)
    pixels = np.exp(rng.normal(np.log(700 * 500), 0.7, num_rows))  # most photographs are of half a megapixel or less
    image = np.clip(pixels / 28**2, 256, 1280)
    question, answer = np.exp(rng.normal(np.log([[40, 20]]), [[0.6, 0.5]], (num_rows, 2))).T
    rationale = np.exp(rng.normal(np.log(150), 0.4, num_rows))
    return np.ceil(np.stack([image + question, np.where(rng.random(num_rows) < 0.2, rationale, answer)], 1)).astype(
        int
    )


def measure_padding(arguments):
    """Padded tokens by strategy, and what processes wait for."""
    lengths = drawn_lengths(16 * arguments.num_rows)
    total, table, chance = lengths.sum(), [], None
    for strategy in ("random", "group_by_length", "batch_rebalance"):
        settings = {"lengths": lengths.sum(1).tolist(), "seed": 0, **STEP}
        parts = [
            list(step_batches(strategy, len(lengths), **settings, rank=rank)) for rank in range(STEP["num_ranks"])
        ]
        # (ranks, batches): rows x (longest prompt + longest answer)
        tokens = np.array([[len(batch) * lengths[batch].max(0).sum() for batch in part] for part in parts])
        figures = np.array([tokens.sum(), tokens.max(0).sum(), tokens.max()])
        chance = figures if chance is None else chance
        table.append([strategy, f"{1 - total / tokens.sum():.3f}", *(f"{value:.2f}" for value in figures / chance)])
    columns = ["`train_sampling_strategy`", "padding / all tokens", "tokens", "tokens of the slowest", "largest batch"]
    return f"Padding, {len(lengths)} rows; the last three are ratios to `random`", columns, table


def measure_skipping(arguments, root):
    """Rows per second that a resumed run passes over, and that one reads that decodes them."""
    WRITERS["trl"](root / "stream", photographs(arguments.num_rows))
    stream = datasets.load_dataset(str(root / "stream"), split="train", streaming=True)
    speeds = {}
    for name, rows in (("skipped", StreamBatches(stream, 1)), ("decoded", stream)):
        speeds[name] = []
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            speeds[name].append(sum(1 for _ in rows) / (time.perf_counter() - start))
    row = ["parquet, one process", *(f"{statistics.median(speeds[name]):.0f}" for name in ("skipped", "decoded"))]
    return "Rows per second of a stream", ["", "skipped", "decoded"], [row]


@contextlib.contextmanager
def quiet():
    """Without the progress bars."""
    datasets.disable_progress_bars()
    with contextlib.redirect_stderr(io.StringIO()):
        yield
    datasets.enable_progress_bars()


def main(arguments):
    torch.set_num_threads(1)
    facts = f"{arguments.num_rows} rows, {arguments.rounds} rounds\n{facts_line(machine_facts())}"
    parts, tables = arguments.only or PARTS, []
    if "collator" in parts:
        tables += measure_collator(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if "readers" in parts:
            tables.append(measure_readers(arguments, Path(folder)))
        if "preparing" in parts:
            tables.append(measure_preparing(arguments, Path(folder)))
        if "padding" in parts:
            tables.append(measure_padding(arguments))
        if "skipping" in parts:
            tables.append(measure_skipping(arguments, Path(folder)))
    print("\n".join([facts, "", *(render(table, markdown=False) for table in tables)]))
    if arguments.markdown is not None:
        command = " ".join(["python recipes/benchmark_data.py", *sys.argv[1:]])
        Path(arguments.markdown).write_text(markdown_page("How fast rows come", command, facts, tables))


if __name__ == "__main__":
    main(*HfArgumentParser(DataBenchmarkArguments).parse_args_into_dataclasses())
