"""Monet-SFT-125K becomes rows in which x is the user's turn and nothing of the answer, and no record goes in silence."""

import json
import os
from copy import deepcopy

import numpy as np
import pytest
from PIL import Image
from tiny import build_tiny_backbone

from modeling_amvl import AMVLProcessor
from trainer import AMVLDataCollator
from trainer.data import files
from trainer.data.monet import BOXED_SUFFIX, SUBSETS, read_monet
from trainer.data.rows import SYSTEM_PROMPT, boxed_text


KEEPING = ("Zebra_CoT_count", "Zebra_CoT_visual_search")  # ../shared/formats.md, by heart
QUESTION = "How many cups are on the table?"
SUFFIX = "\nPut your final answer within \\boxed{}."


# ---------------------------------------------------------------------------------------------------------------------
# A small Monet-SFT-125K
# ---------------------------------------------------------------------------------------------------------------------


def text(value):
    return {"type": "text", "text": value}


def image(path):
    return {"type": "image", "image": path}


def make_record(subset="ReFocus", sample_id="0", answer="4", question=QUESTION + SUFFIX):
    """A record as the dataset has it: the question with its picture, a reply with an auxiliary picture in between."""
    return {
        "metadata": {"dataset_name": subset, "sample_id": sample_id},
        "data": [
            {"role": "system", "content": [text("You are a visual agent. Draw before you answer.")]},
            {"role": "user", "content": [image(f"{subset}/images/question.png"), text(question)]},
            {
                "role": "assistant",
                "content": [
                    text("I mark each cup. <abs_vis_token></abs_vis_token>"),
                    image(f"{subset}/images/marked.png"),
                    text(f"<observation>Each cup has a mark.</observation> So it is \\boxed{{{answer}}}."),
                ],
            },
        ],
    }


def user_of(record):
    return record["data"][1]["content"]


def reply_of(record):
    return record["data"][2]["content"]


def save_image(path, color):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 40), color).save(path)


QUESTION_COLOR, MARKED_COLOR = (10, 200, 30), (250, 5, 250)


def write_subset(root, records, subset="ReFocus", suffix=".json"):
    folder = root / subset
    save_image(folder / "images" / "question.png", QUESTION_COLOR)
    save_image(folder / "images" / "marked.png", MARKED_COLOR)
    content = json.dumps(records) if suffix == ".json" else "".join(json.dumps(record) + "\n" for record in records)
    (folder / f"train{suffix}").write_text(content, encoding="utf-8")
    return root


def read_one(root, record, subset="ReFocus", **settings):
    dataset, report = read_monet(str(write_subset(root, [record], subset)), (subset,), **settings)
    assert len(dataset) == 1, str(report)
    return dataset[0]


def prompt_texts(row):
    return [part["text"] for turn in row["prompt"] for part in turn["content"] if part["type"] == "text"]


def completion_text(row):
    (turn,) = row["completion"]
    (part,) = turn["content"]
    assert turn["role"] == "assistant" and part["type"] == "text"
    return part["text"]


# ---------------------------------------------------------------------------------------------------------------------
# Where it is read from
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("given", ["folder", "parent"])
def test_both_forms_of_file_are_read_from_the_folder_and_from_its_parent(tmp_path, suffix, given):
    root = tmp_path / "Monet-SFT-125K"
    (tmp_path / "something else").mkdir()
    for subset in SUBSETS:
        write_subset(root, [make_record(subset, number) for number in ("1", "2")], subset, suffix)
    dataset, report = read_monet(str(root if given == "folder" else tmp_path))
    assert dataset.column_names == ["images", "prompt", "completion", "source", "row_id"]
    assert dataset["row_id"] == [f"{subset}/{number}" for subset in SUBSETS for number in ("1", "2")]
    assert dataset["source"] == [subset for subset in SUBSETS for _ in range(2)]
    assert report.kept == dict.fromkeys(SUBSETS, 2) and not report.num_dropped


