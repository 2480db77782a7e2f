"""Says in ten lines, to be pasted into an issue, what is installed here, what a run would use, and what is wrong.

    python -m trainer.doctor

Ends with 1 where something is wrong. No names of users, folders or machines and no tokens are printed. It runs where the rest
of this package cannot be imported: by the standard library alone, and asking the libraries in processes of their own.
"""

import contextlib
import getpass
import importlib.machinery
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PROJECT = "amvl-transformers"
PYTHON = (3, 11)  # `requires-python` of pyproject.toml
# Names to import where they are not those to install.
MODULES = {
    "scikit-learn": "sklearn",
    "scikit-image": "skimage",
    "flash-attn": "flash_attn",
    "lmms-eval": "lmms_eval",
    "huggingface-hub": "huggingface_hub",
    "pillow": "PIL",
    "pyyaml": "yaml",
}
# What a run or its libraries import where it is installed, beside the extras of pyproject.toml.
OPTIONAL = ("torchvision", "flash-attn", "kernels", "tensorboard", "wandb", "trackio")
DEVELOPMENT = ("pytest", "pytest-xdist", "hypothesis", "ruff")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
LEAST_FREE = 2**30  # bytes: less is taken for a full disk
SECONDS = 300  # for an import; the first one on a network disk takes its time
SECONDS_TO_COMPILE = 600
OF_LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_",
    "ACCELERATE_",
    "TORCHELASTIC_",
)
MOST_CHARACTERS = 300  # of an error


