"""What a person sees of a run: the summary it leaves behind, its lines and bars, and what its integrations get."""

import importlib.util
import io
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import warnings
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import build_tiny_backbone
from transformers import TrainerCallback

import trainer.bars
from modeling_amvl import AMVLForConditionalGeneration, AMVLProcessor
from trainer import AMVLSFTConfig, AMVLSFTTrainer
from trainer.bars import Lines, bar
from trainer.data.color_steps import build_color_steps
from trainer.pictures import plot_training_curves
from trainer.summary import gap_sentence, recorded, write_summary


class Page(HTMLParser):
    """The text of a page, and what it would load; fails where a tag is not closed."""

    def __init__(self, path):
        super().__init__()
        self.texts, self.sources, self.links, self.open = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name == "src"]
        self.links += [value for name, value in attrs if name == "href"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)


@pytest.fixture(scope="module")
def rows():
    return build_color_steps(8, image_size=48), build_color_steps(4, "held_out", image_size=48)


@pytest.fixture
def run(rows, tmp_path):
    """Returns a function that makes a trainer of a tiny model."""

    def make(callback=None, peft_config=None, evaluates=True, train_dataset=None, **settings):
        backbone, stock = build_tiny_backbone(seed=0)
        processor = AMVLProcessor.from_backbone(stock)
        model = AMVLForConditionalGeneration.from_backbone(
            backbone, num_latents=2, latent_size=4, latent_token_id=processor.latent_token_id
        )
        defaults = {
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "max_steps": 4,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "self_test": False,
            "kl_order": "forward_first",
            "kl_warmup_steps": 2,
            "kl_delay_steps": 2,
        }
        if evaluates:
            defaults |= {"eval_strategy": "steps", "eval_steps": 2}
        return AMVLSFTTrainer(
            model,
            AMVLSFTConfig(str(tmp_path / "run"), **{**defaults, **settings}),
            train_dataset=rows[0] if train_dataset is None else train_dataset,
            eval_dataset=rows[1] if evaluates else None,
            processing_class=processor,
            peft_config=peft_config,
            callbacks=[callback] if callback else None,
        )

    return make


