"""The embedded base: a small LLaVA that plain SFT taught to see, whose language model has two layers, so two looks.

It describes pictures of [`color_steps`](data/color_steps.py), answers their questions of one look, and walks step by step when each
step may be written down. Questions of several steps it has never been asked: they are what latents are tried on.
"""

import re

from .data.color_steps import ALL_COLORS, CAPTIONS, IMAGE_SIZE, ONE_LOOK
from .data.photo_questions import PLACES, PREPOSITIONS, SHAPES
from .tiny_llava import build_llava


KINDS = (*CAPTIONS, *ONE_LOOK)  # what the base learns
PATCH_SIZE = IMAGE_SIZE // 3  # one image token for each cell of the grid


def base_words():
    """Every word and mark of the questions and answers of [`build_color_steps`], sorted."""
    texts = "List colors insides shapes none Walk from Color at Shape Count Where is step steps ? " + " ".join(
        [*ALL_COLORS, *PLACES, *PREPOSITIONS.values(), *SHAPES, *map(str, range(10))]
    )
    return sorted(set(re.findall(r"\w+|\?", texts)))


def build_base(seed=0):
    """
    Builds the base with random weights, 1 million of them, for CPU, see [`build_llava`].

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
