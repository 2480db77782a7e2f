"""The ablation: its arms are those of the paper, its numbers are those of its records, and it goes on where it was cut off."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from scipy import stats
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from recipes import ablate_amvl
from recipes.ablate_amvl import AblationArguments, plan
from trainer import AMVLDataCollator, AMVLSFTConfig
from trainer.ablation.arms import ARMS, PAPER
from trainer.ablation.page import DEFAULT, SFT, draw, interval, summarise, table, verdict
from trainer.ablation.run import PAUSE, TEMPERATURES, add_pauses
from trainer.base import load_base
from trainer.data.color_steps import build_color_steps


REPOSITORY = Path(__file__).resolve().parents[1]
BY_NAME = {arm.name: arm for arm in ARMS}
KINDS = ["1_step", "2_steps"] * 10


# ---------------------------------------------------------------------------------------------------------------------
# Arms
# ---------------------------------------------------------------------------------------------------------------------


def test_every_row_of_the_papers_ablation_is_an_arm_with_its_weights():
    weights = {
        name: tuple(bool(arm.settings["training"][key]) for key in ("ntp_weight", "beta", "gamma"))
        for name, arm in BY_NAME.items()
        if arm.group == "the paper's objective"
    }
    assert weights == {
        "NTP only": (True, False, False),
        "forward only": (False, True, False),
        "reverse only": (False, False, True),
        "NTP + forward": (True, True, False),
        "NTP + reverse": (True, False, True),
        "NTP + both, reverse first": (True, True, True),
        "NTP + both, forward first": (True, True, True),
    }
    objectives = [BY_NAME[name].settings["training"] for name in weights]
    assert all(objective["prior_ntp_weight"] == 0 for objective in objectives)  # the paper has none
    orders = ["together"] * 5 + ["reverse_first", "forward_first"]  # one term alone has none to wait for
    assert [objective["kl_order"] for objective in objectives] == orders


def test_arms_one_step_from_the_default_differ_from_it_in_one_thing():
    default = BY_NAME[DEFAULT].settings
    for arm in ARMS:
        if arm.group not in ("one step from the default", "k and d"):
            continue
        given = {**arm.settings["training"], "initial_token_id": "copied", **arm.settings["latents"]}
        known = {**default["training"], "initial_token_id": "copied", **default["latents"]}
        differ = {key for key in given if given[key] != known.get(key, "not given")}
        assert len(differ) == 1, (arm.name, differ)


def test_every_objective_can_be_trained():
    for arm in ARMS:
        if arm.kind == "amvl":
            AMVLSFTConfig("x", use_cpu=True, bf16=False, **arm.training)
    assert len(BY_NAME) == len(ARMS)
    assert PAPER["prior_ntp_weight"] == 0


def test_pauses_stand_before_every_answer_and_are_not_learnt():
    model, processor = load_base()
    add_pauses(model, processor, 3)
    rows = build_color_steps(2, "train", 0, ("1_step", "2_steps"))
    collator = DataCollatorForVisionLanguageModeling(processor=processor, completion_only_loss=True)
    batch = collator([rows[0], rows[1]])
    pause = processor.tokenizer.convert_tokens_to_ids(PAUSE)
    assert (batch["input_ids"] == pause).sum(1).tolist() == [3, 3]
    assert not (batch["labels"] == pause).any() and (batch["labels"] >= 0).sum(1).tolist() == [2, 2]
    asked = AMVLDataCollator(processor)([rows[0]])["input_ids"][0]
    assert asked[-4:].tolist() == [processor.tokenizer.convert_tokens_to_ids("<|assistant|>"), *[pause] * 3]
    embeddings = model.get_input_embeddings().weight
    assert (embeddings[pause] == embeddings[asked[-4]]).all()


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def record(one, two, swapped=None, copied=0.0):
    """A record whose accuracies of one and two steps are these, in tenths."""

    def hits(one, two):
        return [int(place < tenths) for place in range(10) for tenths in (one, two)]

    right = {"own": hits(one, two)}
    if swapped is None:
        return {"kinds": KINDS, "right": right}
    right |= {name: hits(one, two) for name in ("posterior", "off", *(f"tau {tau}" for tau in TEMPERATURES))}
    right["another's"] = hits(one, swapped)
    mark = [int(place < 20 * copied) for place in range(20)]
    return {
        "kinds": KINDS,
        "right": right,
        "copied": mark,
        "copied_anyway": mark,
        "forward_kl": 1.0,
        "reverse_kl": 2.0,
    }


def test_an_interval_is_students():
    values = [0.7, 0.8, 0.75, 0.72, 0.9]
    found = interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.pop("values") == values
    assert found == pytest.approx({"mean": np.mean(values), "low": low, "high": high})
    assert interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "values": [0.5]}


def test_differences_are_paired_by_seed():
    amvl = {0: record(9, 8, 2), 1: record(9, 5, 1), 2: record(9, 6, 1)}
    sft = {2: record(9, 4), 1: record(9, 3), 0: record(9, 6), 7: record(9, 0)}
    found = summarise({DEFAULT: amvl, SFT: sft, "k = 1": {1: record(9, 7, 1)}})
    over = found[DEFAULT]["over_sft"]
    assert [over[key] for key in ("mean", "low", "high")] == pytest.approx([0.2] * 3)
    assert over["values"] == pytest.approx([0.2] * 3)
    assert found["k = 1"]["over_default"]["values"] == pytest.approx([0.2])
    assert found[SFT]["over_default"]["values"] == pytest.approx([-0.2] * 3)  # by the seeds that both have
    assert "over_default" not in found[DEFAULT]
    assert found[DEFAULT]["multi_hop"]["mean"] == pytest.approx(19 / 30)
    assert found[DEFAULT]["one_step"]["mean"] == pytest.approx(0.9)
    assert found[DEFAULT]["swap"]["mean"] == pytest.approx(-0.5)
    assert "over_sft" not in found[SFT] and "swap" not in found[SFT]


@pytest.mark.parametrize(
    "two, swapped, beats, used",
    [
        ((8, 8, 7), (2, 2, 1), "beats", "are used"),
        ((8, 8, 7), (8, 7, 7), "beats", "are not shown to be used"),
        ((2, 2, 2), (0, 1, 2), "does not beat", "are not shown to be used"),
        ((9, 2, 1), (0, 0, 0), "does not beat", "are not shown to be used"),  # one lucky seed
        ((8, 8, 8), (7, 7, 7), "beats", "are used"),  # ten points exactly
    ],
)
def test_the_verdict_follows_the_intervals(two, swapped, beats, used):
    amvl = {seed: record(9, *pair) for seed, pair in enumerate(zip(two, swapped))}
    said = verdict(summarise({DEFAULT: amvl, SFT: {seed: record(9, 2) for seed in range(3)}}))
    assert f"prior latents {beats} same-data SFT" in said and f"latents {used}:" in said


@pytest.mark.parametrize("num_amvl, num_sft", [(1, 1), (3, 0), (5, 2), (0, 3)])
def test_there_is_no_verdict_on_too_few_seeds(num_amvl, num_sft):
    records = {
        DEFAULT: {seed: record(9, 8, 1) for seed in range(num_amvl)},
        SFT: {seed: record(9, 2) for seed in range(num_sft)},
    }
    assert verdict(summarise({name: runs for name, runs in records.items() if runs})).startswith("No verdict")


def test_table_and_picture_show_every_arm_that_was_run(tmp_path):
    records = {
        DEFAULT: {0: record(9, 8, 1, 0.25), 1: record(9, 7, 1, 0.25)},
        SFT: {0: record(9, 2), 1: record(9, 2)},
        "k = 8": {0: record(10, 6, 1)},
    }
    summary = summarise(records)
    rows = [line.split(" | ") for line in table(summary, ARMS).splitlines() if "**" not in line][2:]
    assert [row[0].strip("| ") for row in rows] == [DEFAULT, SFT, "k = 8"]
    assert rows[0][1:4] == ["2", "90.0", "75.0 (11.5 to 138.5)"] and rows[0][-1] == "25.0 / 25.0 |"
    assert rows[2][4:6] == ["+40.0", "-20.0"]  # against SFT and the default of its seed
    draw(summary, ARMS, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_first_runs_already_make_a_table():
    runs = plan(AblationArguments(num_seeds=2, num_main_seeds=3))
    assert [seed for _, seed in runs] == sorted(seed for _, seed in runs)
    assert {arm.name for arm, seed in runs if seed == 2} == set(BY_NAME)
    assert {arm.name for arm, seed in runs if seed == 3} == {arm.name for arm in ARMS if arm.main}
    assert {DEFAULT, SFT, "prior-decoded loss alone"} < {arm.name for arm in ARMS if arm.main}
    assert {seed for _, seed in plan(AblationArguments(num_seeds=4, num_main_seeds=1))} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    "setting, value",
    [
        ("arms", ["AMVL", "nonsense"]),
        ("arms", []),
        ("num_seeds", 0),
        ("num_test_rows", 3),
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("num_processes", 0),
    ],
)
def test_bad_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=f"`{setting}`"):
        AblationArguments(**{setting: value})


SMALL = ["--num_steps=2", "--num_train_rows=16", "--num_test_rows=8", "--batch_size=4", "--num_seeds=1"]
SMALL += ["--num_main_seeds=2", "--arms", "AMVL", SFT, "NTP only"]


def ablate(folder, *arguments):
    command = [sys.executable, str(REPOSITORY / "recipes" / "ablate_amvl.py"), "--output_dir", str(folder)]
    return subprocess.run([*command, *SMALL, *arguments], capture_output=True, text=True, timeout=300)


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    first = ablate(tmp_path, "--num_processes=2")
    assert first.returncode == 0, first.stderr[-3000:]
    runs = {path.name: path.read_text() for path in (tmp_path / "runs").iterdir()}
    assert len(runs) == 5 and "5 runs, 0 of them done" in first.stdout
    page = (tmp_path / "RESULTS.md").read_text()
    assert page in first.stdout and "| same-data SFT | 2 |" in page and "| NTP only | 1 |" in page
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arms"]["AMVL"]["seeds"] == [1, 2] and results["settings"]["num_steps"] == 2

    lost = tmp_path / "runs" / "NTP-only-seed1.json"
    lost.unlink()
    again = ablate(tmp_path, "--num_processes=1")
    assert again.returncode == 0 and "5 runs, 4 of them done" in again.stdout, again.stderr[-3000:]
    for name, text in runs.items():
        before, after = json.loads(text), json.loads((tmp_path / "runs" / name).read_text())
        before.pop("seconds_per_step"), after.pop("seconds_per_step")
        assert before == after, name  # the one that was run again, too
    assert json.loads((tmp_path / "results.json").read_text())["arms"] == results["arms"]

    other = ablate(tmp_path, "--batch_size=2")
    assert other.returncode != 0 and "`output_dir`" in other.stderr and "'batch_size': 2" in other.stderr
    assert {path.name for path in (tmp_path / "runs").iterdir()} == set(runs)


def test_killed_it_leaves_no_process_and_loses_no_run(tmp_path):
    command = [sys.executable, str(REPOSITORY / "recipes" / "ablate_amvl.py"), "--output_dir", str(tmp_path), *SMALL]
    process = subprocess.Popen([*command, "--num_processes=1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("runs/[!.]*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert children
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    done = len(list(tmp_path.glob("runs/[!.]*")))
    assert 1 <= done < 5
    again = ablate(tmp_path, "--num_processes=1")
    assert again.returncode == 0 and f"5 runs, {done} of them done" in again.stdout, again.stderr[-3000:]
    assert len(list(tmp_path.glob("runs/[!.]*"))) == 5


def test_a_record_of_another_objective_is_not_reused(tmp_path):
    arguments, arm = AblationArguments(output_dir=str(tmp_path)), BY_NAME[DEFAULT]
    path = ablate_amvl.record_path(tmp_path, arm, 1)
    path.parent.mkdir()
    ran = {**arm.settings, "training": {**arm.settings["training"], "gamma": 0.5}}
    whole = {"arm": ran, "seed": 1, "budget": arguments.budget, "commit": "x", "right": {"own": [1]}}
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="'gamma': 0.5.* is asked for"):
        ablate_amvl.read_record(path, arm, 1, arguments.budget)
    for text in ("", json.dumps(whole)[:-9], "[]", json.dumps({**whole, "right": {}})):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path.name}` is no record of a run .*remove the file"):
            ablate_amvl.read_record(path, arm, 1, arguments.budget)
