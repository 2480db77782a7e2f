"""A mixture becomes parquet shards: the right rows, as often as asked, once each, also after the process was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from filelock import FileLock
from loopback_hub import LoopbackHub
from PIL import Image, ImageDraw
from test_loopback_hub import run_client
from tiny import build_tiny_backbone

from recipes import prepare_data
from recipes.prepare_data import PrepareArguments
from trainer.data import prepare as prepare_module
from trainer.data.mixture import Mixture
from trainer.data.prepare import prepare, report_of
from trainer.data.reader import RECORDS_PER_SHARD


REPOSITORY = Path(__file__).resolve().parents[1]


def picture(seed, size=(64, 48)):
    """A picture with enough of a pattern for a perceptual hash."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_llava(folder, num_rows, first=0, seed=None, answer="a{}"):
    """LLaVA-style rows with a picture each; `seed` gives all of them the same picture."""
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(first, first + num_rows):
        picture(number if seed is None else seed).save(folder / "images" / f"{number}.png")
        turns = [("human", f"<image>\nquestion {number}?"), ("gpt", answer.format(number))]
        records.append(
            {
                "id": str(number),
                "image": f"images/{number}.png",
                "conversations": [{"from": who, "value": text} for who, text in turns],
            }
        )
    (folder / "rows.json").write_text(json.dumps(records))
    return str(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return {
        "many": write_llava(folder / "many", 40),
        "few": write_llava(folder / "few", 10, first=100, answer="a rather long answer {}"),
        "held out": write_llava(folder / "held out", 3, first=5),  # the pictures of three rows of `many`
    }


def source(name, **settings):
    return {"format": "llava", "name": name, **settings}


def rows_of(folder, split="train"):
    return datasets.load_dataset(str(folder), split=split, cache_dir=str(folder.with_name("cache")))


# ---------------------------------------------------------------------------------------------------------------------
# What is written
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "mix"
    mixture = Mixture(
        sources=[
            source(sources["many"], source="many", licence="mit"),
            source(sources["few"], source="few", weight=2, licence="cc-by-4.0"),
        ],
        evaluation=[source(sources["held out"], source="held out")],
    )
    return folder, prepare(mixture, folder)


def test_rows_have_their_columns_their_pictures_and_their_weight(prepared):
    folder, _ = prepared
    rows = rows_of(folder)
    assert rows.column_names == ["images", "prompt", "completion", "source", "row_id"]
    assert Counter(rows["source"]) == {"many": 37, "few": 20}  # of 40, three pictures are in the evaluation
    for row in rows:
        number = int(row["completion"][0]["content"][0]["text"].rsplit(" ", 1)[-1].lstrip("a"))
        assert np.array_equal(np.asarray(row["images"][0]), np.asarray(picture(number)))
        assert f"question {number}?" in row["prompt"][0]["content"][1]["text"]
    copies = Counter(
        row_id.split(" copy")[0] for row_id in rows["row_id"] if int(row_id.strip("/").split(" ")[0]) >= 100
    )
    assert set(copies.values()) == {2} and len(set(rows["row_id"])) == len(rows)


def test_images_are_inline_and_the_sources_interleaved(prepared):
    folder, _ = prepared
    raw = rows_of(folder).with_format("arrow")[:]
    assert all(image["bytes"] for row in raw["images"].to_pylist() for image in row)
    assert sorted(path.name for path in (folder / "data").iterdir()) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]


def test_no_training_row_shares_a_picture_with_the_evaluation(prepared):
    folder, reports = prepared
    held_out = {row["images"][0].tobytes() for row in rows_of(folder, "test")}
    assert len(held_out) == 3
    assert not held_out & {row["images"][0].tobytes() for row in rows_of(folder)}
    reason = "an image that is also in the evaluation rows"
    assert reports["train"].num_dropped == {reason: 3}
    assert [row_id.split("/")[-1] for row_id in reports["train"].dropped[reason]] == ["5", "6", "7"]


def test_a_resized_recompressed_copy_counts_as_the_same_picture(tmp_path):
    train = write_llava(tmp_path / "train", 6)
    evaluation = write_llava(tmp_path / "evaluation", 1, first=2)
    picture(2, (640, 480)).save(tmp_path / "train" / "images" / "2.jpg", quality=40)
    (tmp_path / "train" / "images" / "2.png").unlink()
    records = json.loads((tmp_path / "train" / "rows.json").read_text().replace("2.png", "2.jpg"))
    (tmp_path / "train" / "rows.json").write_text(json.dumps(records))
    prepare(Mixture([source(train)], [source(evaluation)]), tmp_path / "mix")
    answers = {row["completion"][0]["content"][0]["text"] for row in rows_of(tmp_path / "mix")}
    assert answers == {"a0", "a1", "a3", "a4", "a5"}


