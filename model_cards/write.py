"""Writes the card of a checkpoint's folder anew, from the facts that lie in it and from what was measured on its weights."""

import json
import logging
import os
from pathlib import Path

from huggingface_hub import ModelCard

from .diagnosis import check_diagnosis
from .facts import public, read_facts, read_json
from .generate import render_card
from .metadata import check_license, is_hub_id
from .own_words import own_words
from .provenance import refuse_other_weights, weights_fingerprint
from .results import arms_of, check_results, refuse_results_of_others


logger = logging.getLogger(__name__)

RESULTS = "evaluation"  # where a checkpoint's folder keeps the results that its card shows
DIAGNOSIS = "diagnosis/diagnosis.json"


def write_card(folder, results=(), diagnosis=None, license=None, hub_model_id=None):
    """
    Writes `README.md` of a checkpoint, and the results and the diagnosis that it shows beside it.

    What lies in the folder from before is shown again if it was measured on these weights, and left out with a warning otherwise. What
    a person wrote between the marked lines, and the licence that the card states, are kept.

    Args:
        folder (`str` or `Path`): of the checkpoint.
        results (`list[str]`, *optional*): each a `results.json` of recipes/evaluate_amvl.py in which one model is this checkpoint.
        diagnosis (`str`, *optional*): a `diagnosis.json` of recipes/diagnose_amvl.py; that of the folder by default.
        license (`str`, *optional*): of the weights, an id of the Hub, `apache-2.0` say; by default none is claimed.
        hub_model_id (`str`, *optional*): `"user/name"`, where it will be found; what the facts say by default.

    Returns:
        `Path`: the card.

    Raises:
        ValueError: no checkpoint, results or a diagnosis of other weights, files that are not what they should be, an unknown
            licence; nothing is written then.
    """
    folder = Path(folder)
    facts, card = read_facts(folder), folder / "README.md"
    check_license(license)
    if hub_model_id is not None:
        if not is_hub_id(hub_model_id):
            raise ValueError(f"`hub_model_id` must be the id of a repository, `user/name`, got {hub_model_id!r}.")
        facts.hub_model_id = hub_model_id
    fingerprint = weights_fingerprint(folder)
    if fingerprint is None:
        raise ValueError(f"`{folder}` has no weights: name the folder of a saved model.")
    shown = _given_results(folder, results, fingerprint)
    kept, outdated = _kept_results(folder, shown, fingerprint)
    shown = dict(sorted((kept | shown).items()))
    found = _diagnosis(folder, diagnosis)
    words = own_words(card)
    rendered = render_card(facts, license or _stated_license(card), shown, found, fingerprint, words)

    for name, values in shown.items():
        _write(folder / name, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    for path in outdated:
        path.unlink()
    if diagnosis is not None:
        _write(folder / DIAGNOSIS, json.dumps(found, indent=1) + "\n")
    _write(card, str(rendered))
    return card


def _given_results(folder, paths, fingerprint):
    shown, counts = {}, {}
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(
                f"`results` has `{path}`, which is no file: name a `results.json` of recipes/evaluate_amvl.py."
            )
        values = public(read_json(path, "results of recipes/evaluate_amvl.py"))
        check_results(values, path)
        refuse_results_of_others(values, path, folder, fingerprint)
        benchmark = "".join(c if c.isalnum() or c in "-_" else "_" for c in values["benchmark"])
        counts[benchmark] = counts.get(benchmark, 0) + 1
        number = f"-{counts[benchmark]}" if counts[benchmark] > 1 else ""
        shown[f"{RESULTS}/{benchmark}{number}.json"] = values
    return shown


def _kept_results(folder, given, fingerprint):
    """Results from before, but for those of a benchmark that is given anew; and the files of those."""
    asked, kept, outdated = {values["benchmark"] for values in given.values()}, {}, []
    for path in sorted((folder / RESULTS).glob("*.json")):
        name = f"{RESULTS}/{path.name}"
        try:
            values = public(read_json(path, "results of recipes/evaluate_amvl.py"))
            check_results(values, path)
        except ValueError as error:
            logger.warning("Left out of the card: %s", error)
            continue
        if values["benchmark"] in asked:
            outdated += [] if name in given else [path]
        elif arms_of(values, fingerprint):
            kept[name] = values
        else:
            logger.warning("Left out of the card: `%s` was measured on other weights than `%s` has now.", path, folder)
    return kept, outdated


def _diagnosis(folder, given):
    path = Path(given) if given is not None else folder / DIAGNOSIS
    if given is not None and not path.is_file():
        raise ValueError(
            f"`diagnosis` is `{path}`, which is no file: name a `diagnosis.json` of recipes/diagnose_amvl.py."
        )
    try:
        values = read_json(path, "a diagnosis of recipes/diagnose_amvl.py")
        if values is not None:
            values = public(values)
            check_diagnosis(values, path)
            refuse_other_weights(folder, values["weights_sha256"], f"`{path}`")
    except ValueError as error:
        if given is not None:
            raise
        logger.warning("Left out of the card: %s", error)
        return None
    return values


def _stated_license(card):
    """What the metadata of a card says; a person may have written it there."""
    if not card.is_file():
        return None
    try:
        license = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.license
        check_license(license)
    except Exception as error:  # whatever YAML and huggingface_hub raise for what is none
        logger.warning("The licence in `%s` is not taken over: %s", card, error)
        return None
    return license


def _write(path, text):
    path.parent.mkdir(exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8", errors="replace")
    os.replace(scratch, path)