class At(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.act(model)


def assert_summary(folder):
    """The page and the picture are there, whole; returns the page."""
    page = Page(folder / "training_summary.html")
    assert [source.split(",")[0] for source in page.sources] == ["data:image/png;base64"]
    with Image.open(folder / "training_summary.png") as picture:
        picture.load()
        assert picture.width > 1000
    return page


# ---------------------------------------------------------------------------------------------------------------------
# The summary
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_numbers_its_phases_its_warnings_and_says_what_is_where(run, tmp_path, capsys):
    def warn(model):
        for _ in range(2):
            logging.getLogger("trainer.any").warning("of <b>this</b> run")
        warnings.warn("of a library", UserWarning)  # noqa: B028

    trainer = run(At(1, warn), save_strategy="steps", save_steps=2)
    with pytest.warns(UserWarning, match="of a library"):
        trainer.train()
    page = assert_summary(tmp_path / "run")
    assert "Finished: 4 of 4 steps." in page.text
    evaluated = [entry for entry in trainer.state.log_history if "eval_nll_prior" in entry][-1]
    prior, posterior, none = (evaluated[f"eval_nll_{source}"] for source in ("prior", "posterior", "no_latents"))
    assert f"Train-inference gap at step 4, on the evaluation rows: {prior - posterior:+.4f} nats" in page.text
    assert f"{prior:.4f} with latents from the prior" in page.text and f"Without latents it is {none:.4f}" in page.text
    named = "forward warm-up (steps 1 to 1), forward alone (steps 2 to 2), reverse ramp (steps 3 to 3), both (steps 4 to 4)"
    assert named in page.text
    assert "of <b>this</b> run (2 times)" in page.text and "UserWarning: of a library" in page.text
    assert "Rows skipped: 0" in page.text and "Steps dropped, since not finite: 0" in page.text
    assert "rows 8 rows per step 2" in page.text and "2 slots of size 4" in page.text
    assert "4 steps," in page.text and "rows per second" in page.text
    assert {"checkpoint-4", "README.md"} <= set(page.links) and "." not in page.links
    for link in page.links:
        assert (tmp_path / "run" / link).exists()
    assert "training_summary.html" in capsys.readouterr().out

    trainer.save_model()
    page = assert_summary(tmp_path / "run")
    assert {".", "README.md", "checkpoint-4"} <= set(page.links)
    assert "training_summary" not in capsys.readouterr().out  # said once


def test_without_an_evaluation_the_gap_is_that_of_training_rows_or_not_measured(run, tmp_path):
    trainer = run(evaluates=False, max_steps=1)
    trainer.train()
    page = assert_summary(tmp_path / "run")
    (entry,) = [entry for entry in trainer.state.log_history if "ntp" in entry]
    assert f"at step 1, it is {entry['ntp_prior'] - entry['ntp']:+.4f} nats per token" in page.text
    assert "No evaluation was made" in page.text and "None was made." in page.text
    assert "Nothing was saved by the time this was written." in page.text

    run(evaluates=False, max_steps=1, prior_ntp_weight=0.0).train()
    assert "The train-inference gap was not measured" in assert_summary(tmp_path / "run").text


def test_a_run_that_is_stopped_and_its_rest_leave_one_each(run, tmp_path):
    trainer = run(At(2, lambda model: os.kill(os.getpid(), signal.SIGTERM)), save_strategy="steps", save_steps=100)
    with pytest.raises(SystemExit):
        trainer.train()
    page = assert_summary(tmp_path / "run")
    step = trainer.state.global_step
    assert (
        2 <= step < 4 and f"Stopped after {step} of 4 steps by SIGTERM. It goes on from checkpoint-{step}" in page.text
    )
    assert f"checkpoint-{step}" in page.links

    trainer = run()
    trainer.train(resume_from_checkpoint=True)
    page = assert_summary(tmp_path / "run")
    assert "Finished: 4 of 4 steps." in page.text and f"step {step}; time and speed are those of the rest" in page.text
    assert len({entry["step"] for entry in trainer.state.log_history if "ntp" in entry}) == 4  # the curves are whole


def test_a_run_that_stops_at_a_loss_that_is_not_finite_and_one_that_drops_the_step_say_so(run, tmp_path):
    def poison(model):
        with torch.no_grad():
            kept.append(model.latent_projection.weight.clone())
            model.latent_projection.weight.fill_(math.nan)

    def heal(model):
        with torch.no_grad():
            model.latent_projection.weight.copy_(kept[-1])

    kept = []
    with pytest.raises(FloatingPointError):
        run(At(1, poison)).train()
    page = assert_summary(tmp_path / "run")
    assert "Stopped after 1 of 4 steps by FloatingPointError: Not finite at step 2" in page.text

    trainer = run(At(1, poison), on_nan_loss="skip", evaluates=False)
    trainer.add_callback(At(2, heal))
    trainer.train()
    page = assert_summary(tmp_path / "run")
    assert "Steps dropped, since not finite: 1 (`on_nan_loss=skip`)" in page.text


def test_an_adapters_run_says_how_little_it_trains(run, tmp_path):
    trainer = run(peft_config=LoraConfig(r=2, target_modules=["q_proj"]), evaluates=False)
    trainer.train()
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    assert f"{trained:,} are trained, with a PEFT adapter" in assert_summary(tmp_path / "run").text


def test_a_run_that_never_began_leaves_the_last_summary_alone(run, tmp_path):
    run(evaluates=False, max_steps=1).train()
    before = (tmp_path / "run" / "training_summary.html").read_bytes()
    with pytest.raises(ValueError, match="checkpoint"):
        run(evaluates=False).train(resume_from_checkpoint=str(tmp_path / "none"))
    assert (tmp_path / "run" / "training_summary.html").read_bytes() == before


def test_a_summary_that_cannot_be_written_is_a_warning_and_a_run_may_do_without(run, tmp_path, caplog):
    trainer = run(evaluates=False, max_steps=1)
    (tmp_path / "run" / "training_summary.html").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert trainer.train().global_step == 1
    assert "`training_summary.html` could not be written" in caplog.text

    (tmp_path / "run" / "training_summary.html").rmdir()
    (tmp_path / "run" / "training_summary.png").unlink()
    run(evaluates=False, max_steps=1, training_summary=False).train()
    assert not list((tmp_path / "run").glob("training_summary*"))


FACTS = {
    "title": "Training summary: x",
    "end": "Finished",
    "failed": False,
    "gap": "",
    "skipped": "",
    "trained": {},
    "took": {},
    "warnings": Counter(),
    "places": {},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"step": 1, "ntp": 2.0, "forward_kl": 0.0, "reverse_kl": 0.0}],
        [{"step": step, "ntp": value, "forward_kl": value} for step, value in enumerate([math.nan, math.inf, -1.0])],
        [{"step": step, "ntp": math.nan, "forward_kl": math.nan, "active_units": None} for step in range(3)],
        [{"step": step, "forward_kl": value, "phase": "both"} for step, value in enumerate([0.0, 1e-30, 1e30])],
    ],
)
def test_a_history_that_is_empty_not_finite_or_zero_breaks_neither_picture_nor_page(history, tmp_path):
    page = write_summary(FACTS, history, [("warm-up of both", 0, 1), ("both", 1, 3)], tmp_path / "new")
    assert page == tmp_path / "new" / "training_summary.html"
    assert_summary(tmp_path / "new")


