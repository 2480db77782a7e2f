"""Which checkpoint a run goes on from: the last whole one, and only with settings under which it can go on."""

import contextlib
import json
import logging
import os
import struct
import zipfile
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME


logger = logging.getLogger(__name__)

STAGING = "_unfinished"  # folder beside the checkpoints; neither transformers nor a push looks into it
REPLACED = "replaced-"
PROGRESS_NAME = "progress.json"
TORCH_FILES = (".pt", ".pth", ".bin")
WEIGHTS = ("*.safetensors", "pytorch_model*", "latest")  # whole, FSDP's, DeepSpeed's
NEEDED = (
    (WEIGHTS, "weights"),
    (("optimizer*", "latest"), "state of the optimizer"),
    (("scheduler.pt", "latest"), "state of the schedule"),
    (("rng_state*",), "states of random generators"),
)


def resolve_checkpoint(asked, output_dir):
    """
    The checkpoint that `resume_from_checkpoint` names.

    Args:
        asked (`bool`, `str` or `Path`, *optional*): `True` or `"true"` for the last whole one of the newest run in `output_dir`;
            `"auto"` for that one, if there is any; or a folder.
        output_dir (`str` or `Path`): of the run.

    Returns:
        `str`: the folder; `None` to begin anew.

    Raises:
        ValueError: there is none, or the one named is not whole.
    """
    output_dir = Path(output_dir)
    put_back_replaced(output_dir)  # also where it is not asked for: a new run clears what is unfinished
    if str(asked).lower() in ("none", "false", ""):
        return None
    is_auto = str(asked).lower() == "auto"
    if str(asked).lower() != "true" and not is_auto:
        if not isinstance(asked, (str, os.PathLike)):
            raise ValueError(
                f"`resume_from_checkpoint` is {asked!r}: give a folder, or `true` for the last whole checkpoint of "
                f"`{output_dir}`."
            )
        asked = Path(asked).expanduser()
        if problem := what_is_wrong(asked):
            raise ValueError(
                f"`resume_from_checkpoint` is {str(asked)!r}, which cannot be resumed from: {problem}. Name another "
                f"checkpoint, or `true` for the last whole one of `{output_dir}`."
            )
        later = [path.name for path in numbered_checkpoints(asked.parent) if number_of(path) > number_of(asked)]
        if later:
            logger.warning(
                "`%s` is gone on from, and there are later ones beside it, which this run will replace: %s. As long as they are "
                "there, `resume_from_checkpoint=True` takes the last one of its run.",
                asked,
                later,
            )
        return str(asked)
    broken, whole = {}, []
    for checkpoint in sorted(numbered_checkpoints(output_dir), key=number_of):
        if problem := what_is_wrong(checkpoint):
            broken[checkpoint.name] = problem
        else:
            whole.append(checkpoint)
    if whole:
        for name, why in broken.items():
            logger.warning("`%s` is passed over, it is not whole: %s.", name, why)
        # The run that wrote last: one that was in this folder before may have come further.
        newest = run_of(max(whole, key=saved_at))
        return str(max((checkpoint for checkpoint in whole if run_of(checkpoint) == newest), key=number_of))
    written = [path.name for path in (output_dir / STAGING).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    found = [f"`{name}`: {why}" for name, why in broken.items()]
    found += [f"`{STAGING}/{name}`: it was being written when the run ended" for name in sorted(written)]
    there = f" There are unfinished ones ({'; '.join(found)})." if found else ""
    if is_auto:
        if there:
            logger.warning("`%s` has no whole checkpoint, so that the run begins anew.%s", output_dir, there)
        return None
    raise ValueError(
        f"`resume_from_checkpoint=True`, but `{output_dir}` has no whole checkpoint.{there} Leave it out, or set it to `auto`, to begin "
        "anew."
    )


def what_is_wrong(folder):
    """Why a folder is no whole checkpoint, as far as that shows without reading it all; `None` if it is one."""
    folder = Path(folder)
    if folder.is_file():
        return "it is a file, not a folder"
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"it has no `{TRAINER_STATE_NAME}`"
    for patterns, what in NEEDED:
        if not any(True for pattern in patterns for _ in folder.glob(pattern)):
            hint = "; to start from its weights alone, name it as the model" if what != "weights" else ""
            return f"it has no {what}{hint}"
    if any(folder.glob("model-*-of-*.safetensors")) and not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return f"it has no `{SAFE_WEIGHTS_INDEX_NAME}`"
    with contextlib.suppress(FileNotFoundError):
        tag = (folder / "latest").read_text().strip()  # DeepSpeed's
        if not tag or not any((folder / tag).glob("*.pt")):
            return f"it has nothing in `{tag}`, which `latest` names"
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (problem := _what_is_wrong_with(path)) is not None:
            return f"`{path.relative_to(folder)}` {problem}"
        if path.is_dir() and any(path.glob("*.distcp")) and not (path / ".metadata").is_file():
            return f"`{path.relative_to(folder)}` has no `.metadata`"
    num_processes = (read_progress(folder) or {}).get("num_processes") or 1  # of one, its file was found above
    states = [f"rng_state_{index}.pth" for index in range(num_processes)] if num_processes > 1 else []
    missing = [name for name in states if not (folder / name).is_file()]
    return f"it has no {missing}" if missing else None


def numbered_checkpoints(output_dir):
    return [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if number_of(path) >= 0]


def number_of(checkpoint):
    """`int`: the steps in the name of a checkpoint; -1 for another name."""
    prefix, _, number = Path(checkpoint).name.rpartition("-")
    return int(number) if prefix == PREFIX_CHECKPOINT_DIR and number.isdigit() else -1


def run_of(checkpoint):
    """`str`: which run a checkpoint is of; `None` for one of another trainer."""
    return (read_progress(checkpoint) or {}).get("run")


def _what_is_wrong_with(path):
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        with open(path, "rb") as file:
            start = file.read(8)
            try:
                length = struct.unpack("<Q", start)[0]
                header = json.loads(file.read(length)) if length <= size else {}
            except (struct.error, ValueError):
                return f"has no header in its {size} bytes"
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
        return None if size == needed else f"is cut: it has {size} of {needed} bytes"
    if path.suffix in TORCH_FILES and not zipfile.is_zipfile(path):  # whose directory comes last
        return f"is cut, its {size} bytes are no whole file of torch"
    if path.suffix == ".json" and path.stat().st_size < 2**24:
        try:
            content = json.loads(path.read_bytes())
        except ValueError:
            return "is cut: it is no JSON"
        if path.name.endswith(".safetensors.index.json"):
            missing = [
                name for name in sorted(set(content["weight_map"].values())) if not path.with_name(name).is_file()
            ]
            return f"names {missing}, which are not there" if missing else None
    return None


def put_back_replaced(output_dir):
    """A checkpoint moved aside for a newer one of its name, which never came: the process ended in between."""
    for aside in Path(output_dir, STAGING).glob(f"{REPLACED}*"):
        final = Path(output_dir, aside.name.removeprefix(REPLACED))
        if not final.exists():
            with contextlib.suppress(FileNotFoundError):  # another process was first
                os.rename(aside, final)


def read_progress(checkpoint):
    """What [`CheckpointMixin`] wrote down beside transformers' own state; `None` where there is nothing to read."""
    try:
        return json.loads(Path(checkpoint, PROGRESS_NAME).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):  # one that is cut is told by `what_is_wrong`
        return None


def read_step(checkpoint):
    """`int`: optimiser steps that a checkpoint has."""
    return json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())["global_step"]


