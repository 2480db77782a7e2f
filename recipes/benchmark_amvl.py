"""Measures what AMVL costs beside plain SFT and the bare backbone: training time, peak memory, generation, samples, import.

Offline, random weights of Qwen2.5-VL's architecture; the default is a model of 5.5M parameters on the CPU:

    python recipes/benchmark_amvl.py --markdown recipes/BENCHMARKS.md

The real shape on one GPU of 80 GB, in one process:

    python recipes/benchmark_amvl.py --device cuda --shape qwen2_5_vl_7b

The first value of `--prompt`, `--answer`, `--num_latents`, `--batch` and `--checkpointing` is the base cell; every further
value is measured with the others at their base, or with `--full` in every combination. `--quick` shows in seconds that all
of it runs.

A step is forward and backward of the whole objective on fixed inputs, without optimizer and logging; the vision encoder is
frozen, as `AMVLSFTTrainer` does by default. Arms take turns within a round, a ratio is of two steps of the same round, and
tables show the median over rounds (min-max). Compared are

    sft           the backbone's own loss on `[x, y]`, which computes the logits of every position
    sft_answer    the same loss from the answer's logits only, which is what TRL 1.16's fused head computes
    shared        AMVL, the prompt run once:            prior `[x, L]`, posterior `[x, y, L]`, decode `[x, z, y]`
    full          AMVL, the same as three whole forwards (images encoded once)
    shared_prior  shared, and y decoded from a sample of the prior too (`prior_ntp_weight > 0`)

Samples are `--num_samples` latents per prompt in one call, `generate(num_latent_samples=n)`, beside one call for one and n such
calls; `--what samples` measures them alone.

FLOP bounds count tokens of the language model (P prompt, A answer, K latents) over the P + A of plain SFT; attention, the
vision encoder, which every arm runs once, and the vocabulary head are left out:

    shared        (P + K + (A + K) + (K + A)) / (P + A)
    shared_prior  (P + K + (A + K) + 2 (K + A)) / (P + A)
    full          ((P + K) + (P + A + K) + (P + K + A)) / (P + A)
    first token   (P + 2 K) / P, of the bare backbone's `generate`

Shapes: B batch, P prompt, A answer, K latent slots.
"""

import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import HfArgumentParser, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from modeling_amvl import AMVLForConditionalGeneration
from trainer.measuring import facts_line, machine_facts, markdown_page, ratios, render, spread
from trainer.objective import amvl_loss


