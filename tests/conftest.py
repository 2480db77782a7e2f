"""Every test runs offline, on CPU, with fixed seeds, in folders of its own worker; subprocesses inherit all of it."""

import logging
import os
import random
import re
import shutil
import tempfile
from pathlib import Path


# Before anything of Hugging Face or torch is imported: both read these variables at import.
SCRATCH = Path(tempfile.mkdtemp(prefix=f"amvl-tests-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-"))
for variable in ("HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
    os.environ.pop(variable, None)
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=str(SCRATCH / "hf_home"),
    HF_MODULES_CACHE=str(SCRATCH / "hf_modules"),
    HF_HUB_DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
    WANDB_MODE="disabled",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    # DeepSpeed compiles into it; in the home folder a run that was killed meanwhile leaves a lock there, for which all others wait.
    TORCH_EXTENSIONS_DIR=str(SCRATCH / "torch_extensions"),
    OMP_NUM_THREADS="1",  # one thread per worker: `-n 2` fills two cores
)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tolerances are those of a CPU; set it to test on a GPU

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


class TransformersDeprecationError(Exception):
    """transformers logged that something in use is deprecated."""


class DeprecationHandler(logging.Handler):
    """Turns the deprecations that transformers logs (it rarely uses `warnings`) into errors at the line that logs."""

    PATTERN = re.compile(r"deprecat|will be removed in", re.IGNORECASE)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.WARNING and self.PATTERN.search(message):
            raise TransformersDeprecationError(message)


@pytest.fixture(autouse=True)
def transformers_deprecations_are_errors():
    handler = DeprecationHandler()
    loggers = [logging.getLogger(name) for name in ("transformers", "transformers_modules")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def seeds():
    """The same random numbers whichever tests ran before in this worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_unconfigure():
    shutil.rmtree(SCRATCH, ignore_errors=True)
