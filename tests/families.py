"""Tiny random models of every vision-language family, and batches that they read, as their processors would make them.

    model = build_backbone("llava")
    inputs = make_prompts("llava", [Row(seed=0), Row(seed=1, num_images=2, num_words=5)])

Rows are data: the same `Row` is the same prompt in any batch, alone or among others, so a batch can be compared with
what each of its rows gives alone. What differs between families is in tests/family_data.py; `FAMILIES` are those that
the installed release of transformers maps.

Shapes: B batch, P prompt, A answer, N images of the batch, M images of its fullest row, G patches along a side.
"""

import copy
import functools
import re
from dataclasses import dataclass, field

import torch
import transformers
from family_data import (
    AUDIO,
    AUDIO_SIZES,
    BOS,
    END,
    EOS,
    FAMILY_DATA,
    HIDDEN_SIZE,
    IMAGE,
    IMAGE_SIZE,
    JOINT,
    NUM_LAYERS,
    PAD,
    PATCH_SIZE,
    SPARE_ROWS,
    START,
    TEXT,
    TEXT_ALIASES,
    UNUSED,
    VIDEO,
    VISION,
    VISION_ALIASES,
    VOCAB_SIZE,
    WORDS,
)
from packaging.version import Version
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    Gemma3nVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RadioConfig,
    TimmWrapperConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


__all__ = [
    "ALL_FAMILIES",
    "BOS",
    "CORE_FAMILIES",
    "EOS",
    "FAMILIES",
    "HIDDEN_SIZE",
    "IMAGE",
    "IMAGE_SIZE",
    "NUM_LAYERS",
    "PAD",
    "PATCH_SIZE",
    "SPARE_ROWS",
    "TEXT",
    "VIDEO",
    "VISION",
    "VOCAB_SIZE",
    "WORDS",
    "Row",
    "build_backbone",
    "has_prompts",
    "is_same_as_alone",
    "make_answers",
    "make_prompts",
]


@dataclass(frozen=True)
class Row:
    """
    One prompt: `num_words` words before, between and after `num_images` images, all drawn with `seed`.

    With `image_seed` the words stay and the images are others.
    """

    seed: int
    num_images: int = 1
    num_words: int = 9
    image_seed: int | None = None


@dataclass(frozen=True)
class Family:
    """
    What differs between families.

    Args:
        name (`str`): a key of transformers' mapping of image-text-to-text models.
        since (`str`): the first release that maps it, of those that AMVL supports.
        overrides (`dict`): what its tiny configuration has beside tiny sizes; a dotted key is a path.
        image_tokens (`list[int]`): the tokens of one image in a prompt.
        image_inputs (`str`): the form of its images, a function of this file.
        token_types (`dict[str, list[int]]`): its inputs `(B, P)` per token, and the tokens that each marks with 1.
        blank_images (`bool`): whether prompts without any image come with a black one that is masked.
        text_only (`str`): why it reads no images, which its prompts leave out then; empty if it reads them.
        one_image_per_row (`str`): why a row has at most one image; empty if it may have several.
        no_text_only_rows (`str`): why each row needs an image; empty if it does not.
        no_text_only_batches (`str`): why one row of a batch needs an image; empty if none does.
        padding_matters (`str`): why a row that is padded differs from the row alone; empty if it does not.
        filling_matters (`str`): why a row with fewer images than others differs from the row alone, likewise.
        place_matters (`str`): why a row differs with its place in the batch, likewise; by little.
        training_matters (`str`): why the training mode changes a row, likewise.
        refused (`str`): why AMVL refuses it, which leaves it without prompts here; empty if it does not.
        broken (`dict[str, str]`): why its stock forward fails, by release; in backticks the attribute that it misses.
    """

    name: str
    since: str = "5.23"
    overrides: dict = field(default_factory=dict)
    image_tokens: list[int] = field(default_factory=lambda: [START, *[IMAGE] * 4, END])
    image_inputs: str = "pixels"
    token_types: dict[str, list[int]] = field(default_factory=dict)
    blank_images: bool = False
    text_only: str = ""
    one_image_per_row: str = ""
    no_text_only_rows: str = ""
    no_text_only_batches: str = ""
    padding_matters: str = ""
    filling_matters: str = ""
    place_matters: str = ""
    training_matters: str = ""
    refused: str = ""
    broken: dict[str, str] = field(default_factory=dict)

    def is_in(self, release):
        """Whether a release of transformers maps it."""
        return Version(self.since).release <= Version(release).release

    @property
    def broken_here(self):
        """Why the stock forward of the installed release fails; empty if it does not."""
        return self.broken.get(RELEASE, "")

    @functools.cached_property
    def config(self) -> PreTrainedConfig:
        config_class = CONFIG_MAPPING[self.name]
        sizes = _shrink(config_class())
        for path, value in self.overrides.items():
            *sections, key = path.split(".")
            section = functools.reduce(lambda section, key: section.setdefault(key, {}), sections, sizes)
            section[key] = copy.deepcopy(value)
        return config_class(**sizes)


