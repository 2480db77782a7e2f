"""Configuration of an AMVL model: a vision-language backbone and its continuous latent slots."""

from typing import Literal

import transformers


# The range of transformers releases that this code was tested on; the ceiling is exclusive.
TRANSFORMERS_FLOOR = "5.23.0"
TRANSFORMERS_CEILING = "5.25.0"


def _check_transformers_version(version):
    def numbers(text):
        return tuple(int(part) for part in text.split(".")[:2])

    if not numbers(TRANSFORMERS_FLOOR) <= numbers(version) < numbers(TRANSFORMERS_CEILING):
        raise ImportError(
            f"AMVL was tested with `transformers>={TRANSFORMERS_FLOOR},<{TRANSFORMERS_CEILING}`, found {version}: "
            f"run `pip install 'transformers>={TRANSFORMERS_FLOOR},<{TRANSFORMERS_CEILING}'`."
        )


_check_transformers_version(transformers.__version__)

# Behind the guard: another release may not have these names.
from transformers import AutoConfig, PreTrainedConfig  # noqa: E402
from transformers.configuration_utils import SubConfigSpec, strict  # noqa: E402


AUTO_MODEL_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


@strict
class AMVLConfig(PreTrainedConfig):
    """
    What rebuilds an [`AMVLForConditionalGeneration`]; what only trains it is in `AMVLSFTConfig`.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`):
            Configuration of the wrapped image-text-to-text model.
        num_latents (`int`, defaults to 8):
            Number K of latent slots; the paper's default (arXiv 2607.00461).
        latent_size (`int`, defaults to 512):
            Size Z of one slot; the paper's default.
        latent_token_id (`int`, defaults to 0):
            Id of the `<latent>` placeholder, a row of the backbone's embedding table.
        initial_token_id (`int`, *optional*):
            Id of the token as whose embedding the placeholder started, if any; says where the weights come from.
        initial_log_variance (`float`, defaults to -6.0):
            Log-variance of a fresh prior and posterior, around means of unit variance; taken between the bounds. Not
            stated in the paper; low, so that the decoder learns to read the latents before the KL terms widen them.
        min_log_variance (`float`, defaults to -8.0), max_log_variance (`float`, defaults to 4.0):
            Bounds of every log-variance, approached smoothly. Not stated in the paper.
        latent_temperature (`float`, defaults to 0.0):
            Default of `generate`: a latent is `mean + latent_temperature * std * noise`. 0 is deterministic.
        multipass (`"auto"`, `"shared"` or `"full"`, defaults to `"auto"`):
            How prior, posterior and decoder read one prompt. `"shared"` runs the prompt once into a differentiable
            cache that each reads; `"full"` runs three whole sequences. `"auto"` takes the shared plan, and under the trainer
            the full one where its self-test fails. May be changed on a live model.

    Raises:
        ValueError: a number out of its range.
    """

    model_type = "amvl"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="llava", optional=True)
    }

    backbone_config: dict | PreTrainedConfig | None = None
    num_latents: int = 8
    latent_size: int = 512
    latent_token_id: int = 0
    initial_token_id: int | None = None
    initial_log_variance: int | float = -6.0
    min_log_variance: int | float = -8.0
    max_log_variance: int | float = 4.0
    latent_temperature: int | float = 0.0
    multipass: Literal["auto", "shared", "full"] = "auto"

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        super().__post_init__(**kwargs)
        if getattr(self, "auto_map", None) is None:
            # A class registers itself for one auto class when it is saved; the entries for the others are kept.
            self.auto_map = dict.fromkeys(AUTO_MODEL_CLASSES, "modeling_amvl.AMVLForConditionalGeneration")

    def validate_latents(self):
        """Refuses values under which the latents could not do anything; run when the config is built and at each step."""
        for name in ("num_latents", "latent_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be at least 1, got {getattr(self, name)}: to run without latents, use the backbone."
                )
        if self.latent_token_id < 0:
            raise ValueError(f"`latent_token_id` must be a row of the embedding table, got {self.latent_token_id}.")
        if not self.min_log_variance < self.max_log_variance:
            raise ValueError(
                f"`min_log_variance` must be below `max_log_variance`, got {self.min_log_variance} and "
                f"{self.max_log_variance}."
            )
        if self.latent_temperature < 0:
            raise ValueError(f"`latent_temperature` must be 0 or more, got {self.latent_temperature}.")

    def get_text_config(self, decoder=None, encoder=None):
        """The backbone's text configuration, which the library asks for vocabulary and cache layout."""
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)
