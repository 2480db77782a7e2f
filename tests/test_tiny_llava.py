"""The tiny LLaVA is a stock model whose tokenizer knows the embedded questions, and plain SFT teaches it."""

import re

import pytest
import torch
from tiny import build_tiny_backbone

from trainer.data.color_steps import KINDS, build_color_steps
from trainer.evaluation import answer_text
from trainer.tiny_training import train_sft


@pytest.fixture(scope="module")
def rows():
    return build_color_steps(4 * len(KINDS), kinds=KINDS, image_size=48, seed=3)


@pytest.fixture(scope="module")
def backbone():
    return build_tiny_backbone(seed=0)


def test_the_tokenizer_round_trips_any_text_and_has_a_token_for_each_word_of_the_questions(rows, backbone):
    tokenizer = backbone[1].tokenizer
    for text in ("Is my dog naïve?", "你好, photo!", " two  spaces\nand a line", "red", "top left"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for row in rows:
        for text in (row["prompt"][0]["content"][1]["text"], answer_text(row)):
            assert len(tokenizer(text).input_ids) == len(re.findall(r"\w+|\?", text)), text
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(special) == 3 and None not in special


def test_the_prompt_is_a_prefix_of_prompt_and_completion(rows, backbone):
    processor = backbone[1]
    for row in rows.select(range(len(KINDS))):
        prompt = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        whole = processor.apply_chat_template(row["prompt"] + row["completion"])
        assert whole == prompt + answer_text(row) + processor.tokenizer.eos_token
        assert prompt.count(processor.image_token) == 1
        encode = processor.tokenizer.encode
        assert encode(whole) == encode(prompt) + encode(answer_text(row)) + [processor.tokenizer.eos_token_id]


def test_the_backbone_is_stock_runs_backward_and_generates(rows, backbone):
    model, processor = backbone
    assert all(type(part).__module__.startswith("transformers.") for part in (model, processor))
    batch = processor(
        images=[row["images"] for row in rows.select(range(3))],
        text=[processor.apply_chat_template(r["prompt"], add_generation_prompt=True) for r in rows.select(range(3))],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [9] * 3
    out = model.generate(**batch, max_new_tokens=3, do_sample=False)  # (3, prompt + at most 3)
    assert out.shape[0] == 3 and batch["input_ids"].shape[1] < out.shape[1] <= batch["input_ids"].shape[1] + 3
    model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # LLaVA reads the encoder's last layer, before the final normalisation; keys' biases cancel in the softmax.
    assert all("post_layernorm" in name or name.endswith("k_proj.bias") for name in still), still
    model.zero_grad()


def test_the_backbone_is_rebuilt_by_its_seed():
    first, again, other = (build_tiny_backbone(seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_sft_lowers_the_loss(tmp_path):
    model, processor = build_tiny_backbone(seed=0)
    rows = build_color_steps(64, kinds=("color",), image_size=48)
    losses = train_sft(model, processor, rows, tmp_path, num_steps=12, batch_size=8, learning_rate=3e-3)
    assert losses[-1] < 0.7 * losses[0]
    assert not model.training and all(p.grad is None for p in model.parameters())
