"""The recipe as it is run: the embedded default, the real mode on local files, and every YAML file."""

import contextlib
import inspect
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny import build_tiny_backbone
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from trl import ModelConfig, TrlParser

import trainer.demo
import trainer.summary
from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from recipes import sft_amvl
from recipes.prepare_data import PrepareArguments
from trainer import AMVLSFTConfig
from trainer.data.color_steps import FIRST_STEPS as KINDS
from trainer.data.color_steps import build_color_steps
from trainer.data.filters import load_filter
from trainer.data.mixture import Mixture
from trainer.data.prepare import prepare
from trainer.data.reader import Reader
from trainer.demo import DemoArguments, run_demo
from trainer.pictures import PANELS
from trainer.planning.kept import ENGINES as PLANNED


REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE = REPOSITORY / "recipes" / "sft_amvl.py"
CONFIGS = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "recipes").rglob("configs/*.yaml"))
MIXTURES = sorted(
    path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "recipes").rglob("mixtures/*.yaml")
)
ENGINES = sorted(
    path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "recipes").rglob("accelerate/*.yaml")
)
DATACLASSES = (sft_amvl.AMVLScriptArguments, AMVLSFTConfig, ModelConfig)
AMVL_COLUMNS = ["AMVL, prior Z", "another's Z", "latents off", "posterior Z"]
COLUMNS = ["chance", "constant", "base", "more SFT", *AMVL_COLUMNS]

# The first lines of a fresh process in which some packages cannot be found, as where they are not installed.
BLOCKED = """
import sys


class Blocker:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_amvl", "trainer", "model_cards", "recipes", "trl", "peft"):
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Blocker(finder) for finder in sys.meta_path]
for name in ("modeling_amvl", "trainer", "peft"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} could be imported")
"""


def environment_of(cwd, **variables):
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    caches = {"HF_HOME": str(cwd / "hf_home"), "HF_MODULES_CACHE": str(cwd / "hf_modules")}
    return kept | caches | {"HF_HUB_OFFLINE": "1"} | variables


def launch(cwd, *arguments):
    """What `accelerate launch recipes/sft_amvl.py` prints, run from `cwd`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPE), *map(str, arguments)]
    environment = environment_of(cwd, PYTHONPATH=str(REPOSITORY))  # as `pip install -e .` makes it importable
    finished = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout, finished.stderr


def run_fresh(cwd, script):
    """What a script prints in a process that has torch and transformers, and neither this repository nor peft."""
    cwd.mkdir()
    finished = subprocess.run(
        [sys.executable, "-c", BLOCKED + script],
        cwd=cwd,
        env=environment_of(cwd),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


# ---------------------------------------------------------------------------------------------------------------------
# The embedded default
# ---------------------------------------------------------------------------------------------------------------------


def table_of(output):
    """Column names and scores in per cent by row of the one table in a text."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return header[1:], {name: [float(cell) for cell in cells] for name, *cells in rows}


def loading_lines(output):
    lines = output.splitlines()
    first = lines.index("from transformers import AutoModelForImageTextToText, AutoProcessor")
    assert lines[first - 1] == "" and lines[first + 5] == ""
    return lines[first : first + 5]


def printed_answer(output):
    """What the run says that the model answers."""
    (said,) = re.findall(r"^It says ('.*'|\".*\"); right is '.*'\. The control is in .*-sft\.$", output, re.MULTILINE)
    return said[1:-1]


