"""What is known of a run, for the card of what it saves: settings, data, evaluation, code; nothing of this machine."""

import re
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path

import torch
from datasets.naming import camelcase_to_snakecase
from peft import PeftModel

from model_cards import TrainingFacts
from model_cards.facts import LATENTS, SOURCES, public
from model_cards.metadata import is_hub_id
from model_cards.provenance import code_version

from .sft_config import OBJECTIVE


VERSIONED_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
SHOWN = (*OBJECTIVE, "freeze_vision", "learning_rate", "seed")
# Where things go, how the run is shown and what this machine is: no part of what was trained.
NOT_OF_THE_TRAINING = re.compile(
    r"output_dir|run_name|project|hub_.*|push_to_hub.*|report_to|logging_.*|log_.*|disable_tqdm|resume_from_checkpoint|trackio_.*|"
    r"accelerator_config|license|use_cpu|dataloader_.*|save_.*|do_(train|eval|predict)|dataset_kwargs|activation_checkpointing.*|eval_on_start|ddp_.*|local_rank"
)
ON_THE_HUB = re.compile(r"hf://datasets/(?P<id>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/\s]+))?(?=[/\s]|$)")
# .../someone___photos/default/0.0.0/<commit>/photos-train.arrow
CACHED = re.compile(r"/(?P<owner>[\w.-]+?)___(?P<name>[\w.-]+)/[^/]+/[^/]+/(?P<revision>[0-9a-f]{40})/[^/]+$")
COMMIT = re.compile(r"[0-9a-f]{40}")


def training_facts(trainer, model, title, last_evaluation, num_steps, dataset_names=(), is_merged=False):
    """
    The facts of what a trainer saves.

    Args:
        trainer ([`AMVLSFTTrainer`]): after any number of steps.
        model ([`AMVLForConditionalGeneration`]): its model, without PEFT's wrapper.
        title (`str`): the model's name.
        last_evaluation (`dict`): `step`, and what was logged.
        num_steps (`int`): optimiser steps behind the weights.
        dataset_names (`list[str]`, *optional*): Hub ids beside those that the dataset itself tells.
        is_merged (`bool`, defaults to `False`): an adapter's model, merged with its base.

    Returns:
        [`~model_cards.facts.TrainingFacts`].
    """
    args, info = trainer.args, getattr(trainer.train_dataset, "info", None)
    config = model.config
    loaded, backbone = config._name_or_path, config.backbone_config._name_or_path
    is_adapter = isinstance(trainer.model, PeftModel) and not is_merged
    # An adapter goes on what was loaded and on nothing below it.
    base = next(
        (name for name in ((loaded or backbone,) if is_adapter else (loaded, backbone)) if is_hub_id(name)), None
    )
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return TrainingFacts(
        title=title,
        latents={name: getattr(config, name) for name in LATENTS},
        hub_model_id=trainer.hub_model_id,
        base=base,
        base_revision=model.base_commit if base == (loaded or backbone) else None,
        base_is_amvl=bool(loaded) and base in (loaded, None),
        is_adapter=is_adapter,
        is_trained=True,
        num_steps=num_steps,
        settings={name: getattr(args, name) for name in SHOWN}
        | {"optimiser steps": num_steps}
        | trainer.skipped()
        | {"rows per step": rows},
        arguments=settings_beside_defaults(args),
        evaluation=evaluation_of(last_evaluation),
        datasets=datasets_of(trainer.train_dataset, dataset_names),
        licences=licences_of(info),
        license=args.license,
        device=device_of(args),
        code=code_version(),
        versions={name: version(name) for name in VERSIONED_PACKAGES},
    )


def settings_beside_defaults(args):
    """The fields of a configuration that differ from their defaults, as anybody may read them."""
    values = args.to_dict()
    changed = {}
    for setting in fields(args):
        if values.get(setting.name) == f"<{setting.name.upper()}>":  # transformers hides what ends in `_token`
            continue
        default = setting.default_factory() if setting.default_factory is not MISSING else setting.default
        value = values.get(setting.name, getattr(args, setting.name))
        is_empty = value in (None, [], {}, "") and not default
        if not NOT_OF_THE_TRAINING.fullmatch(setting.name) and not is_empty and public(value) != public(default):
            changed[setting.name] = value
    return public(changed)


def evaluation_of(logged):
    """What a card shows of an evaluation; `None` if none was made."""
    if "eval_nll_prior" not in logged:
        return None
    return {"step": logged["step"]} | {
        source: {"nll": logged[f"eval_nll_{source}"], "accuracy": logged[f"eval_accuracy_{source}"]}
        for source in SOURCES
    }


def datasets_of(dataset, names=()):
    """
    What a dataset was read from on the Hub, as our readers note it.

    Args:
        dataset (`Dataset` or `IterableDataset`): with or without such a note.
        names (`list[str]`, *optional*): further ids.

    Returns:
        `dict[str, str | None]`: commit by id, of a reader or as `datasets` calls the files of its cache.
    """
    info, files = getattr(dataset, "info", None), getattr(dataset, "cache_files", [])
    noted = "\n".join([(info and info.homepage) or "", *((info and info.download_checksums) or {})])
    found = dict.fromkeys(filter(None, names))
    for match in ON_THE_HUB.finditer(noted):
        revision = match["revision"] if COMMIT.fullmatch(match["revision"] or "") else None
        found[match["id"]] = revision or found.get(match["id"])
    cached = filter(None, (CACHED.search(Path(file["filename"]).as_posix()) for file in files))
    # An id cannot be read off such a path, which has no capitals.
    commits = {(match["owner"], match["name"]): match["revision"] for match in cached}
    for name, revision in found.items():
        owner, _, last = name.partition("/")
        found[name] = revision or commits.get((owner, camelcase_to_snakecase(last)))
    return found


def licences_of(info):
    """Licence by source, from the lines of `DatasetInfo.license`; a line without a source is the whole's."""
    lines = [line for line in ((info and info.license) or "").splitlines() if line.strip()]
    found = {}
    for line in lines:
        source, colon, licence = line.partition(": ")
        found[source if colon else "the data"] = licence if colon else line
    return found


def device_of(args):
    """What the run ran on, in words."""
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type
    number = f"{args.world_size} processes, {name} each" if args.world_size > 1 else name
    return "a CPU" if number == "cpu" else number