def main():
    """
    Prints the ten lines.

    Returns:
        `int`: 1 where something is wrong, otherwise 0.
    """
    wrong = []
    if sys.version_info < PYTHON:
        wrong.append(f"Python {platform.python_version()} is too old: 3.11 or newer is needed")
    core, extras = requirements()
    installed = distributions([*core, *extras, *OPTIONAL, "torch"])
    wrong += version_faults(core, extras, installed)
    optional = [name for name in dict.fromkeys([*OPTIONAL, *extras]) if name not in (*core, *DEVELOPMENT)]
    present = [name for name in optional if name in installed or is_found(name)]
    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
        asked = pool.submit(ask, "from trainer.doctor import probe; probe()")
        imports = {name: pool.submit(ask, f"import {module_of(name)}") for name in present}
        facts, crash = asked.result()
        broken = {name: error for name, done in imports.items() if (error := done.result()[1])}
    wrong += [f"`{name}` is installed and fails at import: {error}" for name, error in broken.items()]
    wrong += probe_faults(facts, crash, installed)
    wrong += vision_fault(installed)
    has_nvidia = nvidia_answers()
    torch = facts.get("torch", {})
    wrong += device_faults(torch, has_nvidia)
    tools, tool_faults = compilers("deepspeed" in present, bool(torch.get("cuda")))
    wrong += tool_faults + lock_faults()
    disks, disk_faults = disk_space()
    wrong += disk_faults
    offline = [name for name in OFFLINE if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")]
    wrong += [f"`{name}` is set, so that nothing is downloaded: unset it, unless that is meant" for name in offline]

    versions = ", ".join(f"{name} {installed[name][0][0] if name in installed else 'missing'}" for name in core)
    shown = [f"{name} {installed[name][0][0]}" if name in installed else f"{name} (no metadata)" for name in present]
    absent = [name for name in optional if name not in present]
    lines = [
        f"{PROJECT} {own_version()}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"core: {versions}",
        f"optional: {', '.join(shown) or 'none'}; without {', '.join(absent) or 'none'}",
        f"devices: {devices(torch)}{', nvidia-smi answers' if has_nvidia else ''}",
        f"torch build: {torch.get('build', 'not known, since torch cannot be imported')}",
        f"attention: {facts.get('attention', 'not known, since transformers cannot be imported')}",
        f"compilers: {tools}",
        f"disk: {disks}; Hub: {'offline' if offline else 'online'}, {'with' if has_token() else 'no'} token",
        f"a run would use: {facts.get('run', 'nothing, since this package cannot be imported')}",
        f"wrong ({len(wrong)}): {'; '.join(wrong)}" if wrong else "wrong: nothing found",
    ]
    print("\n".join(anonymous(line) for line in lines))
    return 1 if wrong else 0


# ---------------------------------------------------------------------------------------------------------------------
# Versions
# ---------------------------------------------------------------------------------------------------------------------


def requirements():
    """`tuple[dict, dict]`: the ranges of the core and of the extras, by name; from pyproject.toml, or as installed."""
    core, extras = {}, {}
    path = ROOT / "pyproject.toml"
    if path.is_file() and sys.version_info >= PYTHON:
        import tomllib

        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        lines = [(core, line) for line in project["dependencies"]]
        lines += [(extras, line) for extra in project["optional-dependencies"].values() for line in extra]
    else:
        try:
            found = importlib.metadata.requires(PROJECT) or []
        except importlib.metadata.PackageNotFoundError:
            found = []
        lines = [(extras if "extra ==" in line else core, line) for line in found]
    for into, line in lines:
        name, specifiers = re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*([^;]*)", line).groups()
        if name != PROJECT:
            into[name.lower().replace("_", "-")] = specifiers.strip(" ()")
    return core, extras


def distributions(names):
    """`dict[str, list[tuple[str, str]]]`: version and place of each installation, in the order in which Python finds them."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name in names:
            entry = distribution.version, os.path.realpath(str(distribution.locate_file("")))
            if entry not in found.setdefault(name, []):
                found[name].append(entry)
    return found


def numbers(version):
    """`tuple[int]`: the release numbers that a version begins with."""
    return tuple(int(part) for part in re.match(r"(\d+(?:\.\d+)*)?", str(version)).group().split(".") if part)


def is_within(version, specifiers):
    """Whether a version lies in a range of `>=`, `<` and `==`."""
    for operator, bound in re.findall(r"(>=|<=|==|<|>)\s*([\w.]+)", specifiers):
        length = max(len(numbers(version)), len(numbers(bound)))
        got, limit = ((*numbers(text), *[0] * length)[:length] for text in (version, bound))
        if not {">=": got >= limit, "<=": got <= limit, "==": got == limit, "<": got < limit, ">": got > limit}[
            operator
        ]:
            return False
    return True


def version_faults(core, extras, installed):
    """`list[str]`: what is missing, out of the tested range, or there twice."""
    faults = []
    for name, specifiers in {**extras, **core}.items():
        if name not in installed:
            if name in core:
                faults.append(f"`{name}` is missing: `pip install '{name}{specifiers}'`")
        elif not is_within(installed[name][0][0], specifiers):
            faults.append(
                f"`{name}` {installed[name][0][0]} is not among the tested versions: `pip install '{name}{specifiers}'`"
            )
    for name, entries in installed.items():
        if len(entries) > 1:
            versions = ", ".join(version for version, _ in entries)
            faults.append(f"`{name}` is installed {len(entries)} times ({versions}): uninstall all but one")
    if not core:
        faults.append(f"`{PROJECT}` is not installed: `pip install -e .` in its folder")
    return faults


def vision_fault(installed):
    """`list[str]`: a torchvision that was built for another torch."""
    if "torchvision" not in installed or "torch" not in installed:
        return []
    torch = installed["torch"][0][0]
    for line in importlib.metadata.requires("torchvision") or []:
        match = re.match(r"torch\s*\(?==\s*([\w.]+)", line)
        if match and numbers(match[1]) != numbers(torch):
            version = installed["torchvision"][0][0]
            return [
                f"`torchvision` {version} was built for torch {match[1]}, found {torch}: install the one for it, or none"
            ]
    return []


def own_version():
    try:
        version = importlib.metadata.version(PROJECT)
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    if (ROOT / ".git").exists() and shutil.which("git"):
        words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode == 0:
            version += f" at commit {done.stdout.strip()}"
    return version


# ---------------------------------------------------------------------------------------------------------------------
# What the libraries say, in processes of their own: an import may end one, or print
# ---------------------------------------------------------------------------------------------------------------------


def module_of(name):
    return MODULES.get(name, name.replace("-", "_"))


def is_found(name):
    """Whether `import` would find a module, and not only a folder of that name; nothing of it is run."""
    spec = importlib.machinery.PathFinder.find_spec(module_of(name))
    return spec is not None and spec.origin is not None


def ask(code):
    """
    Runs code in a process of its own.

    Returns:
        `tuple[dict, str]`: what it has printed behind [`MARK`], and why it failed, if it did.
    """
    environment = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    # Where a launcher has set them for every shell, a process would wait for the others of its run.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS)}
    environment = {**kept, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    words = [sys.executable, "-c", code]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", env=environment, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return {}, f"no answer within {SECONDS} seconds"
    facts = {}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            facts.update(json.loads(line[len(MARK) :]))
    if done.returncode == 0:
        return facts, ""
    if done.returncode < 0:
        return facts, f"its process was ended by signal {-done.returncode}"
    return facts, brief((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])


MARK = "amvl-doctor "


def probe():
    """Asks torch, transformers and this package, one after the other, as far as they can be imported; prints what they say."""
    for name, question in (("torch", _ask_torch), ("transformers", _ask_transformers), ("this package", _ask_package)):
        try:
            facts = question()
        except BaseException as error:  # whatever a broken installation raises
            facts = {f"error of {name}": brief(f"{type(error).__name__}: {error}")}
        print(f"\n{MARK}{json.dumps(facts)}", flush=True)


def _ask_torch():
    import torch

    accelerators = []
    has_bf16 = True
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            accelerators.append(
                f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB, {properties.major}.{properties.minor})"
            )
            has_bf16 &= properties.major >= 8 or torch.version.hip is not None
    elif torch.accelerator.is_available():
        accelerators = [torch.accelerator.current_accelerator().type] * torch.accelerator.device_count()
    cuda, hip = torch.version.cuda, torch.version.hip
    made_for = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "the CPU alone"
    build = f"for {made_for}, {'with' if has_bf16 else 'WITHOUT'} bf16, {torch.get_num_threads()} threads"
    torch_facts = {
        "accelerators": accelerators,
        "cuda": cuda,
        "is_for_gpu": bool(cuda or hip),
        "has_bf16": has_bf16,
        "build": build,
        "version": torch.__version__,
    }
    return {"torch": torch_facts}


def _ask_transformers():
    import torch
    import transformers
    from transformers.utils import is_flash_attn_2_available

    kinds = ["sdpa, or eager where a model has none, is used by default"]
    if torch.cuda.is_available():
        backends = torch.backends.cuda
        enabled = {
            "flash": backends.flash_sdp_enabled(),
            "memory-efficient": backends.mem_efficient_sdp_enabled(),
            "cuDNN": backends.cudnn_sdp_enabled(),
            "math": backends.math_sdp_enabled(),
        }
        kinds.append(f"sdpa's kernels: {', '.join(name for name, is_on in enabled.items() if is_on)}")
    kinds.append(f"flash_attention_2 {'can be asked for' if is_flash_attn_2_available() else 'is not available'}")
    return {"attention": "; ".join(kinds), "transformers": transformers.__version__}


def _ask_package():
    import torch

    from modeling_amvl import AMVLConfig

    from . import AMVLSFTConfig, AMVLSFTTrainer

    args = AMVLSFTConfig(tempfile.gettempdir(), use_cpu=not torch.accelerator.is_available())
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    return {
        "run": f"{AMVLSFTTrainer.__name__} on {args.device.type}, {args.n_gpu} GPUs in a process, {precision} by default, "
        f"multipass={AMVLConfig.multipass}, self_test={args.self_test}"
    }


def probe_faults(facts, crash, installed):
    """`list[str]`: what could not be imported, and modules that are not the version that is installed."""
    faults = [
        f"{name.removeprefix('error of ')} cannot be used: {text}"
        for name, text in facts.items()
        if "error of" in name
    ]
    if crash:
        faults.append(f"asking the libraries failed: {crash}")
    for name, version in (
        ("torch", facts.get("torch", {}).get("version")),
        ("transformers", facts.get("transformers")),
    ):
        if version and name in installed and numbers(version) != numbers(installed[name][0][0]):
            faults.append(
                f"`{name}` is {version} when imported, but installed as {installed[name][0][0]}: install it anew"
            )
    return faults


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------


def devices(torch):
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    counted = {name: torch.get("accelerators", []).count(name) for name in torch.get("accelerators", [])}
    shown = ", ".join(f"{count} x {name}" for name, count in counted.items())
    return f"{os.cpu_count()} CPU cores{memory}, {shown or 'no accelerator in use'}"


def nvidia_answers():
    """Whether the driver of NVIDIA has a GPU here."""
    if not shutil.which("nvidia-smi"):
        return False
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def device_faults(torch, has_nvidia):
    """`list[str]`: a GPU that torch cannot use, or without bf16."""
    if not torch:
        return []
    if has_nvidia and not torch["is_for_gpu"]:
        return [
            f"this machine has an NVIDIA GPU, but torch {torch['version']} is a build for the CPU: install one for CUDA"
        ]
    if has_nvidia and not torch["accelerators"]:
        return ["torch finds no GPU, but nvidia-smi does: look at the driver's version and at `CUDA_VISIBLE_DEVICES`"]
    if not torch["has_bf16"]:
        return ["a GPU here has no bf16: set `bf16=False`, and `fp16=True` where memory is short"]
    return []


def compilers(has_deepspeed, has_cuda):
    """`tuple[str, list[str]]`: which there are, and what DeepSpeed lacks to compile its operators with."""
    beside = Path(sys.executable).parent
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = {
        "C++": any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name),
        "nvcc": bool(shutil.which("nvcc")) or bool(home and (Path(home) / "bin" / "nvcc").exists()),
        "ninja": bool(shutil.which("ninja")) or (beside / "ninja").exists(),
    }
    told = ", ".join(f"{name} {'yes' if is_there else 'no'}" for name, is_there in found.items())
    needed = [name for name in found if name != "nvcc" or has_cuda] if has_deepspeed else []
    lacking = [name for name in needed if not found[name]]
    if not lacking:
        return told, []
    return told, [
        f"`deepspeed` cannot compile its operators (offloading needs one) without {', '.join(lacking)}: install them, or use ddp or "
        "fsdp2"
    ]


def left_locks():
    """
    Locks on torch's compiled extensions that a process left which was killed while it compiled; others wait for them for ever.

    Returns:
        `list[Path]`: those older than ten minutes, a file each.
    """
    locks = []
    with contextlib.suppress(
        OSError, RuntimeError
    ):  # another process may remove one meanwhile; there may be no home folder
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or home / "torch_extensions")
        locks = [path for path in folder.rglob("lock") if time.time() - path.stat().st_mtime > SECONDS_TO_COMPILE]
    return locks


def lock_faults():
    return [
        f"`{lock.parent.name}` of torch's extensions is locked, by a process that was killed while it compiled, and DeepSpeed waits for it "
        f"for ever: delete the file `lock` in its folder under `TORCH_EXTENSIONS_DIR` or `~/.cache/torch_extensions`"
        for lock in left_locks()
    ]


def disk_space():
    """`tuple[str, list[str]]`: what is free where a run writes, and which of it is full."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
    places = {
        "here": Path.cwd,
        "in the Hub's cache": lambda: Path(cache).expanduser(),
        "for temporary files": lambda: Path(tempfile.gettempdir()),
    }
    told, faults = [], []
    for name, find in places.items():
        try:
            place = find().absolute()
            there = next(path for path in (place, *place.parents) if path.exists())
            free = shutil.disk_usage(there).free
        except (OSError, RuntimeError) as error:  # the folder is gone, may not be entered, or nobody knows it
            told.append(f"not known {name}")
            faults.append(f"no folder can be used {name}: {brief(error)}")
            continue
        told.append(f"{free / 2**30:.1f} GiB {name}")
        if free < LEAST_FREE:
            faults.append(f"{free / 2**20:,.0f} MiB are free {name}, which is a full disk: make room")
        elif not os.access(there, os.W_OK):
            faults.append(f"nothing can be written {name}: look at the folder's permissions")
    return f"free {', '.join(told)}", faults


def has_token():
    """Whether the Hub's libraries find a token; it is not read."""
    try:
        home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    except RuntimeError:  # no home folder
        return bool(os.environ.get("HF_TOKEN"))
    path = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    with contextlib.suppress(OSError):
        return bool(os.environ.get("HF_TOKEN")) or path.is_file()
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------


def brief(text):
    text = " ".join(str(text).split())
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def anonymous(text):
    """
    A line without who and where.

    Args:
        text (`str`): one that may quote an error.

    Returns:
        `str`: without secrets of the environment, tokens, names of the user and the machine; of an absolute path its last part.
    """
    for name, value in os.environ.items():
        if re.search("TOKEN|SECRET|PASSWORD|_KEY|CREDENTIAL", name.upper()) and len(value) >= 6:
            text = text.replace(value, "<secret>")
    text = re.sub(r"\b(hf|sk|ghp|gho|glpat|pypi)[-_][\w-]{8,}", "<token>", text)
    text = re.sub(r"://[^/\s@]+@", "://", text)
    quoted = r"(?<=(['\"`]))(?:~|[A-Za-z]:)?[/\\][^'\"`]*(?=\1)"  # may have spaces
    for path in (quoted, r"(?<![\w.:/])(?:~|[A-Za-z]:)?(?:[/\\][^/\\\s:;,'\"`()]+)+[/\\]?"):
        text = re.sub(path, _last_part, text)
    names = {platform.node()}
    with contextlib.suppress(KeyError, OSError, RuntimeError):  # a user without a name
        names |= {getpass.getuser(), Path.home().name}
    for name in names:
        if len(name) > 2:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<name>", text)
    return text


def _last_part(match):
    parts = [part for part in re.split(r"[/\\]", match[0]) if part]
    return f".../{parts[-1] if parts else ''}"


if __name__ == "__main__":
    sys.exit(main())
