"""What a model card says of a diagnosis: verdict and main table, between markers, so that a later diagnosis replaces it."""

import json
import re
from pathlib import Path

from .markdown import cell, percent, points, sentence
from .provenance import refuse_other_weights


START, END = "<!-- diagnosis -->", "<!-- /diagnosis -->"
HEADING = "## Does it use its latents?"
MARKED = re.compile(rf"^{START}[ \t]*$.*?^{END}[ \t]*$", re.M | re.S)
MARKER = re.compile(rf"^(?:{START}|{END})[ \t]*$", re.M)
SECTION = re.compile(rf"(^{re.escape(HEADING)}[ \t]*$)(.*?)(?=^#{{1,2}} |\Z)", re.M | re.S)
NOT_MEASURED = re.compile(
    r"\n*Not measured: (?:this run had\s+no evaluation split|no evaluation was made before this was saved|nothing here says so)\."
    r"| ?Whether another row's latents would do as well was not measured\."
)
NUMBERS = (
    "accuracy",
    "difference",
    "low",
    "high",
    "flip_rate",
    "text_flip_rate",
    "log_prob",
    "log_prob_low",
    "log_prob_high",
)
# The posterior's arms are no interventions on what inference reads.
BESIDE = {"posterior": "posterior Z, which has read the answer", "wrong posterior": "posterior Z of a wrong answer"}


def render_diagnosis(diagnosis):
    """
    Verdict and main table of a diagnosis as Markdown.

    Args:
        diagnosis (`dict`): what recipes/diagnose_amvl.py wrote as `diagnosis.json`.

    Returns:
        `str`.
    """
    verdict, settings = diagnosis["verdict"], diagnosis["settings"]
    changes = diagnosis["changes"]
    lines = [
        f"**Verdict: {cell(verdict['word'])}.** {sentence(verdict['paragraph'])}",
        "",
        f"{changes['own']['num_rows']} questions of {cell(settings['data'])}, greedy, latents at temperature 0, seed {cell(settings['seed'])}; against each "
        "row's own Z with all else fixed, with 95% intervals (bootstrap, paired).",
        "",
        "| latents | rows | accuracy | change, points | other answers / other texts | change of log p(gold), nats |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in changes.items():
        label = BESIDE.get(name, cell(name))
        if found is None:
            lines.append(f"| {label} | 0 | | no two rows to exchange | | |")
        elif name == "own":
            lines.append(f"| own Z | {found['num_rows']} | {percent(found['accuracy'])} | | | |")
        else:
            lines.append(
                f"| {label} | {found['num_rows']} | {percent(found['accuracy'])} | {points(found)} | {percent(found['flip_rate'])} / "
                f"{percent(found['text_flip_rate'])} | "
                f"{found['log_prob']:+.3f} ({found['log_prob_low']:+.3f} to {found['log_prob_high']:+.3f}) |"
            )
    lines += [
        "",
        "Shared mean: each slot's mean over the rows. A slot alone: the others hold that mean. Swapped: each row gets the Z of "
        "another, never one equal to its own.",
    ]
    return "\n".join(lines)


def update_card(path, diagnosis):
    """
    Writes a diagnosis into the card of a checkpoint, in the place of an earlier one.

    Args:
        path (`str` or `Path`): the card, `README.md` of the checkpoint's folder.
        diagnosis (`dict`): see [`render_diagnosis`].

    Raises:
        ValueError: see [`check_card`]; or the weights beside the card are not those that were diagnosed.
    """
    text, section = check_card(path), marked(diagnosis)
    path = Path(path)
    refuse_other_weights(path.parent, diagnosis.get("weights_sha256"), "the diagnosis")
    if MARKED.search(text):
        text = MARKED.sub(lambda _: section, text, count=1)
    elif SECTION.search(text):
        text = SECTION.sub(lambda found: f"{found[1]}\n\n{section}{NOT_MEASURED.sub('', found[2])}", text, count=1)
    else:
        text = f"{text.rstrip()}\n\n{HEADING}\n\n{section}\n"
    path.write_text(text, encoding="utf-8")
    kept = path.parent / "diagnosis" / "diagnosis.json"  # from which the card is written anew
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(diagnosis, indent=2), encoding="utf-8")


def check_diagnosis(diagnosis, path):
    """
    Refuses what is no `diagnosis.json` of recipes/diagnose_amvl.py, before any of it gets into a card.

    Args:
        diagnosis (`dict`): what the file holds.
        path (`str` or `Path`): how an error calls it.

    Raises:
        ValueError: something is missing, or of another kind.
    """
    parts = {name: diagnosis.get(name) for name in ("verdict", "settings", "changes")}
    wrong = [name for name, value in parts.items() if not isinstance(value, dict)]
    if not wrong:
        wrong = [f"verdict.{key}" for key in ("word", "paragraph") if not isinstance(parts["verdict"].get(key), str)]
        wrong += [f"settings.{key}" for key in ("data", "seed") if key not in parts["settings"]]
        wrong += [] if isinstance(parts["changes"].get("own"), dict) else ["changes.own"]
        for name, found in parts["changes"].items():
            needed = ("num_rows", "accuracy") if name == "own" else ("num_rows", *NUMBERS)
            given = found if isinstance(found, dict) else {}
            numbers = [key for key in needed if isinstance(given.get(key), (int, float))]
            wrong += [f"changes.{name}.{key}" for key in needed if found is not None and key not in numbers]
    if not isinstance(diagnosis.get("weights_sha256"), str | None):
        wrong.append("weights_sha256")
    if wrong:
        raise ValueError(
            f"`{path}` is no `diagnosis.json` of recipes/diagnose_amvl.py: it has no or other values of {wrong[:5]}. Diagnose again."
        )
    diagnosis.setdefault("weights_sha256", None)


def check_card(path):
    """
    The text of a card into which a diagnosis can be written.

    Raises:
        ValueError: there is no card, or its markers are no pair.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`{path}` is missing: there is no card to update. `AMVLSFTTrainer.save_model` writes one.")
    text = path.read_text(encoding="utf-8")
    found = [line.strip() for line in MARKER.findall(text)]
    if found not in ([], [START, END]):
        raise ValueError(
            f"`{path}` must have the lines {START} and {END} once each, in this order, got {found}: mend it."
        )
    return text


def marked(diagnosis):
    """The section between its markers."""
    return f"{START}\n{render_diagnosis(diagnosis)}\n{END}"
