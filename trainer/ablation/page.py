"""The table, the picture and the verdict of an ablation, from what was measured of each arm and seed."""

from collections import defaultdict

import numpy as np
from scipy import stats

from ..data.color_steps import MULTI_HOP
from .run import TEMPERATURES


DEFAULT, SFT = "AMVL", "same-data SFT"
GUESSING = 1 / 6  # of two steps, for who knows that neither the start nor one step from it is the answer
LEAST_SEEDS = 3  # that a verdict takes
NEEDED = 0.1  # what a swap of Z has to cost on questions of several steps, for latents to be called used


def interval(values):
    """
    Mean over seeds, with Student's 95% interval.

    Args:
        values (`Sequence[float]`): one per seed.

    Returns:
        `dict`: `mean`, `low` and `high`, the last two `None` for a single seed, and the `values`.
    """
    mean, values = float(np.mean(values)), [float(value) for value in values]
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "values": values}
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": values}


def accuracy(record, choice="own", kinds=MULTI_HOP):
    """Share of right answers of a record under a choice of latents, over rows of some kinds."""
    return float(np.mean([hit for hit, kind in zip(record["right"][choice], record["kinds"]) if kind in kinds]))


def summarise(records):
    """
    Each arm over its seeds.

    Args:
        records (`dict[str, dict[int, dict]]`): what [`~trainer.ablation.run.run_arm`] returned, by arm and seed.

    Returns:
        `dict[str, dict]`: by arm, `seeds`, and as [`interval`] returns them: `one_step` and `multi_hop`, accuracies with the
        latents that inference gives; `over_sft` and `over_default`, `multi_hop` minus that of same-data SFT, and of the default, of
        the same seed, over the seeds that both have; of AMVL models `swap`, what another row's Z costs there, `posterior`, `off`, and `tau 0.2` and so on, accuracies there;
        `copied` and `copied_anyway` over all rows; `forward_kl` and `reverse_kl` in nats per slot.
    """
    references = {"over_sft": SFT, "over_default": DEFAULT}
    return {
        name: _summary(by_seed, {key: records.get(other, {}) for key, other in references.items() if other != name})
        for name, by_seed in records.items()
    }


def _summary(by_seed, references):
    seeds = sorted(by_seed)
    found = defaultdict(list)
    for seed in seeds:
        record = by_seed[seed]
        own = accuracy(record)
        found["one_step"].append(accuracy(record, kinds=("1_step",)))
        found["multi_hop"].append(own)
        for key, reference in references.items():
            if seed in reference:
                found[key].append(own - accuracy(reference[seed]))
        if len(record["right"]) > 1:
            found["swap"].append(accuracy(record, "another's") - own)
            for choice in ("posterior", "off", *(f"tau {tau}" for tau in TEMPERATURES)):
                found[choice].append(accuracy(record, choice))
            for name in ("copied", "copied_anyway"):
                found[name].append(float(np.mean(record[name])))
            for name in ("forward_kl", "reverse_kl"):
                found[name].append(record[name])
    return {"seeds": seeds, **{name: interval(values) for name, values in found.items()}}


def verdict(summary):
    """
    Whether the default beats same-data SFT, and whether its latents are used, in two sentences with their numbers.

    Args:
        summary (`dict[str, dict]`): of [`summarise`].

    Returns:
        `str`: says what is missing where arms or seeds are.
    """
    over = summary.get(DEFAULT, {}).get("over_sft")
    if over is None or len(over["values"]) < LEAST_SEEDS:
        return f"No verdict: it takes {DEFAULT} and {SFT} with the same seeds, {LEAST_SEEDS} or more."
    swap, num_seeds = summary[DEFAULT]["swap"], len(over["values"])
    beats = "beats" if over["low"] > 0 else "does not beat"
    used = "are used" if round(swap["high"] + NEEDED, 9) <= 0 else "are not shown to be used"
    return (
        f"On questions of two steps AMVL with prior latents {beats} same-data SFT of as many optimiser steps: "
        f"{_points(over)} points over {num_seeds} seeds. Its latents {used}: another row's Z changes the accuracy by {_points(swap)} "
        f"points (to be called used, the whole interval has to lie at {-100 * NEEDED:.0f} or below)."
    )


