"""Renders the card of an AMVL checkpoint, from what was trained and measured, and of a dataset, from what was read."""

import re
from pathlib import Path

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard
from jinja2 import Environment

from .diagnosis import marked
from .facts import SOURCES, public
from .markdown import cell, code, literal, one_line, table
from .metadata import LICENSES, is_hub_id, model_card_data
from .own_words import section
from .results import eval_results, render_results


TEMPLATE = Path(__file__).with_name("template.md")
DATASET_TEMPLATE = Path(__file__).with_name("dataset_template.md")


def render_card(facts, license=None, results=None, diagnosis=None, fingerprint=None, own_words=""):
    """
    The model card of a checkpoint. It claims what it is given, and says what is not known.

    Args:
        facts ([`~model_cards.facts.TrainingFacts`]): of its training.
        license (`str`, *optional*): of the weights, one of `LICENSES`; by default what the facts say.
        results (`dict[str, dict]`, *optional*): what recipes/evaluate_amvl.py wrote, by the file's name in the repository; of these
            weights.
        diagnosis (`dict`, *optional*): what recipes/diagnose_amvl.py wrote as `diagnosis.json`; of these weights.
        fingerprint (`str`, *optional*): of the weights; needed with `results`.
        own_words (`str`, defaults to `""`): what a person wrote into an earlier card, see [`~model_cards.own_words`].

    Returns:
        `huggingface_hub.ModelCard`.
    """
    results, license = results or {}, license or facts.license
    hub_model_id = facts.hub_model_id if is_hub_id(facts.hub_model_id) else None
    base = facts.base if is_hub_id(facts.base) else None
    evaluation = facts.evaluation
    scores = [
        scored for file, values in results.items() for scored in eval_results(values, fingerprint, hub_model_id, file)
    ]
    card_data = model_card_data(facts, license, scores)
    text = _render(
        TEMPLATE,
        card_data=card_data.to_yaml(),
        title=cell(facts.title) or "amvl",
        latents=facts.latents,
        base=base,
        base_revision=facts.base_revision if base else None,
        base_is_amvl=facts.base_is_amvl,
        hub_model_id=hub_model_id,
        model_id=literal(hub_model_id or facts.title),
        is_adapter=facts.is_adapter,
        is_trained=facts.is_trained,
        own_words=section(""),
        diagnosis=marked(diagnosis) if diagnosis else None,
        evaluation=evaluation,
        evaluation_table=_evaluation_table(evaluation) if evaluation else None,
        num_steps=facts.num_steps,
        fingerprint=fingerprint,
        results="\n\n".join(render_results(values, fingerprint) for values in results.values()),
        settings_table=table(
            ["setting", "value"], [[code(name), cell(value)] for name, value in public(facts.settings).items()]
        ),
        arguments=_yaml(facts.arguments),
        device=cell(facts.device) if facts.device else None,
        code=_code(facts.code),
        versions=", ".join(f"{cell(name)} {cell(value)}" for name, value in facts.versions.items()),
        datasets=[(name, revision) for name, revision in facts.datasets.items() if is_hub_id(name)],
        licences=[f"{cell(name)}: {cell(licence)}" for name, licence in public(facts.licences).items()],
        license=license,
    )
    return ModelCard(text.replace(section(""), section(own_words), 1))


def _evaluation_table(evaluation):
    rows = [
        [source.replace("_", " "), f"{evaluation[source]['nll']:.4f}", f"{evaluation[source]['accuracy']:.3f}"]
        for source in SOURCES
    ]
    return table(["decoded with", "NLL, nats per token", "answers right token by token"], rows, right=(1, 2))


def _yaml(settings):
    """Settings as YAML, each value on its line."""
    if not settings:
        return ""
    return yaml.safe_dump(public(settings), sort_keys=False, allow_unicode=True, width=float("inf")).strip()


def _code(found):
    if not found.get("version") and not found.get("commit"):
        return "not known which"
    text = f"AMVL for Hugging Face {cell(found.get('version') or '(no release)')}"
    if found.get("commit"):
        text += f", commit `{one_line(found['commit'])}`"
        text += ", with uncommitted changes" if found.get("uncommitted") else ""
    return text


def _render(template, **values):
    """What huggingface_hub's `from_template` does, which would let the metadata's own fields fill gaps in the template."""
    environment = Environment(keep_trailing_newline=True)
    text = environment.from_string(template.read_text(encoding="utf-8")).render(values)
    return re.sub(r"\n{3,}", "\n\n", text)


def render_dataset_card(name, reports, settings, repository=None):
    """
    The card of a prepared dataset.

    Args:
        name (`str`): title.
        reports (`dict[str, dict]`): by split, `train` first, what `DataReport.to_dict` gives.
        settings (`dict`): `answer`, `min_pixels` and `max_pixels` of the mixture.
        repository (`str`, *optional*): where it will be found; `name` otherwise.

    Returns:
        `huggingface_hub.DatasetCard`: its metadata name the files of each split and, where all sources share one, the licence.
    """
    rows, dropped, licences = [], [], {}
    for split, report in reports.items():
        for source, values in report["sources"].items():
            share = values["rows"] / max(report["total"]["rows"], 1)
            licences[values["licence"]] = None
            row = {"split": split, "source": cell(source), "licence": cell(values["licence"])}
            rows.append({**row, "rows": values["rows"], "share": share})
            dropped += [{**row, "reason": cell(k), "rows": v["rows"]} for k, v in values["dropped"].items()]
    only = next(iter(licences)) if len(licences) == 1 else None
    is_on_hub = only in LICENSES
    card_data = DatasetCardData(
        license=only if is_on_hub else "other",
        license_name=None if is_on_hub else "licences-of-the-sources",
        task_categories=["image-text-to-text"],
        tags=["amvl", "trl"],
        configs=[
            {
                "config_name": "default",
                "data_files": [
                    {"split": split, "path": f"data/{split}-*.parquet"}
                    for split, report in reports.items()
                    if report["total"]["kept"]
                ],
            }
        ],
    )
    budget = [f"{settings[key]:,} pixels at {end}" for key, end in BUDGET_ENDS if settings.get(key) is not None]
    text = _render(
        DATASET_TEMPLATE,
        card_data=card_data.to_yaml(),
        name=cell(name),
        repository=repository or one_line(name),
        repository_code=literal(repository or name),
        answer_sentence={
            "answer": "The completion is the answer alone.",
            "rationale": "The completion is a rationale and the answer.",
        }[settings["answer"]],
        has_contact_sheet=any(report["total"]["kept"] for report in reports.values()),
        rows=rows,
        dropped=dropped,
        budget=" and ".join(budget),
    )
    return DatasetCard(text)


BUDGET_ENDS = (("min_pixels", "least"), ("max_pixels", "most"))
