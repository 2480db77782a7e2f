"""The rules that hold the repository together, checked on its syntax trees and texts.

Each rule is a function from a source to a list of complaints, shown here to complain about a bad source before it is
asked about ours.
"""

import ast
import logging
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version


ROOT = Path(__file__).resolve().parents[1]

# Imports run one way: what each package may import, absolutely, of this repository.
PACKAGES = {
    "modeling_amvl": set(),
    "model_cards": set(),
    "trainer": {"modeling_amvl", "model_cards"},
    "recipes": {"modeling_amvl", "model_cards", "trainer"},
}
REMOTE_CODE_LIBRARIES = {"torch", "transformers"} | set(sys.stdlib_module_names)


def imports(tree: ast.AST) -> list[tuple[ast.Import | ast.ImportFrom, int, str]]:
    """Returns (node, level, module) of every import, also those inside functions; level 0 is absolute."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, 0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node, node.level, node.module or ""))
    return found


def layering_complaints(path: Path, source: str) -> list[str]:
    """Checks the direction of imports, relative inside a package and absolute across; `path` is from the root."""
    package, complaints = path.parts[0], []
    for node, level, module in imports(ast.parse(source)):
        top = module.split(".")[0]
        if level >= len(path.parts):
            complaints.append(f"{path}:{node.lineno}: a relative import leaves `{package}`")
        elif level == 0 and top == package:
            complaints.append(f"{path}:{node.lineno}: import of `{module}` inside `{package}` must be relative")
        elif level == 0 and top in {*PACKAGES, "tests"} - PACKAGES[package]:
            complaints.append(f"{path}:{node.lineno}: `{package}` must not import `{module}`")
    return complaints


def remote_code_complaints(path: Path, source: str, siblings: set[str]) -> list[str]:
    """Checks what transformers 5.23 can copy and check when it saves `path` as remote code.

    It finds imports by regular expressions: only `from .x import y` at the start of a line is followed, any line that
    looks like a relative import counts, also in a docstring, and every absolute import must be installed by the user.
    """
    complaints, lines = [], set()
    for node, level, module in imports(ast.parse(source)):
        lines.add(node.lineno)
        where = f"{path}:{node.lineno}:"
        if level == 0 and module.split(".")[0] not in REMOTE_CODE_LIBRARIES:
            complaints.append(f"{where} remote code must not import `{module}`")
        elif level == 1 and module not in siblings:
            complaints.append(f"{where} `from .{module} import` names no file of this folder")
        elif level > 1:
            complaints.append(f"{where} remote code is one flat folder")
        if level and node.col_offset:
            complaints.append(f"{where} a relative import must stand at the start of a line")
    for number, line in enumerate(source.splitlines(), start=1):
        if re.match(r"\s*(from|import)\s+\.", line) and number not in lines:
            complaints.append(f"{path}:{number}: transformers takes this line for a relative import")
    return complaints


# In pieces, so that this file keeps its own rule.
REGISTRIES = [
    ".".join(parts)
    for parts in [
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("pytorch", "org/whl"),
        ("debian", "org"),
        ("anaconda", "org"),
    ]
]
MACHINE_PATH = re.compile(r"(?<![\w.~/<>{}$-])/(?:work|home|root|opt|mnt|Users)(?![\w-])")
INDEX_OPTION = re.compile("--" + r"(?:extra-)?(?:index-url|find-links)\b")


def text_complaints(path: Path, text: str) -> list[str]:
    """Checks that nothing names the machine it was written on or a package registry."""
    complaints = []
    for number, line in enumerate(text.splitlines(), start=1):
        for registry in REGISTRIES:
            if registry in line:
                complaints.append(f"{path}:{number}: names the package registry {registry}")
        for pattern in (MACHINE_PATH, INDEX_OPTION):
            if match := pattern.search(line):
                complaints.append(f"{path}:{number}: `{match[0]}` belongs to one machine")
    return complaints


def python_files(package: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py"))


def test_imports_run_one_way():
    files = [path for package in PACKAGES for path in python_files(package)]
    assert {"modeling_amvl", "trainer", "recipes"} <= {path.parts[0] for path in files}
    assert [complaint for path in files for complaint in layering_complaints(path, (ROOT / path).read_text())] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("modeling_amvl/x.py", "from trainer.objective import loss"),
        ("modeling_amvl/x.py", "def f():\n    import recipes.sft_amvl"),
        ("modeling_amvl/x.py", "from modeling_amvl.latents_amvl import sample"),
        ("modeling_amvl/x.py", "from ..trainer import objective"),
        ("model_cards/x.py", "import modeling_amvl"),
        ("trainer/x.py", "import torch, recipes"),
        ("trainer/data/x.py", "from trainer.collator import collate"),
        ("trainer/data/x.py", "from ...recipes import sft_amvl"),
        ("recipes/x.py", "from tests.reference import three_forwards"),
    ],
)
def test_the_layering_rule_complains(path, source):
    assert len(layering_complaints(Path(path), source)) == 1


def test_the_layering_rule_lets_good_imports_pass():
    assert (
        layering_complaints(Path("trainer/data/x.py"), "import torch\nfrom ..collator import a\nfrom . import b") == []
    )
    assert layering_complaints(Path("recipes/x.py"), "from trainer import a\nfrom modeling_amvl import b") == []


def test_remote_code_is_a_flat_folder_of_torch_and_transformers():
    files = [path for path in python_files("modeling_amvl") if path.name != "__init__.py"]
    assert files and all(len(path.parts) == 2 for path in files)
    siblings = {path.stem for path in files}
    complaints = [
        complaint for path in files for complaint in remote_code_complaints(path, (ROOT / path).read_text(), siblings)
    ]
    assert complaints == []


@pytest.mark.parametrize(
    "source",
    [
        "import peft",
        "def f():\n    from numpy import array",
        "from . import latents_amvl",
        "from .absent import sample",
        "from ..trainer import objective",
        "if True:\n    from .latents_amvl import sample",
        '"""Use it like this:\n\n    from .latents_amvl import sample\n"""',
    ],
)
def test_the_remote_code_rule_complains(source):
    assert len(remote_code_complaints(Path("modeling_amvl/x.py"), source, {"latents_amvl"})) == 1


def test_the_remote_code_rule_lets_good_imports_pass():
    source = "import math\nimport torch\nfrom transformers import Cache\nfrom .latents_amvl import (\n    sample,\n)"
    assert remote_code_complaints(Path("modeling_amvl/x.py"), source, {"latents_amvl"}) == []


def tracked_texts() -> dict[Path, str]:
    """Returns every text file that is under version control or would be after `git add --all`."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    texts = {}
    for name in filter(None, listing.stdout.split("\0")):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in data:
            texts[Path(name)] = data.decode()
    return texts


