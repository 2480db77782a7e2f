"""A cache that a forward reads and never changes, differentiable and fit for gradient checkpointing.

Its layers are transformers' own, frozen: no kind of layer is written again here.
"""

import copy
import functools
import inspect

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation import GenerationMixin

from .families_amvl import CACHES_IMAGES, CROSS_ATTENDING


# How forwards call the cache: `past_key_values` up to transformers 5.23, `cache` since.
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


def _own_state(layer):
    """Gives a cache layer tensors of its own wherever its native updates write in place."""
    state = vars(layer)
    for name, value in state.items():
        if isinstance(value, dict) and name != "_frozen":  # conv and recurrent states
            state[name] = {key: item.clone() if torch.is_tensor(item) else item for key, item in value.items()}
        elif isinstance(layer, StaticLayer) and torch.is_tensor(value):
            state[name] = value.clone()


class _FrozenLayer:
    """
    Mixed in before a native cache layer's class: a layer that starts each pass from the same state.

    A pass is the forward, or the backward that recomputes checkpointed layers. Within one the layer is its native self,
    updates and all; the first access in another finds it as it was frozen.
    """

    # transformers registers layer classes by `_layer_type`; the subclass must not take its parent's place there.
    _layer_type = None

    def __getattribute__(self, name):
        state = object.__getattribute__(self, "__dict__")
        current_pass = torch._C._current_graph_task_id()  # -1 outside of a backward
        if state["_pass"] != current_pass:
            frozen = state["_frozen"]
            state.clear()
            state.update(frozen, _frozen=frozen, _pass=current_pass)
        return object.__getattribute__(self, name)

    def __deepcopy__(self, memo):
        # inkling2_loop copies the empty layers that it runs several times.
        return _freeze(copy.deepcopy(_thaw(self), memo))

    def rewind(self):
        """Forgets what this pass added; checkpointed layers hold on to the cache until they have run again."""
        state = vars(self)
        frozen = state["_frozen"]
        state.clear()
        state.update(_frozen=frozen, _pass=None)


def _functional_update(native_update):
    @functools.wraps(native_update)
    def update(self, *args, **kwargs):
        _own_state(self)
        return native_update(self, *args, **kwargs)

    return update


@functools.cache
def _frozen_class(native_class):
    updates = {
        name: _functional_update(getattr(native_class, name))
        for name in dir(native_class)
        if name.startswith("update") and callable(getattr(native_class, name))
    }
    namespace = {"native_class": native_class, **updates}
    return type(f"Frozen{native_class.__name__}", (_FrozenLayer, native_class), namespace)


def _freeze(layer):
    frozen_class = _frozen_class(type(layer))
    frozen = frozen_class.__new__(frozen_class)
    # No pass has that number: the first access starts one.
    object.__setattr__(frozen, "__dict__", {"_frozen": dict(vars(layer)), "_pass": None})
    return frozen


def _thaw(frozen):
    native_class = frozen.native_class
    state = dict(vars(frozen))
    del state["_frozen"], state["_pass"]
    layer = native_class.__new__(native_class)
    vars(layer).update(state)
    return layer


def freeze_cache(cache):
    """
    A cache in the state of `cache` that a forward and its recomputation under gradient checkpointing never change.

    Args:
        cache (`Cache`): stays as it is, whatever is done with the result. Tensors are shared, gradients flow.

    Returns:
        `Cache`: of the same class, made of the same layer classes' own `update` methods.
    """
    frozen = copy.copy(cache)
    frozen.layers = [_freeze(layer) for layer in cache.layers]
    if cache.layer_class_to_replicate is not None:
        native_class = cache.layer_class_to_replicate
        frozen.layer_class_to_replicate = lambda: _freeze(native_class())
    return frozen


def thaw_cache(frozen):
    """The native cache as a forward through `frozen` would have left it."""
    cache = copy.copy(frozen)
    cache.layers = [_thaw(layer) for layer in frozen.layers]
    return cache


def takes_back(backbone, cache):
    """Whether an empty cache can give back its last tokens: it keeps all of them, and nothing but them."""
    layer_classes = {cache.layer_class_to_replicate or DynamicLayer, *map(type, cache.layers)}
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and layer_classes == {DynamicLayer}
        and cache.get_seq_length() == 0
        and backbone.config.model_type not in CACHES_IMAGES
    )


class _NeverUpdated(dict):
    """What an `EncoderDecoderCache` knows of its layers: none holds its keys of the encoder yet, in any pass."""

    def __setitem__(self, layer, is_updated):
        pass


def differentiable_cache(backbone, self_attention_cache):
    """The cache as the forward takes it, so that gradient checkpointing can run its layers again."""
    if backbone.config.model_type not in CROSS_ATTENDING:
        return self_attention_cache
    cache = EncoderDecoderCache(self_attention_cache, freeze_cache(DynamicCache()))
    cache.is_updated = _NeverUpdated()
    return cache
