"""Renders the card of an AMVL checkpoint from what was trained and measured."""

from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


TEMPLATE = Path(__file__).with_name("template.md")
VERSIONED_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


def render_card(config, model_name, settings, metrics=None, hub_model_id=None, datasets=None, licence=None):
    """
    The model card of a checkpoint.

    Args:
        config (`AMVLConfig`): of the model.
        model_name (`str`): title.
        settings (`dict[str, object]`): training settings to show, in their order.
        metrics (`dict[str, float]`, *optional*): of the last evaluation, with the keys that `AMVLSFTTrainer` logs.
        hub_model_id (`str`, *optional*): where the checkpoint will be found; `model_name` otherwise.
        datasets (`list[str]`, *optional*), licence (`str`, *optional*): for the card's metadata.

    Returns:
        `huggingface_hub.ModelCard`.
    """
    backbone = config.backbone_config._name_or_path or None
    metrics = metrics or {}
    evaluation = [
        {"name": name, "nll": metrics[f"eval_nll_{key}"], "accuracy": metrics[f"eval_accuracy_{key}"]}
        for key, name in (("prior", "prior"), ("posterior", "posterior"), ("no_latents", "no latents"))
        if f"eval_nll_{key}" in metrics
    ]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["amvl", "latent-reasoning", "trl", "sft"],
        base_model=backbone if backbone and not Path(backbone).exists() else None,
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
        backbone=card_data.base_model,
        evaluation=evaluation,
        settings=settings,
        versions={name: version(name) for name in VERSIONED_PACKAGES},
    )
