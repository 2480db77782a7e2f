"""Rows become batches in which x and y are apart, and a row that cannot be trained on is refused by name."""

import copy
import io
import re
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from tiny import build_tiny_backbone
from transformers.image_utils import load_image
from trl.data_utils import apply_chat_template

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from trainer import AMVLDataCollator, AMVLSFTConfig, AMVLSFTTrainer


IMAGE_PART = {"type": "image"}
# One pixel of 16 bits a channel, (0, 0x4040, 0xffff): Pillow writes no such file.
PNG_48_BIT = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    for name, content in (
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" + struct.pack(">HHH", 0, 0x4040, 0xFFFF))),
        (b"IEND", b""),
    )
)


@pytest.fixture(scope="module")
def backbone_and_processor():
    backbone, processor = build_tiny_backbone(seed=0)
    return backbone, AMVLProcessor.from_backbone(processor)


@pytest.fixture(scope="module")
def processor(backbone_and_processor):
    return backbone_and_processor[1]


@pytest.fixture(scope="module")
def model(backbone_and_processor):
    backbone, processor = backbone_and_processor
    return AMVLForConditionalGeneration.from_backbone(
        backbone, num_latents=2, latent_size=8, latent_token_id=processor.latent_token_id
    )


@pytest.fixture
def collator(processor):
    return AMVLDataCollator(processor)