def assert_demo_output(output, folder, num_rows):
    header, rows = table_of(output)
    assert header == COLUMNS and list(rows) == [*KINDS, "mean"]
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == COLUMNS
    for row, cells in rows.items():
        assert cells == pytest.approx([100 * results[column][row] for column in COLUMNS], abs=0.051)
        assert all(0 <= cell <= 100 for cell in cells)
    for column in COLUMNS:
        assert results[column]["mean"] == pytest.approx(np.mean([results[column][kind] for kind in KINDS]))
    assert [results["chance"][kind] for kind in KINDS] == [1 / 8] * 2  # colours
    written = (folder / "results.md").read_text().strip()
    assert written in output and f"{num_rows} questions about held-out photographs" in written

    with Image.open(folder / "training_summary.png") as picture:
        assert picture.format == "PNG" and picture.width >= 1000 and picture.height >= 600
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    colorful = np.unique(pixels[np.ptp(pixels, axis=1) > 60], axis=0)
    assert len(colorful) >= 3  # the curves; frame, grid and letters are grey
    examples = json.loads((folder / "examples.json").read_text())
    assert len(examples) == 3 and all(example["question"].startswith("2 steps from") for example in examples)
    assert [Image.open(folder / example["image"]).size for example in examples] == [(288, 288)] * 3
    card = ModelCard.load(folder / "README.md")
    assert "amvl" in card.data.tags and card.text.lstrip().startswith(f"# {folder.name}\n")
    assert not list(folder.rglob("checkpoint-*")) and (folder / "model.safetensors").is_file()
    control = folder.with_name(f"{folder.name}-sft")
    assert AutoModelForImageTextToText.from_pretrained(control).config.model_type == "llava"
    assert AutoProcessor.from_pretrained(control).tokenizer.pad_token == "<pad>"


SMALL = {"num_train_rows": 60, "num_test_rows": 20, "num_steps": 6, "batch_size": 8}


@pytest.mark.slow
def test_the_embedded_default_as_a_command_prints_lines_that_answer_alike_in_a_fresh_process(tmp_path):
    folder = tmp_path / "demo"
    # Steps too small to change much: latents are new to the base, whose answer to them chance does not repeat.
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    output, errors = launch(tmp_path, "--output_dir", folder, "--learning_rate", 1e-6, "--seed", 1, *flags)
    assert_demo_output(output, folder, num_rows=20)
    assert "100%" in errors and "6/6" in errors  # progress bars
    answer = run_fresh(tmp_path / "elsewhere", "\n".join(loading_lines(output)))
    said = printed_answer(output)
    assert said and repr(answer.strip())[1:-1] == said


def run_demo_here(monkeypatch, **settings):
    """The same run in this process: what it printed and what the trainer logged."""
    logged = []
    plot = trainer.summary.plot_training_curves

    def plot_and_keep(history, *args):
        logged.extend(history)
        return plot(history, *args)

    monkeypatch.setattr(trainer.summary, "plot_training_curves", plot_and_keep)
    num_threads, output = torch.get_num_threads(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            columns = run_demo(DemoArguments(**SMALL | settings))
    finally:
        torch.set_num_threads(num_threads)
    return output.getvalue(), columns, logged


def test_photographs_of_the_users_own_make_the_demo_and_its_lines_work_from_another_folder(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for number in range(7):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        path = tmp_path / "photos" / ("sub" if number % 2 else "") / f"{number}.{('png', 'jpg')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((160, 120), Image.Resampling.BICUBIC).save(path)
    monkeypatch.chdir(tmp_path)
    output, columns, logged = run_demo_here(monkeypatch, image_dir="photos", output_dir="amvl-demo")
    assert output.startswith("60 questions about 5 photographs to train on, 20 about 2 others to test on.\n")
    assert_demo_output(output, tmp_path / "amvl-demo", num_rows=20)
    assert columns == json.loads(Path("amvl-demo/results.json").read_text())
    keys = {key for entry in logged for key in entry}
    assert {key for _, curves in PANELS for key in curves} <= keys  # no curve waits for what nobody logs

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    answer = io.StringIO()
    with contextlib.redirect_stdout(answer):
        exec("\n".join(loading_lines(output)), {})
    assert repr(answer.getvalue().strip())[1:-1] == printed_answer(output)


def test_too_few_photographs_are_refused_before_training(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "only.png")
    with pytest.raises(ValueError, match="leaves no photograph for .held_out.: add some"):
        run_demo(DemoArguments(output_dir=str(tmp_path / "out"), image_dir=str(tmp_path), **SMALL))


# ---------------------------------------------------------------------------------------------------------------------
# Which of the two modes runs
# ---------------------------------------------------------------------------------------------------------------------


def run_script(monkeypatch, *arguments):
    """Runs the file as a script, all but the demo itself; returns the settings that reached the demo."""
    started = []
    monkeypatch.setattr(trainer.demo, "run_demo", started.append)
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments])
    runpy.run_path(str(RECIPE), run_name="__main__")
    return started


