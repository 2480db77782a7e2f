"""Writes a diagnosis: verdict first, then its tables; as JSON, as a page, and into a model card."""

import json
from pathlib import Path

from model_cards import render_diagnosis
from model_cards.markdown import percent, points, sentence

from .verdict import NOT_COMPARED, SFT


def write_report(diagnosis, output_dir):
    """
    Writes `diagnosis.json` and `diagnosis.md`.

    Args:
        diagnosis (`dict`): what [`~trainer.diagnostics.diagnose.diagnose`] gave, with `settings` and `pictures`.
        output_dir (`str` or `Path`): the folder; it is made.

    Returns:
        `Path`: the page.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "diagnosis.json").write_text(json.dumps(diagnosis, indent=1), encoding="utf-8")
    page = folder / "diagnosis.md"
    page.write_text(render_page(diagnosis), encoding="utf-8")
    return page


def render_page(diagnosis):
    """The page, verdict first."""
    sections = [
        "# Are the latents used?",
        render_diagnosis(diagnosis),
        _settings(diagnosis),
        _controls(diagnosis),
        _kinds(diagnosis),
        _gap(diagnosis),
        _structure(diagnosis),
        _reading(diagnosis),
        *(f"![{name}]({file})" for name, file in diagnosis["pictures"].items()),
        *diagnosis["left_out"],
        "" if SFT in diagnosis["controls"] else NOT_COMPARED,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _settings(diagnosis):
    shown = {**diagnosis["settings"], "unparsed replies": diagnosis["num_unparsed"]}
    return "; ".join(f"{name} {value}" for name, value in shown.items()) + "."


def _controls(diagnosis):
    base = diagnosis["baselines"]
    rows = [["latents, own Z", percent(diagnosis["changes"]["own"]["accuracy"]), ""]]
    rows += [[f"`{name}`", percent(found["accuracy"]), points(found)] for name, found in diagnosis["controls"].items()]
    rows += [["constant answer per kind", percent(base["constant"]), ""]]
    if base["chance"] is not None:
        rows += [["chance", percent(base["chance"]), ""]]
    return _table("Beside it", ["", "accuracy", "minus own Z, points"], rows)


def _kinds(diagnosis):
    if diagnosis["by_kind"] is None:
        return ""
    rows = [
        [kind, found["num_rows"], percent(found["own"]), percent(found["swapped"]), points(found)]
        for kind, found in diagnosis["by_kind"].items()
    ]
    return _table("What a swap costs, by kind", ["kind", "rows", "own Z", "swapped", "change, points"], rows)


def _gap(diagnosis):
    changes, nll, found, copied = (diagnosis[key] for key in ("changes", "nll", "divergence", "copying"))
    rows = [
        ["accuracy, prior Z / posterior Z", f"{percent(changes['own']['accuracy'])} / {percent(changes['posterior']['accuracy'])}"],
        ["train-inference gap, points", points(changes["posterior"])],
        ["-log p(gold), nats per answer, prior Z / posterior Z / off", " / ".join(f"{nll[key]:.3f}" for key in ("own", "posterior", "latents off"))],
        ["wrong answer said: posterior that read it / prior", f"{percent(copied['rate'])} / {percent(copied['base_rate'])}, {points(copied)}"],
        ["forward / reverse KL, nats per slot", f"{found['forward_kl']:.3g} / {found['reverse_kl']:.3g}"],
        ["forward KL of each slot", ", ".join(f"{value:.3g}" for value in found["forward_kl_by_slot"])],
        ["active units (forward KL above 0.01 nats)", f"{found['active_units']:.0f} of {found['num_units']}"],
        ["mean deviation, prior / posterior", f"{found['prior_std']:.3g} / {found['posterior_std']:.3g}"],
        ["spread of the means over rows, prior / posterior", f"{found['prior_spread']:.3g} / {found['posterior_spread']:.3g}"],
        ["norm of an injected latent over that of a token embedding", f"{diagnosis['norm_ratio']:.2f}"],
    ]  # fmt: skip
    return _table("Posterior against prior", ["", ""], rows)


def _structure(diagnosis):
    rows = [
        [name, "" if found["within"] is None else f"{found['within']:.2f}", f"{found['across']:.2f}"]
        for name, found in diagnosis["structure"].items()
    ]
    return _table("Mean cosine (no figure of quality)", ["", "within a row", "across rows"], rows)


def _reading(diagnosis):
    rows = []
    for name, found in diagnosis["sensitivity"].items():
        value = "no rows to exchange" if found is None else f"{found['distance']:.2f} ({found['num_rows']} rows)"
        rows.append([f"Z moves under another {name}, 1 = as far as another row's Z", value])
    for name, found in diagnosis["probe"].items():
        value = (
            "no two answers with enough images each"
            if found is None
            else f"{percent(found['accuracy'])} (most frequent answer {percent(found['majority'])}, chance "
            f"{percent(found['chance'])}, {found['num_labels']} answers, {found['num_rows']} rows)"
        )
        rows.append([f"linear probe of the answer on {name} Z, held out", value])
    rows.append(["for the probe: constant answer per kind, all rows", percent(diagnosis["baselines"]["constant"])])
    return _table("What Z depends on, and what can be read from it", ["", ""], rows)


def _table(title, header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return f"**{title}**\n\n" + "\n".join("| " + " | ".join(map(sentence, line)) + " |" for line in lines)
