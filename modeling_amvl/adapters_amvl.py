"""A PEFT adapter of an AMVL model: what it was trained around, and loading it together with its base.

peft is imported where an adapter is loaded, and only there.
"""

import importlib
import json
import re
import warnings
from pathlib import Path

from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import find_adapter_config_file, is_peft_available, resolve_revision

from .configuration_amvl import AMVLConfig


# Stands as a comment before an adapter's `target_modules`, a regular expression: PEFT keeps no field that it does not know, and
# prints `target_modules` where they match nothing, as in a stock model, whose modules are not inside a `backbone`.
NOTE = "(?#An AMVL adapter around {}; a stock model has no latents to put it on, load it as its README.md says)"
NOTED = re.compile(r"\(\?#An AMVL adapter around (?P<facts>[^;]*);")


def adapter_note(config, carries_row):
    """
    The [`NOTE`] of an adapter.

    Args:
        config ([`AMVLConfig`]): of the model that it adapts.
        carries_row (`bool`): it brings the placeholder's row; otherwise the base has to start it as the model did.

    Returns:
        `str`.
    """
    facts = _facts(config)
    if carries_row:
        del facts["initial_token_id"]
    return NOTE.format(", ".join(f"{key}={value}" for key, value in facts.items()))


def refuse_other_latents(config, adapters):
    """Refuses adapters, by name, that were trained around another model, as far as their notes say."""
    here = _facts(config)
    for name, adapter in adapters.items():
        noted = NOTED.match(str(getattr(adapter, "target_modules", None)))  # prompt tuning has none
        there = dict(re.findall(r"(\w+)=([^,]+)", noted["facts"])) if noted else {}
        other = [
            f"`{key}` is {value} there and {here[key]} here" for key, value in there.items() if value != here[key]
        ]
        if other:
            raise ValueError(
                f"The adapter `{name}` was trained around another model: {', '.join(other)}. Put it on the base that it was "
                "trained on, as its README.md says."
            )


def _facts(config):
    text = config.get_text_config(decoder=True)
    facts = {
        "backbone": config.backbone_config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_latents": config.num_latents,
        "latent_size": config.latent_size,
        "latent_token_id": config.latent_token_id,
        "initial_token_id": config.initial_token_id,
    }
    return {key: str(value) for key, value in facts.items()}


def commit_of(name, revision=None, **hub):
    """The commit that a revision of a Hub id stands for; `None` of a folder, or where the Hub does not say."""
    resolved = resolve_revision(name, revision, **hub)
    return getattr(resolved, "resolved", None)  # a plain string where it could not be resolved


def save_beside_adapter(model, folder):
    """What an adapter's folder needs for [`load_with_adapter`]: configuration, generation settings and this code."""
    folder = Path(folder)
    model.config.dtype = str(model.backbone.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def adapter_config_of(name, kwargs):
    """The adapter_config.json of a folder or a Hub id, a `dict`; `None` if there is none. `kwargs` are of `from_pretrained`."""
    if name is None:
        return None
    hub = {key: kwargs[key] for key in ("revision", *HUB, "subfolder") if kwargs.get(key) is not None}
    file = find_adapter_config_file(str(name), **hub)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def load_with_adapter(cls, name, adapter_config, **kwargs):
    """
    The base that an adapter was trained on, with the adapter on it.

    Args:
        cls (`type`): [`AMVLForConditionalGeneration`].
        name (`str`): a Hub id or a folder with adapter, config.json and code.
        adapter_config (`dict`): see [`adapter_config_of`].
        **kwargs: of `from_pretrained`. `revision` and `subfolder` are the adapter's; the base's is in the adapter's configuration.

    Returns:
        [`AMVLForConditionalGeneration`]: in evaluation mode, the adapter frozen.

    Raises:
        ImportError: peft is not installed.
        ValueError: the adapter does not say what its base is, or lacks weights.
    """
    if not is_peft_available():
        raise ImportError(f"`{name}` is an adapter: `pip install peft` loads it on its base.")
    base = adapter_config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"`{name}` is an adapter that does not name its base, which was not loaded by a name: build that with "
            "`from_backbone` and call `PeftModel.from_pretrained(base, adapter)`."
        )
    own = {key: kwargs.pop(key) for key in ("revision", "subfolder") if key in kwargs}
    for key in ("config", "adapter_kwargs", "state_dict"):
        kwargs.pop(key, None)
    hub = {key: kwargs[key] for key in HUB if kwargs.get(key) is not None}
    if cls.config_class.get_config_dict(name, **own, **hub)[0].get("model_type") != AMVLConfig.model_type:
        raise ValueError(
            f"`{name}` is an adapter without the config.json of an AMVL model. If it is one, build its base with `from_backbone` and "
            "call `PeftModel.from_pretrained(base, adapter)`."
        )
    config = cls.config_class.from_pretrained(name, **own, **hub)
    kwargs.setdefault("dtype", config.dtype or "auto")
    if adapter_config.get("revision") is not None:
        kwargs["revision"] = adapter_config["revision"]
    base_hub = hub | {key: kwargs[key] for key in ("revision",) if key in kwargs}
    if cls.config_class.get_config_dict(base, **base_hub)[0].get("model_type") == AMVLConfig.model_type:
        model = cls.from_pretrained(base, **kwargs)
    else:
        model = cls.from_backbone(base, **{key: getattr(config, key) for key in (*BUILT_WITH, *FREE)}, **kwargs)
    for key in FREE:
        setattr(model.config, key, getattr(config, key))
    model.generation_config = model.backbone.generation_config = GenerationConfig.from_pretrained(name, **own, **hub)
    # By name: an import would make peft a requirement of every checkpoint that carries this code. Not by `load_adapter` of
    # transformers, which does not find the weights of DoRA and of a tied head.
    peft = importlib.import_module("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            model = peft.PeftModel.from_pretrained(model, str(name), **own, **hub).get_base_model()
        except UserWarning as error:
            raise ValueError(f"The adapter `{name}` is not whole: {str(error)[:300]}") from error
    model._hf_peft_config_loaded = True  # for the methods that transformers has for adapters
    return model.eval()


HUB = ("token", "cache_dir", "local_files_only", "force_download")
BUILT_WITH = (
    "num_latents",
    "latent_size",
    "latent_token_id",
    "initial_token_id",
    "initial_log_variance",
    "min_log_variance",
    "max_log_variance",
)
FREE = ("latent_temperature", "multipass")  # may be another than the base's