def test_without_arguments_and_with_its_own_the_embedded_default_runs(monkeypatch):
    assert run_script(monkeypatch) == [DemoArguments()]
    started = run_script(
        monkeypatch, "--output_dir", "here", "--seed", "3", "--num_latents", "5", "--learning_rate", "1e-2"
    )
    assert started == [DemoArguments(output_dir="here", seed=3, num_latents=5, learning_rate=1e-2)]


NEEDED = "`model_name_or_path` and `dataset_name` are needed, in the YAML file or on the command line"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model_name_or_path", "somewhere"],
        ["--model_name_or_path=somewhere"],
        ["--dataset_name", "somewhere"],
        ["--dataset_name=somewhere", "--dataset_format", "trl"],
        ["--use_peft", "true"],
    ],
    ids=" ".join,
)
def test_a_real_run_without_model_or_dataset_says_what_is_needed(monkeypatch, tmp_path, arguments):
    with pytest.raises(ValueError, match=NEEDED):
        run_script(monkeypatch, *arguments, "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false")


def test_an_argument_that_neither_mode_has_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="--num_latent_slots"):
        run_script(monkeypatch, "--num_latent_slots", "4", "--use_cpu", "true")


# ---------------------------------------------------------------------------------------------------------------------
# The real mode, on local files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A stock model and its processor, a dataset with splits, one without, and a small Monet-SFT-125K; all on disk."""
    root = tmp_path_factory.mktemp("local")
    backbone, processor = build_tiny_backbone(seed=0)
    backbone.save_pretrained(root / "stock")
    processor.save_pretrained(root / "stock")
    rows = build_color_steps(8, image_size=48)
    datasets.DatasetDict(train=rows, test=build_color_steps(5, "held_out", image_size=48)).save_to_disk(
        root / "splits"
    )
    rows.save_to_disk(root / "flat")
    records = []
    for number, row in enumerate(rows):
        name = f"ReFocus/{number}.png"
        (root / "monet" / "ReFocus").mkdir(parents=True, exist_ok=True)
        row["images"][0].save(root / "monet" / name)
        question, answer = row["prompt"][0]["content"][1]["text"], row["completion"][0]["content"][0]["text"]
        user = [{"type": "image", "image": name}, {"type": "text", "text": question}]
        assistant = [{"type": "text", "text": f"It is \\boxed{{{answer}}}."}] if number != 3 else []
        records.append(
            {
                "metadata": {"dataset_name": "ReFocus", "sample_id": str(number)},
                "data": [
                    {"role": "system", "content": [{"type": "text", "text": "Draw."}]},
                    {"role": "user", "content": user},
                    {"role": "assistant", "content": assistant},
                ],
            }
        )
    (root / "monet" / "ReFocus" / "train.json").write_text(json.dumps(records))
    return root


SETTINGS = {
    "num_latents": 3,
    "latent_size": 8,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "training_summary": False,
    "report_to": "none",
}
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 64, "lora_target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def arguments_of(local, tmp_path):
    """Returns a function that writes a YAML file and gives the command line that names it, with more flags."""

    def make(*flags, folder="run", dataset="splits", **settings):
        names = {"model_name_or_path": str(local / "stock"), "dataset_name": str(local / dataset)}
        config = names | SETTINGS | {"output_dir": str(tmp_path / folder)} | settings
        path = tmp_path / f"{folder}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
        return ["--config", str(path), *map(str, flags)]

    return make


@pytest.fixture
def run_recipe(arguments_of, tmp_path):
    """Returns a function that runs the real mode in this process and gives its output folder."""

    def run(*flags, folder="run", **settings):
        parser = TrlParser(DATACLASSES)
        sft_amvl.main(*parser.parse_args_and_config(arguments_of(*flags, folder=folder, **settings)))
        return tmp_path / folder

    return run


