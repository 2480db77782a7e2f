"""The embedded base: a small LLaVA that plain SFT taught to see, with two layers of language model to think in.

It describes pictures of [`color_steps`](data/color_steps.py), answers most of their questions of one look, and walks step by step when
each step may be written down. Questions of several steps it has never been asked: they are what latents are tried on.
"""

import re
from pathlib import Path

from transformers import LlavaForConditionalGeneration, LlavaProcessor

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor

from .data.color_steps import CAPTIONS, IMAGE_SIZE, ONE_LOOK
from .data.shapes import ALL_COLORS, PLACES, PREPOSITIONS, SHAPES
from .tiny_llava import build_llava


KINDS = (*CAPTIONS, *ONE_LOOK)  # what the base learns
PATCH_SIZE = IMAGE_SIZE // 3  # one image token for each cell of the grid
EMBEDDED = Path(__file__).with_name("embedded_base")  # what recipes/train_base.py wrote


def base_words():
    """Every word and mark of the questions and answers of [`build_color_steps`], sorted."""
    texts = "List colors insides shapes none Walk from Color at Shape Count Where is step steps ? " + " ".join(
        [*ALL_COLORS, *PLACES, *PREPOSITIONS.values(), *SHAPES, *map(str, range(10))]
    )
    return sorted(set(re.findall(r"\w+|\?", texts)))


def build_base(seed=0):
    """
    Builds the base with random weights, 1.3 million of them, for CPU, see [`build_llava`].

    Args:
        seed (`int`, defaults to 0): of the weights.

    Returns:
        `tuple`: the model and its processor; one picture is 9 image tokens.
    """
    return build_llava(
        base_words(),
        IMAGE_SIZE,
        PATCH_SIZE,
        vision_size=128,
        vision_layers=3,
        text_size=128,
        text_layers=2,
        initializer_range=128**-0.5,
        seed=seed,
    )


def load_base(folder=EMBEDDED):
    """
    Loads the base as recipes/train_base.py trained it, a copy of which is part of this package.

    Args:
        folder (`str` or `Path`): the package's own copy by default.

    Returns:
        `tuple`: the stock model (fp32, CPU, in evaluation mode) and its `LlavaProcessor`.
    """
    return LlavaForConditionalGeneration.from_pretrained(folder), LlavaProcessor.from_pretrained(folder)


def add_latents(num_latents, latent_size, **settings):
    """
    The base with latents on top, its vision encoder frozen by the trainer.

    Args:
        num_latents (`int`), latent_size (`int`), **settings: see [`AMVLForConditionalGeneration.from_backbone`]; the placeholder
            starts as the token that an answer follows unless `initial_token_id` says otherwise.

    Returns:
        `tuple`: the [`AMVLForConditionalGeneration`] and its [`AMVLProcessor`].
    """
    backbone, stock_processor = load_base()
    processor = AMVLProcessor.from_backbone(stock_processor)
    settings = {"initial_token_id": processor.answer_start_id, **settings}
    model = AMVLForConditionalGeneration.from_backbone(
        backbone,
        num_latents=num_latents,
        latent_size=latent_size,
        latent_token_id=processor.latent_token_id,
        **settings,
    )
    return model, processor
