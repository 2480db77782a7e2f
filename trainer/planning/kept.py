"""What a GPU keeps from step to step, by arithmetic: weights, gradients and AdamW's two moments.

Bytes per parameter, T trained, F frozen, N GPUs; w is 2 under `bf16=True` and 4 without, t the size of the type that the weights are
loaded in:

    engine         weights             gradients      optimiser   beside them
    single         t (T + F)           t T            2 t T
    ddp            t (T + F)           t T            2 t T       t T of buckets
    zero2          w (T + F)           (w + 4) T / N  12 T / N    a bucket of 5e8 w
    zero3          w (T + F) / N       4 T / N        12 T / N    the bucket, and the layers gathered
    zero3_offload  -                   -              -           the bucket, and the layers gathered
    fsdp2          (4 T + t F) / N     4 T / N        8 T / N     the layers gathered

Without `bf16`, ZeRO-2's gradients are 4 T / N and FSDP2 has t in place of 4. The copies in fp32 that the mixed-precision engines keep
are in there: DeepSpeed's is 4 of its 12, FSDP2's are its weights. `single` and `ddp` have them where `dtype` is float32 and `bf16` is on; with weights in bfloat16 their AdamW is one of bfloat16.

Sources: DDP's buckets, `gradient_as_bucket_view=False` in torch's documentation of it; ZeRO, `estimate_zero2_model_states_mem_needs` and
`estimate_zero3_model_states_mem_needs` of DeepSpeed 0.19.8, whose sums these are where F = 0 and `bf16` is on, and its defaults
`reduce_bucket_size=5e8` and `stage3_max_live_parameters=1e9` (gathered is the larger of 4 per parameter of the largest module, as its
estimator has it, and w for each that may live); FSDP2, `fsdp2_prepare_model` of accelerate 1.15, which casts what is
trained to fp32, wraps `_no_split_modules` one by one and keeps the rest gathered.
"""

from dataclasses import dataclass

from ..sft_trainer import amvl_model


ENGINES = ("single", "ddp", "zero2", "zero3", "zero3_offload", "fsdp2")
IN_STAGES = ("single", "zero2", "fsdp2")  # without LoRA
WHOLE_GRADIENTS = ("single", "ddp")  # those that do not share gradients out
REDUCE_BUCKET, MOST_LIVE = int(5e8), int(1e9)  # parameters; defaults of DeepSpeed
HOST_BUFFERS = 1.5  # DeepSpeed's `additional_buffer_factor`
GIB = 2**30


def refuse_below_one(name, value):
    if value < 1:
        raise ValueError(f"`{name}` must be 1 or more, got {value}.")


def refuse_unknown_engine(engine):
    if engine not in ENGINES:
        raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {engine!r}.")


@dataclass(frozen=True)
class Sizes:
    """
    Parameters of a model, as the engines count them.

    Args:
        trainable (`int`), frozen (`int`): how many; shared ones count once.
        trainable_bytes (`int`), frozen_bytes (`int`): their bytes as loaded.
        largest_module (`int`): most that a module has itself, without its children; DeepSpeed gathers by modules.
        largest_unit (`int`): most of a layer that FSDP2 wraps.
        outside_units (`int`): those in no such layer.
    """

    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int
    largest_module: int
    largest_unit: int
    outside_units: int

    @property
    def total(self):
        return self.trainable + self.frozen


def sizes_of(model):
    """The [`Sizes`] of a model, with or without storage."""
    unit_classes = set(amvl_model(model)._no_split_modules or ())
    modules = list(model.modules())
    units = [sum(p.numel() for p in m.parameters()) for m in modules if type(m).__name__ in unit_classes]
    kinds = {kind: [p for p in model.parameters() if p.requires_grad is kind] for kind in (True, False)}
    count = {kind: sum(p.numel() for p in found) for kind, found in kinds.items()}
    size = {kind: sum(p.nbytes for p in found) for kind, found in kinds.items()}
    own = (sum(p.numel() for p in module.parameters(recurse=False)) for module in modules)
    outside = max(count[True] + count[False] - sum(units), 0)
    return Sizes(count[True], count[False], size[True], size[False], max(own), max(units, default=0), outside)


def kept_bytes(engine, sizes, num_gpus, mixed):
    """
    Bytes that a GPU keeps from step to step; formulas and sources above.

    Args:
        engine (`str`): one of `ENGINES`.
        sizes ([`Sizes`]): of the model.
        num_gpus (`int`): N, which share the states out.
        mixed (`bool`): `bf16=True`.

    Returns:
        `dict[str, int]`: `weights`, `gradients`, `optimiser`, `gathered` (whole layers, of shared-out weights), `buckets`, and
        `host`, bytes of the memory of a machine that has all N GPUs.

    Raises:
        ValueError: an engine that there is not, or no GPU.
    """
    refuse_unknown_engine(engine)
    refuse_below_one("num_gpus", num_gpus)
    trained, loaded = sizes.trainable, sizes.trainable_bytes + sizes.frozen_bytes
    width = 2 if mixed else 4
    kept = dict.fromkeys(("weights", "gradients", "optimiser", "gathered", "buckets", "host"), 0)
    if engine in WHOLE_GRADIENTS:
        kept |= {"weights": loaded, "gradients": sizes.trainable_bytes, "optimiser": 2 * sizes.trainable_bytes}
        if engine == "ddp":
            kept["buckets"] = sizes.trainable_bytes
    elif engine == "fsdp2":
        trained_bytes = 4 * trained if mixed else sizes.trainable_bytes
        kept["weights"] = (trained_bytes + sizes.frozen_bytes) // num_gpus
        kept["gradients"] = trained_bytes // num_gpus
        kept["optimiser"] = 2 * trained_bytes // num_gpus
        # The next layer is gathered while one runs; what is in no layer stays gathered.
        kept["gathered"] = width * (sizes.outside_units + 2 * sizes.largest_unit)
    else:
        kept["buckets"] = width * REDUCE_BUCKET
        if engine == "zero2":
            kept["weights"] = width * sizes.total
            kept["gradients"] = (width + 4 if mixed else 4) * trained // num_gpus
        else:
            kept["gathered"] = max(4 * sizes.largest_module, width * min(sizes.total, MOST_LIVE))
        if engine == "zero3":
            kept["weights"] = width * sizes.total // num_gpus
            kept["gradients"] = 4 * trained // num_gpus
        if engine == "zero3_offload":
            kept["host"] = int(sizes.total * max(4 * num_gpus, 18) * HOST_BUFFERS)
        else:
            kept["optimiser"] = 12 * trained // num_gpus
    return kept
