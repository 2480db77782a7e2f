"""Says what a run needs on each GPU before any is rented: no weights are loaded, the backbone's config is all it takes.

    python recipes/plan_amvl.py Qwen/Qwen2.5-VL-7B-Instruct --config recipes/configs/qwen2_5_vl_7b_monet.yaml

The first word is a Hub id or a folder, of a stock or an AMVL model; left out, it is the file's `model_name_or_path`. Of the file, and
of the command line, every setting counts that changes memory: `dtype`, `bf16`, LoRA's, `gradient_checkpointing`,
`per_device_train_batch_size`, `gradient_accumulation_steps`, `num_latents`, `latent_size`, `multipass`, `prior_ntp_weight`. What is
modelled and what is not stands in trainer/planning; a GPU of 80 GB has 79 GiB or less to give, and a total above nine tenths of
`--gpu_memory` is called tight, since fragmentation is not modelled.
"""

import functools
import sys
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

import modeling_amvl  # noqa: F401  # registers the AMVL classes
from trainer import AMVLSFTConfig
from trainer.measuring import render
from trainer.planning.kept import (
    ENGINES,
    GIB,
    IN_STAGES,
    WHOLE_GRADIENTS,
    kept_bytes,
    refuse_below_one,
    refuse_unknown_engine,
    sizes_of,
)
from trainer.planning.model import build_model, parts_of, wrap_config
from trainer.planning.rehearsal import Sequence, prefix_cache_bytes, refuse_too_long, rehearse


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TIGHT = 0.9  # of a GPU's memory
NOTES = """\
step: activations, what the backward pass makes on its way, and the gradients that ddp and zero3 hold back until the last branch has
passed; the others run it in stages, unless LoRA makes gradients small.
buckets: gradients on their way between GPUs. gathered: whole layers of weights that are shared out. host: a machine with all GPUs.
tight: more than 90 % of the memory; CUDA's context and NCCL take 1 to 2 GiB of it, and fragmentation is not modelled."""


