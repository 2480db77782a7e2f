"""Tests of the embedded default's questions and of its tiny backbone."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from trainer.data.photo_questions import (
    COLORS,
    CORNERS,
    DIRECTIONS,
    GRID,
    KINDS,
    PLACES,
    PREPOSITIONS,
    answer_text,
    build_photo_questions,
    chance,
    constant_answer,
    constant_answer_accuracy,
)
from trainer.data.photos import SCIKIT_IMAGE_PHOTOS, load_photos, split_photos
from trainer.demo import build_tiny_backbone
from trainer.tiny_llava import train_sft


ROWS = 60 * len(KINDS)  # a multiple of every number of choices


@pytest.fixture(scope="module")
def rows():
    return build_photo_questions(ROWS, "train", seed=3)


@pytest.fixture(scope="module")
def backbone():
    return build_tiny_backbone(seed=0)


def question(row):
    return row["prompt"][0]["content"][1]["text"]


def image_bytes(dataset):
    arrow = dataset.with_format("arrow")[:]["images"]
    return [[image["bytes"] for image in images] for images in arrow.to_pylist()]


def objects_in(image):
    """Finds pasted shapes from pixels alone: patches of one exact colour, as (colour, cell)."""
    pixels = np.asarray(image.convert("RGB"))
    found = []
    for color, rgb in COLORS.items():
        labels, _ = ndimage.label((pixels == rgb).all(-1))
        for label, box in enumerate(ndimage.find_objects(labels), start=1):
            mask = labels[box] == label
            if mask.sum() >= 12:  # single pixels of the photograph may share a colour
                row = (box[0].start + box[0].stop) / 2 / pixels.shape[0] * GRID
                column = (box[1].start + box[1].stop) / 2 / pixels.shape[1] * GRID
                found.append((color, (int(row), int(column))))
    return found


def test_same_arguments_give_the_same_bytes_and_longer_datasets_start_alike():
    first, again = build_photo_questions(20, seed=5), build_photo_questions(20, seed=5)
    longer, other = build_photo_questions(35, seed=5), build_photo_questions(20, seed=6)
    assert image_bytes(first) == image_bytes(again) == image_bytes(longer)[:20]
    assert [question(row) for row in first] == [question(row) for row in longer][:20]
    assert all(a != b for a, b in zip(image_bytes(first), image_bytes(other), strict=True))


def test_rows_are_in_trl_prompt_completion_format(rows):
    row = rows[0]
    assert set(row) == {"images", "prompt", "completion", "kind", "photo", "choices"}
    assert [image.size for image in row["images"]] == [(48, 48)]
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]
    assert row["prompt"][0]["role"] == "user" and row["completion"][0]["role"] == "assistant"
    assert all(answer_text(row) in row["choices"] for row in rows)


def test_no_photo_serves_both_splits(rows):
    held_out = build_photo_questions(ROWS, "held_out", seed=3)
    assert not set(rows["photo"]) & set(held_out["photo"])
    names = split_photos(SCIKIT_IMAGE_PHOTOS)
    assert set(rows["photo"]) == set(names["train"]) and set(held_out["photo"]) == set(names["held_out"])
    assert min(len(side) for side in names.values()) >= 5
    assert split_photos(names["train"] + names["held_out"], split_seed=1) != names


def test_kinds_and_answers_are_balanced(rows):
    assert len(KINDS) >= 4
    counts = defaultdict(Counter)
    for row in rows:
        counts[row["kind"]][answer_text(row)] += 1
    assert set(counts) == set(KINDS)
    for kind, counter in counts.items():
        assert set(counter) == set(KINDS[kind].choices)
        assert max(counter.values()) - min(counter.values()) <= 1
    floor = {kind: 1 / len(KINDS[kind].choices) for kind in KINDS}
    assert chance(rows) == pytest.approx(floor)
    assert constant_answer_accuracy(rows, constant_answer(rows)) == pytest.approx(floor)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_follow_from_the_pixels(split):
    kinds = tuple(kind for kind in KINDS if kind != "odd_corner")
    checked = Counter()
    for row in build_photo_questions(30 * len(kinds), split, seed=9, kinds=kinds):
        found, text, kind = objects_in(row["images"][0]), question(row), row["kind"]
        named = re.findall("|".join(COLORS), text)
        cells = dict(found)
        if kind == "color":
            place = PLACES[re.search(r"at the (.*)\?", text)[1]]
            (expected,) = [color for color, cell in found if cell == place]
        elif kind == "counting":
            expected = str(sum(color == named[0] for color, _ in found))
        elif kind == "spatial_relation":
            target, reference = (cells[name] for name in named)
            step = (target[0] - reference[0], target[1] - reference[1])
            expected = next(name for name, direction in DIRECTIONS.items() if direction == step)
        else:
            direction = next(name for name, words in PREPOSITIONS.items() if f" {words} " in text)
            row_index, column = cells[named[0]]
            place = (row_index + DIRECTIONS[direction][0], column + DIRECTIONS[direction][1])
            (expected,) = [color for color, cell in found if cell == place]
        assert expected == answer_text(row), text
        checked[kind] += 1
    assert checked == Counter(dict.fromkeys(kinds, 30))


def write_flat_photos(folder, count):
    """Photographs of one colour each, so that a crop tells where it comes from."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", (80, 60), (10 * index, 255 - 10 * index, 7 * index % 256)).save(folder / f"photo{index}.png")
    return folder