def prompt_of(processor):
    row = build_color_steps(1, "held_out", image_size=48)[0]
    content = [{"type": "image", "image": row["images"][0]}, row["prompt"][0]["content"][1]]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def assert_answers(folder):
    """A folder loads as an AMVL model with its processor, and answers."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is AMVLForConditionalGeneration and isinstance(processor, AMVLProcessor)
    assert model.config.latent_token_id == processor.latent_token_id
    inputs = prompt_of(processor)
    output = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    assert output.latents.shape == (1, model.config.num_latents, model.config.latent_size)
    return model


def test_a_yaml_file_trains_and_the_command_line_overrides_it(run_recipe, local):
    folder = run_recipe("--num_latents", 2, "--beta", 0.25, "--latent_temperature", 0.5, "--multipass", "full")
    model = assert_answers(folder)
    config = model.config
    assert (config.num_latents, config.latent_size) == (2, 8)
    assert (config.latent_temperature, config.multipass) == (0.5, "full")
    card = (folder / "README.md").read_text()
    assert "| `beta` | 0.25 |" in card and "| `learning_rate` | 0.01 |" in card and "| `optimiser steps` | 2 |" in card
    before = AutoModelForImageTextToText.from_pretrained(local / "stock").state_dict()
    after = model.backbone.state_dict()
    moved = {name for name, weight in before.items() if not torch.equal(after[name][: len(weight)], weight)}
    assert moved == {name for name in before if "vision_tower" not in name} != set(before)


def test_an_evaluation_reads_the_test_split(run_recipe):
    folder = run_recipe("--eval_strategy", "steps", "--eval_steps", 2)
    assert re.search(r"\| prior \| \d+\.\d+ \|", (folder / "README.md").read_text())


def test_an_evaluation_without_a_test_split_is_refused(run_recipe):
    with pytest.raises(
        ValueError, match="`dataset_test_split` is 'validation', but .* has .*'train', 'test'.*eval_dataset"
    ):
        run_recipe("--eval_strategy", "steps", "--eval_steps", 2, dataset_test_split="validation")


def test_a_dataset_saved_without_splits_is_what_is_trained_on(run_recipe):
    assert_answers(run_recipe(dataset="flat"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_parquet_files_is_read(run_recipe, local, tmp_path, streaming):
    (tmp_path / "parquet").mkdir()
    datasets.load_from_disk(str(local / "flat")).to_parquet(tmp_path / "parquet" / "train.parquet")
    assert_answers(run_recipe(dataset_name=str(tmp_path / "parquet"), dataset_streaming=streaming))


def test_the_monet_form_trains_and_tells_what_it_dropped(run_recipe, capsys):
    folder = run_recipe(dataset="monet", dataset_format="monet", dataset_subsets=["ReFocus"])
    assert_answers(folder)
    output = capsys.readouterr().out
    assert "kept 7 rows: ReFocus 7" in output and "dropped 1: no boxed answer, for example ReFocus/3" in output


def test_what_was_dropped_is_written_down_for_people_and_programs(run_recipe):
    folder = run_recipe(dataset="monet", dataset_format="monet", dataset_subsets=["ReFocus"])
    report = json.loads((folder / "data_report" / "train" / "report.json").read_text())
    assert report["total"] == {"read": 8, "kept": 7, "rows": 7, "dropped": 1, "not_sampled": 0}
    assert report["sources"]["ReFocus"]["tokens"]["rows"] == 7
    assert "no boxed answer" in (folder / "data_report" / "train" / "report.html").read_text()


def test_a_stream_tells_at_its_end_what_it_dropped(run_recipe, capsys):
    folder = run_recipe(
        "--dataset_streaming", True, dataset="monet", dataset_format="monet", dataset_subsets=["ReFocus"], max_steps=4
    )
    assert_answers(folder)
    report = json.loads((folder / "data_report" / "train" / "report.json").read_text())
    assert report["total"]["dropped"] == 1 and "dropped 1: no boxed answer" in capsys.readouterr().out


@pytest.fixture
def prepared(local, tmp_path):
    source = {"format": "trl", "name": str(local / "splits"), "licence": "mit"}
    prepare(Mixture([source], [source | {"split": "test"}]), tmp_path / "prepared")
    return str(tmp_path / "prepared")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_prepared_dataset_is_trained_on_and_its_licences_reach_the_model_card(run_recipe, prepared, streaming):
    flags = ("--dataset_streaming", streaming, "--eval_strategy", "steps", "--eval_steps", 2)
    folder = run_recipe(*flags, dataset_format="prepared", dataset_name=prepared)
    assert_answers(folder)
    card = (folder / "README.md").read_text()
    assert "- trl: mit" in card and re.search(r"\| prior \| \d+\.\d+ \|", card)


def test_a_mixture_is_trained_on_without_being_prepared(run_recipe, local, tmp_path):
    source = {"format": "trl", "name": str(local / "splits")}
    mixture = {"sources": [{**source, "weight": 2, "source": "mine"}], "evaluation": [source | {"split": "test"}]}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    flags = ("--eval_strategy", "steps", "--eval_steps", 2)
    folder = run_recipe(*flags, dataset_format="mixture", dataset_name=str(tmp_path / "mixture.yaml"))
    report = json.loads((folder / "data_report" / "train" / "report.json").read_text())
    assert report["sources"]["mine"]["rows"] == 16 and "- mine: not stated" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "setting",
    [{"dataset_answer": "rationale"}, {"dataset_subsets": ["a"]}, {"bad_rows": "raise"}],
    ids=lambda s: [*s][0],
)
def test_what_the_mixture_has_settled_is_not_asked_again(run_recipe, no_model, prepared, setting):
    with pytest.raises(ValueError, match=rf"\['{[*setting][0]}'\] are settled by the mixture"):
        run_recipe(dataset_format="prepared", dataset_name=prepared, **setting)


def test_an_image_budget_that_the_processor_cannot_be_given_is_said(run_recipe, prepared, caplog):
    report = json.loads(Path(prepared, "report.json").read_text())
    report["settings"]["max_pixels"] = 1000
    Path(prepared, "report.json").write_text(json.dumps(report))
    run_recipe(dataset_format="prepared", dataset_name=prepared)
    assert "is meant for an image budget of {'min_pixels': None, 'max_pixels': 1000}" in caplog.text


def test_a_folder_that_was_not_prepared_is_not_taken_for_one(run_recipe, no_model, local):
    with pytest.raises(ValueError, match="has no `report.json`"):
        run_recipe(dataset_format="prepared")


def test_a_trained_checkpoint_is_trained_on_with_its_own_latents(run_recipe):
    first = run_recipe()
    second = run_recipe(folder="second", model_name_or_path=str(first), num_latents=None, latent_size=None)
    config = assert_answers(second).config
    assert (config.num_latents, config.latent_size) == (3, 8)
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert {name for name in before if torch.equal(before[name], after[name])} == {
        name for name in before if "vision_tower" in name
    }


def test_latents_that_a_trained_checkpoint_does_not_have_are_refused(run_recipe):
    first = run_recipe()
    with pytest.raises(ValueError, match="`num_latents`.* 5.* 3"):
        run_recipe("--num_latents", 5, folder="second", model_name_or_path=str(first))


def test_resuming_gives_the_uninterrupted_run(run_recipe):
    whole = run_recipe(folder="whole", max_steps=4, save_strategy="steps", save_steps=2)
    checkpoint = whole / "checkpoint-2"
    resumed = run_recipe("--resume_from_checkpoint", checkpoint, folder="resumed", max_steps=4)
    halfway, expected, actual = (load_file(folder / "model.safetensors") for folder in (checkpoint, whole, resumed))
    assert expected.keys() == actual.keys()
    assert all(torch.allclose(actual[name], weight, rtol=0, atol=1e-6) for name, weight in expected.items())
    assert any(not torch.allclose(halfway[name], weight, rtol=0, atol=1e-4) for name, weight in expected.items())


def test_lora_saves_an_adapter_and_a_merged_model_that_computes_the_same(run_recipe, local):
    folder = run_recipe(**LORA)
    merged = assert_answers(folder / "merged").eval()
    assert (folder / "adapter_config.json").is_file() and not (folder / "merged" / "adapter_config.json").exists()
    processor = AMVLProcessor.from_pretrained(folder / "merged")

    def wrapped():
        torch.manual_seed(0)
        return AMVLForConditionalGeneration.from_backbone(
            str(local / "stock"), num_latents=3, latent_size=8, latent_token_id=processor.latent_token_id
        ).eval()

    assert merged.state_dict().keys() == wrapped().state_dict().keys()
    adapted = PeftModel.from_pretrained(wrapped(), folder).eval()
    inputs = prompt_of(processor)
    with torch.no_grad():
        logits = [model(**inputs).logits for model in (adapted, merged, wrapped())]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert (logits[2] - logits[0]).abs().max() > 1e-2


def test_lora_without_merging_saves_the_adapter_alone(run_recipe):
    folder = run_recipe("--merge_lora", "false", **LORA)
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "merged").exists()


@pytest.mark.slow
def test_the_real_mode_as_a_command_leaves_a_merged_model_that_loads_without_peft(arguments_of, tmp_path):
    launch(tmp_path, *arguments_of("--max_steps", 1, **LORA))
    script = f"""
