"""What a model card says of a diagnosis: verdict and main table, between markers, so that a later diagnosis replaces it."""

import re
from pathlib import Path


START, END = "<!-- diagnosis -->", "<!-- /diagnosis -->"
HEADING = "## Does it use its latents?"
NOT_MEASURED = re.compile(r"\n*Not measured: this run had\s+no evaluation split\.")
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
        f"**Verdict: {verdict['word']}.** {verdict['paragraph']}",
        "",
        f"{changes['own']['num_rows']} questions of {_cell(settings['data'])}, greedy, latents at temperature 0, seed {settings['seed']}; against each "
        "row's own Z with all else fixed, with 95% intervals (bootstrap, paired).",
        "",
        "| latents | rows | accuracy | change, points | other answers | change of log p(gold), nats |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, found in changes.items():
        label = BESIDE.get(name, name)
        if found is None:
            lines.append(f"| {label} | 0 | | no two rows to exchange | | |")
        elif name == "own":
            lines.append(f"| own Z | {found['num_rows']} | {_percent(found['accuracy'])} | | | |")
        else:
            lines.append(
                f"| {label} | {found['num_rows']} | {_percent(found['accuracy'])} | {_points(found)} | {_percent(found['flip_rate'])} | "
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
        ValueError: there is no card.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`{path}` is missing: there is no card to update. `AMVLSFTTrainer.save_model` writes one.")
    text, section = path.read_text(encoding="utf-8"), marked(diagnosis)
    if START in text and END in text:
        before, rest = text.split(START, 1)
        text = before + section + rest.split(END, 1)[1]
    elif HEADING in text:
        before, rest = text.split(HEADING, 1)
        text = f"{before}{HEADING}\n\n{section}{NOT_MEASURED.sub('', rest, count=1)}"
    else:
        text = f"{text.rstrip()}\n\n{HEADING}\n\n{section}\n"
    path.write_text(text, encoding="utf-8")


def marked(diagnosis):
    """The section between its markers."""
    return f"{START}\n{render_diagnosis(diagnosis)}\n{END}"


def _percent(value):
    return f"{100 * value:.1f}%"


def _points(found):
    return f"{100 * found['difference']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def _cell(text):
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