RELEASE = ".".join(transformers.__version__.split(".")[:2])
ALL_FAMILIES = {name: Family(name, **data) for name, data in FAMILY_DATA.items()}
FAMILIES = {name: family for name, family in ALL_FAMILIES.items() if family.is_in(RELEASE)}
CORE_FAMILIES = ("qwen2_5_vl", "smolvlm", "llava")


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


SIZES = {  # of the sections of a configuration, by a pattern of their names
    "audio": AUDIO_SIZES,
    "vision|vit|sam|encoder_config|vq|dit|qformer|perceiver|adapter": {**VISION, **VISION_ALIASES},
    "text|decoder|^encoder$|vlm_config": {**TEXT, **TEXT_ALIASES},
}
TOKEN_IDS = {
    "(image|img|image_context|img_context)_(token_id|token_index|patch_id)": IMAGE,
    "video_token_(id|index)": VIDEO,
    "audio_token_(id|index)": AUDIO,
    "_?pad_token_id": PAD,
    "(bos|decoder_start)_token_id": BOS,
    "(eos|sep|forced_eos)_token_id": EOS,
    "(image_start|image_bos|vision_start|boi)_token_(id|index)": START,
    "(image_end|vision_end|eoi)_token_(id|index)": END,
    ".*_token_(id|index)": UNUSED,
}


def _shrink(config, name=None):
    """Keyword arguments that make `config`, or the section `name` of one, tiny where it differs from its default."""
    config_dict = config.to_dict()
    if name is None:
        sizes = JOINT if "text_config" in config_dict else {**TEXT, **TEXT_ALIASES, **JOINT}
    else:
        sizes = next((sizes for pattern, sizes in SIZES.items() if re.search(pattern, name)), {})
    shrunk = {}
    for key, value in config_dict.items():
        section = vars(config).get(key)
        token_id = next((token_id for pattern, token_id in TOKEN_IDS.items() if re.fullmatch(pattern, str(key))), None)
        if isinstance(section, PreTrainedConfig):
            shrunk[key] = {"model_type": section.model_type, **_shrink(section, key)}
        elif token_id is not None and (value is not None or key in TEXT):
            shrunk[key] = token_id
        elif isinstance(value, float) and re.search("dropout|drop_path|layerdrop", key):
            shrunk[key] = 0.0
        elif key in sizes and value is not None and not isinstance(value, bool):
            one_of_many = isinstance(value, (list, tuple)) and not isinstance(sizes[key], list)
            shrunk[key] = [sizes[key]] * len(value) if one_of_many else sizes[key]
        elif key.endswith("layer_types") and "num_hidden_layers" in sizes and value:
            kinds = list(dict.fromkeys(value))  # in turn, so that all are there
            shrunk[key] = [kinds[layer % len(kinds)] for layer in range(sizes["num_hidden_layers"])]
    return shrunk


class TinyTower(PreTrainedModel):
    """In place of the vision towers of the library timm: one convolution, 2 x 2 patches of an image."""

    config: TimmWrapperConfig

    def __init__(self, config):
        super().__init__(config)
        self.is_transformer = config.architecture.startswith("vit")
        width = config.model_args["embed_dim"] if self.is_transformer else config.hidden_size
        self.patches = torch.nn.Conv2d(3, width, kernel_size=IMAGE_SIZE // 2, stride=IMAGE_SIZE // 2)
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        features = self.patches(pixel_values)  # (N, width, 2, 2)
        if self.is_transformer:
            features = features.flatten(2).transpose(1, 2)  # (N, 4, width)
        return BaseModelOutputWithPooling(last_hidden_state=features)


class TinyGemma3nTower(TinyTower):
    config: Gemma3nVisionConfig


AutoModel.register(TimmWrapperConfig, TinyTower, exist_ok=True)
AutoModel.register(Gemma3nVisionConfig, TinyGemma3nTower, exist_ok=True)
# The stock nemotron_h_omni asks for this name, which transformers deprecates and tests/conftest.py makes an error.
RadioConfig.torch_dtype = property(lambda config: config.dtype)


def _random_backbone(family, dtype):
    config = copy.deepcopy(FAMILIES[family].config)  # a model keeps the config it is made of, and may change it
    model_class = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family])
    return model_class._from_config(config, dtype=dtype)