# Of each shape: the language model, the vision encoder, and the size of a latent slot.
SHAPES = {
    "tiny": (
        {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 1, "fullatt_block_indexes": [0]},
        16,
    ),
    "small": (
        {
            "vocab_size": 2048,
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        {"depth": 2, "hidden_size": 64, "intermediate_size": 172, "num_heads": 2, "fullatt_block_indexes": [1]},
        64,
    ),
    # Qwen/Qwen2.5-VL-7B-Instruct, from its config.json
    "qwen2_5_vl_7b": (
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        512,
    ),
}
PATCH_SIZE, WINDOW_SIZE, PIXELS_PER_PATCH = 14, 112, 3 * 2 * 14 * 14  # a patch holds two frames
SQUARES = (400, 100, 16, 4)  # image tokens of a square image; a prompt gets the most that take half of it or less
PAD, BOS, FIRST_WORD, NUM_SPECIAL = 0, 1, 3, 5  # the last ids of the table are special, see `special_ids`

PARTS = ("training", "memory", "generation", "samples", "import")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FEWEST_ROUNDS = 5
BETA, GAMMA = 0.01, 0.001  # the cost does not depend on them


@dataclass
class BenchmarkArguments:
    """What is measured, and on what."""

    what: str = field(default=",".join(PARTS), metadata={"help": "Parts, with commas between them."})
    shape: str = field(default="small", metadata={"help": "`tiny`, `small` (5.5M parameters) or `qwen2_5_vl_7b`."})
    num_layers: int | None = field(default=None, metadata={"help": "Layers of the language model, instead of all."})
    prompt: list[int] = field(
        default_factory=lambda: [900, 300, 2000], metadata={"help": "Prompt tokens, base first."}
    )
    answer: list[int] = field(default_factory=lambda: [60, 20, 300], metadata={"help": "Answer tokens, base first."})
    num_latents: list[int] = field(default_factory=lambda: [8, 4, 16], metadata={"help": "Slots K, base first."})
    batch: list[int] = field(default_factory=lambda: [1, 4], metadata={"help": "Rows of a step, base first."})
    checkpointing: list[str] = field(
        default_factory=lambda: ["no", "yes"], metadata={"help": "Gradient checkpointing: `no`, `yes`, base first."}
    )
    full: bool = field(default=False, metadata={"help": "Every combination, instead of one value varied at a time."})
    rounds: int = field(default=7, metadata={"help": f"Paired ratios per cell, {FEWEST_ROUNDS} or more."})
    generation_batch: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Rows of `generate`."})
    num_samples: int = field(default=8, metadata={"help": "Latents per prompt, of which the samples are."})
    new_tokens: int = field(default=64, metadata={"help": "Tokens after the first, over which `generate` is timed."})
    device: str = field(default="cpu", metadata={"help": "`cpu`, `cuda` or `cuda:N`."})
    dtype: str = field(default="auto", metadata={"help": "`auto`: bfloat16 for `qwen2_5_vl_7b`, float32 otherwise."})
    attn_implementation: str | None = field(default=None, metadata={"help": "As in `from_pretrained`."})
    threads: int | None = field(default=None, metadata={"help": "Threads of torch, its own number by default."})
    quick: bool = field(default=False, metadata={"help": "One tiny cell, two rounds; sets all of the sizes above."})
    json: str | None = field(default=None, metadata={"help": "File to write everything measured to."})
    markdown: str | None = field(default=None, metadata={"help": "File to write the tables to."})
    memory_of: str | None = field(
        default=None, metadata={"help": "One arm: take its peak memory in this process, at the base cell, and stop."}
    )

    def __post_init__(self):
        if self.quick:
            self.shape, self.rounds, self.new_tokens, self.num_layers = "tiny", 2, 3, None
            self.prompt, self.answer, self.num_latents = [40], [8], [2]
            self.batch, self.checkpointing, self.generation_batch = [1], ["no"], [2]
        for name, allowed in (("shape", SHAPES), ("dtype", ("auto", *DTYPES)), ("memory_of", (None, *ARMS))):
            _refuse_unknown(name, getattr(self, name), allowed)
        for part in self.parts:
            _refuse_unknown("what", part, PARTS)
        for value in self.checkpointing or [None]:
            _refuse_unknown("checkpointing", value, ("no", "yes"))
        for name in ("prompt", "answer", "num_latents", "batch", "generation_batch", "num_samples", "new_tokens"):
            values = getattr(self, name)
            if values == []:
                raise ValueError(f"`{name}` is empty: give it a value, or leave it out for the default.")
            least = 2 * SQUARES[-1] if name == "prompt" else 1
            for value in values if isinstance(values, list) else [values]:
                if value < least:
                    raise ValueError(f"`{name}` must be {least} or more, got {value}.")
        for name in ("num_layers", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be 1 or more, got {getattr(self, name)}: leave it out for the default."
                )
        if self.rounds < FEWEST_ROUNDS and not self.quick:
            raise ValueError(
                f"`rounds` must be {FEWEST_ROUNDS} or more, got {self.rounds}: a median of fewer ratios says little. "
                "`--quick` runs two, to show that all of it works."
            )
        if self.device != "cpu" and self.device.split(":")[0] != "cuda":
            raise ValueError(f"`device` must be `cpu` or `cuda`, got {self.device!r}.")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"`device` is {self.device!r}, but torch finds no GPU: use `--device cpu`.")
        if "memory" in self.parts and self.device == "cpu" and not PROCESS_STATUS.exists():
            raise ValueError(
                f"`what` holds 'memory', which on a CPU is read from {PROCESS_STATUS}, and this system has no such file: "
                "leave it out."
            )
        for name in ("json", "markdown"):
            path = getattr(self, name)
            if path is not None and not Path(path).absolute().parent.is_dir():
                raise ValueError(f"`{name}` is {path!r}, whose folder does not exist: create it first.")

    @property
    def parts(self):
        return self.what.split(",")

    @property
    def torch_dtype(self):
        return DTYPES[
            ("bfloat16" if self.shape == "qwen2_5_vl_7b" else "float32") if self.dtype == "auto" else self.dtype
        ]


