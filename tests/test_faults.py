"""Runs that are killed, stopped, or meet what is broken: real processes, real signals, real files."""

import contextlib
import functools
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tiny import build_tiny_backbone
from transformers import TrainerCallback
from trl import ModelConfig, TrlParser

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from recipes import sft_amvl
from trainer import AMVLSFTConfig, AMVLSFTTrainer
from trainer.data.color_steps import build_color_steps
from trainer.resuming import STAGING, what_is_wrong


pytestmark = pytest.mark.xdist_group("faults")  # one worker makes what all of them share
REPOSITORY = Path(__file__).resolve().parents[1]
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
    "training_summary": False,
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


def started(words, log, environment=None, **settings):
    """The recipe in a process of its own, forked so that nothing is imported again; `log` gets what it prints."""

    def run():
        os.environ.update(environment or {})
        torch.manual_seed(0)  # as in a new process
        with open(log, "a", buffering=1) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            logging.basicConfig(force=True, stream=file)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                try:
                    run_recipe(words, **settings)
                except BaseException:
                    traceback.print_exc()
                    raise

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
        time.sleep(0.002)
    return False


def history(folder):
    """What was logged, without times."""
    state = json.loads((newest(folder) / "trainer_state.json").read_text())
    return [{key: value for key, value in entry.items() if not TIMES.search(key)} for entry in state["log_history"]]


