"""A tiny LLaVA of stock classes, from scratch: its tokenizer and its weights."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    set_seed,
)


PAD, BOS, END, IMAGE = "<pad>", "<s>", "<|end|>", "<image>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
    {{ '<|' + message['role'] + '|>' }}
    {%- if message['content'] is string -%}
        {{ message['content'] }}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}<image>{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""


def build_tokenizer(words):
    """
    Builds a byte-level BPE tokenizer whose merges are given words.

    Each of them is one token, at the start of a text and after a space; any other text falls into bytes and fragments, so
    that every text round-trips.

    Args:
        words (`Iterable[str]`): without spaces.

    Returns:
        `PreTrainedTokenizerFast`: with pad, bos and eos (`<|end|>`, which closes every message).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = [PAD, BOS, END, IMAGE, *ROLES]
    bpe = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: merges run out when every word is one token
        min_frequency=1,
        show_progress=False,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([text for word in words for text in (word, " " + word)], bpe)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[IMAGE, *ROLES],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def grid_positions(grid: int, size: int) -> torch.Tensor:
    """
    Sines and cosines of each patch's row and column, as MAE (arXiv 2111.06377) sets them.

    They start the vision encoder's learnt positions, in place of CLIP's own start, noise with a deviation of 0.02.

    Args:
        grid (`int`): Rows, and columns, of patches.
        size (`int`): Size of an embedding, a multiple of 4.

    Returns:
        `torch.Tensor` of shape `(grid * grid, size)`, in reading order, with values in -1..1.
    """
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    frequencies = 100.0 ** -torch.linspace(0, 1, size // 4)  # radians per patch; MAE's 10,000 suits larger grids
    angles = [steps.reshape(-1, 1) * frequencies for steps in (row, column)]  # 2 x (grid * grid, size / 4)
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def build_llava(
    words,
    image_size,
    patch_size,
    vision_size=96,
    vision_layers=1,
    text_size=96,
    text_layers=1,
    initializer_range=0.1,
    seed=0,
):
    """
    Builds a stock LLaVA of random weights: CLIP vision encoder, two-layer projector, Llama.

    Args:
        words (`Iterable[str]`): what the tokenizer has a token for, see [`build_tokenizer`].
        image_size (`int`), patch_size (`int`): pixels; pictures of any other size are stretched to it.
        vision_size (`int`, defaults to 96), vision_layers (`int`, defaults to 1): of the vision encoder.
        text_size (`int`, defaults to 96), text_layers (`int`, defaults to 1): of the language model.
        initializer_range (`float`, defaults to 0.1): about one over the square root of a size keeps the size of what a layer
            passes on.
        seed (`int`, defaults to 0): of the weights. Torch's, numpy's and Python's global generators are seeded with it, too.

    Returns:
        `tuple`: the model (fp32, CPU, in evaluation mode) and its `LlavaProcessor`, both without any code of this
        project. The embedding table has spare rows after the tokenizer's last id. One picture is
        `(image_size / patch_size) ** 2` image tokens.

    Raises:
        ValueError: `image_size` is no positive multiple of `patch_size`.
    """
    if image_size < patch_size or image_size % patch_size:
        raise ValueError(f"`image_size` must be a positive multiple of {patch_size}, got {image_size}.")
    size = {"height": image_size, "width": image_size}
    tokenizer = build_tokenizer(words)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which "default" drops
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_size,
            intermediate_size=4 * vision_size,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=patch_size,
        ),
        text_config=LlamaConfig(
            vocab_size=64 * (len(tokenizer) // 64 + 1),  # at least one spare row
            hidden_size=text_size,
            intermediate_size=3 * text_size,
            num_hidden_layers=text_layers,
            num_attention_heads=4,
            max_position_embeddings=1024,
            initializer_range=initializer_range,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        initializer_range=initializer_range,
        tie_word_embeddings=True,
    )
    set_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        positions = model.model.vision_tower.embeddings.position_embedding.weight  # (1 + patches, vision size)
        positions[1:] = grid_positions(image_size // patch_size, positions.shape[1])
    return model, processor
