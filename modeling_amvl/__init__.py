"""AMVL for Hugging Face: continuous latent reasoning for any vision-language model."""

from .configuration_amvl import AMVLConfig  # first: it refuses a release of transformers out of range


# isort: split
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .modeling_amvl import AMVLForConditionalGeneration, AMVLOutput, LatentDistribution
from .processing_amvl import AMVLProcessor


AutoConfig.register("amvl", AMVLConfig)
AutoProcessor.register(AMVLConfig, AMVLProcessor)
for _auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(AMVLConfig, AMVLForConditionalGeneration)

__all__ = ["AMVLConfig", "AMVLForConditionalGeneration", "AMVLOutput", "AMVLProcessor", "LatentDistribution"]