def picture(seed=0, size=(48, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def text(value):
    return {"type": "text", "text": value}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(*parts):
    return {"role": "assistant", "content": list(parts)}


def make_row(question="What color is the circle?", answer="red", num_images=1, seed=0):
    return {
        "images": [picture(seed + n) for n in range(num_images)],
        "prompt": [user(*[IMAGE_PART] * num_images, text(question))],
        "completion": [assistant(text(answer))],
    }


def unpadded(ids, mask):
    """The tokens of each row, as lists."""
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# x and y apart
# ---------------------------------------------------------------------------------------------------------------------


ROWS = [
    make_row("What color is the circle?", "red"),
    make_row("How many other shapes have the color of the circle?", "top left and then something longer", seed=5),
]
FORMS = {
    "prompt and completion": lambda row: row,
    "messages": lambda row: {"images": row["images"], "messages": row["prompt"] + row["completion"]},
    "plain strings as content": lambda row: {
        "images": row["images"],
        "prompt": [{"role": "user", "content": row["prompt"][0]["content"][-1]["text"]}],
        "completion": [{"role": "assistant", "content": row["completion"][0]["content"][0]["text"]}],
    },
    "plain text": lambda row: {
        "images": row["images"],
        "prompt": f"<s><|user|><image>{row['prompt'][0]['content'][-1]['text']}<|end|><|assistant|>",
        "completion": row["completion"][0]["content"][0]["text"],
    },
    "plain text with its end": lambda row: {
        "images": row["images"],
        "prompt": f"<s><|user|><image>{row['prompt'][0]['content'][-1]['text']}<|end|><|assistant|>",
        "completion": row["completion"][0]["content"][0]["text"] + "<|end|>",
    },
    "the column `image`": lambda row: {**{k: v for k, v in row.items() if k != "images"}, "image": row["images"][0]},
}


@pytest.mark.parametrize("form", FORMS)
def test_prompt_ends_with_the_assistant_header_and_completion_is_the_answer_and_its_end(collator, form):
    batch = collator([FORMS[form](row) for row in ROWS])
    tokenizer = collator.processor.tokenizer
    prompts = [tokenizer.decode(ids) for ids in unpadded(batch["input_ids"], batch["attention_mask"])]
    answers = [tokenizer.decode(ids) for ids in unpadded(batch["completion_ids"], batch["completion_mask"])]
    for row, prompt, answer in zip(ROWS, prompts, answers, strict=True):
        question = row["prompt"][0]["content"][-1]["text"]
        assert re.fullmatch(rf"<s><\|user\|>(<image>)+{re.escape(question)}<\|end\|><\|assistant\|>", prompt)
        assert answer == row["completion"][0]["content"][0]["text"] + "<|end|>"


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_row_gives_the_same_batch(collator, form):
    expected, batch = collator(ROWS), collator([FORMS[form](row) for row in ROWS])
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name


def test_prompt_and_completion_together_are_the_rendering_of_the_whole(collator):
    batch = collator(ROWS)
    processor = collator.processor
    prompts = unpadded(batch["input_ids"], batch["attention_mask"])
    answers = unpadded(batch["completion_ids"], batch["completion_mask"])
    for row, prompt, answer in zip(ROWS, prompts, answers, strict=True):
        whole = processor.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        inputs = processor(images=row["images"], text=whole, add_special_tokens=False)
        assert prompt + answer == torch.as_tensor(inputs["input_ids"]).flatten().tolist()


CONVERSATIONS = {
    "one turn": [user(IMAGE_PART, text("How many?"))],
    "several turns": [
        {"role": "system", "content": [text("Look.")]},
        user(IMAGE_PART, text("What color is the circle?")),
        assistant(text("red")),
        user(text("How many?")),
    ],
    "an answer begun": [user(IMAGE_PART, text("How many?")), assistant(text("I count"))],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("header", ["the same", "longer before an answer", "shorter before an answer"])
def test_a_row_is_split_as_trl_splits_it(processor, conversation, header):
    processor = copy.copy(processor)
    generation = "{{ '<|assistant|>' }}"
    assert generation in processor.chat_template
    processor.chat_template = processor.chat_template.replace(
        generation,
        {
            "the same": generation,
            "longer before an answer": "{{ '<|assistant|><think>' }}",
            "shorter before an answer": "{{ '<|assist' }}",
        }[header],
    )
    row = {"prompt": CONVERSATIONS[conversation], "completion": [assistant(text("two"))]}
    rendered = AMVLDataCollator(processor).render({**row, "images": [picture()]}, "The row")
    expected = apply_chat_template(row, processor)
    assert {key: rendered[key] for key in expected} == expected
    if conversation != "an answer begun":
        assert rendered["prompt"].endswith("<|assist" if header.startswith("shorter") else "<|assistant|>")


def test_prompts_are_padded_on_the_left_and_answers_on_the_right(collator):
    batch = collator(ROWS)
    prompt_lengths, answer_lengths = batch["attention_mask"].sum(1), batch["completion_mask"].sum(1)
    assert prompt_lengths[0] < prompt_lengths[1] == batch["input_ids"].shape[1]
    assert answer_lengths[0] < answer_lengths[1] == batch["completion_ids"].shape[1]
    assert (batch["attention_mask"].diff(dim=1) >= 0).all()
    assert (batch["completion_mask"].diff(dim=1) <= 0).all()
    pad = collator.processor.tokenizer.pad_token_id
    assert (batch["input_ids"][batch["attention_mask"] == 0] == pad).all()
    assert (batch["completion_ids"][batch["completion_mask"] == 0] == pad).all()


def test_collating_leaves_the_padding_side_of_the_processor_as_it_is(collator):
    collator(ROWS)
    assert collator.processor.tokenizer.padding_side == "left"


def test_a_row_is_the_same_alone_and_in_a_batch(collator):
    together, alone = collator(ROWS), collator(ROWS[:1])
    for ids, mask in (("input_ids", "attention_mask"), ("completion_ids", "completion_mask")):
        assert unpadded(together[ids], together[mask])[0] == unpadded(alone[ids], alone[mask])[0]
    assert torch.equal(together["pixel_values"][0], alone["pixel_values"][0])


def test_several_images_keep_their_order_and_their_places(collator):
    first, second, third = picture(1), picture(2), picture(3)
    rows = [
        {
            "images": [first, second],
            "prompt": [user(IMAGE_PART, text("and"), IMAGE_PART, text("What color is the circle?"))],
            "completion": [assistant(text("red"))],
        },
        make_row(),
    ]
    rows[1]["images"] = [third]
    batch = collator(rows)
    processor = collator.processor
    expected = processor.image_processor([first, second, third], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    prompt = processor.tokenizer.decode(unpadded(batch["input_ids"], batch["attention_mask"])[0])
    per_image = len(re.findall("<image>", prompt)) // 2
    assert per_image > 1
    run = "<image>" * per_image
    assert f"<|user|>{run}and{run}What color" in prompt


def test_earlier_turns_belong_to_the_prompt(collator):
    turns = [
        {"role": "system", "content": "Look."},
        user(IMAGE_PART, text("What color is the circle?")),
        assistant(text("red")),
        user(text("How many?")),
    ]
    expected = "Look.<|end|><|user|>(<image>)+What color is the circle\\?<\\|end\\|><\\|assistant\\|>red<\\|end\\|>"
    for row in (
        {"images": [picture()], "prompt": turns, "completion": [assistant(text("two"))]},
        {"images": [picture()], "messages": [*turns, assistant(text("two"))]},
    ):
        batch = collator([row])
        prompt = collator.processor.tokenizer.decode(batch["input_ids"][0])
        assert re.search(expected.replace("Look.<|end|><|user|>", r"Look\.<\|end\|><\|user\|>"), prompt)
        assert prompt.endswith("<|user|>How many?<|end|><|assistant|>")
        assert collator.processor.tokenizer.decode(batch["completion_ids"][0]) == "two<|end|>"


def test_rows_survive_arrow_which_fills_missing_keys_with_none(collator):
    rows = datasets.Dataset.from_list(ROWS)
    stored = rows[0]["prompt"][0]["content"][0]
    assert stored == {"type": "image", "text": None}  # the property that makes this test one
    expected, batch = collator(ROWS), collator([rows[0], rows[1]])
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name


def test_an_empty_messages_column_beside_prompt_and_completion_is_not_a_row_of_messages(collator):
    # What concatenating two datasets of different forms leaves behind.
    row = {**ROWS[0], "messages": None}
    other = {**FORMS["messages"](ROWS[1]), "prompt": None, "completion": None}
    expected, batch = collator(ROWS), collator([row, other])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["completion_ids"], expected["completion_ids"])


@pytest.mark.parametrize("column", ["image", "images"])
def test_an_empty_image_column_beside_the_filled_one_is_overlooked(collator, column):
    row = dict(ROWS[0])
    image = row.pop("images")[0]
    row |= {"image": None, "images": None, column: image if column == "image" else [image]}
    assert torch.equal(collator([row])["pixel_values"], collator(ROWS[:1])["pixel_values"])


@pytest.mark.parametrize("kind", ["image", "path", "Path", "bytes", "bytes and path", "path in a dict"])
def test_an_image_may_be_an_image_a_path_or_bytes(collator, tmp_path, kind):
    path = tmp_path / "photo.png"
    image = picture()
    image.save(path)
    source = {
        "image": image,
        "path": str(path),
        "Path": path,
        "bytes": {"bytes": encoded(image), "path": None},
        "bytes and path": {"bytes": encoded(image), "path": "elsewhere.png"},
        "path in a dict": {"bytes": None, "path": str(path)},
    }[kind]
    batch = collator([{**ROWS[0], "images": [source]}])
    assert torch.equal(batch["pixel_values"], collator([{**ROWS[0], "images": [image]}])["pixel_values"])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_an_image_of_any_mode_becomes_rgb(collator, mode):
    batch = collator([{**ROWS[0], "images": [picture().convert("RGB").convert(mode)]}])
    assert batch["pixel_values"].shape[1] == 3
    assert batch["pixel_values"].std() > 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_an_image_that_lies_on_its_side_is_turned_upright_as_in_serving(collator, tmp_path, kind, orientation):
    path, exif = tmp_path / "photo", Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encoded(picture(size=(48, 64)), kind, exif=exif)
    path.write_bytes(content)
    upright = load_image(str(path))
    assert upright.size == ((64, 48) if orientation < 5 else (48, 64))
    stored = datasets.Dataset.from_dict({"images": [[{"bytes": content, "path": None}]]})
    stored = stored.cast_column("images", datasets.List(datasets.Image()))[0]["images"][0]
    for source in (str(path), {"bytes": content, "path": None}, Image.open(path), stored):
        (image,) = collator.render({**ROWS[0], "images": [source]}, "The row")["images"]
        assert np.array_equal(image, upright), type(source)


def test_turning_an_image_leaves_the_row_as_it_is(collator):
    image = picture(size=(48, 64))
    image.getexif()[ExifTags.Base.Orientation] = 6
    for _ in range(2):
        rendered = collator.render({**ROWS[0], "images": [image]}, "The row")
        assert rendered["images"][0].size == (48, 64) and image.size == (64, 48)


def test_16_bit_colors_keep_their_brightness(collator):
    # What Pillow reads as RGB it scales; see `MALFORMED` for grey values, which it would clip.
    (image,) = collator.render({**ROWS[0], "images": [{"bytes": PNG_48_BIT, "path": None}]}, "The row")["images"]
    assert np.array_equal(image, [[[0, 64, 255]]])


def test_text_only_rows_are_accepted_where_allowed(processor):
    collator = AMVLDataCollator(processor, allow_text_only=True)
    row = {"images": [], "prompt": [user(text("How many?"))], "completion": [assistant(text("two"))]}
    batch = collator([row])
    assert "pixel_values" not in batch
    assert processor.tokenizer.decode(batch["input_ids"][0]) == "<s><|user|>How many?<|end|><|assistant|>"
    mixed = collator([row, ROWS[0]])
    assert len(mixed["input_ids"]) == 2 and len(mixed["pixel_values"]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Rows that cannot be trained on
# ---------------------------------------------------------------------------------------------------------------------


def changed(**fields):
    return lambda folder: {**make_row(), **fields}


def without(*names):
    return lambda folder: {name: value for name, value in make_row().items() if name not in names}


def with_file(name, content):
    def row(folder):
        (folder / name).write_bytes(content)
        return {**make_row(), "images": [str(folder / name)]}

    return row


PNG, JPEG = encoded(picture(size=(200, 200))), encoded(picture(size=(200, 200)), "JPEG")
# A chunk said to be shorter than it is: the next "chunk" has no valid name, on which Pillow raises a SyntaxError.
BROKEN_PNG = PNG.replace(PNG[PNG.index(b"IDAT") - 4 :][:4], (100).to_bytes(4, "big"), 1)
PLAIN_PROMPT = "<s><|user|><image>How many?<|end|><|assistant|>"

DEEP = Image.fromarray(np.linspace(0, 65535, 48 * 64, dtype=np.uint16).reshape(48, 64))

# What is wrong: (row, what the message must say besides the name of the row).
MALFORMED = {
    # Images
    "no column of images": (without("images"), "no image"),
    "images is None": (changed(images=None), "no image"),
    "images is empty": (changed(images=[]), "no image"),
    "a placeholder too many": (
        changed(prompt=[user(IMAGE_PART, IMAGE_PART, text("How many?"))]),
        "2 image placeholders.* 1 `images`",
    ),
    "no placeholder": (changed(prompt=[user(text("How many?"))]), "0 image placeholders.* 1 `images`"),
    "an image too many": (changed(images=[picture(), picture(1)]), "1 image placeholders.* 2 `images`"),
    "no placeholder in a plain text": (
        changed(prompt="How many?", completion="two"),
        "0 image placeholders.* 1 `images`",
    ),
    "a placeholder too many in a plain text": (
        changed(prompt="<image>" + PLAIN_PROMPT, completion="two"),
        "2 image placeholders.* 1 `images`",
    ),
    "a placeholder written into the text of a part": (
        changed(prompt=[user(IMAGE_PART, text("<image>How many?"))]),
        "<image>|placeholder",
    ),
    "a placeholder written into a plain content": (
        changed(prompt=[{"role": "user", "content": "<image>How many?"}]),
        "<image>|placeholder",
    ),
    "a placeholder written into the answer": (
        changed(completion=[assistant(text("two <image>"))]),
        "<image>|placeholder",
    ),
    "a placeholder written into a plain answer": (
        changed(prompt=PLAIN_PROMPT, completion="two <image>"),
        "<image>|placeholder",
    ),
    # Image files
    "a missing file": (changed(images=["/nowhere/photo.jpg"]), "image 0 cannot be read.*/nowhere/photo.jpg"),
    "a missing second file": (
        lambda folder: {**make_row(num_images=2), "images": [picture(), "/nowhere/photo.jpg"]},
        "image 1 cannot be read.*/nowhere/photo.jpg",
    ),
    "a folder for a file": (lambda folder: {**make_row(), "images": [str(folder)]}, "image 0 cannot be read"),
    "a text file called .jpg": (with_file("text.jpg", b"not an image"), r"image 0 cannot be read.*text\.jpg"),
    "an empty file": (with_file("empty.jpg", b""), r"image 0 cannot be read.*empty\.jpg"),
    "bytes cut in the header": (changed(images=[{"bytes": PNG[:20], "path": None}]), "image 0 cannot be read"),
    "bytes of a PNG cut in the middle": (
        changed(images=[{"bytes": PNG[: len(PNG) // 2], "path": None}]),
        "image 0 cannot be read",
    ),
    "bytes of a broken PNG": (changed(images=[{"bytes": BROKEN_PNG, "path": None}]), "image 0 cannot be read"),
    "a JPEG file cut in the middle": (
        with_file("cut.jpg", JPEG[: len(JPEG) // 2]),
        r"image 0 cannot be read.*cut\.jpg",
    ),
    "no bytes": (changed(images=[{"bytes": b"", "path": None}]), "image 0 cannot be read"),
    "neither bytes nor path": (changed(images=[{"bytes": None, "path": None}]), "image 0 cannot be read"),
    "None for an image": (changed(images=[None]), "image 0 cannot be read"),
    "a number for an image": (changed(images=[3]), "image 0 cannot be read"),
    "a web address": (changed(images=["https://example.org/photo.jpg"]), "image 0 cannot be read"),
    "16-bit grey": (changed(images=[DEEP]), "image 0 cannot be read.*'I;16'.*8 bits"),
    "16-bit grey in a PNG": (
        changed(images=[{"bytes": encoded(DEEP), "path": None}]),
        "image 0 cannot be read.*'I;16'.*8 bits",
    ),
    "16-bit grey in a TIFF file": (with_file("deep.tif", encoded(DEEP, "TIFF")), "deep.tif.*'I;16'.*8 bits"),
    "32-bit integers": (changed(images=[DEEP.convert("I")]), "image 0 cannot be read.*'I'.*8 bits"),
    "floats": (changed(images=[DEEP.convert("F")]), "image 0 cannot be read.*'F'.*8 bits"),
    # The answer
    "an empty answer": (changed(completion=[assistant(text(""))]), "empty answer"),
    "an answer of white space": (changed(completion=[assistant(text(" \n\t"))]), "empty answer"),
    "an answer without parts": (changed(completion=[assistant()]), "empty answer"),
    "an answer whose content is None": (changed(completion=[{"role": "assistant", "content": None}]), "empty answer"),
    "an answer whose content is empty": (changed(completion=[{"role": "assistant", "content": ""}]), "empty answer"),
    "an answer without messages": (changed(completion=[]), "empty answer|completion"),
    "an empty plain answer": (changed(prompt=PLAIN_PROMPT, completion=""), "empty answer"),
    "a plain answer of white space": (changed(prompt=PLAIN_PROMPT, completion="  "), "empty answer"),
    "a plain answer that is only its end": (changed(prompt=PLAIN_PROMPT, completion="<|end|>"), "empty answer"),
    "an answer part without text": (changed(completion=[assistant({"type": "text"})]), "empty answer|text"),
    "an answer part whose text is a number": (changed(completion=[assistant(text(3))]), "text.*3|3.*text"),
    "an image in the answer": (changed(completion=[assistant(IMAGE_PART, text("two"))]), "'image'.*answer is text"),
    "an answer by the user": (changed(completion=[user(text("two"))]), "'user'.*assistant"),
    "an empty last message": (
        lambda folder: {"images": [picture()], "messages": [*make_row()["prompt"], assistant(text(""))]},
        "empty answer",
    ),
    # The form
    "no prompt": (without("prompt"), "no `prompt`"),
    "prompt is None": (changed(prompt=None), "no `prompt`"),
    "no completion": (without("completion"), "no `completion`"),
    "completion is None": (changed(completion=None), "no `completion`"),
    "neither": (without("prompt", "completion"), "no `prompt`"),
    "prompt is empty": (changed(prompt=[]), "prompt"),
    "prompt is a number": (changed(prompt=5), "`prompt`.*5"),
    "prompt is one message, not a list": (changed(prompt=user(IMAGE_PART, text("How many?"))), "`prompt`"),
    "prompt is a list of texts": (changed(prompt=["<image>How many?"]), "`prompt`"),
    "completion is one message, not a list": (changed(completion=assistant(text("two"))), "`completion`"),
    "completion is a list of texts": (changed(completion=["two"]), "`completion`"),
    "completion is a number": (changed(prompt=PLAIN_PROMPT, completion=2), "`completion`"),
    "a text as prompt and messages as completion": (changed(prompt=PLAIN_PROMPT), "mixes|one form"),
    "messages as prompt and a text as completion": (changed(completion="two"), "mixes|one form"),
    "messages is a text": (lambda folder: {"images": [picture()], "messages": "How many? two"}, "`messages`"),
    "messages is empty": (lambda folder: {"images": [picture()], "messages": []}, "messages|no `prompt`"),
    "messages without an answer": (
        lambda folder: {"images": [picture()], "messages": make_row()["prompt"]},
        "'user'.*assistant",
    ),
    "messages without a question": (
        lambda folder: {"images": [picture()], "messages": make_row()["completion"]},
        "`messages`",
    ),
    # The messages
    "an unknown role": (
        changed(prompt=[{"role": "oracle", "content": [IMAGE_PART, text("How many?")]}]),
        "'?oracle'?",
    ),
    "no role": (changed(prompt=[{"content": [IMAGE_PART, text("How many?")]}]), "role|`prompt`"),
    "role is None": (changed(prompt=[{"role": None, "content": [IMAGE_PART, text("How many?")]}]), "role|None"),
    "no role in the last message": (
        lambda folder: {"images": [picture()], "messages": [*make_row()["prompt"], {"content": [text("two")]}]},
        "role|`messages`",
    ),
    "a prompt that ends with the system": (
        changed(prompt=[*make_row()["prompt"], {"role": "system", "content": [text("Look.")]}]),
        "system",
    ),
    "no content": (changed(prompt=[{"role": "user"}]), "content|placeholder"),
    "content is a number": (changed(prompt=[{"role": "user", "content": 5}]), "content|5"),
    "content is one part, not a list": (
        changed(prompt=[{"role": "user", "content": text("<image>How many?")}]),
        "content|part",
    ),
    "a part that is a text": (changed(prompt=[{"role": "user", "content": ["How many?"]}]), "part|content"),
    "a part that is None": (changed(prompt=[{"role": "user", "content": [None]}]), "part|content"),
    "a part without type": (changed(prompt=[user(IMAGE_PART, {"text": "How many?"})]), "type"),
    "a part of an unknown type": (
        changed(prompt=[user(IMAGE_PART, {"type": "video"}, text("How many?"))]),
        "video",
    ),
    "a text part without text": (changed(prompt=[user(IMAGE_PART, {"type": "text"})]), "text"),
    "a text that is a number": (changed(prompt=[user(IMAGE_PART, text(5))]), "text|5"),
    "a message that is None": (changed(prompt=[user(IMAGE_PART, text("How many?")), None]), "`prompt`|message"),
}


@pytest.mark.parametrize("defect", MALFORMED)
def test_a_malformed_row_is_refused_by_name(collator, tmp_path, defect):
    row, what = MALFORMED[defect]
    with pytest.raises(ValueError, match=rf"^Row 1 of the batch\b[\s\S]*({what})"):
        collator([make_row(), row(tmp_path)])


@pytest.mark.parametrize("defect", MALFORMED)
def test_a_malformed_row_is_refused_before_training(model, processor, tmp_path, defect):
    row, what = MALFORMED[defect]
    row = row(tmp_path)
    rows = datasets.Dataset.from_list([row])
    with pytest.raises(ValueError, match=rf"^Row 0 of `train_dataset`[\s\S]*({what})"):
        build_trainer(model, processor, tmp_path, rows)


def build_trainer(model, processor, folder, rows, eval_rows=None, **settings):
    args = AMVLSFTConfig(
        str(folder / "run"),
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        training_summary=False,
        max_steps=1,
        **settings,
    )
    return AMVLSFTTrainer(model, args, train_dataset=rows, eval_dataset=eval_rows, processing_class=processor)


def test_a_sound_row_passes_the_same_check(collator, model, processor, tmp_path):
    # Otherwise the refusals above would prove nothing.
    collator([make_row(), make_row()])
    build_trainer(model, processor, tmp_path, datasets.Dataset.from_list([make_row()]))


def test_each_kind_of_defect_has_a_message_of_its_own(processor, tmp_path):
    kinds = [
        "no column of images",
        "a placeholder too many",
        "a missing file",
        "an empty answer",
        "an image in the answer",
        "no prompt",
        "a text as prompt and messages as completion",
        "messages without an answer",
        "an unknown role",
    ]
    rows = {kind: MALFORMED[kind][0](tmp_path) for kind in kinds} | {"too long": make_row(answer="red " * 50)}
    messages = {}
    for kind, row in rows.items():
        with pytest.raises(ValueError, match="^Row 0 ") as raised:
            AMVLDataCollator(processor, max_completion_length=20)([row])
        messages[kind] = re.sub(r"\d+|'[^']*'|\([^)]*\)", "", str(raised.value))
    assert len(set(messages.values())) == len(rows), messages


def test_text_only_permission_does_not_excuse_a_placeholder_without_image(processor):
    collator = AMVLDataCollator(processor, allow_text_only=True)
    with pytest.raises(ValueError, match="Row 0 of the batch has 1 image placeholders.* 0 `images`"):
        collator([{**make_row(), "images": []}])


def test_an_answer_longer_than_its_limit_is_refused_with_both_numbers(model, processor, tmp_path):
    row = make_row(answer="red green blue")
    length = len(processor.tokenizer("red green blue<|end|>", add_special_tokens=False)["input_ids"])
    AMVLDataCollator(processor, max_completion_length=length)([row])
    message = rf"has an answer of {length} tokens, more than `max_completion_length` \({length - 1}\): raise the limit"
    with pytest.raises(ValueError, match=f"Row 1 of the batch {message}"):
        AMVLDataCollator(processor, max_completion_length=length - 1)([make_row(), row, make_row()])
    rows = datasets.Dataset.from_list([make_row(), row])
    with pytest.raises(ValueError, match=f"Row 1 of `train_dataset` {message}"):
        build_trainer(model, processor, tmp_path, rows, max_completion_length=length - 1)


def test_a_row_longer_than_max_length_is_refused_with_both_numbers_and_never_cut(processor):
    rows = [make_row(), make_row("How many other shapes have the color of the circle?")]
    batch = AMVLDataCollator(processor)(rows)
    length = int((batch["attention_mask"].sum(1) + batch["completion_mask"].sum(1)).max())
    same = AMVLDataCollator(processor, max_length=length)(rows)
    assert torch.equal(same["input_ids"], batch["input_ids"])
    with pytest.raises(
        ValueError,
        match=rf"^Row 1 of the batch has {length} tokens.*`max_length`.*{length - 1}|"
        rf"^Row 1 of the batch.*`max_length`.*{length - 1}.*{length} tokens",
    ):
        AMVLDataCollator(processor, max_length=length - 1)(rows)


def test_an_answer_longer_than_max_length_is_refused_before_training(model, processor, tmp_path):
    rows = datasets.Dataset.from_list([make_row(), make_row(answer="red " * 200)])
    with pytest.raises(ValueError, match="Row 1 of `train_dataset`.*`max_length`"):
        build_trainer(model, processor, tmp_path, rows, max_length=150)


def test_the_check_covers_every_evaluation_set_and_names_it(model, processor, tmp_path):
    good = datasets.Dataset.from_list([make_row()])
    bad = datasets.Dataset.from_list([make_row(), {**make_row(), "images": []}])
    with pytest.raises(ValueError, match="Row 1 of `eval_dataset` has no image"):
        build_trainer(model, processor, tmp_path, good, bad)
    with pytest.raises(ValueError, match="Row 1 of `held_out` has no image"):
        build_trainer(model, processor, tmp_path, good, {"seen": good, "held_out": bad})


def test_the_check_can_be_switched_off(model, processor, tmp_path):
    bad = datasets.Dataset.from_list([make_row(), {**make_row(), "images": []}])
    build_trainer(model, processor, tmp_path, bad, check_dataset=False)


def test_the_check_writes_no_copy_of_the_dataset(model, processor, tmp_path, monkeypatch):
    # A data set of a hundred thousand photos fills a disk when it is cast.
    datasets.Dataset.from_list([make_row()] * 4).save_to_disk(tmp_path / "rows")
    rows = datasets.load_from_disk(tmp_path / "rows")
    before = sorted(path.name for path in (tmp_path / "rows").iterdir())

    def refuse(*args, **kwargs):
        raise AssertionError("The check rewrites the dataset.")

    monkeypatch.setattr(datasets.Dataset, "map", refuse)
    build_trainer(model, processor, tmp_path, rows)
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == before


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_damaged_bytes_never_raise_anything_but_the_refusal(collator, kind):
    generator = np.random.default_rng(0)
    sound = encoded(picture(), kind)
    num_refused = 0
    for _ in range(100):
        damaged = bytearray(sound)
        for position in generator.integers(0, len(sound), 8):
            damaged[position] = generator.integers(0, 256)
        if generator.random() < 0.3:
            del damaged[generator.integers(0, len(sound)) :]
        row = {**make_row(), "images": [{"bytes": bytes(damaged), "path": None}]}
        for open_images in (False, True):
            try:
                collator.render(row, "Row 7", open_images)
            except ValueError as error:
                assert str(error).startswith("Row 7, image 0 cannot be read")
                num_refused += 1
    assert num_refused > 0
