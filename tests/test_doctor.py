"""The ten lines of `python -m trainer.doctor`, in processes with planted faults."""

import ast
import os
import stat
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from trainer import doctor


pytestmark = pytest.mark.any_release
ROOT = Path(__file__).resolve().parents[1]
STARTS = (
    "amvl-transformers ",
    "core: ",
    "optional: ",
    "devices: ",
    "torch build: ",
    "attention: ",
    "compilers: ",
    "disk: ",
)
STARTS += ("a run would use: ", "wrong")


def examine(cwd, *paths, python=sys.executable, **environment):
    """Exit code and lines of the command as a person runs it."""
    unset = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "PYTHONPATH")
    given = {name: value for name, value in os.environ.items() if name not in unset}
    given |= {"PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT]))} | environment
    words = [python, "-m", "trainer.doctor"]
    done = subprocess.run(words, cwd=cwd, env=given, capture_output=True, text=True, timeout=600)
    assert done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10 and all(line.startswith(start) for line, start in zip(lines, STARTS)), lines
    assert (done.returncode, lines[-1] == "wrong: nothing found") in ((0, True), (1, False))
    return done.returncode, lines


def plant(folder, name, version, *requires):
    """An installation's metadata."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def script(path, text="#!/bin/sh\nexit 0\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.slow
def test_here_every_line_says_something_and_what_is_wrong_is_of_this_machine(tmp_path):
    _, lines = examine(tmp_path)
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
        assert f"{name} {doctor.importlib.metadata.version(name)}" in lines[1]
    assert "not known" not in "".join(lines) and "AMVLSFTTrainer on " in lines[8] and "multipass=auto" in lines[8]
    for fault in ("cannot be used", "fails at import", "not among the tested", "installed 2 times", "is missing"):
        assert fault not in lines[9]
    assert str(tmp_path) not in "".join(lines) and str(ROOT) not in "".join(lines)


def test_with_nothing_installed_it_says_what_to_install(tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    code, lines = examine(tmp_path, python=python)
    assert code == 1
    for name, remedy in (
        ("torch", "torch>=2.6"),
        ("transformers", "transformers>=5.23,<5.25"),
        ("trl", "trl>=1.16,<1.17"),
    ):
        assert f"`{name}` is missing: `pip install '{remedy}'`" in lines[9]
    assert "torch missing" in lines[1] and "torch cannot be used: ModuleNotFoundError" in lines[9]
    assert "this package cannot be used" in lines[9] and "torch cannot be imported" in lines[4]


def test_planted_faults_are_named_with_their_remedies_and_nobody_is(tmp_path):
    planted, home, tools = tmp_path / "planted", tmp_path / "homes" / "jonquil", tmp_path / "tools"
    home.mkdir(parents=True)
    plant(planted, "transformers", "4.57.6")
    plant(planted, "torchvision", "0.20.0", "numpy", "torch==2.5.0")
    secret = "not-to-be-shown-1234"
    for name in ("torch", "torchvision", "deepspeed"):
        (planted / name).mkdir()
    (planted / "torch" / "__init__.py").write_text(
        f"raise OSError('{home}/venv/lib/libtorch.so: undefined symbol, for jonquil with {secret} and hf_{'a' * 34}')"
    )
    (planted / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    (planted / "deepspeed" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    (planted / "flash_attn.py").write_text("print('chatter')\nimport sys\nsys.exit('no kernel image')")
    script(tools / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    code, lines = examine(
        *(tmp_path, planted),
        PATH=str(tools),
        HOME=str(home),
        USER="jonquil",
        LOGNAME="jonquil",
        MY_SECRET=secret,
        HF_HUB_OFFLINE="1",
    )
    assert code == 1
    told = lines[9]
    assert "`transformers` 4.57.6 is not among the tested versions: `pip install 'transformers>=5.23,<5.25'`" in told
    assert "`transformers` is installed 2 times (4.57.6, " in told
    assert "`torchvision` 0.20.0 was built for torch 2.5.0, found 2." in told
    assert (
        "`torchvision` is installed and fails at import: RuntimeError: operator torchvision::nms does not exist"
        in told
    )
    assert "`flash-attn` is installed and fails at import: no kernel image" in told
    assert "`deepspeed` is installed and fails at import: its process was ended by signal 11" in told
    assert "torch cannot be used: OSError: .../libtorch.so: undefined symbol" in told and "<token>" in told
    assert "`deepspeed` cannot compile its operators" in told and "without C++" in told
    assert "`HF_HUB_OFFLINE` is set, so that nothing is downloaded" in told and "Hub: offline" in lines[7]
    assert "flash-attn (no metadata)" in lines[2] and "nvidia-smi answers" not in lines[3]
    whole = "\n".join(lines)
    for private in ("jonquil", secret, "hf_a", str(tmp_path), str(ROOT), "chatter"):
        assert private not in whole


def test_a_gpu_that_torch_was_not_built_for_and_a_second_torch(tmp_path):
    plant(tmp_path / "planted", "torch", "2.6.0+cu124")
    for name in (
        "transformers",
        "deepspeed",
        "bitsandbytes",
        "sklearn",
        "skimage",
        "tensorboard",
    ):  # not to wait for them
        (tmp_path / "planted" / f"{name}.py").write_text("raise ImportError('planted')")
    script(tmp_path / "tools" / "nvidia-smi")
    path = os.pathsep.join([str(tmp_path / "tools"), os.environ["PATH"]])
    code, lines = examine(tmp_path, tmp_path / "planted", PATH=path)
    import torch

    expected = "torch finds no GPU, but nvidia-smi does"
    if torch.version.cuda is None:
        expected = f"this machine has an NVIDIA GPU, but torch {torch.__version__} is a build for the CPU: install one for CUDA"
    assert code == 1 and expected in lines[9] and "nvidia-smi answers" in lines[3]
    assert "`torch` is installed 2 times (2.6.0+cu124, " in lines[9]
    assert f"`torch` is {torch.__version__} when imported, but installed as 2.6.0+cu124" in lines[9]
    assert "transformers cannot be used: ImportError: planted" in lines[9]


@pytest.mark.parametrize(
    ("version", "specifiers", "expected"),
    [
        ("5.23.0", ">=5.23,<5.25", True),
        ("5.24.7.post1", ">=5.23,<5.25", True),
        ("5.25.0.dev0", ">=5.23,<5.25", False),
        ("5.22.2", ">=5.23,<5.25", False),
        ("2.13.0+cpu", ">=2.6", True),
        ("2.6", ">=2.6.0", True),
        ("12.0", "<12", False),
        ("1.2", "==1.2.0", True),
        ("anything", "", True),
    ],
)
def test_a_version_is_held_against_a_range(version, specifiers, expected):
    assert doctor.is_within(version, specifiers) is expected


def test_every_requirement_of_the_metadata_is_read():
    core, extras = doctor.requirements()
    assert core["transformers"] == ">=5.23,<5.25" and core["torch"] == ">=2.6" and "matplotlib" in core
    assert {"scikit-learn", "deepspeed", "bitsandbytes", "lmms-eval"} <= extras.keys() and doctor.PROJECT not in extras
    lines = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={".".join(map(str, doctor.PYTHON))}"' in lines


def test_a_lock_that_a_killed_process_left_on_an_extension_is_named(tmp_path, monkeypatch):
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert doctor.lock_faults() == []
    lock.touch()
    assert doctor.lock_faults() == []  # somebody compiles
    os.utime(lock, (0, 0))
    (fault,) = doctor.lock_faults()
    assert fault.startswith("`deepspeed_shm_comm`") and "delete the file `lock`" in fault


def test_a_full_disk_is_wrong(monkeypatch):
    assert doctor.disk_space()[1] == []
    monkeypatch.setattr(doctor, "LEAST_FREE", 2**80)
    assert len(doctor.disk_space()[1]) == 3 and "is a full disk: make room" in doctor.disk_space()[1][0]


def test_a_gpu_without_bf16_and_a_driver_that_is_too_old():
    torch = {"is_for_gpu": True, "accelerators": ["T4"], "has_bf16": False, "version": "2.13.0"}
    assert "set `bf16=False`" in doctor.device_faults(torch, True)[0]
    assert "`CUDA_VISIBLE_DEVICES`" in doctor.device_faults({**torch, "accelerators": []}, True)[0]
    assert doctor.device_faults({**torch, "has_bf16": True}, True) == []


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("`/a/b/c.so`: and/or 3/4", "`.../c.so`: and/or 3/4"),
        ("open '/srv/a b/jo/z y.py' and `/srv/a b`", "open '.../z y.py' and `.../a b`"),
        ("see https://example.com/x/y", "see https://example.com/x/y"),
        ("https://me:pw@host.org/x", "https://host.org/x"),
        ("~/me/key.pem, 'C:\\Users\\me\\x.dll'", ".../key.pem, '.../x.dll'"),
    ],
)
def test_paths_lose_their_folders_and_sentences_stay(told, expected):
    assert doctor.anonymous(told) == expected


def test_it_parses_with_a_python_that_is_too_old_to_run_the_rest():
    for path in (ROOT / "trainer" / "doctor.py", ROOT / "trainer" / "__init__.py"):
        ast.parse(path.read_text(), feature_version=(3, 8))


def test_names_of_the_package_are_imported_when_asked_for():
    code = (
        "import sys, trainer; assert 'torch' not in sys.modules and 'AMVLSFTTrainer' in dir(trainer); trainer.nothing"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "AttributeError: module `trainer` has no attribute `nothing`" in done.stderr
    from trainer import AMVLDataCollator, AMVLSFTConfig, AMVLSFTTrainer

    names = [part.__name__ for part in (AMVLDataCollator, AMVLSFTConfig, AMVLSFTTrainer)]
    assert names == ["AMVLDataCollator", "AMVLSFTConfig", "AMVLSFTTrainer"]


def test_the_form_for_bugs_asks_for_the_ten_lines():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    assert "python -m trainer.doctor" in form["body"][0]["attributes"]["label"]
