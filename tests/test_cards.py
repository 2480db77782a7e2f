"""A card says what was measured on these weights, in metadata that the Hub takes, whatever names have to go into it.

AMVL_RENEW_SNAPSHOTS=1 pytest tests/test_cards.py -k snapshot     # writes tests/snapshots/*.md anew
"""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, concatenate_datasets
from fresh_process import NO_REPOSITORY
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback_hub import TOKEN, LoopbackHub, metadata_errors
from markdown_it import MarkdownIt  # comes with rich, which typer and so transformers need
from tiny import build_tiny_backbone
from transformers import set_seed

from model_cards import TrainingFacts, read_facts, render_card, render_dataset_card, weights_fingerprint, write_card
from model_cards.facts import FACTS, note_weights, public
from model_cards.metadata import is_hub_id
from model_cards.own_words import END, START
from model_cards.provenance import code_version
from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from recipes import write_card as recipe
from trainer import AMVLSFTConfig, AMVLSFTTrainer
from trainer.data.color_steps import build_color_steps
from trainer.describing import datasets_of, licences_of
from trainer.evaluation.models import Arm
from trainer.evaluation.questions import Question, QuestionSet
from trainer.evaluation.results import summarize


SNAPSHOTS = Path(__file__).with_name("snapshots")
REPOSITORY = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OURS, OTHERS = "a" * 64, "b" * 64
LATENTS = {
    "num_latents": 2,
    "latent_size": 8,
    "latent_temperature": 0.0,
    "latent_token_id": 5,
    "initial_token_id": None,
    "min_log_variance": -8.0,
    "max_log_variance": 4.0,
}
FULL = TrainingFacts(
    title="amvl-small",
    latents=LATENTS,
    hub_model_id="someone/amvl-small",
    base="someone/base",
    base_revision=COMMIT,
    is_trained=True,
    num_steps=40,
    settings={"beta": 0.01, "kl_order": "together", "optimiser steps": 40},
    arguments={"learning_rate": 1e-05, "model_init_kwargs": {"attn_implementation": "sdpa"}},
    evaluation={
        "step": 30,
        "prior": {"nll": 0.5, "accuracy": 0.75},
        "posterior": {"nll": 0.25, "accuracy": 0.875},
        "no_latents": {"nll": 1.5, "accuracy": 0.5},
    },
    datasets={"someone/photos": COMMIT, "someone/charts": None},
    licences={"photos": "cc-by-4.0", "charts": "not stated"},
    license="apache-2.0",
    device="2 processes, some GPU each",
    code={"version": "0.1.0", "commit": COMMIT, "uncommitted": True},
    versions={"torch": "2.13.0", "transformers": "5.23.0"},
)
BARE = TrainingFacts("bare", LATENTS)


# ---------------------------------------------------------------------------------------------------------------------
# What there is to show
# ---------------------------------------------------------------------------------------------------------------------


