"""Runs that are killed, stopped, or meet what is broken: real processes, real signals, real files."""

import contextlib
import functools
import json
import logging
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tiny import build_tiny_backbone
from transformers import TrainerCallback
from trl import ModelConfig, TrlParser

from recipes import sft_amvl
from trainer import AMVLSFTConfig, AMVLSFTTrainer
from trainer.data.color_steps import build_color_steps
from trainer.resuming import STAGING


REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
FORKED = multiprocessing.get_context("fork")
SETTINGS = {
    "num_latents": 3,
    "latent_size": 8,
    "max_steps": 14,  # of 13 rows by twos and twos: more than three epochs, each with a smaller last step
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_steps": 3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "disable_tqdm": True,
    "report_to": "none",
}
TIMES = re.compile("runtime|per_second|preparation_time")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A stock model with its processor, and 13 rows; on disk."""
    root = tmp_path_factory.mktemp("local")
    for part in build_tiny_backbone(seed=0):
        part.save_pretrained(root / "stock")
    train, test = build_color_steps(13, image_size=48), build_color_steps(5, "held_out", image_size=48)
    datasets.DatasetDict(train=train, test=test).save_to_disk(root / "splits")
    for name, rows in (("train", train), ("test", test)):
        (root / "parquet").mkdir(exist_ok=True)
        rows.to_parquet(root / "parquet" / f"{name}-00000-of-00001.parquet")
    return root


@pytest.fixture(scope="module")
def command(local, tmp_path_factory):
    """Returns a function that gives the command line of a run and its folder."""

    def make(folder=None, dataset="splits", **settings):
        folder = tmp_path_factory.mktemp("run") if folder is None else folder
        names = {"model_name_or_path": local / "stock", "dataset_name": local / dataset, "output_dir": folder}
        given = names | SETTINGS | settings
        return [word for key, value in given.items() for word in (f"--{key}", *str(value).split())], folder

    return make


def run_recipe(words, callback=None, file_limit=None):
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    if callback is not None:
        sft_amvl.AMVLSFTTrainer = functools.partial(AMVLSFTTrainer, callbacks=[callback])
    parser = TrlParser((sft_amvl.AMVLScriptArguments, AMVLSFTConfig, ModelConfig))
    sft_amvl.main(*parser.parse_args_and_config(words))


def started(words, log, **settings):
    """The recipe in a process of its own, forked so that nothing is imported again; `log` gets what it prints."""

    def run():
        with open(log, "a", buffering=1) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            logging.basicConfig(force=True, stream=file)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                run_recipe(words, **settings)

    process = FORKED.Process(target=run)
    process.start()
    return process


def finished(words, log, **settings):
    process = started(words, log, **settings)
    process.join(120)
    return process.exitcode


def wait_for(condition, process, seconds=60):
    """Whether a condition came true before the process ended."""
    end = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < end:
        if condition():
            return True
    return False


def history(folder):
    """What was logged, without times."""
    state = json.loads((newest(folder) / "trainer_state.json").read_text())
    return [{key: value for key, value in entry.items() if not TIMES.search(key)} for entry in state["log_history"]]


def newest(folder):
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def assert_same_run(folder, other):
    """The same weights and the same history, to the last bit."""
    weights, others = (load_file(path / "model.safetensors") for path in (folder, other))
    assert weights.keys() == others.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, others[name])] == []
    assert history(folder) == history(other)
    assert newest(folder).name == newest(other).name == "checkpoint-14"


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """Returns a function that gives the folder of a run that nothing interrupts, made once for each set of settings."""
    made = {}

    def make(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            words, made[key] = command(**settings)
            assert finished(words, made[key] / "log") == 0, (made[key] / "log").read_text()
        return made[key]

    return make


class Event(TrainerCallback):
    """Does something once, at an event and step."""

    def __init__(self, event, step, act):
        self.event, self.step, self.act = event, step, act

    def at(self, event, state, kwargs):
        if event == self.event and state.global_step == self.step:
            self.event = None
            self.act(kwargs["model"])


for event in (
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_log",
    "on_evaluate",
):

    def call(self, args, state, control, event=event, **kwargs):
        self.at(event, state, kwargs)

    setattr(Event, event, call)


def fail(model):
    raise RuntimeError("planted")


STREAM = {"dataset": "parquet", "dataset_streaming": True}
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.2, "lora_target_modules": "q_proj v_proj"}


@pytest.mark.parametrize(
    "settings",
    [{}, {"logging_steps": 5, "save_steps": 2, "dataloader_num_workers": 1}, STREAM],
    ids=["every step", "means over steps", "streamed"],
)
def test_a_run_killed_again_and_again_ends_as_the_run_that_was_not(command, whole, settings):
    """Once in the middle of a write, once after a step: where exactly, the machine decides."""
    words, folder = command(**settings)
    log = folder / "log"

    def writes():
        return any(folder.glob("checkpoint-*")) and any(folder.glob(f"{STAGING}/checkpoint-*/*"))

    def logged():
        return log.read_text().count("'loss'") >= num_logs + 2

    interruptions = 0
    for number, condition in enumerate((writes, logged, writes)):
        num_logs = log.read_text().count("'loss'") if log.is_file() else 0
        resume = ["--resume_from_checkpoint", "true"] if any(folder.glob("checkpoint-*")) else []
        process = started(words + resume, log)
        if wait_for(condition, process):
            os.kill(process.pid, signal.SIGKILL)
            interruptions += 1
        process.join()
    assert interruptions >= 2, log.read_text()
    assert finished([*words, "--resume_from_checkpoint", "true"], log) == 0, log.read_text()
    assert_same_run(folder, whole(**settings))
    assert not (folder / STAGING).exists()


@pytest.mark.parametrize(
    ("event", "step"),
    [
        ("on_step_begin", 4),  # the first of an epoch
        ("on_substep_end", 5),  # in the middle of an accumulation
        ("on_pre_optimizer_step", 7),
        ("on_step_end", 5),
        ("on_log", 8),
        ("on_evaluate", 8),
    ],
)
def test_an_error_anywhere_leaves_the_last_finished_step_and_resuming_goes_on_from_it(command, whole, event, step):
    settings = LORA | {"merge_lora": False, "logging_steps": 2, "save_steps": 100}  # its dropout draws random numbers
    words, folder = command(**settings)
    assert finished(words, folder / "log", callback=Event(event, step, fail)) == 1
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert f"Training stops at step {step} (RuntimeError: planted)" in (folder / "log").read_text()
    assert finished([*words, "--resume_from_checkpoint", "true"], folder / "log") == 0
    weights, others = (load_file(path / "adapter_model.safetensors") for path in (folder, whole(**settings)))
    assert [name for name, weight in weights.items() if not torch.equal(weight, others[name])] == []
    if event not in ("on_evaluate", "on_log"):  # which are not made up for
        assert history(folder) == history(whole(**settings))


def test_an_error_while_the_optimiser_is_at_work_leaves_the_weights_alone(command):
    words, folder = command(save_steps=3)
    assert finished(words, folder / "log", callback=Event("on_optimizer_step", 4, fail)) == 1
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert (folder / "weights-4" / "model.safetensors").is_file()


@pytest.mark.parametrize(("number", "exitcode"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(command, whole, number, exitcode):
    words, folder = command(save_steps=100)
    act = lambda model: os.kill(os.getpid(), number)  # noqa: E731
    assert finished(words, folder / "log", callback=Event("on_substep_end", 5, act)) == exitcode
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]
    assert finished([*words, "--resume_from_checkpoint", "true"], folder / "log") == 0
    assert_same_run(folder, whole())


def test_a_dead_worker_stops_the_run_with_a_checkpoint(command, whole):
    settings = {"dataloader_num_workers": 1}
    words, folder = command(save_steps=100, **settings)

    def kill_worker(model):
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)

    assert finished(words, folder / "log", callback=Event("on_step_begin", 5, kill_worker)) == 1
    log = (folder / "log").read_text()
    assert re.search(r"Training stops at step \d+ .*worker.* exited unexpectedly", log), log[-3000:]
    assert int(newest(folder).name.split("-")[1]) >= 5
    assert finished([*words, "--resume_from_checkpoint", "true"], folder / "log") == 0
    assert_same_run(folder, whole())
