"""A run that stops, for whatever reason, leaves a checkpoint of its last finished optimiser step."""

import contextlib
import logging
import os
import signal
import threading
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data._utils import signal_handling

from .placing import finish_replacing, remove
from .progress import StepHooks, set_random_states
from .resuming import PROGRESS_NAME, STAGING, compare_settings, read_progress, read_step, resolve_checkpoint


logger = logging.getLogger(__name__)


class FaultsMixin:
    """
    What a [`~transformers.Trainer`] does when something goes wrong.

    - SIGTERM, which SLURM sends before it takes the machine, and Ctrl-C: the step is finished, a checkpoint is saved, and the process
      ends with `SystemExit(143)` or `KeyboardInterrupt`; a second Ctrl-C ends it at once. All processes stop at the same step, and
      there is nothing to switch on: transformers' `enable_jit_checkpoint` is left out.
    - A batch that cannot be fetched, a data loader's worker that died: all processes save a checkpoint and stop.
    - Any other exception does so in a run of one process; of several, the last checkpoint stands.
    - A kill: the run goes on from its last checkpoint, see `resume_from_checkpoint` of [`~FaultsMixin.train`].
    """

    _signal = None

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """
        Trains, see [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*): a folder; or `True`, for the last whole checkpoint of
                the newest run in `output_dir`; or `"auto"`, for that one if there is any.
            trial, ignore_keys_for_eval (*optional*): see [`~transformers.Trainer.train`].

        Raises:
            ValueError: no such checkpoint, one that is not whole, or settings under which it cannot be gone on from.
        """
        output_dir = Path(self.args.output_dir)
        checkpoint = self._agreed_checkpoint(resume_from_checkpoint)
        progress = None if checkpoint is None else read_progress(checkpoint)
        if progress is not None:
            compare_settings(progress["settings"], self._settings(), checkpoint, self.args.ignore_data_skip)
        elif checkpoint is not None:
            logger.warning(
                "`%s` has no `%s`: whether seed, rows and objective are those of its run is not known, and the sums behind its next "
                "log are lost.",
                checkpoint,
                PROGRESS_NAME,
            )
        elif any(output_dir.glob("checkpoint-*")):
            logger.warning(
                "`%s` has checkpoints of another run, which this one replaces step by step.",
                output_dir,
            )
        if self.args.save_only_model:
            logger.warning(
                "`save_only_model=True`: a run that is stopped cannot be gone on from, it leaves its weights alone."
            )
        failure = self._in_turn(output_dir / STAGING, lambda: finish_replacing(output_dir))  # of a run that was cut
        if failure is not None:
            raise failure
        if self.args.local_process_index == 0:
            remove(output_dir / STAGING)
        self.accelerator.wait_for_everyone()
        self._saved_step = self._window = self._signal = None
        self._saved_in = checkpoint
        hooks = StepHooks(self, checkpoint)
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
            self.is_in_train = False

    def _agreed_checkpoint(self, asked):
        """What [`resolve_checkpoint`] gives, where it is of the same step on all processes; an error of one is raised by all."""
        checkpoint = failure = None
        try:
            checkpoint = resolve_checkpoint(asked, self.args.output_dir)
        except ValueError as error:
            failure = error
        if self.args.world_size > 1:
            step = None if checkpoint is None else read_step(checkpoint)
            found = [None] * self.args.world_size
            torch.distributed.all_gather_object(found, f"step {step}" if failure is None else str(failure))
            if len(set(found)) > 1:
                told = "; ".join(f"process {index}: {text}" for index, text in enumerate(found))
                raise ValueError(
                    f"`resume_from_checkpoint` is {asked!r}, which is not the same to all processes ({told}): copy the checkpoint "
                    "to every node, or begin anew on all of them."
                )
        if failure is not None:
            raise failure
        return checkpoint

    def _save_last_step(self, error):
        """A checkpoint of the last finished optimiser step, if there is none yet; the error tells where it is."""
        step, window = self.state.global_step, self._window
        if self._saved_step is None:
            return
        self._leave_evaluation()
        self._signal, saved_step = None, self._saved_step
        where = None
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
                        weights = self._save_weights(Path(self.args.output_dir))
                        where = f"no checkpoint, which could not be written. {weights}"
            except Exception as failure:
                where = f"no checkpoint: {failure}"
        elif step == 0:
            where = "no checkpoint, since none was finished"
        where = where or f"`{self._saved_in}`"
        self._saved_step = None  # not again on the way out
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
        except (ConnectionError, EOFError) as error:  # it died while it handed a batch over
            failure = RuntimeError(f"A data loader's worker exited unexpectedly: {type(error).__name__}: {error}")
            failure.__cause__ = error
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