def test_evaluations_of_several_datasets_are_told_apart(tmp_path):
    history = [
        {
            "step": 3,
            f"eval_{name}_nll_prior": value,
            f"eval_{name}_nll_posterior": 1.0,
            f"eval_{name}_nll_no_latents": 2.0,
        }
        for name, value in (("a", 1.5), ("b_c", 2.5))
    ]
    sentence = gap_sentence(history)
    assert "at step 3, on `a`: +0.5000" in sentence and "those of the prior are worth 0.5000" in sentence
    assert "at step 3, on `b_c`: +1.5000" in sentence and "those of the prior do not lower the loss" in sentence
    text = Page(write_summary(FACTS, history, [], tmp_path)).text
    assert "a, step 3" in text and "b_c eval_nll_prior" in text


def test_without_matplotlib_the_page_has_the_numbers(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(write_summary(FACTS, [{"step": 1, "ntp": 2.125}], [], tmp_path))
    assert "matplotlib cannot be imported" in page.text and "2.125" in page.text and page.sources == []
    assert not (tmp_path / "training_summary.png").exists()


def test_the_phases_are_shaded_and_numbered_as_far_as_the_run_came(tmp_path):
    history = [{"step": step, "beta": 0.1, "ntp": 1.0} for step in range(1, 11)]
    found = [("forward warm-up", 0, 4), ("forward alone", 4, 8), ("both", 8, 100), ("never", 100, 200)]
    pictures = [tmp_path / "with.png", tmp_path / "without.png"]
    for path, given in zip(pictures, (found, [])):
        plot_training_curves(history, path, "x", given)
    with_phases, without = (np.asarray(Image.open(path).convert("L")).astype(int) for path in pictures)
    assert with_phases.shape == without.shape
    shades = [np.bincount(picture.ravel(), minlength=256)[225:250].sum() for picture in (with_phases, without)]
    assert shades[0] > shades[1] + 10_000  # a grey band in each panel that has curves


WARNS = """
import logging
from collections import Counter
from trainer.summary import recorded

with recorded(counts := Counter()):
    logging.getLogger("trainer.somewhere").warning("seen by a person, too")
    logging.basicConfig(format="formatted: %(message)s")
    logging.getLogger("trainer.somewhere").warning("seen once")
print(sorted(counts.items()))
"""


def test_a_warning_that_is_noted_is_still_printed_once():
    """`logging` itself prints what no handler takes, and the one that notes it takes it."""
    command = [sys.executable, "-c", WARNS]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    printed = [line for line in finished.stderr.splitlines() if "seen" in line]
    assert printed == ["seen by a person, too", "formatted: seen once"]
    assert finished.stdout.strip() == "[('seen by a person, too', 1), ('seen once', 1)]"


def test_what_is_warned_of_is_counted_and_still_shown():
    counts, shown = Counter(), warnings.showwarning
    with pytest.warns(UserWarning, match="once"), recorded(counts):
        warnings.warn("once", UserWarning, stacklevel=1)
        logging.getLogger("transformers.models.any").warning("a %s", "thing")
        logging.getLogger("someone.else").warning("not ours")
        for number in range(100):
            logging.getLogger("trl.x").warning("number %d", number)
    assert counts["UserWarning: once"] == counts["a thing"] == 1 and "not ours" not in counts and len(counts) == 50
    assert warnings.showwarning is shown
    logging.getLogger("trainer.x").warning("later")
    assert "later" not in counts


# ---------------------------------------------------------------------------------------------------------------------
# Lines and bars
# ---------------------------------------------------------------------------------------------------------------------


def test_the_phase_is_in_the_history_and_in_what_is_printed_and_nowhere_else(run, capsys):
    seen = []

    class Integration(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = run(Integration())
    trainer.train()
    expected = ["forward warm-up", "forward alone", "reverse ramp", "both"]
    history = trainer.state.log_history
    assert [entry.get("phase") for entry in history if "loss" in entry] == expected
    assert all("phase" not in entry for entry in history if "loss" not in entry)
    assert len(seen) == len(history) and all(
        isinstance(value, (int, float)) for logs in seen for value in logs.values()
    )
    for entry in history:  # what the weights say
        if "loss" in entry:
            assert (entry["beta"] > 0, entry["gamma"] > 0) == (True, entry["phase"] in ("reverse ramp", "both"))
    out, err = capsys.readouterr()
    assert re.findall(r"'phase': '([^']*)'", out) == expected
    assert "Phases: forward warm-up (steps 1 to 1), forward alone (steps 2 to 2), reverse ramp (steps 3 to 3)" in out
    assert "Step 3 of 4: reverse ramp." in out
    assert "Training 4/4 (100%) after 00:0" in err and "(both)" in err
    assert not re.search(r"[\r\x1b]", out + err)

    run(disable_tqdm=True).train()
    out, err = capsys.readouterr()
    assert re.findall(r"'phase': '([^']*)'", out) == expected and "Training 4/4" not in err


def test_a_pipe_gets_whole_lines_with_time_left_and_a_terminal_a_bar(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(trainer.bars.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    progress = bar(total=200, desc="Asking", file=out, leave=False)
    assert isinstance(progress, Lines)
    monkeypatch.setattr(progress, "_time", lambda: clock[0])
    progress.start_t = clock[0]
    for _ in range(10):
        clock[0] += 7.0
        progress.update(10)
        progress.set_postfix_str("slow")
    progress.clear()
    progress.close()
    progress.close()
    lines = out.getvalue().splitlines()
    assert lines == [
        "Asking 50/200 (25%) after 00:35, 01:45 left (slow)",
        "Asking 100/200 (50%) after 01:10, 01:10 left (slow)",
        "Asking 100/200 (50%) after 01:10 (slow)",
    ]
    assert not re.search(r"[\r\x1b]", out.getvalue())

    out = io.StringIO()
    assert list(bar(range(5), desc="Short", leave=False, file=out)) == list(range(5)) and out.getvalue() == ""
    assert list(bar(iter("ab"), desc="No total", file=out)) == ["a", "b"]
    assert out.getvalue() == "No total 2 after 00:00\n"

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    assert list(bar(range(3), desc="Here", file=out)) == [0, 1, 2] and "\r" in out.getvalue()
    monkeypatch.setenv("RANK", "1")
    out = io.StringIO()
    assert list(bar(range(3), file=out)) == [0, 1, 2] and out.getvalue() == ""


# ---------------------------------------------------------------------------------------------------------------------
# Integrations
# ---------------------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_every_number_that_is_logged(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = run(report_to="tensorboard")
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    expected = {}
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            if key not in ("step", "phase"):
                group, name = ("eval", key.removeprefix("eval_")) if key.startswith("eval_") else ("train", key)
                expected.setdefault(f"{group}/{name}", []).append((entry["step"], value))
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found.keys() == expected.keys()
    for tag, points in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points]
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in points], rel=1e-5)
    names = [
        "ntp",
        "ntp_prior",
        "forward_kl",
        "reverse_kl",
        "beta",
        "gamma",
        "active_units",
        "prior_std",
        "posterior_std",
    ]
    assert {f"train/{name}" for name in names} <= found.keys()
    assert {f"eval/nll_{source}" for source in ("prior", "posterior", "no_latents")} <= found.keys()
    assert "hf_" not in json.dumps(
        [event.tensor_proto.string_val[0].decode() for event in events.Tensors("args/text_summary")]
    )


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("tensorboards", ValueError, "tensorboards is not supported, only .*tensorboard"),
        ("comet_ml", RuntimeError, "CometCallback requires comet-ml.* to be installed"),
    ],
)
def test_an_integration_that_is_unknown_or_not_installed_is_told_before_anything_is_loaded(
    name, error, message, tmp_path
):
    if name == "comet_ml" and importlib.util.find_spec("comet_ml"):
        pytest.skip("comet_ml is installed")
    with pytest.raises(error, match=message):
        AMVLSFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=name)
