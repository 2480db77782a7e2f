"""What is left to look at of every run: `training_summary.html`, one file, and its curves as `training_summary.png`."""

import contextlib
import functools
import html
import logging
import math
import os
import re
import signal
import time
import warnings
from base64 import b64encode
from collections import Counter
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import torch
from peft import PeftModel
from transformers.trainer_pt_utils import get_model_param_count

from .console import describe, phase_behind, schedule_of
from .data.report import write_atomically
from .data.report_page import html_page
from .describing import VERSIONED_PACKAGES
from .pictures import PANELS, plot_training_curves, points_of
from .schedules import phases
from .sft_config import OBJECTIVE


logger = logging.getLogger(__name__)

NAME = "training_summary"
LIBRARIES = ("trainer", "modeling_amvl", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed")
MOST_WARNINGS = 50  # different ones
NUM_NUMBERS = 12  # lines of the table of logged numbers
SOURCES = {
    "prior": "the prior, as at inference",
    "posterior": "the posterior, which has read the answer",
    "no_latents": "no latents",
}
STYLE = """
.curves { margin: 1rem 0; background: #fff; }
.curves img { width: 100%; }
table.facts td { white-space: normal; text-align: left; }
h2 { margin-top: 1.6rem; }
"""


class SummaryMixin:
    """
    How a [`~transformers.Trainer`] leaves `training_summary.html` behind, in its `output_dir`, however its run ends.

    The first process writes it, without waiting for the others. What goes wrong with it is a warning: no run fails by it.
    """

    _began = None  # time and step of the first step of this run, or of its rest
    _ended = None  # seconds it took, and what ended it
    _num_rows_taken = 0
    _summary_told = False

    def train(self, *args, **kwargs):
        self._began, self._ended, self._summary_told, error = None, None, False, None
        with recorded(self._warnings):
            try:
                return super().train(*args, **kwargs)
            except BaseException as raised:
                error = raised
                raise
            finally:
                if self._began is not None:
                    self._ended = time.monotonic() - self._began[0], error
                    self._summarise()

    def _begin(self, checkpoint):
        super()._begin(checkpoint)
        self._began, self._num_rows_taken = (time.monotonic(), self.state.global_step), 0

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        if "loss" in logs and (name := phase_behind(self.args, self.state)) is not None:
            self.state.log_history[-1]["phase"] = name  # there alone: integrations want numbers

    def save_whole_model(self, output_dir):
        super().save_whole_model(output_dir)
        if self._ended is not None and Path(output_dir) == Path(self.args.output_dir):
            self._summarise()  # which says where the model is

    def _summarise(self):
        if not self.args.training_summary or not self.is_world_process_zero():
            return
        try:
            page = write_summary(self._facts(), self.state.log_history, self._phases(), self.args.output_dir)
        except Exception as error:
            logger.warning("`%s.html` could not be written: %s: %s", NAME, type(error).__name__, error)
        else:
            if not (self.args.disable_tqdm or self._summary_told):
                with contextlib.suppress(OSError, ValueError):  # nobody listens, or not in these letters
                    print(f"Training summary: {page}")
            self._summary_told = True

    def _phases(self):
        schedule = schedule_of(self.args, self.state)
        return [] if schedule is None else phases(*schedule)

    def _facts(self):
        args, state = self.args, self.state
        seconds, error = self._ended
        model = self.accelerator.unwrap_model(self.model)
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        config, rows = inner.config, self.train_dataset
        num_all, num_trained = (get_model_param_count(model, trainable_only=only) for only in (False, True))
        num_steps = state.global_step - self._began[1]
        engine = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP" if self.is_fsdp_enabled else None
        device = args.device
        trained = {
            "backbone": name_of(config.backbone_config._name_or_path, type(inner.backbone).__name__),
            "latents": f"{config.num_latents} slots of size {config.latent_size}",
            "parameters": f"{num_all:,}, of which {num_trained:,} are trained"
            + (", with a PEFT adapter" if isinstance(model, PeftModel) else ""),
            "rows": f"{len(rows):,}" if hasattr(rows, "__len__") else "a stream",
            "rows per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "passes over the rows": f"{state.epoch:.2f}" if state.epoch is not None else "not known",
            **{name: getattr(args, name) for name in (*OBJECTIVE, "freeze_vision", "learning_rate", "seed")},
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else str(inner.dtype).removeprefix("torch."),
            "processes": f"{args.world_size}{f', {engine}' if engine else ''}",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "versions": ", ".join(f"{name} {version(name)}" for name in VERSIONED_PACKAGES),
        }
        took = {"time": f"{duration(seconds)}, evaluations and saving included"}
        if self._began[1]:
            took["gone on from"] = f"step {self._began[1]}; time and speed are those of the rest"
        if num_steps > 0 and seconds > 0:
            took["speed"] = (
                f"{num_steps:,} steps, {seconds / num_steps:.3g} s each; {self._num_rows_taken / seconds:.3g} rows per second"
            )
        if device.type == "cuda":
            took["GPU memory"] = (
                f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB at most, of the first process"
            )
        return {
            "title": f"Training summary: {Path(args.output_dir).absolute().name}",
            "end": ending(state, error, self._saved_in),
            "failed": error is not None,
            "gap": gap_sentence(state.log_history),
            "skipped": skipped_sentence(self._num_skipped_rows, self._num_dropped, args),
            "trained": trained,
            "took": took,
            "warnings": self._warnings,
            "places": places(Path(args.output_dir), self._saved_in, state.best_model_checkpoint),
        }


def keeps_warnings(init):
    """A constructor whose warnings the summary shows, too."""

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        self._warnings = Counter()
        with recorded(self._warnings):
            init(self, *args, **kwargs)

    return wrapped


def _handlers_of(name):
    logger = logging.getLogger(name)
    while logger is not None:
        yield from logger.handlers
        logger = logger.parent if logger.propagate else None


class _Recorder(logging.Handler):
    def __init__(self, counts):
        super().__init__(logging.WARNING)
        self.counts = counts

    def emit(self, record):
        self.note(record.getMessage())
        # `logging` prints to stderr what meets no handler at all; this one must not be why it no longer does.
        others = [handler for handler in _handlers_of(record.name) if handler is not self]
        if not others and logging.lastResort is not None:
            logging.lastResort.handle(record)

    def note(self, text):
        text = " ".join(text.split())
        if text in self.counts or len(self.counts) < MOST_WARNINGS:
            self.counts[text] += 1


@contextlib.contextmanager
def recorded(counts):
    """
    Counts what the libraries of a run warn of, through `logging` and through `warnings`; it is shown as ever.

    Args:
        counts (`Counter`): by message, filled.
    """
    recorder = _Recorder(counts)
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    show = warnings.showwarning

    def note(message, category, filename, lineno, file=None, line=None):
        recorder.note(f"{category.__name__}: {message}")
        show(message, category, filename, lineno, file, line)

    for each in loggers:
        each.addHandler(recorder)
    warnings.showwarning = note
    try:
        yield
    finally:
        if warnings.showwarning is note:
            warnings.showwarning = show
        for each in loggers:
            each.removeHandler(recorder)


# ---------------------------------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------------------------------


def ending(state, error, checkpoint=None):
    """`str`: how far a run came, what ended it, and how it goes on."""
    steps = f"{state.global_step:,} of {state.max_steps:,} steps"
    if error is None:
        return f"Finished: {steps}." if state.global_step >= state.max_steps else f"Ended early: {steps}."
    if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:
        why = "SIGTERM"
    elif isinstance(error, KeyboardInterrupt):
        why = "Ctrl-C"
    else:
        why = f"{type(error).__name__}: {error}"
    rest = f" It goes on from {Path(checkpoint).name} with `resume_from_checkpoint=True`." if checkpoint else ""
    return f"Stopped after {steps} by {why.removesuffix('.')}.{rest}"


def last_evaluations(log_history):
    """
    The newest evaluation of each dataset.

    Returns:
        `dict[str, tuple[int, dict[str, float]]]`: by dataset, `""` where there is but one: its step, and `nll_*`, `accuracy_*` and
        `token_accuracy_*`.
    """
    found = {}
    for entry in log_history:
        for key in entry:
            if match := re.fullmatch(r"eval_(?:(.+)_)?nll_prior", key):
                prefix = f"eval_{match[1]}_" if match[1] else "eval_"
                values = {
                    f"{kind}_{source}": entry[f"{prefix}{kind}_{source}"]
                    for kind in ("nll", "accuracy", "token_accuracy")
                    for source in SOURCES
                    if f"{prefix}{kind}_{source}" in entry
                }
                found[match[1] or ""] = (entry["step"], values)
    return found


def gap_sentence(log_history):
    """`str`: the train-inference gap and what the latents are worth, from what was logged and from nothing else."""
    sentences = []
    for dataset, (step, values) in last_evaluations(log_history).items():
        prior, posterior, none = (values.get(f"nll_{source}", math.nan) for source in SOURCES)
        where = f"on `{dataset}`" if dataset else "on the evaluation rows"
        sentences.append(
            f"Train-inference gap at step {step:,}, {where}: {signed(prior - posterior)} nats per token ({prior:.4f} with latents "
            f"from the prior, as at inference, {posterior:.4f} from the posterior, which has read the answer). "
            + worth(prior, none)
        )
    if sentences:
        return " ".join(sentences)
    trained = [entry for entry in log_history if "ntp" in entry and "ntp_prior" in entry]
    if trained:
        step, prior, posterior = (trained[-1][key] for key in ("step", "ntp_prior", "ntp"))
        return (
            "No evaluation was made, so the train-inference gap is not measured on other rows than those of training. There, as "
            f"last logged at step {step:,}, it is {signed(prior - posterior)} nats per token ({prior:.4f} with latents drawn from the "
            f"prior, {posterior:.4f} from the posterior). Without latents nothing was measured."
        )
    return "The train-inference gap was not measured: there was no evaluation, and nothing was decoded from the prior."


def worth(prior, none):
    if not (math.isfinite(prior) and math.isfinite(none)):
        return f"Without latents: {none:.4f}."
    if prior < none:
        return f"Without latents it is {none:.4f}: those of the prior are worth {none - prior:.4f} nats per token."
    return f"Without latents it is {none:.4f}: those of the prior do not lower the loss."


def skipped_sentence(num_rows, num_steps, args):
    """`str`: rows and steps that were left out."""
    return (
        f"Rows skipped: {num_rows:,} (`on_bad_row={args.on_bad_row}`). Steps dropped, since not finite: {num_steps:,} "
        f"(`on_nan_loss={args.on_nan_loss}`)."
    )


def places(folder, checkpoint, best):
    """`dict[str, str]`: what is where, as paths from `folder`, where they are inside."""
    found = {}
    if any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").is_file():
        found["model"] = "."
    if checkpoint is not None:
        found["last checkpoint"] = checkpoint
    if best is not None:
        found["best checkpoint"] = best
    for path in (folder, checkpoint):
        if path is not None and (Path(path) / "README.md").is_file():
            found.setdefault("card", Path(path) / "README.md")
    for page in sorted(folder.glob("data_report/*/report.html")):
        found[f"report on the rows, {page.parent.name}"] = page
    return {name: os.path.relpath(path, folder) if path != "." else "." for name, path in found.items()}


def signed(value):
    return f"{value:+.4f}" if math.isfinite(value) else str(value)


def duration(seconds):
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def name_of(path, kind):
    """A Hub id, or the class alone: no folder of this machine."""
    return kind if not path or os.path.isabs(path) or Path(path).exists() else f"{path} ({kind})"


# ---------------------------------------------------------------------------------------------------------------------
# On a page
# ---------------------------------------------------------------------------------------------------------------------


def write_summary(facts, log_history, found_phases, folder):
    """
    Writes `training_summary.html` and, where matplotlib can be imported, `training_summary.png`.

    Args:
        facts (`dict`): what the page says, as a [`SummaryMixin`] collects it.
        log_history (`list[dict]`): `trainer.state.log_history`.
        found_phases (`list[tuple[str, int, int]]`): [`~trainer.schedules.phases`] of the run.
        folder (`str` or `Path`): where to write; made if it is missing.

    Returns:
        `Path`: the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    picture, no_picture = None, ""
    try:
        drawn = BytesIO()
        plot_training_curves(log_history, drawn, facts["title"], found_phases)
        picture = drawn.getvalue()
        (folder / f"{NAME}.png").write_bytes(picture)
    except ImportError as error:
        no_picture = f"No picture, since matplotlib cannot be imported ({error}): `pip install matplotlib`."
    except Exception as error:
        no_picture = f"No picture, since it could not be drawn: {type(error).__name__}: {error}"
    page = folder / f"{NAME}.html"
    write_atomically(
        page, html_page(facts["title"], _body(facts, log_history, found_phases, picture, no_picture), STYLE)
    )
    return page


def _body(facts, log_history, found_phases, picture, no_picture):
    parts = [
        f'<p class="{"alarm" if facts["failed"] else "sum"}">{_text(facts["end"])}</p>',
        f"<p>{_text(facts['gap'])}</p>",
        f"<p>{_text(facts['skipped'])}</p>",
    ]
    if picture is not None:
        image = b64encode(picture).decode()
        parts.append(
            f'<p class="curves"><img src="data:image/png;base64,{image}" alt="Curves of the run; the numbers are below"></p>'
        )
    else:
        parts.append(f'<p class="alarm">{_text(no_picture)}</p>')
    if found_phases:
        parts.append(f"<p>Phases of the KL terms as scheduled: {_text(describe(found_phases))}.</p>")
    parts.append(f"<h2>Last evaluation</h2>{_evaluations(last_evaluations(log_history))}")
    parts.append(f"<h2>What was trained</h2>{_facts_table(facts['trained'])}")
    parts.append(f"<h2>Time</h2>{_facts_table(facts['took'])}")
    links = {
        name: f'<a href="{html.escape(path)}">{_text("this folder" if path == "." else path)}</a>'
        for name, path in facts["places"].items()
    }
    nothing = "<p>Nothing was saved by the time this was written.</p>"
    parts.append(f"<h2>Where it is</h2>{_facts_table(links, escaped=True) if links else nothing}")
    told = "".join(
        f"<li>{_text(text)}{f' ({count:,} times)' if count > 1 else ''}</li>"
        for text, count in facts["warnings"].items()
    )
    parts.append(f"<h2>Warnings</h2>{f'<ul>{told}</ul>' if told else '<p>None.</p>'}")
    parts.append(f"<h2>Numbers</h2>{_numbers(log_history)}")
    return "\n".join(parts)


def _evaluations(found):
    if not found:
        return "<p>None was made.</p>"
    lines = []
    for dataset, (step, values) in found.items():
        for source, told in SOURCES.items():
            cells = [
                f"{values.get(f'{kind}_{source}', math.nan):.4f}" for kind in ("nll", "accuracy", "token_accuracy")
            ]
            lines.append(_line([f"{dataset}, step {step:,}" if dataset else f"step {step:,}", told, *cells]))
    heads = ["evaluation", "latents from", "NLL, nats per token", "rows right token by token", "tokens right"]
    return _table(heads, lines, "Teacher-forced: each token after the right ones before it.")


def _numbers(log_history):
    """A few of the logged numbers, evenly spread, for who has no picture or wants digits."""
    keys = [key for _, curves in PANELS for key in curves]
    points = {
        f"{dataset} {key}".strip(): dict(values)
        for key in keys
        for dataset, values in points_of(log_history, key).items()
    }
    steps = sorted({step for values in points.values() for step in values})
    if not steps:
        return "<p>Nothing was logged.</p>"
    if len(steps) > NUM_NUMBERS:
        steps = [steps[round(place * (len(steps) - 1) / (NUM_NUMBERS - 1))] for place in range(NUM_NUMBERS)]
    lines = [
        _line([f"{step:,}", *(f"{values[step]:.4g}" if step in values else "" for values in points.values())])
        for step in steps
    ]
    return _table(["step", *points], lines, "Means since the log before; some of the logs, evenly spread.")


def _facts_table(facts, escaped=False):
    lines = "".join(
        f"<tr><th>{_text(name)}</th><td>{value if escaped else _text(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f'<div class="wide"><table class="facts"><tbody>{lines}</tbody></table></div>'


def _table(heads, lines, caption):
    cells = "".join(f"<th>{_text(head)}</th>" for head in heads)
    return (
        f'<div class="wide"><table><caption>{_text(caption)}</caption><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _line(cells):
    return f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>"


def _text(value):
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode("utf-8"))
