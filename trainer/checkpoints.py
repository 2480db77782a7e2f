"""Checkpoints that are there as a whole or not at all: written aside, flushed, then renamed."""

import json
import logging
import shutil
from fnmatch import fnmatch
from pathlib import Path

import torch
from peft import PeftModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .hub import TRAINING_STATE
from .placing import MOVING, WRITTEN, delete_oldest, flush_tree, remove, replace_files, replace_folder
from .resuming import PROGRESS_NAME, STAGING


logger = logging.getLogger(__name__)


class CheckpointMixin:
    """
    How a [`~transformers.Trainer`] saves.

    A checkpoint is written in `output_dir`/_unfinished by all processes, flushed to the disk, and renamed to its place; older ones
    are deleted after that, so that there is room needed for one more than `save_total_limit`. A model that is saved goes the same
    way, file by file. Where that fails, for a full disk say, what was written of it is removed and what was there before stays.
    """

    _staged = None  # the folder that a checkpoint is written in at the moment
    _alone = False  # of several processes, the one that writes does not wait for the others
    _saved_step = None  # optimiser steps in the newest checkpoint; none before the first step
    _saved_in = None  # its folder

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._staged is None else str(self._staged)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._staged is None:  # otherwise it is not in its place yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial):
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, best = run_dir / STAGING / name, self.state.best_model_checkpoint
        progress = self._progress_to_save()

        def write():
            super(CheckpointMixin, self)._save_checkpoint(model, trial)
            if step := self.state.best_global_step:  # transformers looks for it beside the staged one
                place = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
                if place.name == name or place.is_dir():
                    self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                (staged / PROGRESS_NAME).write_text(json.dumps(progress))

        num_bytes = self._num_bytes(with_state=not self.args.save_only_model)
        failure = self._write(staged, write, lambda: replace_folder(staged, run_dir / name), num_bytes)
        if failure is not None:
            self.state.best_model_checkpoint = best
            message = f"`{name}` could not be written: {failure} The run is at step {self.state.global_step}."
            if self.args.on_failed_save == "continue":
                logger.error("%s It goes on, and tries again at the next save.", message)
                return
            weights = self._save_weights(run_dir)
            self._saved_step = None  # not to be tried again on the way out
            raise OSError(
                f"{message} {weights} Make room and go on from the last whole checkpoint with "
                "`resume_from_checkpoint=True`; `on_failed_save='continue'` would have gone on without this one."
            ) from failure.__cause__
        self._saved_step, self._saved_in = self.state.global_step, run_dir / name
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            delete_oldest(run_dir, self.args.save_total_limit, run_dir / name, self.state.best_model_checkpoint)

    def _copy_to_output_dir(self, folder):
        """What a checkpoint has of a model: a copy, since the checkpoint may be deleted while it is on its way."""
        output_dir = Path(self.args.output_dir)
        staged = output_dir / STAGING / "push"
        remove(staged)
        staged.mkdir(parents=True)
        try:
            for path in folder.iterdir():
                if path.is_file() and not any(fnmatch(path.name, pattern) for pattern in TRAINING_STATE):
                    shutil.copy(path, staged)
            flush_tree(staged)
            replace_files(staged, output_dir)
        finally:
            remove(staged)

    def save_model(self, output_dir=None, _internal_call=False):
        """
        Saves the model, see [`~transformers.Trainer.save_model`]; a file is replaced when all of them are written.

        Raises:
            OSError: it failed; what was in the folder before is still there.
        """
        if self._staged is not None:
            super().save_model(output_dir, _internal_call=True)
            return
        self.save_whole_model(self.args.output_dir if output_dir is None else output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_whole_model(self, output_dir):
        """
        Saves the model as `from_pretrained` takes it, whatever engine has the weights.

        Args:
            output_dir (`str`): where to. Of a sharded model all processes have to call this.

        Raises:
            OSError: it failed; what was in the folder before is still there.
        """
        folder, write = Path(output_dir), super().save_whole_model
        staged = folder / STAGING / "model"
        self._alone = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        try:
            if self._alone and not self.args.should_save:
                write(str(folder))  # has nothing to write, but may have to take part
                return
            failure = self._write(
                staged, lambda: write(str(staged)), lambda: replace_files(staged, folder), self._num_bytes()
            )
        finally:
            self._alone = False
        if failure is not None:
            kept = (
                f" `{PREFIX_CHECKPOINT_DIR}-{self._saved_step}` has the last weights saved."
                if self._saved_step
                else ""
            )
            half = [folder / STAGING / name for name in (WRITTEN, MOVING) if (folder / STAGING / name).is_dir()]
            there = (
                f"Files that are in their place no longer or not yet are in `{half[0]}`; the next save moves them."
                if half
                else "What was there before is as it was."
            )
            raise OSError(
                f"The model could not be saved in `{folder}`: {failure} {there}{kept}"
            ) from failure.__cause__

    def _save_weights(self, run_dir):
        """The model without what it takes to go on, which may still fit; says where it is."""
        folder = run_dir / f"weights-{self.state.global_step}"
        try:
            self.save_model(str(folder), _internal_call=True)
        except OSError as error:
            remove(folder / STAGING)  # and the folder, which has nothing else
            return f"Nor could the weights alone: {error}"
        return f"The weights alone are in `{folder}`."

    def _write(self, staged, write, move, num_bytes):
        """
        Calls what writes a folder, on all processes, and then what moves it to its place, in turn.

        Returns:
            `OSError`: why it failed on any of them, after what was written is removed; `None` if it did not.
        """
        failure = None
        try:
            shutil.rmtree(staged, ignore_errors=True)
            staged.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(staged.parent).free < num_bytes:
                failure = OSError("No space left on device")
        except OSError as error:
            failure = error
        failure = self._shared_failure(failure)
        if failure is None:
            self._staged = staged.parent
            try:
                write()
                if self.args.local_process_index == 0 and staged.is_dir():
                    flush_tree(staged)
            except Exception as error:  # torch and safetensors raise their own where the disk is full
                if self.args.world_size > 1 and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
                    raise  # the others wait inside the engine, where nobody can reach them
                failure = error
            finally:
                self._staged = None
            failure = self._shared_failure(failure)
        if failure is None:
            failure = self._in_turn(staged, move)
        place = next(path for path in staged.parents[1:] if path.is_dir())
        free = shutil.disk_usage(place).free
        if self.args.local_process_index == 0:
            remove(staged)
        if not self._alone:
            self.accelerator.wait_for_everyone()
        if failure is None:
            return None
        explained = OSError(
            f"{' '.join(str(failure).split())[:300]}. It needs at least {num_bytes / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are "
            f"free at `{place}`."
        )
        explained.__cause__ = failure
        return explained

    def _in_turn(self, staged, move):
        """
        The first process moves what is staged; where nodes share no disk, the first of each other node does, too.

        Returns:
            `OSError`: why it failed on any of them; `None` if it did not.
        """
        is_first = self._alone or self.is_world_process_zero()
        failure = self._shared_failure(_error_of(move) if is_first and staged.is_dir() else None)
        if self._alone or failure is not None:
            return failure
        is_mine = self.args.local_process_index == 0 and not is_first and staged.is_dir()
        return self._shared_failure(_error_of(move) if is_mine else None)

    def _load_best_model(self):
        super()._load_best_model()
        self._saved_step = None  # the optimizer's state does not belong to these weights: no checkpoint any more
        self._loaded_step = self.state.best_global_step
        for entry in self.state.log_history:  # the card shows what these weights did
            if entry["step"] == self._loaded_step:
                self._note_evaluation(entry, entry["step"])

    def _num_bytes(self, with_state=False):
        """What the weights take on the disk, and the state of the optimizer where each process has all of it; at least."""
        adapter_only = isinstance(self.model, PeftModel)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            size = next(self.model.parameters()).element_size()
            return size * get_model_param_count(self.model, trainable_only=adapter_only)
        saved = [weight for weight in self.model.parameters() if weight.requires_grad or not adapter_only]
        if with_state:
            saved += [
                value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
            ]
        return sum(value.numel() * value.element_size() for value in saved)

    def _shared_failure(self, error):
        """The error of this process, or one that tells another's; the same on all: `None` if none had any."""
        if self._alone or self.args.world_size == 1:
            return error
        flag = torch.tensor([float(error is not None)], device=self.accelerator.device)
        torch.distributed.all_reduce(flag)
        if not flag.item():
            return None
        found = [None] * self.args.world_size
        torch.distributed.all_gather_object(found, None if error is None else f"{type(error).__name__}: {error}")
        told = [f"process {index}: {text}" for index, text in enumerate(found) if text is not None]
        return RuntimeError("; ".join(told)) if error is None else error


def _error_of(move):
    try:
        move()
    except OSError as error:
        return error
    return None
