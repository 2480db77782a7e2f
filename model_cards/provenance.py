"""Which weights, which code: what a figure is of, so that a card never shows another model's."""

import functools
import hashlib
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import snapshot_download


PACKAGE = "amvl-transformers"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model-*-of-*.safetensors", "pytorch_model*.bin")
BLOCKS, BLOCK_SIZE = 64, 2**16
SHA256 = re.compile(r"[0-9a-f]{64}")


def weights_fingerprint(name, revision=None):
    """
    What tells a model's weights from all others, wherever they lie.

    Args:
        name (`str` or `Path`): a folder, or the id of a repository whose weights were loaded and are in the cache.
        revision (`str`, *optional*): of the repository.

    Returns:
        `str` or `None`: the sha256 of the file, as the Hub shows it; of several files, that of `sha256sum`'s lines for them. `None`
        if no weights are there.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name), revision=revision, local_files_only=True))
        except (OSError, ValueError):  # not in the cache; no name of a repository
            return None
    hashes = {file.name: _sha256_of(file) for file in _weight_files(folder)}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())
    return hashlib.sha256(lines.encode()).hexdigest() if hashes else None


def _weight_files(folder):
    """An adapter's, where there is one: it is what was trained."""
    return next((files for pattern in WEIGHTS if (files := sorted(folder.glob(pattern)))), [])


def weights_sample(folder):
    """
    A hash of some blocks of the weights, quick enough for every save: another step changes nearly all of them.

    Args:
        folder (`str` or `Path`): of the checkpoint.

    Returns:
        `str` or `None`: `None` if no weights are there.
    """
    digest, files = hashlib.sha256(), _weight_files(Path(folder))
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for block in range(BLOCKS):
                file.seek(block * (size // BLOCKS))
                digest.update(file.read(BLOCK_SIZE))
    return digest.hexdigest()[:16] if files else None


def _sha256_of(path):
    target = path.resolve()
    if target.parent.name == "blobs" and SHA256.fullmatch(
        target.name
    ):  # the Hub's cache names what it has by its hash
        return target.name
    state = target.stat()
    return _hash_of(target, state.st_size, state.st_mtime_ns)


@functools.cache
def _hash_of(path, size, changed):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_other_weights(folder, fingerprint, what):
    """
    Refuses figures that were measured on other weights than those of a folder.

    Args:
        folder (`str` or `Path`): of the checkpoint.
        fingerprint (`str` or `None`): what [`weights_fingerprint`] gave where they were measured.
        what (`str`): how an error calls them.

    Raises:
        ValueError: other weights, or it is not known which.
    """
    here = weights_fingerprint(folder)
    if here is None:
        raise ValueError(f"`{folder}` has no weights, none of {list(WEIGHTS)}: name the folder of a saved model.")
    if fingerprint is None:
        raise ValueError(f"{what} does not say which weights it is of: measure again, with this release.")
    if fingerprint != here:
        raise ValueError(
            f"{what} is of the weights {fingerprint:.12}, but `{folder}` has {here:.12}, trained on since or another model: "
            "measure again."
        )


@functools.cache
def code_version(folder=Path(__file__).parents[1]):
    """
    The release of this project, and the commit where it runs from a checkout.

    Args:
        folder (`Path`): of its packages.

    Returns:
        `dict`: `version` and `commit`, each `None` where it is not known, and `uncommitted`, whether files differ from the commit.
    """
    try:
        found = {"version": version(PACKAGE)}
    except PackageNotFoundError:
        found = {"version": None}
    found |= {"commit": None, "uncommitted": False}
    top = _git(folder, "rev-parse", "--show-toplevel")
    if (
        top is not None and Path(top) == Path(folder).resolve()
    ):  # not a repository that an environment happens to lie in
        found["commit"] = _git(folder, "rev-parse", "HEAD")
        found["uncommitted"] = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    return found


def _git(folder, *words):
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
