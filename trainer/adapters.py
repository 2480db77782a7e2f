"""What PEFT is told so that the latents are trained and saved whole with an adapter, and the settings that would leave them out."""

import copy
import logging
import os
import re
from pathlib import Path

from peft import PeftType, PromptLearningConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from modeling_amvl.adapters_amvl import NOTED, adapter_note, find_adapter, load_base, put_adapter
from modeling_amvl.branching_amvl import output_embeddings


logger = logging.getLogger(__name__)

# The parts that an adapter would freeze, which is to say switch off.
LATENT_MODULES = ("prior_head", "posterior_head", "latent_projection")

# Other ones change the base's weights in a way that loading the adapter does not repeat, or want to be called by hand.
INITIALISATIONS = (True, False, "gaussian", "orthogonal", "pissa", "olora")
TASK_TYPES = (None, "CAUSAL_LM")


def prepare_peft_config(peft_config, model):
    """
    A copy of a PEFT configuration, with heads, projection and the placeholder's row to be trained and saved.

    Args:
        peft_config (`PeftConfig`): the user's.
        model ([`AMVLForConditionalGeneration`]): what it will adapt.

    Returns:
        `PeftConfig`: for `get_peft_model`.

    Raises:
        ValueError: a setting under which the latents would not be trained or the adapter could not be loaded.
    """
    peft_config = copy.deepcopy(peft_config)
    kind = type(peft_config).__name__
    if isinstance(peft_config, PromptLearningConfig):
        raise ValueError(f"`peft_config` is a `{kind}`, whose virtual tokens do not reach the latents: use LoRA.")
    _refuse_settings(peft_config, "peft_config")
    if peft_config.inference_mode:
        raise ValueError("`inference_mode=True` in `peft_config` would freeze adapter and latents: leave it out.")
    for name in peft_config.modules_to_save or ():
        inside = [f"{part}.{key}" for part in LATENT_MODULES for key, _ in getattr(model, part).named_modules() if key]
        if hit := next((key for key in inside if key.endswith(name)), None):
            raise ValueError(
                f"`modules_to_save` has {name!r}, which fits `{hit}`, too: write more of the name. {list(LATENT_MODULES)} are "
                "trained and saved whole in any case."
            )
    peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), *LATENT_MODULES})
    _add_placeholder_row(peft_config, model)
    return peft_config


def check_adapter(model):
    """
    Refuses an adapter that does not train and save the latents whole, or leaves the language model as it is.

    Args:
        model (`PeftModel`): over an [`AMVLForConditionalGeneration`].

    Raises:
        ValueError: it says what to change.
    """
    inner = model.get_base_model()
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"`model` has the active adapters {model.active_adapters}: set one, `model.set_adapter(name)`."
        )
    adapter = model.active_adapters[0]
    _refuse_settings(model.peft_config[adapter], f"peft_config[{adapter!r}]")
    for name in LATENT_MODULES:
        _refuse_half_trained(name, getattr(inner, name), adapter)
    _refuse_idle_layers(inner, adapter)
    _refuse_unmergeable(inner, adapter)


def settle_adapter(model, upcast=True):
    """
    Checks the active adapter, see [`check_adapter`], and writes into it which base it belongs to.

    Args:
        model (`PeftModel`): over an [`AMVLForConditionalGeneration`], changed in place.
        upcast (`bool`, defaults to `True`): train heads, projection and row in fp32, as PEFT does its own matrices: in bf16 a step
            of the usual size may round to nothing.
    """
    check_adapter(model)
    inner, adapter = model.get_base_model(), model.active_adapters[0]
    config = model.peft_config[adapter]
    table = inner.get_input_embeddings()
    row = None
    if isinstance(table, TrainableTokensWrapper):
        if inner.config.latent_token_id in table.token_adapter.token_indices.get(adapter, ()):
            row = table.token_adapter.trainable_tokens_delta[adapter]
    carries_row = row is not None or (isinstance(table, ModulesToSaveWrapper) and adapter in table.modules_to_save)
    if not carries_row:
        logger.warning(
            "The adapter `%s` does not carry the row of `<latent>`, which stays as it is: whoever loads it needs a base built "
            "with `initial_token_id=%s`. A `peft_config` that is passed to the trainer carries it, on most backbones, but not where "
            "ZeRO-3 or FSDP shares the table out.",
            adapter,
            inner.config.initial_token_id,
        )
    if upcast:
        parts = [getattr(inner, name).modules_to_save[adapter] for name in LATENT_MODULES]
        for parameter in (*(p for part in parts for p in part.parameters()), *([] if row is None else [row])):
            parameter.data = parameter.data.float()
    _name_base(config, inner)
    _anchor(config, model, adapter_note(inner.config, carries_row))


