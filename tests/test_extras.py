"""The extras of pyproject.toml: what stands here together fits together, and CI installs all of them but what is named."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement


pytestmark = pytest.mark.any_release
PROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Resolved by hand at the constraint versions, alone and with the others: heavy, or with a server of their own.
NOT_IN_CI = {"lmms-eval"}


def faults_of(lines, extra="", version=importlib.metadata.version, requires=importlib.metadata.requires):
    """What is missing or out of range among requirements and all that those require in turn."""
    faults, done, left = [], set(), [(PROJECT["name"], Requirement(line), extra) for line in lines]
    while left:
        asking, requirement, extra = left.pop()
        key = (requirement.name.lower(), str(requirement.specifier), frozenset(requirement.extras))
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if key in done:
            continue
        done.add(key)
        if requirement.name == PROJECT["name"]:
            left += [(asking, Requirement(line), "") for name in requirement.extras for line in EXTRAS[name]]
            continue
        try:
            found = version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            faults.append(f"{asking} needs {requirement}, which is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            faults.append(f"{asking} needs {requirement}, found {found}")
        for line in requires(requirement.name) or []:
            left += [(requirement.name, Requirement(line), each) for each in (requirement.extras or {""})]
    return faults


def test_what_is_installed_for_the_tests_fits_together():
    assert faults_of([*PROJECT["dependencies"], *EXTRAS["test"]]) == []


def test_a_fault_two_steps_away_would_be_noticed():
    versions, requires = {"a": "1.0", "b": "2.0"}, {"a": ["b<2", "c; extra == 'more'"], "b": []}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    assert faults_of(["a"], version=version, requires=requires.get) == ["a needs b<2, found 2.0"]
    faults = faults_of(["a[more]>1"], version=version, requires=requires.get)
    assert "amvl-transformers needs a[more]>1, found 1.0" in faults
    assert any(re.fullmatch(r"a needs c; extra == .more., which is missing", fault) for fault in faults)


def test_ci_installs_every_extra_but_those_named():
    def within(extra):
        inner = [Requirement(line) for line in EXTRAS[extra]]
        return {extra}.union(*(within(name) for line in inner if line.name == PROJECT["name"] for name in line.extras))

    packages = {Requirement(line).name for extra in within("test") for line in EXTRAS[extra]}
    left_out = {
        extra for extra, lines in EXTRAS.items() if {Requirement(line).name for line in lines} - packages - {"ruff"}
    }
    assert left_out - {"dev"} <= NOT_IN_CI and EXTRAS.keys() >= NOT_IN_CI
