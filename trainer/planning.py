"""What a run needs on each GPU, from a backbone's config alone: arithmetic for what is kept, a rehearsal for the rest.

Kept from step to step are weights, gradients and AdamW's two moments. Bytes per parameter, T trained, F frozen, N GPUs; w is 2
under `bf16=True` and 4 without, t the size of the type that the weights are loaded in:

    engine         weights             gradients      optimiser   beside them
    single         t (T + F)           t T            2 t T
    ddp            t (T + F)           t T            2 t T       t T of buckets
    zero2          w (T + F)           (w + 4) T / N  12 T / N    a bucket of 5e8 w
    zero3          w (T + F) / N       4 T / N        12 T / N    the bucket, and the layers gathered
    zero3_offload  -                   -              -           the bucket, and the layers gathered
    fsdp2          (4 T + t F) / N     4 T / N        8 T / N     the layers gathered

Without `bf16`, ZeRO-2's gradients are 4 T / N and FSDP2 has t in place of 4. The copies in fp32 that the mixed-precision engines keep are in there: DeepSpeed's is 4 of its 12, FSDP2's are its weights. `single`
and `ddp` have them where `dtype` is float32 and `bf16` is on; with weights in bfloat16 their AdamW is one of bfloat16.

Sources: DDP's buckets, `gradient_as_bucket_view=False` in torch's documentation of it; ZeRO, `estimate_zero2_model_states_mem_needs` and
`estimate_zero3_model_states_mem_needs` of DeepSpeed 0.19.8, whose sums these are where F = 0 and `bf16` is on, and its defaults
`reduce_bucket_size=5e8` and `stage3_max_live_parameters=1e9` (gathered is the larger of 4 per parameter of the largest module, as its
estimator has it, and w for each that may live); FSDP2, `fsdp2_prepare_model` of accelerate 1.15, which casts what is
trained to fp32, wraps `_no_split_modules` one by one and keeps the rest gathered.

What a step needs beside that is not worked out from a formula: [`rehearse`] runs forward and backward of the real model, LoRA,
gradient checkpointing, shared prefix and loss included, on tensors without storage (`FakeTensorMode` of torch), and adds up what
is alive. That holds what formulas for one sequence (arXiv 2205.05198) miss: every branch uses the same parameters, so that torch
holds their gradients back until the prompt's own backward pass, a second copy beside those that are accumulated, and whole on
every GPU. `single`, `zero2` and `fsdp2` run the backward pass in stages where weights are trained whole, which keeps it from
that (trainer/staged_backward.py); `ddp` and `zero3` cannot. The sum of both is an upper bound: what is largest at the optimiser's step (DeepSpeed's gradients
in fp32) and what is largest in the backward pass are added up.

Not modelled: CUDA's context and libraries (0.5 to 1 GiB), NCCL's and cuBLAS's buffers, fragmentation of the allocator, what a kernel
of another attention than SDPA's or eager's takes, images (a frozen vision encoder keeps nothing for the backward pass, and when it
runs little else is there) and the projector behind them, the self-test of the first batch, evaluation, loading and saving.
"""

import contextlib
import weakref
from dataclasses import dataclass

import torch
from accelerate.utils.operations import convert_to_fp32
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForImageTextToText

from modeling_amvl import AMVLConfig, AMVLForConditionalGeneration
from modeling_amvl.branching_amvl import output_embeddings
from modeling_amvl.families_amvl import REQUIRED_IN_TRAINING
from modeling_amvl.refusals_amvl import named_tokens, refuse_backbone, refuse_config

from .adapters import LATENT_MODULES, prepare_peft_config, settle_adapter
from .objective import amvl_loss
from .sft_trainer import AMVLSFTTrainer, amvl_model
from .staged_backward import run_stages


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


# ---------------------------------------------------------------------------------------------------------------------
# The model, without storage
# ---------------------------------------------------------------------------------------------------------------------


def wrap_config(config, num_latents=None, latent_size=None):
    """
    The config of an AMVL model around a stock one.

    Args:
        config (`PreTrainedConfig`): of a stock backbone, or of a trained AMVL model.
        num_latents (`int`, *optional*), latent_size (`int`, *optional*): K and Z; by default those of [`AMVLConfig`], or as trained.

    Returns:
        [`AMVLConfig`].

    Raises:
        ValueError: a backbone that cannot carry latents, or a number that is none or another than was trained.
    """
    latents = {"num_latents": num_latents, "latent_size": latent_size}
    latents = {key: value for key, value in latents.items() if value is not None}
    for key, value in latents.items():
        refuse_below_one(key, value)
    if config.model_type == AMVLConfig.model_type:
        for key, value in latents.items():
            if value != getattr(config, key):
                raise ValueError(
                    f"`{key}` is {value}, but the model was trained with {getattr(config, key)}: leave it out."
                )
        refuse_config(config.backbone_config)
        return config
    refuse_config(config)
    wrapped = AMVLConfig(**latents, latent_token_id=ordinary_token(config))
    wrapped.backbone_config = config  # not passed above: that would overwrite its attention implementation
    return wrapped