def newest(folder):
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def assert_same_run(folder, other):
    """The same weights and the same history, to the last bit."""
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").is_file() else "model.safetensors"
    weights, others = (load_file(path / name) for path in (folder, other))
    assert weights.keys() == others.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, others[name])] == []
    assert history(folder) == history(other)
    cards = [(path / "README.md").read_text().replace(path.name, "run") for path in (folder, other)]
    cards = [card.replace("on_failed_save: continue\n", "") for card in cards]  # a setting of one of them
    assert cards[0] == cards[1]
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
    [
        pytest.param({}, id="every step"),
        pytest.param(
            {"logging_steps": 5, "save_steps": 2, "dataloader_num_workers": 1},
            marks=pytest.mark.slow,
            id="means over steps",
        ),
        pytest.param(STREAM, marks=pytest.mark.slow, id="streamed"),
    ],
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
    for condition in (writes, logged, writes):
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, LORA | {"merge_lora": False}, STREAM | {"logging_steps": 5}], ids=["full", "lora", "streamed"]
)
def test_the_real_command_killed_at_random_ends_as_the_run_that_was_not(command, tmp_path, settings):
    """`accelerate launch recipes/sft_amvl.py`, all its processes killed at a moment that is another one each time."""

    def launched(words, log):
        recipe = [sys.executable, "-m", "accelerate.commands.launch", str(REPOSITORY / "recipes" / "sft_amvl.py")]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        with open(log, "a") as file:
            return subprocess.Popen(
                recipe + words, cwd=tmp_path, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    words, whole = command(**settings)
    assert launched(words, whole / "log").wait(300) == 0, (whole / "log").read_text()
    words, folder = command(**settings)
    log = folder / "log"
    for _ in range(3):
        num_logs = log.read_text().count("grad_norm") if log.is_file() else 0
        resume = ["--resume_from_checkpoint", "true"] if any(folder.glob("checkpoint-*")) else []
        process = launched(words + resume, log)
        while process.poll() is None and log.read_text().count("grad_norm") == num_logs:
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(random.SystemRandom().uniform(0, 1))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    resume = ["--resume_from_checkpoint", "true"] if any(folder.glob("checkpoint-*")) else []
    assert launched(words + resume, log).wait(300) == 0, log.read_text()
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    ("event", "step"),
    [
        ("on_step_begin", 4),  # the first of an epoch
        ("on_substep_end", 5),  # in the middle of an accumulation
        ("on_pre_optimizer_step", 7),
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
    assert history(folder) == history(whole(**settings))


def test_a_signal_does_not_wait_for_an_evaluation_which_is_made_up_for(make_trainer, local, tmp_path):
    """With one batch of the evaluation done, and the best model of the run the one that it would have found."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    settings |= {"load_best_model_at_end": True, "per_device_eval_batch_size": 1, "learning_rate": 1e-3}
    rows = datasets.load_from_disk(local / "splits")["test"]
    seen = []

    class Stop(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            seen.append(state.global_step)
            if seen.count(4) == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def make(folder, callback=None):
        trainer = make_trainer(callback, folder=folder, eval_dataset=rows, **settings)
        determine = trainer._determine_best_metric
        losses = {2: 3.0, 4: 1.0, 6: 2.0}
        trainer._determine_best_metric = lambda metrics, trial: determine(
            metrics | {"eval_loss": losses[trainer.state.global_step]}, trial
        )
        return trainer

    with pytest.raises(SystemExit):
        make("cut", Stop()).train()
    assert seen == [2] * len(rows) + [4]
    cut, whole = make("cut"), make("whole")
    cut.train(resume_from_checkpoint=True)
    whole.train()
    for trainer, folder in ((cut, "cut"), (whole, "whole")):
        assert trainer.state.best_model_checkpoint == str(tmp_path / folder / "checkpoint-4")
    assert history(tmp_path / "cut") == history(tmp_path / "whole")


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


# ---------------------------------------------------------------------------------------------------------------------
# Disk full
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def size_of(whole):
    """Returns a function that gives the bytes of a file in a checkpoint."""
    return lambda name: (newest(whole()) / name).stat().st_size


def test_a_checkpoint_that_does_not_fit_stops_the_run_and_leaves_the_weights(command, size_of):
    words, folder = command()
    assert size_of("optimizer.pt") > size_of("model.safetensors")
    limit = (size_of("optimizer.pt") + size_of("model.safetensors")) // 2
    assert finished(words, folder / "log", file_limit=limit) == 1
    assert not list(folder.glob("checkpoint-*")) and not (folder / STAGING).exists()
    assert re.search(
        r"OSError: `checkpoint-3` could not be written: .*needs at least [\d.]+ MB, and [\d.,]+ MB are free.*weights alone are "
        r"in `.*weights-3`",
        (folder / "log").read_text(),
    )
    assert load_file(folder / "weights-3" / "model.safetensors")


def test_a_checkpoint_that_does_not_fit_is_tried_again_where_asked_for(command, whole, size_of):
    words, folder = command(on_failed_save="continue")
    limit = (size_of("optimizer.pt") + size_of("model.safetensors")) // 2

    class Room(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    assert finished(words, folder / "log", file_limit=limit, callback=Room()) == 0
    assert "checkpoint-3" in (folder / "log").read_text() and not (folder / "checkpoint-3").exists()
    assert {path.name for path in folder.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (6, 9, 12, 14)}
    assert_same_run(folder, whole())


def test_a_model_that_does_not_fit_leaves_what_was_there(command, size_of, local):
    words, folder = command(save_strategy="no", max_steps=1)
    (folder / "model.safetensors").write_bytes(b"of before")
    assert finished(words, folder / "log", file_limit=size_of("model.safetensors") // 2) == 1
    assert (folder / "model.safetensors").read_bytes() == b"of before" and not (folder / STAGING).exists()
    assert re.search(r"could not be saved.*needs at least", (folder / "log").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Not finite
# ---------------------------------------------------------------------------------------------------------------------


class Poison(TrainerCallback):
    """Makes the latents' embedding, or the gradient of a weight alone, NaN in some steps; keeps weights from before and after."""

    def __init__(self, steps, of_gradient=False):
        self.steps, self.of_gradient, self.kept = steps, of_gradient, {}

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.kept[state.global_step] = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        if state.global_step in self.steps:
            if self.of_gradient:
                hook = model.prior_head.register_full_backward_hook(
                    lambda module, given, got: (given[0] * float("nan"),)
                )
            else:
                hook = model.latent_projection.register_forward_hook(
                    lambda module, args, output: output * float("nan")
                )
            self.hook = hook

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.hook.remove()


@pytest.fixture
def make_trainer(local, tmp_path):
    """Returns a function that makes a trainer in this process; a trainer seeds when it is built."""

    def make(callback=None, rows=None, folder="run", eval_dataset=None, **settings):
        backbone, stock = build_tiny_backbone(seed=0)
        processor = AMVLProcessor.from_backbone(stock)
        torch.manual_seed(0)
        model = AMVLForConditionalGeneration.from_backbone(
            backbone, num_latents=3, latent_size=8, latent_token_id=processor.latent_token_id
        )
        given = {key: value for key, value in SETTINGS.items() if key not in ("num_latents", "latent_size")}
        given |= {"eval_strategy": "no", "save_strategy": "no", "self_test": False} | settings
        return AMVLSFTTrainer(
            model,
            AMVLSFTConfig(str(tmp_path / folder), **given),
            train_dataset=datasets.load_from_disk(local / "splits")["train"] if rows is None else rows,
            eval_dataset=eval_dataset,
            processing_class=processor,
            callbacks=[] if callback is None else [callback],
        )

    return make


@pytest.mark.parametrize("of_gradient", [False, True], ids=["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_the_last_good_step_is_saved(
    make_trainer, of_gradient, tmp_path
):
    poison = Poison([5], of_gradient)
    trainer = make_trainer(poison)
    what = "norm of the gradient" if of_gradient else "`ntp`, `token_accuracy|`ntp`"
    with pytest.raises(FloatingPointError, match=f"step 6: .*({what})"):
        trainer.train()
    saved = load_file(tmp_path / "run" / "checkpoint-5" / "model.safetensors")
    assert saved and all(torch.equal(saved[name], poison.kept[5][name]) for name in saved)
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


@pytest.mark.parametrize("of_gradient", [False, True], ids=["loss", "gradient"])
def test_a_step_that_is_not_finite_is_dropped_whole_where_asked_for(make_trainer, of_gradient):
    poison = Poison([5], of_gradient)
    trainer = make_trainer(poison, on_nan_loss="skip", logging_steps=4, max_steps=8, weight_decay=0.1)
    result = trainer.train()
    assert all(torch.equal(weight, poison.kept[5][name]) for name, weight in poison.kept[6].items())
    assert any(not torch.equal(weight, poison.kept[6][name]) for name, weight in poison.kept[7].items())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("skipped_steps") for entry in logs] == [None, 1]
    numbers = [value for entry in logs for name, value in entry.items() if name != "phase"]
    assert all(value == value and abs(value) < 1e6 for value in numbers)
    losses = [logs[0]["loss"]] * 4 + [logs[1]["loss"]] * 3
    assert result.training_loss == result.metrics["train_loss"] == pytest.approx(sum(losses) / 7)
    assert result.metrics["skipped_steps"] == 1


def test_too_many_dropped_steps_in_a_row_stop_the_run(make_trainer):
    trainer = make_trainer(Poison([3, 4, 5, 6]), on_nan_loss="skip", max_skips_in_a_row=3)
    with pytest.raises(FloatingPointError, match="step 7: .* 3 steps in a row"):
        trainer.train()


# ---------------------------------------------------------------------------------------------------------------------
# Bad rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken_rows(local):
    """Thirteen rows of which three cannot be decoded: two neighbours, and the last."""
    rows = datasets.load_from_disk(local / "splits")["train"].cast_column(
        "images", datasets.List(datasets.Image(decode=False))
    )

    def cut(row, index):
        if index in (3, 4, 12):
            row["images"][0]["bytes"] = row["images"][0]["bytes"][:60]
        return row

    rows = rows.map(cut, with_indices=True, keep_in_memory=True)
    return rows.cast_column("images", datasets.List(datasets.Image()))


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_row_that_cannot_be_decoded_stops_the_run_by_its_number(make_trainer, broken_rows, num_workers):
    trainer = make_trainer(rows=broken_rows, check_dataset=False, dataloader_num_workers=num_workers)
    with pytest.raises(ValueError, match=r"Row (3|4|12) of `train_dataset` cannot be trained on.*on_bad_row='skip'"):
        trainer.train()


def test_the_next_good_row_takes_the_place_of_a_bad_one_for_any_number_of_workers(make_trainer, broken_rows, caplog):
    settings = {"max_steps": 4, "on_bad_row": "skip"}  # one epoch
    skipping, again = (
        make_trainer(rows=broken_rows, folder=f"run{number}", dataloader_num_workers=number, **settings)
        for number in (0, 2)
    )
    instead = [{3: 5, 4: 5, 12: 0}.get(index, index) for index in range(13)]
    losses = losses_of(make_trainer(rows=broken_rows.select(instead), folder="instead", max_steps=4))
    assert losses_of(skipping) == losses
    assert losses_of(again) == losses
    assert skipping.skipped() == again.skipped() == {"skipped_rows": 4}  # 4 also as the row after 3
    assert skipping.state.log_history[-1]["skipped_rows"] == 4
    assert "Row 12 of `train_dataset` is skipped" in caplog.text


def test_bad_rows_of_a_stream_are_left_out(make_trainer, broken_rows):
    good = broken_rows.select([index for index in range(13) if index not in (3, 4, 12)])
    settings = {"max_steps": 3, "per_device_train_batch_size": 1}
    expected = losses_of(make_trainer(rows=good.to_iterable_dataset(), folder="good", **settings))
    trainer = make_trainer(rows=broken_rows.to_iterable_dataset(), on_bad_row="skip", **settings)
    assert losses_of(trainer) == expected
    assert trainer.skipped() == {"skipped_rows": 2}


def test_too_many_bad_rows_in_a_row_stop_the_run(make_trainer, broken_rows):
    settings = {"on_bad_row": "skip", "max_skips_in_a_row": 1, "max_steps": 4}
    for rows in (broken_rows, broken_rows.to_iterable_dataset()):
        with pytest.raises(ValueError, match="More than 1 rows in a row"):
            make_trainer(rows=rows, **settings).train()


# ---------------------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------------------


def on_two_ranks(words, folder, callbacks=(None, None), file_limits=(None, None), more_words=((), ())):
    """Exit codes and logs of two processes that train together, by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"log{rank}" for rank in range(2)]
    processes = []
    for rank in range(2):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
        settings = {"environment": environment, "callback": callbacks[rank], "file_limit": file_limits[rank]}
        processes.append(started([*words, *more_words[rank]], logs[rank], **settings))
    for process in processes:
        process.join(120)
        process.kill()
    return [process.exitcode for process in processes], [log.read_text() for log in logs]


@pytest.fixture(scope="module")
def two_ranks(command):
    words, folder = command(**RANKS)
    codes, logs = on_two_ranks(words, folder)
    assert codes == [0, 0], logs
    return folder


RANKS = {"per_device_train_batch_size": 1, "dataloader_num_workers": 1, "load_best_model_at_end": False}


@pytest.mark.parametrize(
    "fault", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("worker", "nan")), "signal"]
)
def test_what_one_process_meets_stops_both_at_one_step_with_one_checkpoint(command, two_ranks, fault):
    words, folder = command(**RANKS | {"save_steps": 100})

    def meet(model):
        if fault == "worker":
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        elif fault == "nan":
            model.latent_projection.register_forward_hook(lambda module, args, output: output * float("nan"))
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    codes, logs = on_two_ranks(words, folder, callbacks=(None, Event("on_step_begin", 5, meet)))
    assert codes == ([143, 143] if fault == "signal" else [1, 1]), logs
    saved = newest(folder)
    assert int(saved.name.split("-")[1]) >= 5 and what_is_wrong(saved) is None
    assert {path.name for path in saved.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert all(f"Training stops at step {saved.name.split('-')[1]}" in log for log in logs)
    codes, logs = on_two_ranks([*words, "--resume_from_checkpoint", "true"], folder)
    assert codes == [0, 0], logs
    assert_same_run(folder, two_ranks)


def test_a_checkpoint_that_one_of_two_processes_cannot_write_stops_both(command, size_of):
    words, folder = command(**RANKS)
    limit = (size_of("optimizer.pt") + size_of("model.safetensors")) // 2
    codes, logs = on_two_ranks(words, folder, file_limits=(limit, None))
    assert codes == [1, 1]
    assert all("`checkpoint-3` could not be written" in log for log in logs), logs
    assert (folder / "weights-3" / "model.safetensors").is_file() and not list(folder.glob("checkpoint-*"))


def test_nodes_that_would_begin_at_different_steps_are_told_so(command, whole, tmp_path):
    """As where they share no disk, and one of them is new."""
    words, _ = command(**RANKS)
    more = [
        ("--output_dir", str(folder), "--resume_from_checkpoint", "auto") for folder in (whole(), tmp_path / "new")
    ]
    codes, logs = on_two_ranks(words, tmp_path, more_words=more)
    assert codes == [1, 1]
    assert all("process 0: step 14; process 1: step None" in log for log in logs), logs
