"""The command that evaluates: one harness for stock and AMVL models, which goes on where it was killed."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_benchmarks import blink_row, picture, visual_puzzle, vstar_folder, write_parquet
from tiny import build_tiny_backbone

from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from recipes.evaluate_amvl import EvaluationArguments, main
from trainer.collator import AMVLDataCollator
from trainer.data.puzzles import FEATURES
from trainer.evaluation.answering import answer_batch
from trainer.evaluation.letters import draw_latents, letter_log_probs
from trainer.evaluation.models import _version
from trainer.evaluation.questions import prepare_questions


REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE = REPOSITORY / "recipes" / "evaluate_amvl.py"
NUM_ROWS = 12  # of each task
TASKS = ("Counting", "Jigsaw")


def write_data(folder):
    for place, task in enumerate(TASKS):
        rows = [
            blink_row(
                number + NUM_ROWS * place,
                num_images=1 + place,
                options=("one", "two", "three", "four")[: 4 - 2 * place],
                answer=f"({'ABCD'[number % (4 - 2 * place)]})",
                sub_task=task,
            )
            for number in range(NUM_ROWS)
        ]
        write_parquet(rows, folder / task / "val-00000-of-00001.parquet", FEATURES)
    return folder


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Questions, and three models that answer in letters after a few steps: a base, the same with more, and AMVL on the base."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = write_data(folder / "data")
    questions = prepare_questions("puzzles", folder / "questions", data).questions
    backbone, stock_processor = build_tiny_backbone(seed=0)
    processor = AMVLProcessor.from_backbone(stock_processor)
    batch = AMVLDataCollator(processor)([question.row() for question in questions])
    completion, mask = batch.pop("completion_ids"), batch.pop("completion_mask")
    num_prompt = batch["input_ids"].shape[1]
    ids = torch.cat([batch["input_ids"], completion], dim=1)
    attention = torch.cat([batch["attention_mask"], mask], dim=1)
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :num_prompt] = -100
    optimizer = torch.optim.Adam(backbone.parameters(), lr=3e-3)

    def train(num_steps):
        for _ in range(num_steps):
            inputs = {"input_ids": ids, "attention_mask": attention, "pixel_values": batch["pixel_values"]}
            backbone(**inputs, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    train(15)
    torch.manual_seed(0)
    model = AMVLForConditionalGeneration.from_backbone(
        copy.deepcopy(backbone), num_latents=3, latent_size=8, latent_token_id=processor.latent_token_id
    )
    with torch.no_grad():
        model.prior_head.log_variance.bias.fill_(0.0)  # a spread that changes likelihoods
    model.backbone.requires_grad_(False)  # without latents it stays the base
    latent_parts = [parameter for parameter in model.parameters() if parameter.requires_grad]
    latent_optimizer = torch.optim.Adam(latent_parts, lr=1e-2)
    for _ in range(20):
        output = model(
            **batch, completion_ids=completion, completion_mask=mask, decode_prior=True, latent_temperature=0.0
        )
        output.prior_loss.backward()
        latent_optimizer.step()
        latent_optimizer.zero_grad()
    model.save_pretrained(folder / "amvl")
    processor.save_pretrained(folder / "amvl")
    backbone.save_pretrained(folder / "base")
    train(15)
    backbone.save_pretrained(folder / "sft")
    for name in ("base", "sft"):
        stock_processor.save_pretrained(folder / name)
    return folder


def arguments_of(workplace, output_dir, **changes):
    models = [f"{name}={workplace / name}" for name in ("base", "sft", "amvl")]
    values = dict(models=models, benchmark="puzzles", data=str(workplace / "data"), output_dir=str(output_dir))
    return EvaluationArguments(
        **{**values, "max_new_tokens": 6, "use_cpu": True, "latents": ["prior", "none"], **changes}
    )


def command_of(arguments):
    words = []
    for name, value in vars(arguments).items():
        if value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def environment():
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def results_of(folder):
    """The results but for what depends on the clock."""
    results = json.loads((Path(folder) / "results.json").read_text())
    for arm in results["arms"].values():
        assert arm.pop("seconds_per_answer") > 0
    return results


@pytest.fixture(scope="module")
def whole(workplace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    main(arguments_of(workplace, folder))
    return folder


def test_one_command_gives_a_table_of_all_models_with_what_it_takes_to_read_it(whole):
    results = results_of(whole)
    arms = ["base", "sft", "amvl", "amvl-latents-off"]
    assert list(results["columns"]) == ["chance", "constant", *arms]
    assert results["columns"]["chance"] == {"Counting": 0.25, "Jigsaw": 0.5, "total": 0.375}
    assert results["columns"]["constant"] == {"Counting": 0.25, "Jigsaw": 0.5, "total": 0.375}
    totals = {arm: results["columns"][arm]["total"] for arm in arms}
    assert results["arms"]["amvl"]["unparsed"] < 2 * NUM_ROWS
    assert totals["base"] == totals["amvl-latents-off"] and len(set(totals.values())) > 1, totals
    assert [(entry["first"], entry["second"]) for entry in results["differences"] if entry["task"] == "total"] == [
        ("base", "sft"), ("base", "amvl"), ("base", "amvl-latents-off"), ("sft", "amvl"),
        ("sft", "amvl-latents-off"), ("amvl", "amvl-latents-off"),
    ]  # fmt: skip
    off = next(entry for entry in results["differences"] if entry["second"] == "amvl-latents-off")
    assert (off["difference"], off["low"], off["high"]) == (0, 0, 0)  # the base's very weights
    assert (results["arms"]["amvl"]["k"], results["arms"]["amvl"]["tau"]) == (3, 0.0)
    for arm in results["arms"].values():
        assert 1 <= arm["tokens_per_answer"] <= 6 and 0 <= arm["letter_accuracy"]["total"] <= 1
        assert sum(arm["letters"].values()) + arm["unparsed"] == 2 * NUM_ROWS
    markdown, page = (whole / "results.md").read_text(), (whole / "results.html").read_text()
    for word in ("chance", "constant", "base", "amvl - sft", "image budget", "unparsed", "tau", "seconds"):
        assert word in markdown and word in page, word
    assert "data:image/png" in page and "<script" not in page and page.count('class="card"') == 12


def test_answers_are_those_of_each_row_alone_and_costs_are_counted(workplace, whole):
    questions = prepare_questions("puzzles", whole / "questions", workplace / "data").questions
    model = AMVLForConditionalGeneration.from_pretrained(workplace / "amvl").eval()
    processor = AMVLProcessor.from_pretrained(workplace / "amvl")
    lines = [json.loads(line) for line in (whole / "answers" / "amvl" / "answers-0.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(2 * NUM_ROWS))
    for line in lines[::5]:
        (alone,) = answer_batch(model, processor, [questions[line["row"]]], [line["row"]], "prior", max_new_tokens=6)
        assert (alone["text"], alone["num_tokens"]) == (line["text"], line["num_tokens"])
        assert alone["letter_scores"] == pytest.approx(line["letter_scores"], abs=1e-3)
        assert len(line["letter_scores"]) == questions[line["row"]].num_options


@pytest.mark.parametrize("source", ["prior", "sampled", "off", "stock"])
def test_letter_scores_are_the_likelihoods_of_the_letters_written_out(workplace, source):
    questions = prepare_questions("puzzles", workplace / "questions", workplace / "data").questions[8:14]
    model = AMVLForConditionalGeneration.from_pretrained(workplace / "amvl").eval()
    processor = AMVLProcessor.from_pretrained(workplace / "amvl")
    batch = AMVLDataCollator(processor)([question.row() for question in questions])
    batch = {key: value for key, value in batch.items() if not key.startswith("completion")}
    temperature = 1.0 if source == "sampled" else 0.0
    latents = draw_latents(model, batch, range(6), temperature, 0) if source in ("prior", "sampled") else None
    asked = model.backbone if source == "stock" else model
    scores = letter_log_probs(asked, processor, batch, latents, 4)
    expected = []
    for letter in "ABCD":
        forms, texts = [], (letter, f"({letter}", f" {letter}", f" ({letter}")
        for written in {tuple(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}:
            ids = torch.tensor([written] * 6)
            with torch.no_grad():
                forms.append(model.log_prob(completion_ids=ids, latents=latents, **batch).sum(1))
        expected.append(torch.stack(forms).exp().sum(0).log())
    assert torch.allclose(scores, torch.stack(expected, dim=1), atol=1e-4)
    assert (scores.exp().sum(1) <= 1 + 1e-5).all() and scores.std(1).min() > 0


def test_noise_belongs_to_a_row_and_a_seed_not_to_a_batch(workplace):
    questions = prepare_questions("puzzles", workplace / "questions", workplace / "data").questions[:4]
    model = AMVLForConditionalGeneration.from_pretrained(workplace / "amvl").eval()
    processor = AMVLProcessor.from_pretrained(workplace / "amvl")

    def scores(numbers, seed=0, temperature=20.0):
        asked = [questions[number] for number in numbers]
        answers = answer_batch(model, processor, asked, numbers, "prior", temperature, seed, 6)
        return [answer["letter_scores"][0] for answer in answers]

    together = scores([0, 1, 2, 3])
    assert scores([2])[0] == pytest.approx(together[2], abs=1e-3) and scores([3, 1])[1] == pytest.approx(
        together[1], abs=1e-3
    )
    for other in (scores([0, 1, 2, 3], seed=1), scores([0, 1, 2, 3], temperature=0.0)):
        assert all(abs(one - two) > 1e-3 for one, two in zip(together, other))


def kill_in_the_middle(command, file, num_lines):
    """Runs a command in a process group of its own and kills it, and all that it started, once a file has some lines."""
    process = subprocess.Popen(command, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if file.exists() and file.read_bytes().count(b"\n") >= num_lines:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("it was not caught in the middle")


@pytest.mark.slow
def test_a_killed_run_goes_on_also_with_two_processes_and_gives_the_same_results(workplace, whole, tmp_path):
    arguments = arguments_of(workplace, tmp_path, batch_size=1)
    file = tmp_path / "answers" / "base" / "answers-0.jsonl"
    kill_in_the_middle([sys.executable, str(RECIPE), *command_of(arguments)], file, 3)
    before = file.read_bytes()
    assert 3 <= before.count(b"\n") < 2 * NUM_ROWS and not (tmp_path / "results.json").exists()
    with open(file, "ab") as torn:  # what a machine that loses its power may leave
        torn.write(b'{"row": 23, "te')
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = subprocess.run([*launch, str(RECIPE), *command_of(arguments)], env=environment(), capture_output=True, text=True, timeout=300)  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("# puzzles") == 1
    assert results_of(tmp_path) == results_of(whole)
    whole_lines = before[: before.rfind(b"\n") + 1]
    assert file.read_bytes().startswith(whole_lines)  # not asked again
    for arm in ("base", "sft", "amvl", "amvl-latents-off"):
        rows = [
            [json.loads(line)["row"] for line in part.read_text().splitlines()]
            for part in sorted((tmp_path / "answers" / arm).glob("*.jsonl"))
        ]
        assert sorted(sum(rows, [])) == list(range(2 * NUM_ROWS)), arm
        assert len(rows) == 2 and all(rows)  # both worked


def test_a_finished_run_loads_no_model_and_other_settings_are_refused_by_name(workplace, whole, monkeypatch):
    before = results_of(whole)
    monkeypatch.setattr("recipes.evaluate_amvl.load_model", None)
    main(arguments_of(workplace, whole, batch_size=2))
    assert results_of(whole) == before
    for changes, message in (
        ({"max_new_tokens": 7}, "`max_new_tokens` was 6 and is 7"),
        ({"latent_temperature": 0.5}, "`temperature` was 0.0 and is 0.5"),
        (
            {"models": [f"base={workplace / 'sft'}"], "latents": None},
            "`model` was .*base.*and is .*sft.*; `version` was",
        ),
        ({"answer_line": "Think."}, "`answer_line` was '' and is 'Think.'"),
    ):
        with pytest.raises(ValueError, match=message):
            main(arguments_of(workplace, whole, **changes))


def test_a_model_is_told_from_another_by_any_weight_and_by_its_chat_template(tmp_path):
    file = tmp_path / "model.safetensors"
    versions = set()
    for position in (0, 1_000_001, 7_999_999):  # between blocks, were it sampled
        data = bytearray(8_000_000)
        data[position] = 1
        file.write_bytes(data)
        versions.add(_version(tmp_path, {})["weights"])
    (tmp_path / "chat_template.jinja").write_text("x")
    assert len({*versions, _version(tmp_path, {})["weights"]}) == 4


def test_settings_that_would_change_nothing_and_models_that_are_none_are_refused_first(workplace, tmp_path):
    stock = [f"base={workplace / 'base'}"]
    for changes, message in (
        ({"models": stock, "latents": None, "latent_temperature": 0.5}, "`latent_temperature` is 0.5, but no model is asked with latents"),
        ({"latents": ["none"], "latent_temperature": 0.0}, "`latent_temperature` is 0.0, but no model"),
        ({"models": stock, "latents": None, "num_latents": 3}, "`num_latents` is 3, but no model"),
        ({"models": stock}, r"`latents` is \['prior', 'none'\], but none of"),
        ({"models": stock, "latents": ["prior"]}, r"`latents` is \['prior'\], but none of"),
        ({"models": stock, "latents": ["none"]}, r"`latents` is \['none'\], but none of"),
        ({"models": [f"chance={workplace / 'base'}"]}, "`models` has the name 'chance', which is a column"),
        ({"models": [f"constant={workplace / 'base'}"]}, "`models` has the name 'constant', which is a column"),
        ({"num_latents": 8}, "`num_latents` is 8, but .* was trained with 3"),
        ({"latents": ["posterior"]}, r"`latents` must be of \['prior', 'none'\], got \['posterior'\]"),
        ({"latent_temperature": -1.0}, "`latent_temperature` must be 0 or more, got -1"),
        ({"min_pixels": 100}, "`min_pixels` cannot be set"),
        ({"models": ["base"]}, "`models` has 'base': write `name=path`"),
        ({"models": [*stock, *stock]}, "`models` has the name 'base' twice"),
        ({"models": [f"../x={workplace / 'base'}"]}, "`models` has '../x="),
        ({"models": [f"base={tmp_path}"]}, "no configuration that can be read.*`merged`"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            main(arguments_of(workplace, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
    for changes, message in (
        ({"batch_size": 0}, "`batch_size`"),
        ({"dtype": "half8"}, "`dtype`.*'half8'"),
        ({"seed": -1}, "`seed`"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments_of(workplace, tmp_path / "out", **changes)


def test_other_benchmarks_run_too_and_what_was_left_out_is_on_the_page(workplace, tmp_path):
    vstar_folder(tmp_path / "vstar")
    with open(tmp_path / "vstar" / "test_questions.jsonl", "a") as file:
        file.write('{"text": "<b>no options</b>"}\n')
    main(
        arguments_of(
            workplace,
            tmp_path / "out",
            benchmark="vstar",
            data=str(tmp_path / "vstar"),
            latents=None,
            letter_scores=False,
        )
    )
    results = results_of(tmp_path / "out")
    assert results["rule"] == "mean over rows" and results["num_questions"]["total"] == 3
    assert results["arms"]["amvl"]["letter_accuracy"] is None
    shares = {name: results["columns"][name]["total"] for name in results["arms"]}
    for name, share in shares.items():  # Wilson's has a width also at none and all of three
        low, high = results["arms"][name]["intervals"]["total"]
        z, center = 1.959964, (share + 1.959964**2 / 6) / (1 + 1.959964**2 / 3)
        half = z / (1 + z**2 / 3) * (share * (1 - share) / 3 + z**2 / 36) ** 0.5
        assert (low, high) == pytest.approx((center - half, center + half), abs=1e-5) and low < high
    page = (tmp_path / "out" / "results.html").read_text()
    assert "Wilson" in page and "1 with no options" in page and "<b>no" not in page


def test_budgets_that_differ_are_said_and_shown(workplace, tmp_path, caplog):
    other = tmp_path / "other"
    model, processor = build_tiny_backbone(seed=0, image_size=64)
    model.save_pretrained(other)
    processor.save_pretrained(other)
    models = [f"base={workplace / 'base'}", f"other={other}"]
    write_parquet(
        [visual_puzzle(0, None) | {"image": {"bytes": picture(0), "path": None}}], tmp_path / "data" / "test-0.parquet"
    )
    main(
        arguments_of(
            workplace,
            tmp_path / "out",
            models=models,
            benchmark="visualpuzzles",
            data=str(tmp_path / "data"),
            latents=None,
        )
    )
    assert "different budgets" in caplog.text
    assert "The image budgets differ" in (tmp_path / "out" / "results.md").read_text()