def test_no_file_names_this_machine_or_a_package_registry():
    texts = tracked_texts()
    assert {Path("pyproject.toml"), Path("constraints.txt"), Path("tests/test_layering.py")} <= texts.keys()
    assert [complaint for path, text in texts.items() for complaint in text_complaints(path, text)] == []


@pytest.mark.parametrize(
    "line",
    [
        "see https://" + REGISTRIES[0] + "/project/x",
        'open("' + "/" + 'work/main/x.py")',
        "cache: " + "/" + "home/someone",
        "#!" + "/" + "root",
        "pip install --" + "find-links wheels x",
    ],
)
def test_the_text_rule_complains(line):
    assert len(text_complaints(Path("x"), f"fine\n{line}\n")) == 1


def test_the_text_rule_lets_relative_paths_and_addresses_pass():
    assert (
        text_complaints(Path("x"), "~/work ./home/x https://example.com/home network/root and/or\n#!/bin/bash") == []
    )


def transformers_range(configuration_source: str) -> SpecifierSet:
    """Returns the range that the version guard of the remote code admits."""
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(configuration_source).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    return SpecifierSet(f">={constants['TRANSFORMERS_FLOOR']},<{constants['TRANSFORMERS_CEILING']}")


def bounds(specifiers: SpecifierSet) -> set[tuple[str, Version]]:
    return {(specifier.operator, Version(specifier.version)) for specifier in specifiers}