def test_the_odd_corner_follows_from_the_crops(tmp_path):
    folder = write_flat_photos(tmp_path / "photos", 12)
    for row in build_photo_questions(24, "held_out", image_dir=folder, kinds=("odd_corner",)):
        pixels = np.asarray(row["images"][0])
        panels = {name: tuple(pixels[12 + 24 * i, 12 + 24 * j].tolist()) for name, (i, j) in CORNERS.items()}
        counts = Counter(panels.values())
        (expected,) = [name for name, color in panels.items() if counts[color] == 1]
        assert expected == answer_text(row)


def test_unusable_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`image_dir` must be an existing folder.*nowhere"):
        build_photo_questions(4, image_dir=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no image"):
        build_photo_questions(4, image_dir=tmp_path)
    folder = write_flat_photos(tmp_path / "photos", 12)
    (folder / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"1 unreadable image\(s\): broken.jpg"):
        build_photo_questions(4, image_dir=folder)
    few = write_flat_photos(tmp_path / "few", 3)
    with pytest.raises(ValueError, match="need at least 2 .* leave {'held_out': 1}"):
        build_photo_questions(4, image_dir=few, kinds=("odd_corner",))
    assert len(build_photo_questions(4, image_dir=few, kinds=("color",))) == 4


def test_copies_of_a_photo_are_read_once(tmp_path):
    folder = write_flat_photos(tmp_path / "photos", 4)
    (folder / "sub").mkdir()
    (folder / "sub" / "copy.png").write_bytes((folder / "photo2.png").read_bytes())
    (folder / "notes.txt").write_text("no image")
    assert list(load_photos(folder)) == [f"photo{index}.png" for index in range(4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rows": 0}, "`num_rows` must be at least 1, but got 0"),
        ({"split": "test"}, "`split` must be one of .*'test'"),
        ({"seed": -1}, "`seed` must be zero or more, but got -1"),
        ({"image_size": 50}, "`image_size` must be a multiple of 3, at least 48, but got 50"),
        ({"kinds": ("poetry",)}, "`kinds` must name some of .*poetry"),
        ({"kinds": ()}, "`kinds` must name some of"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_photo_questions(**{"num_rows": 4, **arguments})


def test_tokenizer_round_trips_any_text_and_knows_the_questions(rows, backbone):
    tokenizer = backbone[1].tokenizer
    for text in ("Is my dog naïve?", "你好, photo!", " two  spaces\nand a line", "red", "top left"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    for row in rows:
        words = re.findall(r"\w+|\?", question(row))
        assert len(tokenizer(question(row)).input_ids) == len(words)
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(special) == 3 and None not in special


def test_prompt_is_a_prefix_of_prompt_and_completion(rows, backbone):
    processor = backbone[1]
    for row in rows.select(range(len(KINDS))):
        prompt = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        whole = processor.apply_chat_template(row["prompt"] + row["completion"])
        assert whole == prompt + answer_text(row) + processor.tokenizer.eos_token
        assert prompt.count(processor.image_token) == 1
        encode = processor.tokenizer.encode
        assert encode(whole) == encode(prompt) + encode(answer_text(row)) + [processor.tokenizer.eos_token_id]


def test_backbone_is_stock_runs_backward_and_generates(rows, backbone):
    model, processor = backbone
    assert type(model).__module__.startswith("transformers.") and type(processor).__module__.startswith(
        "transformers."
    )
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


def test_backbone_is_rebuilt_by_its_seed():
    first, again, other = (build_tiny_backbone(seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_sft_lowers_the_loss(tmp_path):
    model, processor = build_tiny_backbone(seed=0)
    rows = build_photo_questions(64, kinds=("color",))
    losses = train_sft(model, processor, rows, tmp_path, num_steps=12, batch_size=8, learning_rate=3e-3)
    assert losses[-1] < 0.7 * losses[0]
    assert not model.training and all(p.grad is None for p in model.parameters())