def _points(found, sign=True):
    shape = "{:+.1f}" if sign else "{:.1f}"
    if found is None:
        return "-"
    mean = shape.format(100 * found["mean"])
    if found["low"] is None:
        return mean
    return f"{mean} ({shape.format(100 * found['low'])} to {shape.format(100 * found['high'])})"


def _percent(found):
    return "-" if found is None else f"{100 * found['mean']:.1f}"


def table(summary, arms):
    """
    The table as Markdown, its arms in their order and in groups.

    Args:
        summary (`dict[str, dict]`): of [`summarise`].
        arms (`Sequence[Arm]`): those to show; one without a record is left out.

    Returns:
        `str`: per cent and points, with 95% intervals over seeds.
    """
    header = (
        "arm",
        "seeds",
        "1 step",
        "2 steps",
        "minus SFT",
        "minus AMVL",
        "another's Z",
        "posterior Z",
        "off",
        "copied",
    )
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    group = None
    for arm in arms:
        if arm.name not in summary:
            continue
        if arm.group != group:
            group = arm.group
            lines.append(f"| **{group}** |" + " |" * (len(header) - 1))
        found = summary[arm.name]
        cells = [
            arm.name,
            str(len(found["seeds"])),
            _percent(found["one_step"]),
            _points(found["multi_hop"], sign=False),
            _points(found.get("over_sft")),
            _points(found.get("over_default")),
            _points(found.get("swap")),
            *(_percent(found.get(name)) for name in ("posterior", "off")),
            f"{_percent(found['copied'])} / {_percent(found['copied_anyway'])}" if "copied" in found else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def temperatures(summary, name=DEFAULT):
    """Accuracy of an arm on questions of two steps against tau, as a Markdown table; empty where the arm was not run."""
    if name not in summary:
        return ""
    values = [summary[name]["multi_hop"], *(summary[name][f"tau {tau}"] for tau in TEMPERATURES)]
    header = " | ".join(f"tau {tau}" for tau in (0, *TEMPERATURES))
    cells = " | ".join(_points(value, sign=False) for value in values)
    return f"| {header} |\n|{'---:|' * len(values)}\n| {cells} |"


def draw(summary, arms, path):
    """
    Draws the accuracy of every arm on questions of two steps, with own and with another row's latents, into a PNG.

    Args:
        summary (`dict[str, dict]`), arms (`Sequence[Arm]`): as for [`table`].
        path (`str` or `Path`): where to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [arm for arm in arms if arm.name in summary][::-1]
    figure, axis = plt.subplots(figsize=(8.5, 1.2 + 0.28 * len(shown)), layout="constrained")
    styles = (("multi_hop", "own latents", "tab:blue", "o"), ("another's", "another row's latents", "tab:orange", "x"))
    for key, label, color, marker in styles:
        for height, arm in enumerate(shown):
            found = summary[arm.name]
            if key == "another's" and "swap" not in found:
                continue
            value = found["multi_hop"]
            if key == "another's":
                value = {"mean": value["mean"] + found["swap"]["mean"], "low": None}
            axis.plot(100 * value["mean"], height, marker, color=color, label=label)
            if value["low"] is not None:
                axis.plot([100 * value["low"], 100 * value["high"]], [height, height], color=color, linewidth=1.5)
            label = None
    axis.axvline(100 * GUESSING, color="gray", linestyle=":", linewidth=1, label="guessing")
    if SFT in summary:
        axis.axvline(100 * summary[SFT]["multi_hop"]["mean"], color="gray", linewidth=1, label="same-data SFT")
    axis.set_yticks(range(len(shown)), [arm.name for arm in shown], fontsize=9)
    axis.set_xlim(-2, 102)
    axis.set_xlabel("questions of two steps answered right, per cent; bars: 95% over seeds")
    axis.grid(alpha=0.3, axis="x")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