def saved_at(checkpoint):
    """`float`: when a checkpoint was written, in seconds since 1970; of another trainer, when its folder was changed."""
    progress = read_progress(checkpoint) or {}
    return progress.get("saved_at", os.path.getmtime(checkpoint))


def compare_settings(before, now, checkpoint, ignore_data_skip=False):
    """
    Refuses to go on where weights would not fit, or rows be left out or seen twice; warns where the objective changes.

    Args:
        before, now (`dict[str, dict]`): settings by what they are of, as written down and as given.
        checkpoint (`str`): the folder.
        ignore_data_skip (`bool`, defaults to `False`): whether the data start anew.

    Raises:
        ValueError: naming each such setting with both values.
    """
    changed = {
        group: [
            f"`{name}` was {before[group][name]!r} and is {value!r} now"
            for name, value in now[group].items()
            if name in before.get(group, ()) and before[group][name] != value
        ]
        for group in now
    }
    refused = changed["model"] + ([] if ignore_data_skip else changed["data"])
    if refused:
        raise ValueError(
            f"`{checkpoint}` cannot be gone on from: {'; '.join(refused)}. Set it as it was, or start a new run from its "
            "weights by naming it as the model."
        )
    if changed["schedule"]:
        logger.warning(
            "`%s` goes on with other settings, and so not as the run that was cut: %s.",
            checkpoint,
            "; ".join(changed["schedule"]),
        )
    if changed["optimizer"]:
        logger.warning(
            "%s: `%s` brings its own along, so that the new value changes nothing.",
            "; ".join(changed["optimizer"]),
            checkpoint,
        )