def test_pictures_that_show_nothing_are_no_copies_of_each_other(tmp_path):
    for name, color in (("train", "white"), ("evaluation", "black")):
        write_llava(tmp_path / name, 2, first=2 * (name == "train"))
        Image.new("RGB", (64, 48), color).save(tmp_path / name / "images" / f"{2 * (name == 'train')}.png")
    mixture = Mixture([source(str(tmp_path / "train"))], [source(str(tmp_path / "evaluation"))])
    assert prepare(mixture, tmp_path / "mix")["train"].kept == {"llava": 2}


def test_the_report_adds_up_and_the_card_names_licences_and_files(prepared):
    folder, _ = prepared
    total = report_of(str(folder))["total"]
    assert total == {"read": 50, "kept": 47, "rows": 57, "dropped": 3, "not_sampled": 0}  # ten rows twice
    card = (folder / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "other"
    files = metadata["configs"][0]["data_files"]
    assert files == [{"split": name, "path": f"data/{name}-*.parquet"} for name in ("train", "test")]
    assert "| train | many | 37 | 64.9% | mit |" in card and "| cc-by-4.0 |" in card
    assert "an image that is also in the evaluation rows | 3 |" in card
    assert Image.open(folder / "contact_sheet.jpg").width > 100
    assert "question 39?" in (folder / "report.html").read_text()
    assert "question 5?" in (folder / "report_test.html").read_text()


def test_a_fraction_of_a_source_is_the_same_rows_each_time(sources, tmp_path):
    drawn = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(drawn))
        prepare(Mixture([source(sources["many"], weight=0.5)], seed=seed), folder)
        drawn.append(rows_of(folder)["row_id"])
        total = report_of(str(folder))["total"]
        assert total["kept"] + total["not_sampled"] == total["read"] == 40
    assert drawn[0] == drawn[1] != drawn[2] and 8 <= len(drawn[0]) <= 32


def test_filters_are_named_and_counted(sources, tmp_path):
    (tmp_path / "own.py").write_text("def odd(row):\n    return int(row['row_id'].split('/')[-1]) % 2\n")
    filters = [{"trainer.data.filters.answer_words": {"most": 2}}, f"{tmp_path}/own.py:odd"]
    mixture = Mixture([source(sources[name], filters=filters) for name in ("many", "few")])
    reports = prepare(mixture, tmp_path / "mix")
    assert len(rows_of(tmp_path / "mix")) == 20
    names = ["the filter `trainer.data.filters.answer_words`", "the filter `own.py:odd`"]
    assert reports["train"].num_dropped == dict(zip(names, (10, 20), strict=True))


def test_two_processes_write_what_one_writes(sources, tmp_path):
    mixture = Mixture([source(sources["many"]), source(sources["few"])], [source(sources["held out"])])
    contents = []
    for num_proc in (1, 2):
        prepare(mixture, tmp_path / str(num_proc), num_proc)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / str(num_proc) / "data").iterdir()})
        contents[-1]["report"] = report_of(str(tmp_path / str(num_proc)))
    assert contents[0] == contents[1] and len(contents[0]) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Cut short
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("trainer.data.reader.RECORDS_PER_SHARD", 7)


def test_a_run_cut_short_goes_on_with_what_is_left(sources, tmp_path, small_shards, monkeypatch):
    mixture = Mixture([source(sources["many"]), source(sources["few"])], [source(sources["held out"])])
    whole = prepare(mixture, tmp_path / "whole")
    write, written = prepare_module._write_shard, []

    def write_four(reader, place, *arguments):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(place)
        return write(reader, place, *arguments)

    monkeypatch.setattr(prepare_module, "_write_shard", write_four)
    with pytest.raises(KeyboardInterrupt):
        prepare(mixture, tmp_path / "cut")
    assert not (tmp_path / "cut" / "data").exists()
    monkeypatch.setattr(
        prepare_module, "_write_shard", lambda *arguments: written.append(arguments[1]) or write(*arguments)
    )
    again = prepare(mixture, tmp_path / "cut")
    assert len(written) == 1 + 6 + 2  # each shard once
    assert again["train"].to_dict() == whole["train"].to_dict()
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "data").iterdir()} for name in ("cut", "whole")
    ]
    assert files[0] == files[1]
    prepare(mixture, tmp_path / "cut")  # and once more: nothing is left to do
    assert len(written) == 9


