"""A stock LLaVA of 0.4 million random weights, so small that a test builds it in place."""

from trainer.base import base_words
from trainer.tiny_llava import build_llava


def build_tiny_backbone(seed=0, image_size=48):
    """
    Model and processor with one layer on each side, see [`build_llava`]; its tokenizer has a token for each of [`base_words`].

    Args:
        seed (`int`, defaults to 0): of the weights.
        image_size (`int`, defaults to 48): pixels, a multiple of 16; one picture is `(image_size / 16) ** 2` image tokens.
    """
    return build_llava(base_words(), image_size, 16, seed=seed)