@dataclass
class PlanArguments:
    """The rows of a step, and the GPUs."""

    prompt_tokens: int = field(
        default=1400,
        metadata={"help": "Tokens of a prompt, its images' included: 1,280 of one image of 1003520 pixels."},
    )
    answer_tokens: int = field(default=60, metadata={"help": "Tokens of an answer."})
    engines: list[str] = field(default_factory=lambda: list(ENGINES), metadata={"help": f"Of {', '.join(ENGINES)}."})
    num_gpus: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Counts, each a row per engine."}
    )
    gpu_memory: float = field(default=80.0, metadata={"help": "Memory of one GPU in GiB."})
    num_latents: int | None = field(default=None, metadata={"help": "As in recipes/sft_amvl.py."})
    latent_size: int | None = field(default=None, metadata={"help": "As in recipes/sft_amvl.py."})
    multipass: str | None = field(default=None, metadata={"help": "As in recipes/sft_amvl.py."})

    def __post_init__(self):
        for name in ("prompt_tokens", "answer_tokens"):
            refuse_below_one(name, getattr(self, name))
        for engine in self.engines:
            refuse_unknown_engine(engine)
        for name in ("engines", "num_gpus"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is empty: give it a value, or leave it out for all.")
        for count in self.num_gpus:
            refuse_below_one("num_gpus", count)
        if not self.gpu_memory > 0:
            raise ValueError(f"`gpu_memory` must be above 0 GiB, got {self.gpu_memory}.")
        if self.multipass not in (None, "auto", "shared", "full"):
            raise ValueError(f"`multipass` must be `auto`, `shared` or `full`, got {self.multipass!r}.")


def check_settings(training_args, model_config):
    """Refuses settings whose memory is not modelled."""
    if model_config.model_name_or_path is None:
        raise ValueError(
            "`model_name_or_path` is needed, as the first word or in the YAML file: a Hub id or a folder."
        )
    refuse_below_one("per_device_train_batch_size", training_args.per_device_train_batch_size)
    if training_args.fp16:
        raise ValueError("`fp16=True` is not planned: use `bf16`.")
    if get_quantization_config(model_config) is not None:
        raise ValueError("`load_in_4bit` and `load_in_8bit` are not planned: leave them out.")
    if training_args.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ValueError(f"`optim` must be torch's AdamW, got '{training_args.optim.value}': leave it out.")


def plan(arguments, training_args, model_config):
    """
    The tables of parts and of engines.

    Args:
        arguments ([`PlanArguments`]), training_args ([`AMVLSFTConfig`]), model_config (`ModelConfig`): the settings.

    Returns:
        `list`: (title, header, rows) each.

    Raises:
        ValueError: a setting that is not modelled, a backbone that cannot be wrapped, a sequence that is too long.
    """
    check_settings(training_args, model_config)
    config = AutoConfig.from_pretrained(model_config.model_name_or_path, revision=model_config.model_revision)
    asked = model_config.dtype if model_config.dtype not in (None, "auto") else config.dtype or "float32"
    dtype = DTYPES.get(str(asked).removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"`dtype` must be `bfloat16` or `float32`, got '{asked}'.")
    config = wrap_config(config, arguments.num_latents, arguments.latent_size)
    config.multipass = arguments.multipass or config.multipass
    sequence = Sequence(arguments.prompt_tokens, arguments.answer_tokens, training_args.per_device_train_batch_size)
    refuse_too_long(config, sequence)
    mixed, decode_prior = training_args.bf16, training_args.prior_ntp_weight > 0
    if not mixed and dtype == torch.bfloat16 and any(engine.startswith("zero") for engine in arguments.engines):
        raise ValueError(
            "`bf16=False`, but `dtype` is bfloat16, which DeepSpeed takes with `bf16=True` only: set that, or leave its "
            "engines out of `engines`."
        )
    attention = "eager" if model_config.attn_implementation == "eager" else None

    def build(dtype):
        lora, checkpointing = get_peft_config(model_config), training_args.gradient_checkpointing
        return build_model(config, dtype, lora, checkpointing, attention, training_args.freeze_vision)

    model = build(dtype)
    sizes = sizes_of(model)
    # What DeepSpeed and FSDP2 compute with is bfloat16 from the start; the others cast weights as they come.
    cast_model = build(torch.bfloat16) if mixed and dtype != torch.bfloat16 else model
    accumulates = training_args.gradient_accumulation_steps > 1

    @functools.cache
    def step_and_cache(whole_gradients, in_stages):
        if cast_model is model and accumulates and not whole_gradients:
            return step_and_cache(True, in_stages)
        rehearsed, keeps = (model, accumulates) if whole_gradients else (cast_model, True)
        step = rehearse(rehearsed, sequence, mixed, decode_prior, keeps, in_stages)
        return step, prefix_cache_bytes(rehearsed, sequence, mixed)

    rows = []
    for engine in arguments.engines:
        for num_gpus in [1] if engine == "single" else arguments.num_gpus:
            kept = kept_bytes(engine, sizes, num_gpus, mixed)
            in_stages = engine in IN_STAGES and not model_config.use_peft
            step, cache = step_and_cache(engine in WHOLE_GRADIENTS, in_stages)
            rows.append(engine_row(engine, num_gpus, kept, step, cache, arguments.gpu_memory))
    return [
        parts_table(parts_of(model), sizes, model_config.use_peft),
        engines_table(rows, sequence, config, training_args, str(dtype), arguments.gpu_memory),
    ]


def parts_table(parts, sizes, use_peft):
    def row(name, count, trained):
        return [name, f"{count:,}", f"{count / sizes.total:.1%}", f"{trained:,}", f"{trained / count:.1%}"]

    rows = [row(name, *counts) for name, counts in parts.items()]
    rows.append(row("all", sizes.total, sizes.trainable))
    return (
        f"Parameters, {'LoRA' if use_peft else 'full fine-tuning'}",
        ["part", "parameters", "share", "trained", "of it"],
        rows,
    )


def engine_row(engine, num_gpus, kept, step, cache, gpu_memory):
    on_gpu = {key: value for key, value in kept.items() if key != "host"}
    total = sum(on_gpu.values()) + step
    share = total / (gpu_memory * GIB)
    verdict = "does not fit" if share > 1 else "tight" if share > TIGHT else "fits"
    numbers = [*on_gpu.values(), step, cache, total]
    host = f"{kept['host'] / GIB:.1f}" if kept["host"] else "-"
    return [engine, num_gpus, *(f"{number / GIB:.2f}" for number in numbers), verdict, host]


def engines_table(rows, sequence, config, training_args, dtype, gpu_memory):
    title = (
        f"GiB per GPU of {gpu_memory:g}: {sequence.num_rows} x ({sequence.prompt_tokens} + {sequence.answer_tokens}) tokens, k = "
        f"{config.num_latents}, gradient checkpointing {'on' if training_args.gradient_checkpointing else 'off'}, "
        f"{dtype.removeprefix('torch.')}{', bf16' if training_args.bf16 else ''}"
    )
    kept = ["weights", "gradients", "AdamW", "gathered", "buckets"]
    return title, ["engine", "GPUs", *kept, "step", "of it cache", "total", "", "host"], rows


def main(arguments, training_args, model_config):
    for table in plan(arguments, training_args, model_config):
        print(render(table, markdown=False))
    print(NOTES)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words and not words[0].startswith("--"):
        words = ["--model_name_or_path", *words]
    # A recipe also names data, which needs no memory here; `bf16` on a machine without a GPU is refused unless it is to be used.
    parser = TrlParser((PlanArguments, AMVLSFTConfig, ModelConfig))
    main(*parser.parse_args_and_config([*words, "--use_cpu", "true"], fail_with_unknown_args=False))