def test_a_line_ends_where_json_lines_say_and_nowhere_else(tmp_path):
    question = "A\u2028B\u0085C\fD"  # `str.splitlines` would end a line at the first two
    write_subset(tmp_path, [])
    lines = [json.dumps(make_record(question=question), ensure_ascii=False) for _ in range(2)]
    (tmp_path / "ReFocus" / "train.json").unlink()
    (tmp_path / "ReFocus" / "train.jsonl").write_text("\r\n".join(lines) + "\n\n", encoding="utf-8", newline="")
    dataset, report = read_monet(str(tmp_path), ("ReFocus",))
    assert report.kept == {"ReFocus": 2} and prompt_texts(dataset[1])[1] == question


def test_only_the_subsets_asked_for_are_read_each_up_to_the_limit(tmp_path):
    for subset in ("ReFocus", "CogCoM"):
        write_subset(tmp_path, [make_record(subset, str(number)) for number in range(5)], subset)
    (tmp_path / "Visual_CoT").mkdir()  # not asked for: nobody minds that it is empty
    dataset, report = read_monet(str(tmp_path), ("CogCoM", "ReFocus"), max_rows=3)
    assert dataset["source"] == ["CogCoM"] * 3 + ["ReFocus"] * 3
    assert report.kept == {"CogCoM": 3, "ReFocus": 3}


def test_rows_are_read_from_the_cache_of_the_hub_whose_files_are_links(tmp_path, monkeypatch):
    # huggingface_hub: snapshots/<commit>/<path> links to blobs/<hash>, beside and not below the snapshot.
    blobs = tmp_path / "datasets--NOVAglow646--Monet-SFT-125K" / "blobs"
    snapshot = blobs.with_name("snapshots") / "0123abc"
    blobs.mkdir(parents=True)
    plain = write_subset(tmp_path / "plain", [make_record()])
    for number, path in enumerate(sorted(path for path in plain.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        link = snapshot / path.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    asked = []

    def snapshot_download(name, **settings):
        asked.append((name, settings["repo_type"]))
        return str(snapshot)

    monkeypatch.setattr(files, "snapshot_download", snapshot_download)
    dataset, report = read_monet("NOVAglow646/Monet-SFT-125K", ("ReFocus",))
    assert asked == [("NOVAglow646/Monet-SFT-125K", "dataset")]
    assert len(dataset) == 1, str(report)
    assert dataset[0]["images"][0].convert("RGB").getpixel((0, 0)) == QUESTION_COLOR


# ---------------------------------------------------------------------------------------------------------------------
# x
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", SUBSETS)
def test_the_boxed_suffix_stays_only_where_it_belongs_to_the_task(tmp_path, subset):
    assert BOXED_SUFFIX == SUFFIX
    row = read_one(tmp_path, make_record(subset), subset)
    assert prompt_texts(row)[1:] == [QUESTION + SUFFIX if subset in KEEPING else QUESTION]


def test_the_system_text_is_replaced_and_the_users_turn_keeps_its_order(tmp_path):
    record = make_record()
    save_image(tmp_path / "ReFocus" / "images" / "second.png", (1, 2, 3))
    user_of(record)[1:] = [text("Compare it with "), image("ReFocus/images/second.png"), text(" please." + SUFFIX)]
    row = read_one(tmp_path, record)
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
    assert row["prompt"][0]["content"] == [text(SYSTEM_PROMPT)] and SYSTEM_PROMPT == "You are a helpful assistant."
    assert row["prompt"][1]["content"] == [
        {"type": "image", "text": None},
        text("Compare it with "),
        {"type": "image", "text": None},
        text(" please."),
    ]
    assert [picture.convert("RGB").getpixel((0, 0)) for picture in row["images"]] == [QUESTION_COLOR, (1, 2, 3)]


def test_a_record_without_a_system_turn_gets_the_same_one(tmp_path):
    record = make_record()
    del record["data"][0]
    assert prompt_texts(read_one(tmp_path, record)) == [SYSTEM_PROMPT, QUESTION]


@pytest.mark.parametrize("answer", ["answer", "rationale"])
def test_nothing_of_the_answer_or_of_the_metadata_reaches_the_prompt_or_the_images(tmp_path, answer):
    record = make_record(sample_id="LEAKid", answer="LEAKboxed")
    record["metadata"] |= {"dataset_name": "LEAKname", "answer": "LEAKanswer"}
    record["LEAKkey"] = "LEAKvalue"
    record["data"][0]["content"][0]["text"] = "LEAKsystem"
    record["data"][2]["name"] = "LEAKturn"
    aux = "ReFocus/images/LEAKfile.png"
    save_image(tmp_path / aux, MARKED_COLOR)
    reply_of(record)[:] = [
        text("LEAKfirst <abs_vis_token>LEAKmarker</abs_vis_token>"),
        image(aux),
        text("<observation>LEAKseen</observation> LEAKlast \\boxed{LEAKboxed}"),
    ]
    row = read_one(tmp_path, record, answer=answer)

    # What was planted is there to be found: in the completion, and in the id, which is no training column.
    expected = {"answer": "LEAKboxed", "rationale": "LEAKfirst LEAKseen LEAKlast \\boxed{LEAKboxed}"}[answer]
    assert completion_text(row) == expected and row["row_id"] == "ReFocus/LEAKid"
    assert "LEAK" not in json.dumps(row["prompt"])
    (picture,) = row["images"]
    assert picture.convert("RGB").getcolors() == [(48 * 40, QUESTION_COLOR)]
    assert "LEAK" not in str((picture.info, getattr(picture, "filename", "")))

    processor = AMVLProcessor.from_backbone(build_tiny_backbone()[1])
    collator = AMVLDataCollator(processor)
    rendered = collator.render(row, "The row")
    assert rendered["completion"].startswith(expected) and "LEAK" not in rendered["prompt"]
    batch = collator([row])
    assert "LEAK" in processor.decode(batch["completion_ids"][0])
    assert "LEAK" not in processor.decode(batch["input_ids"][0])
    alone = read_one(tmp_path / "clean", make_record())
    clean = collator([alone])
    assert np.array_equal(batch["pixel_values"], clean["pixel_values"])
    assert np.array_equal(batch["input_ids"], clean["input_ids"])


# ---------------------------------------------------------------------------------------------------------------------
# y
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (r"so \boxed{4}.", "4"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"first \boxed{3}, no, \boxed{ 5 } it is", "5"),
        (r"\boxed{\text{left {of} it}} and } more", r"\text{left {of} it}"),
        (r"\boxed{never closed", None),
        (r"\boxed{ }", None),
        ("no box", None),
    ],
)
def test_the_boxed_answer_is_the_last_one_with_its_braces_balanced(reply, expected):
    assert boxed_text(reply) == expected


