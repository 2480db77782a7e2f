"""A reader who runs what the guides show: reads a JSON list of blocks, runs each in this folder, and writes what came of it.

    python guide_reader.py blocks.json results.json

A block is `{"language": "python" or "bash", "code": str, "smaller": {script: [arguments]}}`; a result `{"printed": str, "error": str or
null}`. One process for all of them, since to import everything costs more than to run most. Python runs as it stands, each block in names
of its own. Of a shell only command lines are known that run one of this repository's scripts on one process; `smaller` has what is added
to a script's arguments, so that it takes seconds.
"""

import contextlib
import io
import json
import runpy
import shlex
import sys
import traceback
from pathlib import Path

from accelerate.commands.launch import launch_command_parser


def script_of(words):
    """The script or module that a command line runs, and its arguments."""
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        return launched.training_script, launched.training_script_args
    if words[:2] == ["python", "-m"]:
        return f"-m {words[2]}", words[3:]
    if words[0] == "python":
        return words[1], words[2:]
    raise ValueError(f"Who runs {words}?")


def run_command(line, smaller):
    script, arguments = script_of(shlex.split(line, comments=True))
    sys.argv = [script.removeprefix("-m "), *arguments, *smaller.get(script, [])]
    try:
        if script.startswith("-m "):
            runpy.run_module(script.removeprefix("-m "), run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise RuntimeError(f"`{line}` ended with {end.code}") from None


def run_block(block):
    if block["language"] == "python":
        exec(compile(block["code"], "guide", "exec"), {"__name__": "__main__"})
        return
    for line in block["code"].replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            run_command(line, block["smaller"])


def main(blocks, results):
    found = []
    for block in json.loads(Path(blocks).read_text()):
        printed, error = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            try:
                run_block(block)
            except BaseException:
                error = traceback.format_exc()
        found.append({"printed": printed.getvalue(), "error": error})
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
