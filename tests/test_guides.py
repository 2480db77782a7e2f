"""Every block of code in README.md and the guides is run: here by a reader beside a Hub on the loopback interface, or by a test that is named."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from loopback_hub import File, LoopbackHub, Repository
from test_benchmarks import blink_folder
from test_planning import tiny_config
from tiny import build_tiny_backbone
from trl import ModelConfig, TrlParser

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from recipes import sft_amvl
from trainer import AMVLSFTConfig
from trainer.data.color_steps import build_color_steps
from trainer.demo import DemoArguments


pytestmark = pytest.mark.xdist_group("guides")  # one worker makes what all of them share
ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "recipes/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("recipes/guides/*.md")),
]

# What takes another machine, another process or minutes is run by another test, which has to exist.
ELSEWHERE = {
    '-e ".[demo]" && .venv/bin/accelerate launch recipes/sft_amvl.py': "test_recipe.py::test_the_embedded_default_as_a_command",
    '-e ".[test]" && .venv/bin/pytest': "../.ci/run",
    '-e ".[dev]"': "../.ci/run",
    'pip install -c constraints.txt -e ".[deepspeed]"': "../.ci/run",
    "--config_file recipes/accelerate/": "distributed/test_engines.py::test_an_engine_takes_the_steps_of_one_process",
    "recipes/serve_amvl.py": "test_serving.py::test_the_example_of_the_recipe",
    "recipes/push_space.py": "test_space.py::test_the_published_space_names_its_model_and_one_commit_of_it",
    "sbatch ": "distributed/test_engines.py::test_a_job_of_slurm_joins_its_machines",
    "recipes/consolidate_amvl.py": "distributed/test_engines.py::test_an_engine_resumes_exactly_and_its_checkpoint_becomes_one_model",
}
# So that it takes seconds on a CPU: added to what is shown.
TINY_RUN = (
    "--use_cpu true --bf16 false --dtype float32 --max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
    "--num_latents 2 --latent_size 8 --dataloader_num_workers 0 --lora_r 2 --logging_steps 1"
)
SMALLER = {
    "recipes/sft_amvl.py": TINY_RUN,
    "recipes/make_puzzles.py": "--num_rows 2 --num_val_rows 2 --kinds Jigsaw Counting",
    "recipes/evaluate_amvl.py": "--max_new_tokens 4",
    "recipes/diagnose_amvl.py": "--max_rows 8 --num_sweep_rows 4",
}
STAND_INS = {
    "recipes/mixtures/paper.yaml": "mixture.yaml",  # of sources that the Hub of this test does not have
    "--num_proc 8": "--num_proc 1",
    'AMVLSFTConfig("amvl-smolvlm")': 'AMVLSFTConfig("amvl-smolvlm", use_cpu=True)',  # whose default is bf16 on a GPU
}


def blocks_of(page):
    """(page, line, language, code) of each block of code."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in re.finditer(r"^```(python|bash)\n(.*?)^```$", text, re.M | re.S):
        yield page, text[: found.start()].count("\n") + 2, found[1], found[2]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def where_else(code):
    """The test that runs a block, where the reader does not."""
    return next((test for shown, test in ELSEWHERE.items() if shown in code), None)


HERE = [block for block in BLOCKS if not where_else(block[3])]


def put(repositories, name, folder):
    """Commits a folder to the Hub."""
    repositories[name] = Repository()
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    repositories[name].commit({path: File(data, lfs=path.endswith(".safetensors")) for path, data in files.items()})


