"""AMVL for Hugging Face: continuous latent reasoning for any vision-language model."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from .configuration_amvl import AMVLConfig
from .modeling_amvl import AMVLForConditionalGeneration, AMVLOutput, LatentDistribution


AutoConfig.register("amvl", AMVLConfig)
for _auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(AMVLConfig, AMVLForConditionalGeneration)

__all__ = ["AMVLConfig", "AMVLForConditionalGeneration", "AMVLOutput", "LatentDistribution"]