@pytest.mark.slow
def test_a_killed_command_goes_on_and_loses_nothing(tmp_path):
    rows = write_llava(tmp_path / "rows", 2 * RECORDS_PER_SHARD, seed=1)
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"sources": [source(rows)]}))
    command = [
        sys.executable,
        str(REPOSITORY / "recipes" / "prepare_data.py"),
        "--mixture",
        str(tmp_path / "mix.yaml"),
    ]
    command += ["--output_dir", str(tmp_path / "mix"), "--num_proc", "2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "mix" / "work").rglob(".0*")):  # a shard that is being written
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "mix" / "data").exists()
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert f"kept {2 * RECORDS_PER_SHARD} rows" in finished.stdout and "report.html" in finished.stdout
    assert len(set(rows_of(tmp_path / "mix")["row_id"])) == 2 * RECORDS_PER_SHARD


def test_a_folder_of_something_else_is_refused(sources, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    mixture = Mixture([source(sources["few"])])
    with pytest.raises(ValueError, match=r"`output_dir` \(.*notes\) is not empty"):
        prepare(mixture, tmp_path / "notes")
    prepare(mixture, tmp_path / "mix")
    with pytest.raises(ValueError, match="another mixture"):
        prepare(Mixture([source(sources["few"], weight=2)]), tmp_path / "mix")


def test_nothing_to_train_on_is_refused_with_the_reasons(sources, tmp_path):
    filters = [{"trainer.data.filters.answer_words": {"most": 0}}]
    with pytest.raises(ValueError, match=r"no row that can be trained on(.|\n)*answer_words"):
        prepare(Mixture([source(sources["few"], filters=filters)]), tmp_path / "mix")


def test_a_bad_row_stops_it_if_asked(sources, tmp_path):
    rows = write_llava(tmp_path / "rows", 3)
    (tmp_path / "rows" / "images" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"Row '.*1' of .*an image that cannot be read .*bad_rows='drop'"):
        prepare(Mixture([source(rows)], bad_rows="raise"), tmp_path / "mix")


# ---------------------------------------------------------------------------------------------------------------------
# The YAML file
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have a key `sources`"),
        ("- a", "must have a key `sources`"),
        ("sources: {format: llava}", "`sources` must be a list"),
        ("sources: []", "`sources` is empty"),
        ("answer: answer", "has no `sources`"),
        ("sources: [{format: webdataset}]", "`sources` number 1 .* must have a `format`, one of"),
        ("sources: [{format: trl, name: x}]\nevaluation: [7]", "`evaluation` number 1"),
        ("sources: [{format: trl, name: x}]\nweights: [1]", r"keys \['weights'\]"),
        ("sources: [{format: trl, name: x}]\nanswer: both", "`answer` must be one of"),
        ("sources: [{format: trl, name: x}]\nbad_rows: ignore", "`bad_rows` must be one of"),
        ("sources: [{format: trl, name: x}]\nmax_pixels: 10", r"`max_pixels` \(10\) .* name a `processor`"),
        ("sources: [{format: trl, name: x}]\nseed: many", "`seed` must be a whole number, got 'many'"),
        ("sources: [", "is no YAML"),
    ],
)
def test_a_mixture_that_cannot_be_meant_is_refused(tmp_path, text, message):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Mixture.from_yaml(tmp_path / "mix.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "`weight` must be a number above 0, got 0"),
        ({"weight": "half"}, "`weight` must be a number above 0, got 'half'"),
        ({"wieght": 1}, r"`sources` number 1 has \['wieght'\], which no source has"),
        ({"report_dir": "x"}, r"`sources` number 1 has \['report_dir'\], which no source has"),
        ({"filters": ["trainer.data.filters.no_such"]}, "`filters` names 'trainer.data.filters.no_such'"),
        ({"filters": [7]}, "`filters` holds 7"),
        ({"name": "nowhere/at/all"}, "`nowhere/at/all` is neither"),
        ({"licence": 5}, "`licence` must be a text or a list of texts, got 5"),
        ({"max_rows": 0}, "`max_rows` must be at least 1, got 0"),
        ({"image_root": "nowhere"}, "`image_root` must be an existing folder, got 'nowhere'"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused_before_anything_is_written(sources, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        prepare(Mixture([source(sources["few"]) | settings]), tmp_path / "mix")
    assert not (tmp_path / "mix").exists()


def test_two_sources_of_one_format_keep_their_names_and_licences(sources, tmp_path):
    twice = [source(sources["few"], licence="mit"), source(sources["many"], licence="cc-by-nc-4.0")]
    reports = prepare(Mixture(twice), tmp_path / "mix")
    assert reports["train"].kept == {"llava (few)": 10, "llava (many)": 40}
    assert reports["train"].licences == {"llava (few)": "mit", "llava (many)": "cc-by-nc-4.0"}
    assert set(rows_of(tmp_path / "mix")["source"]) == {"llava (few)", "llava (many)"}


def test_two_sources_of_one_name_are_refused_since_a_licence_would_be_lost(sources, tmp_path):
    for name in (None, "mine"):
        twice = [source(sources["few"], weight=weight, source=name) for weight in (1, 2)]
        with pytest.raises(ValueError, match="train sources number 1 and 2 both call their rows '(llava .few.|mine)'"):
            prepare(Mixture(twice), tmp_path / "mix")
    assert not (tmp_path / "mix").exists()


def test_a_licence_may_be_corrected_without_reading_again(sources, tmp_path, monkeypatch):
    prepare(Mixture([source(sources["few"], licence=["mit", "cc0-1.0"])]), tmp_path / "mix")
    assert "mit, cc0-1.0 |" in (tmp_path / "mix" / "README.md").read_text()
    monkeypatch.setattr(prepare_module, "_write_shard", None)
    prepare(Mixture([source(sources["few"], licence="mit")]), tmp_path / "mix")
    assert "license: mit" in (tmp_path / "mix" / "README.md").read_text()


def test_rows_that_were_deleted_are_written_again_and_a_changed_source_is_noticed(tmp_path):
    rows = write_llava(tmp_path / "rows", 3)
    prepare(Mixture([source(rows)]), tmp_path / "mix")
    (file,) = (tmp_path / "mix" / "data").iterdir()
    before = file.read_bytes()
    file.unlink()
    prepare(Mixture([source(rows)]), tmp_path / "mix")
    assert file.read_bytes() == before
    text = (tmp_path / "rows" / "rows.json").read_text()
    (tmp_path / "rows" / "rows.json").write_text(text.replace("question", "problem "))
    with pytest.raises(ValueError, match="its sources have changed since"):
        prepare(Mixture([source(rows)]), tmp_path / "mix")


def test_a_folder_that_another_process_writes_into_is_refused(sources, tmp_path):
    prepare(Mixture([source(sources["few"])]), tmp_path / "mix")
    with FileLock(tmp_path / "mix" / "work" / "lock"):
        with pytest.raises(ValueError, match="is being written by another process"):
            prepare(Mixture([source(sources["few"])]), tmp_path / "mix")


def test_a_repository_that_cannot_be_is_refused_before_anything_is_read(sources, tmp_path):
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"sources": [source(sources["few"])]}))
    arguments = PrepareArguments(str(tmp_path / "mix.yaml"), str(tmp_path / "mix"), push_to_hub="bad//name")
    with pytest.raises(ValueError, match="`push_to_hub` is 'bad//name'"):
        prepare_data.main(arguments)
    assert not (tmp_path / "mix").exists()