def merge_adapter(name, folder, **kwargs):
    """
    Saves an adapter merged with its base, as a model that loads without peft, with processor and code.

    Args:
        name (`str` or `Path`): a Hub id or a folder that [`AMVLSFTTrainer`] saved.
        folder (`str` or `Path`): where to.
        **kwargs: of `from_pretrained`, `revision` of the adapter say. With the `quantization_config` of a QLoRA run it is merged
            into the rounded weights that it was trained on, dequantised; without, into the base as it was, which is another model.
    """
    found = find_adapter(name, kwargs)
    if found is None:
        raise ValueError(f"`name` is {str(name)!r}, which has no adapter_config.json.")
    model = load_base(AMVLForConditionalGeneration, *found, **kwargs)
    if kwargs.get("quantization_config") is not None:
        model.dequantize()
        for part in (model.config, model.config.backbone_config):
            vars(part).pop("quantization_config", None)
    put_adapter(model, *found).merge_and_unload().save_pretrained(folder)
    AMVLProcessor.from_pretrained(found[0], **found[1]).save_pretrained(folder)


def _refuse_settings(config, name):
    kind = type(config).__name__
    if config.peft_type != PeftType.LORA:
        raise ValueError(
            f"`{name}` is a `{kind}`, with which PEFT neither trains the row of `<latent>` nor merges the heads: use a `LoraConfig`, "
            "DoRA and rsLoRA included."
        )
    if config.task_type not in TASK_TYPES:
        raise ValueError(
            f"`task_type` of `{name}` is {str(config.task_type)!r}, for which PEFT changes what the model is called with: leave "
            "it out, or set 'CAUSAL_LM'."
        )
    if config.init_lora_weights not in INITIALISATIONS:
        raise ValueError(
            f"`init_lora_weights` of `{name}` is {config.init_lora_weights!r}, which loading the adapter does not repeat: use one "
            f"of {INITIALISATIONS}."
        )
    if config.alora_invocation_tokens is not None:
        raise ValueError(
            f"`alora_invocation_tokens` of `{name}` is {config.alora_invocation_tokens}: PEFT looks for them in whole "
            "sequences, which prior, posterior and decoder read in parts, so that the adapter would not be trained. Leave it out."
        )
    alphas = {"lora_alpha": config.lora_alpha, **(config.alpha_pattern or {})}
    if 0 in alphas.values():
        raise ValueError(f"`lora_alpha` of `{name}` is 0, {alphas}, which switches the adapter off: set it above 0.")
    if not 0 <= config.lora_dropout < 1:
        raise ValueError(
            f"`lora_dropout` of `{name}` is {config.lora_dropout}, which lets nothing through to the adapter: set it to 0 or more, and "
            "below 1."
        )


def _add_placeholder_row(peft_config, model):
    """PEFT then trains and saves this one row of the table, in the tied head, too; where it can."""
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    head = output_embeddings(model.backbone)
    tied = head.weight is table.weight
    head_name = next(name for name, module in model.named_modules() if module is head)
    if tied and (saved := next((saved for saved in peft_config.modules_to_save if head_name.endswith(saved)), None)):
        raise ValueError(
            f"`modules_to_save` has {saved!r}, the output layer, whose weights are the embedding table's, too, and would not be any "
            "more: leave it out. The row of `<latent>` is trained in any case."
        )
    if saved := next((saved for saved in peft_config.modules_to_save if name.endswith(saved)), None):
        if tied:
            raise ValueError(
                f"`modules_to_save` has {saved!r}, the embedding table, whose weights are the output layer's, too, and would not be "
                "any more: leave it out. The row of `<latent>` is trained in any case."
            )
        return  # all of the table is trained
    targets = peft_config.target_modules
    adapted = (
        re.fullmatch(targets, name) if isinstance(targets, str) else any(name.endswith(f".{t}") for t in targets or ())
    )
    if adapted:
        raise ValueError(
            f"`target_modules` has `{name}`, the embedding table, whose row for `<latent>` is trained by itself: take it out."
        )
    # What PEFT 0.21 does to the table: it looks rows up itself, and multiplies by a tied head's weight itself.
    looks_up = type(table).forward is nn.Embedding.forward or hasattr(table, "embed_scale")
    multiplies = not tied or (type(head) is nn.Linear and head.bias is None)
    # Nor does it bring the table together where an engine has shared it out.
    shared_out = is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if shared_out or not (looks_up and multiplies):
        return  # `settle_adapter` says so
    given = peft_config.trainable_token_indices or {}
    given = {name: given} if isinstance(given, list) else dict(given)
    key = next((key for key in given if name.endswith(key)), name)
    given[key] = sorted({*given.get(key, ()), model.config.latent_token_id})
    peft_config.trainable_token_indices = given


