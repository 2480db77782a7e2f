"""The tiny families: all that transformers maps, each prompt the same in a batch as alone, each image and layer used.

Distances are relative: norm of the difference over norm of the expected tensor.
"""

import contextlib
import dataclasses
import inspect
import re

import pytest
import torch
from families import FAMILIES, NUM_LAYERS, WORDS, Row, build_backbone, has_prompts, is_same_as_alone, make_prompts
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


EQUAL = [Row(seed=0), Row(seed=1)]
UNEQUAL_LENGTHS = [Row(seed=0, num_words=9), Row(seed=1, num_words=4)]
SEVERAL_IMAGES = [Row(seed=0, num_images=2, num_words=3), Row(seed=1), Row(seed=2, num_images=3, num_words=2)]
SOME_WITHOUT_IMAGE = [Row(seed=0, num_images=0), Row(seed=1, num_words=4), Row(seed=2, num_images=0, num_words=3)]
FIRST_WITH_IMAGES = [Row(seed=0, num_images=2, num_words=3), Row(seed=1, num_images=0, num_words=4)]
ALL_WITHOUT_IMAGE = [Row(seed=0, num_images=0), Row(seed=1, num_images=0, num_words=4)]
BATCHES = [EQUAL, UNEQUAL_LENGTHS, SEVERAL_IMAGES, SOME_WITHOUT_IMAGE, FIRST_WITH_IMAGES, ALL_WITHOUT_IMAGE]
REFUSED_PROMPTS = ("one_image_per_row", "no_text_only_rows", "no_text_only_batches")

families = pytest.mark.parametrize("family", FAMILIES)
read_families = pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.skipif(bool(family.broken_here), reason=family.broken_here))
        for name, family in FAMILIES.items()
        if not family.refused
    ],
)


def next_word_logits(backbone, inputs):
    """
    Logits of the words that may follow each prompt, `(B, len(WORDS))`, with positions as `generate` makes them.

    Tokens that are no words are left out: chameleon sets its image codes to the least number there is.
    """
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        positions = backbone._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
        inputs = {**inputs, "position_ids": positions}
    with torch.no_grad():
        return backbone(**inputs).logits[:, -1, WORDS.start : WORDS.stop]


def distance(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def distance_from_alone(family, rows):
    """How far the logits of a batch are from those of its rows, each in a batch of its own as far as there is one."""
    backbone = build_backbone(family)
    company = [Row(seed=9)] if FAMILIES[family].no_text_only_batches else []
    alone = torch.cat([next_word_logits(backbone, make_prompts(family, [row, *company]))[:1] for row in rows])
    return distance(next_word_logits(backbone, make_prompts(family, rows)), alone)


def test_families_are_those_of_transformers():
    assert list(FAMILIES) == list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


@families
def test_backbone_is_tiny_and_the_same_each_time(family):
    backbone, again = build_backbone(family), build_backbone(family)
    assert type(backbone).__name__ == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family]
    assert not backbone.training
    assert sum(parameter.numel() for parameter in backbone.parameters()) < 2_000_000
    for parameter, other in zip(backbone.parameters(), again.parameters()):
        assert parameter is not other and torch.equal(parameter, other)


@read_families
def test_row_is_the_same_in_any_batch(family):
    batches = [rows for rows in BATCHES if has_prompts(family, rows) and is_same_as_alone(family, rows)]
    assert batches
    for rows in batches:
        assert distance_from_alone(family, rows) < 1e-5


@pytest.mark.parametrize(
    "reason, rows",
    [
        ("one_image_per_row", SEVERAL_IMAGES),
        ("no_text_only_rows", SOME_WITHOUT_IMAGE),
        ("no_text_only_batches", ALL_WITHOUT_IMAGE),
        ("padding_matters", UNEQUAL_LENGTHS),
        ("filling_matters", SEVERAL_IMAGES),
        ("place_matters", SEVERAL_IMAGES),
    ],
)
def test_what_a_family_cannot_do_is_so_in_the_stock_model(reason, rows, monkeypatch):
    names = [name for name, family in FAMILIES.items() if getattr(family, reason) and not family.broken_here]
    assert names
    for name in names:
        if reason in REFUSED_PROMPTS:
            with pytest.raises(ValueError, match=f"`{name}` has"):
                make_prompts(name, rows)
            monkeypatch.setitem(
                FAMILIES, name, dataclasses.replace(FAMILIES[name], **dict.fromkeys(REFUSED_PROMPTS, ""))
            )
        try:
            assert distance_from_alone(name, rows) > 1e-5
        except (RuntimeError, TypeError, ValueError):
            assert reason in REFUSED_PROMPTS


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.broken])
def test_what_is_broken_in_a_release_is_so_in_its_stock_model_alone(family):
    """An entry whose bug is gone fails here; it goes, or names the releases that had the bug."""
    reason = FAMILIES[family].broken_here
    fails = contextlib.nullcontext()
    if reason:
        fails = pytest.raises(AttributeError, match=re.search("`(.+?)`", reason)[1])
    with fails:
        next_word_logits(build_backbone(family), make_prompts(family, [Row(seed=0)]))


@read_families
def test_images_change_the_logits(family):
    backbone = build_backbone(family)
    logits, of_other_images = (
        next_word_logits(backbone, make_prompts(family, [Row(seed=0, image_seed=image_seed)])) for image_seed in (1, 2)
    )
    if FAMILIES[family].text_only:
        assert distance(of_other_images, logits) == 0
    else:
        assert distance(of_other_images, logits) > 3e-4


@read_families
def test_every_decoder_layer_changes_the_logits(family):
    backbone = build_backbone(family)
    inputs = make_prompts(family, [Row(seed=0)])
    logits = next_word_logits(backbone, inputs)
    layers = [
        layer
        for module in backbone.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == NUM_LAYERS
        for layer in module
        if isinstance(layer, GradientCheckpointingLayer)
    ]
    assert layers
    for layer in layers:
        weights = {name: weight.clone() for name, weight in layer.state_dict().items()}
        for parameter in layer.parameters():
            parameter.data.mul_(1.1)
        assert distance(next_word_logits(backbone, inputs), logits) > 1e-4
        layer.load_state_dict(weights)


@read_families
def test_training_mode_reads_the_same_prompts(family):
    backbone = build_backbone(family)
    inputs = make_prompts(family, EQUAL)
    logits = next_word_logits(backbone, inputs)
    changed = distance(next_word_logits(backbone.train(), inputs), logits) > 1e-5
    assert changed == bool(FAMILIES[family].training_matters)