@functools.cache
def _weights(family):
    """Weights large enough that every layer, image and position matters, unlike those of a fresh model."""
    backbone = _random_backbone(family, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.parameters():
        if not (parameter == 1).all():  # those of norms stay
            std = 0.5 if parameter.numel() == 1 else 0.06 if parameter.ndim >= 2 else 0.02  # a gate, a weight, a bias
            parameter.data.normal_(std=std, generator=generator)
    return backbone.state_dict()


def build_backbone(family, dtype=torch.float32):
    """A tiny stock model in evaluation mode; every call returns a new one with the same weights."""
    backbone = _random_backbone(family, dtype)
    for name, parameter in backbone.named_parameters():
        if any(f".{module}." in f".{name}." for module in backbone._keep_in_fp32_modules_strict):
            parameter.data = parameter.data.float()  # as `from_pretrained` leaves it
    backbone.load_state_dict(_weights(family))
    return backbone.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------

# Each function makes one family's or several families' image inputs, as `Family.image_inputs` says, of the images
# `(3, 28, 28)` of each row, of `input_ids` `(B, P)` and of the family's configuration.


def pixels(images, input_ids, config):
    return {"pixel_values": torch.stack(sum(images, []))}


def masked_pixels(images, input_ids, config):
    inputs = pixels(images, input_ids, config)
    return {**inputs, "pixel_mask": torch.ones_like(inputs["pixel_values"][:, 0], dtype=torch.bool)}


def sized_pixels(images, input_ids, config):
    inputs = pixels(images, input_ids, config)
    return {**inputs, "image_sizes": torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * len(inputs["pixel_values"]))}


def tiled_pixels(images, input_ids, config):
    return {"pixel_values": pixels(images, input_ids, config)["pixel_values"][:, None]}


def two_resolutions(images, input_ids, config):
    low = pixels(images, input_ids, config)["pixel_values"]
    size = config.high_res_vision_config.image_size
    return {"pixel_values": low, "high_res_pixel_values": torch.nn.functional.interpolate(low, size=(size, size))}


def global_views(images, input_ids, config):
    """Images that are small enough to have no local views."""
    inputs = pixels(images, input_ids, config)
    return {**inputs, "num_local_patches": torch.zeros(len(inputs["pixel_values"]), dtype=torch.long)}


def unlimited_ocr(images, input_ids, config):
    """As `global_views`; the processor leaves two outputs lists."""
    inputs = pixels(images, input_ids, config)
    num_images = len(inputs["pixel_values"])
    return {**inputs, "num_local_patches": [0] * num_images, "patches_grid": [[1, 1]] * num_images}


def tiles(images, input_ids, config):
    """Three tiles of an image twice as wide as high: the whole, and its halves."""
    whole = pixels(images, input_ids, config)["pixel_values"]
    return {
        "pixel_values": torch.stack([whole, whole.flip(2), whole.flip(3)], dim=1),
        "image_sizes": torch.tensor([[IMAGE_SIZE, 2 * IMAGE_SIZE]] * len(whole)),
    }


def llava_onevision(images, input_ids, config):
    inputs = tiles(images, input_ids, config)
    return {**inputs, "batch_num_images": torch.ones(len(inputs["pixel_values"]), dtype=torch.long)}


def _cut(images, size=PATCH_SIZE):
    """Images of all rows in patches, row by row: `(N, G, G, 3, size, size)`."""
    patches = torch.stack(sum(images, [])).unfold(2, size, size).unfold(3, size, size)
    return patches.permute(0, 2, 3, 1, 4, 5)


