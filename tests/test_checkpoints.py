"""Checkpoints are there as a whole or not at all, and only what can be gone on from is."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import build_tiny_backbone
from torch.utils.data._utils import signal_handling
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from trainer import AMVLSFTConfig, AMVLSFTTrainer
from trainer.checkpoints import CheckpointMixin
from trainer.data.color_steps import build_color_steps
from trainer.faults import FaultsMixin
from trainer.finite import FiniteMixin
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


def test_what_is_overridden_is_still_what_transformers_calls():
    """Another release that renames one of these would leave it uncalled, without an error."""
    overridden = {
        CheckpointMixin: {"_get_output_dir", "_save_checkpoint", "_push_from_checkpoint", "save_model"},
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