def ordinary_token(config):
    """The first id that no setting of a config names."""
    named = {token for _, token in named_tokens(config)}
    return next(token for token in range(len(named) + 1) if token not in named)


def build_model(
    config, dtype, peft_config=None, gradient_checkpointing=False, attn_implementation=None, freeze_vision=True
):
    """
    An AMVL model without storage, ready to be trained as [`AMVLSFTTrainer`] trains it: vision frozen, LoRA in place.

    Args:
        config ([`AMVLConfig`]): see [`wrap_config`].
        dtype (`torch.dtype`): of the weights as they are loaded.
        peft_config (`PeftConfig`, *optional*): LoRA.
        gradient_checkpointing (`bool`, defaults to `False`): as in the training settings.
        attn_implementation (`str`, *optional*): `"sdpa"` or `"eager"`.
        freeze_vision (`bool`, defaults to `True`): `False` for a backbone without a vision encoder of its own.

    Returns:
        [`AMVLForConditionalGeneration`] or `PeftModel`: of fake tensors, said to be on the CPU.

    Raises:
        ValueError: a backbone that cannot carry latents, has no vision encoder to freeze, or has one that is to be trained.
    """
    with torch.device("meta"):
        backbone = AutoModelForImageTextToText.from_config(
            config.backbone_config, dtype=dtype, attn_implementation=attn_implementation
        )
        refuse_backbone(backbone)
        model = AMVLForConditionalGeneration._from_config(config, backbone=backbone, dtype=dtype)
    if peft_config is not None:
        peft_config = prepare_peft_config(peft_config, model)
    if freeze_vision:
        AMVLSFTTrainer._freeze_vision(model, peft_config)
    elif vision_encoder(backbone) is not None:
        raise ValueError(
            "`freeze_vision=False` is not planned: what a vision encoder keeps for its backward pass depends on its images. "
            "Leave it out."
        )
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if peft_config is not None:
        model = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
        settle_adapter(model)
        if gradient_checkpointing:
            model.enable_input_require_grads()
    _say_on_cpu(model)
    return model.train()


