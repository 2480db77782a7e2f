"""A PEFT adapter of an AMVL model: what it was trained around, and loading it together with its base.

peft is imported where an adapter is loaded, and only there.
"""

import copy
import importlib
import json
import re
import warnings

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
        "min_log_variance": float(config.min_log_variance),
        "max_log_variance": float(config.max_log_variance),
    }
    return {key: str(value) for key, value in facts.items()}


def commit_of(name, revision=None, **hub):
    """The commit that a revision of a Hub id stands for; `None` of a folder, or where the Hub does not say."""
    resolved = resolve_revision(name, revision, **hub)
    return getattr(resolved, "resolved", None)  # a plain string where it could not be resolved


def save_beside_adapter(model, folder):
    """What an adapter's folder needs for [`load_with_adapter`]: configuration, generation settings and this code."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.backbone.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    for part in (config, config.backbone_config):  # whether the base is quantised is for whoever loads it to say
        vars(part).pop("quantization_config", None)
    custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def find_adapter(name, kwargs):
    """
    Whether a folder or a Hub id holds an adapter, or an auto class was called with one.

    Args:
        name (`str` or `Path`): what `from_pretrained` was called with.
        kwargs (`dict`): its other arguments. An auto class puts its own name there where it has gone on to the base.

    Returns:
        `tuple[str, dict] | None`: the adapter's name, and the arguments with which its files are found.
    """
    given = kwargs.get("adapter_kwargs") or {}
    name = given.get("_adapter_model_path", name)
    where = {key: kwargs[key] for key in (*HUB, "revision", "subfolder") if kwargs.get(key)}
    where |= {key: given[key] for key in where.keys() & given.keys()}
    return None if name is None or find_adapter_config_file(str(name), **where) is None else (str(name), where)


def load_base(cls, name, where, **kwargs):
    """
    The base that an adapter was trained on.

    Args:
        cls (`type`): [`AMVLForConditionalGeneration`].
        name (`str`): a Hub id or a folder with adapter, config.json and code.
        where (`dict`): see [`find_adapter`].
        **kwargs: of `from_pretrained`, for the base; its revision is in the adapter's configuration.

    Returns:
        [`AMVLForConditionalGeneration`]: ready for [`put_adapter`].

    Raises:
        ImportError: peft is not installed.
        OSError: the base is not where the adapter says, or not whole.
        ValueError: the adapter is not one of an AMVL model, or does not say what its base is.
    """
    if not is_peft_available():
        raise ImportError(f"`{name}` is an adapter: `pip install peft` loads it on its base.")
    if cls.config_class.get_config_dict(name, **where)[0].get("model_type") != AMVLConfig.model_type:
        raise ValueError(
            f"`{name}` is an adapter without the config.json of an AMVL model. If it is one, build its base with `from_backbone` and "
            "call `PeftModel.from_pretrained(base, adapter)`."
        )
    config = cls.config_class.from_pretrained(name, **where)
    with open(find_adapter_config_file(name, **where), encoding="utf-8") as file:
        adapter_config = json.load(file)
    base = adapter_config["base_model_name_or_path"]
    if not base:
        raise ValueError(
            f"`{name}` is an adapter that does not name its base, which was not loaded by a name: build that with `from_backbone` "
            "and call `PeftModel.from_pretrained(base, adapter)`."
        )
    kwargs = {key: value for key, value in kwargs.items() if key not in NOT_FOR_THE_BASE}
    kwargs |= {"revision": adapter_config["revision"]} if adapter_config["revision"] else {}
    kwargs.setdefault("dtype", config.dtype or "auto")
    base_where = {key: kwargs[key] for key in (*HUB, "revision") if key in kwargs}
    try:
        if cls.config_class.get_config_dict(base, **base_where)[0].get("model_type") == AMVLConfig.model_type:
            model = cls.from_pretrained(base, **kwargs)
        else:
            model = cls.from_backbone(base, **{key: getattr(config, key) for key in BUILT_WITH}, **kwargs)
    except OSError as error:
        raise OSError(
            f"The base of the adapter `{name}` cannot be loaded from `{base}`: {error} Put it there, or write where it is as "
            "`base_model_name_or_path` into adapter_config.json."
        ) from error
    for key in ("latent_temperature", "multipass"):  # may have been another than the base's
        setattr(model.config, key, getattr(config, key))
    model.generation_config = model.backbone.generation_config = GenerationConfig.from_pretrained(name, **where)
    return model


def put_adapter(model, name, where):
    """
    Puts an adapter on its base.

    Args:
        model ([`AMVLForConditionalGeneration`]): what [`load_base`] gave; changed in place.
        name (`str`), where (`dict`): see [`find_adapter`].

    Returns:
        `PeftModel`: in evaluation mode, the adapter frozen.

    Raises:
        ValueError: it lacks weights, or was trained around another model.
    """
    # By name: an import would make peft a requirement of every checkpoint that carries this code. Not by `load_adapter` of
    # transformers, which does not find the weights of DoRA and of a tied head.
    peft, safetensors = importlib.import_module("peft"), importlib.import_module("safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            return peft.PeftModel.from_pretrained(model, name, **where).eval()
        except (KeyError, UserWarning, safetensors.SafetensorError) as error:
            raise ValueError(f"The adapter `{name}` is not whole: {str(error)[:300]}") from error


HUB = ("token", "cache_dir", "local_files_only", "force_download")
NOT_FOR_THE_BASE = ("config", "adapter_kwargs", "state_dict", "revision", "subfolder")
BUILT_WITH = (
    "num_latents",
    "latent_size",
    "latent_token_id",
    "initial_token_id",
    "initial_log_variance",
    "min_log_variance",
    "max_log_variance",
)