def _refuse_unknown(name, value, allowed):
    if value not in allowed:
        names = ", ".join(repr(item) for item in allowed if item is not None)
        raise ValueError(f"`{name}` must be one of {names}, got {value!r}.")


@dataclass(frozen=True)
class Cell:
    """One setting that every arm is measured at; sizes are in tokens, of one row."""

    prompt: int
    answer: int
    num_latents: int
    batch: int = 1
    checkpointing: bool = False

    @property
    def num_image_tokens(self):
        """Of the prompt: 400 from a prompt of 800 on, 100 of one of 300."""
        return next(square for square in SQUARES if 2 * square <= self.prompt)

    def __str__(self):
        checkpointed = ", checkpointed" if self.checkpointing else ""
        return f"{self.batch} x ({self.prompt} + {self.answer}), k = {self.num_latents}{checkpointed}"


def cells_of(arguments):
    """The base cell, then each factor varied from it, or every combination."""
    factors = {
        "prompt": arguments.prompt,
        "answer": arguments.answer,
        "num_latents": arguments.num_latents,
        "batch": arguments.batch,
        "checkpointing": [value == "yes" for value in arguments.checkpointing],
    }
    if arguments.full:
        return [Cell(*values) for values in itertools.product(*factors.values())]
    base = Cell(*(values[0] for values in factors.values()))
    return [base, *(replace(base, **{name: value}) for name, values in factors.items() for value in values[1:])]


def flop_bounds(cell):
    """Tokens of the language model per token of plain SFT, by arm; formulas above."""
    prompt, answer, slots = cell.prompt, cell.answer, cell.num_latents
    shared = prompt + slots + (answer + slots) + (slots + answer)
    full = (prompt + slots) + (prompt + answer + slots) + (prompt + slots + answer)
    tokens = {
        "sft": prompt + answer,
        "sft_answer": prompt + answer,
        "shared": shared,
        "full": full,
        "shared_prior": shared + slots + answer,
    }
    return {arm: count / (prompt + answer) for arm, count in tokens.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Model and inputs
# ---------------------------------------------------------------------------------------------------------------------


def special_ids(vocab_size):
    """The last ids of a table: latent, image, video, vision start, vision end."""
    return tuple(vocab_size - 1 - index for index in range(NUM_SPECIAL))


def build_backbone(arguments, device=None):
    """A stock Qwen2.5-VL with random weights and a frozen vision encoder; it never stops by itself."""
    text, vision, _ = SHAPES[arguments.shape]
    _, image, video, vision_start, vision_end = special_ids(text["vocab_size"])
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None}
    config = Qwen2_5_VLConfig(
        text_config={**text, **ids, "num_hidden_layers": arguments.num_layers or text["num_hidden_layers"]},
        vision_config={
            **vision,
            "patch_size": PATCH_SIZE,
            "window_size": WINDOW_SIZE,
            "out_hidden_size": text["hidden_size"],
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=vision_start,
        vision_end_token_id=vision_end,
    )
    with torch.device(device or arguments.device):
        backbone = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=arguments.torch_dtype, attn_implementation=arguments.attn_implementation
        )
    backbone.get_encoder(modality="image").requires_grad_(False)
    return backbone


def wrap(backbone, arguments, num_latents):
    """An AMVL model around a backbone, whose weights it shares; the placeholder is a row that the table has."""
    latent, *_ = special_ids(backbone.config.get_text_config().vocab_size)
    latent_size = SHAPES[arguments.shape][2]
    return AMVLForConditionalGeneration.from_backbone(
        backbone, num_latents=num_latents, latent_size=latent_size, latent_token_id=latent
    )


