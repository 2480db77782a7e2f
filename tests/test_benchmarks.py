"""Every benchmark, in each shape that it is published in, becomes the same questions; what cannot be asked is counted."""

import base64
import io
import json

import datasets
import numpy as np
import pytest
from loopback_hub import LoopbackHub
from PIL import Image
from test_loopback_hub import run_client

from trainer.data.puzzles import FEATURES, build_puzzles
from trainer.evaluation.benchmarks import BENCHMARKS, BLINK_TASKS, DIRECT_ANSWER, PAPER_TASKS
from trainer.evaluation.questions import prepare_questions


def picture(seed, size=(32, 24)):
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(path):
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


def same_picture(path, data):
    return np.array_equal(pixels(path), pixels(io.BytesIO(data)))


def write_parquet(rows, path, features=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def blink_row(number, num_images=2, options=("left", "right"), answer="(B)", **changes):
    lines = "\n".join(f"({'ABCD'[place]}) {option}" for place, option in enumerate(options))
    row = {
        "idx": f"val_Jigsaw_{number}",
        "question": "Which fits?",
        "sub_task": "Jigsaw",
        **{f"image_{place}": None for place in range(1, 5)},
        **{
            f"image_{place}": {"bytes": picture(10 * number + place), "path": None}
            for place in range(1, num_images + 1)
        },
        "choices": list(options),
        "answer": answer,
        "prompt": f"Which fits? Select from the following choices.\n{lines}\n",
        "explanation": "",
    }
    return row | changes


def blink_folder(folder, tasks=("Jigsaw", "Multi-view_Reasoning", "Counting"), card=True):
    for task in tasks:
        write_parquet(
            [blink_row(number) for number in range(2)], folder / task / "val-00000-of-00001.parquet", FEATURES
        )
        hidden = [blink_row(9, answer="hidden")]
        write_parquet(hidden, folder / task / "test-00000-of-00001.parquet", FEATURES)
    if card:
        configs = "".join(
            f"- config_name: {task}\n  data_files:\n  - split: val\n    path: {task}/val-*\n  - split: test\n    path: {task}/test-*\n"
            for task in tasks
        )
        (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


def vstar_row(number, category="relative_position", **changes):
    text = f"Is the cup on the left or right side of bowl {number}?\n(A) The cup is on the left.\n(B) The cup is on the right.\n"
    row = {"text": text + DIRECT_ANSWER, "category": category, "label": "B", "question_id": str(number)}
    return {"image": f"{category}/sa_{number}.jpg", **row} | changes


def vstar_folder(folder, rows=None):
    rows = [vstar_row(0), vstar_row(0, "direct_attributes"), vstar_row(1)] if rows is None else rows
    for row in rows:
        if row["image"]:
            (folder / row["image"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / row["image"]).write_bytes(picture(len(row["image"])))
    (folder / "test_questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return rows


def hrbench_rows(number, category="single"):
    texts = ["red", "blue", "green", "white"]
    for cycle in range(4):
        turned = texts[-cycle:] + texts[:-cycle]
        yield {
            "index": 4 * number + cycle,
            "question": f"What is the colour of cup {number}?",
            "answer": "ABCD"[turned.index("blue")],
            "category": category,
            **dict(zip("ABCD", turned)),
            "cycle_category": str(cycle),
            "image": base64.b64encode(picture(number)).decode(),
        }


def visual_puzzle(number, options=("1", "2", "3", "4"), **changes):
    image = {"bytes": picture(number), "path": None}
    row = {"id": number, "category": "spatial", "image": image, "question": "What comes next?", "answer": "C"}
    return row | {"options": None if options is None else list(options), "difficulty": "Easy"} | changes


VISUAL_PUZZLES = datasets.Features(
    {
        "id": datasets.Value("int64"),
        **{key: datasets.Value("string") for key in ("category", "question", "answer", "difficulty")},
        "image": datasets.Image(),
        "options": datasets.List(datasets.Value("string")),
    }
)


@pytest.mark.parametrize("card", [True, False])
def test_blink_is_its_prompt_after_its_images_task_by_task(tmp_path, card):
    blink_folder(tmp_path / "data", card=card)
    asked = prepare_questions("blink", tmp_path / "questions", tmp_path / "data")
    assert [question.task for question in asked.questions] == ["Counting"] * 2 + ["Jigsaw"] * 2 + [
        "Multi-view_Reasoning"
    ] * 2
    question = asked.questions[2]
    assert question.prompt == f"{blink_row(0)['prompt'].rstrip()}\n{DIRECT_ANSWER}"
    assert (question.gold, question.options, question.num_options) == ("B", ["left", "right"], 2)
    assert [same_picture(path, picture(1 + place)) for place, path in enumerate(question.images)] == [True, True]
    content = question.row()["prompt"][0]["content"]
    assert [part["type"] for part in content] == ["image", "image", "text"]
    assert asked.rule == "mean over tasks" and asked.report["dropped"] == {}
    assert asked.report["missing_tasks"] == sorted(set(BLINK_TASKS) - {"Counting", "Jigsaw", "Multi-view_Reasoning"})
    paper = prepare_questions("blink_paper", tmp_path / "paper", tmp_path / "data", answer_line="")
    assert {question.task for question in paper.questions} == {"Jigsaw", "Multi-view_Reasoning"}
    assert paper.questions[0].prompt == blink_row(0)["prompt"].rstrip()
    assert len(PAPER_TASKS) == 7 and len(BLINK_TASKS) == 14 and set(PAPER_TASKS) < set(BLINK_TASKS)


def test_what_cannot_be_asked_is_counted_with_its_reason_and_nothing_is_lost(tmp_path):
    rows = [
        blink_row(0),
        blink_row(1, answer="hidden"),
        blink_row(2, answer="(C)"),
        blink_row(3, num_images=0),
        blink_row(4, image_1={"bytes": b"no picture", "path": None}),
        blink_row(5, prompt=None),
        blink_row(6, answer=""),
        blink_row(7, choices=["only one"]),
        blink_row(9, choices=["left", "right", "up"]),
        blink_row(10, choices=["right", "left"]),
        blink_row(11, 3, image_2=None),
        blink_row(12, image_1=None),
        blink_row(13, prompt="<image> Which?\n(A) left\n(B) right"),
        blink_row(8, options=("a", "b", "c", "d"), answer="D"),
    ]
    write_parquet(rows, tmp_path / "data" / "Jigsaw" / "val-0.parquet", FEATURES)
    asked = prepare_questions("blink", tmp_path / "questions", tmp_path / "data")
    assert [(question.row_id, question.gold) for question in asked.questions] == [
        ("val_Jigsaw_0", "B"),
        ("val_Jigsaw_8", "D"),
    ]
    assert {reason: entry["rows"] for reason, entry in asked.report["dropped"].items()} == {
        "a hidden answer": 1,
        "an answer that is not among the options": 1,
        "no image": 1,
        "an image that cannot be read": 1,
        "a question that is no text": 1,
        "no answer": 1,
        "another number of options than 2 to 26": 1,
        "choices that are not the options in its prompt": 2,
        "an image that is missing": 2,
        "an image placeholder in its text": 1,
    }
    assert (
        asked.report["read"] == 14
        and "val_Jigsaw_2" in asked.report["dropped"]["an answer that is not among the options"]["examples"][0]
    )
    write_parquet(rows[1:2], tmp_path / "hidden" / "Jigsaw" / "val-0.parquet", FEATURES)
    with pytest.raises(
        ValueError, match="no question that can be asked of `benchmark` 'blink': 1 rows with a hidden answer"
    ):
        prepare_questions("blink", tmp_path / "nothing", tmp_path / "hidden")
    assert not (tmp_path / "nothing").exists()


def test_vstar_is_the_same_from_paths_and_from_its_mirror(tmp_path):
    rows = vstar_folder(tmp_path / "paths")
    mirrored = [row | {"image": {"bytes": picture(len(row["image"])), "path": None}} for row in rows]
    features = datasets.Features({key: datasets.Value("string") for key in rows[0]} | {"image": datasets.Image()})
    write_parquet(mirrored, tmp_path / "mirror" / "data" / "test-00000-of-00001.parquet", features)
    paths, mirror = (
        prepare_questions("vstar", tmp_path / f"{name} asked", tmp_path / name) for name in ("paths", "mirror")
    )
    assert paths.digest == mirror.digest and len(paths.questions) == 3
    question = paths.questions[0]
    assert question.prompt == rows[0]["text"] and question.prompt.count(DIRECT_ANSWER) == 1
    assert question.options == ["The cup is on the left.", "The cup is on the right."] and question.gold == "B"
    assert {question.task for question in paths.questions} == {"relative_position", "direct_attributes"}
    assert len({question.row_id for question in paths.questions}) == 3 and paths.rule == "mean over rows"


def test_vstar_names_lost_files_bad_lines_and_paths_that_lead_out(tmp_path):
    vstar_folder(tmp_path / "data")
    (tmp_path / "secret.png").write_bytes(picture(0))
    lines = [vstar_row(7), vstar_row(8, image="../secret.png"), vstar_row(9, image="")]
    with open(tmp_path / "data" / "test_questions.jsonl", "a") as file:
        file.write("\n".join(map(json.dumps, lines)) + "\n{broken\n")
    asked = prepare_questions("vstar", tmp_path / "questions", tmp_path / "data")
    assert len(asked.questions) == 3 and {
        reason: entry["rows"] for reason, entry in asked.report["dropped"].items()
    } == {
        "an image file that is missing": 1,
        "an image outside the data folder": 1,
        "an image that is no path": 1,
        "a line that is no JSON": 1,
    }


@pytest.mark.parametrize("card", [True, False])
def test_hrbench_takes_its_size_and_keeps_rotations_of_a_question_together(tmp_path, card):
    for size, numbers in (("4k", (0, 1)), ("8k", (2,))):
        rows = [row for number in numbers for row in hrbench_rows(number, "cross" if number else "single")]
        write_parquet(rows, tmp_path / "data" / f"hr_bench_{size}.parquet")
    if card:
        files = "".join(f"  - split: hrbench_{size}\n    path: hr_bench_{size}.parquet\n" for size in ("4k", "8k"))
        (tmp_path / "data" / "README.md").write_text(
            f"---\nconfigs:\n- config_name: hrbench_version_split\n  data_files:\n{files}---\n"
        )
    asked = prepare_questions("hrbench_4k", tmp_path / "questions", tmp_path / "data")
    assert [question.gold for question in asked.questions] == list("BCDA") * 2
    assert [question.options["ABCD".index(question.gold)] for question in asked.questions] == ["blue"] * 8
    groups = [question.group for question in asked.questions]
    assert len(set(groups[:4])) == len(set(groups[4:])) == 1 and groups[0] != groups[4]
    assert asked.questions[0].prompt == (
        f"What is the colour of cup 0?\n(A) red\n(B) blue\n(C) green\n(D) white\n{DIRECT_ANSWER}"
    )
    assert same_picture(asked.questions[0].images[0], picture(0))
    assert len(list((tmp_path / "questions" / "images").iterdir())) == 2  # one for four rotations
    assert len(prepare_questions("hrbench_8k", tmp_path / "other", tmp_path / "data").questions) == 4


@pytest.mark.parametrize(("split", "in_picture"), [("train", None), ("test", ["", " ", "", ""]), ("test", [None] * 4)])
def test_visual_puzzles_take_the_only_split_and_options_in_the_picture(tmp_path, split, in_picture):
    rows = [
        visual_puzzle(0),
        visual_puzzle(1, in_picture),
        visual_puzzle(2, answer="(E)"),
        visual_puzzle(3, answer="4"),
    ]
    write_parquet(rows, tmp_path / "data" / "data" / f"{split}-00000-of-00001.parquet", VISUAL_PUZZLES)
    asked = prepare_questions("visualpuzzles", tmp_path / "questions", tmp_path / "data")
    assert [(question.gold, question.options, question.num_options) for question in asked.questions] == [
        ("C", ["1", "2", "3", "4"], 4),
        ("C", None, 4),
        ("D", ["1", "2", "3", "4"], 4),
    ]
    assert "(A), (B), (C) and (D) are in the picture.\n" + DIRECT_ANSWER in asked.questions[1].prompt
    assert list(asked.report["dropped"]) == ["an answer that is not among the options"]
    write_parquet(rows, tmp_path / "data" / "data" / "validation-00000-of-00001.parquet", VISUAL_PUZZLES)
    with pytest.raises(ValueError, match="has the splits .*validation.*one was expected"):
        prepare_questions("visualpuzzles", tmp_path / "again", tmp_path / "data")


def test_puzzles_are_read_from_a_folder_or_made_from_photographs(tmp_path):
    for kind in ("IQ_Test", "Jigsaw"):
        build_puzzles(kind, 3, "val", image_size=96).to_parquet(
            tmp_path / "data" / kind / "val-00000-of-00001.parquet"
        )
    asked = prepare_questions("puzzles", tmp_path / "questions", tmp_path / "data")
    assert [question.task for question in asked.questions] == ["IQ_Test"] * 3 + ["Jigsaw"] * 3
    assert DIRECT_ANSWER not in asked.questions[0].prompt  # as models were trained
    made, again = (prepare_questions("puzzles", tmp_path / name, max_rows=1, seed=3) for name in ("a", "b"))
    assert made.digest == again.digest and len({question.task for question in made.questions}) == 9


def test_a_folder_of_questions_is_read_again_and_never_mixed(tmp_path):
    vstar_folder(tmp_path / "data")
    first = prepare_questions("vstar", tmp_path / "questions", tmp_path / "data")
    assert prepare_questions("vstar", tmp_path / "questions", tmp_path / "data") == first
    with pytest.raises(ValueError, match="`answer_line` was .Answer with.* and is 'Think!'.*`output_dir`"):
        prepare_questions("vstar", tmp_path / "questions", tmp_path / "data", answer_line="Think!")
    with pytest.raises(ValueError, match="`benchmark` was 'vstar' and is 'blink'"):
        prepare_questions("blink", tmp_path / "questions", tmp_path / "data")
    vstar_folder(tmp_path / "data", [vstar_row(5)])
    with pytest.raises(ValueError, match="`data_files` was .* and is"):
        prepare_questions("vstar", tmp_path / "questions", tmp_path / "data")


def test_blink_in_one_table_is_asked_by_task(tmp_path):
    rows = [
        blink_row(number, sub_task=task) for task in ("Jigsaw", "Counting", "IQ_Test", "Other") for number in range(3)
    ]
    write_parquet(rows, tmp_path / "data" / "val-00000-of-00001.parquet", FEATURES)
    for name, expected in (("blink", ["Jigsaw", "Counting", "IQ_Test"]), ("blink_paper", ["Jigsaw", "IQ_Test"])):
        asked = prepare_questions(name, tmp_path / name, tmp_path / "data", max_rows=2)
        assert [question.task for question in asked.questions] == [task for task in expected for _ in range(2)]
        assert asked.report["dropped"]["another task than those of the benchmark"]["rows"] == 2


def test_categories_are_one_line_of_a_table_and_texts_are_unicode(tmp_path):
    categories = [3, "a | b\nc", "total", "", None, ["x"], True]
    rows = [vstar_row(number) | {"category": category} for number, category in enumerate(categories)]
    rows.append(vstar_row(9, text="bad \ud800\n(A) x\n(B) y"))
    vstar_folder(tmp_path / "data", rows)
    asked = prepare_questions("vstar", tmp_path / "questions", tmp_path / "data")
    assert [question.task for question in asked.questions] == ["3", "a / b c", "total (category)", "all", "all"]
    dropped = {reason: entry["rows"] for reason, entry in asked.report["dropped"].items()}
    assert dropped == {"a category that is no text": 2, "a text that is no Unicode": 1}


def test_a_given_answer_line_takes_the_place_of_a_benchmarks_own(tmp_path):
    (row,) = vstar_folder(tmp_path / "data", [vstar_row(0)])
    for line in ("Think.", ""):
        asked = prepare_questions("vstar", tmp_path / f"q{line}", tmp_path / "data", answer_line=line)
        assert asked.questions[0].prompt == (row["text"].removesuffix(DIRECT_ANSWER) + line).strip()


@pytest.mark.parametrize(
    "names",
    [
        ("hrbench_4k-00000-of-00002.parquet", "hrbench_4k-00001-of-00002.parquet", "hrbench_8k.parquet"),
        ("hrbench_4k/0000.parquet", "hrbench_4k/0001.parquet", "hrbench_8k/0000.parquet"),
    ],
)
def test_hrbench_in_several_files_is_found_by_its_size(tmp_path, names):
    for number, name in enumerate(names):
        rows = list(hrbench_rows(number))
        image = rows[0]["image"]
        rows[0]["image"] = "\n".join(image[start : start + 76] for start in range(0, len(image), 76))
        rows[1]["A"], rows[2]["question"] = f"{rows[1]['A']} ", f"{rows[2]['question']}  "
        write_parquet(rows, tmp_path / "data" / name)
    asked = prepare_questions("hrbench_4k", tmp_path / "4k", tmp_path / "data")
    assert len(asked.questions) == 8 and len({question.group for question in asked.questions}) == 2
    assert len(prepare_questions("hrbench_8k", tmp_path / "8k", tmp_path / "data").questions) == 4
    assert len(prepare_questions("hrbench_4k", tmp_path / "few", tmp_path / "data", max_rows=5).questions) == 5
    write_parquet(rows, tmp_path / "hr_bench_8k.parquet")
    with pytest.raises(ValueError, match=r"another size than `benchmark` 'hrbench_4k', .*hr_bench_8k"):
        prepare_questions("hrbench_4k", tmp_path / "other", tmp_path / "hr_bench_8k.parquet")


def test_wrong_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`benchmark` must be one of .*'vstar'.*got 'mmmu'"):
        prepare_questions("mmmu", tmp_path / "questions")
    for name, data in (("puzzles", None), ("vstar", tmp_path)):
        with pytest.raises(ValueError, match="`data_revision` is 'main', but `data` is .*no repository"):
            prepare_questions(name, tmp_path / "questions", data, revision="main")
    with pytest.raises(ValueError, match="`data` is '.*nowhere', which is neither"):
        prepare_questions("vstar", tmp_path / "questions", tmp_path / "nowhere")
    write_parquet([blink_row(0)], tmp_path / "data" / "Other" / "val-0.parquet", FEATURES)
    write_parquet([blink_row(0)], tmp_path / "data" / "More" / "val-0.parquet", FEATURES)
    with pytest.raises(ValueError, match=r"has none of the tasks .*'Jigsaw'.*it has \['More', 'Other'\]"):
        prepare_questions("blink", tmp_path / "questions", tmp_path / "data")
    assert all(benchmark.rule in ("mean over tasks", "mean over rows") for benchmark in BENCHMARKS.values())


FROM_HUB = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from trainer.evaluation.questions import prepare_questions

source = Path(sys.argv[1])
for benchmark, name in (("vstar", "craigwu/vstar_bench"), ("blink", "BLINK-Benchmark/BLINK"), ("hrbench_4k", "DreamMr/HR-Bench")):
    HfApi().create_repo(name, repo_type="dataset")
    HfApi().upload_folder(repo_id=name, folder_path=source / benchmark, repo_type="dataset")
    local = prepare_questions(benchmark, source / "local" / benchmark, source / benchmark)
    published = prepare_questions(benchmark, source / "hub" / benchmark)
    assert published.digest == local.digest and local.report["commit"] is None, benchmark
    assert published.report["commit"] == HfApi().dataset_info(name).sha, published.report
print("all read")
"""


def test_a_hub_id_gives_what_the_local_folder_gives(tmp_path):
    vstar_folder(tmp_path / "vstar")
    blink_folder(tmp_path / "blink", ("Jigsaw", "Counting"))
    write_parquet(list(hrbench_rows(0)), tmp_path / "hrbench_4k" / "hr_bench_4k.parquet")
    (tmp_path / "hrbench_4k" / "README.md").write_text(
        "---\nconfigs:\n- config_name: hrbench_version_split\n  data_files:\n  - split: hrbench_4k\n    path: hr_bench_4k.parquet\n---\n"
    )
    with LoopbackHub() as hub:
        assert run_client(hub, tmp_path / "client", FROM_HUB, tmp_path).splitlines()[-1] == "all read"
