# Copyright 2026 The AMVL for Hugging Face authors.
# SPDX-License-Identifier: Apache-2.0
"""The embedded default's tiny backbone: a stock LLaVA of random weights, its processor, and its plain-SFT training."""

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

from .data.photo_questions import question_words


IMAGE_SIZE = 64  # pixels: width and height of what the vision encoder sees
PATCH_SIZE = 16  # pixels: (64 / 16)^2 = 16 image tokens
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


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """
    Builds a byte-level BPE tokenizer whose merges are the words of the photo questions.

    Each of those words is one token, at the start of a text and after a space; any other text falls into bytes and
    fragments, so that every text round-trips.

    Returns:
        `PreTrainedTokenizerFast`: about 600 tokens, with pad, bos and eos (`<|end|>`, which closes every message).
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
    words = question_words()
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


def build_tiny_backbone(seed: int = 0, **kw):
    tokenizer = build_tiny_tokenizer()
    g = dict(image_size=64, patch=16, vh=128, vl=2, th=128, tl=3, init=0.02, heads=4)
    g.update(kw)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"height": g["image_size"], "width": g["image_size"]},
            crop_size={"height": g["image_size"], "width": g["image_size"]},
            do_center_crop=False,
        ),
        tokenizer=tokenizer,
        patch_size=g["patch"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )
    vision_config = CLIPVisionConfig(
        hidden_size=g["vh"],
        intermediate_size=4 * g["vh"],
        num_hidden_layers=g["vl"],
        num_attention_heads=4,
        image_size=g["image_size"],
        patch_size=g["patch"],
    )
    text_config = LlamaConfig(
        vocab_size=64 * (len(tokenizer) // 64 + 1),
        hidden_size=g["th"],
        intermediate_size=3 * g["th"],
        num_hidden_layers=g["tl"],
        num_attention_heads=g["heads"],
        num_key_value_heads=g["heads"],
        max_position_embeddings=1024,
        initializer_range=g["init"],
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(g["image_size"] // g["patch"]) ** 2,
        tie_word_embeddings=True,
        initializer_range=g["init"],
    )
    set_seed(seed)
    return LlavaForConditionalGeneration(config), processor
