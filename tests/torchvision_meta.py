"""Lets a fresh process run image processors that need torchvision, beside a torch that has no matching torchvision.

The registry's torchvision wheel holds CUDA operators: over a CPU build of torch its library does not load, and
importing it fails with "operator torchvision::nms does not exist". The image transforms need no operator, so the
missing ones are declared without an implementation. The wheel is unpacked into a folder of its own, never into the
environment, where a half-working torchvision would change what transformers imports everywhere. This can go when
torch's CPU build comes with a matching torchvision.

    folder = torchvision_meta.install(tmp_path_factory)  # in the test
    torchvision_meta.activate(folder)                    # in a fresh process, before transformers is imported
"""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path


VERSION = "0.28.0"  # the one built for torch 2.13
CACHE_VARIABLE = "AMVL_TORCHVISION_DIR"

_libraries = []  # a torch.library.Library withdraws its operators when it is collected


def install(tmp_path_factory) -> Path:
    """Unpacks the torchvision wheel once per test session, or once for all into the folder `$AMVL_TORCHVISION_DIR`.

    Args:
        tmp_path_factory (`pytest.TempPathFactory`): Whose base folder holds the wheel if the variable is not set.

    Returns:
        `Path`: The folder to give to `activate`. The test is skipped if pip cannot get the wheel.
    """
    import pytest
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the workers of one session share it
    cache = Path(os.environ.get(CACHE_VARIABLE) or base / "torchvision")
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"torchvision-{VERSION}"
    with FileLock(cache / "install.lock"):
        if not folder.exists():
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1"]
            command += [f"torchvision=={VERSION}", "--dest", str(cache)]
            pip = subprocess.run(command, capture_output=True, text=True)
            if pip.returncode:
                pytest.skip(f"pip cannot get the torchvision {VERSION} wheel: {pip.stderr.strip().splitlines()[-1]}")
            (wheel,) = cache.glob("torchvision-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(cache / "unpacked")
            (cache / "unpacked").rename(folder)  # last: a folder that exists is complete
            wheel.unlink()
    return folder


def activate(folder: str | Path) -> None:
    """Makes `import torchvision` work in this process, which must not have imported it or transformers yet.

    Args:
        folder (`str` or `Path`): What `install` returned.
    """
    early = {"torchvision", "transformers"} & set(sys.modules)
    if early:
        raise RuntimeError(f"`activate` must come before the import of {sorted(early)}.")
    import torch

    sys.path.insert(0, str(folder))
    package = Path(folder) / "torchvision"
    try:
        torch.ops.load_library(package / "_C.so")  # a torch of the same build: nothing to declare
    except OSError:
        source = (package / "_meta_registrations.py").read_text()
        library = torch.library.Library("torchvision", "DEF")
        for name in re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"\)', source):
            library.define(f"{name}(Tensor x) -> Tensor")
        _libraries.append(library)
    import torchvision

    if torchvision.__version__.split("+")[0] != VERSION:
        raise RuntimeError(f"torchvision {VERSION} was wanted, {torchvision.__version__} was imported.")