def _say_on_cpu(model):
    """Makes tensors on the meta device fake ones that say they are on the CPU: their kernels are those of a real step."""
    mode, fakes = FakeTensorMode(allow_non_fake_inputs=True), {}

    def fake(tensor):
        if id(tensor) not in fakes:
            with mode:
                empty = torch.empty_like(tensor, device="cpu")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            fakes[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return fakes[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                    tensors[name] = fake(tensor)


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


def vision_encoder(backbone):
    """The vision encoder of a backbone, `None` where it has none of its own."""
    encoder = backbone.get_encoder(modality="image")
    return None if encoder is backbone or encoder is backbone.base_model else encoder


def parts_of(model):
    """
    Parameters by part.

    Args:
        model ([`AMVLForConditionalGeneration`] or `PeftModel`): with or without storage.

    Returns:
        `dict[str, tuple[int, int]]`: parameters of each part, all and trained ones; each counts once. What lies between vision
        encoder and language model is the projector; with some families, Qwen2.5-VL say, it is part of the encoder.
    """
    inner = amvl_model(model)
    backbone = inner.backbone
    # The first to claim a parameter has it.
    claims = {name.replace("_", " "): getattr(inner, name).parameters() for name in LATENT_MODULES}
    claims["LoRA"] = (p for name, p in backbone.named_parameters() if "lora_" in name)
    tables = (backbone.get_input_embeddings(), output_embeddings(backbone))
    claims["embeddings and head"] = (p for table in tables for p in table.parameters())
    encoder = vision_encoder(backbone)
    claims["vision encoder"] = () if encoder is None else encoder.parameters()
    claims["language model"] = backbone.get_decoder().parameters()
    claims["projector"] = backbone.parameters()
    taken, parts = set(), {}
    for part, claimed in claims.items():
        found = {p for p in claimed if p not in taken}
        taken |= found
        parts[part] = (sum(p.numel() for p in found), sum(p.numel() for p in found if p.requires_grad))
    first = ("vision encoder", "projector", "language model", "embeddings and head", "LoRA")
    return {part: parts[part] for part in (*first, *parts) if parts[part][0]}


# ---------------------------------------------------------------------------------------------------------------------
# What is kept from step to step
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# What a step needs beside that
# ---------------------------------------------------------------------------------------------------------------------


class LiveMemory(TorchDispatchMode):
    """
    Adds up the bytes of all storages that are alive, those of fake tensors too; each counts once, views do not.

    torch's own `MemTracker` stops at frozen parameters (2.13), which every run here has.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def add(self, tensor):
        """Counts a tensor that was there before."""
        storage = tensor.untyped_storage()
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = weakref.finalize(storage, self._release, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _release(self, size):
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return output


@dataclass(frozen=True)
class Sequence:
    """The rows of a step on one device: all prompts have one length, and so have all answers, in tokens."""

    prompt_tokens: int
    answer_tokens: int
    num_rows: int = 1

    def __post_init__(self):
        for name in ("prompt_tokens", "answer_tokens", "num_rows"):
            refuse_below_one(name, getattr(self, name))


def refuse_too_long(config, sequence):
    """Refuses a sequence that has more tokens than the language model of an [`AMVLConfig`] has positions."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = sequence.prompt_tokens + config.num_latents + sequence.answer_tokens
    if positions is not None and length > positions:
        raise ValueError(
            f"`prompt_tokens` {sequence.prompt_tokens}, `num_latents` {config.num_latents} and `answer_tokens` "
            f"{sequence.answer_tokens} are {length} tokens, but `{config.backbone_config.model_type}` has {positions} "
            "positions: shorten the prompt, by fewer pixels per image say."
        )


def step_inputs(config, sequence):
    """Keyword arguments of a step: words alone; all rows but the first are padded by one token, as rows of a batch mostly are."""
    word = ordinary_token(config.backbone_config)
    prompts = torch.full((sequence.num_rows, sequence.prompt_tokens), word)
    mask = torch.ones_like(prompts)
    if sequence.prompt_tokens > 1:
        mask[1:, 0] = 0
    answers = torch.full((sequence.num_rows, sequence.answer_tokens), word)
    required = REQUIRED_IN_TRAINING.get(config.backbone_config.model_type)
    return {
        **({required: torch.zeros_like(prompts)} if required else {}),
        "input_ids": prompts,
        "attention_mask": mask,
        "completion_ids": answers,
        "completion_mask": torch.ones_like(answers),
    }


def run_step(model, inputs, mixed=False, decode_prior=True, in_stages=False):
    """Forward and backward of one batch, as the trainer runs them; weights of the terms make no difference to the memory."""
    autocast = torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext()
    with autocast:
        output = model(**inputs, decode_prior=decode_prior, in_stages=in_stages)
    output = convert_to_fp32(output) if mixed else output
    loss, terms = amvl_loss(
        output["loss"],
        (output["prior_mean"], output["prior_log_variance"]),
        (output["posterior_mean"], output["posterior_log_variance"]),
        1.0,
        1.0,
        prior_ntp=output["prior_loss"] if decode_prior else None,
        prior_ntp_weight=1.0,
    )
    if output.get("cuts") is not None:
        loss = run_stages(terms, output["cuts"], torch.Tensor.backward)
    loss.backward()


def rehearse(model, sequence, mixed=False, decode_prior=True, accumulates=True, in_stages=False):
    """
    Runs a step without storage and adds up what it needs beside weights and gradients.

    Args:
        model ([`AMVLForConditionalGeneration`] or `PeftModel`): of [`build_model`].
        sequence ([`Sequence`]): the rows of a device.
        mixed (`bool`, defaults to `False`): `bf16=True`, autocast.
        decode_prior (`bool`, defaults to `True`): `prior_ntp_weight > 0`.
        accumulates (`bool`, defaults to `True`): gradients are there when the step starts, of the batch before or because the
            engine keeps its own. Without, those that it makes stand where they would have been, which saves up to a copy.
        in_stages (`bool`, defaults to `False`): the backward pass is run in stages, see trainer/staged_backward.py.

    Returns:
        `int`: bytes at the worst moment, above those of weights and gradients.

    Raises:
        ValueError: more tokens than the model has positions, or a model whose step depends on numbers that are not there.
    """
    config = amvl_model(model).config
    refuse_too_long(config, sequence)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if accumulates else None
    memory = LiveMemory()
    for parameter in model.parameters():
        memory.add(parameter)
        if parameter.grad is not None:
            memory.add(parameter.grad)
    inputs = step_inputs(config, sequence)
    kept = sum(p.nbytes for p in model.parameters()) + sum(p.nbytes for p in trained)
    try:
        with memory:
            run_step(model, inputs, mixed, decode_prior, in_stages)
    except Exception as error:  # experts that count their tokens, a forward that asks for images
        raise ValueError(
            f"A step of `{config.backbone_config.model_type}` cannot be rehearsed without storage, `{type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}`: measure a few steps of it on the GPU."
        ) from error
    for parameter in trained:
        parameter.grad = None
    return max(memory.peak - kept, 0)


@torch.no_grad()
def prefix_cache_bytes(model, sequence, mixed=False):
    """Bytes of the cache that branches share, the prior's slots included; part of [`rehearse`]'s, and 0 under `multipass="full"`."""
    inner = amvl_model(model)
    inputs = step_inputs(inner.config, sequence)
    with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
        prompt = inner.read_prompt(inputs["input_ids"], inputs["attention_mask"], {}, with_prior=True)
    memory = LiveMemory()
    for layer in prompt.cache.layers if hasattr(prompt, "cache") else ():
        for leaf in tree_leaves(dict(vars(layer))):
            if isinstance(leaf, torch.Tensor):
                memory.add(leaf)
    return memory.live