def test_the_answer_alone_is_the_default(tmp_path):
    assert completion_text(read_one(tmp_path, make_record(answer=r"\frac{1}{2}"))) == r"\frac{1}{2}"


def test_the_rationale_has_no_markers_tags_or_auxiliary_images(tmp_path):
    row = read_one(tmp_path, make_record(), answer="rationale")
    assert completion_text(row) == "I mark each cup. Each cup has a mark. So it is \\boxed{4}."
    assert len(row["images"]) == 1


def test_a_rationale_needs_no_box(tmp_path):
    record = make_record()
    reply_of(record)[:] = [text("<observation>Four cups.</observation>")]
    assert completion_text(read_one(tmp_path, record, answer="rationale")) == "Four cups."


@pytest.mark.parametrize("answer", ["answer", "rationale"])
def test_rows_go_through_the_collator(tmp_path, answer):
    for subset in SUBSETS:
        write_subset(tmp_path, [make_record(subset)], subset)
    dataset, _ = read_monet(str(tmp_path), answer=answer)
    collator = AMVLDataCollator(AMVLProcessor.from_backbone(build_tiny_backbone()[1]))
    for row in dataset:
        rendered = collator.render(row, "The row")
        kept = SUFFIX if row["source"] in KEEPING else ""
        assert rendered["prompt"].endswith(f"<image>{QUESTION}{kept}<|end|><|assistant|>")
        assert rendered["completion"] == completion_text(row) + "<|end|>"
    assert collator(list(dataset))["pixel_values"].shape[0] == len(SUBSETS)


# ---------------------------------------------------------------------------------------------------------------------
# What is dropped is counted, with its reason and examples
# ---------------------------------------------------------------------------------------------------------------------


def changed(change):
    record = make_record(sample_id="broken")
    change(record)
    return record


def set_user_image(path):
    return lambda record: user_of(record).__setitem__(0, image(path))


