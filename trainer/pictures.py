"""Draws the curves of a training run."""

import math
import re
from pathlib import Path


PANELS = (
    ("next-token loss, nats per token", {"ntp": "posterior Z (training)", "ntp_prior": "prior Z (training)"}),
    (
        "held-out loss, nats per token",
        {
            "eval_nll_posterior": "posterior Z",
            "eval_nll_prior": "prior Z",
            "eval_nll_no_latents": "latents off",
        },
    ),
    ("KL, nats per slot", {"forward_kl": "forward, KL(q || p)", "reverse_kl": "reverse, KL(p || q)"}),
    ("standard deviation of a latent", {"prior_std": "prior", "posterior_std": "posterior"}),
    ("weights of the KL terms", {"beta": "beta (forward)", "gamma": "gamma (reverse)"}),
    ("active units", {"active_units": "KL above 0.01 nats"}),
)
SHADES = ("0.5", "1.0")  # of the phases, in turn


def points_of(log_history, key):
    """
    What was logged under a name of [`PANELS`].

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        key (`str`): the name; one of an evaluation also finds `eval_DATASET_...` of several evaluation datasets.

    Returns:
        `dict[str, list[tuple[int, float]]]`: by dataset, `""` where there is but one: steps and values, what is not finite as NaN.
    """
    pattern = re.compile(re.escape(key))
    if key.startswith("eval_"):
        pattern = re.compile(rf"eval_(?:(.+)_)?{re.escape(key.removeprefix('eval_'))}")
    found = {}
    for entry in log_history:
        for name, value in entry.items():
            match = pattern.fullmatch(name)
            if match and isinstance(value, (int, float)):
                dataset = (match[1] or "") if pattern.groups else ""
                found.setdefault(dataset, []).append((entry["step"], value if math.isfinite(value) else math.nan))
    return found


def plot_training_curves(log_history, path, title=None, phases=()):
    """
    Draws what [`AMVLSFTTrainer`] logged into a PNG.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        path (`str`, `Path` or binary file): where to write; a folder is made.
        title (`str`, *optional*): above the picture.
        phases (`list[tuple[str, int, int]]`, *optional*): [`~trainer.schedules.phases`] of the run, numbered in each panel and named
            under the title.

    Returns:
        `Path`: the file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    last = max((entry["step"] for entry in log_history), default=0)
    phases = [(name, start, min(end, last)) for name, start, end in phases if start < last]
    for axis, (label, curves) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        values = []
        for key, name in curves.items():
            for dataset, points in points_of(log_history, key).items():
                marker = "o" if len(points) < 3 else None  # a line of one point is not seen
                label_here = f"{name}, {dataset}" if dataset else name
                axis.plot(*zip(*points, strict=True), label=label_here, linewidth=1.5, marker=marker)
                values += [value for _, value in points]
        if label.startswith("KL") and any(value > 0 for value in values):
            axis.set_yscale("log", nonpositive="mask")  # it spans orders of magnitude while a posterior settles
        if values and len(phases) > 1:
            for number, (_, start, end) in enumerate(phases):
                axis.axvspan(start, end, color=SHADES[number % 2], alpha=0.12, linewidth=0, zorder=0)
                place = {"transform": axis.get_xaxis_transform(), "ha": "center", "va": "top"}
                axis.text((start + end) / 2, 0.99, number + 1, fontsize=8, color="0.35", **place)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    named = "   ".join(f"{number}: {name}" for number, (name, _, _) in enumerate(phases, 1)) if len(phases) > 1 else ""
    if title or named:
        figure.suptitle("\n".join(filter(None, [title, named])), fontsize=11, parse_math=False)
    if isinstance(path, (str, Path)):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    return path
