"""How far a loop is and how long it will take: a bar on a terminal or in a notebook, whole lines where output is piped."""

import os
import sys
import time

from tqdm.asyncio import tqdm as terminal_bar
from tqdm.auto import tqdm as bar_here


SECONDS = 30.0  # between two lines


class Lines(terminal_bar):
    """A [`tqdm`] without control characters: a line every `SECONDS`, and one at the end, unless `leave=False` and none was due."""

    def __init__(self, *args, **kwargs):
        self._last_line = time.monotonic()
        self._told = False
        super().__init__(*args, **{**kwargs, "delay": 0, "mininterval": min(SECONDS, 1.0), "dynamic_ncols": False})

    def display(self, msg=None, pos=None):
        now = time.monotonic()
        if msg is None and now - self._last_line >= SECONDS:
            self._last_line = now
            self._tell()

    def clear(self, *args, **kwargs):
        """Lines are not taken back."""

    def close(self):
        if self.disable:
            return
        self.disable = True
        self._decr_instances(self)
        if self.leave or self._told:
            self._tell()

    def _tell(self):
        state = self.format_dict
        done, total, seconds = state["n"], state["total"], state["elapsed"]
        rate = (done - state["initial"]) / seconds if seconds else 0.0
        text = f"{done:,}" if total is None else f"{done:,}/{total:,} ({100 * done / total if total else 100:.0f}%)"
        text += f" after {self.format_interval(seconds)}"
        if not self.disable and total and rate:
            text += f", {self.format_interval((total - done) / rate)} left"
        words = [state["prefix"], text, f"({state['postfix']})" if state["postfix"] else ""]
        self.fp.write(" ".join(filter(None, words)) + "\n")
        self.fp.flush()
        self._told = True


def bar(*args, **kwargs):
    """
    A progress bar with time left, of the first process alone.

    Args:
        *args, **kwargs: of [`tqdm.tqdm`].

    Returns:
        `tqdm`: on a terminal and in a notebook the usual one; elsewhere (a file, a pipe, a job's log) [`Lines`].
    """
    if os.environ.get("RANK", "0") != "0":
        kwargs["disable"] = True
    in_notebook = bar_here is not terminal_bar
    is_terminal = (kwargs.get("file") or sys.stderr).isatty()
    return (bar_here if in_notebook or is_terminal else Lines)(*args, **kwargs)


def quiet_libraries():
    """Where output is piped, switches off the bars of transformers and datasets, which draw themselves over and over."""
    if sys.stderr.isatty():
        return
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