def set_reply(value):
    return lambda record: reply_of(record).__setitem__(slice(None), [text(value)])


UNUSABLE = {
    "missing file": (set_user_image("ReFocus/images/gone.png"), "missing"),
    "a folder": (set_user_image("ReFocus/images"), "missing"),
    "above the root": (set_user_image("ReFocus/../../outside.png"), "outside"),
    "a link that leaves the root": (set_user_image("ReFocus/images/link.png"), "outside"),
    "a linked folder": (set_user_image("ReFocus/linked/outside.png"), "outside"),
    "no image": (lambda record: user_of(record).pop(0), "no image"),
    "no box": (set_reply("It is 4."), "boxed"),
    "an empty box": (set_reply(r"It is \boxed{}."), "boxed"),
    "an open box": (set_reply(r"It is \boxed{4."), "boxed"),
    "no reply": (lambda record: record["data"].pop(), "turn"),
    "no question": (lambda record: record["data"].pop(1), "turn"),
}


@pytest.fixture
def root_with_outside(tmp_path):
    """A data folder, a readable picture beside it, and links from the one to the other."""
    root = tmp_path / "Monet-SFT-125K"
    write_subset(root, [])
    save_image(tmp_path / "outside.png", (0, 0, 0))
    (root / "ReFocus" / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "ReFocus" / "linked").symlink_to(tmp_path, target_is_directory=True)
    return root


def assert_dropped(root, broken, reason=None, row_id="ReFocus/broken"):
    """Of three records the one in the middle is dropped, for one reason that is told with its example."""
    records = [make_record(sample_id="before"), broken, make_record(sample_id="after")]
    dataset, report = read_monet(str(write_subset(root, records)), ("ReFocus",))
    assert dataset["row_id"] == ["ReFocus/before", "ReFocus/after"]
    assert report.kept == {"ReFocus": 2} and sum(report.num_dropped.values()) == 1
    ((told, examples),) = report.dropped.items()
    assert len(examples) == 1 and (row_id is None or examples == [row_id])
    assert reason is None or reason in told
    assert f"dropped 1: {told}" in str(report) and "kept 2 rows: ReFocus 2" in str(report)


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_record_is_dropped_and_counted(root_with_outside, name):
    change, reason = UNUSABLE[name]
    assert_dropped(root_with_outside, changed(change), reason)


def test_an_absolute_path_is_dropped(root_with_outside):
    outside = root_with_outside.parent / "outside.png"
    assert outside.is_file()
    assert_dropped(root_with_outside, changed(set_user_image(str(outside))), "outside")


