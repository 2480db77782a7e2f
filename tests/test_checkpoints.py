"""Checkpoints are there as a whole or not at all, and only what can be gone on from is."""

import functools
import inspect
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import build_tiny_backbone
from torch.utils.data._utils import signal_handling
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from trainer import AMVLSFTConfig, AMVLSFTTrainer
from trainer.checkpoints import CheckpointMixin
from trainer.data.color_steps import build_color_steps
from trainer.faults import FaultsMixin
from trainer.finite import FiniteMixin
from trainer.placing import WRITTEN, finish_replacing, replace_files
from trainer.progress import ProgressMixin
from trainer.resuming import REPLACED, STAGING, resolve_checkpoint, what_is_wrong


SETTINGS = {
    "max_steps": 4,
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "training_summary": False,
    "report_to": "none",
    "self_test": False,
}


@pytest.fixture(scope="module")
def rows():
    return build_color_steps(8, image_size=48)


def build_trainer(rows, folder, num_latents=3, callbacks=(), peft_config=None, eval_dataset=None, **settings):
    backbone, stock = build_tiny_backbone(seed=0)
    processor = AMVLProcessor.from_backbone(stock)
    model = AMVLForConditionalGeneration.from_backbone(
        backbone, num_latents=num_latents, latent_size=8, latent_token_id=processor.latent_token_id
    )
    return AMVLSFTTrainer(
        model,
        AMVLSFTConfig(str(folder), **{**SETTINGS, **settings}),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=processor,
        callbacks=list(callbacks),
        peft_config=peft_config,
    )


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    """The folder of a run that left four checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    build_trainer(rows, folder).train()
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_every_checkpoint_is_whole_and_nothing_else_is_left(run):
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == [f"checkpoint-{n}" for n in range(1, 5)]
    assert [what_is_wrong(path) for path in run.glob("checkpoint-*")] == [None] * 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", r"`model.safetensors` is cut: it has \d+ of \d+ bytes"),
        ("optimizer.pt", "`optimizer.pt` is cut"),
        ("rng_state.pth", "`rng_state.pth` is cut"),
        ("trainer_state.json", "`trainer_state.json` is cut"),
        ("config.json", "`config.json` is cut"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over_and_refused_by_name(copy, name, message, caplog):
    last = copy / "checkpoint-4"
    cut(last / name)
    assert get_last_checkpoint(copy) == str(last)  # what would be taken otherwise
    assert resolve_checkpoint("true", copy) == str(copy / "checkpoint-3")
    assert "`checkpoint-4` is passed over" in caplog.text
    with pytest.raises(ValueError, match=f"cannot be resumed from: {message}"):
        resolve_checkpoint(str(last), copy)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_checkpoint_with_a_file_missing_is_refused(copy, name):
    (copy / "checkpoint-4" / name).unlink()
    with pytest.raises(ValueError, match="cannot be resumed from: it has no"):
        resolve_checkpoint(copy / "checkpoint-4", copy)


def test_without_a_whole_checkpoint_the_half_written_ones_are_named(copy):
    for number in (1, 2, 3):
        shutil.rmtree(copy / f"checkpoint-{number}")
    cut(copy / "checkpoint-4" / "model.safetensors")
    (copy / STAGING / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(
        ValueError, match="no whole checkpoint.*`checkpoint-4`: .*`_unfinished/checkpoint-5`.*begin anew"
    ):
        resolve_checkpoint(True, copy)


@pytest.mark.parametrize("asked", [None, False, "false", "False"])
def test_a_run_that_is_not_resumed_begins_anew(asked, run):
    assert resolve_checkpoint(asked, run) is None


def test_a_checkpoint_that_is_nowhere_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match="`resume_from_checkpoint` is 'nowhere'.*no such folder"):
        resolve_checkpoint("nowhere", tmp_path)
    with pytest.raises(ValueError, match="has no whole checkpoint. Leave it out"):
        resolve_checkpoint("True", tmp_path / "new")


def test_a_checkpoint_moved_aside_for_one_that_never_came_is_put_back(copy):
    (copy / STAGING).mkdir()
    (copy / "checkpoint-4").rename(copy / STAGING / f"{REPLACED}checkpoint-4")
    assert resolve_checkpoint(True, copy) == str(copy / "checkpoint-4")


def test_a_checkpoint_moved_aside_is_not_lost_to_a_run_that_begins_anew(rows, copy):
    (copy / STAGING).mkdir()
    (copy / "checkpoint-4").rename(copy / STAGING / f"{REPLACED}checkpoint-4")
    build_trainer(rows, copy, max_steps=1).train()
    assert what_is_wrong(copy / "checkpoint-4") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_latents": 2}, "`num_latents` was 3 and is 2 now"),
        ({"per_device_train_batch_size": 1}, "`rows per step` was 2 and is 1 now"),
        ({"seed": 1}, "`seed` was 42 and is 1 now"),
        (
            {"peft_config": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")},
            "`use_peft` was False and is True now",
        ),
    ],
)
def test_a_run_that_would_not_go_on_is_refused_naming_both_values(rows, copy, settings, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(rows, copy, **settings).train(resume_from_checkpoint=True)


LORA = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("settings", "adapter", "message"),
    [
        ({}, {"lora_alpha": 32}, "`lora_alpha` was 8 and is 32 now"),
        ({}, {"r": 4}, "`r` was 8 and is 4 now"),
        ({}, {"use_rslora": True}, "`use_rslora` was False and is True now"),
        (
            {},
            {"target_modules": ["v_proj", "q_proj"]},
            r"`target_modules` was '[^ ]*\(q_proj\)\)' and is '[^ ]*\(q_proj\|v_proj\)\)' now",
        ),
        ({"optim": "sgd"}, {}, "`optim` was 'adamw_torch[a-z_]*' and is 'sgd' now"),
        ({"freeze_vision": True}, {}, "`freeze_vision` was False and is True now"),
        ({"dataloader_drop_last": True}, {}, "`dataloader_drop_last` was False and is True now"),
        ({"train_sampling_strategy": "sequential"}, {}, "`train_sampling_strategy` was 'random'.*'sequential' now"),
    ],
)
def test_an_adapter_that_would_be_another_one_is_refused(rows, lora_run, settings, adapter, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(
            rows, lora_run, peft_config=LoraConfig(**LORA | adapter), **{"freeze_vision": False} | settings
        ).train(True)


@pytest.fixture(scope="module")
def lora_run(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    build_trainer(rows, folder, peft_config=LoraConfig(**LORA), freeze_vision=False, max_steps=1).train()
    return folder


def test_a_new_run_that_was_cut_is_gone_on_from_and_not_the_old_one_that_came_further(rows, copy):
    build = functools.partial(build_trainer, rows, copy, learning_rate=1e-3)
    with pytest.raises(RuntimeError, match="planted"):
        build(callbacks=[At("on_step_begin", 2, fail)]).train()
    assert resolve_checkpoint(True, copy) == str(copy / "checkpoint-2")
    build(max_steps=3).train(resume_from_checkpoint=True)
    assert resolve_checkpoint(True, copy) == str(copy / "checkpoint-3")  # of the same run


def test_later_checkpoints_beside_the_one_that_is_named_are_told(copy, caplog):
    assert resolve_checkpoint(str(copy / "checkpoint-3"), copy) == str(copy / "checkpoint-3")
    assert "there are later ones beside it" in caplog.text and "['checkpoint-4']" in caplog.text


def test_what_is_no_folder_is_refused_by_what_it_is(copy, monkeypatch):
    with pytest.raises(ValueError, match="`resume_from_checkpoint` is 1: give a folder"):
        resolve_checkpoint(1, copy)
    with pytest.raises(ValueError, match="it is a file, not a folder"):
        resolve_checkpoint(copy / "checkpoint-4" / "config.json", copy)
    monkeypatch.setenv("HOME", str(copy))
    assert resolve_checkpoint("~/checkpoint-4", copy) == str(copy / "checkpoint-4")


def test_a_missing_index_or_state_of_one_process_shows(copy):
    last = copy / "checkpoint-4"
    (last / "model.safetensors").rename(last / "model-00001-of-00001.safetensors")
    assert "has no `model.safetensors.index.json`" in what_is_wrong(last)
    (last / "model-00001-of-00001.safetensors").rename(last / "model.safetensors")
    progress = json.loads((last / "progress.json").read_text())
    (last / "progress.json").write_text(json.dumps(progress | {"num_processes": 2}))
    (last / "rng_state.pth").rename(last / "rng_state_0.pth")
    assert what_is_wrong(last) == "it has no ['rng_state_1.pth']"
    shutil.copy(last / "rng_state_0.pth", last / "rng_state_1.pth")
    assert what_is_wrong(last) is None


def test_what_cannot_be_checked_or_gone_on_from_is_said(rows, copy, caplog):
    (copy / "checkpoint-4" / "progress.json").unlink()
    build_trainer(rows, copy, save_only_model=True).train(resume_from_checkpoint=str(copy / "checkpoint-4"))
    assert "`progress.json`: whether seed, rows and objective" in caplog.text
    assert "`save_only_model=True`: a run that is stopped cannot" in caplog.text


def test_where_the_steps_are_is_said_once_and_names_a_folder_that_is_there(rows, run, tmp_path, caplog):
    trainer = build_trainer(rows, tmp_path, max_steps=6, callbacks=[At("on_step_begin", 4, fail)])
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert caplog.text.count("Training stops at step 4") == 1
    assert f"Its steps are in `{run / 'checkpoint-4'}`" in caplog.text


def test_a_loss_that_is_not_finite_is_told_once(rows, tmp_path, caplog):
    trainer = build_trainer(rows, tmp_path, save_steps=100)
    trainer.add_callback(
        At(
            "on_step_begin",
            1,
            lambda: trainer.model.latent_projection.register_forward_hook(
                lambda module, args, output: output * float("nan")
            ),
        )
    )
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert caplog.text.count("Training stops at step 1") == 1


def test_a_run_cut_after_its_last_step_takes_no_further_one(rows, copy):
    trainer = build_trainer(rows, copy, lr_scheduler_type="constant")
    result = trainer.train(resume_from_checkpoint=True)
    assert result.global_step == trainer.state.global_step == 4 and not (copy / "checkpoint-5").exists()
    saved = load_file(copy / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name], weight) for name, weight in saved.items())
    progress = json.loads((copy / "checkpoint-4" / "progress.json").read_text())
    assert result.training_loss == pytest.approx((progress["total_loss"] + progress["losses"][0]) / 4)


def test_another_objective_or_length_is_said_naming_both_values(rows, copy, caplog):
    shutil.rmtree(copy / "checkpoint-4")
    build_trainer(rows, copy, beta=0.5, max_steps=5).train(resume_from_checkpoint=True)
    assert "`beta` was 0.01 and is 0.5 now" in caplog.text and "`max_steps` was 4 and is 5 now" in caplog.text
    assert (copy / "checkpoint-5").is_dir()


def test_a_new_run_among_old_checkpoints_replaces_them_and_says_what_would_be_resumed(rows, copy, caplog):
    before = torch.load(copy / "checkpoint-1" / "optimizer.pt")["state"][0]["exp_avg"]
    (copy / STAGING / "checkpoint-9").mkdir(parents=True)
    build_trainer(rows, copy, max_steps=1, seed=3).train()
    after = torch.load(copy / "checkpoint-1" / "optimizer.pt")["state"][0]["exp_avg"]
    assert not torch.equal(after, before) and not (copy / STAGING).exists()
    assert "has checkpoints of another run" in caplog.text


def test_the_old_checkpoint_goes_when_the_new_one_stands(rows, tmp_path, monkeypatch):
    """With one checkpoint kept, there is a whole one at any time from the first on."""
    seen = []

    def rmtree(path, *args, **kwargs):
        if Path(path).name.startswith("checkpoint-") and Path(path).parent == tmp_path:
            seen.append([what_is_wrong(other) for other in tmp_path.glob("checkpoint-*") if other != Path(path)])
        return real(path, *args, **kwargs)

    real = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    build_trainer(rows, tmp_path, save_total_limit=1).train()
    assert seen == [[None]] * 3
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_the_best_checkpoint_is_named_by_its_place_and_loaded(rows, tmp_path, caplog):
    trainer = build_trainer(
        rows,
        tmp_path,
        eval_dataset=build_color_steps(4, "held_out", image_size=48),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        save_total_limit=1,
        learning_rate=0.05,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}") and Path(best).is_dir()
    state = json.loads((Path(best) / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best
    assert "Could not locate the best model" not in caplog.text


def test_a_saved_model_takes_the_place_of_one_in_other_pieces(rows, tmp_path):
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (tmp_path / name).write_text("old")
    build_trainer(rows, tmp_path, save_strategy="no").save_model()
    assert [path.name for path in tmp_path.glob("model*safetensors*")] == ["model.safetensors"]
    assert AMVLForConditionalGeneration.from_pretrained(tmp_path).config.num_latents == 3


class At(TrainerCallback):
    """Does something at an event of one step."""

    def __init__(self, event, step, act):
        setattr(self, event, lambda args, state, control, **kwargs: act() if state.global_step == step else None)


def test_of_two_runs_in_one_folder_the_older_checkpoints_go_first(rows, copy):
    """Also where all are of the same second, and the older ones have higher numbers."""
    left = []
    note = At("on_save", 2, lambda: left.extend(sorted(path.name for path in copy.glob("checkpoint-*"))))
    build_trainer(rows, copy, max_steps=2, save_total_limit=2, callbacks=[note]).train()
    assert left == ["checkpoint-1", "checkpoint-2"]


def test_the_best_checkpoint_stays_after_the_folder_was_moved(rows, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2}
    settings["eval_dataset"] = build_color_steps(2, "held_out", image_size=48)

    def build(folder, **more):
        trainer = build_trainer(rows, folder, **settings, **more)
        determine, losses = trainer._determine_best_metric, [None, 2.0, 1.0, 3.0, 4.0]
        trainer._determine_best_metric = lambda metrics, trial: determine(
            metrics | {"eval_loss": losses[trainer.state.global_step]}, trial
        )
        return trainer

    with pytest.raises(RuntimeError, match="planted"):
        build(tmp_path / "before", callbacks=[At("on_step_begin", 3, fail)]).train()
    (tmp_path / "before").rename(tmp_path / "after")
    trainer = build(tmp_path / "after")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "after" / "checkpoint-2")
    assert what_is_wrong(tmp_path / "after" / "checkpoint-2") is None


def fail(*args):
    raise RuntimeError("planted")


def test_no_checkpoint_is_saved_of_the_best_weights_with_the_last_optimizer(rows, tmp_path):
    trainer = build_trainer(
        rows,
        tmp_path,
        eval_dataset=build_color_steps(2, "held_out", image_size=48),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="eval_loss",
        max_steps=2,
        load_best_model_at_end=True,
        callbacks=[At("on_train_end", 2, fail)],
    )
    determine = trainer._determine_best_metric
    trainer._determine_best_metric = lambda metrics, trial: determine(
        metrics | {"eval_loss": float(trainer.state.global_step)}, trial
    )
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_full_model_and_an_adapter_in_one_folder_take_each_others_place(rows, tmp_path):
    adapter = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    build_trainer(rows, tmp_path, save_strategy="no", peft_config=adapter).save_model()
    assert (tmp_path / "adapter_config.json").is_file()
    full = build_trainer(rows, tmp_path, save_strategy="no")
    full.save_model()
    assert not list(tmp_path.glob("adapter_*"))
    loaded = AMVLForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in full.model.state_dict().items())
    build_trainer(rows, tmp_path, save_strategy="no", peft_config=adapter).save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file() and not list(tmp_path.glob("model*safetensors*"))


def test_an_adapter_saved_into_its_base_leaves_that(tmp_path):
    staged = tmp_path / STAGING / "model"
    staged.mkdir(parents=True)
    (tmp_path / "model.safetensors").write_text("base")
    (staged / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    replace_files(staged, tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "base"


@pytest.mark.parametrize("num_moved", range(5))
def test_a_model_that_was_moved_in_part_when_the_run_was_killed_is_moved_by_the_next(tmp_path, monkeypatch, num_moved):
    """Whichever operation was the last one; then what a new run does at its start."""
    staged = tmp_path / STAGING / "model"
    staged.mkdir(parents=True)
    names = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        (staged / name).write_text("new")
    for name in (names[0], names[1], "model.safetensors"):
        (tmp_path / name).write_text("old")
    operations = []

    def counted(real):
        def call(*args):
            if len(operations) == num_moved:
                raise KeyboardInterrupt
            operations.append(args)
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, counted(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            replace_files(staged, tmp_path)
    finish_replacing(tmp_path)
    state = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    expected = (
        dict.fromkeys(names, "new") if num_moved else {names[0]: "old", names[1]: "old", "model.safetensors": "old"}
    )
    assert state == expected


def test_a_run_finishes_what_was_being_moved_before_it_clears_the_rest(rows, tmp_path):
    written = tmp_path / STAGING / WRITTEN
    written.mkdir(parents=True)
    (written / "model.safetensors").write_text("of a run that was killed")
    build_trainer(rows, tmp_path, max_steps=1, save_strategy="no").train()
    assert (tmp_path / "model.safetensors").read_text() == "of a run that was killed"
    assert not (tmp_path / STAGING).exists()


@pytest.mark.parametrize("operation", ["mkdir", "rename"])
def test_a_disk_full_anywhere_in_a_save_is_a_failed_save(rows, tmp_path, monkeypatch, operation, caplog):
    def full(real, fails):
        def call(*args, **kwargs):
            if fails(*args):
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return call

    step = []
    if operation == "mkdir":
        monkeypatch.setattr(
            Path, "mkdir", full(Path.mkdir, lambda path, *mode: path.name == STAGING and len(step) == 2)
        )
    else:
        fails = lambda source, place: Path(place).name == "checkpoint-2"  # noqa: E731
        monkeypatch.setattr(os, "rename", full(os.rename, fails))
    counting = [At("on_step_end", number, lambda: step.append(1)) for number in range(1, 4)]
    settings = {"on_failed_save": "continue", "max_steps": 3}
    build_trainer(rows, tmp_path, callbacks=counting, **settings).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    assert "`checkpoint-2` could not be written" in caplog.text and not (tmp_path / STAGING).exists()


def test_a_last_checkpoint_that_does_not_fit_leaves_the_weights_also_where_a_run_goes_on(rows, tmp_path, monkeypatch):
    def save(data, path, *args, **kwargs):
        if str(path).endswith("optimizer.pt"):
            raise OSError(28, "No space left on device")
        return real(data, path, *args, **kwargs)

    real = torch.save
    monkeypatch.setattr(torch, "save", save)
    settings = {"on_failed_save": "continue", "save_steps": 100, "callbacks": [At("on_step_begin", 2, fail)]}
    with pytest.raises(RuntimeError, match="planted"):
        build_trainer(rows, tmp_path, **settings).train()
    assert load_file(tmp_path / "weights-2" / "model.safetensors")


def test_a_copy_for_the_hub_that_fails_leaves_the_model_that_is_there(rows, copy, monkeypatch):
    build_trainer(rows, copy, save_strategy="no").save_model()
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    trainer = build_trainer(rows, copy, hub_model_id="someone/run")
    real = shutil.copy

    def full(source, *args):
        if Path(source).name == "model.safetensors":
            raise OSError(28, "No space left on device")
        return real(source, *args)

    monkeypatch.setattr(shutil, "copy", full)
    (copy / "checkpoint-4" / "config.json").write_text("{}")
    trainer._push_from_checkpoint(copy / "checkpoint-4")
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before
    assert not (copy / STAGING).exists() and trainer._pushes == ()
    monkeypatch.undo()
    trainer._copy_to_output_dir(copy / "checkpoint-4")
    assert (copy / "config.json").read_text() == "{}" and not (copy / STAGING).exists()


def test_what_is_overridden_is_still_what_transformers_calls():
    """Another release that renames one of these would leave it uncalled, without an error."""
    overridden = {
        CheckpointMixin: {"_get_output_dir", "_save_checkpoint", "_push_from_checkpoint", "save_model"}
        | {"_load_best_model"},
        ProgressMixin: {"_run_epoch", "_maybe_log_save_evaluate", "_finalize_training", "evaluate", "log"}
        | {"_determine_best_metric"},
        FaultsMixin: {"train", "get_batch_samples"},
        FiniteMixin: {"_get_grad_norm"},
    }
    source = inspect.getsource(Trainer)
    for mixin, names in overridden.items():
        assert {name for name in vars(mixin) if hasattr(Trainer, name) and not name.startswith("__")} == names
        assert all(f"self.{name}(" in source for name in names - {"train"})
    assert signal_handling._SIGCHLD_handler_set in (True, False)
