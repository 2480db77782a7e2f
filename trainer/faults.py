"""A run that stops, for whatever reason, leaves a checkpoint of its last finished optimiser step, and goes on as if never cut."""

import contextlib
import logging
import math
import os
import random
import signal
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data._utils import signal_handling
from transformers import SchedulerType, TrainerCallback

from .checkpoints import CheckpointMixin, remove
from .resuming import STAGING, compare_settings, read_progress, resolve_checkpoint
from .sft_config import OBJECTIVE


logger = logging.getLogger(__name__)


class FaultsMixin(CheckpointMixin):
    """
    What a [`~transformers.Trainer`] does when something goes wrong.

    - SIGTERM, which SLURM sends before it takes the machine, and Ctrl-C: the step is finished, a checkpoint is saved, and the process
      ends with `SystemExit(143)` or `KeyboardInterrupt`; a second Ctrl-C ends it at once. All processes stop at the same step.
    - A loss or a gradient that is not finite: `on_nan_loss`.
    - A batch that cannot be fetched, a data loader's worker that died: all processes save a checkpoint and stop. Any other
      exception does so in a run of one process; of several, the last checkpoint stands.
    - A kill: the run goes on from its last checkpoint, see `resume_from_checkpoint` of [`~FaultsMixin.train`]; the means that are
      logged over several steps and the loss of the whole run are right, too.
    """

    _signal = None
    _window = None  # what a checkpoint of the steps done so far holds, while the next one runs
    _num_dropped = _num_dropped_in_a_row = _num_skipped_rows = 0

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """
        Trains, see [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*): a folder; or `True`, for the last whole checkpoint of `output_dir`.
            trial, ignore_keys_for_eval (*optional*): see [`~transformers.Trainer.train`].

        Raises:
            ValueError: no such checkpoint, one that is not whole, or settings under which it cannot be gone on from.
        """
        output_dir = Path(self.args.output_dir)
        checkpoint = resolve_checkpoint(resume_from_checkpoint, output_dir)
        if checkpoint is not None and (progress := read_progress(checkpoint)) is not None:
            compare_settings(progress["settings"], self._settings(), checkpoint, self.args.ignore_data_skip)
        elif checkpoint is None and any(output_dir.glob("checkpoint-*")):
            logger.warning(
                "`%s` has checkpoints of another run: `resume_from_checkpoint=True` takes the highest number, whichever run it "
                "is of.",
                output_dir,
            )
        if self.args.local_process_index == 0:
            remove(output_dir / STAGING)  # of a run that was cut
        self.accelerator.wait_for_everyone()
        self._saved_step = self._window = self._signal = None
        hooks = _Hooks(self, checkpoint)
        self.add_callback(hooks)
        try:
            with self._signals_deferred():
                return super().train(checkpoint, trial, ignore_keys_for_eval)
        except BaseException as error:
            if self.args.world_size == 1:  # of several, the others are anywhere
                self._save_last_step(error)
            raise
        finally:
            self.remove_callback(hooks)

    def _settings(self):
        """What a checkpoint's run has to have in common with the one that goes on from it."""
        args, config = self.args, self.accelerator.unwrap_model(self.model).config
        rows = self.train_dataset
        return {
            "model": {
                "num_latents": config.num_latents,
                "latent_size": config.latent_size,
                "use_peft": hasattr(self.model, "peft_config"),
            },
            "data": {
                "rows per step": self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
                "seed": args.seed,
                "data_seed": args.data_seed,
                "rows of train_dataset": len(rows) if hasattr(rows, "__len__") else None,
            },
            "schedule": {
                name: getattr(args, name)
                for name in (
                    *OBJECTIVE,
                    "max_steps",
                    "num_train_epochs",
                    "learning_rate",
                    "weight_decay",
                    "max_grad_norm",
                )
            }
            | {"lr_scheduler_type": SchedulerType(args.lr_scheduler_type).value, "warmup_steps": args.warmup_steps},
        }

    # -----------------------------------------------------------------------------------------------------------------
    # The steps done so far
    # -----------------------------------------------------------------------------------------------------------------

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
        }

    def _begin(self, checkpoint):
        """At the first step of a run, or of its rest."""
        self._saved_step = self.state.global_step
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
        self._window = self._progress()

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._window = self._progress()

    def _save_last_step(self, error):
        """A checkpoint of the last finished optimiser step, if there is none yet; the error tells where it is."""
        step, window = self.state.global_step, self._window
        if self._saved_step is None:
            return
        self._signal, saved_step = None, self._saved_step
        where = f"`{Path(self.args.output_dir) / f'checkpoint-{step}'}`"
        if step > saved_step:
            try:
                if window["step"] == step and window["updating"]:
                    where = (
                        f"no checkpoint: the optimiser was at work. {self._save_weights(Path(self.args.output_dir))}"
                    )
                else:
                    if window["step"] == step:
                        self._go_back(window)
                        set_random_states(window["random"])
                    self._save_checkpoint(self.model, trial=None)
                    if self._saved_step != step:
                        where = "no checkpoint, which could not be written"
            except Exception as failure:
                where = f"no checkpoint: {failure}"
        elif step == 0:
            where = "no checkpoint, since none was finished"
        told = f"Training stops at step {step} ({type(error).__name__}: {str(error)[:400]}). Its steps are in {where}"
        logger.error(
            "%s. `resume_from_checkpoint=True` goes on from the last whole checkpoint.", told.removesuffix(".")
        )

    # -----------------------------------------------------------------------------------------------------------------
    # What all processes have to agree on
    # -----------------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, failure = [], None
        try:
            batches = list(islice(epoch_iterator, num_batches))
        except Exception as error:
            failure = error
        skipped = [pair for batch in batches for pair in batch.pop("skipped_rows", ())]
        for index, reason in skipped:
            logger.warning("Row %d of `train_dataset` is skipped, the next good one is taken: %s", index, reason)
        self._num_skipped_rows += self._go_on_together(failure, len(skipped))
        return super().get_batch_samples(iter(batches), num_batches, device)

    def _go_on_together(self, failure=None, num_skipped=0):
        """Stops all processes, after a checkpoint, if one of them failed or was told to end; else the sum of `num_skipped`."""
        met = [failure is not None, self._signal == signal.SIGINT, self._signal == signal.SIGTERM, num_skipped]
        if self.args.world_size > 1:
            met = torch.tensor(met, dtype=torch.long, device=self.accelerator.device)
            torch.distributed.all_reduce(met)
            met = met.tolist()
        error = None
        if met[0]:
            error = self._shared_failure(failure)
        elif met[1]:
            error = KeyboardInterrupt("SIGINT")
        elif met[2]:
            error = SystemExit(128 + signal.SIGTERM)
        if error is None:
            return met[3]
        self._save_last_step(error)
        raise error

    @contextlib.contextmanager
    def _signals_deferred(self):
        """SIGTERM and Ctrl-C wait for the end of the step, and a worker's death for the next batch, where all can stop."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number, frame):
            if number == self._signal == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number
            os.write(2, b"\nStopping after this step, with a checkpoint; Ctrl-C again stops at once.\n")

        handlers = {signal.SIGTERM: note, signal.SIGINT: note, signal.SIGCHLD: signal.SIG_DFL}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        # torch's handler raises wherever the process is, in the middle of a write for example.
        was_set, signal_handling._SIGCHLD_handler_set = signal_handling._SIGCHLD_handler_set, True
        try:
            yield
        finally:
            signal_handling._SIGCHLD_handler_set = was_set
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def prediction_step(self, *args, **kwargs):
        if self.is_in_train:
            self._go_on_together()
        return super().prediction_step(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """Evaluates, see [`~transformers.Trainer.evaluate`]; while training, what that draws from is left as it was."""
        states = random_states()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            if self.is_in_train:
                set_random_states(states)

    # -----------------------------------------------------------------------------------------------------------------
    # What is not finite
    # -----------------------------------------------------------------------------------------------------------------

    def _check_terms(self, sums):
        """`sums` of a batch, the same on all processes, before anything is computed from them."""
        if self.model.training and self._window is not None:
            names = [f"`{name}`" for name, (value, _) in sums.items() if not math.isfinite(value)]
            if names:
                self._drop(", ".join(names))

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        window = self._window
        # Under fp16 the scaler looks for infinite gradients, and leaves such steps out by itself.
        scaled = self.accelerator.scaler is not None
        if window["dropped"] is None and not scaled and grad_norm is not None and not math.isfinite(grad_norm):
            if self.is_deepspeed_enabled:  # its engine has taken the step by now: the last checkpoint stands
                self._saved_step = None
            self._drop("the norm of the gradient")
        if window["dropped"] is None:
            self._num_dropped_in_a_row = 0
            return grad_norm
        self._num_dropped += 1
        self._num_dropped_in_a_row += 1
        logger.warning("Step %d is dropped, since not finite: %s.", self.state.global_step + 1, window["dropped"])
        if not scaled:
            for parameter in model.parameters():
                parameter.grad = None  # neither momentum nor decay
        self._go_back(window)
        self._globalstep_last_logged += 1  # the mean that is logged next is one over the others
        return grad_norm

    def _drop(self, what):
        """Marks the step as one to leave out, or stops."""
        args, num_before = self.args, self._num_dropped_in_a_row
        if args.on_nan_loss == "skip" and num_before < args.max_skips_in_a_row:
            self._window["dropped"] = what
            return
        times = f", after {num_before} steps in a row that were dropped (`max_skips_in_a_row`)" if num_before else ""
        hint = "" if num_before else ", or drop such steps with `on_nan_loss='skip'`"
        error = FloatingPointError(
            f"Not finite at step {self.state.global_step + 1}: {what}{times}. Look at the rows of that step, lower "
            f"`learning_rate`{hint}."
        )
        self._save_last_step(error)
        raise error

    # -----------------------------------------------------------------------------------------------------------------
    # What is told
    # -----------------------------------------------------------------------------------------------------------------

    def skipped(self):
        """`dict[str, int]`: optimiser steps that were dropped and rows that were skipped, if any were."""
        counts = {"skipped_steps": self._num_dropped, "skipped_rows": self._num_skipped_rows}
        return {name: count for name, count in counts.items() if count}

    def log(self, logs, start_time=None):
        if self.is_in_train and self.model.training:
            logs.update(self.skipped())
        if "train_loss" in logs:  # of the whole run, not of its rest
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self._num_dropped, 1)
            logs.update(self.skipped())
        super().log(logs, start_time)

    def _finalize_training(self, trial, num_train_samples, start_time):
        output = super()._finalize_training(trial, num_train_samples, start_time)
        return output._replace(training_loss=output.metrics["train_loss"])


class _Hooks(TrainerCallback):
    """Tells a trainer when its steps begin and when its optimiser is at work."""

    def __init__(self, trainer, checkpoint):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin(self.checkpoint)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._window["updating"] = True


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