from transformers import AutoModelForImageTextToText, AutoProcessor

model, processor = (
    auto.from_pretrained({str(tmp_path / "run" / "merged")!r}, trust_remote_code=True)
    for auto in (AutoModelForImageTextToText, AutoProcessor)
)
print(type(model).__name__, type(processor).__name__, model.config.num_latents, "peft" in sys.modules)
"""
    printed = run_fresh(tmp_path / "elsewhere", script)
    assert printed.split() == ["AMVLForConditionalGeneration", "AMVLProcessor", "3", "False"]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is an error: what a test refuses is refused before."""

    def load(*_, **__):
        raise AssertionError("a model was loaded first")

    monkeypatch.setattr(sft_amvl, "load_model", load)


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name"])
def test_a_missing_name_is_refused(run_recipe, no_model, name):
    with pytest.raises(ValueError, match=NEEDED):
        run_recipe(**{name: None})


def test_an_unknown_dataset_format_is_refused(run_recipe, no_model):
    with pytest.raises(
        ValueError, match="`dataset_format` must be one of .*'trl'.*'prepared', 'mixture'.*, got 'webdataset'"
    ):
        run_recipe(dataset_format="webdataset")


def test_a_missing_split_is_refused_by_the_splits_there_are(run_recipe, no_model):
    with pytest.raises(ValueError, match=r"`split` is 'training', but .* has \['train', 'test'\]"):
        run_recipe("--dataset_train_split", "training")