@dataclass(frozen=True)
class Batch:
    """The same rows in the two forms that are compared: arguments of the backbone and of the AMVL model."""

    sft: dict
    amvl: dict

    @property
    def prompt(self):
        """What `generate` takes."""
        return {key: value for key, value in self.amvl.items() if not key.startswith("completion_")}


def make_batch(cell, config, device, dtype):
    """Random rows as a Qwen2.5-VL processor returns them: words, one image, words; and an answer each."""
    _, image, _, vision_start, vision_end = special_ids(config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    words_stop = config.get_text_config().vocab_size - NUM_SPECIAL

    def words(length):
        return torch.randint(FIRST_WORD, words_stop, (cell.batch, length), generator=generator)  # (B, length)

    def repeated(token, length=1):
        return torch.full((cell.batch, length), token)

    num_words = cell.prompt - cell.num_image_tokens - 2
    parts = [repeated(vision_start), repeated(image, cell.num_image_tokens), repeated(vision_end)]
    input_ids = torch.cat([words(num_words // 2), *parts, words(num_words - num_words // 2)], dim=1)  # (B, P)
    completion_ids = words(cell.answer)  # (B, A)

    side = 2 * round(cell.num_image_tokens**0.5)  # patches, merged two by two into a token
    pixels = torch.randn(cell.batch * side * side, PIXELS_PER_PATCH, generator=generator, dtype=torch.float32)
    images = {
        "pixel_values": pixels.to(device, dtype),
        "image_grid_thw": torch.tensor([[1, side, side]] * cell.batch, device=device),
    }
    input_ids, completion_ids = input_ids.to(device), completion_ids.to(device)
    ids = torch.cat([input_ids, completion_ids], dim=1)  # (B, P + A)
    amvl = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == image).long(),
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids),
        **images,
    }
    sft = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == image).long(),
        "labels": torch.cat([torch.full_like(input_ids, -100), completion_ids], dim=1),
        **images,
    }
    return Batch(sft, amvl)


# ---------------------------------------------------------------------------------------------------------------------
# What is compared: arm -> its loss
# ---------------------------------------------------------------------------------------------------------------------


def sft_loss(model, batch):
    return model.backbone(**batch.sft, use_cache=False).loss


def sft_answer_loss(model, batch):
    kept = batch.amvl["completion_ids"].shape[1] + 1  # the last token of the prompt predicts the first of the answer
    inputs = {**batch.sft, "labels": batch.sft["labels"][:, -kept:]}
    return model.backbone(**inputs, logits_to_keep=kept, use_cache=False).loss


def amvl_objective(model, batch, multipass, decode_prior=False):
    model.config.multipass = multipass
    output = model(**batch.amvl, decode_prior=decode_prior)
    loss, _ = amvl_loss(
        output.loss,
        (output.prior_mean, output.prior_log_variance),
        (output.posterior_mean, output.posterior_log_variance),
        BETA,
        GAMMA,
        prior_ntp=output.prior_loss,
        prior_ntp_weight=1.0,
    )
    return loss


ARMS = {
    "sft": sft_loss,
    "sft_answer": sft_answer_loss,
    "shared": lambda model, batch: amvl_objective(model, batch, "shared"),
    "full": lambda model, batch: amvl_objective(model, batch, "full"),
    "shared_prior": lambda model, batch: amvl_objective(model, batch, "shared", decode_prior=True),
}
TITLES = {
    "sft": "SFT",
    "sft_answer": "SFT, answer logits",
    "shared": "shared",
    "full": "full",
    "shared_prior": "shared + prior NTP",
}
AMVL_ARMS = ("shared", "full", "shared_prior")


