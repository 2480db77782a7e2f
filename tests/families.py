"""Tiny random models of three vision-language families, and batches that they read, as their processors would make them.

    model = build_backbone("llava")
    inputs = make_prompts("llava", [Row(seed=0), Row(seed=1, num_images=2, num_words=5)])

Rows are data: the same `Row` is the same prompt in any batch, alone or among others, so a batch can be compared with
what each of its rows gives alone.

Shapes: B batch, P prompt, A answer.
"""

import copy
import functools
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    SmolVLMConfig,
)


VOCAB_SIZE = 160
HIDDEN_SIZE = 64
NUM_LAYERS = 4
PAD, BOS, EOS, IMAGE, VIDEO = 0, 1, 2, 150, 151
WORDS = range(3, 100)
SPARE_ROWS = range(100, 126)  # rows of the embedding table that no token uses
IMAGE_SIZE, PATCH_SIZE = 28, 7

TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}


@dataclass(frozen=True)
class Row:
    """One prompt: `num_words` words before, between and after `num_images` images, all drawn with `seed`."""

    seed: int
    num_images: int = 1
    num_words: int = 9


@dataclass(frozen=True)
class Family:
    """What differs between families: the configuration, the tokens that hold an image, and the form of its pixels."""

    config: PreTrainedConfig
    image_tokens: list[int]

    def image_inputs(self, images: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The processor's outputs for the images `(3, 28, 28)` of each row; called with one image at least."""
        return {"pixel_values": torch.stack(sum(images, []))}

    def token_inputs(self, input_ids: torch.LongTensor) -> dict[str, torch.Tensor]:
        """The processor's per-token outputs, `(B, P)`."""
        return {}


class Qwen2_5_VL(Family):
    def image_inputs(self, images):
        """Patches of the flattened images, each patch twice (two frames), and the grid of each image."""
        pixels = torch.stack(sum(images, [])).unfold(2, PATCH_SIZE, PATCH_SIZE).unfold(3, PATCH_SIZE, PATCH_SIZE)
        num_images, channels, height, width = pixels.shape[:4]
        patches = pixels.permute(0, 2, 3, 1, 4, 5).reshape(num_images * height * width, channels, 1, -1)
        grid = torch.tensor([[1, height, width]] * num_images)
        return {"pixel_values": patches.expand(-1, -1, 2, -1).flatten(1), "image_grid_thw": grid}

    def token_inputs(self, input_ids):
        return {"mm_token_type_ids": (input_ids == IMAGE).long()}


class SmolVLM(Family):
    def image_inputs(self, images):
        """A row of images per prompt, filled up with black ones, which the model drops."""
        size = max(len(row) for row in images)
        black = torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)
        pixels = torch.stack([torch.stack(row + [black] * (size - len(row))) for row in images])
        shown = torch.tensor([[index < len(row) for index in range(size)] for row in images])
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": shown.long()[:, :, None, None].expand(-1, -1, IMAGE_SIZE, IMAGE_SIZE).contiguous(),
        }


FAMILIES = {
    "qwen2_5_vl": Qwen2_5_VL(
        Qwen2_5_VLConfig(
            text_config={
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            },
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "depth": 2,
                "num_heads": 2,
                "patch_size": PATCH_SIZE,
                "window_size": IMAGE_SIZE,
                "fullatt_block_indexes": [1],
                "out_hidden_size": HIDDEN_SIZE,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=128,
            vision_end_token_id=129,
        ),
        image_tokens=[128, *[IMAGE] * 4, 129],
    ),
    "smolvlm": SmolVLM(
        SmolVLMConfig(
            text_config={"model_type": "llama", **TEXT}, vision_config=VISION, image_token_id=IMAGE, scale_factor=2
        ),
        image_tokens=[130, *[IMAGE] * 4, 130],
    ),
    "llava": Family(
        LlavaConfig(
            text_config=LlamaConfig(**TEXT),
            vision_config=CLIPVisionConfig(**VISION, projection_dim=HIDDEN_SIZE),
            image_token_index=IMAGE,
            image_seq_length=16,
        ),
        image_tokens=[IMAGE] * 16,
    ),
}


def _random_backbone(family):
    config = copy.deepcopy(FAMILIES[family].config)  # a model keeps the config it is made of, and may change it
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


@functools.cache
def _weights(family):
    """Weights large enough that every layer, image and position matters, unlike those of a fresh model."""
    backbone = _random_backbone(family)
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.state_dict().values():
        if not (parameter == 1).all():  # those of norms stay
            parameter.normal_(std=0.08 if parameter.ndim >= 2 else 0.02, generator=generator)
    return backbone.state_dict()


def build_backbone(family, dtype=torch.float32):
    """A tiny stock model in evaluation mode; every call returns a new one with the same weights."""
    backbone = _random_backbone(family)
    backbone.load_state_dict(_weights(family))
    return backbone.to(dtype).eval()


def make_prompts(family, rows, dtype=torch.float32):
    """
    What the family's processor returns for prompts, with a batch left-padded.

    Args:
        family (`str`): a key of `FAMILIES`.
        rows (`list[Row]`): B prompts.
        dtype (`torch.dtype`, defaults to `torch.float32`): of the pixels.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask` `(B, P)`, image inputs, per-token inputs.
    """
    prompts, images = [], []
    for row in rows:
        generator = torch.Generator().manual_seed(row.seed)
        prompt = [BOS, *_draw_words(row.num_words, generator)]
        for _ in range(row.num_images):
            prompt += [*FAMILIES[family].image_tokens, *_draw_words(row.num_words, generator)]
        prompts.append(torch.tensor(prompt))
        images.append([torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) for _ in range(row.num_images)])
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    input_ids = pad(prompts, padding_value=PAD)
    inputs = {"input_ids": input_ids, "attention_mask": pad([torch.ones_like(prompt) for prompt in prompts])}
    inputs |= FAMILIES[family].token_inputs(input_ids)
    if any(images):
        inputs |= FAMILIES[family].image_inputs(images)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def make_answers(lengths, seed=0):
    """
    Answers of given lengths, right-padded.

    Returns:
        `dict[str, torch.Tensor]`: `completion_ids` and `completion_mask` `(B, A)`.
    """
    generator = torch.Generator().manual_seed(seed)
    answers = [torch.tensor(_draw_words(length, generator)) for length in lengths]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "completion_ids": pad(answers, padding_value=PAD),
        "completion_mask": pad([torch.ones_like(answer) for answer in answers]),
    }


def _draw_words(num_words, generator):
    return torch.randint(WORDS.start, WORDS.stop, (num_words,), generator=generator).tolist()
