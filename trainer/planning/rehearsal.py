"""What a step needs beside weights and gradients: a step run on tensors without storage, adding up what is alive.

No formula: [`rehearse`] runs forward and backward of the real model, LoRA, gradient checkpointing, shared prefix and loss included
(`FakeTensorMode` of torch). That holds what formulas for one sequence (arXiv 2205.05198) miss: every branch uses the same parameters, so
that torch holds their gradients back until the prompt's own backward pass, a second copy beside those that are accumulated, and whole on
every GPU. `single`, `zero2` and `fsdp2` run the backward pass in stages where weights are trained whole, which keeps it from that
(trainer/staged_backward.py); `ddp` and `zero3` cannot.
"""

import contextlib
import weakref
from dataclasses import dataclass

import torch
from accelerate.utils.operations import convert_to_fp32
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from modeling_amvl.families_amvl import REQUIRED_IN_TRAINING

from ..objective import amvl_loss
from ..sft_trainer import amvl_model
from ..staged_backward import run_stages
from .kept import refuse_below_one
from .model import ordinary_token


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
    del output, terms  # as the trainer has let them go by now
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
