"""A model card's metadata: what the Hub takes, and nothing that is not known."""

import logging
import re
from pathlib import Path

from huggingface_hub import ModelCardData

from .markdown import one_line


logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"(?!.*(?:--|\.\.))(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}(?<!\.git)", re.ASCII)
# What the Hub takes as `license`, from the page Licenses of its documentation; huggingface_hub 2.4 has no list of them.
LICENSES = frozenset(
    [
        "apache-2.0",
        "mit",
        "openrail",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "afl-3.0",
        "artistic-2.0",
        "bsl-1.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "c-uda",
        "cc",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "wtfpl",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "agpl-3.0",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "isc",
        "h-research",
        "intel-research",
        "lppl-1.3c",
        "ms-pl",
        "apple-ascl",
        "apple-amlr",
        "mpl-2.0",
        "odc-by",
        "odbl",
        "openmdw-1.0",
        "openrail++",
        "osl-3.0",
        "postgresql",
        "ofl-1.1",
        "ncsa",
        "unlicense",
        "zlib",
        "pddl",
        "lgpl-lr",
        "deepfloyd-if-license",
        "fair-noncommercial-research-license",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "grok2-community",
        "gemma",
        "unknown",
        "other",
    ]
)


def is_hub_id(name):
    """Whether a text is the id of a repository, `user/name` or a bare `name`, and no path that is here."""
    return isinstance(name, str) and HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def check_license(license):
    """
    Refuses what the Hub would refuse as the licence of a model.

    Args:
        license (`str` or `None`): `None` claims none.

    Raises:
        ValueError: it is not one of [`LICENSES`].
    """
    if license is not None and license not in LICENSES:
        close = [
            name for name in sorted(LICENSES) if re.sub(r"\W", "", str(license).lower()) == re.sub(r"\W", "", name)
        ]
        hint = f"write {close[0]!r}" if close else "one of " + ", ".join(sorted(LICENSES))
        raise ValueError(f"`license` is {license!r}, which the Hub does not know: {hint}, or leave it out.")


def model_card_data(facts, license=None, eval_results=()):
    """
    The metadata of a model card.

    Args:
        facts (`dict`): see [`~model_cards.facts.TrainingFacts`].
        license (`str`, *optional*): of the weights; of [`LICENSES`].
        eval_results (`list[EvalResult]`, *optional*): for the `model-index`.

    Returns:
        `huggingface_hub.ModelCardData`: what is no id is left out with a warning, since the Hub would refuse the card and with it
        the push.
    """
    base = _ids([facts.base] if facts.base else [], "base_model")
    return ModelCardData(
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        license=license,
        base_model=base[0] if base else None,
        base_model_relation=("adapter" if facts.is_adapter else "finetune") if base else None,
        datasets=_ids(facts.datasets, "datasets") or None,
        tags=["amvl", "latent-reasoning", "trl", "sft", *(["lora", "transformers"] if facts.is_adapter else [])],
        model_name=(one_line(facts.title) or "amvl") if eval_results else None,
        eval_results=list(eval_results) or None,
    )


def _ids(names, key):
    ids = [name for name in names if is_hub_id(name)]
    if left_out := [name for name in names if name not in ids]:
        logger.warning("The card's `%s` leaves out %s: no id on the Hub.", key, left_out)
    return ids
