"""Two ranks on CPUs (gloo) under each engine, by the real command, against one process with the same global batch.

What differs is the order in which gradients are summed up, so losses agree as printed and weights to a few units in the last place
of fp32. SGD at a constant rate makes the weights' way a sum of gradients, so that comparing it compares those.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_tiny_backbone

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from trainer.data.color_steps import build_color_steps
from trainer.sharded_saving import consolidate


REPOSITORY = Path(__file__).parents[2]
RECIPE = str(REPOSITORY / "recipes" / "sft_amvl.py")
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
# At most this far, relative to how far training moved the parameter: sums of fp32 in another order.
TOLERANCE = 1e-4
LORA = "--use_peft true --lora_r 4 --lora_dropout 0 --lora_target_modules q_proj v_proj up_proj"

SETTINGS = """
dataset_format: trl
num_latents: 2
latent_size: 8
max_steps: 3
per_device_train_batch_size: 2
per_device_eval_batch_size: 2
optim: sgd
learning_rate: 0.01
lr_scheduler_type: constant
max_grad_norm: 0.0
bf16: false
logging_steps: 1
save_strategy: steps
save_steps: 1
eval_strategy: steps
eval_steps: 3
report_to: none
disable_tqdm: true
"""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("engines")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stock model whose table has no row to spare, so that it has to grow, and rows: 16 to train on, 5 to evaluate on."""
    folder = tmp_path_factory.mktemp("engines")
    backbone, processor = build_tiny_backbone(seed=0)
    backbone.resize_token_embeddings(len(processor.tokenizer))
    backbone.save_pretrained(folder / "stock")
    processor.save_pretrained(folder / "stock")
    rows = build_color_steps(21, image_size=48).select_columns(["images", "prompt", "completion"])
    (folder / "rows").mkdir()
    rows.select(range(16)).to_parquet(folder / "rows" / "train.parquet")
    rows.select(range(16, 21)).to_parquet(folder / "rows" / "test.parquet")
    paths = f"model_name_or_path: {folder / 'stock'}\ndataset_name: {folder / 'rows'}\n"
    (folder / "config.yaml").write_text(SETTINGS + paths)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """Trains for three steps of eight rows by `accelerate launch`, once for each set of settings."""

    def run(engine, *settings, name=None):
        output = folder / (name or "-".join([engine, *(word.strip("-") for word in settings)]))[:80]
        if (output / "README.md").exists() and name is None:
            return output
        num_processes = 1 if engine == "single" else 2
        words = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num_processes)),
            *("--main_process_port", "0", "--config_file", f"{REPOSITORY}/recipes/accelerate/{engine}.yaml"),
            *([str(Path(__file__).parent / "fsdp_on_cpu.py")] if engine == "fsdp2" else []),
            *(RECIPE, "--config", "config.yaml", "--output_dir", str(output)),
            *("--gradient_accumulation_steps", str(4 // num_processes), *settings),
        ]
        assert "Self-test passed" in finished(words, folder)
        assert (output / "training_summary.html").is_file()  # which one process alone writes
        return output

    return run


def finished(words, folder, **environment):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"} | environment
    process = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    return process.stdout


def logs_of(output):
    return json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]


def assert_same_logs(output, reference):
    logs, expected = logs_of(output), logs_of(reference)
    assert len(logs) == len(expected) == 4  # three steps and an evaluation
    assert len({entry["loss"] for entry in expected[:3]}) == 3
    for entry, expected_entry in zip(logs, expected):
        assert entry.keys() == expected_entry.keys() and entry.get("phase") == expected_entry.get("phase")
        # `grad_norm` is DeepSpeed's own, `eval_loss` transformers' mean of the means of batches, fillers included.
        for key in expected_entry.keys() - {"grad_norm", "eval_loss", "phase"}:
            if not key.endswith(("runtime", "per_second")):
                assert entry[key] == pytest.approx(expected_entry[key], rel=1e-4, abs=1e-5), key


def assert_same_way(output, reference, start, file="model.safetensors"):
    """Both went from `start` to the same weights."""
    weights, expected = load_file(output / file), load_file(reference / file)
    assert weights.keys() == expected.keys()
    moved = {name: (expected[name] - start[name]).abs().max() for name in expected if name in start}
    assert sum(distance > 1e-4 for distance in moved.values()) >= 12
    for name, distance in moved.items():
        assert (weights[name] - expected[name]).abs().max() <= TOLERANCE * distance + 1e-7, name


@pytest.fixture(scope="module")
def start(folder):
    """The weights that every run starts from but the heads', which are drawn."""
    processor = AMVLProcessor.from_backbone(str(folder / "stock"))
    model = AMVLForConditionalGeneration.from_backbone(
        str(folder / "stock"),
        latent_token_id=processor.latent_token_id,
        initial_token_id=processor.answer_start_id,
        num_latents=2,
        latent_size=8,
    )
    return {name: value for name, value in model.state_dict().items() if name.startswith("backbone.")}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_takes_the_steps_of_one_process(run, start, engine):
    output, reference = run(engine), run("single")
    assert_same_logs(output, reference)
    assert_same_way(output, reference, start)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_without_gradient_checkpointing_and_with_three_whole_forwards_too(run, start, engine):
    settings = ("--activation_checkpointing", "false", "--multipass", "full")
    output, reference = run(engine, *settings), run("single")
    assert_same_logs(output, reference)
    assert_same_way(output, reference, start)


