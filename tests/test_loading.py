"""Rows come in one order for any number of workers and processes, each once, and a resumed run decodes none that it skips."""

import functools
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from loading_runs import make_row, make_rows, run
from PIL import Image, ImageFile
from tiny import build_tiny_backbone

from modeling_amvl import AMVLProcessor
from trainer import AMVLDataCollator
from trainer.collator import read_image
from trainer.data.lengths import image_size, row_length, token_lengths
from trainer.data.step_batches import StepBatches, split_step
from trainer.loading import warn_of_shards


pytestmark = pytest.mark.xdist_group("loading")  # one worker makes what all of them share
ROWS = 11
STREAM = {"shards": 3, "buffer": 4, "max_steps": 6}  # two passes
EPOCHS = {"num_train_epochs": 2}
STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance")
CASES = {
    "stream": STREAM,
    **{strategy: {**EPOCHS, "train_sampling_strategy": strategy} for strategy in STRATEGIES},
}
SPLITS = ({"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
SKIPPING = {"on_bad_row": "skip", "max_skips_in_a_row": 20}
BY_TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}  # of each of two processes


@pytest.fixture
def collator():
    return AMVLDataCollator(AMVLProcessor.from_backbone(build_tiny_backbone()[1]))


def steps_of(trainer):
    """The row numbers of each step."""
    return [list(itertools.chain(*batches)) for batches in trainer.seen.values()]


def sets_of(steps):
    return [sorted(set(step)) for step in steps]


@functools.cache
def whole_run(case, folder="/nonexistent"):
    """The steps of a run without workers, a step in one batch."""
    return steps_of(run(folder, **CASES[case], **SPLITS[0]))


# ---------------------------------------------------------------------------------------------------------------------
# One order
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_each_epoch_has_every_row_once_in_another_order(case):
    steps = whole_run(case)
    assert len(steps) == 6 and steps[:3] != steps[3:] or case == "sequential"
    for epoch in (steps[:3], steps[3:]):
        assert sorted(itertools.chain(*epoch)) == list(range(ROWS))


@pytest.mark.parametrize(
    ("case", "num_workers"),
    [
        *itertools.product(("stream", "random"), (0, 1, 2, 3)),
        ("group_by_length", 0),
        ("batch_rebalance", 2),
    ],
)
def test_the_rows_of_a_step_hang_neither_on_workers_nor_on_how_it_is_split(case, num_workers, tmp_path):
    split = SPLITS[num_workers != 2]
    steps = steps_of(run(tmp_path, **CASES[case], **split, dataloader_num_workers=num_workers))
    assert sets_of(steps) == sets_of(whole_run(case))
    if case != "batch_rebalance":  # also in the same order
        assert steps == whole_run(case)


def test_workers_that_persist_see_the_next_pass(tmp_path):
    settings = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    assert steps_of(run(tmp_path, **STREAM, **SPLITS[0], **settings)) == whole_run("stream")


@pytest.mark.parametrize("case", ["stream", "random", "batch_rebalance"])
def test_what_is_no_whole_step_can_be_dropped(case, tmp_path):
    steps = steps_of(run(tmp_path, **CASES[case], **SPLITS[1], dataloader_drop_last=True))
    assert [len(step) for step in steps] == [4] * len(steps)
    assert sets_of(steps[:2]) == sets_of(whole_run(case)[:2])


def test_a_seed_gives_one_order_and_another_seed_another(tmp_path):
    settings = {**EPOCHS, **SPLITS[0]}
    assert steps_of(run(tmp_path, **settings, data_seed=1)) == steps_of(run(tmp_path, **settings, seed=1))
    assert steps_of(run(tmp_path, **settings, seed=1)) != whole_run("random")


@pytest.mark.parametrize("num_rows", range(1, 26))
def test_processes_share_every_row_and_make_as_many_batches(num_rows):
    for batch_size, num_batches, num_ranks in itertools.product((1, 2, 3), (1, 2), (1, 2, 3)):
        settings = {"num_rows": num_rows, "batch_size": batch_size, "num_batches": num_batches, "num_ranks": num_ranks}
        samplers = [StepBatches(lambda epoch: list(range(num_rows)), **settings, rank=r) for r in range(num_ranks)]
        parts = [list(sampler) for sampler in samplers]
        assert {len(part) for part in parts} == {len(samplers[0])}
        rows = [row for batches in zip(*parts) for batch in batches for row in batch]
        assert list(dict.fromkeys(rows)) == list(range(num_rows)) and len(rows) - num_rows < num_ranks
        assert all(1 <= len(batch) <= batch_size for part in parts for batch in part)


def test_a_step_is_split_evenly_and_rows_are_repeated_only_where_a_group_would_be_empty():
    assert split_step([*"abcde"], 2) == [[*"ab"], [*"cde"]]
    assert split_step(["a"], 3) == [["a"], ["a"], ["a"]]
    assert split_step([*"abc"], 2, even=True) == [[*"ab"], [*"ca"]]


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Returns a function that gives the folder of a run with a checkpoint of each step."""

    @functools.cache
    def make(case):
        folder = tmp_path_factory.mktemp(case)
        run(folder, **CASES[case], **SPLITS[0], save_strategy="steps", save_steps=1)
        return folder

    return make


@pytest.mark.parametrize(  # within the first epoch, at its end, within the second
    ("case", "step"),
    [("stream", 2), ("stream", 3), ("stream", 5), ("random", 3), ("random", 5), ("batch_rebalance", 5)],
)
def test_a_resumed_run_goes_on_with_the_next_row_and_decodes_none_before(case, step, checkpoints, tmp_path):
    left = whole_run(case)[step:]
    broken = set(range(ROWS)) - set(itertools.chain(*left))
    assert broken or step < 5
    settings = {**CASES[case], **SPLITS[1], "broken": tuple(broken)}
    path = str(checkpoints(case) / f"checkpoint-{step}")
    resumed = run(tmp_path, **settings, dataloader_num_workers=1, resume=path)
    assert sets_of(steps_of(resumed)) == sets_of(left)
    if broken:
        with pytest.raises(ValueError, match="cannot identify image file"):
            run(tmp_path / "from the start", **settings)


def test_the_first_row_may_be_a_bad_one(tmp_path):
    settings = {"num_rows": 3, "broken": (0,), "num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    assert steps_of(run(tmp_path, **settings, on_bad_row="skip", per_device_train_batch_size=1)) == [[1], [1], [2]]
    with pytest.raises(ValueError, match="Row 0 of `train_dataset` cannot be trained on: cannot identify image file"):
        run(tmp_path, **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_rows_at_the_end_of_a_stream_are_counted(num_workers, tmp_path):
    settings = {"shards": 1, "broken": (0, 2, 3, 4), "num_rows": 5, "max_steps": 1, "per_device_train_batch_size": 2}
    settings |= {"on_bad_row": "skip", "dataloader_num_workers": num_workers}
    trainer = run(tmp_path, **settings)
    assert steps_of(trainer) == [[1]] and trainer.skipped() == {"skipped_rows": 4}


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_bad_row_of_an_evaluation_is_named(is_stream, tmp_path):
    trainer = run(tmp_path, max_steps=1)
    rows = make_rows(5, broken=(3,))
    trainer.eval_dataset = {"hard": rows.to_iterable_dataset() if is_stream else rows}
    with pytest.raises(ValueError, match="Row 3 of `hard` cannot be evaluated on: .* Repair or drop it[.]$"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="Row 3 of `eval_dataset` cannot be evaluated on"):
        trainer.evaluate(trainer.eval_dataset["hard"])
    with pytest.raises(ValueError, match="Row 2 of `train_dataset` cannot be trained on"):
        run(tmp_path, broken=(2,), **STREAM | {"shards": 1, "buffer": 0})


def test_a_longer_stream_goes_on_where_the_shorter_ended(tmp_path):
    settings = {**STREAM, **SPLITS[0], "max_steps": 2}
    run(tmp_path, **settings, save_strategy="steps", save_steps=2)
    resumed = run(tmp_path / "more", **{**settings, "max_steps": 6}, resume=str(tmp_path / "checkpoint-2"))
    assert steps_of(resumed) == whole_run("stream")[2:]


def test_a_stream_that_is_done_is_not_trained_on(checkpoints, tmp_path):
    resumed = run(tmp_path, **STREAM, **SPLITS[0], resume=str(checkpoints("stream") / "checkpoint-6"))
    assert not resumed.seen and resumed.state.global_step == 6


def test_a_checkpoint_of_steps_of_another_size_is_refused(tmp_path):
    run(tmp_path, num_rows=40, max_steps=2, **SPLITS[0], save_strategy="steps", save_steps=2)
    more = {"num_rows": 40, "max_steps": 3, "per_device_train_batch_size": 2}
    with pytest.raises(ValueError, match="`rows per step` was 4 and is 2 now"):
        run(tmp_path / "more", resume=str(tmp_path / "checkpoint-2"), **more)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes noted, started once by `accelerate launch`: a pair for each run."""
    folder = tmp_path_factory.mktemp("two")
    run(folder / "one", **STREAM, **SPLITS[0], save_strategy="steps", save_steps=2)
    specs = {case: {**settings, **BY_TWO} for case, settings in CASES.items() if case != "sequential"}
    specs["workers"] = {**STREAM, **BY_TWO, "dataloader_num_workers": 2}
    specs["resumed"] = {**STREAM, **BY_TWO, "resume": str(folder / "one" / "checkpoint-2"), "eval_rows": 4}
    specs["shards"] = {"shards": 2, "num_rows": 13, "max_steps": 5, "shard_stream": True, **BY_TWO}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    script = Path(__file__).with_name("loading_runs.py")
    root = script.parents[1]
    path = os.pathsep.join([str(root), str(script.parent)])
    finished = subprocess.run(
        [*command, str(script), str(folder), json.dumps(specs)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    noted = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {name: (noted[0][name], noted[1][name]) for name in specs} | {"stderr": finished.stderr}


def joined(pair):
    """The rows of each step, of both processes."""
    return [
        [row for batch in (*a, *b) for row in batch] for a, b in zip(pair[0]["seen"], pair[1]["seen"], strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["stream", "workers", "random", "group_by_length", "batch_rebalance"])
def test_two_processes_share_the_steps_of_one(two_processes, case):
    steps, whole = joined(two_processes[case]), whole_run("stream" if case == "workers" else case)
    assert sets_of(steps) == sets_of(whole)
    assert [len(step) for step in steps] == [len(step) for step in whole]  # no row in both
    if case != "batch_rebalance":
        assert steps == whole


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(two_processes):
    assert joined(two_processes["resumed"]) == whole_run("stream")[2:]


@pytest.mark.slow
def test_two_processes_evaluate_on_a_stream_as_one(two_processes, tmp_path):
    one = run(tmp_path, **EPOCHS, **SPLITS[0], eval_rows=4).nll
    both = [noted["nll"] for noted in two_processes["resumed"]]
    assert both[0] == both[1] and both[0] == pytest.approx(one, rel=0.05)


@pytest.mark.slow
def test_what_several_processes_read_of_a_stream_is_said_once(two_processes, caplog):
    words = "reads the whole stream and decodes only its own images"
    assert two_processes["stderr"].count(words) == len({"stream", "workers", "resumed"})
    warn_of_shards(1, 2, is_shard=False)
    assert "It has 1 shards: `shard_stream=True` would read less, and needs 2." in caplog.text
    warn_of_shards(3, 2, is_shard=True)
    assert "deals 3 shards to 2 processes" in caplog.text and "Write a multiple of 2 files" in caplog.text


@pytest.mark.slow
def test_with_shards_of_its_own_no_process_waits_for_another_at_the_end(two_processes):
    a, b = ([row for step in noted["seen"] for row in step[0]] for noted in two_processes["shards"])
    assert a[:6] == [0, 1, 2, 3, 4, 5] and b[:6] == [7, 8, 9, 10, 11, 12]
    assert set(a) <= set(range(7)) and set(b) <= set(range(7, 13)) and len(a) == len(b) == 10


# ---------------------------------------------------------------------------------------------------------------------
# By length
# ---------------------------------------------------------------------------------------------------------------------


def test_lengths_are_what_the_collator_makes_of_the_rows_and_cost_no_decoding(collator, monkeypatch):
    rows = make_rows(5)
    made = [collator([row]) for row in rows]
    expected = [int(batch["attention_mask"].sum() + batch["completion_mask"].sum()) for batch in made]
    assert len(set(expected)) > 2
    decoded, load = [], ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image) or load(image))
    assert token_lengths(rows, collator) == expected
    assert token_lengths(rows, collator, num_proc=2) == expected
    assert len(set(map(id, decoded))) == 2  # of the first row, each time, to see that the count is right


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_size_of_an_image_is_that_of_the_upright_one(format, orientation):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(buffer, format=format, exif=exif)
    stored = {"bytes": buffer.getvalue(), "path": None}
    assert image_size(stored) == [*read_image(stored, "it").size[::-1]]


def test_a_processor_that_cannot_tell_image_tokens_decodes_to_count_them(collator, monkeypatch, caplog):
    rows = make_rows(5)
    expected = token_lengths(rows, collator)
    stock = type(collator.processor).__mro__[2]
    monkeypatch.delattr(stock, "_get_num_multimodal_tokens")
    assert token_lengths(rows, collator) == expected
    assert "images are decoded to count them" in caplog.text


def test_lengths_are_counted_once(collator, monkeypatch, tmp_path):
    make_rows(5).save_to_disk(str(tmp_path / "rows"))
    lengths = token_lengths(datasets.load_from_disk(str(tmp_path / "rows")), collator)

    def once(row, collator, exact=False):
        assert exact or row["row_id"] == "0"  # the first is looked at again
        return row_length(row, collator, exact)

    monkeypatch.setattr("trainer.data.lengths.row_length", once)
    assert token_lengths(datasets.load_from_disk(str(tmp_path / "rows")), collator) == lengths


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_batches_by_length_have_less_padding(strategy, tmp_path):
    settings = {"num_rows": 32, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    settings["gradient_accumulation_steps"] = 4
    by_chance = run(tmp_path, **settings)
    by_length = run(tmp_path, **settings, train_sampling_strategy=strategy)
    assert by_length.padding < 0.5 * by_chance.padding
    assert sorted(itertools.chain(*steps_of(by_length))) == list(range(32))
    if strategy == "batch_rebalance":  # the very steps, in other batches
        assert sets_of(steps_of(by_length)) == sets_of(steps_of(by_chance))


def test_a_column_of_lengths_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "loading_runs.make_rows", lambda n, _: make_rows(n).add_column("length", [*range(9, 9 - n, -1)])
    )
    settings = {"num_rows": 8, "num_train_epochs": 1, **SPLITS[0], "length_column_name": "length"}
    steps = steps_of(run(tmp_path, **settings, train_sampling_strategy="group_by_length"))
    assert steps[0][0] == 0 and sorted(itertools.chain(*steps)) == list(range(8))


# ---------------------------------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shards": 2, "num_train_epochs": 1}, "`max_steps` is -1, but a stream has no length"),
        ({**STREAM, "train_sampling_strategy": "group_by_length"}, "needs the lengths of all rows"),
        ({**STREAM, "train_sampling_strategy": "batch_rebalance"}, "needs the lengths of all rows"),
        ({**STREAM, "accelerator_config": {"dispatch_batches": True}}, "`dispatch_batches=True` slices"),
        ({"accelerator_config": {"split_batches": True}}, "`split_batches=True` is not for"),
        ({"shard_stream": True}, "`shard_stream=True`, but `train_dataset` is no stream"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 12}, "leaves none of the 11 rows"),
        ({**STREAM, "dataloader_drop_last": True, "per_device_train_batch_size": 12}, "ends before the first step"),
        ({"num_rows": 0}, "`train_dataset` has no rows"),
        (
            {**STREAM, **SKIPPING, "broken": range(ROWS)},
            "None of the 11 rows of the stream can be trained on, the last",
        ),
    ],
)
def test_settings_under_which_rows_would_come_wrongly_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **settings)


