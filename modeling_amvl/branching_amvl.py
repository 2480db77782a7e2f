"""One prompt, many continuations: the prompt runs once into a differentiable cache, short branches read it.

A training step asks three questions about one prompt x: prior `[x, L]`, posterior `[x, y, L]`, decode `[x, z, y]`. What
x computes does not depend on what follows it, so [`SharedPrompt`] runs x once and each continuation as a branch that
reads the cache and never changes it. [`RepeatedPrompt`] is the reference: one whole forward per continuation, with the
images encoded once. Both prepare their inputs with the backbone's own generation methods, so no family is named here.

Shapes: B batch, P prompt, N continuation, S = P + N, K injected latents, D model size, V vocabulary.
"""

import contextlib
import functools
import inspect
import logging
import threading

import torch
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from .cache_amvl import CACHE_ARGUMENT, differentiable_cache, freeze_cache, takes_back, thaw_cache
from .families_amvl import ENCODED_IMAGES, POSITIONS_FROM_PADDING_ID, REQUIRED_IN_TRAINING


# The private names that this package relies on.
for _package, _owner, _names in (
    (
        "transformers",
        GenerationMixin,
        (
            "_prefill",
            "_prepare_cache_for_generation",
            "_prepare_multimodal_encoder_kwargs_for_generation",
            "_prepare_position_ids_for_generation",
            "_supports_mm_encoder_outputs",
            "_update_model_kwargs_for_generation",
        ),
    ),
    ("transformers", GradientCheckpointingLayer, ("_can_checkpoint_with_cache",)),
    ("torch", torch._C, ("_current_graph_task_id",)),
):
    for _name in _names:
        if not hasattr(_owner, _name):
            raise ImportError(
                f"This release of {_package} has no `{_owner.__name__}.{_name}`, which AMVL drives models with."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Reading and replacing what passes through the backbone
# ---------------------------------------------------------------------------------------------------------------------


def output_embeddings(backbone):
    """The head over the vocabulary, of the model or of the language model inside it; `None` if there is none."""
    models = (module for module in backbone.modules() if isinstance(module, PreTrainedModel))  # itself first
    return next((head for head in map(_own_output_embeddings, models) if head is not None), None)


def _own_output_embeddings(model):
    try:
        return model.get_output_embeddings()
    except NotImplementedError:
        return None


class _Tap:
    """What one forward of the backbone let through: final hidden states `(B, N, D)` and how often latents went in."""

    def __init__(self):
        self.hidden = None
        self.injections = 0


@contextlib.contextmanager
def tapped(backbone, shape, head_slice, latents=None, latents_start=0):
    """
    While open, one forward of `backbone` hands out its final hidden states and takes in `latents`.

    Args:
        backbone (`PreTrainedModel`): the stock model.
        shape (`tuple[int, int]`): (B, N) of the `input_ids` of that forward.
        head_slice (`slice`): the positions whose logits are computed.
        latents (`torch.Tensor`, *optional*): `(B, K, D)`, replaces the embeddings from position `latents_start` on.

    Raises:
        RuntimeError: the hidden states did not come by, or the latents did not enter exactly once.
    """
    tap, thread = _Tap(), threading.get_ident()

    def read_hidden(module, args):
        if threading.get_ident() == thread and args and args[0].shape[0] == shape[0] and args[0].shape[1] >= shape[1]:
            tap.hidden = args[0][:, -shape[1] :]  # some models put their images before the ids
            return (tap.hidden[:, head_slice], *args[1:])

    def inject(module, args, output):
        if threading.get_ident() == thread and output.shape[:2] == shape:
            tap.injections += 1
            stop = latents_start + latents.shape[1]
            entered = latents.to(output.device, output.dtype)
            return torch.cat([output[:, :latents_start], entered, output[:, stop:]], dim=1)

    hooks = [output_embeddings(backbone).register_forward_pre_hook(read_hidden)]
    if latents is not None:
        hooks.append(backbone.get_input_embeddings().register_forward_hook(inject))
    try:
        yield tap
    finally:
        for hook in hooks:
            hook.remove()
    if tap.hidden is None:
        raise RuntimeError(
            f"`{type(backbone).__name__}` did not pass its hidden states {tuple(shape)} through `get_output_embeddings()`."
        )
    if latents is not None and tap.injections != 1:
        raise RuntimeError(
            f"The latents entered `{type(backbone).__name__}` {tap.injections} times instead of once: its forward does "
            "not embed `input_ids` through `get_input_embeddings()` exactly once."
        )


@contextlib.contextmanager
def without_checkpointing(modules):
    """Switches gradient checkpointing off in those of `modules` that have it on."""
    checkpointed = [module for module in modules if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


@contextlib.contextmanager
def _cache_under_checkpointing(backbone):
    """Lets checkpointed layers keep the cache, which transformers takes away: a native cache would grow twice."""
    modules = list(backbone.modules())
    layers = [m for m in modules if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    if not layers:
        yield
        return
    for layer in layers:
        _refuse_reentrant(layer._gradient_checkpointing_func)
        layer._can_checkpoint_with_cache = True
    # It would say that the cache was switched off, which is just what does not happen here.
    logger = logging.getLogger("transformers.modeling_layers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # What is above the layers turns `use_cache` off under the flag; the layers do the checkpointing.
        with without_checkpointing(m for m in modules if not isinstance(m, GradientCheckpointingLayer)):
            yield
    finally:
        logger.setLevel(level)
        for layer in layers:
            vars(layer).pop("_can_checkpoint_with_cache", None)


def _refuse_reentrant(checkpoint_function):
    if getattr(checkpoint_function, "keywords", {}).get("use_reentrant"):
        raise ValueError(
            "`use_reentrant=True` recomputes layers without the prompt's cache: enable gradient checkpointing with "
            "`{'use_reentrant': False}`."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Continuing a prompt
# ---------------------------------------------------------------------------------------------------------------------


def prepare_prompt(backbone, input_ids, inputs):
    """The model's keyword arguments for a prompt as `generate` would start with them: positions added, mask explicit."""
    model_kwargs = {key: value for key, value in inputs.items() if value is not None}
    if required_inputs(type(backbone)) and backbone._supports_mm_encoder_outputs():
        # Every forward asks for the images; what can take them encoded gets them encoded once.
        model_kwargs = backbone._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
    model_kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        model_kwargs["position_ids"] = backbone._prepare_position_ids_for_generation(input_ids, dict(model_kwargs))
    return model_kwargs


def extend_model_kwargs(backbone, model_kwargs, outputs, length, num_new_tokens):
    """
    The keyword arguments for `num_new_tokens` more tokens after `length`, as `generate` would grow them one by one.

    The backbone grows them by one token; that last step is then repeated, positions counting on, so that the cost does
    not depend on the number of tokens.
    """
    one_more = backbone._update_model_kwargs_for_generation(outputs, dict(model_kwargs), is_encoder_decoder=False)
    extended = dict(one_more)
    for key, new in one_more.items():
        old = model_kwargs.get(key)
        if not (torch.is_tensor(new) and torch.is_tensor(old) and new.ndim == old.ndim):
            continue
        grown = [dim for dim in range(new.ndim) if new.shape[dim] == old.shape[dim] + 1]
        if grown and num_new_tokens > 1:
            last = new.narrow(grown[0], -1, 1)
            steps = [1] * new.ndim
            steps[grown[0]] = num_new_tokens - 1
            more = last.expand(*[n if d == grown[0] else -1 for d, n in enumerate(steps)])
            if key == "position_ids":
                more = more + torch.arange(1, num_new_tokens, device=new.device, dtype=new.dtype).view(steps)
            extended[key] = torch.cat([new, more], dim=grown[0])
        elif not grown and key.endswith(("token_type_ids", "position_mask")) and new.shape[-1] == length:
            # Per-token inputs that transformers forgets to grow: what follows a prompt is plain text.
            extended[key] = torch.nn.functional.pad(new, (0, num_new_tokens))
    return extended


@functools.cache
def required_inputs(model_class):
    """Names of what a forward cannot do without, besides the ids."""
    _, *parameters = inspect.signature(model_class.forward).parameters.values()  # without self
    return frozenset(
        parameter.name
        for parameter in parameters
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.default is parameter.empty
        and parameter.name != "input_ids"
    )


def complete_inputs(backbone, input_ids, model_kwargs, model_inputs):
    """
    Adds to a forward's keyword arguments what `prepare_inputs_for_generation` leaves out.

    Args:
        backbone (`PreTrainedModel`): the stock model.
        input_ids (`torch.LongTensor`): `(B, S)`, the whole sequence.
        model_kwargs (`dict`): of the whole sequence.
        model_inputs (`dict`): of this forward, whose tokens are the last ones of the sequence.
    """
    if required := required_inputs(type(backbone)):
        for name in {*required, "mm_encoder_outputs"} & {*required, *model_kwargs}:
            model_inputs.setdefault(name, model_kwargs.get(name))
        if model_inputs.get("attention_mask") is None:  # they would make one without what is in the cache
            model_inputs["attention_mask"] = torch.ones_like(input_ids)
    if backbone.config.model_type in POSITIONS_FROM_PADDING_ID:
        padding_id = backbone.config.get_text_config(decoder=True).pad_token_id
        is_token = (input_ids != padding_id).long()
        position_ids = is_token.cumsum(1) * is_token + padding_id
        model_inputs["position_ids"] = position_ids[:, -model_inputs["input_ids"].shape[1] :].contiguous()
    if backbone.training and (name := REQUIRED_IN_TRAINING.get(backbone.config.model_type)) in model_kwargs:
        model_inputs[name] = model_kwargs[name][:, -model_inputs["input_ids"].shape[1] :]
    if (encoded := ENCODED_IMAGES.get(backbone.config.model_type)) in model_kwargs:
        model_inputs[encoded] = model_kwargs[encoded]
    return model_inputs


def keep_encoded_images(backbone, model_kwargs, outputs):
    """Adds what the forward of a prompt has encoded to the keyword arguments of what follows, where that asks for it."""
    if (encoded := ENCODED_IMAGES.get(backbone.config.model_type)) is not None:
        if encoded not in outputs:  # since transformers 5.24
            outputs = {encoded: outputs.image_outputs.pooler_output}
        model_kwargs[encoded] = outputs[encoded]


def no_outputs():
    """Outputs of a forward that has not run, from which keyword arguments can be grown all the same."""
    outputs = CausalLMOutputWithPast()
    # Idefics reads one of them, the second since transformers 5.24.
    outputs.image_hidden_states = None
    outputs.image_outputs = BaseModelOutputWithPooling()
    return outputs


def run_prompt(backbone, input_ids, model_kwargs, placeholders=None):
    """
    Runs a prompt into the cache of `model_kwargs`, and with it what is to stand behind it.

    Args:
        backbone (`PreTrainedModel`): the stock model.
        input_ids (`torch.LongTensor`): `(B, P)`.
        model_kwargs (`dict`): of the prompt, with an empty cache.
        placeholders (`torch.LongTensor`, *optional*): `(B, K)`, tokens that the cache has to give back afterwards.

    Returns:
        `tuple`: the outputs, with the logits `(B, 1, V)` of the prompt's last token, and the hidden states `(B, K, D)` of
        the placeholders or `None`.
    """
    length = input_ids.shape[1]
    if placeholders is not None:
        # Grown as without a cache: with one, idefics keeps only what its next token needs.
        whole = {**model_kwargs, "use_cache": False}
        model_kwargs = extend_model_kwargs(backbone, whole, no_outputs(), length, placeholders.shape[1])
        input_ids = torch.cat([input_ids, placeholders], dim=1)
    model_kwargs = {**model_kwargs, "use_cache": True}
    model_inputs = backbone.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    complete_inputs(backbone, input_ids, model_kwargs, model_inputs)
    model_inputs.pop("logits_to_keep", None)  # the tap keeps the position itself
    with tapped(backbone, input_ids.shape, slice(length - 1, length)) as tap, _cache_under_checkpointing(backbone):
        outputs = backbone(**model_inputs, return_dict=True)
    return outputs, None if placeholders is None else tap.hidden[:, length:]


class Cuts:
    """
    Where the graph of a step was cut. No list: what casts the tensors of a model's outputs must leave these alone.

    Args:
        stages (`list[list[tuple[torch.Tensor, torch.Tensor]]]`): pairs of a tensor and of the leaf that took its place in what came
            after. The backward passes of the outputs stop at leaves; once they have run, those of a stage go on from its tensors
            with the gradients of its leaves, stage after stage.
    """

    def __init__(self, stages):
        self.stages = stages


def as_leaf(tensor, pairs):
    """A leaf in place of a tensor with a graph, both added to `pairs`; anything else as it is."""
    if not (torch.is_tensor(tensor) and tensor.requires_grad):
        return tensor
    leaf = tensor.detach().requires_grad_()
    pairs.append((tensor, leaf))
    return leaf


class _Prompt:
    """
    A prompt that can be continued; the two subclasses differ in what they run again.

    Args:
        backbone (`PreTrainedModel`): the stock model.
        input_ids (`torch.LongTensor`): `(B, P)`, left-padded.
        inputs (`dict`): the backbone's other inputs.
        placeholders (`torch.LongTensor`, *optional*): `(B, K)` that a branch will ask for; where they can run with the
            prompt, `hidden` has their hidden states `(B, K, D)`, else `None`.
    """

    hidden = None

    def cut(self):
        """Nothing: whole forwards share no graph that could be left for later."""
        return None

    def __init__(self, backbone, input_ids, inputs):
        self.backbone = backbone
        self.input_ids = input_ids
        self.length = input_ids.shape[1]
        self.model_kwargs = prepare_prompt(backbone, input_ids, inputs)

    def branch(self, ids, mask, latents=None, num_predicted=0):
        """
        Continues every row of the prompt.

        Args:
            ids (`torch.LongTensor`): `(B, N)` token ids of the continuation, right-padded.
            mask (`torch.LongTensor`): `(B, N)`, 0 where `ids` is padding.
            latents (`torch.Tensor`, *optional*): `(B, K, D)`, replaces the embeddings of the first K tokens.
            num_predicted (`int`, defaults to 0): how many of the last tokens get logits.

        Returns:
            `tuple`: final hidden states `(B, N, D)`, and the logits `(B, num_predicted, V)` that predict the last
            `num_predicted` tokens from what precedes each, or `None`.
        """
        raise NotImplementedError

    def _extended(self, outputs, ids, mask):
        extended = extend_model_kwargs(self.backbone, self.model_kwargs, outputs, self.length, ids.shape[1])
        attention_mask = self.model_kwargs["attention_mask"]
        extended["attention_mask"] = torch.cat([attention_mask, mask.to(attention_mask.dtype)], dim=1)
        return torch.cat([self.input_ids, ids], dim=1), extended


class SharedPrompt(_Prompt):
    """The prompt runs once into a differentiable cache; each branch is a short forward that reads it."""

    def __init__(self, backbone, input_ids, inputs, placeholders=None):
        super().__init__(backbone, input_ids, inputs)
        cache = DynamicCache(config=backbone.config.get_text_config(decoder=True))
        if not takes_back(backbone, cache):
            placeholders = None
        cache = freeze_cache(cache)
        model_kwargs = {**self.model_kwargs, CACHE_ARGUMENT: differentiable_cache(backbone, cache)}
        self.outputs, self.hidden = run_prompt(backbone, input_ids, model_kwargs, placeholders)
        self.model_kwargs["use_cache"] = True
        keep_encoded_images(backbone, self.model_kwargs, self.outputs)
        self.cache = thaw_cache(cache)
        if placeholders is not None:
            self.cache.crop(-placeholders.shape[1])
        self.last_logits = self.outputs.logits  # (B, 1, V)

    @classmethod
    def resume(cls, backbone, input_ids, model_kwargs, outputs, cache):
        """A prompt that has already run into `cache`, with the keyword arguments of its `generate`."""
        prompt = cls.__new__(cls)
        prompt.backbone, prompt.input_ids, prompt.length = backbone, input_ids, input_ids.shape[1]
        prompt.model_kwargs = {key: value for key, value in model_kwargs.items() if key != "logits_to_keep"}
        if prompt.model_kwargs.get("attention_mask") is None:
            prompt.model_kwargs["attention_mask"] = torch.ones_like(input_ids)
        prompt.outputs, prompt.cache = outputs, cache
        prompt.last_logits = outputs.logits[:, -1:]
        return prompt

    def cut(self):
        """
        Takes the graph of what has run away from the branches to come, for a backward pass that comes to it later.

        Returns:
            `list[tuple[torch.Tensor, torch.Tensor]]`: each tensor that had a graph, and the leaf that branches read instead; or
            `None`, and nothing is done, where branches also read what is not in the cache.
        """
        if any(tensor.requires_grad for tensor in tree_leaves(self.model_kwargs) if torch.is_tensor(tensor)):
            return None
        pairs = []
        for layer in self.cache.layers:
            state = vars(layer)
            for name, value in state.items():
                if isinstance(value, dict):  # conv and recurrent states
                    state[name] = {key: as_leaf(item, pairs) for key, item in value.items()}
                else:
                    state[name] = as_leaf(value, pairs)
        self.last_logits = as_leaf(self.last_logits, pairs)
        return pairs

    def branch(self, ids, mask, latents=None, num_predicted=0):
        length = ids.shape[1]
        if length == 1:  # one token takes the decoding path, on which two hybrid families write their states in place
            ids, mask = torch.nn.functional.pad(ids, (0, 1)), torch.nn.functional.pad(mask, (0, 1))
        full_ids, model_kwargs = self._extended(self.outputs, ids, mask)
        cache = freeze_cache(self.cache)
        model_kwargs[CACHE_ARGUMENT] = differentiable_cache(self.backbone, cache)
        model_inputs = self.backbone.prepare_inputs_for_generation(
            full_ids, next_sequence_length=ids.shape[1], is_first_iteration=False, **model_kwargs
        )
        complete_inputs(self.backbone, full_ids, model_kwargs, model_inputs)
        start = max(length - num_predicted - 1, 0)
        head_slice = slice(start, max(length - 1, 1)) if num_predicted else slice(0, 1)
        with tapped(self.backbone, ids.shape, head_slice, latents) as tap, _cache_under_checkpointing(self.backbone):
            outputs = self.backbone(**model_inputs, return_dict=True)
        for layer in cache.layers:
            layer.rewind()
        hidden = tap.hidden[:, :length]
        if num_predicted == 0:
            return hidden, None
        if num_predicted < length:
            return hidden, outputs.logits
        logits = self.last_logits if length == 1 else torch.cat([self.last_logits, outputs.logits], dim=1)
        return hidden, logits


class RepeatedPrompt(_Prompt):
    """The reference: every continuation is one whole forward, with the images encoded once."""

    def __init__(self, backbone, input_ids, inputs, placeholders=None):
        super().__init__(backbone, input_ids, inputs)
        self.model_kwargs["use_cache"] = False
        if backbone._supports_mm_encoder_outputs() and "mm_encoder_outputs" not in self.model_kwargs:
            self.model_kwargs = backbone._prepare_multimodal_encoder_kwargs_for_generation(self.model_kwargs)
        self.outputs = no_outputs()

    def branch(self, ids, mask, latents=None, num_predicted=0):
        full_ids, model_kwargs = self._extended(self.outputs, ids, mask)
        model_inputs = self.backbone.prepare_inputs_for_generation(full_ids, is_first_iteration=True, **model_kwargs)
        complete_inputs(self.backbone, full_ids, model_kwargs, model_inputs)
        stop = full_ids.shape[1]
        head_slice = slice(stop - num_predicted - 1, stop - 1) if num_predicted else slice(0, 1)
        with tapped(self.backbone, full_ids.shape, head_slice, latents, self.length) as tap:
            outputs = self.backbone(**model_inputs, return_dict=True)
        return tap.hidden[:, self.length :], outputs.logits if num_predicted else None


PLANS = {"shared": SharedPrompt, "full": RepeatedPrompt}
