"""What a run has to remember beside its weights, so that its rest is what it would have been."""

import random
import re
import time
import uuid

import numpy as np
import torch
from transformers import SchedulerType, TrainerCallback
from transformers.training_args import OptimizerNames

from .resuming import read_progress
from .sft_config import OBJECTIVE


SCHEDULE = ("max_steps", "num_train_epochs", "warmup_steps", "max_grad_norm", "bf16", "fp16")
ADAPTER = (
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
)


class ProgressMixin:
    """
    How a [`~transformers.Trainer`] goes on from a checkpoint: with the sums behind the next log, its counts and its generators.

    Between the end of a step and the end of the next one, `_window` holds what a checkpoint of the steps done has to hold.
    """

    _window = None
    _evaluation_due = False  # from the end of a step until its evaluation has settled which model is best
    _states_before_evaluation = None
    _run = None  # the same in all checkpoints of a run and of those that went on from one
    _num_dropped = _num_dropped_in_a_row = _num_skipped_rows = 0

    def _settings(self):
        """What a checkpoint's run has to have in common with the one that goes on from it."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        config, rows = model.config, self.train_dataset
        language = config.get_text_config().to_dict()
        adapter = model.peft_config[model.active_adapter].to_dict() if hasattr(model, "peft_config") else {}
        return {
            "model": {
                "num_latents": config.num_latents,
                "latent_size": config.latent_size,
                "use_peft": bool(adapter),
                "backbone": config.backbone_config.model_type,
                "freeze_vision": args.freeze_vision,
                "optim": OptimizerNames(args.optim).value,
            }
            | {name: language[name] for name in ("hidden_size", "num_hidden_layers") if name in language}
            | {name: as_json(adapter[name]) for name in ADAPTER if name in adapter},
            "data": {
                "rows per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
                "seed": args.seed,
                "data_seed": args.data_seed,
                "rows of train_dataset": len(rows) if hasattr(rows, "__len__") else None,
                "train_sampling_strategy": str(args.train_sampling_strategy),
                "dataloader_drop_last": args.dataloader_drop_last,
                "shard_stream": args.shard_stream,
                "processes that share the stream": args.world_size if args.shard_stream else None,
            },
            "schedule": {name: getattr(args, name) for name in (*OBJECTIVE, *SCHEDULE)}
            | {"lr_scheduler_type": SchedulerType(args.lr_scheduler_type).value},
            "optimizer": {name: getattr(args, name) for name in ("learning_rate", "weight_decay")},
        }

    def _progress(self):
        return {
            "step": self.state.global_step,
            "updating": False,
            "dropped": None,
            "random": random_states(),
            "loss": self._tr_loss.clone(),
            "totals": {name: list(sums) for name, sums in self._totals["train"].items()},
            "flos": self.current_flos,
            "tokens": self.state.num_input_tokens_seen,
        }

    def _go_back(self, window):
        """Takes back what a step that was not finished has added to sums and generators."""
        self._tr_loss.copy_(window["loss"])
        self._totals["train"].clear()
        self._totals["train"].update({name: list(sums) for name, sums in window["totals"].items()})
        self.current_flos, self.state.num_input_tokens_seen = window["flos"], window["tokens"]

    def _progress_to_save(self):
        """What transformers does not save: sums behind the next log, settings, counts. JSON keeps floats to the last bit."""
        return {
            "settings": self._settings(),
            "losses": self.accelerator.gather(self._tr_loss.reshape(1)).tolist(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "totals": self._totals["train"],
            "num_dropped": self._num_dropped,
            "num_skipped_rows": self._num_skipped_rows,
            "evaluation_due": self._evaluation_due,
            "saved_at": time.time(),
            "run": self._run,
            "num_processes": None if self.args.save_on_each_node else self.args.world_size,
        }

    def _begin(self, checkpoint):
        """At the first step of a run, or of its rest."""
        self._loaded_step = None
        self._saved_step, self._evaluation_due, self._run = self.state.global_step, False, uuid.uuid4().hex
        self._num_dropped = self._num_dropped_in_a_row = self._num_skipped_rows = 0
        self._totals["train"].clear()
        progress = None if checkpoint is None else read_progress(checkpoint)
        if progress is not None:
            losses = progress["losses"]
            own = losses[self.args.process_index] if len(losses) == self.args.world_size else sum(losses) / len(losses)
            self._tr_loss.fill_(own)
            self._total_loss_scalar, self._globalstep_last_logged = progress["total_loss"], progress["last_logged"]
            self._totals["train"].update(progress["totals"])
            self._num_dropped, self._num_skipped_rows = progress["num_dropped"], progress["num_skipped_rows"]
            self._evaluation_due = progress.get("evaluation_due", False)
            self._run = progress.get("run")
        for entry in self.state.log_history:  # for the card, where none is made any more
            self._note_evaluation(entry, entry["step"])
        self._window = self._progress()

    def _run_epoch(self, *args, **kwargs):
        if self._evaluation_due and self.args.eval_strategy != "no":  # the run was cut in it
            self._evaluate_again(**kwargs)
        if self.state.global_step >= self.state.max_steps:  # cut after its last step; transformers would take one more
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _evaluate_again(self, model, trial, ignore_keys_for_eval, resume_from_checkpoint, **kwargs):
        """The evaluation that the run was cut in, from its beginning; the checkpoint is replaced by one that has it."""
        state = self.state
        state.log_history = [
            entry
            for entry in state.log_history
            if entry["step"] < state.global_step or not any(name.startswith("eval_") for name in entry)
        ]
        self._load_rng_state(resume_from_checkpoint)
        self._determine_best_metric(metrics=self._evaluate(trial, ignore_keys_for_eval), trial=trial)
        self._save_checkpoint(model, trial)
        self._window = self._progress()

    def _determine_best_metric(self, metrics, trial):
        is_best = super()._determine_best_metric(metrics, trial)
        self._evaluation_due = False
        return is_best

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self._evaluation_due = self.control.should_evaluate
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._window = self._progress()

    def evaluate(self, *args, **kwargs):
        """Evaluates, see [`~transformers.Trainer.evaluate`]; while training, what that draws from is left as it was."""
        self._states_before_evaluation = random_states() if self.is_in_train else None
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._leave_evaluation()

    def _leave_evaluation(self):
        if self._states_before_evaluation is not None:
            set_random_states(self._states_before_evaluation)
            self._states_before_evaluation = None

    # -----------------------------------------------------------------------------------------------------------------
    # What is told
    # -----------------------------------------------------------------------------------------------------------------

    def skipped(self):
        """`dict[str, int]`: optimiser steps that were dropped and rows that were skipped, if any were."""
        counts = {"skipped_steps": self._num_dropped, "skipped_rows": self._num_skipped_rows}
        return {name: count for name, count in counts.items() if count}

    def log(self, logs, start_time=None):
        if "train_loss" in logs:  # of the whole run, not of its rest
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self._num_dropped, 1)
        if "train_loss" in logs or "loss" in logs:
            logs.update(self.skipped())
        super().log(logs, start_time)

    def _finalize_training(self, trial, num_train_samples, start_time):
        output = super()._finalize_training(trial, num_train_samples, start_time)
        return output._replace(training_loss=output.metrics["train_loss"])


class StepHooks(TrainerCallback):
    """Tells a trainer when its steps begin and when its optimiser is at work."""

    def __init__(self, trainer, checkpoint):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin(self.checkpoint)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._window["updating"] = True


def as_json(value):
    """A setting as it comes back from JSON, where sets have no order; of a pattern, what matches."""
    if isinstance(value, str):
        return re.sub(r"\(\?#[^)]*\)", "", value)  # without its note
    return sorted(value) if isinstance(value, (set, list, tuple)) else getattr(value, "value", value)


def random_states():
    """Of all generators that a run draws from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_states(states):
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3]:
        torch.cuda.set_rng_state_all(states[3])