def results_of(arms, data="BLINK-Benchmark/BLINK", benchmark="blink_paper", max_rows=None, missing=(), letters="AB"):
    """What recipes/evaluate_amvl.py writes, from its own code: 24 questions of two tasks, the answers made up."""
    tasks = ["Jigsaw", "IQ_Test"]
    questions = [
        Question(str(row), tasks[row % 2], [], "?", ["one", "two"], 2, "AB"[row // 2 % 2], f"row {row}")
        for row in range(24)
    ]
    asked = {"benchmark": benchmark, "data": data, "revision": None, "answer_line": "", "max_rows": max_rows}
    asked |= {"seed": 0, "max_new_tokens": 8, "dtype": "auto", "questions": "0123456789abcdef"}
    report = {"read": 24, "kept": 24, "repaired": {}, "dropped": {}, "missing_tasks": list(missing), "commit": COMMIT}
    answers = {}
    for place, arm in enumerate(arms):
        said = [question.gold if row % (place + 2) else letters[row % 2] for row, question in enumerate(questions)]
        answers[arm.name] = {
            row: {"text": f"({letter})", "letter_scores": None, "num_tokens": 3, "seconds": 0.1}
            for row, letter in enumerate(said)
        }
    found = summarize(
        QuestionSet(benchmark, questions, report, asked["questions"], asked), arms, answers, asked, num_resamples=200
    )
    return json.loads(json.dumps(found))


def arm(name, path, source="prior", **changes):
    has = source == "prior"
    values = {
        "model_type": "amvl",
        "num_latents": 2 if has else None,
        "temperature": 0.0 if has else None,
        "image_budget": {"max_pixels": 1003520},
        "version": {},
    }
    return Arm(name, str(path), source=source, **values | changes)


def made_up_results(**changes):
    """Of three arms, the weights told by hand."""
    arms = [arm("base", "someone/base", "no_latents", model_type="llava"), arm("amvl", "someone/amvl-small")]
    found = results_of([*arms, arm("amvl-latents-off", "someone/amvl-small", "no_latents")], **changes)
    for name, values in found["arms"].items():
        values["weights_sha256"] = OTHERS if name == "base" else OURS
    return found


def made_up_diagnosis(weights=OURS):
    own = {"num_rows": 100, "accuracy": 0.75}
    change = {"num_rows": 100, "accuracy": 0.5, "difference": -0.25, "low": -0.35, "high": -0.15, "flip_rate": 0.3}
    change |= {"text_flip_rate": 0.3, "log_prob": -0.5, "log_prob_low": -0.6, "log_prob_high": -0.4}
    return {
        "verdict": {
            "word": "used",
            "paragraph": "With another row's Z accuracy falls. Not compared with same-data SFT.",
        },
        "settings": {"data": "photos", "seed": 0},
        "changes": {"own": own, "swapped": change, "swapped, same question": None},
        "weights_sha256": weights,
    }


def rendered(html_of):
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(html_of)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer after two steps, with the best model, that of step 1, loaded at the end and saved; its rows tell where they are from."""
    folder = tmp_path_factory.mktemp("run")
    set_seed(0)
    backbone, processor = build_tiny_backbone(seed=0)
    backbone.generation_config.eos_token_id = None
    processor = AMVLProcessor.from_backbone(processor)
    model = AMVLForConditionalGeneration.from_backbone(
        backbone, num_latents=3, latent_size=8, latent_token_id=processor.latent_token_id
    )
    rows = build_color_steps(4, image_size=48)
    rows.info.homepage = f"hf://datasets/someone/photos@{COMMIT}"
    rows.info.license = "photos: cc-by-4.0"
    args = AMVLSFTConfig(
        str(folder / "amvl-small"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_nll_prior",
        greater_is_better=True,
        hub_token=TOKEN,
        license="cc-by-4.0",
        model_init_kwargs={"token": TOKEN, "cache_dir": str(folder), "offload_folder": "/disk/somebody/offload"},
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        self_test=False,
        gradient_checkpointing=False,
    )
    trainer = AMVLSFTTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=processor)
    trainer.train()
    trainer.save_model()
    rows[0]["images"][0].save(folder / "photo.jpg")
    return trainer


@pytest.fixture
def checkpoint(run, tmp_path):
    """A copy of what the trainer saved, without its checkpoints."""
    folder = tmp_path / "amvl-small"
    folder.mkdir()
    for path in Path(run.args.output_dir).iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def saved_results(path, folder, **changes):
    """Results of a checkpoint's folder beside a base of other weights."""
    (path / "base").mkdir(exist_ok=True, parents=True)
    (path / "base" / "model.safetensors").write_bytes(b"other weights")
    arms = [arm("base", path / "base", "no_latents", model_type="llava"), arm("amvl", folder)]
    (path / "results.json").write_text(json.dumps(results_of(arms, **changes)))
    return path / "results.json"


# ---------------------------------------------------------------------------------------------------------------------
# The snapshot
# ---------------------------------------------------------------------------------------------------------------------

CARDS = {
    "full": lambda: render_card(
        FULL, None, {"evaluation/blink_paper.json": made_up_results()}, made_up_diagnosis(), OURS, "Ask me\nanything."
    ),
    "bare": lambda: render_card(BARE),
    "adapter": lambda: render_card(
        dataclasses.replace(FULL, is_adapter=True, evaluation=None, license=None, datasets={})
    ),
}


@pytest.mark.parametrize("name", CARDS)
def test_snapshot(name):
    text, path = str(CARDS[name]()), SNAPSHOTS / f"{name}.md"
    if os.environ.get("AMVL_RENEW_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "AMVL_RENEW_SNAPSHOTS=1 writes it anew"


@pytest.mark.parametrize("name", CARDS)
def test_metadata_is_what_the_hub_takes_and_comes_back_as_it_was(name, tmp_path):
    card = CARDS[name]()
    assert metadata_errors(str(card)) == []
    card.save(tmp_path / "README.md")
    data = metadata_load(tmp_path / "README.md")
    assert data == card.data.to_dict() == ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["pipeline_tag"] == "image-text-to-text" and data["library_name"] == (
        "peft" if name == "adapter" else "transformers"
    )
    assert ("base_model" in data, "license" in data, "model-index" in data) == {
        "full": (True, True, True),
        "bare": (False, False, False),
        "adapter": (True, False, False),
    }[name]
    if name == "full":
        assert data["base_model_relation"] == "finetune" and data["datasets"] == ["someone/photos", "someone/charts"]
        title, scores = model_index_to_eval_results(data["model-index"])
        assert eval_results_to_model_index(title, scores) == data["model-index"] and title == "amvl-small"
        (total,) = (score for score in scores if score.metric_name == "accuracy, mean over tasks")
        assert total.dataset_type == "BLINK-Benchmark/BLINK" and total.dataset_revision == COMMIT
        assert total.metric_value == round(100 * made_up_results()["columns"]["amvl"]["total"], 2)
        assert total.source_url.endswith("/someone/amvl-small/resolve/main/evaluation/blink_paper.json")
        assert {(score.dataset_config, score.dataset_split) for score in scores} == {
            (None, "val"),
            ("Jigsaw", "val"),
            ("IQ_Test", "val"),
        }


def test_the_validator_would_notice():
    for broken in (
        "license: Apache 2.0",
        "datasets:\n- /disk/me/rows",
        "base_model: a//b",
        "tags: amvl",
        "a: [",
        "- a",
    ):
        assert metadata_errors(f"---\n{broken}\n---\n"), broken
    index = eval_results_to_model_index("m", CARDS["full"]().data.eval_results)
    for part in ("task", "dataset", "metrics"):
        wrong = json.loads(json.dumps(index))
        del wrong[0]["results"][0][part]
        assert metadata_errors(f"---\n{yaml.safe_dump({'model-index': wrong})}---\n")


# ---------------------------------------------------------------------------------------------------------------------
# Only of these weights, and only what was measured
# ---------------------------------------------------------------------------------------------------------------------


def test_a_card_without_measurements_claims_none():
    text = CARDS["bare"]().text
    assert "No benchmark was run." in text and "Not measured: nothing here says so." in text
    assert "None is stated for the weights." in text and "Not known: no `amvl_training.json`" in text
    assert "**Verdict" not in text and "%" not in text


def test_all_arms_are_shown_and_the_one_of_these_weights_is_marked_by_them_not_by_its_name(checkpoint, tmp_path):
    path = saved_results(tmp_path / "results", checkpoint)
    found = json.loads(path.read_text())
    assert (
        found["arms"]["amvl"]["weights_sha256"]
        == hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    )
    for first, second in (("base", "amvl"), ("amvl", "base")):  # once under the other's name
        text = write_card(checkpoint, [path]).read_text()
        assert f"| **{second}: this checkpoint** |" in text and f"| **{first}: this" not in text
        assert (
            "| chance | 50.0 |" in text and "| always one letter | 50.0 |" in text and f"| {first}: `base` |" in text
        )
        assert f"{tmp_path}" not in text
        swapped = path.read_text().replace('"amvl"', '"x"').replace('"base"', '"amvl"').replace('"x"', '"base"')
        path.write_text(swapped.replace('"model_type": "base"', '"model_type": "amvl"'))
    kept = json.loads((checkpoint / "evaluation" / "blink_paper.json").read_text())
    assert kept["arms"]["base"]["path"] == "amvl-small" and str(tmp_path) not in json.dumps(kept)


def test_results_of_other_weights_are_refused_and_what_lies_there_is_left_out(checkpoint, tmp_path, caplog):
    path = saved_results(tmp_path / "results", checkpoint)
    (tmp_path / "diagnosis.json").write_text(json.dumps(made_up_diagnosis(weights_fingerprint(checkpoint))))
    before = write_card(checkpoint, [path], tmp_path / "diagnosis.json").read_text()
    assert "this checkpoint" in before and "**Verdict: used.**" in before
    assert write_card(checkpoint).read_text() == before  # from what lies in the folder now
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # trained on
    (checkpoint / "model.safetensors").write_bytes(weights)
    for wanted, message in (
        ({"results": [path]}, "none of whose models has the weights of .* trained on since"),
        ({"diagnosis": tmp_path / "diagnosis.json"}, "trained on since or another model"),
    ):
        with pytest.raises(ValueError, match=message):
            write_card(checkpoint, **wanted)
        assert (checkpoint / "README.md").read_text() == before
    caplog.clear()
    after = write_card(checkpoint).read_text()
    assert "No benchmark was run." in after and "**Verdict" not in after and "model-index" not in after
    assert (
        "Not known: no `amvl_training.json`" in after and "license: cc-by-4.0" in after
    )  # a person's word, not a measurement
    assert caplog.text.count("Left out of the card") == 3


def test_a_training_is_not_told_of_weights_that_were_saved_over_it(checkpoint, caplog):
    assert read_facts(checkpoint).is_trained
    (checkpoint / "model.safetensors").write_bytes(b"of another training")
    assert not read_facts(checkpoint).is_trained and "is of other weights" in caplog.text
    note_weights(checkpoint)  # the same in another form, says who wrote them
    assert read_facts(checkpoint).is_trained


def test_results_that_say_nothing_of_their_weights_are_refused(checkpoint, tmp_path):
    path = saved_results(tmp_path / "results", checkpoint)
    found = json.loads(path.read_text())
    del found["arms"]["amvl"]["weights_sha256"]
    found["arms"]["base"]["weights_sha256"] = None
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="none of whose models has the weights"):
        write_card(checkpoint, [path])


@pytest.mark.parametrize("changes", [{"max_rows": 12}, {"missing": ["Art_Style"]}], ids=["few rows", "few tasks"])
def test_a_part_of_a_benchmark_is_shown_as_one_and_is_no_result_of_it(changes):
    card = render_card(FULL, None, {"x.json": made_up_results(**changes)}, None, OURS)
    assert "Not the benchmark's score" in card.text and card.data.eval_results is None
    assert "this checkpoint" in card.text


@pytest.mark.parametrize(
    ("data", "type_", "name"),
    [(None, "blink_paper", "made by the evaluation"), ("my/copy of it", "blink_paper", "from a local copy")],
)
def test_a_local_copy_is_not_called_the_published_benchmark(data, type_, name):
    card = render_card(FULL, None, {"x.json": made_up_results(data=data)}, None, OURS)
    assert {(score.dataset_type, score.dataset_revision) for score in card.data.eval_results} == {(type_, None)}
    assert all(score.dataset_name.endswith(name) for score in card.data.eval_results) and "my/copy" not in str(card)


def test_latents_switched_off_are_no_result_of_the_model_and_guessing_is_said():
    found = made_up_results()
    card = render_card(FULL, None, {"x.json": found}, None, OURS)
    values = {
        score.metric_value for score in card.data.eval_results if score.metric_name == "accuracy, mean over tasks"
    }
    assert values == {round(100 * found["columns"]["amvl"]["total"], 2)}
    assert "amvl is not shown to be better than guessing" not in card.text
    found["arms"]["amvl"]["intervals"]["total"][0] = 0.4
    found["arms"]["amvl"]["unparsed"] = 7
    text = render_card(FULL, None, {"x.json": found}, None, OURS).text
    assert "**amvl is not shown to be better than guessing, 50.0 per cent.**" in text
    assert "**7 of 24 replies of amvl could not be read.**" in text


def test_a_fingerprint_is_the_files_sha256_an_adapters_first_and_the_caches_by_its_name(tmp_path, monkeypatch):
    assert weights_fingerprint(tmp_path) is None
    one, two = b"one", b"two"
    (tmp_path / "training_args.bin").write_bytes(b"no weights")
    (tmp_path / "model.safetensors").write_bytes(one)
    assert weights_fingerprint(tmp_path) == hashlib.sha256(one).hexdigest()
    (tmp_path / "model.safetensors").unlink()
    lines = ""
    for place, data in enumerate((one, two), start=1):
        name = f"model-0000{place}-of-00002.safetensors"
        (tmp_path / name).write_bytes(data)
        lines += f"{hashlib.sha256(data).hexdigest()}  {name}\n"
    assert weights_fingerprint(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()
    (tmp_path / "adapter_model.safetensors").write_bytes(two)
    assert weights_fingerprint(tmp_path) == hashlib.sha256(two).hexdigest()
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / COMMIT
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / OURS).write_bytes(b"not read")
    (snapshot / "model.safetensors").symlink_to(blobs / OURS)
    assert weights_fingerprint(snapshot) == OURS
    assert weights_fingerprint("someone/not-in-the-cache") is None


def test_the_codes_commit_is_that_of_its_checkout_and_of_no_other(tmp_path):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *words],
            check=True,
            capture_output=True,
        )

    git("init", "-q")
    (tmp_path / "inside").mkdir()
    (tmp_path / "file.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "x")
    found = code_version(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", found["commit"]) and not found["uncommitted"]
    assert code_version(tmp_path / "inside")["commit"] is None  # an environment inside of somebody's repository
    (tmp_path / "file.py").write_text("2")
    code_version.cache_clear()
    assert code_version(tmp_path) == found | {"uncommitted": True}
    code_version.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# What the trainer leaves
# ---------------------------------------------------------------------------------------------------------------------


def test_the_trainer_leaves_facts_that_anybody_may_read(run):
    folder = Path(run.args.output_dir)
    for place in (folder, folder / "checkpoint-1", folder / "checkpoint-2"):
        text = (place / FACTS).read_text() + (place / "README.md").read_text()
        for secret in (TOKEN, str(folder), str(folder.parent), str(Path.home()), "somebody"):
            assert secret not in text
    facts = read_facts(folder)
    assert facts.datasets == {"someone/photos": COMMIT} and facts.licences == {"photos": "cc-by-4.0"}
    assert facts.arguments["learning_rate"] == 0.01 and facts.arguments["eval_steps"] == 1
    assert facts.arguments["model_init_kwargs"] == {"cache_dir": folder.parent.name, "offload_folder": "offload"}
    card = ModelCard.load(folder / "README.md")
    assert (
        metadata_errors(str(card)) == []
        and card.data.license == "cc-by-4.0"
        and card.data.datasets == ["someone/photos"]
    )
    assert "- photos: cc-by-4.0" in card.text and f"- `someone/photos` at `{COMMIT}`" in card.text


def test_the_card_of_the_best_model_tells_its_own_step_and_evaluation(run):
    best = run.state.best_global_step
    assert best == 1 and run.state.global_step == 2
    facts = read_facts(run.args.output_dir)
    (entry,) = (e for e in run.state.log_history if e["step"] == best and "eval_nll_prior" in e)
    assert facts.num_steps == facts.evaluation["step"] == best
    assert facts.evaluation["prior"] == {"nll": entry["eval_nll_prior"], "accuracy": entry["eval_accuracy_prior"]}
    assert read_facts(Path(run.args.output_dir) / "checkpoint-2").evaluation["step"] == 2


def test_the_lines_that_load_it_run_as_they_stand_in_a_process_without_this_repository(run):
    folder = Path(run.args.output_dir)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-c", NO_REPOSITORY + code + "\nprint(answer.shape, type(model).__module__)"]
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"torch\.Size\(\[1, \d+\]\) transformers_modules\.", done.stdout), done.stdout


def test_own_words_and_the_licence_stay(run, checkpoint, caplog):
    words = "## Mine\n\n\n\n- {{ not a template }} | `x`\n\n```\n---\n```"
    card = checkpoint / "README.md"
    card.write_text(
        card.read_text()
        .replace(f"{START}\n{END}", f"{START}\n{words}\n{END}")
        .replace("license: cc-by-4.0", "license: mit")
    )
    for license, shown in ((None, "mit"), ("apache-2.0", "apache-2.0"), (None, "apache-2.0")):
        text = write_card(checkpoint, license=license).read_text()
        assert f"{START}\n{words}\n{END}" in text and f"\nlicense: {shown}\n" in text
    output_dir = run.args.output_dir
    run.args.output_dir = str(checkpoint)  # the trainer's next card
    try:
        run.create_model_card()
        assert f"{START}\n{words}\n{END}" in card.read_text()
        card.write_text(card.read_text().replace(END, ""))
        with pytest.raises(ValueError, match="once each, in this order"):
            write_card(checkpoint)
        before = card.read_text()
        run.create_model_card()  # a run goes on
        assert (checkpoint / "README.before.md").read_text() == before and "README.before.md" in caplog.text
    finally:
        run.args.output_dir = output_dir


def test_where_rows_came_from_survives_mixing(tmp_path):
    parts = []
    for name, licence in (("someone/photos", "photos: mit"), ("some-one/charts.v2", "charts: not stated")):
        rows = Dataset.from_dict({"x": [1]})
        rows.info.homepage, rows.info.license = f"hf://datasets/{name}@{COMMIT}", licence
        parts.append(rows)
    parts[1].info.download_checksums = {f"hf://datasets/some/more@{COMMIT}/data/a.parquet": {}, "https://x/y": {}}
    assert datasets_of(parts[1]) == {"some-one/charts.v2": COMMIT, "some/more": COMMIT}
    mixed = concatenate_datasets(parts).shuffle(seed=0)
    assert datasets_of(mixed) == {"someone/photos": COMMIT, "some-one/charts.v2": COMMIT}
    assert licences_of(mixed.info) == {"photos": "mit", "charts": "not stated"}
    assert datasets_of(parts[0], ["some/VisualData"])["some/VisualData"] is None
    parts[0].save_to_disk(
        tmp_path / "some___visual_data" / "default" / "0.0.0" / COMMIT
    )  # as `load_dataset` calls its folder
    cached = Dataset.from_file(str(next(tmp_path.rglob("*.arrow"))))
    assert datasets_of(cached) == {} and datasets_of(cached, ["some/VisualData"]) == {"some/VisualData": COMMIT}
    parts[0].info.homepage = "hf://datasets/a/b@main and hf://datasets/c/d"
    assert datasets_of(parts[0]) == {"a/b": None, "c/d": None}


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_pushes_a_card_that_the_hub_takes(checkpoint, tmp_path):
    path = saved_results(tmp_path / "results", checkpoint)
    words = [
        str(REPOSITORY / "recipes" / "write_card.py"),
        str(checkpoint),
        "--results",
        str(path),
        "--license",
        "mit",
    ]
    with LoopbackHub() as hub:
        done = subprocess.run(
            [sys.executable, *words, "--push_to_hub", "someone/x"],
            env=hub.environment(tmp_path / "hf") | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        files = hub.models["someone/x"].files
        card = ModelCard(files["README.md"].data.decode())
        assert "POST /api/validate-yaml" in hub.requests and "Pushed: " in done.stdout
    assert card.data.license == "mit" and 'name = "someone/x"' in card.text
    assert "evaluation/blink_paper.json" in files and card.data.eval_results[0].source_url.endswith(
        "evaluation/blink_paper.json"
    )


def test_the_command_line_takes_the_folder_first():
    parser = recipe.HfArgumentParser(recipe.CardArguments)
    (arguments,) = parser.parse_args_into_dataclasses(
        recipe.with_name(["amvl-demo", "--results", "a", "b", "--license", "mit"])
    )
    assert (arguments.checkpoint, arguments.results, arguments.license) == ("amvl-demo", ["a", "b"], "mit")
    with pytest.raises(ValueError, match="give one of them"):
        recipe.CardArguments("x", hub_model_id="a/b", push_to_hub="a/c")


NOT_JSON, A_LIST = "{", "[]"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (FACTS, NOT_JSON, "cannot be read as JSON"),
        (FACTS, A_LIST, "holds a list"),
        (FACTS, "{}", "'latents', 'title'"),
        (FACTS, '{"title": 1, "latents": {}}', r"\['title'\]"),
        (FACTS, '{"title": "a", "latents": {}, "surprise": 1}', "surprise"),
        (FACTS, '{"title": "a", "latents": {}, "evaluation": {"step": 1}}', "evaluation.prior.nll"),
        ("config.json", '{"model_type": "llava"}', "its `model_type` is 'llava'"),
        ("config.json", '{"model_type": "amvl"}', "has no `num_latents`"),
    ],
)
def test_a_folder_that_is_not_as_it_was_saved_is_refused(checkpoint, name, text, message):
    before = (checkpoint / "README.md").read_text()
    (checkpoint / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        write_card(checkpoint)
    assert "`" in str(error.value) and (checkpoint / "README.md").read_text() == before


def broken(values, *path):
    values = json.loads(json.dumps(values))
    inside = values
    for key in path[:-2]:
        inside = inside[key]
    inside[path[-2]] = path[-1]
    return values


@pytest.mark.parametrize(
    "path",
    [
        ("arms", []),
        ("arms", "amvl", None),
        ("columns", "amvl", "total", 1.5),
        ("columns", "chance", {}),
        ("columns", "amvl", "total", float("nan")),
        ("arms", "amvl", "intervals", "total", [0.1]),
        ("arms", "amvl", "unparsed", "0"),
        ("arms", "amvl", "k", "2"),
        ("num_questions", {}),
        ("differences", [{}]),
        ("settings", {}),
        ("data", {}),
    ],
    ids=str,
)
def test_results_that_are_none_are_refused(checkpoint, tmp_path, path):
    file = saved_results(tmp_path / "results", checkpoint)
    file.write_text(json.dumps(broken(json.loads(file.read_text()), *path)))
    with pytest.raises(ValueError, match=f"`{file}` is no `results.json` of recipes/evaluate_amvl.py"):
        write_card(checkpoint, [file])


@pytest.mark.parametrize(
    "path",
    [
        ("verdict", None),
        ("verdict", "word", 1),
        ("changes", {}),
        ("changes", "swapped", "low", None),
        ("settings", {}),
    ],
    ids=str,
)
def test_a_diagnosis_that_is_none_is_refused(checkpoint, tmp_path, path):
    file = tmp_path / "diagnosis.json"
    file.write_text(json.dumps(broken(made_up_diagnosis(weights_fingerprint(checkpoint)), *path)))
    with pytest.raises(ValueError, match=f"`{file}` is no `diagnosis.json` of recipes/diagnose_amvl.py"):
        write_card(checkpoint, diagnosis=file)


def test_what_is_missing_or_unknown_is_named_before_anything_is_written(checkpoint, tmp_path):
    before = (checkpoint / "README.md").read_text()
    for wanted, message in (
        ({"results": [tmp_path / "absent.json"]}, "which is no file"),
        ({"diagnosis": tmp_path / "absent.json"}, "which is no file"),
        ({"license": "Apache 2.0"}, "`license` is 'Apache 2.0', .* write 'apache-2.0'"),
        ({"license": "mine"}, "one of .*apache-2.0.*or leave it out"),
        ({"hub_model_id": "a//b"}, "`hub_model_id` must be the id"),
    ):
        with pytest.raises(ValueError, match=message):
            write_card(checkpoint, **wanted)
    assert (checkpoint / "README.md").read_text() == before
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        write_card(checkpoint)
    with pytest.raises(ValueError, match="is no folder"):
        write_card(tmp_path / "absent")
    with pytest.raises(ValueError, match="`license` is 'Apache 2.0'"):
        AMVLSFTConfig(str(tmp_path), license="Apache 2.0", use_cpu=True, bf16=False)


# ---------------------------------------------------------------------------------------------------------------------
# Any name
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/disk/me/models/llava", "llava"),
        ("~/models/llava", "llava"),
        (Path("/disk/me/x y"), "x y"),
        (r"C:\Users\me\rows", "rows"),
        ("read from /disk/me/rows/a.json, twice", "read from a.json, twice"),
        ("file:///disk/me/a.json", "a.json"),
        ("someone/model", "someone/model"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("https://me:pass@example.org/a", "https://example.org/a"),
        ({"hub_token": "x", "token": "y", "pad_token": "<pad>", "api_key": "z", "Secret": 1}, {"pad_token": "<pad>"}),
        ({1: float("nan"), "b": {3, 1}}, {"1": "nan", "b": [1, 3]}),
        ("1/2 and/or 3", "1/2 and/or 3"),
        (r"(.*\.)?(q_proj|v_proj)", r"(.*\.)?(q_proj|v_proj)"),
    ],
)
def test_what_is_published_has_no_path_of_this_machine_and_no_token(value, shown):
    assert public(value) == shown