def test_drawings_of_thin_lines_are_found_again(tmp_path):
    """Most of their pixels are white, so that a coarse look sees nothing in them."""
    for folder, numbers in (("train", range(6)), ("evaluation", range(3))):
        write_llava(tmp_path / folder, len(numbers))
        for number in numbers:
            drawing = Image.new("RGB", (512, 512), "white")
            points = np.random.default_rng(number).integers(0, 512, 6).tolist()
            ImageDraw.Draw(drawing).polygon(points, outline="black", width=2)
            drawing.save(tmp_path / folder / "images" / f"{number}.png")
    mixture = Mixture([source(str(tmp_path / "train"))], [source(str(tmp_path / "evaluation"))])
    reports = prepare(mixture, tmp_path / "mix")
    assert reports["train"].dropped == {"an image that is also in the evaluation rows": ["0", "1", "2"]}


def test_rows_of_one_id_are_drawn_one_by_one(tmp_path):
    rows = write_llava(tmp_path / "rows", 60, seed=1)
    records = [record | {"id": "same"} for record in json.loads((tmp_path / "rows" / "rows.json").read_text())]
    (tmp_path / "rows" / "rows.json").write_text(json.dumps(records))
    report = prepare(Mixture([source(rows, weight=0.3)]), tmp_path / "mix")["train"]
    assert 8 <= report.kept["llava"] <= 28
    assert f"{60 - report.kept['llava']} not taken, by the `weight` of their source" in str(report)


