"""Every reader gives rows in which x is the question alone, however it is read, and counts what it cannot use."""

import io
import json
import math
import os
import re
import zlib
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from loopback_hub import LoopbackHub
from PIL import ExifTags, Image
from test_loopback_hub import run_client
from torch.utils.data import DataLoader

from trainer.data import reader as reader_module
from trainer.data.filters import load_filter
from trainer.data.monet import MonetReader
from trainer.data.rows import FEATURES, form_of, with_images
from trainer.data.sources import READERS, open_source, read_rows
from trainer.data.visual_cot import BOX_REQUEST as ASKS_FOR_A_BOX


pytestmark = pytest.mark.any_release


QUESTION = "How many cups are on the 3.5 m table, Dr. Smith?"
BOX_REQUEST = " Please provide the bounding box coordinate of the region that can help you answer the question better."
QUESTION_COLOR, OTHER_COLOR, SECRET_COLOR = (10, 200, 30), (250, 5, 250), (13, 37, 73)
NUM_RECORDS = 7


# ---------------------------------------------------------------------------------------------------------------------
# A record of each format, as ../shared/formats.md has it. Every text but the question is a canary, every image but the
# question's has another colour. `picture(name, color)` gives what the record holds as an image.
# ---------------------------------------------------------------------------------------------------------------------


def monet(number, picture):
    return {
        "metadata": {"dataset_name": "CANARY-name", "sample_id": f"id{number}", "note": "CANARY-note"},
        "data": [
            {"role": "system", "content": [{"type": "text", "text": "CANARY-system"}]},
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": picture(f"question{number}", QUESTION_COLOR)},
                    {"type": "text", "text": f"{QUESTION} {number}\nPut your final answer within \\boxed{{}}."},
                ],
                "name": "CANARY-user",
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "CANARY-thought <abs_vis_token>CANARY-marker</abs_vis_token>"},
                    {"type": "image", "image": picture(f"auxiliary{number}", OTHER_COLOR)},
                    {"type": "text", "text": f"<observation>CANARY-seen</observation> \\boxed{{CANARY-y{number}}}"},
                ],
            },
        ],
        "answer": "CANARY-key",
    }


def visual_cot(number, picture):
    return {
        "question_id": f"id{number}",
        "dataset": "CANARY-dataset",
        "image": [
            picture(f"question{number}", QUESTION_COLOR),
            picture(f"region{number}", OTHER_COLOR) + "###[1, 2, 30, 40]",
        ],
        "conversations": [
            {"from": "human", "value": f"<image>\n{QUESTION} {number}{BOX_REQUEST}"},
            {"from": "gpt", "value": "CANARY-box"},
            {"from": "human", "value": "<image>CANARY-third"},
            {"from": "gpt", "value": f"CANARY-y{number}"},
        ],
    }


def refocus(number, picture):
    return {
        "id": f"id{number}",
        "image": picture(f"question{number}", QUESTION_COLOR),
        "question": f"{QUESTION} {number}",
        "answer": f"CANARY-y{number}",
        "thoughts": "CANARY-thought",
        "edited_image": picture(f"edited{number}", OTHER_COLOR),
        "code": "CANARY-code",
        "bboxes": {"x": "CANARY-nested"},
    }


def zebra_cot(number, picture):
    return {
        "Question": f"<image_start>[problem_image_1]<image_end>\n{QUESTION} {number}",
        "Text Reasoning Trace": "THOUGHT 0: CANARY-thought <image_start>[reasoning_image_1]<image_end>\nTHOUGHT 1: CANARY-more",
        "Final Answer": f"CANARY-y{number}",
        "problem_image_1": picture(f"question{number}", QUESTION_COLOR),
        "problem_image_2": None,
        "reasoning_image_1": picture(f"reasoning{number}", OTHER_COLOR),
        "reasoning_image_2": None,
    }


def llava(number, picture):
    return {
        "id": f"id{number}",
        "image": picture(f"question{number}", QUESTION_COLOR),
        "conversations": [
            {"from": "system", "value": "CANARY-system"},
            {"from": "human", "value": f"<image>\n{QUESTION} {number}"},
            {"from": "gpt", "value": f"CANARY-y{number}"},
        ],
        "source": "CANARY-source",
    }


def llava_two_turns(number, picture):
    record = llava(number, picture)
    record["conversations"] += [
        {"from": "human", "value": f"{QUESTION} {number}"},
        {"from": "gpt", "value": f"CANARY-y{number}"},
    ]
    return record


def blink(number, picture):
    return {
        "idx": f"id{number}",
        "question": "CANARY-question",
        "sub_task": "CANARY-task",
        "image_1": picture(f"question{number}", QUESTION_COLOR),
        **dict.fromkeys(("image_2", "image_3", "image_4")),
        "choices": ["CANARY-choice", "CANARY-other"],
        "answer": f"CANARY-y{number}",
        "prompt": f"{QUESTION} {number}",
        "explanation": "CANARY-thought",
    }


def trl_texts(number, picture):
    return {
        "id": f"id{number}",
        "images": [picture(f"question{number}", QUESTION_COLOR)],
        "prompt": f"<image>\n{QUESTION} {number}",
        "completion": f"CANARY-y{number}",
        "thinking": "CANARY-thought",
        "edited_image": picture(f"edited{number}", OTHER_COLOR),
    }


def trl_messages(number, picture):
    return {
        "image": picture(f"question{number}", QUESTION_COLOR),
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{QUESTION} {number}"}]}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": f"CANARY-y{number}"}]}],
        "rationale": "CANARY-thought",
    }


def trl_plain_messages(number, picture):
    return {
        "images": [picture(f"question{number}", QUESTION_COLOR)],
        "messages": [
            {"role": "user", "content": f"{QUESTION} {number}"},
            {"role": "assistant", "content": f"CANARY-y{number}"},
        ],
        "rationale": "CANARY-thought",
    }


def trl_inline(number, picture):
    return {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": picture(f"question{number}", QUESTION_COLOR)},
                    {"type": "text", "text": f"{QUESTION} {number}"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": f"CANARY-y{number}"}]},
        ],
        "rationale": "CANARY-thought",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Sources on disk
# ---------------------------------------------------------------------------------------------------------------------


def encoded(image, format="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **settings)
    return buffer.getvalue()


def flat(color, size=(24, 16)):
    return encoded(Image.new("RGB", size, color))


FLAT = {color: flat(color) for color in (QUESTION_COLOR, OTHER_COLOR, SECRET_COLOR)}


def files_under(root, replaced=(), folder="images"):
    """A `picture` that writes files below `root`; `replaced` has other contents by name."""

    def picture(name, color):
        path = root / folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dict(replaced).get(name, FLAT[color]))
        return f"{folder}/{name}.png"

    return picture


def cells(replaced=()):
    """A `picture` that gives what a table's cell holds."""
    return lambda name, color: {"bytes": dict(replaced).get(name, FLAT[color]), "path": f"{name}.png"}


def write_json(root, records, name="train.json"):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in records))


def features_of(*values):
    """Features of all the values, in which what looks like an image is one."""
    values = [value for value in values if value is not None]
    first = values[0] if values else {"bytes": None, "path": None}
    if isinstance(first, dict) and set(first) == {"bytes", "path"}:
        return ImageFeature()
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: features_of(*(value.get(key) for value in values)) for key in keys}
    if isinstance(first, list):
        return List(features_of(*(item for value in values for item in value)))
    return Value("string")


def to_dataset(records):
    return Dataset.from_list(records, features=Features(features_of(*records)))


def write_parquet(folder, records, split="train", with_features=True, num_files=3):
    folder.mkdir(parents=True, exist_ok=True)
    num_files = min(num_files, len(records))
    for number in range(num_files):
        path = folder / f"{split}-{number:05d}-of-{num_files:05d}.parquet"
        some = records[number::num_files]
        if with_features:
            pq.write_table(to_dataset(some).data.table, path)  # as it is: `to_parquet` would look for the paths
        else:
            pq.write_table(pa.Table.from_pylist(some), path)