def test_a_token_in_a_text_is_left_out():
    assert public("log in with " + "hf_" + "a" * 20) == "log in with"


@pytest.mark.parametrize("name", ["a/b", "a", "A-1/b.c_d"])
def test_ids_are_ids(name):
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["", "/a/b", "a/b/c", "a b", "../a", "a/..", "a/b\n", "é/b", "a--b", None, 1, ".", "~/x", "tests"]
)
def test_paths_and_other_texts_are_no_ids(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert not is_hub_id(name)


PIECES = [
    "|",
    "`",
    "``",
    "\n",
    "\r\n",
    "{{ 1 + 1 }}",
    "{% if %}",
    "<script>",
    "</details>",
    "---",
    "\n---\n",
    "```",
    "![x](y)",
    "[x](y)",
]
PIECES += [
    "'",
    '"',
    "\\",
    ": ",
    "#",
    "- ",
    "&",
    "*",
    "$x$",
    "~~",
    "\u202e",
    "\u2028",
    "é",
    "模",
    "\x00",
    "\ud800",
    "<!-- diagnosis -->",
]
PIECES += ["<!-- own words: -->", "name", "  ", "\t", "@", "!", "%", ">", "=", "_a_", "http://x.y"]
NAMES = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=6).map("".join)


def structure_of(text):
    """Headings, tables and their sizes, code blocks and HTML, in order: what names must not change."""
    kinds = []
    for token in rendered(text):
        if token.type in ("heading_open", "table_open", "th_open", "td_open", "tr_open", "fence", "bullet_list_open"):
            kinds.append(token.type)
        elif token.type == "html_block":
            kinds += re.findall(r"<[^>]*>", token.content)
        for child in token.children or ():
            if child.type in ("link_open", "image", "html_inline"):
                kinds.append(f"{child.type} {child.content} {child.attrs.get('href', child.attrs.get('src', ''))}")
    return kinds


