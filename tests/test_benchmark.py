"""The benchmark: its bounds by hand, its inputs and arms against plain code, and the script as it is run."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling_amvl.modeling_amvl import next_token_loss
from recipes import benchmark_amvl
from recipes.benchmark_amvl import ARMS, PARTS, BenchmarkArguments, Cell


REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "recipes" / "benchmark_amvl.py"
TITLES = [
    "Time of a training step / SFT (the model's own loss, logits everywhere)",
    "Time of a training step / SFT with the answer's logits only",
    "Peak memory / SFT",
    "Time of `generate` / bare backbone",
    "Time of `generate` with several latents per prompt / with one",
    "Seconds of an import in a fresh process",
]
TINY = Cell(prompt=40, answer=8, num_latents=2, batch=3)


def prepared(cell=TINY):
    arguments = BenchmarkArguments(quick=True)
    torch.manual_seed(0)
    return benchmark_amvl.prepare(benchmark_amvl.build_backbone(arguments), arguments, cell)


# ---------------------------------------------------------------------------------------------------------------------
# Cells and bounds
# ---------------------------------------------------------------------------------------------------------------------


def test_flop_bounds_are_those_worked_out_by_hand():
    bounds = benchmark_amvl.flop_bounds(Cell(900, 60, 8))
    assert bounds == {
        "sft": 1.0,
        "sft_answer": 1.0,
        "shared": 1044 / 960,  # 900 + 8 + 68 + 68; 1.08 and three quarters of a hundredth
        "shared_prior": 1112 / 960,
        "full": 2844 / 960,  # 908 + 968 + 968
    }
    assert math.floor(100 * bounds["shared"]) == 108
    assert benchmark_amvl.flop_bounds(Cell(900, 300, 8))["shared"] == 1.27
    assert bounds.keys() == ARMS.keys()


def test_each_factor_varies_from_the_base_cell():
    cells = benchmark_amvl.cells_of(BenchmarkArguments())
    base = Cell(900, 60, 8, 1, False)
    assert cells[0] == base and len(cells) == len(set(cells)) == 9
    assert {cell.prompt for cell in cells} == {300, 900, 2000}
    assert {Cell(900, 300, 8), replace(base, checkpointing=True), replace(base, batch=4)} < set(cells)
    for cell in cells[1:]:
        differing = [name for name in vars(base) if getattr(cell, name) != getattr(base, name)]
        assert len(differing) == 1


def test_full_is_every_combination():
    cells = benchmark_amvl.cells_of(BenchmarkArguments(full=True))
    assert len(cells) == len(set(cells)) == 3 * 3 * 3 * 2 * 2


def test_the_command_line_sets_the_cells():
    parser = benchmark_amvl.HfArgumentParser(BenchmarkArguments)
    words = "--prompt 500 --answer 7 9 --num_latents 3 --batch 2 --checkpointing yes no"
    (arguments,) = parser.parse_args_into_dataclasses(words.split())
    base = Cell(500, 7, 3, 2, True)
    assert benchmark_amvl.cells_of(arguments) == [base, replace(base, answer=9), replace(base, checkpointing=False)]


# ---------------------------------------------------------------------------------------------------------------------
# Model and inputs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "num_parameters"),
    [
        (BenchmarkArguments(), 5_514_864),
        (BenchmarkArguments(shape="qwen2_5_vl_7b"), 8_292_166_656),  # as its checkpoint on the Hub
    ],
)
def test_a_shape_has_its_number_of_parameters(arguments, num_parameters):
    facts = benchmark_amvl.facts_of(arguments)
    assert facts["num_parameters"] == num_parameters


def test_num_layers_cuts_the_language_model():
    facts = benchmark_amvl.facts_of(BenchmarkArguments(shape="qwen2_5_vl_7b", num_layers=2))
    assert facts["num_layers"] == 2 and 1e9 < facts["num_parameters"] < 3e9 and facts["dtype"] == "bfloat16"


@pytest.mark.parametrize(("prompt", "num_images"), [(8, 4), (40, 16), (300, 100), (900, 400), (2000, 400)])
def test_a_batch_has_the_tokens_asked_for(prompt, num_images):
    config = benchmark_amvl.build_backbone(BenchmarkArguments(), "meta").config
    batch = benchmark_amvl.make_batch(Cell(prompt, 20, 8, batch=2), config, "cpu", torch.float32)
    ids = batch.amvl["input_ids"]
    assert ids.shape == (2, prompt) and batch.amvl["completion_ids"].shape == (2, 20)
    assert (ids == config.image_token_id).sum(1).tolist() == [num_images] * 2
    assert torch.equal(batch.amvl["mm_token_type_ids"] == 1, ids == config.image_token_id)
    # The encoder gives one token for four patches.
    assert batch.amvl["pixel_values"].shape == (2 * 4 * num_images, 1176)
    assert batch.amvl["image_grid_thw"].prod(1).tolist() == [4 * num_images] * 2
    assert not torch.equal(ids[0], ids[1])

    assert torch.equal(batch.sft["input_ids"], torch.cat([ids, batch.amvl["completion_ids"]], dim=1))
    assert (batch.sft["labels"][:, :prompt] == -100).all()
    assert torch.equal(batch.sft["labels"][:, prompt:], batch.amvl["completion_ids"])
    assert not batch.sft["mm_token_type_ids"][:, prompt:].any()
    assert batch.prompt.keys() == batch.amvl.keys() - {"completion_ids", "completion_mask"}


# ---------------------------------------------------------------------------------------------------------------------
# Arms
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["sft", "sft_answer"])
def test_sft_is_the_next_token_loss_of_the_bare_backbone(arm):
    model, batch = prepared()
    with torch.no_grad():
        loss = ARMS[arm](model, batch)
        inputs = {key: value for key, value in batch.sft.items() if key != "labels"}
        logits = model.backbone(**inputs, use_cache=False).logits[:, TINY.prompt - 1 : -1]
    torch.testing.assert_close(loss, next_token_loss(logits, batch.amvl["completion_ids"]), rtol=1e-6, atol=1e-6)


def test_both_plans_are_one_objective():
    losses = []
    for arm in ("shared", "full"):
        model, batch = prepared()
        torch.manual_seed(1)  # of the noise
        losses.append(ARMS[arm](model, batch))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_trains_what_it_should(arm, checkpointing):
    model, batch = prepared(replace(TINY, checkpointing=checkpointing))
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert bool(checkpointed) == checkpointing and model.training
    loss = ARMS[arm](model, batch)
    assert loss.ndim == 0 and loss.isfinite()
    loss.backward()
    vision = {id(parameter) for parameter in model.get_encoder(modality="image").parameters()}
    for name, parameter in model.named_parameters():
        trained = id(parameter) not in vision and (name.startswith("backbone.") or not arm.startswith("sft"))
        moved = parameter.grad is not None and bool(parameter.grad.isfinite().all() and parameter.grad.any())
        assert moved == trained, name


def test_the_prior_decoded_loss_is_part_of_its_arm():
    losses = {}
    for arm in ("shared", "shared_prior"):
        model, batch = prepared()
        torch.manual_seed(1)
        losses[arm] = ARMS[arm](model, batch).item()
    assert losses["shared_prior"] > 1.5 * losses["shared"]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round():
    seconds = {"amvl": [2.0, 8.0, 9.0], "sft": [1.0, 2.0, 3.0]}
    assert benchmark_amvl.ratios(seconds, "amvl", "sft") == (3.0, 2.0, 4.0)


def test_arms_take_turns_and_the_first_round_does_not_count():
    calls = []
    seconds = benchmark_amvl.in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]


@pytest.mark.slow
def test_the_peak_of_a_fresh_process_is_its_own():
    held = b"x" * 600_000_000
    own_peak = benchmark_amvl.resident_bytes("VmHWM")
    measured = benchmark_amvl.memory_in_fresh_process(BenchmarkArguments(quick=True), TINY, "shared")
    assert own_peak > len(held) and measured["whole"] < own_peak - 300_000_000
    assert 0 < measured["increment"] < measured["whole"]


def test_the_peak_stays_when_memory_is_given_back():
    slack = 2_000_000  # the kernel counts in batches
    before = benchmark_amvl.resident_bytes("VmHWM")
    held = b"x" * (before - benchmark_amvl.resident_bytes("VmRSS") + 50_000_000)
    peak = benchmark_amvl.resident_bytes("VmHWM")
    assert peak > before + 50_000_000 - slack
    del held
    assert benchmark_amvl.resident_bytes("VmHWM") > peak - slack
    assert benchmark_amvl.resident_bytes("VmRSS") < peak - 50_000_000 + slack


# ---------------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"what": "training,speed"}, "`what` must be one of .*'import', got 'speed'"),
        ({"shape": "large"}, "`shape` must be one of 'tiny', .*, got 'large'"),
        ({"dtype": "int8"}, "`dtype` must be one of .*, got 'int8'"),
        ({"checkpointing": ["no", "maybe"]}, "`checkpointing` must be one of 'no', 'yes', got 'maybe'"),
        ({"memory_of": "lora"}, "`memory_of` must be one of 'sft', .*, got 'lora'"),
        ({"prompt": [900, 7]}, "`prompt` must be 8 or more, got 7"),
        ({"answer": [0]}, "`answer` must be 1 or more, got 0"),
        ({"batch": []}, "`batch` is empty"),
        ({"new_tokens": 0}, "`new_tokens` must be 1 or more, got 0"),
        ({"num_layers": 0}, "`num_layers` must be 1 or more, got 0: leave it out"),
        ({"threads": -1}, "`threads` must be 1 or more, got -1"),
        ({"rounds": 4}, "`rounds` must be 5 or more, got 4"),
        ({"device": "mps"}, "`device` must be `cpu` or `cuda`, got 'mps'"),
        ({"json": "absent/folder/x.json"}, "`json` is 'absent/folder/x.json', whose folder does not exist"),
        ({"markdown": "absent/x.md"}, "`markdown` is 'absent/x.md'"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_runs(settings, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkArguments(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="`device` is 'cuda', but torch finds no GPU"):
        BenchmarkArguments(device="cuda")


def assert_results(results, parts):
    for part in PARTS:
        assert bool(results[part]) == (part in parts)
    for training in results["training"]:
        assert training["seconds"].keys() == training["bounds"].keys() == ARMS.keys()
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in training["seconds"].values())
    for memory in results["memory"]:
        assert memory["bytes"].keys() == ARMS.keys()
        assert all(0 < peak["increment"] < peak["whole"] for peak in memory["bytes"].values())
    for generation in results["generation"]:
        assert generation["batch"] == 2 and generation["bound"] == 44 / 40
        for values in (generation["first"], generation["per_token"]):
            assert values.keys() == {"backbone", "amvl"} and all(len(seconds) == 2 for seconds in values.values())
    for samples in results["samples"]:
        assert (samples["batch"], samples["num_samples"]) == (2, 8)
        assert [at_length["new_tokens"] for at_length in samples["measured"]] == [1, 4]
        for at_length in samples["measured"]:
            seconds = at_length["seconds"]
            assert seconds.keys() == {"one", "several", "calls"} and all(len(taken) == 2 for taken in seconds.values())
    for imported in results["import"]:
        assert "modeling_amvl.modeling_amvl" in imported["modules"] and "torch" not in imported["modules"]
        assert all(seconds > 0 for seconds in imported["stock"] + imported["added"])


def test_a_quick_run_measures_training_and_generation(tmp_path, capsys):
    path = tmp_path / "results.json"
    benchmark_amvl.main(BenchmarkArguments(quick=True, what="training,generation,samples", json=str(path)))
    output = capsys.readouterr()
    assert [title in output.out for title in TITLES] == [True, True, False, True, True, False]
    assert "[3/3] samples" in output.err
    assert_results(json.loads(path.read_text()), ("training", "generation", "samples"))


@pytest.mark.slow
def test_the_command_prints_every_table_and_writes_them(tmp_path):
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--json", "results.json", "--markdown", "results.md"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},  # as `pip install -e .` makes it importable
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert all(title in finished.stdout for title in TITLES)
    assert max(map(len, finished.stdout.splitlines())) <= 120
    assert "[5/5] import" in finished.stderr and " s left" in finished.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert_results(results, PARTS)
    for fact in ("torch", "transformers", "cpu", "threads", "shape", "num_parameters"):
        assert str(results["machine"][fact])
    markdown = (tmp_path / "results.md").read_text()
    assert all(f"**{title}" in markdown for title in TITLES)
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert sum(set(line) <= set("|-: ") for line in tables) == len(TITLES)


def test_the_widest_table_fits_120_columns():
    cell = vars(Cell(2000, 300, 16, 4, True))
    seconds = {arm: [10.0, 123.45] for arm in ARMS} | {"full": [12.0, 999.9]}
    result = {"cell": cell, "seconds": seconds, "bounds": benchmark_amvl.flop_bounds(Cell(**cell))}
    memory = {"cell": cell, "bytes": {arm: {"whole": 75e9, "increment": 40e9} for arm in ARMS}}
    tables = [benchmark_amvl.training_table([result], "sft"), benchmark_amvl.memory_table([memory])]
    for table in tables:
        assert max(map(len, benchmark_amvl.render(table, markdown=False).splitlines())) <= 120