def requirements() -> dict[str, Requirement]:
    """Returns the direct dependencies by name, those of the extras too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    parsed = [Requirement(line) for line in lines]
    return {requirement.name: requirement for requirement in parsed if requirement.name != project["name"]}


def test_the_version_guard_is_the_range_of_the_package_metadata():
    guard = transformers_range((ROOT / "modeling_amvl" / "configuration_amvl.py").read_text())
    assert bounds(guard) == bounds(requirements()["transformers"].specifier)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("transformers.generation.GenerationMixin", "_prefill"),
        ("transformers.generation.GenerationMixin", "_update_model_kwargs_for_generation"),
        ("transformers.modeling_layers.GradientCheckpointingLayer", "_can_checkpoint_with_cache"),
        ("torch._C", "_current_graph_task_id"),
    ],
)
def test_a_release_without_a_private_name_is_refused_at_import_by_that_name(owner, name):
    module, attribute = owner.rsplit(".", 1)
    code = f"from {module} import {attribute} as owner; delattr(owner, {name!r}); import modeling_amvl"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode != 0
    assert f"ImportError: This release of {owner.split('.')[0]} has no `" in finished.stderr
    assert f"{attribute}.{name}`" in finished.stderr


@pytest.mark.parametrize("version", ["5.22.2", "5.25.0", "4.57.6"])
def test_a_release_outside_the_range_is_refused_at_import_with_the_range(version):
    # As an old release would, without a name that the package imports.
    code = (
        "import sys, transformers.configuration_utils; del transformers.configuration_utils.SubConfigSpec\n"
        f"sys.modules['transformers'].__version__ = {version!r}\nimport modeling_amvl"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode != 0
    message = f"AMVL was tested with `transformers>=5.23.0,<5.25.0`, found {version}: run `pip install"
    assert f"ImportError: {message}" in finished.stderr


def test_ci_tests_the_latest_release_of_the_range_and_the_constraints_the_first():
    minors = [
        version.release[:2]
        for version in map(Version, re.findall(r"transformers==(\d[\d.]+)", (ROOT / ".ci" / "run").read_text()))
    ]
    guard = bounds(transformers_range((ROOT / "modeling_amvl" / "configuration_amvl.py").read_text()))
    ceiling = next(version for operator, version in guard if operator == "<")
    assert minors == [(ceiling.major, ceiling.minor - 1)]
    (pinned,) = re.findall(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert (">=", Version(pinned)) in guard


def test_the_version_guard_is_read_from_its_source():
    guard = transformers_range('X = 1\nTRANSFORMERS_FLOOR = "5.1.0"\nTRANSFORMERS_CEILING = "5.2"\n')
    assert bounds(guard) == bounds(SpecifierSet(">=5.1,<5.2.0")) != bounds(SpecifierSet(">=5.1,<5.3"))


def test_the_constraints_pin_each_direct_dependency_within_its_range():
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line)
    assert pins.keys() == requirements().keys()
    assert [name for name, pin in pins.items() if not requirements()[name].specifier.contains(pin)] == []


@pytest.mark.parametrize("message", ["`x` is deprecated, use `y`", "x will be removed in v6"])
def test_a_deprecation_that_transformers_logs_is_an_error(message):
    with pytest.raises(Exception, match=re.escape(message)):
        logging.getLogger("transformers.models.any").warning(message)


@pytest.mark.parametrize("module", ["modeling_amvl.latents_amvl", "trainer", "transformers.trainer"])
@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_a_deprecation_warned_of_is_an_error(module, category):
    with pytest.raises(category):
        warnings.warn_explicit("old", category, "x.py", 1, module=module)


def test_other_messages_are_no_error():
    with pytest.warns(DeprecationWarning):
        warnings.warn_explicit("old", DeprecationWarning, "x.py", 1, module="numpy.trainer")
    logging.getLogger("transformers.models.any").warning("Setting `pad_token_id` to `eos_token_id`")