def prepare(backbone, arguments, cell):
    """The model and the batch of a cell, ready to be trained."""
    model = wrap(backbone, arguments, cell.num_latents).train()
    if cell.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()
    return model, make_batch(cell, backbone.config, arguments.device, arguments.torch_dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Training: seconds and bytes
# ---------------------------------------------------------------------------------------------------------------------


def seconds_of(function):
    """Wall-clock seconds of one call, the accelerator's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(functions, rounds):
    """Seconds of each function in each round, `{name: [seconds]}`, after one call of each that does not count."""
    seconds = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            taken = seconds_of(function)
            if number > 0:
                seconds[name].append(taken)
    return seconds


def measure_training(backbone, arguments, cell):
    """Seconds of a step of each arm; the gradients of the step before are dropped outside the clock."""
    model, batch = prepare(backbone, arguments, cell)
    seconds = {arm: [] for arm in ARMS}
    for number in range(arguments.rounds + 1):
        for arm, loss_of in ARMS.items():
            model.zero_grad(set_to_none=True)
            taken = seconds_of(lambda loss_of=loss_of: loss_of(model, batch).backward())
            if number > 0:  # the first round warms up
                seconds[arm].append(taken)
    model.zero_grad(set_to_none=True)
    return {"cell": asdict(cell), "seconds": seconds, "bounds": flop_bounds(cell)}


# The peak is read here and not by `getrusage`: on Linux the `ru_maxrss` of a child starts at its parent's peak, because
# the child runs in the parent's memory until it has called `exec`.
PROCESS_STATUS = Path("/proc/self/status")


def resident_bytes(name):
    """`VmRSS`, the resident size of this process now, or `VmHWM`, its peak."""
    line = next(line for line in PROCESS_STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def peak_memory(model, batch, arm, device):
    """Peak of two steps of an arm in bytes: of all, and above what was there before."""
    on_cpu = device == "cpu"
    model.zero_grad(set_to_none=True)
    gc.collect()
    if not on_cpu:
        torch.cuda.reset_peak_memory_stats(device)
    before = resident_bytes("VmRSS") if on_cpu else torch.cuda.memory_allocated(device)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        ARMS[arm](model, batch).backward()
    peak = resident_bytes("VmHWM") if on_cpu else torch.cuda.max_memory_allocated(device)
    model.zero_grad(set_to_none=True)
    return {"whole": peak, "increment": peak - before}


def warm_up(model, arguments, arm):
    """One tiny forward, after which libraries have set up what they keep."""
    tiny = Cell(prompt=2 * SQUARES[-1], answer=2, num_latents=model.config.num_latents)
    with torch.no_grad():
        ARMS[arm](model, make_batch(tiny, model.backbone.config, arguments.device, arguments.torch_dtype))


def measure_memory(backbone, arguments, cell):
    """Peak memory of each arm: on a CPU each in a process of its own, on a GPU one after the other in this one."""
    if arguments.device == "cpu":
        return {"cell": asdict(cell), "bytes": {arm: memory_in_fresh_process(arguments, cell, arm) for arm in ARMS}}
    model, batch = prepare(backbone, arguments, cell)
    measured = {}
    for arm in ARMS:
        warm_up(model, arguments, arm)
        measured[arm] = peak_memory(model, batch, arm, arguments.device)
    return {"cell": asdict(cell), "bytes": measured}


def memory_in_fresh_process(arguments, cell, arm):
    settings = {
        "memory_of": arm,
        "shape": arguments.shape,
        "prompt": cell.prompt,
        "answer": cell.answer,
        "num_latents": cell.num_latents,
        "batch": cell.batch,
        "checkpointing": "yes" if cell.checkpointing else "no",
        "dtype": arguments.dtype,
        "num_layers": arguments.num_layers,
        "attn_implementation": arguments.attn_implementation,
        "threads": arguments.threads,
    }
    words = [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
    return json.loads(run_python([__file__, *words]).stdout.splitlines()[-1])


def run_python(words):
    """A finished process of this Python."""
    finished = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"A process of this benchmark failed, {words}:\n{finished.stderr[-4000:]}")
    return finished


# ---------------------------------------------------------------------------------------------------------------------
# Generation and import
# ---------------------------------------------------------------------------------------------------------------------


def measure_generation(backbone, arguments, batch_size):
    """Seconds of `generate` for one token and for `new_tokens` more, of the AMVL model and of its own backbone."""
    cell = Cell(arguments.prompt[0], arguments.answer[0], arguments.num_latents[0], batch_size)
    model, batch = prepare(backbone, arguments, cell)
    model.eval()

    def generate(generator, length):
        return lambda: generator.generate(
            **batch.prompt, min_new_tokens=length, max_new_tokens=length, do_sample=False
        )

    models = {"backbone": model.backbone, "amvl": model}
    lengths = {"first": 1, "all": 1 + arguments.new_tokens}
    for name, generator in models.items():
        num_new = generate(generator, lengths["all"])().shape[1] - cell.prompt
        if num_new != lengths["all"]:
            raise RuntimeError(f"`generate` of {name} gave {num_new} new tokens instead of {lengths['all']}.")
    calls = {(name, part): generate(models[name], lengths[part]) for part in lengths for name in models}
    seconds = in_turns(calls, arguments.rounds)
    first = {name: seconds[name, "first"] for name in models}
    per_token = {
        name: [
            (whole - one) / arguments.new_tokens
            for whole, one in zip(seconds[name, "all"], seconds[name, "first"], strict=True)
        ]
        for name in models
    }
    return {
        "batch": batch_size,
        "prompt": cell.prompt,
        "num_latents": cell.num_latents,
        "first": first,
        "per_token": per_token,
        "bound": (cell.prompt + 2 * cell.num_latents) / cell.prompt,
    }


def measure_samples(backbone, arguments, batch_size):
    """Seconds of a call for one latent per prompt, of one call for n, and of n calls: of the first token and of all."""
    cell = Cell(arguments.prompt[0], arguments.answer[0], arguments.num_latents[0], batch_size)
    model, batch = prepare(backbone, arguments, cell)
    model.eval()

    def generate(length, num_samples=None):
        return model.generate(
            **batch.prompt,
            num_latent_samples=num_samples,
            latent_temperature=1.0,
            min_new_tokens=length,
            max_new_tokens=length,
            do_sample=False,
        )

    measured = []
    for length in (1, 1 + arguments.new_tokens):
        calls = {
            "one": lambda length=length: generate(length),
            "several": lambda length=length: generate(length, arguments.num_samples),
            "calls": lambda length=length: [generate(length) for _ in range(arguments.num_samples)],
        }
        if (num_rows := calls["several"]().shape[0]) != batch_size * arguments.num_samples:
            raise RuntimeError(f"`generate` gave {num_rows} rows instead of {batch_size * arguments.num_samples}.")
        measured.append({"new_tokens": length, "seconds": in_turns(calls, arguments.rounds)})
    return {
        "batch": batch_size,
        "prompt": cell.prompt,
        "num_latents": cell.num_latents,
        "num_samples": arguments.num_samples,
        "measured": measured,
    }


IMPORTS = """
import sys, time
start = time.perf_counter()
import transformers
alone = time.perf_counter()
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
stock = time.perf_counter()
print("from here on", file=sys.stderr, flush=True)
import modeling_amvl
print(alone - start, stock - alone, time.perf_counter() - stock)
"""


def measure_import(arguments):
    """Seconds of the imports of a stock model, and of `modeling_amvl` after them, in fresh processes; its modules by time."""
    # The profile comes first: it also fills the caches of files and bytecode.
    profile = run_python(["-X", "importtime", "-c", IMPORTS]).stderr.split("from here on\n")[1]
    num_runs = 1 if arguments.quick else FEWEST_ROUNDS
    seconds = [[float(word) for word in run_python(["-c", IMPORTS]).stdout.split()] for _ in range(num_runs)]
    modules = {}
    for line in profile.splitlines():
        own, _, name = (word.strip() for word in line.removeprefix("import time:").split("|"))
        modules[name] = int(own) / 1e6
    alone, stock, added = (list(column) for column in zip(*seconds))
    return {
        "alone": alone,
        "stock": stock,
        "added": added,
        "modules": dict(sorted(modules.items(), key=lambda item: -item[1])),
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is shown
# ---------------------------------------------------------------------------------------------------------------------


def cell_columns(cell):
    return [
        cell["prompt"],
        cell["answer"],
        cell["num_latents"],
        cell["batch"],
        "yes" if cell["checkpointing"] else "no",
    ]


CELL_HEADER = ["prompt", "answer", "k", "batch", "ckpt"]


def training_table(measured, baseline):
    header = [*CELL_HEADER, "SFT s", *(word for arm in AMVL_ARMS for word in (TITLES[arm], "bound"))]
    rows = []
    for result in measured:
        row = [*cell_columns(result["cell"]), f"{statistics.median(result['seconds'][baseline]):.3f}"]
        for arm in AMVL_ARMS:
            row += [spread(ratios(result["seconds"], arm, baseline)), f"{result['bounds'][arm]:.2f}"]
        rows.append(row)
    whose = {"sft": "SFT (the model's own loss, logits everywhere)", "sft_answer": "SFT with the answer's logits only"}
    return f"Time of a training step / {whose[baseline]}", header, rows


def memory_table(measured):
    others = [arm for arm in ARMS if arm != "sft"]
    rows = []
    for result in measured:
        sft = result["bytes"]["sft"]
        row = [*cell_columns(result["cell"]), " / ".join(f"{sft[key] / 1e6:.0f}" for key in ("whole", "increment"))]
        for arm in others:
            row.append(" / ".join(f"{result['bytes'][arm][key] / sft[key]:.2f}" for key in ("whole", "increment")))
        rows.append(row)
    header = [*CELL_HEADER, "SFT MB", *(TITLES[arm] for arm in others)]
    return "Peak memory / SFT: of the whole process / above model and inputs", header, rows


def generation_table(measured):
    header = ["prompt", "k", "batch", "first token s", "AMVL", "bound", "further token s", "AMVL"]
    rows = [
        [
            result["prompt"],
            result["num_latents"],
            result["batch"],
            f"{statistics.median(result['first']['backbone']):.4f}",
            spread(ratios(result["first"], "amvl", "backbone"), 3),
            f"{result['bound']:.3f}",
            f"{statistics.median(result['per_token']['backbone']):.5f}",
            spread(ratios(result["per_token"], "amvl", "backbone"), 3),
        ]
        for result in measured
    ]
    return "Time of `generate` / bare backbone: first token, and each further one", header, rows


def samples_table(measured):
    header = ["prompt", "k", "batch", "samples", "new tokens", "one sample s", "all in one call", "a call for each"]
    rows = [
        [
            *(result[key] for key in ("prompt", "num_latents", "batch", "num_samples")),
            at_length["new_tokens"],
            f"{statistics.median(at_length['seconds']['one']):.4f}",
            spread(ratios(at_length["seconds"], "several", "one")),
            spread(ratios(at_length["seconds"], "calls", "one")),
        ]
        for result in measured
        for at_length in result["measured"]
    ]
    return "Time of `generate` with several latents per prompt / with one", header, rows


def import_table(measured, num_modules=6):
    def row(name, values):
        return [name, spread((statistics.median(values), min(values), max(values)), 3)]

    rows = [
        row("transformers, which loads what is asked of it", measured["alone"]),
        row("a model class and a processor of it, torch included", measured["stock"]),
        row("modeling_amvl after them", measured["added"]),
        *([f"- of it {name}", f"{own:.3f}"] for name, own in list(measured["modules"].items())[:num_modules]),
    ]
    return "Seconds of an import in a fresh process", ["import", "s"], rows


def tables_of(results):
    tables = []
    if results["training"]:
        tables += [training_table(results["training"], baseline) for baseline in ("sft", "sft_answer")]
    if results["memory"]:
        tables.append(memory_table(results["memory"]))
    if results["generation"]:
        tables.append(generation_table(results["generation"]))
    if results["samples"]:
        tables.append(samples_table(results["samples"]))
    if results["import"]:
        tables += [import_table(result) for result in results["import"]]
    return tables


def facts_of(arguments):
    """What the numbers hold for; counts the parameters of a model without storage, which also checks the settings."""
    backbone = build_backbone(arguments, "meta")
    return machine_facts() | {
        "gpu": None if arguments.device == "cpu" else torch.cuda.get_device_name(arguments.device),
        "shape": arguments.shape,
        "num_layers": backbone.config.get_text_config().num_hidden_layers,
        "num_parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "dtype": str(arguments.torch_dtype).removeprefix("torch."),
        "attention": backbone.config._attn_implementation,
        "rounds": arguments.rounds,
    }


def shape_and_facts(facts):
    return (
        f"{facts['shape']}, {facts['num_layers']} layers, {facts['num_parameters'] / 1e6:.1f}M parameters, {facts['dtype']}, "
        f"{facts['attention']} attention; {facts['rounds']} rounds\n{facts_line(facts)}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


PROCESS_COST = 20_000  # what the start of a process costs, in tokens of a training step of `small`


def tasks_of(arguments):
    """Everything to measure, in order: (part, label, rough cost in tokens, function of the backbone)."""
    tasks = []
    for cell in cells_of(arguments):
        step = cell.batch * (cell.prompt + cell.answer) * sum(flop_bounds(cell).values())
        if "training" in arguments.parts:
            cost = step * (arguments.rounds + 1)
            tasks.append(
                ("training", cell, cost, lambda backbone, cell=cell: measure_training(backbone, arguments, cell))
            )
        if "memory" in arguments.parts:
            cost = 2 * step + (PROCESS_COST * len(ARMS) if arguments.device == "cpu" else 0)
            tasks.append(("memory", cell, cost, lambda backbone, cell=cell: measure_memory(backbone, arguments, cell)))
    for part, measure, calls in (
        ("generation", measure_generation, 1),
        ("samples", measure_samples, 2 + arguments.num_samples),
    ):
        for batch in arguments.generation_batch if part in arguments.parts else ():
            cost = calls * (arguments.rounds + 1) * (batch * arguments.prompt[0] + 30 * arguments.new_tokens)

            def of_backbone(backbone, measure=measure, batch=batch):
                return measure(backbone, arguments, batch)

            tasks.append((part, f"{batch} rows", cost, of_backbone))
    if "import" in arguments.parts:
        tasks.append(
            ("import", "modeling_amvl", PROCESS_COST * FEWEST_ROUNDS, lambda backbone: measure_import(arguments))
        )
    return tasks


def run(arguments):
    """Measures all that was asked for, and says on the error stream how far it is."""
    facts = facts_of(arguments)
    print(shape_and_facts(facts), file=sys.stderr)
    tasks = tasks_of(arguments)
    results = {"machine": facts, "settings": asdict(arguments), **{part: [] for part in PARTS}}
    elsewhere = {"import", "memory"} if arguments.device == "cpu" else {"import"}  # measured in other processes
    backbone = build_backbone(arguments) if {*arguments.parts} - elsewhere else None
    start, done, total = time.perf_counter(), 0, sum(cost for *_, cost, _ in tasks)
    for number, (part, label, cost, measure) in enumerate(tasks, start=1):
        results[part].append(measure(backbone))
        if arguments.json is not None:  # each time, so that a run that is cut off leaves what it has
            Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
        done += cost
        passed = time.perf_counter() - start
        left = passed * (total - done) / done
        print(
            f"[{number}/{len(tasks)}] {part}: {label}; {passed:.0f} s, about {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
    return results


def main(arguments):
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.memory_of is not None:
        (cell, *_), arm = cells_of(arguments), arguments.memory_of
        model, batch = prepare(build_backbone(arguments), arguments, cell)
        warm_up(model, arguments, arm)
        print(json.dumps(peak_memory(model, batch, arm, arguments.device)))
        return
    results = run(arguments)
    tables, facts = tables_of(results), shape_and_facts(results["machine"])
    print("\n".join([facts, "", *(render(table, markdown=False) for table in tables)]))
    if arguments.markdown is not None:
        command = " ".join(["python recipes/benchmark_amvl.py", *sys.argv[1:]])
        Path(arguments.markdown).write_text(markdown_page("What AMVL costs", command, facts, tables))


if __name__ == "__main__":
    main(*HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses())
