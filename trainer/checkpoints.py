"""Checkpoints that are there as a whole or not at all: written aside, flushed, then renamed."""

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .resuming import PROGRESS_NAME, REPLACED, STAGING


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
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(run_dir / name)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                (staged / PROGRESS_NAME).write_text(json.dumps(progress))

        failure = self._write(staged, write, self._num_bytes(with_state=not self.args.save_only_model))
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
        self._in_turn(staged, lambda: replace_folder(staged, run_dir / name))
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

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
            failure = self._write(staged, lambda: write(str(staged)), self._num_bytes())
            if failure is None:
                self._in_turn(staged, lambda: replace_files(staged, folder))
        finally:
            self._alone = False
        if failure is not None:
            kept = (
                f" `{PREFIX_CHECKPOINT_DIR}-{self._saved_step}` has the last weights saved."
                if self._saved_step
                else ""
            )
            raise OSError(
                f"The model could not be saved in `{folder}`: {failure} What was there before is as it was.{kept}"
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

    def _write(self, staged, write, num_bytes):
        """
        Calls what writes a folder, on all processes.

        Returns:
            `OSError`: why it failed on any of them, after what was written is removed; `None` if it did not.
        """
        shutil.rmtree(staged, ignore_errors=True)
        staged.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(staged.parent).free
        failure = self._shared_failure(OSError("No space left on device") if free < num_bytes else None)
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
            return None
        free = shutil.disk_usage(staged.parent).free
        if self.args.local_process_index == 0:
            remove(staged)
        explained = OSError(
            f"{' '.join(str(failure).split())[:300]}. It needs at least {num_bytes / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are "
            f"free at `{staged.parent.parent}`."
        )
        explained.__cause__ = failure
        return explained

    def _in_turn(self, staged, move):
        """The first process moves what is staged; where nodes share no disk, the first of each other node does, too."""
        if (self._alone or self.is_world_process_zero()) and staged.is_dir():
            move()
        if self._alone:
            remove(staged)
            return
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0:
            if not self.is_world_process_zero() and staged.is_dir():
                with contextlib.suppress(FileNotFoundError):
                    move()
            remove(staged)
        self.accelerator.wait_for_everyone()

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


def flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder):
    """Puts files and their names on the disk, so that a power cut leaves none of them empty."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        flush(path)


def replace_folder(staged, final):
    """Renames a folder; one that has its name is moved aside first and deleted at last."""
    aside = staged.with_name(f"{REPLACED}{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        os.rename(final, aside)
    os.rename(staged, final)
    flush(final.parent)
    remove(aside)


def replace_files(staged, folder):
    """Moves files to where files of their names may be; weights in other pieces go."""
    files = [path.relative_to(staged) for path in staged.rglob("*") if path.is_file()]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / name, folder / name)
    if any(name.match("model*.safetensors") for name in files):
        for path in [*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors.index.json"]:
            if path.relative_to(folder) not in files:
                path.unlink(missing_ok=True)
        if Path("model.safetensors") not in files:
            (folder / "model.safetensors").unlink(missing_ok=True)
    flush(folder)


def remove(staged):
    """Deletes a staged folder, and the one around it if that was all."""
    shutil.rmtree(staged, ignore_errors=True)
    with contextlib.suppress(OSError):
        staged.parent.rmdir()