def furnish(folder, hub):
    """What the reader has: a checkpoint of the demo, its control, photographs, rows; and on the Hub what the guides name."""
    for name in ("recipes", "trainer", "modeling_amvl", "model_cards", "constraints.txt", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    backbone, stock = build_tiny_backbone(seed=0)
    backbone.generation_config.eos_token_id = None  # random models end at random
    for part in (backbone, stock):
        part.save_pretrained(folder / "amvl-demo-sft")
    processor = AMVLProcessor.from_backbone(stock)
    model = AMVLForConditionalGeneration.from_backbone(
        backbone, num_latents=2, latent_size=8, latent_token_id=processor.latent_token_id
    )
    for part in (model, processor):
        part.save_pretrained(folder / "amvl-demo")
    (folder / "amvl-demo" / "README.md").write_text("# amvl-demo\n\n## Does it use its latents?\n")
    rows = build_color_steps(8, image_size=48)
    (folder / "my" / "photos").mkdir(parents=True)
    for number, row in enumerate(build_color_steps(12, image_size=96)):
        row["images"][0].save(folder / "my" / "photos" / f"{number}.png")
    rows[0]["images"][0].save(folder / "amvl-demo" / "example.png")
    rows[0]["images"][0].save(folder / "photo.png")
    rows[1]["images"][0].save(folder / "other.png")
    (folder / "my" / "folder").mkdir()
    rows[0]["images"][0].save(folder / "my" / "folder" / "0.png")
    turns = [{"from": "human", "value": "<image>\n2 steps from red?"}, {"from": "gpt", "value": "blue"}]
    (folder / "my" / "folder" / "rows.json").write_text(json.dumps([{"image": "0.png", "conversations": turns}]))
    (folder / "your-rows").mkdir()
    rows.select_columns(["images", "prompt", "completion"]).to_parquet(folder / "your-rows" / "train.parquet")
    (folder / "mixture.yaml").write_text("sources:\n  - {format: trl, name: your-rows}\n")
    tiny_config(max_position_embeddings=4096).save_pretrained(folder / "qwen")
    (folder / "blink").mkdir()
    blink_folder(folder / "blink", ("Jigsaw", "Counting"))
    for name, source in (
        ("HuggingFaceTB/SmolVLM-Instruct", "amvl-demo-sft"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen"),
        ("you/amvl-smolvlm", "amvl-demo"),
        ("you/amvl-demo", "amvl-demo"),
    ):
        put(hub.models, name, folder / source)
    for name, source in (("your/dataset", "your-rows"), ("BLINK-Benchmark/BLINK", "blink")):
        put(hub.datasets, name, folder / source)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came of each block that is run here, by page and line."""
    folder = tmp_path_factory.mktemp("reader")
    blocks = []
    for _, _, language, code in HERE:
        for shown, here in STAND_INS.items():
            code = code.replace(shown, here)
        smaller = {script: arguments.split() for script, arguments in SMALLER.items()}
        blocks.append({"language": language, "code": code, "smaller": smaller})
    (folder / "blocks.json").write_text(json.dumps(blocks))
    with LoopbackHub() as hub:
        (folder / "work").mkdir()
        furnish(folder / "work", hub)
        environment = hub.environment(folder / "hf_home") | {
            "PYTHONPATH": str(ROOT),
            "HF_MODULES_CACHE": str(folder / "modules"),
        }
        command = [sys.executable, str(ROOT / "tests" / "guide_reader.py"), "../blocks.json", "../results.json"]
        finished = subprocess.run(
            command, cwd=folder / "work", env=environment, capture_output=True, text=True, timeout=900
        )
        assert finished.returncode == 0, finished.stderr[-4000:]
        pushed = set(hub.models) | set(hub.datasets)
    found = json.loads((folder / "results.json").read_text())
    return {(page, line): result for (page, line, _, _), result in zip(HERE, found, strict=True)} | {"pushed": pushed}


@pytest.mark.slow
@pytest.mark.parametrize("page, line", [pytest.param(page, line, id=f"{page}:{line}") for page, line, _, _ in HERE])
def test_a_block_runs_as_it_is_shown(results, page, line):
    result = results[page, line]
    assert result["error"] is None, result["error"]


@pytest.mark.slow
def test_what_the_guides_push_is_on_the_hub(results):
    assert {"you/amvl-smolvlm", "you/amvl-demo", "you/amvl-lora", "you/paper"} <= results["pushed"]


# The arguments after `accelerate launch` of every such command.
LAUNCHES = [
    pytest.param(shlex.split(words, comments=True), id=f"{page}:{line}")
    for page, line, _, code in BLOCKS
    for words in re.findall(r"accelerate launch (.*)", code)
]


@pytest.mark.parametrize("words", LAUNCHES)
def test_every_launch_command_has_flags_that_exist(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    launched = launch_command_parser().parse_args(words)
    arguments = launched.training_script_args
    if "--config" in arguments:
        classes = sft_amvl.AMVLScriptArguments, AMVLSFTConfig, ModelConfig
        arguments = [*arguments, "--use_cpu", "true"]
    else:
        classes = (DemoArguments,)
    TrlParser(classes).parse_args_and_config(arguments)
    with pytest.raises(ValueError, match="--num_latent_slots"):
        TrlParser(classes).parse_args_and_config([*arguments, "--num_latent_slots", "4"])


@pytest.mark.parametrize("shown", ELSEWHERE)
def test_what_the_reader_does_not_run_is_run_by_a_test_that_exists(shown):
    assert any(shown in code for _, _, _, code in BLOCKS), "no block shows it any more"
    path, _, name = ELSEWHERE[shown].partition("::")
    text = (ROOT / "tests" / path).read_text(encoding="utf-8")
    assert not name or f"def {name}" in text


def test_every_block_of_code_says_its_language():
    for page in PAGES:
        fences = re.findall(r"^```.*$", (ROOT / page).read_text(encoding="utf-8"), re.M)
        assert fences[1::2] == ["```"] * (len(fences) // 2), page
        without = fences[::2].count("```")
        assert without == (page == "README.md"), page  # the file tree
        assert set(fences[::2]) <= {"```python", "```bash", "```"}, page


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


def test_a_block_that_fails_would_be_noticed(tmp_path):
    blocks = [
        {"language": "python", "code": "raise ValueError('planted')\n", "smaller": {}},
        {"language": "bash", "code": "rm nothing\n", "smaller": {}},
        {"language": "python", "code": "print('went on')\n", "smaller": {}},
    ]
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    command = [sys.executable, str(ROOT / "tests" / "guide_reader.py"), "blocks.json", "results.json"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=120)
    first, second, third = json.loads((tmp_path / "results.json").read_text())
    assert "planted" in first["error"] and "Who runs" in second["error"]
    assert third == {"printed": "went on\n", "error": None}