def test_a_filter_that_fails_is_named_with_the_row(sources, tmp_path):
    (tmp_path / "own.py").write_text("def broken(row):\n    return row['oops']\n")
    mixture = Mixture([source(sources["few"], filters=[f"{tmp_path}/own.py:broken"])])
    with pytest.raises(ValueError, match="The filter `own.py:broken` fails on row '100' .* KeyError: 'oops'"):
        prepare(mixture, tmp_path / "mix")


def test_a_source_without_a_row_left_is_warned_of_and_the_others_go_on(sources, tmp_path, caplog):
    none = source(sources["few"], source="none", filters=[{"trainer.data.filters.answer_words": {"most": 0}}])
    mixture = Mixture([source(sources["many"]), none])
    assert prepare(mixture, tmp_path / "mix")["train"].kept == mixture.read()[2]["train"].kept == {"llava": 40}
    assert caplog.text.count("The source `none` has no row left") == 2


@pytest.mark.parametrize("num_proc", [0, -1, 1.5, True])
def test_a_number_of_processes_that_cannot_be_is_refused(sources, tmp_path, num_proc):
    with pytest.raises(ValueError, match="`num_proc` must be at least 1"):
        prepare(Mixture([source(sources["few"])]), tmp_path / "mix", num_proc)


# ---------------------------------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------------------------------

PUSH_AND_TRAIN = """
import re
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from trl import ModelConfig, TrlParser
from recipes import prepare_data, sft_amvl
from trainer import AMVLSFTConfig

mixture, folder = sys.argv[1], Path(sys.argv[2])
for _ in range(2):  # pushing again changes nothing
    prepare_data.main(prepare_data.PrepareArguments(mixture, str(folder / "mix"), push_to_hub="someone/mix"))
flags = "--use_cpu true --max_steps 1 --per_device_train_batch_size 2 --num_latents 2 --latent_size 8 --bf16 false"
flags += " --gradient_checkpointing false --eval_strategy steps --eval_steps 1 --report_to none --save_strategy no"
flags += f" --dataset_format prepared --dataset_name someone/mix --model_name_or_path {folder / 'stock'}"
for streaming in ("false", "true"):
    words = [*flags.split(), "--output_dir", str(folder / streaming), "--dataset_streaming", streaming]
    parser = TrlParser((sft_amvl.AMVLScriptArguments, AMVLSFTConfig, ModelConfig))
    sft_amvl.main(*parser.parse_args_and_config(words))
    card = (folder / streaming / "README.md").read_text()
    assert "- mine: mit" in card and "| prior |" in card and "- someone/mix" in card.split("---")[1], card
    assert streaming == "true" or re.search(r"- `someone/mix` at `[0-9a-f]{40}`", card), card
print("trained")
"""


@pytest.mark.slow
def test_a_mixture_is_pushed_with_its_card_and_trained_on_from_the_hub(sources, tmp_path):
    mixture = {
        "sources": [source(sources["many"], source="mine", licence="mit")],
        "evaluation": [source(sources["held out"], source="mine too")],
    }
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(mixture))
    for part in build_tiny_backbone():
        part.save_pretrained(tmp_path / "stock")
    with LoopbackHub() as hub:
        output = run_client(hub, tmp_path / "client", PUSH_AND_TRAIN, tmp_path / "mix.yaml", tmp_path, REPOSITORY)
        files = hub.datasets["someone/mix"].files
    assert output.splitlines()[-1] == "trained" and "/datasets/someone/mix" in output
    assert set(files) - {".gitattributes"} == {
        "README.md",
        "contact_sheet.jpg",
        *(f"{name}.{suffix}" for name in ("report", "report_test") for suffix in ("html", "json")),
        *(f"data/{split}-00000-of-00001.parquet" for split in ("train", "test")),
    }
    card = files["README.md"].data.decode()
    assert 'load_dataset("someone/mix", split="train")' in card and "license: mit" not in card.split("---")[1]
    assert str(tmp_path) not in "".join(file.data.decode("utf-8", "ignore") for file in files.values())