MALFORMED = {
    "data is null": lambda record: record.update(data=None),
    "data is a text": lambda record: record.update(data="user"),
    "data holds a text": lambda record: record["data"].insert(0, "system"),
    "data is missing": lambda record: record.pop("data"),
    "a turn without a role": lambda record: record["data"][1].pop("role"),
    "a turn without a content": lambda record: record["data"][2].pop("content"),
    "a content that is a text": lambda record: record["data"][2].update(content="So it is \\boxed{4}."),
    "a content that is null": lambda record: record["data"][1].update(content=None),
    "a part that is a text": lambda record: user_of(record).append("How many?"),
    "a part without a type": lambda record: user_of(record).append({"text": "How many?"}),
    "a part of another type": lambda record: user_of(record).append({"type": "video", "video": "ReFocus/a.mp4"}),
    "a text that is null": lambda record: user_of(record).append(text(None)),
    "a text that is a number": lambda record: reply_of(record).insert(0, text(4)),
    "a path that is null": lambda record: user_of(record).insert(0, image(None)),
    "a path that is a number": lambda record: user_of(record).insert(0, image(7)),
    "a path with a null byte": lambda record: user_of(record).insert(0, image("ReFocus/\0.png")),
    "an image without a path": lambda record: user_of(record).insert(0, {"type": "image"}),
    "a second question and answer": lambda record: record["data"].extend(deepcopy(record["data"][1:])),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_record_is_dropped_and_counted(tmp_path, name):
    assert_dropped(tmp_path, changed(MALFORMED[name]))


@pytest.mark.parametrize("record", [None, [], "a text", 7], ids=lambda value: type(value).__name__)
def test_what_is_no_record_is_dropped_and_counted(tmp_path, record):
    assert_dropped(tmp_path, record, row_id=None)


@pytest.mark.parametrize("metadata", [None, [], {}, {"sample_id": 7}], ids=repr)
def test_a_record_without_usable_metadata_is_kept(tmp_path, metadata):
    records = [make_record(), {**make_record(), "metadata": metadata}, make_record()]
    dataset, report = read_monet(str(write_subset(tmp_path, records)), ("ReFocus",))
    assert report.kept == {"ReFocus": 3} and completion_text(dataset[1]) == "4"


def test_the_report_counts_every_reason_and_shows_three_examples_of_each(tmp_path):
    records = [make_record(sample_id=f"good{number}") for number in range(2)]
    for number in range(5):
        broken = make_record(sample_id=f"gone{number}")
        set_user_image("ReFocus/images/gone.png")(broken)
        records.append(broken)
    broken = make_record(sample_id="unboxed")
    set_reply("It is 4.")(broken)
    records.append(broken)
    dataset, report = read_monet(str(write_subset(tmp_path, records)), ("ReFocus",))
    assert len(dataset) + sum(report.num_dropped.values()) == len(records)
    assert sorted(report.num_dropped.values()) == [1, 5]
    assert sorted(report.dropped.values()) == [
        ["ReFocus/gone0", "ReFocus/gone1", "ReFocus/gone2"],
        ["ReFocus/unboxed"],
    ]
    lines = str(report).splitlines()
    assert len(lines) == 3 and lines[0] == "kept 2 rows: ReFocus 2"
    assert "5" in lines[1] and "ReFocus/gone2" in lines[1] and "ReFocus/gone3" not in lines[1]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def test_an_unknown_subset_is_refused(tmp_path):
    write_subset(tmp_path, [make_record()])
    with pytest.raises(ValueError, match=r"\['Refocus'\], unknown to Monet-SFT-125K: choose among .*'ReFocus'"):
        read_monet(str(tmp_path), ("Refocus",))


def test_an_unknown_form_of_answer_is_refused(tmp_path):
    write_subset(tmp_path, [make_record()])
    with pytest.raises(ValueError, match="`answer` must be 'answer' or 'rationale', got 'both'"):
        read_monet(str(tmp_path), ("ReFocus",), answer="both")


def test_a_folder_without_subsets_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="holds none of the folders"):
        read_monet(str(tmp_path))


def test_a_dataset_of_which_no_record_can_be_used_is_refused_with_the_reasons(tmp_path):
    broken = changed(set_reply("It is 4."))
    with pytest.raises(ValueError, match=r"no row(.|\n)*dropped 2: no boxed answer, for example ReFocus/broken"):
        read_monet(str(write_subset(tmp_path, [broken, broken])), ("ReFocus",))


def test_a_subset_that_was_not_downloaded_is_refused(tmp_path):
    write_subset(tmp_path, [make_record()])
    with pytest.raises(ValueError, match=r"`CogCoM` has no `train.json` or `train.jsonl`"):
        read_monet(str(tmp_path), ("ReFocus", "CogCoM"))


@pytest.mark.parametrize("content", ['[{"data": ', '{"data": []}'], ids=["cut short", "no list"])
def test_a_file_that_holds_no_records_is_refused_by_its_name(tmp_path, content):
    (tmp_path / "ReFocus").mkdir()
    (tmp_path / "ReFocus" / "train.json").write_text(content)
    with pytest.raises(ValueError, match=r"ReFocus.train.json"):
        read_monet(str(tmp_path), ("ReFocus",))


def test_a_line_cut_short_is_dropped_and_named(tmp_path):
    write_subset(tmp_path, [make_record()], suffix=".jsonl")
    (tmp_path / "ReFocus" / "train.json").unlink(missing_ok=True)
    with (tmp_path / "ReFocus" / "train.jsonl").open("a") as file:
        file.write('{"data"')
    dataset, report = read_monet(str(tmp_path), ("ReFocus",))
    assert len(dataset) == 1 and report.num_dropped == {"a line that is no JSON": 1}
    (example,) = report.sources["ReFocus"].examples["a line that is no JSON"]
    assert "train.jsonl, line 2" in example["detail"]