def _grid(num_images, side=IMAGE_SIZE // PATCH_SIZE):
    return torch.tensor([[1, side, side]] * num_images)


def patch_images(images, input_ids, config):
    patches = _cut(images)
    return {"pixel_values": patches.flatten(0, 2), "image_grid_thw": _grid(len(patches))}


def patches(images, input_ids, config):
    inputs = patch_images(images, input_ids, config)
    return {**inputs, "pixel_values": inputs["pixel_values"].flatten(1)}


def patch_pairs(images, input_ids, config):
    """Each patch twice, for two frames of a video."""
    inputs = patch_images(images, input_ids, config)
    pairs = inputs["pixel_values"][:, :, None].expand(-1, -1, 2, -1, -1)
    return {**inputs, "pixel_values": pairs.flatten(1)}


def video_llama_3(images, input_ids, config):
    inputs = patches(images, input_ids, config)
    return {**inputs, "image_merge_sizes": torch.full((len(inputs["image_grid_thw"]),), 2)}


def nemotron(images, input_ids, config):
    inputs = patches(images, input_ids, config)
    return {"pixel_values": inputs["pixel_values"], "image_grid_hw": inputs["image_grid_thw"][:, 1:]}


def minicpm(images, input_ids, config):
    """All patches of the batch side by side: `(1, 3, 7, N * 16 * 7)`."""
    patches = _cut(images)
    return {
        "pixel_values": patches.flatten(0, 2).permute(1, 2, 0, 3).flatten(2)[None],
        "target_sizes": _grid(len(patches))[:, 1:].int(),
    }


def inkling(images, input_ids, config):
    """Patches with two equal frames each and channels last."""
    patches = _cut(images, IMAGE_SIZE // 2).flatten(0, 2).permute(0, 2, 3, 1)
    return {"pixel_values": patches[:, None].expand(-1, 2, -1, -1, -1)}


def inkling2(images, input_ids, config):
    patches = _cut(images, IMAGE_SIZE // 2)
    return {
        "pixel_values": patches.flatten(0, 2).permute(0, 2, 3, 1),
        "image_grid_thw": _grid(len(patches), side=2),
    }


def fuyu(images, input_ids, config):
    return {"pixel_values": _cut(images, IMAGE_SIZE // 2).flatten(3).flatten(1, 2)}


def gemma4(images, input_ids, config):
    """Patches `(N, G * G, 3 * size * size)` and their columns and rows; `size` is such that 4 tokens are left."""
    vision = config.vision_config
    patches = _cut(images, IMAGE_SIZE // 2 // vision.pooling_kernel_size)
    side = torch.arange(patches.shape[1])
    positions = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1).flatten(0, 1)
    return {
        "pixel_values": patches.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2),
        "image_position_ids": positions.expand(len(patches), -1, -1),
    }


def lfm2_vl(images, input_ids, config):
    patches = _cut(images).flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches,
        "spatial_shapes": _grid(len(patches))[:, 1:],
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
    }


def kosmos_2(images, input_ids, config):
    return {**pixels(images, input_ids, config), "image_embeds_position_mask": (input_ids == IMAGE).long()}


def kosmos_2_5(images, input_ids, config):
    """Patches that begin with their row and column, which count from 1."""
    patches = _cut(images).flatten(3)
    side = torch.arange(1, patches.shape[1] + 1)
    positions = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1).expand(len(patches), -1, -1, -1)
    around = torch.isin(input_ids, torch.tensor([START, END]))
    return {
        "flattened_patches": torch.cat([positions, patches], dim=-1).flatten(1, 2),
        "image_embeds_position_mask": (input_ids == IMAGE).long() - around.long(),
    }


def molmo2(images, input_ids, config):
    """Patches, and which four of the whole batch each token pools."""
    patches = _cut(images).flatten(3).flatten(1, 2)  # (N, 16, 147)
    indices = torch.arange(patches.shape[:2].numel()).view(-1, 2, 2, 2, 2)  # image, row, row in a pool, column, ...
    return {
        "pixel_values": patches,
        "image_token_pooling": indices.transpose(2, 3).reshape(-1, 4),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * len(patches)),
        "image_num_crops": torch.ones(len(patches), dtype=torch.long),
    }


def pixels_of_rows(images, input_ids, config):
    """As many images in every row, `(B, M, 3, 28, 28)`, and which of their pixels are no filling."""
    filled, shown = _fill(images)
    mask = shown.long()[:, :, None, None].expand(-1, -1, IMAGE_SIZE, IMAGE_SIZE)
    return {"pixel_values": filled, "pixel_attention_mask": mask.contiguous()}


def granite_docling(images, input_ids, config):
    filled, shown = _fill(images)
    return {"pixel_values": filled, "pixel_attention_mask": shown}


def idefics(images, input_ids, config):
    """Each token sees the last image before it."""
    filled, _ = _fill(images)
    return {"pixel_values": filled, "image_attention_mask": _seen(input_ids, filled.shape[1])}


def mllama(images, input_ids, config):
    """Each image is the first of `max_num_tiles`; each token sees the last image before it."""
    filled, shown = _fill(images)
    num_tiles = config.vision_config.max_num_tiles
    first = torch.nn.functional.one_hot(torch.tensor(0), num_tiles)
    return {
        "pixel_values": filled[:, :, None] * first[:, None, None, None],
        "aspect_ratio_ids": shown.long(),  # 1 is one tile, 0 is filling
        "aspect_ratio_mask": first.expand(*shown.shape, -1),  # filling has one tile, too
        "cross_attention_mask": _seen(input_ids, filled.shape[1])[..., None] * first,
    }


def _fill(images):
    """Rows filled up with black images, `(B, M, 3, 28, 28)`, and which images are no filling, `(B, M)`."""
    size = max(1, *map(len, images))
    black = torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE)
    filled = torch.stack([torch.stack(row + [black] * (size - len(row))) for row in images])
    return filled, torch.tensor([[index < len(row) for index in range(size)] for row in images])