def named(name):
    """A card with a name in every place that takes one."""
    facts = dataclasses.replace(
        FULL,
        title=f"x{name}",
        settings={f"x{name}": f"x{name}", "beta": 1},
        arguments={f"x{name}": {"list": [name, name]}, "b": name},
        licences={f"x{name}": f"x{name}"},
        versions={f"x{name}": name},
        device=f"x{name}",
        code={"version": f"x{name}", "commit": COMMIT, "uncommitted": False},
        datasets={"someone/photos": COMMIT, name: None},
    )
    results = public(json.loads(json.dumps(made_up_results()).replace('"base"', json.dumps(f"x{name}"))))
    results["arms"][public(f"x{name}")]["path"] = f"x{name}"
    diagnosis = made_up_diagnosis()
    diagnosis["settings"]["data"] = f"x{name}"
    diagnosis["changes"][f"x{name}"] = diagnosis["changes"].pop("swapped")
    return render_card(facts, None, {"x.json": results}, diagnosis, OURS)


PLAIN = None


@settings(max_examples=60, deadline=None)
@given(NAMES)
def test_no_name_breaks_a_table_the_metadata_or_the_page(name):
    global PLAIN
    PLAIN = PLAIN or named("")
    card = named(name)
    text = str(card)
    text.encode("utf-8")
    assert structure_of(card.text) == structure_of(PLAIN.text)
    data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert data.keys() == PLAIN.data.to_dict().keys() and ModelCard(text).data.to_dict() == card.data.to_dict()
    assert data["datasets"] in (["someone/photos"], ["someone/photos", name]) and metadata_errors(text) == []
    (block,) = (token.content for token in rendered(card.text) if token.type == "fence" and token.info == "yaml")
    assert set(yaml.safe_load(block)) == {public(f"x{name}"), "b"} or public(f"x{name}") == "b"
    first = next(token.content for token in rendered(card.text) if token.type == "fence" and token.info == "python")
    compile(first, "card", "exec")
    assert 'name = "someone/amvl-small"\n' in first


@settings(max_examples=40, deadline=None)
@given(NAMES)
def test_no_folders_name_breaks_the_code_that_loads_it(name):
    facts = dataclasses.replace(BARE, title=f"x{name}")
    (code,) = (token.content for token in rendered(render_card(facts).text) if token.type == "fence")
    compile(code, "card", "exec")
    (line,) = re.findall(r"^name = (.*)  # the folder", code, re.MULTILINE)
    assert isinstance(json.loads(line), str)


@settings(max_examples=40, deadline=None)
@given(NAMES)
def test_no_source_breaks_a_datasets_card(name):
    def card(name):
        values = {"rows": 2, "licence": f"x{name}", "dropped": {f"x{name}": {"rows": 1}}}
        reports = {"train": {"sources": {f"x{name}": values}, "total": {"rows": 2, "kept": 2}}}
        return render_dataset_card(f"x{name}", reports, {"answer": "answer"})

    found = card(name)
    assert structure_of(found.text) == structure_of(card("").text) and metadata_errors(str(found)) == []
    assert found.data.license == "other"