@dataclass(frozen=True)
class Case:
    """A source of a format: what a record is, and how the records are written."""

    format: str
    record: Any
    kind: str
    rows_per_record: int = 1
    rationale: str = "CANARY-y{}"  # what y is with `answer="rationale"`

    @property
    def id(self):
        return f"{self.record.__name__}-{self.kind}"

    @property
    def is_table(self):
        return not self.kind.startswith("json")

    def write(self, root, number=NUM_RECORDS, replaced=(), change=lambda records: None):
        folder = "ReFocus/images" if self.format == "monet" else "images"
        picture = cells(replaced) if self.is_table else files_under(root, replaced, folder)
        records = [self.record(i, picture) for i in range(number)]
        change(records)
        match self.kind:
            case "json" | "jsonl":
                write_json(root, records, f"ReFocus/train.{self.kind}" if self.format == "monet" else f"a.{self.kind}")
            case "parquet":
                write_parquet(root, records)
            case "plain parquet":
                write_parquet(root, records, with_features=False)
            case "one parquet file":
                write_parquet(root, records, num_files=1)
                return root / "train-00000-of-00001.parquet"
            case "saved":
                to_dataset(records).save_to_disk(str(root), num_shards=2)
            case "saved splits":
                DatasetDict({"train": to_dataset(records)}).save_to_disk(str(root))
            case "data folder":  # as `push_to_hub` writes it
                write_parquet(root / "data", records)
            case "configs" | "configs, card" | "configs, card names them":
                half = (number + 1) // 2
                for name, some in (("Chess", records[:half]), ("2D - Search", records[half:])):
                    write_parquet(root / name, some, num_files=2)
                configs = "".join(
                    f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
                    for name in ("Chess", "2D - Search")
                )
                names = f"configs:\n{configs}" if "names" in self.kind else ""
                if "card" in self.kind:
                    (root / "README.md").write_text(f"---\nlicense: cc-by-nc-4.0\n{names}---\n# Zebra\n")
        return root

    def settings(self):
        return {"config": "ReFocus"} if self.format == "monet" else {}


CASES = [
    Case("monet", monet, "json", rationale="CANARY-thought CANARY-seen \\boxed{{CANARY-y{}}}"),
    Case("monet", monet, "jsonl", rationale="CANARY-thought CANARY-seen \\boxed{{CANARY-y{}}}"),
    Case("visual_cot", visual_cot, "json", rationale="CANARY-box\nCANARY-y{}"),
    *(
        Case("refocus", refocus, kind, rationale="CANARY-thought\nCANARY-y{}")
        for kind in ("json", "parquet", "plain parquet", "one parquet file", "saved", "saved splits", "data folder")
    ),
    *(
        Case("zebra_cot", zebra_cot, kind, rationale="CANARY-thought\nCANARY-more\nCANARY-y{}")
        for kind in ("configs", "configs, card", "configs, card names them", "parquet")
    ),
    *(Case("llava", llava, kind) for kind in ("json", "jsonl", "parquet")),
    Case("llava", llava_two_turns, "json", rows_per_record=2),
    Case("blink", blink, "parquet", rationale="CANARY-thought\nCANARY-y{}"),
    *(Case("trl", trl_texts, kind) for kind in ("json", "parquet", "saved")),
    *(Case("trl", trl_messages, kind) for kind in ("jsonl", "parquet", "plain parquet")),
    Case("trl", trl_plain_messages, "parquet"),
    *(Case("trl", trl_inline, kind) for kind in ("json", "parquet", "plain parquet")),
]
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
ONE_EACH = list({case.record: case for case in CASES}.values())  # of each shape of record
each_record = pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.id)
JSON_CASES = [replace(case, kind="json") for case in ONE_EACH]


def key_of(row):
    """All of a row, comparable."""
    pictures = tuple((picture.mode, picture.size, picture.tobytes()) for picture in row["images"])
    texts = json.dumps([row["prompt"], row["completion"]], sort_keys=True)
    return row["source"], row["row_id"], texts, pictures


def prompt_text(row):
    return "".join(part["text"] or "" for turn in row["prompt"] for part in turn["content"])


def completion_text(row):
    ((part,),) = (turn["content"] for turn in row["completion"])
    return part["text"]


def counts_of(report):
    return {
        name: (source.read, source.kept, source.not_sampled, dict(source.dropped), dict(source.repaired))
        for name, source in report.sources.items()
    }


def assert_adds_up(report):
    for source in report.sources.values():
        assert source.read == source.kept + sum(source.dropped.values()) + source.not_sampled


def shards_of_two(monkeypatch):
    monkeypatch.setattr(reader_module, "RECORDS_PER_SHARD", 2)


# ---------------------------------------------------------------------------------------------------------------------
# However it is read
# ---------------------------------------------------------------------------------------------------------------------


@all_cases
def test_map_style_streamed_and_loader_workers_give_the_same_rows_and_counts(case, tmp_path, monkeypatch):
    shards_of_two(monkeypatch)
    root = case.write(tmp_path / "source", replaced={"question2": b"no image"})
    settings = {**case.settings(), "answer": "rationale"}
    dataset, report = read_rows(case.format, root, **settings)
    assert dataset.features == FEATURES
    rows = sorted(map(key_of, dataset))
    assert len(rows) == (NUM_RECORDS - 1) * case.rows_per_record == len(set(rows))
    assert sum(source.read for source in report.sources.values()) == NUM_RECORDS * case.rows_per_record
    assert_adds_up(report)
    assert report.num_dropped == {"an image that cannot be read": case.rows_per_record}

    reader = open_source(case.format, root, streaming=True, **settings)
    dataset, streamed_report = reader.read()
    for _ in range(2):  # epochs: the rows of the second are not counted again
        assert sorted(map(key_of, dataset)) == rows
        assert counts_of(streamed_report) == counts_of(report)

    reader = open_source(case.format, root, streaming=True, **settings)
    dataset, loader_report = reader.read()
    if case.kind not in ("saved", "saved splits", "one parquet file"):  # those are a single shard
        assert dataset.num_shards > 1
    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    assert sorted(map(key_of, loader)) == rows
    assert counts_of(loader_report) == counts_of(report)


@each_record
def test_the_weight_and_the_limit_are_counted_and_drawn_alike_in_every_way(case, tmp_path, monkeypatch):
    shards_of_two(monkeypatch)
    root = case.write(tmp_path / "source", number=12)
    for settings, most in (({"weight": 0.5}, 12), ({"weight": 2.5}, 12), ({"max_rows": 5}, 5)):
        settings = {**case.settings(), **settings}
        dataset, report = read_rows(case.format, root, **settings)
        ids = dataset["row_id"]
        streamed, streamed_report = read_rows(case.format, root, streaming=True, **settings)
        assert [row["row_id"] for row in streamed] == ids
        assert counts_of(report) == counts_of(streamed_report)
        assert_adds_up(report)
        assert sum(source.read for source in report.sources.values()) == most * case.rows_per_record
        if settings.get("weight") == 2.5:
            assert 24 < len(ids) / case.rows_per_record < 36 and len(ids) == len(set(ids))
        if settings.get("weight") == 0.5:
            assert 0 < sum(source.not_sampled for source in report.sources.values()) < 12 * case.rows_per_record


# ---------------------------------------------------------------------------------------------------------------------
# x and y
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["answer", "rationale"])
@all_cases
def test_x_is_the_question_and_its_image_and_y_the_right_field(case, answer, tmp_path):
    root = case.write(tmp_path / "source", number=2)
    dataset, report = read_rows(case.format, root, answer=answer, streaming=True, **case.settings())
    rows = list(dataset)
    assert len(rows) == 2 * case.rows_per_record, str(report)
    expected = "CANARY-y{}" if answer == "answer" else case.rationale
    for index, row in enumerate(sorted(rows, key=prompt_text)):
        number = index // case.rows_per_record
        text = prompt_text(row)
        assert text.removeprefix("You are a helpful assistant.") == f"{QUESTION} {number}"
        assert "CANARY" not in json.dumps(row["prompt"])
        (picture,) = row["images"]
        assert picture.getcolors() == [(24 * 16, QUESTION_COLOR)]
        assert completion_text(row) == expected.format(number)