def test_a_dataset_that_is_nowhere_is_refused_by_its_name(run_recipe, no_model, tmp_path):
    with pytest.raises((ValueError, OSError), match="nowhere"):
        run_recipe(dataset_name=str(tmp_path / "nowhere"))


def test_an_unknown_key_in_the_yaml_file_is_refused(run_recipe, no_model):
    with pytest.raises(ValueError, match="num_latent_slots"):
        run_recipe(num_latent_slots=4)


def test_quantization_asked_for_reaches_the_model(local, monkeypatch):
    asked = []
    monkeypatch.setattr(
        sft_amvl.AMVLForConditionalGeneration, "from_backbone", lambda _, **settings: asked.append(settings)
    )
    config = ModelConfig(model_name_or_path=str(local / "stock"), load_in_8bit=True)
    processor = AMVLProcessor.from_backbone(local / "stock")
    sft_amvl.load_model(sft_amvl.AMVLScriptArguments(), config, processor)
    assert asked[0]["quantization_config"].load_in_8bit


# ---------------------------------------------------------------------------------------------------------------------
# Every YAML file
# ---------------------------------------------------------------------------------------------------------------------


def parse(config, *overrides):
    """The three dataclasses of a YAML file, here where there may be no GPU for bf16."""
    return TrlParser(DATACLASSES).parse_args_and_config(["--config", config, "--use_cpu", "true", *overrides])