class Filtered:
    """Rows of which a stream keeps none."""

    def __init__(self, num_rows, _):
        self.rows = make_rows(num_rows)

    def to_iterable_dataset(self, num_shards):
        return self.rows.to_iterable_dataset(num_shards).filter(lambda row: False)


def test_a_stream_without_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("loading_runs.make_rows", Filtered)
    with pytest.raises(ValueError, match="`train_dataset` is a stream without rows"):
        run(tmp_path, **STREAM)


class Generated:
    """Rows of which `datasets` knows no columns."""

    def __init__(self, num_rows, _):
        self.rows = [make_row(index) for index in range(num_rows)]

    def to_iterable_dataset(self, num_shards):
        def generate(starts):
            for start in starts:
                yield from self.rows[start : start + size]

        size = -(-len(self.rows) // num_shards)
        starts = [*range(0, len(self.rows), size)]
        return datasets.IterableDataset.from_generator(generate, gen_kwargs={"starts": starts})


def test_a_stream_without_known_columns_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr("loading_runs.make_rows", Generated)
    settings = {"max_steps": 3, **SPLITS[0], "dataloader_num_workers": 1}
    steps = steps_of(run(tmp_path, shards=2, **settings))
    assert list(itertools.chain(*steps)) == list(range(ROWS))