def _refuse_half_trained(name, module, adapter):
    if not isinstance(module, ModulesToSaveWrapper) or adapter not in module.modules_to_save:
        raise ValueError(
            f"`{name}` is frozen or not saved with the adapter `{adapter}`: add {list(LATENT_MODULES)} to `modules_to_save` of its LoRA "
            "config, or pass that as `peft_config`."
        )
    if module.disable_adapters:
        raise ValueError(
            f"The adapter `{adapter}` is disabled, and so is `{name}`: call `model.enable_adapter_layers()`."
        )
    part = module.modules_to_save[adapter]
    if any(isinstance(layer, BaseTunerLayer) for layer in part.modules()):
        raise ValueError(
            f"`target_modules` of the adapter `{adapter}` has layers inside `{name}`, which is trained whole."
        )
    if not all(parameter.requires_grad for parameter in part.parameters()):
        raise ValueError(
            f"`{name}` is frozen, so the latents would not be trained: load the adapter `{adapter}` with `is_trainable=True`, and "
            "set it with `inference_mode=False`."
        )


def _refuse_idle_layers(inner, adapter):
    decoder = inner.backbone.get_decoder()
    language = decoder if decoder is not None else inner.backbone
    layers = [
        layer
        for layer in language.modules()
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer)
    ]
    if any(layer.merged for layer in layers):
        raise ValueError(
            f"The adapter `{adapter}` is merged, so that it would not be trained: call `model.unmerge_adapter()`."
        )
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(f"The adapter `{adapter}` is disabled: call `model.enable_adapter_layers()`.")
    trained = [
        parameter
        for layer in layers
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and f".{adapter}" in f".{name}"
    ]
    if not trained:
        raise ValueError(
            f"`target_modules` of the adapter `{adapter}` adapts nothing in the language model, `{type(language).__name__}`, which "
            "has to learn to use the latents: name its layers, `['q_proj', 'v_proj']` say, or take 'all-linear'."
        )


def _refuse_unmergeable(inner, adapter):
    for name, layer in inner.named_modules():
        if isinstance(layer, LoraLayer) and layer.lora_bias.get(adapter) and layer.get_base_layer().bias is None:
            raise ValueError(
                f"`lora_bias=True` of the adapter `{adapter}`, but `{name}` has no bias to merge it into: set it to `False`, or take "
                "such layers out of `target_modules`."
            )


def _name_base(config, inner):
    """The adapter's own name and commit of the base, where it was loaded by a name."""
    name = inner.config._name_or_path or inner.config.backbone_config._name_or_path
    if name:
        config.base_model_name_or_path = str(Path(name).absolute()) if Path(name).exists() else name
        config.revision = inner.base_commit


def _anchor(config, model, note):
    """Has `target_modules` match in an AMVL model alone: PEFT raises where an adapter matches nothing, and prints the note."""
    if config.target_parameters:
        config.target_parameters = sorted(model.base_model.targeted_parameter_names)
    targets, excluded = config.target_modules, config.exclude_modules
    if not targets or NOTED.match(str(targets)):
        return
    if config.layers_to_transform is not None:
        targets = model.base_model.targeted_module_names
        config.layers_to_transform = config.layers_pattern = None
    without = f"(?!({_as_pattern(excluded)})$)" if excluded else ""
    config.target_modules = re.compile(rf"{note}(?=backbone\.){without}({_as_pattern(targets)})").pattern
    config.exclude_modules = None


def _as_pattern(names):
    """What PEFT matches by a list of names, as the regular expression that it takes instead."""
    return names if isinstance(names, str) else rf"(.*\.)?({'|'.join(map(re.escape, sorted(names)))})"