def _seen(input_ids, num_images):
    """1 where a token sees an image, `(B, P, M)`."""
    last = (input_ids == IMAGE).cumsum(dim=1)
    return torch.nn.functional.one_hot(last, num_images + 1)[..., 1:]


def instructblip(images, input_ids, config):
    """Images, and the words of their rows for the Q-Former, right-padded."""
    words = [row[torch.isin(row, torch.tensor(WORDS))] for row in input_ids]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        **pixels(images, input_ids, config),
        "qformer_input_ids": pad(words, padding_value=PAD),
        "qformer_attention_mask": pad([torch.ones_like(row) for row in words]),
    }


def instructblipvideo(images, input_ids, config):
    """Videos of two frames."""
    inputs = instructblip(images, input_ids, config)
    frames = inputs["pixel_values"]
    return {**inputs, "pixel_values": torch.stack([frames, frames.flip(3)], dim=1)}


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and answers
# ---------------------------------------------------------------------------------------------------------------------


def make_prompts(family, rows, dtype=torch.float32):
    """
    What the family's processor returns for prompts, with a batch left-padded.

    Args:
        family (`str`): a key of `FAMILIES`.
        rows (`list[Row]`): B prompts.
        dtype (`torch.dtype`, defaults to `torch.float32`): of the pixels.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask` `(B, P)`, image inputs, per-token inputs; those of
        unlimited_ocr have lists, too.

    Raises:
        ValueError: the family has no such prompts.
    """
    family = FAMILIES[family]
    if family.refused:
        raise ValueError(f"`{family.name}` has no prompts: {family.refused}.")
    if family.one_image_per_row and any(row.num_images > 1 for row in rows):
        raise ValueError(f"`{family.name}` has one image per row: {family.one_image_per_row}.")
    if family.no_text_only_rows and any(row.num_images == 0 for row in rows):
        raise ValueError(f"`{family.name}` has an image in each row: {family.no_text_only_rows}.")
    if family.no_text_only_batches and not any(row.num_images for row in rows):
        raise ValueError(f"`{family.name}` has an image in each batch: {family.no_text_only_batches}.")
    prompts, images = [], []
    for row in rows:
        generator = torch.Generator().manual_seed(row.seed)
        prompt = [BOS, *_draw_words(row.num_words, generator)]
        for _ in range(row.num_images):
            prompt += [*family.image_tokens, *_draw_words(row.num_words, generator)]
        prompts.append(torch.tensor(prompt))
        if row.image_seed is not None:
            generator.manual_seed(row.image_seed)
        images.append([torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) for _ in range(row.num_images)])
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    input_ids = pad(prompts, padding_value=PAD)
    inputs = {"input_ids": input_ids, "attention_mask": pad([torch.ones_like(prompt) for prompt in prompts])}
    for name, tokens in family.token_types.items():
        inputs[name] = torch.isin(input_ids, torch.tensor(tokens, dtype=torch.long)).long()
    if not family.text_only and (any(images) or family.blank_images):
        inputs |= globals()[family.image_inputs](images, input_ids, family.config)
    return {
        key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


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


def has_prompts(family, rows):
    """Whether a stock model of the family reads these rows in one batch."""
    family, num_images = FAMILIES[family], [row.num_images for row in rows]
    return not (
        family.refused
        or (family.one_image_per_row and max(num_images) > 1)
        or (family.no_text_only_rows and min(num_images) == 0)
        or (family.no_text_only_batches and max(num_images) == 0)
    )


def is_same_as_alone(family, rows):
    """Whether a stock model of the family gives these rows in one batch what it gives each alone."""
    family, num_images = FAMILIES[family], [row.num_images for row in rows]
    lengths = {1 + row.num_words + row.num_images * (len(family.image_tokens) + row.num_words) for row in rows}
    return not (
        (family.padding_matters and len(lengths) > 1)
        or (family.filling_matters and len(set(num_images)) > 1)
        or (family.place_matters and any(num_images[1:]))
    )
