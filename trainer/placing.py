"""Moves what is written aside to its place, so that a kill at any moment leaves the old or the new, or what to go on from."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .hub import WEIGHTS
from .resuming import REPLACED, STAGING, saved_at


# Folders in `_unfinished`: a whole model, and one of which files are moved already.
WRITTEN, MOVING = "written", "moving"


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
    try:
        os.rename(staged, final)
    except OSError:
        if aside.exists():
            os.rename(aside, final)
        raise
    flush(final.parent)
    remove(aside)


def replace_files(staged, folder):
    """Moves what is written as a whole to where files of its names may be; weights in other pieces go."""
    finish_replacing(folder)  # of a run that was killed
    os.rename(staged, folder / STAGING / WRITTEN)
    finish_replacing(folder)


def finish_replacing(folder):
    """Goes on with [`replace_files`] where it was, if it was begun: what was there goes first, then all files are moved."""
    written, moving = folder / STAGING / WRITTEN, folder / STAGING / MOVING
    for _ in range(2):  # one that is being moved is older
        if moving.is_dir():
            for path in [path for path in moving.rglob("*") if path.is_file()]:
                place = folder / path.relative_to(moving)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
            flush(folder)
            remove(moving)
        if written.is_dir():
            remove_other_weights(written, folder)
            os.rename(written, moving)


def remove_other_weights(written, folder):
    """Deletes what would be loaded in place of what is written, or pushed with it; not the base of an adapter."""
    files = [path.name for path in written.iterdir()]
    if "adapter_config.json" in files:
        base = json.loads((written / "adapter_config.json").read_text()).get("base_model_name_or_path")
        if base and Path(base).resolve() == folder.resolve():
            return
    elif not any(name.endswith(".safetensors") for name in files):
        return
    for pattern in WEIGHTS:
        for path in folder.glob(pattern):
            if path.name not in files:
                path.unlink(missing_ok=True)


def delete_oldest(run_dir, limit, newest, best):
    """Leaves `limit` checkpoints, with the newest and the best one among them; `None` or 0 leaves all."""
    kept = {str(newest), str(best)}
    others = [path for path in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and str(path) not in kept]
    num_left = max((limit or 0) - sum(map(os.path.isdir, kept)), 0)
    for path in sorted(others, key=saved_at)[: len(others) - num_left] if limit else ():
        shutil.rmtree(path, ignore_errors=True)


def remove(staged):
    """Deletes a staged folder, and the one around it if that was all."""
    shutil.rmtree(staged, ignore_errors=True)
    with contextlib.suppress(OSError):
        staged.parent.rmdir()