@pytest.mark.parametrize(("engine", "reference"), [("ddp", "single"), ("zero2", "single"), ("zero3", "fsdp2")])
def test_an_adapter_takes_the_same_steps(run, engine, reference):
    """Where the table is shared out, the row of `<latent>` stays as it is: those engines are held against each other."""
    output, reference = run(engine, *LORA.split()), run(reference, *LORA.split())
    assert_same_logs(output, reference)
    names = load_file(reference / "adapter_model.safetensors")
    assert any("prior_head" in name for name in names) and any("lora_A" in name for name in names)
    assert any("token" in name for name in names) == (engine in ("ddp", "zero2"))
    assert_same_way(output, reference, {name: torch.zeros(()) for name in names}, "adapter_model.safetensors")
    merged, expected = (load_file(folder / "merged" / "model.safetensors") for folder in (output, reference))
    assert merged.keys() == expected.keys()
    assert all((merged[name] - expected[name]).abs().max() < 1e-5 for name in merged)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_resumes_exactly_and_its_checkpoint_becomes_one_model(run, folder, engine):
    whole = run(engine)
    resumed = folder / f"{engine}-resumed"
    shutil.copytree(whole / "checkpoint-1", resumed / "checkpoint-1")
    run(engine, "--resume_from_checkpoint", str(resumed / "checkpoint-1"), name=resumed.name)
    expected, weights = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)

    if engine == "ddp":
        consolidated = whole / "checkpoint-3"
    else:
        consolidated = consolidate(whole / "checkpoint-3", folder / f"{engine}-consolidated")
    weights = load_file(consolidated / "model.safetensors")
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
    assert {path.name for path in consolidated.glob("*_amvl.py")} == {path.name for path in whole.glob("*_amvl.py")}
    assert (consolidated / "modeling_amvl.py").exists() and (consolidated / "processing_amvl.py").exists()
    config = json.loads((consolidated / "config.json").read_text())
    assert config["dtype"] == "float32"
    if engine != "ddp":
        smaller = consolidate(whole / "checkpoint-3", folder / "new" / f"{engine}-bf16", "bfloat16")
        assert json.loads((smaller / "config.json").read_text())["dtype"] == "bfloat16"
        assert all(weight.dtype == torch.bfloat16 for weight in load_file(smaller / "model.safetensors").values())
    assert config["architectures"] == ["AMVLForConditionalGeneration"]


# Of SLURM: the name of the first node, and a task on each of two, which are processes of this machine here.
SCONTROL = '#!/bin/sh\necho localhost\n[ -z "$TOLD" ] || echo "$@" >> "$TOLD"\n'
SRUN = """#!/bin/sh
shift
SLURM_NODEID=1 "$@" &
SLURM_NODEID=0 "$@" && wait $!
"""


def tools_of_slurm(folder, srun):
    """A `PATH` with them before what this Python comes with."""
    folder.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", srun)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


def test_an_evaluation_of_a_stream_counts_no_row_twice(run):
    """Five rows, of which two processes take batches of two."""
    streams = ("--dataset_streaming", "true")
    assert_same_logs(run("ddp", *streams), run("single", *streams))


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_job_of_slurm_joins_its_machines(run, start, folder, engine):
    path = tools_of_slurm(folder / f"tools-{engine}", SRUN)
    output = folder / f"slurm-{engine}"
    words = ["bash", "recipes/slurm/sft_amvl.sbatch", engine, str(folder / "config.yaml"), "--output_dir", str(output)]
    slurm = {
        "SLURM_JOB_NODELIST": "two",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": str(os.getpid()),
    }
    for max_steps in ("2", "3"):  # the second time as queued again
        settings = ["--gradient_accumulation_steps", "2", "--max_steps", max_steps]
        told = finished([*words, *settings], REPOSITORY, PATH=path, **slurm)
        assert "Self-test passed" in told
    assert_same_way(output, run("single"), start)
    assert {path.name for path in output.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (1, 2, 3)}


@pytest.mark.parametrize(("left", "queued_again"), [(60, True), (3600, False)])
def test_a_job_of_slurm_that_runs_out_of_time_is_queued_again(tmp_path, left, queued_again):
    path = tools_of_slurm(tmp_path / "tools", "#!/bin/sh\nexit 1\n")
    slurm = {"SLURM_JOB_NODELIST": "one", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "PATH": path}
    slurm |= {"SLURM_JOB_END_TIME": str(int(time.time()) + left), "TOLD": str(tmp_path / "told")}
    words = ["bash", "recipes/slurm/sft_amvl.sbatch", "ddp", "config.yaml"]
    process = subprocess.run(words, cwd=REPOSITORY, env=os.environ | slurm, capture_output=True, text=True)
    assert process.returncode == 1
    assert ("requeue 7" in (tmp_path / "told").read_text()) == queued_again


@pytest.mark.parametrize(
    ("settings", "launched", "message"),
    [
        ("", {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "FSDP needs accelerators"),
        (", fsdp=True", {"RANK": "0", "WORLD_SIZE": "2"}, "FSDP needs accelerators"),
        (", fsdp=True, fsdp_config={'version': 1}", {}, "`fsdp_version` is 1"),
        ("", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "`fsdp_version` is 1"),
    ],
)
def test_what_fsdp_cannot_do_is_refused_before_anything_is_loaded(tmp_path, settings, launched, message):
    code = f"from trainer import AMVLSFTConfig; AMVLSFTConfig('out', bf16=False{settings})"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | launched
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode != 0 and message in process.stderr
