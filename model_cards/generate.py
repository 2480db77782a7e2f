"""Renders the card of an AMVL checkpoint, from what was trained and measured, and of a dataset, from what was read."""

from importlib.metadata import version
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from .diagnosis import marked
from .markdown import cell


TEMPLATE = Path(__file__).with_name("template.md")
DATASET_TEMPLATE = Path(__file__).with_name("dataset_template.md")
VERSIONED_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


def render_card(
    config,
    model_name,
    settings,
    metrics=None,
    hub_model_id=None,
    datasets=None,
    licence=None,
    data_licences=None,
    diagnosis=None,
    is_adapter=False,
    base_revision=None,
):
    """
    The model card of a checkpoint.

    Args:
        config (`AMVLConfig`): of the model.
        model_name (`str`): title.
        settings (`dict[str, object]`): training settings to show, in their order.
        metrics (`dict[str, float]`, *optional*): of the last evaluation, with the keys that `AMVLSFTTrainer` logs.
        hub_model_id (`str`, *optional*): where the checkpoint will be found; `model_name` otherwise.
        datasets (`list[str]`, *optional*), licence (`str`, *optional*): for the card's metadata.
        data_licences (`str`, *optional*): of the training data, a line for each source.
        diagnosis (`dict`, *optional*): what recipes/diagnose_amvl.py wrote as `diagnosis.json`: its verdict and table.
        is_adapter (`bool`, defaults to `False`): a PEFT adapter, to be loaded on its base.
        base_revision (`str`, *optional*): the base's commit on the Hub.

    Returns:
        `huggingface_hub.ModelCard`.
    """
    backbone = config.backbone_config._name_or_path or None
    base = (is_adapter and config._name_or_path) or backbone  # an adapter may be one of a trained AMVL model
    metrics = metrics or {}
    evaluation = [
        {"name": name, "nll": metrics[f"eval_nll_{key}"], "accuracy": metrics[f"eval_accuracy_{key}"]}
        for key, name in (("prior", "prior"), ("posterior", "posterior"), ("no_latents", "no latents"))
        if f"eval_nll_{key}" in metrics
    ]
    card_data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["amvl", "latent-reasoning", "trl", "sft", *(["lora", "transformers"] if is_adapter else [])],
        base_model=base if base and not Path(base).exists() else None,
        base_model_relation="adapter" if is_adapter else None,
        datasets=datasets,
        license=licence,
    )
    return ModelCard.from_template(
        card_data,
        template_path=TEMPLATE,
        model_name=model_name,
        model_id=hub_model_id or model_name,
        num_latents=config.num_latents,
        latent_size=config.latent_size,
        latent_temperature=config.latent_temperature,
        latent_token_id=config.latent_token_id,
        initial_token_id=config.initial_token_id,
        min_log_variance=config.min_log_variance,
        max_log_variance=config.max_log_variance,
        base_revision=base_revision,
        is_adapter=is_adapter,
        built_from_stock=not config._name_or_path,
        backbone=card_data.base_model,
        evaluation=evaluation,
        settings=settings,
        diagnosis=marked(diagnosis) if diagnosis else None,
        data_licences=[cell(line) for line in (data_licences or "").splitlines() if line.strip()],
        versions={name: version(name) for name in VERSIONED_PACKAGES},
    )


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
    has_spdx_name = only is not None and " " not in only
    card_data = DatasetCardData(
        license=only if has_spdx_name else "other",
        license_name=None if has_spdx_name else "licences-of-the-sources",
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
    return DatasetCard.from_template(
        card_data,
        template_path=DATASET_TEMPLATE,
        name=name,
        repository=repository or name,
        answer_sentence={
            "answer": "The completion is the answer alone.",
            "rationale": "The completion is a rationale and the answer.",
        }[settings["answer"]],
        has_contact_sheet=any(report["total"]["kept"] for report in reports.values()),
        rows=rows,
        dropped=dropped,
        budget=" and ".join(budget),
    )


BUDGET_ENDS = (("min_pixels", "least"), ("max_pixels", "most"))