def test_there_is_the_papers_setting_and_one_for_a_single_gpu():
    assert {"recipes/configs/qwen2_5_vl_7b_monet.yaml", "recipes/configs/smolvlm_2b_single_gpu.yaml"} <= set(CONFIGS)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_opens_with_the_command_that_runs_it(config):
    first = (REPOSITORY / config).read_text().splitlines()[0]
    assert first.startswith("# accelerate launch ")
    launched = launch_command_parser().parse_args(shlex.split(first)[3:])
    assert launched.training_script == "recipes/sft_amvl.py"
    assert launched.training_script_args == ["--config", config]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_holds_only_known_keys_with_values_of_their_type(config, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    written = yaml.safe_load(Path(config).read_text())
    parsed = parse(config)
    for key, value in written.items():
        owners = [part for part in parsed if key in {field.name for field in fields(part)}]
        assert len(owners) == 1, key
        kept = getattr(owners[0], key)
        if key == "report_to":
            assert kept in ("none", ["none"], [])
        else:
            assert kept == value and type(getattr(kept, "value", kept)) is type(value), key
    assert parse(config, "--num_latents", "3")[0].num_latents == 3


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_may_be_given_other_data(config, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for form in ("trl", "prepared", "mixture"):
        script, *_ = parse(config, "--dataset_format", form, "--dataset_name", "mine")
        assert (script.dataset_format, script.dataset_name) == (form, "mine")
        left = [key for key in sft_amvl.OF_THE_MIXTURE if getattr(script, key) is not None]
        assert not left  # the rows would be looked for in subsets of the config's own data


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_that_is_misspelt_would_be_noticed(config, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "misspelt.yaml").write_text(Path(config).read_text() + "\nnum_latent_slots: 4\n")
    with pytest.raises(ValueError, match="num_latent_slots"):
        parse(str(tmp_path / "misspelt.yaml"))


def test_the_values_are_those_of_the_paper_and_of_one_gpu(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    models = {
        "qwen2_5_vl_7b_monet": "Qwen/Qwen2.5-VL-7B-Instruct",
        "smolvlm_2b_single_gpu": "HuggingFaceTB/SmolVLM-Instruct",
    }
    for name, model in models.items():
        script, training, model_config = parse(f"recipes/configs/{name}.yaml")
        assert (script.num_latents, script.latent_size) == (8, 512)
        assert training.freeze_vision and training.bf16 and training.gradient_checkpointing
        assert (model_config.model_name_or_path, model_config.dtype) == (model, "bfloat16")
        assert model_config.use_peft == (name == "smolvlm_2b_single_gpu")
    assert script.dataset_format == "mixture"
    sources = Mixture.from_yaml(script.dataset_name).sources
    assert {source["name"] for source in sources} == {"NOVAglow646/Monet-SFT-125K"}


def test_every_yaml_file_is_a_config_an_engine_or_a_mixture():
    assert {*CONFIGS, *ENGINES, *MIXTURES} == {
        path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "recipes").rglob("*.yaml")
    }
    assert MIXTURES


@pytest.mark.parametrize("path", MIXTURES)
def test_a_mixture_opens_with_the_command_that_runs_it_and_says_what_readers_know(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    command, script, *arguments = shlex.split(Path(path).read_text().splitlines()[0].removeprefix("# "))
    assert (command, script) == ("python", "recipes/prepare_data.py")
    (parsed,) = HfArgumentParser(PrepareArguments).parse_args_into_dataclasses(arguments)
    assert parsed.mixture == path
    mixture = Mixture.from_yaml(path)
    for source in (*mixture.sources, *mixture.evaluation):
        settings = set(source) - {"format", "name"}
        assert settings <= set(inspect.signature(Reader).parameters), settings
        for spec in source.get("filters", ()):
            load_filter(spec)


def test_the_engines_are_those_that_are_planned():
    assert {Path(path).stem for path in ENGINES} == set(PLANNED)


@pytest.mark.parametrize("path", ENGINES)
def test_an_engine_opens_with_the_command_that_launches_it_and_is_what_accelerate_reads(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(Path(path).read_text().splitlines()[0])
    assert words[:3] == ["#", "accelerate", "launch"]
    launched = launch_command_parser().parse_args(words[3:])
    assert launched.config_file == path and launched.training_script == "recipes/sft_amvl.py"
    assert launched.training_script_args == ["--config", launched.training_script_args[1]]
    assert launched.training_script_args[1] in CONFIGS
    config = load_config_from_file(path)  # refuses keys that it does not know
    kinds = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type.value == kinds.get(Path(path).stem, "DEEPSPEED")


def test_the_recipe_tells_its_commands():
    for command in re.findall(r"accelerate launch .*", inspect.getdoc(sft_amvl)):
        launched = launch_command_parser().parse_args(shlex.split(command)[2:])
        assert (REPOSITORY / launched.training_script).samefile(RECIPE)
        if launched.training_script_args:
            assert (REPOSITORY / launched.training_script_args[1]).is_file()