def test_an_empty_image_may_be_a_struct_of_nothing(tmp_path):
    nothing = {"bytes": None, "path": None}
    write_parquet(tmp_path / "zebra", [{**zebra_cot(0, cells()), "problem_image_2": nothing}], with_features=False)
    write_parquet(tmp_path / "blink", [{**blink(0, cells()), "image_2": nothing}], with_features=False)
    for format, folder in (("zebra_cot", "zebra"), ("blink", "blink")):
        (row,) = read_rows(format, tmp_path / folder)[0]
        assert len(row["images"]) == 1


def test_plain_turns_may_say_where_their_images_stand(tmp_path):
    picture = files_under(tmp_path)
    images = [picture("a", QUESTION_COLOR), picture("b", OTHER_COLOR)]

    def record(*asked):
        turns = [{"role": role, "content": text} for text in asked for role, text in (("user", text), ("assistant", "Yes"))]  # fmt: skip
        return {"images": images, "messages": turns}

    rows = [record("<image>\nOne?", "And <image>?"), record("One?", "And?"), record("One?", "And <image><image>?")]
    write_json(tmp_path, [*rows, record("<image>\nOne?", "And?"), record("<image>\nOne?", "<image><image>?")])
    dataset, report = read_rows("trl", tmp_path)
    shapes = [[[part["text"] or 0 for part in turn["content"]] for turn in row["prompt"]] for row in dataset]
    assert shapes == [
        [[0, "One?"], ["Yes"], ["And ", 0, "?"]],
        [[0, 0, "One?"], ["Yes"], ["And?"]],
        [["One?"], ["Yes"], ["And ", 0, 0, "?"]],
    ]
    assert report.num_dropped == {"placeholders that do not match its images": 2}


def test_several_images_stand_where_their_placeholders_do(tmp_path):
    picture = cells()
    record = zebra_cot(0, picture)
    record["problem_image_2"] = picture("second", OTHER_COLOR)
    record["Question"] = "A <image_start>[problem_image_2]<image_end> B <image_start>[problem_image_1]<image_end>\nC"
    write_parquet(tmp_path, [record], num_files=1)
    (row,) = read_rows("zebra_cot", tmp_path)[0]
    (turn,) = row["prompt"]
    assert [part["text"] or "image" for part in turn["content"]] == ["A", "image", "B", "image", "C"]
    assert [image.getpixel((0, 0)) for image in row["images"]] == [OTHER_COLOR, QUESTION_COLOR]


def test_eleven_problem_images_come_in_the_order_of_their_numbers(tmp_path):
    picture = cells()
    record = {**zebra_cot(0, picture), "Question": "Which?"}
    record |= {f"problem_image_{n}": {"bytes": flat((n, n, n)), "path": None} for n in range(11, 0, -1)}
    write_parquet(tmp_path, [record], num_files=1)
    (row,) = read_rows("zebra_cot", tmp_path)[0]
    assert [image.getpixel((0, 0))[0] for image in row["images"]] == list(range(1, 12))


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        (f"What is 3.5 km away?{BOX_REQUEST}", "What is 3.5 km away?"),
        (f"What is it?\n{BOX_REQUEST.strip()}", "What is it?"),
        (f"Who is Dr. Smith{BOX_REQUEST}", "Who is Dr. Smith"),
        (f"{BOX_REQUEST.strip()} What is e.g. red?", "What is e.g. red?"),
        ("Is it 1.5 m? Please provide the bounding box coordinates [0.1, 0.2] of it.", "Is it 1.5 m?"),
        ("Is it red? Provide the bounding box of the region.", "Is it red?"),
        ("Is it red? PLEASE PROVIDE A BOUNDING BOX!", "Is it red?"),
        ("What colour is the bounding box around the U.S. flag?", None),
        ("Please read the text in the bounding box.", None),
        ("Does the sign provide a bounding box?", None),
        ("Please tell me who won.", None),
    ],
)
def test_the_sentence_that_asks_for_a_box_goes_and_nothing_else(asked, kept, tmp_path):
    record = visual_cot(0, files_under(tmp_path))
    record["conversations"][0]["value"] = f"<image>\n{asked}"
    write_json(tmp_path, [record], "viscot_363k.json")
    (row,) = read_rows("visual_cot", tmp_path)[0]
    assert prompt_text(row) == (kept or asked)


