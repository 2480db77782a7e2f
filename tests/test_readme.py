"""README.md is true: its loading example in a process without this repository, its file tree, the names it uses."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_process import NO_REPOSITORY
from tiny import build_tiny_backbone

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from trainer.data.color_steps import build_color_steps


REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SHOWN = ("modeling_amvl", "trainer", "recipes", "model_cards")


def example(name):
    """The code between `<!-- name -->` and `<!-- /name -->`."""
    (code,) = re.findall(rf"<!-- {name} -->\n```python\n(.*?)```\n<!-- /{name} -->", README, re.DOTALL)
    return code


# ---------------------------------------------------------------------------------------------------------------------
# The loading example
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as the README's reader has it: the checkpoint `amvl-demo`, a stock model, rows of the reader's own."""
    folder = tmp_path_factory.mktemp("readme")
    backbone, stock_processor = build_tiny_backbone(seed=0)
    backbone.generation_config.eos_token_id = None  # random models end at random
    backbone.save_pretrained(folder / "stock")
    stock_processor.save_pretrained(folder / "stock")
    processor = AMVLProcessor.from_backbone(stock_processor)
    model = AMVLForConditionalGeneration.from_backbone(
        backbone, num_latents=3, latent_size=8, latent_token_id=processor.latent_token_id
    )
    model.save_pretrained(folder / "amvl-demo")
    processor.save_pretrained(folder / "amvl-demo")
    rows = build_color_steps(4, image_size=48)
    rows[0]["images"][0].save(folder / "amvl-demo" / "example.png")
    (folder / "rows").mkdir()
    rows.select_columns(["images", "prompt", "completion"]).to_parquet(folder / "rows" / "train.parquet")
    return folder


def test_the_loading_example_answers_in_a_fresh_process_as_here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(example("load"), {})
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-c", NO_REPOSITORY + example("load")]
    fresh = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert fresh.returncode == 0, fresh.stderr[-4000:]
    assert fresh.stdout == here.getvalue() and len(fresh.stdout.strip()) > 8


# ---------------------------------------------------------------------------------------------------------------------
# The file tree
# ---------------------------------------------------------------------------------------------------------------------


def file_tree():
    """Paths of the tree in its order, and the comment of each."""
    (text,) = re.findall(r"## What is where\n\n```\n(.*?)```", README, re.DOTALL)
    paths, parents = {}, []
    for line in text.splitlines():
        indent, name, comment = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
        parents = [*parents[: len(indent) // 2], name]
        paths["".join(parents)] = comment
    return paths


def test_every_path_of_the_tree_exists():
    paths = file_tree()
    assert len(paths) > 15
    for path in paths:
        found = REPOSITORY / path
        assert found.is_dir() if path.endswith("/") else found.is_file(), path


def test_every_module_is_in_the_tree_or_its_folder_stands_for_it():
    paths = file_tree()
    folders = {path for path in paths if path.endswith("/")}
    whole = {path for path in folders if not any(other.startswith(path) and other != path for other in paths)}
    modules = [path.relative_to(REPOSITORY).as_posix() for name in SHOWN for path in (REPOSITORY / name).rglob("*.py")]
    assert len(modules) > 15
    unnamed = {
        path
        for path in modules
        if path not in paths and not path.endswith("__init__.py") and not any(path.startswith(name) for name in whole)
    }
    assert unnamed == set()
    tops = {f"{path.parent.name}/" for path in REPOSITORY.glob("*/__init__.py")} | {"recipes/", "tests/"}
    assert tops == {path for path in folders if path.count("/") == 1}


def test_every_line_of_the_tree_but_the_two_large_packages_has_a_comment():
    assert {path for path, comment in file_tree().items() if not comment} <= {"trainer/", "recipes/"}


# ---------------------------------------------------------------------------------------------------------------------
# The names
# ---------------------------------------------------------------------------------------------------------------------


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"(?<![\w/.-])(?:recipes|trainer|tests|modeling_amvl|model_cards|\.ci)/[\w./]*\w", README))
    named |= {"constraints.txt"} & set(re.findall(r"[\w.]+\.txt", README))
    assert {"recipes/sft_amvl.py", ".ci/run", "constraints.txt"} <= named
    assert {path for path in named if not (REPOSITORY / path).exists()} == set()


def test_every_argument_and_method_that_is_named_exists():
    for name in ("generate", "prior", "posterior", "log_prob"):
        assert f"model.{name}(" in README or f"`{name}`" in README
        assert callable(getattr(AMVLForConditionalGeneration, name))
    extras = set(re.findall(r'-e "\.\[(\w+)\]"', README))
    declared = (REPOSITORY / "pyproject.toml").read_text()
    assert extras == {"demo", "test", "dev"} and all(f"\n{extra} = [" in declared for extra in extras)