def test_each_question_of_a_conversation_is_asked_without_the_turns_before(tmp_path):
    record = llava(0, files_under(tmp_path))
    record["conversations"] = [
        {"from": "human", "value": "First?\n<image>"},
        {"from": "gpt", "value": "one"},
        {"from": "human", "value": "Second?"},
        {"from": "gpt", "value": ""},
        {"from": "human", "value": "Third <image><image>?"},
        {"from": "gpt", "value": "three"},
        {"from": "human", "value": "Fourth?"},
        {"from": "gpt", "value": "four"},
    ]
    write_json(tmp_path, [record])
    dataset, report = read_rows("llava", tmp_path)
    assert dataset["row_id"] == ["id0 turn 1", "id0 turn 4"]
    assert [(prompt_text(row), completion_text(row)) for row in dataset] == [("First?", "one"), ("Fourth?", "four")]
    assert report.dropped == {
        "an empty answer": ["id0 turn 2"],
        "placeholders that do not match its images": ["id0 turn 3"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Images that cannot be used
# ---------------------------------------------------------------------------------------------------------------------


def bomb(width, height):
    """A PNG that says that it is large, and holds next to nothing."""

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def gradient(mode="RGB", size=(64, 40)):
    return Image.linear_gradient("L").resize(size).convert(mode)


def rotated():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(gradient(), "JPEG", exif=exif)


def with_broken_checksum():
    data = bytearray(flat(QUESTION_COLOR))
    data[-13] ^= 1  # the last byte of the last chunk of pixels; the end chunk has twelve
    return bytes(data)


def animated():
    first, *others = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    return encoded(first, "GIF", save_all=True, append_images=others)


JPEG = encoded(Image.effect_noise((80, 60), 90), "JPEG")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
BAD_IMAGES = {
    "a text": (b"this is no image", "an image that cannot be read"),
    "no bytes": (b"", "an image that cannot be read"),
    "a truncated JPEG": (JPEG[: len(JPEG) * 2 // 3], "an image that is damaged or cut short"),
    "a JPEG without its end": (JPEG[:-2], "an image that is damaged or cut short"),
    "a truncated PNG": (encoded(gradient())[:-30], "an image that is damaged or cut short"),
    "a broken checksum": (with_broken_checksum(), "an image that is damaged or cut short"),
    "a single pixel": (flat(QUESTION_COLOR, (1, 1)), "an image with a side of less than 8 pixels"),
    "a thin line": (flat(QUESTION_COLOR, (8 * 201, 8)), "an image more than 200 times as long as wide"),
    "100 megapixels": (bomb(10_000, 10_000), "an image of more than 89 megapixels"),
    "a decompression bomb": (bomb(50_000, 50_000), "an image of more than 89 megapixels"),
    "an animation": (animated(), "an image of several frames"),
    "a program": (EPS, "an image that cannot be read"),
}
MENDED = {
    "CMYK": (encoded(gradient("CMYK"), "JPEG"), "an image in CMYK", (64, 40)),
    "16 bits": (encoded(gradient("I;16")), "an image of more than 8 bits", (64, 40)),
    "floating point": (encoded(gradient("F"), "TIFF"), "an image of more than 8 bits", (64, 40)),
    "rotated": (rotated(), "an image that its EXIF data rotate", (40, 64)),
}
DEFECTS = {name: value[:2] for name, value in {**BAD_IMAGES, **MENDED}.items()}


@pytest.mark.parametrize("case", [*JSON_CASES, *(case for case in ONE_EACH if case.is_table)], ids=lambda case: case.id)  # fmt: skip
def test_bad_images_are_dropped_repaired_or_raise(case, tmp_path):
    replaced = {f"question{number}": content for number, (content, _) in enumerate(DEFECTS.values())}
    root = case.write(tmp_path / "source", number=len(DEFECTS) + 1, replaced=replaced)
    per_record, settings = case.rows_per_record, case.settings()
    reader = open_source(case.format, root, **settings)
    dataset, report = reader.read()
    assert len(dataset) == per_record
    assert report.num_dropped == Counter(reason for _, reason in DEFECTS.values() for _ in range(per_record))
    assert_adds_up(report)
    told = str(report)
    for reason, examples in report.dropped.items():
        assert f"{reason}, for example {', '.join(examples)}" in told and len(examples) == min(
            3, report.num_dropped[reason]
        )

    dataset, report = read_rows(case.format, root, bad_rows="repair", **settings)
    assert len(dataset) == (len(MENDED) + 1) * per_record
    assert report.num_dropped == Counter(reason for _, reason in BAD_IMAGES.values() for _ in range(per_record))
    repaired = sum((source.repaired for source in report.sources.values()), Counter())
    assert repaired == Counter(reason for _, reason, _ in MENDED.values() for _ in range(per_record))
    assert_adds_up(report)
    for row in dataset:
        (picture,) = row["images"]
        number = int(prompt_text(row).split()[-1])
        size = {len(BAD_IMAGES) + i: size for i, (_, _, size) in enumerate(MENDED.values())}.get(number, (24, 16))
        assert picture.mode == "RGB" and picture.size == size
        assert ExifTags.Base.Orientation not in picture.getexif()
        if size != (24, 16):
            assert picture.getextrema()[0][1] - picture.getextrema()[0][0] > 200  # scaled, not clipped

    first = next(iter(DEFECTS.values()))[1]
    with pytest.raises(ValueError, match=rf"Row '.+' of `.+`: {first}(.|\n)*`bad_rows='drop'`"):
        read_rows(case.format, root, bad_rows="raise", **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing outside the root is read
# ---------------------------------------------------------------------------------------------------------------------


NAMES_OUTSIDE = {
    "up": "../outside/secret.png",
    "up and down": "images/../../outside/secret.png",
    "backslashes": "..\\outside\\secret.png",
    "absolute": "{outside}/secret.png",
    "a link": "link.png",
    "a linked folder": "linked/secret.png",
    "a chain of links": "chain.png",
    "an address": "file://{outside}/secret.png",
    "a neighbour whose name begins alike": "../source-2/secret.png",
    "another address": "https://example.com/secret.png",
    "of the Hub": "hf://datasets/someone/else/secret.png",
    "of memory": "memory://secret.png",
    "zipped": "zip://secret.png::{outside}/secret.zip",
}
NAMES_MISSING = {
    "nothing there": "images/gone.png",
    "a folder": "images",
    "the root": ".",
    "a pipe": "pipe",
    "a ring of links": "ring-a",
    "a link to nothing": "dangling.png",
    "too long": "a" * 5000,
    "many levels": "a/" * 3000,
    "half a character": "\ud800.png",
    "home": "~/secret.png",
}
NO_NAMES = {"empty": "", "blank": "  ", "of nothing to see": "\u200b"}


def with_outside(root):
    """A readable secret outside `root`, and ways to it."""
    outside = root.parent / "outside"
    for folder in (outside, root.parent / f"{root.name}-2", root / "images"):
        folder.mkdir(parents=True, exist_ok=True)
    for folder in (outside, root.parent / f"{root.name}-2"):
        (folder / "secret.png").write_bytes(FLAT[SECRET_COLOR])
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "linked").symlink_to(outside, target_is_directory=True)
    (root / "chain.png").symlink_to(root / "link.png")
    (root / "ring-a").symlink_to(root / "ring-b")
    (root / "ring-b").symlink_to(root / "ring-a")
    (root / "dangling.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "pipe")
    return outside


TEXTS_ALONE = ("monet", "visual_cot")  # formats in which an image is no dict


@pytest.mark.parametrize(
    ("case", "as_dict"),
    [
        pytest.param(case, as_dict, id=f"{case.id}-{'dict' if as_dict else 'text'}")
        for case in JSON_CASES
        for as_dict in (False, True)
        if not (as_dict and case.format in TEXTS_ALONE)
    ],
)
def test_no_file_outside_the_root_is_read(case, as_dict, tmp_path):
    root = tmp_path / "source"
    outside = with_outside(root)
    names = [name.format(outside=outside) for name in (*NAMES_OUTSIDE.values(), *NAMES_MISSING.values())]
    names += ["\0" + names[0], *NO_NAMES.values()]
    write = files_under(root)

    def picture(name, color):
        number = name.removeprefix("question")
        if not number.isdigit() or int(number) >= len(names):
            return write(name, color)
        return {"bytes": None, "path": names[int(number)]} if as_dict else names[int(number)]

    records = [case.record(number, picture) for number in range(len(names) + 1)]
    write_json(root, records, "ReFocus/train.json" if case.format == "monet" else "a.json")
    dataset, report = read_rows(case.format, root, **case.settings())
    assert len(dataset) == case.rows_per_record
    assert all(row["images"][0].getpixel((0, 0)) == QUESTION_COLOR for row in dataset)
    expected = {
        "an image outside the data folder": len(NAMES_OUTSIDE) + 1,
        "an image file that is missing": len(NAMES_MISSING),
        "an image that is no path": len(NO_NAMES),
    }
    assert report.num_dropped == {reason: n * case.rows_per_record for reason, n in expected.items()}

    # The secret is there to be read: with the folder around both as the root, the first name leads to it.
    dataset, _ = read_rows(case.format, root, image_root=tmp_path / "source-2" / "..", **case.settings())
    secret = [row for row in dataset if row["images"][0].getpixel((0, 0)) == SECRET_COLOR]
    assert secret


@pytest.mark.parametrize("with_features", [True, False], ids=["features", "plain"])
@pytest.mark.parametrize("case", [case for case in ONE_EACH if case.format not in TEXTS_ALONE], ids=lambda case: case.id)  # fmt: skip
def test_a_tables_paths_lead_to_nothing_outside_the_root(case, with_features, tmp_path):
    root = tmp_path / "source"
    outside = with_outside(root)
    names = [name.format(outside=outside) for name in NAMES_OUTSIDE.values()]

    def picture(name, color):
        number = name.removeprefix("question")
        is_named = number.isdigit() and int(number) < len(names)
        return {"bytes": None, "path": names[int(number)]} if is_named else cells()(name, color)

    records = [case.record(number, picture) for number in range(len(names) + 1)]
    write_parquet(root, records, with_features=with_features, num_files=1)
    dataset, report = read_rows(case.format, root)
    assert [row["images"][0].getpixel((0, 0)) for row in dataset] == [QUESTION_COLOR] * case.rows_per_record
    assert report.num_dropped == {"an image outside the data folder": len(names) * case.rows_per_record}


@pytest.mark.parametrize("value", [7, 0.5, True, {}, {"bytes": "text"}, {"path": 7}, [], [["images/gone.png"]], {"path": None}], ids=repr)  # fmt: skip
def test_what_is_no_image_is_dropped(value, tmp_path):
    records = [llava(0, files_under(tmp_path)), {**llava(1, files_under(tmp_path)), "image": value}]
    write_json(tmp_path, records)
    dataset, report = read_rows("llava", tmp_path)
    assert len(dataset) == 1 and sum(report.num_dropped.values()) == 1
    assert list(report.dropped.values()) == [["id1"]]


# ---------------------------------------------------------------------------------------------------------------------
# Records that are something else
# ---------------------------------------------------------------------------------------------------------------------


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


ODD_VALUES = [
    None, 7, -1, 10**4000, 0.5, math.nan, True, "", "  ", "\0", "\u200b", "\ud800", "a" * 5000, "../outside/secret.png",
    "<image>", "<image><image>", "<image_start>[problem_image_1]<image_end>", "<image_start>[reasoning_image_1]<image_end>",
    "<image_start>", "\\boxed{", "\\boxed{}", "assistant", "user", "tool", "hidden", [], {}, [None], [[]], [7], ["images/a.png"],
    {"bytes": None}, {"path": None}, {"bytes": b"", "path": None}, {"bytes": 7, "path": 7}, {"type": "text"}, b"\xff", deep(5000),
]  # fmt: skip
ODD_KEYS = {"problem_image_x": "a", "problem_image_99": 7, "problem_image_": [], "messages": None, "images": 7}


def places(value, at=()):
    """The way to everything inside a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def mutated(record):
    """Copies of a record with something replaced, gone, or twice."""
    for *way, last in list(places(record)):
        for number in range(len(ODD_VALUES) + 2):
            copy = deepcopy(record)
            parent = copy
            for key in way:
                parent = parent[key]
            if number < len(ODD_VALUES):
                parent[last] = ODD_VALUES[number]
            elif number == len(ODD_VALUES):
                del parent[last]
            elif isinstance(parent, list):
                parent.insert(last, parent[last])
            yield copy
    yield from ({**record, key: value} for key, value in ODD_KEYS.items())
    yield from ODD_VALUES


def reader_of(case, root, records, **settings):
    """A reader of a source, given other records: also such as no file could hold."""
    reader = open_source(case.format, case.write(root, number=1), **case.settings(), **settings)
    reader.records = lambda shard: ((f"record {n}", f"{n}", record) for n, record in enumerate(records))
    return reader


@pytest.mark.parametrize("answer", ["answer", "rationale"])
@pytest.mark.parametrize("case", JSON_CASES, ids=lambda case: case.id)
def test_no_record_can_stop_a_reader(case, answer, tmp_path):
    records = [*mutated(case.record(0, files_under(tmp_path / "source")))]
    assert len(records) > 300
    reader = reader_of(case, tmp_path / "source", records, answer=answer)
    (shard,) = reader.all_shards
    rows = list(reader.rows(shard))
    assert rows and pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema).num_rows == len(rows)
    report = reader.report
    assert_adds_up(report)
    (source,) = report.sources.values()
    assert source.read >= len(records) and source.kept == len(rows) and source.kept < source.read
    assert len(source.dropped) < 20, "the reasons are phrases that many records share"
    json.dumps(report.to_dict()), str(report)
    for row in rows:
        assert all(isinstance(part["text"], str) or part["type"] == "image" for m in row["prompt"] for part in m["content"])  # fmt: skip
        assert "secret" not in str(row["images"])

    # What is dropped raises, if asked to, and always as a `ValueError` that names row, reason and remedy.
    for examples in source.examples.values():
        number = int(examples[0]["row_id"].split()[1])
        raising = reader_of(case, tmp_path / "source", [records[number]], answer=answer, bad_rows="raise")
        with pytest.raises(ValueError) as raised:
            list(raising.rows(shard))
        assert re.search("^Row 'record 0.*`bad_rows='drop'`", str(raised.value), re.DOTALL)
        assert any(f": {reason}" in str(raised.value) for reason in source.examples)


def set_in(*way):
    """A change of a record: the value at the end of `way` becomes another, the last of its arguments."""
    *way, last, value = way

    def change(record):
        for key in way:
            record = record[key]
        record[last] = value

    return change


TURN = {"from": "human", "value": "And now?"}
MALFORMED = {
    "monet": [
        (set_in("data", 2, "content", 2, "text", "no box"), "no boxed answer"),
        (set_in("data", 2, "content", 2, "text", "\\boxed{ \0 }"), "an empty answer"),
        (set_in("data", 1, "content", 1, "text", " "), "no text in the question"),
        (set_in("data", 1, "content", 1, "text", "<image> What?"), "placeholders that do not match its images"),
        (set_in("data", 1, "role", "tool"), "not one turn each of system, user and assistant, made of texts and images"),  # fmt: skip
        (set_in("data", [], ), "no user or no assistant turn"),
        (lambda record: record["data"][1]["content"].pop(0), "no image in the question"),
    ],
    "visual_cot": [
        (set_in("conversations", 3, "value", None), "an answer that is no text"),
        (set_in("conversations", 3, "value", "  "), "an empty answer"),
        (set_in("conversations", 0, "value", 7), "a question that is no text"),
        (set_in("conversations", 0, "value", BOX_REQUEST), "no text in the question"),
        (set_in("conversations", 0, "value", "<image><image> What?"), "placeholders that do not match its images"),
        (lambda record: record["conversations"].append(TURN), "turns that do not alternate from user to assistant"),
        (lambda record: record.update(conversations=record["conversations"][:2]), "not four turns"),
        (set_in("image", []), "an image that is no path"),
    ],
    "refocus": [
        (set_in("answer", None), "an answer that is no text"),
        (set_in("answer", 7), "an answer that is no text"),
        (set_in("answer", "\u0000"), "an empty answer"),
        (set_in("answer", "half \ud800"), "a text that is no Unicode"),
        (set_in("question", []), "a question that is no text"),
        (set_in("question", "<image> <image> What?"), "placeholders that do not match its images"),
        (set_in("image", None), "an image that is missing"),
    ],
    "zebra_cot": [
        (set_in("Final Answer", []), "an answer that is no text"),
        (set_in("Question", None), "a question that is no text"),
        (set_in("Question", "<image_start>[problem_image_1]<image_end> <image_start>[problem_image_2]<image_end> What?"), "placeholders that do not match its images"),  # fmt: skip
        (set_in("Question", "<image_start>[reasoning_image_1]<image_end> What?"), "placeholders that do not match its images"),  # fmt: skip
        (set_in("Question", "<image_start>[picture]<image_end> What?"), "placeholders that do not match its images"),
        (set_in("problem_image_1", None), "placeholders that do not match its images"),
        (set_in("problem_image_2", {"bytes": b"", "path": None}), "placeholders that do not match its images"),
    ],
    "llava": [
        (set_in("conversations", 2, "value", {}), "an answer that is no text"),
        (set_in("conversations", 2, "value", "<image> Yes"), "placeholders that do not match its images"),
        (set_in("conversations", 1, "value", "<image> <image> What?"), "placeholders that do not match its images"),
        (set_in("conversations", 1, "from", "somebody"), "a turn without `from` and `value`"),
        (set_in("conversations", 1, "from", "gpt"), "turns that do not alternate from user to assistant"),
        (set_in("conversations", []), "turns that do not alternate from user to assistant"),
        (set_in("conversations", "What?"), "no `conversations`"),
        (set_in("image", None), "placeholders that do not match its images"),
        (lambda record: record.pop("image") and set_in("conversations", 1, "value", "What?")(record), "no image in the question"),  # fmt: skip
    ],
    "blink": [
        (set_in("answer", "hidden"), "a hidden answer"),
        (set_in("prompt", None), "a question that is no text"),
        (set_in("prompt", ""), "no text in the question"),
        (set_in("prompt", "<image> What?"), "placeholders that do not match its images"),
        (set_in("image_1", None), "no image in the question"),
    ],
    "trl": [
        (set_in("prompt", ""), "a row that is not in TRL's format"),
        (set_in("prompt", "<image><image> What?"), "placeholders that do not match its images"),
        (set_in("prompt", None), "a row that is not in TRL's format"),
        (set_in("completion", ""), "an empty answer"),
        (set_in("completion", 7), "a row that is not in TRL's format"),
        (set_in("completion", []), "a row that is not in TRL's format"),
        (set_in("messages", [{"role": "user", "content": "What?"}]), "a row that is not in TRL's format"),
        (set_in("messages", [{"role": "assistant", "content": "Yes"}]), "a row that is not in TRL's format"),
        (set_in("messages", [{"role": "judge", "content": "What?"}, {"role": "assistant", "content": "Yes"}]), "a row that is not in TRL's format"),  # fmt: skip
        (set_in("messages", [{"role": "system", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]), "placeholders that do not match its images"),  # fmt: skip
        (set_in("messages", [{"role": "user", "content": "<image> <image> What?"}, {"role": "assistant", "content": "Yes"}]), "placeholders that do not match its images"),  # fmt: skip
        (set_in("messages", [{"role": "user", "content": "What?"}, {"role": "assistant", "content": [{"type": "image"}]}]), "an image in the answer"),  # fmt: skip
        (set_in("messages", [{"role": "user", "content": "What?"}, {"role": "assistant", "content": None}]), "an empty answer"),  # fmt: skip
        (set_in("messages", [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A long answer"}, {"role": "user", "content": "Again?"}, {"role": "assistant", "content": "A long answer"}]), "an answer that stands in an earlier turn"),  # fmt: skip
        (set_in("images", []), "placeholders that do not match its images"),
    ],
}  # fmt: skip
SHAPES = {"trl": trl_texts}


@pytest.mark.parametrize("format", MALFORMED)
def test_malformed_records_are_dropped_each_for_its_reason(format, tmp_path):
    assert set(MALFORMED) == set(READERS)
    case = Case(format, SHAPES.get(format, globals().get(format)), "json")
    records, expected = [], Counter({"a record that is no record": 4})
    for number, (change, reason) in enumerate(MALFORMED[format]):
        record = case.record(number, files_under(tmp_path / "source"))
        change(record)
        records.append(record)
        expected[reason] += 1
    records += [None, [], "a text", 7, case.record(99, files_under(tmp_path / "source"))]
    reader = reader_of(case, tmp_path / "source", records)
    (row,) = reader.rows(*reader.all_shards)
    assert reader.report.num_dropped == expected


def test_lines_that_are_no_json_are_dropped_and_named(tmp_path):
    good = json.dumps(llava(0, files_under(tmp_path))).encode()
    lines = [good, b'{"id": ', b"\xff\xfe", b'{"id": ' + b"7" * 5000 + b"}", b"[" * 100_000, b"", good]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    dataset, report = read_rows("llava", tmp_path)
    assert len(dataset) == 2 and report.num_dropped == {"a line that is no JSON": 4}
    assert report.dropped["a line that is no JSON"] == ["record 1", "record 2", "record 3"]
    with pytest.raises(ValueError, match="Row 'record 1' of .*: a line that is no JSON .*a.jsonl, line 2"):
        read_rows("llava", tmp_path, bad_rows="raise")


def test_a_file_that_was_written_anew_is_read_anew(tmp_path):
    for number in range(3):
        write_json(tmp_path, [llava(number, files_under(tmp_path))])
        assert read_rows("llava", tmp_path)[0]["row_id"] == [f"id{number}"]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused before a row is read
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer": "both"}, "`answer` must be 'answer' or 'rationale', got 'both'"),
        ({"bad_rows": "skip"}, "`bad_rows` must be 'drop', 'repair' or 'raise', got 'skip'"),
        ({"bad_rows": None}, "`bad_rows` must be .*, got None"),
        ({"weight": 0}, "`weight` must be a number above 0, got 0"),
        ({"weight": "2"}, "`weight` must be a number above 0, got '2'"),
        ({"weight": math.nan}, "`weight` must be a number above 0, got nan"),
        ({"max_rows": 0}, "`max_rows` must be at least 1, got 0"),
        ({"max_rows": 1.5}, "`max_rows` must be at least 1, got 1.5"),
        ({"config": 7}, "`config` must be a name or a list of names, got 7"),
        ({"config": []}, r"`config` must be a name or a list of names, got \[\]"),
        ({"config": [7]}, r"`config` must be a name or a list of names, got \[7\]"),
        ({"config": "nothing"}, r"`config` names \['nothing'\], but .* has"),
        ({"split": 7}, "`split` must be a text, got 7"),
        ({"split": None}, "`split` must be a text, got None"),
        ({"revision": 7}, "`revision` must be a text, got 7"),
        ({"image_root": 7}, "`image_root` must be an existing folder, got '7'"),
        ({"source": ""}, "`source` must be a text, got ''"),
        ({"streaming": "yes"}, "`streaming` must be `True` or `False`, got 'yes'"),
        ({"filters": "trainer.data.filters.answer_words"}, "`filters` must be a list, got 'trainer"),
        ({"filters": ["nothing"]}, "`filters` names 'nothing', which cannot be loaded"),
        ({"image_root": "nowhere"}, "`image_root` must be an existing folder, got 'nowhere'"),
        ({"colour": "red"}, r"is given \['colour'\], which no reader knows: choose among"),
    ],
)
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_settings_that_cannot_be_used_are_refused(kind, settings, message, tmp_path):
    root = Case("refocus", refocus, kind).write(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_source("refocus", root, **settings)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("max_rows", [None, 1])
@pytest.mark.parametrize("kind", ["parquet", "saved splits"])
def test_a_missing_split_is_refused(kind, max_rows, streaming, tmp_path):
    root = Case("refocus", refocus, kind).write(tmp_path)
    with pytest.raises(ValueError, match=r"`split` is 'val', but `.*` has \['train'\]"):
        open_source("refocus", root, split="val", max_rows=max_rows, streaming=streaming)


@pytest.mark.parametrize("kind", ["configs", "configs, card", "configs, card names them"])
def test_configs_are_read_by_name_and_unknown_ones_refused(kind, tmp_path):
    root = Case("zebra_cot", zebra_cot, kind).write(tmp_path)
    dataset, report = read_rows("zebra_cot", root, config="2D - Search")
    assert report.kept == {"2D - Search": 3} and set(dataset["source"]) == {"2D - Search"}
    assert dataset.info.license == "2D - Search: cc-by-nc-4.0"
    for name in ("2D", "..", "."):
        with pytest.raises(ValueError, match=r"`config` names \['\.{0,2}(2D)?'\], but .*'Chess'"):
            open_source("zebra_cot", root, config=["Chess", name])


def test_configs_may_have_other_columns_than_each_other(tmp_path):
    write_parquet(tmp_path / "Chess", [zebra_cot(0, cells())])
    write_parquet(tmp_path / "Maze", [{**zebra_cot(1, cells()), "problem_image_3": None, "solution": "CANARY"}])
    dataset, report = read_rows("zebra_cot", tmp_path)
    assert report.kept == {"Chess": 1, "Maze": 1}


@pytest.mark.parametrize("format", READERS)
def test_a_place_without_anything_to_read_is_refused(format, tmp_path):
    with pytest.raises(ValueError, match=rf"`{tmp_path}/gone` is neither an existing folder or file nor the id"):
        open_source(format, tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"`{tmp_path}/empty`"):
        open_source(format, tmp_path / "empty")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="`.*`"):
        open_source(format, tmp_path / "table.csv")


@pytest.mark.parametrize("content", [b"", b"PAR1 and nothing else"])
def test_a_table_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "train.parquet").write_bytes(content)
    for name in (tmp_path, tmp_path / "train.parquet"):
        with pytest.raises(ValueError, match=f"`{name}` cannot be read as a dataset"):
            read_rows("refocus", name)


@pytest.mark.parametrize(
    "card", ["---\nlicense: [mit\n---\n", "---\nlicense: [mit, 7]\n---\n", "---\n- a\n---\n", "no metadata"]
)
def test_an_odd_card_stops_nothing_but_with_a_reason(card, tmp_path):
    root = Case("refocus", refocus, "parquet").write(tmp_path)
    (root / "README.md").write_text(card)
    try:
        assert len(read_rows("refocus", root)[0]) == NUM_RECORDS
    except ValueError as error:
        assert str(error).startswith(f"`{root}` cannot be read as a dataset: ")


def test_several_files_are_refused_until_one_is_named(tmp_path):
    for name in ("a.json", "b.jsonl"):
        write_json(tmp_path, [llava(0, files_under(tmp_path))], name)
    with pytest.raises(
        ValueError, match=r"has several files, \['a.json', 'b.jsonl'\]: name those to read as `config`"
    ):
        open_source("llava", tmp_path)
    assert len(read_rows("llava", tmp_path, config="b.jsonl")[0]) == 1
    assert len(read_rows("llava", tmp_path, config=["a.json", "b.jsonl"])[0]) == 2
    assert len(read_rows("llava", tmp_path / "a.json")[0]) == 1
    with pytest.raises(ValueError, match="is one file: leave it out"):
        open_source("llava", tmp_path / "a.json", config="a.json")


def test_a_format_or_name_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`format` must be one of .*, got 'coco'"):
        open_source("coco", tmp_path)
    with pytest.raises(ValueError, match="`name` is needed with the format 'llava'"):
        open_source("llava")


def test_a_source_that_has_no_good_row_is_refused_with_the_reasons_and_a_hint(tmp_path):
    record = visual_cot(0, files_under(tmp_path))
    record["image"][0] = "images/gone.png"
    write_json(tmp_path, [record], "viscot_363k.json")
    with pytest.raises(ValueError, match=r"dropped 1: an image file that is missing, for example id0\n.*image_root="):
        read_rows("visual_cot", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Filters, and what the report says of answers
# ---------------------------------------------------------------------------------------------------------------------


def row_of(question, answer, size=(640, 480)):
    picture = Image.new("RGB", (80, 60))
    picture.info["size"] = size
    parts = [{"type": "image", "text": None}, {"type": "text", "text": question}]
    return {
        "images": [picture],
        "prompt": [{"role": "user", "content": parts}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
    }


@pytest.mark.parametrize(
    ("spec", "name", "kept", "refused"),
    [
        ({"trainer.data.filters.answer_words": {"most": 2}}, "trainer.data.filters.answer_words", row_of("Q", "a b"), row_of("Q", "a b c")),
        ("trainer.data.filters.question_words", "trainer.data.filters.question_words", row_of("Q", "a"), row_of(" ", "a")),
        ({"trainer.data.filters.question_words": {"fewest": 2}}, "trainer.data.filters.question_words", row_of("Q q", "a"), row_of("Q", "a")),
        ({"trainer.data.filters.question_words": None}, "trainer.data.filters.question_words", row_of("Q", "a"), row_of("", "a")),
        ({"trainer.data.filters.image_side": {"fewest": 400}}, "trainer.data.filters.image_side", row_of("Q", "a"), row_of("Q", "a", (640, 399))),
        (row_filter := (lambda row: "a" in completion_text(row)), row_filter.__qualname__, row_of("Q", "a"), row_of("Q", "b")),
    ],
)  # fmt: skip
def test_a_filter_is_found_by_its_name_and_gets_its_arguments(spec, name, kept, refused):
    found, keeps = load_filter(spec)
    assert found == name and keeps(kept) and not keeps(refused)


def test_a_filter_may_stand_in_a_file_and_what_it_refuses_is_counted(tmp_path):
    (tmp_path / "my filters.py").write_text("def odd(row, rest=1):\n    return int(row['row_id'][2:]) % 2 == rest\n")
    root = Case("llava", llava, "json").write(tmp_path / "source")
    spec = f"{tmp_path}/my filters.py:odd"
    for filters, kept in (([spec], [1, 3, 5]), ([{spec: {"rest": 0}}], [0, 2, 4, 6])):
        dataset, report = read_rows("llava", root, filters=filters, bad_rows="raise")  # which is not of filters
        assert dataset["row_id"] == [f"id{number}" for number in kept]
        assert report.num_dropped == {"the filter `my filters.py:odd`": NUM_RECORDS - len(kept)}
        assert_adds_up(report)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "must be the name of a function"),
        (7, "must be the name of a function"),
        ({}, "must be the name of a function"),
        ({"a.b": {}, "c.d": {}}, "must be the name of a function"),
        ({"trainer.data.filters.answer_words": 5}, "must be the name of a function"),
        ("answer_words", "cannot be loaded"),
        ("", "cannot be loaded"),
        (".answer_words", "cannot be loaded"),
        ("trainer.data.filters.", "cannot be loaded"),
        ("trainer.data.filters.nothing", "cannot be loaded .*nothing"),
        ("trainer.data.nothing.answer_words", "cannot be loaded .*nothing"),
        ("gone.py:odd", "cannot be loaded"),
        ("broken.py:odd", "cannot be loaded"),
        ("text.txt:odd", "cannot be loaded"),
        ("trainer.data.filters.functools", "is a `module` and no function"),
        ({"trainer.data.filters.answer_words": {"least": 5}}, "takes no such arguments"),
        ("trainer.data.filters.answer_words", "takes no such arguments"),
    ],
    ids=repr,
)
def test_what_names_no_filter_is_refused_before_a_row_is_read(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def odd(:\n")
    (tmp_path / "text.txt").write_text("odd")
    root = Case("llava", llava, "json").write(tmp_path / "source", number=1)
    with pytest.raises(ValueError, match=f"`filters` .*{message}"):
        open_source("llava", root, filters=[spec])


@pytest.mark.parametrize(
    ("form", "answers"),
    {
        "letter": ["B", "(B)", "B.", " (A) ", "C)"],
        "number": ["7", "-3.5", "1,000", "$ 12", "50%", "50 %", "3 000", "+4"],
        "yes or no": ["Yes", "no.", "YES"],
        "word": ["red", "b", "7th", "3/4", "A1", "Ja"],
        "phrase": ["a red cup", "one two three four five"],
        "sentence": ["one two three four five six", " ".join(["word"] * 40)],
        "long text": [" ".join(["word"] * 41)],
    }.items(),
)
def test_the_form_of_an_answer(form, answers):
    assert {answer: form_of(answer) for answer in answers} == dict.fromkeys(answers, form)


# ---------------------------------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------------------------------


READ_FROM_HUB = """
import os
import sys
from itertools import islice
from pathlib import Path

from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from trainer.data.sources import open_source, read_rows

source = Path(sys.argv[1])
api = HfApi()


def push(folder, name):
    api.create_repo(name, repo_type="dataset")
    api.upload_folder(repo_id=name, repo_type="dataset", folder_path=str(source / folder))


def fetched(name):
    folder = Path(os.environ["HF_HOME"], "hub", "datasets--" + name.replace("/", "--"))
    return len(list(folder.glob("snapshots/*/**/*.png")))


def address(name):
    return f"hf://datasets/{name}@{api.dataset_info(name).sha}"


def pictures(rows):
    return sorted((row["row_id"].rpartition("/")[2], row["images"][0].getpixel((0, 0))) for row in rows)


for format, folder, settings, sources in (
    ("monet", "monet", {"config": "ReFocus"}, {"ReFocus"}),
    ("llava", "llava", {}, {"llava"}),
    ("trl", "trl-json", {}, {"trl"}),
    ("visual_cot", "visual_cot", {}, {"visual_cot"}),
):
    here = pictures(read_rows(format, source / folder, **settings)[0])
    assert len(here) == 4, here
    push(folder, f"someone/{folder}")
    push(folder, f"someone/{folder}-again")  # of which nothing lies in the cache
    dataset, report = read_rows(format, f"someone/{folder}", streaming=True, **settings)
    (first,) = islice(dataset, 1)
    assert fetched(f"someone/{folder}") == 1, fetched(f"someone/{folder}")
    assert pictures(dataset) == here and report.num_dropped == {"an image file that is missing": 1}, str(report)
    dataset, report = read_rows(format, f"someone/{folder}-again", **settings)
    assert pictures(dataset) == here and report.num_dropped == {"an image file that is missing": 1}, str(report)
    assert dataset.info.homepage == address(f"someone/{folder}-again"), dataset.info.homepage
    assert set(report.kept) == sources and open_source(format, f"someone/{folder}", **settings).licence == "mit"

for format, folder, settings in (("zebra_cot", "zebra", {"config": "2D - Search"}), ("zebra_cot", "zebra", {}), ("trl", "trl", {})):
    here = read_rows(format, source / folder, **settings)[0]
    if settings or folder == "trl":
        push(folder, f"someone/{folder}")
    for streaming in (True, False):
        dataset, report = read_rows(format, f"someone/{folder}", streaming=streaming, **settings)
        rows = list(DataLoader(dataset, batch_size=None, num_workers=2 * streaming))
        assert sorted(row["completion"][0]["content"][0]["text"] for row in rows) == sorted(
            row["completion"][0]["content"][0]["text"] for row in here
        ), (format, streaming, len(rows), str(report))
        assert report.kept and sum(report.kept.values()) == len(rows), str(report)
        assert dataset.info.homepage == address(f"someone/{folder}"), dataset.info.homepage

for name, settings in (("someone/zebra", {"config": "nothing"}), ("someone/trl", {"split": "nothing"}), ("someone/nothing", {})):
    for streaming in (False, True):
        try:
            open_source("trl", name, streaming=streaming, **settings)
        except ValueError as error:
            assert f"`{name}`" in str(error), error
        else:
            raise SystemExit(f"{name} {settings} was not refused")
print("all read")
"""


def test_sources_are_read_from_the_hub_map_style_and_streamed(tmp_path):
    source = tmp_path / "source"
    for case, folder in (
        (Case("monet", monet, "json"), "monet"),
        (Case("llava", llava, "jsonl"), "llava"),
        (Case("trl", trl_texts, "json"), "trl-json"),
        (Case("visual_cot", visual_cot, "json"), "visual_cot"),
    ):
        root = case.write(source / folder, number=5)
        (image,) = root.rglob("question3.png")
        image.unlink()
        (root / "README.md").write_text("---\nlicense: mit\n---\n# A dataset\n")
    Case("zebra_cot", zebra_cot, "configs, card names them").write(source / "zebra", number=5)
    Case("trl", trl_messages, "data folder").write(source / "trl", number=5)
    with LoopbackHub() as hub:
        assert run_client(hub, tmp_path / "client", READ_FROM_HUB, source).splitlines()[-1] == "all read"


# ---------------------------------------------------------------------------------------------------------------------
# What a reviewer found
# ---------------------------------------------------------------------------------------------------------------------


def test_long_runs_of_breaks_spaces_and_markers_take_no_time():
    breaks = "\n" * 200_000
    assert with_images(f"<image>\na{breaks}b", "<image>", 1)[1]["text"] == f"a{breaks}b"
    assert ASKS_FOR_A_BOX.sub("", f"a{breaks}{' ' * 200_000}b") == f"a{breaks}{' ' * 200_000}b"
    markers = "<abs_vis_token>" * 50_000
    reader = object.__new__(MonetReader)
    reader.answer = "rationale"
    assert reader._answer(f"a {markers} b") == "a b"


@pytest.mark.parametrize(
    ("request_", "rest"),
    [
        ("Please specify the bounding box of the cup.", ""),
        ("Can you provide the bounding box coordinate of the region?", ""),
        ("First, please provide the bounding box of it. Then say why.", "Then say why."),
        ("Is a bounding box drawn around the cup?", "Is a bounding box drawn around the cup?"),
    ],
)
def test_sentences_that_ask_for_a_box_go_whole(request_, rest):
    assert ASKS_FOR_A_BOX.sub("", f"How many cups? {request_}").split() == f"How many cups? {rest}".split()


def test_tables_that_lead_out_of_their_folder_are_not_read(tmp_path):
    rows = Dataset.from_list([{"prompt": "What?", "completion": "SECRET", "images": []}])
    rows.to_parquet(tmp_path / "outside.parquet")
    rows.save_to_disk(tmp_path / "outside")
    for name in ("linked", "saved", "json"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked" / "train.parquet").symlink_to(tmp_path / "outside.parquet")
    for name in ("dataset_info.json", "state.json"):
        text = (tmp_path / "outside" / name).read_text().replace('"filename": "', '"filename": "../outside/')
        (tmp_path / "saved" / name).write_text(text)
    (tmp_path / "outside.json").write_text("[]")
    (tmp_path / "json" / "a.json").symlink_to(tmp_path / "outside.json")
    for name in ("linked", "saved", "json"):
        with pytest.raises(ValueError, match=f"`{tmp_path}/{name}` has .*, which leads out of it"):
            open_source("trl", tmp_path / name, bad_rows="raise")


def test_json_files_of_the_names_of_splits_are_splits(tmp_path):
    for number, name in enumerate(("train.jsonl", "test.jsonl", "more.jsonl")):
        write_json(tmp_path, [llava(number, files_under(tmp_path))], name)
    reader = open_source("llava", tmp_path)
    assert set(reader.splits()) == {"train", "test", "more"}
    assert read_rows("llava", tmp_path, split="test")[0]["row_id"] == ["id1"]
    for name, split in ((tmp_path, "validation"), (tmp_path / "train.jsonl", "test")):
        with pytest.raises(ValueError, match="several files|`split` is 'test', but"):
            open_source("llava", name, split=split)


def test_a_stream_that_is_begun_again_takes_nothing_back(tmp_path):
    root = Case("llava", llava, "json").write(tmp_path)
    rows, report = read_rows("llava", root, streaming=True)
    next(iter(rows))
    assert report.kept == {"llava": 1}
    list(rows)
    next(iter(rows))
    assert report.kept == {"llava": NUM_RECORDS}
    assert read_rows("llava", root, streaming=True)[1].kept == {}


def test_a_stream_stays_where_it_was_when_the_program_goes_elsewhere(tmp_path, monkeypatch):
    Case("llava", llava, "json").write(tmp_path / "rows")
    monkeypatch.chdir(tmp_path)
    rows, _ = read_rows("llava", "rows", streaming=True)
    monkeypatch.chdir("/")
    assert len(list(rows)) == NUM_RECORDS


def test_a_saved_dataset_and_one_parquet_file_are_read_in_parts(tmp_path):
    picture = cells()
    rows = Dataset.from_list([refocus(number, picture) for number in range(7)])
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "one.parquet", batch_size=2)
    (tmp_path / "folder").mkdir()
    rows.to_parquet(tmp_path / "folder" / "one.parquet", batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.data.tables.ROWS_PER_SHARD", 2)
        for name in ("saved", "one.parquet", "folder"):
            reader = open_source("refocus", tmp_path / name)
            assert len(reader.all_shards) == 4, name
            answers = [row["completion"][0]["content"][0]["text"] for row in reader.read()[0]]
            assert answers == [refocus(number, picture)["answer"] for number in range(7)]


def test_the_terms_of_zebra_cot_stay_with_its_folders(tmp_path):
    record = {"metadata": {"sample_id": 0}, "data": []}
    for subset in ("ReFocus", "Zebra_CoT_count"):
        write_json(tmp_path, [record], f"{subset}/train.json")
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    licences = MonetReader(tmp_path, config=["ReFocus", "Zebra_CoT_count"]).licences()
    assert licences == {"ReFocus": "apache-2.0", "Zebra_CoT_count": "apache-2.0; made from Zebra-CoT, CC-BY-NC-4.0"}


def test_a_name_beside_the_licence_other_says_more(tmp_path):
    Case("llava", llava, "json").write(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: research-only\n---\n")
    assert open_source("llava", tmp_path).licence == "research-only"
