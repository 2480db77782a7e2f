"""The pictures of a diagnosis, each a function from its numbers to a PNG."""

from pathlib import Path

import numpy as np


OWN, OTHER = "#1f5fa8", "#c2571a"
MAX_SLOTS = 4  # of a relevance map; more would be too small to see


def draw_changes(changes, path):
    """Draws what each intervention changes, in accuracy and in log p(gold), with 95% intervals."""
    shown = {name: found for name, found in changes.items() if found is not None and name != "own"}
    figure, (accuracy, log_prob) = _figure(1, 2, (11, 1.4 + 0.3 * len(shown)), sharey=True)
    places = np.arange(len(shown))[::-1]
    for axis, keys, scale, label in (
        (accuracy, ("difference", "low", "high"), 100, "change of accuracy, points"),
        (log_prob, ("log_prob", "log_prob_low", "log_prob_high"), 1, "change of log p(gold), nats per answer"),
    ):
        for place, found in zip(places, shown.values()):
            middle, low, high = (scale * found[key] for key in keys)
            axis.plot([low, high], [place, place], color=OWN, linewidth=2)
            axis.plot(middle, place, "o", color=OWN, markersize=5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    log_prob.set_xscale("symlog", linthresh=0.1)
    low, high = log_prob.get_xlim()
    ticks = [tick for tick in (-100, -10, -3, -1, -0.3, -0.1, 0, 0.1, 0.3, 1, 3, 10) if low <= tick <= high]
    log_prob.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    log_prob.minorticks_off()
    accuracy.set_yticks(places, list(shown))
    figure.suptitle("Against each row's own Z, all else fixed (95%, paired)")
    return _save(figure, path)


def draw_sweeps(sweeps, num_latents, path):
    """Draws accuracy over the temperature of the latents, and over the number of slots kept."""
    figure, axes = _figure(1, 2, (10, 4), sharey=True)
    titles = (
        ("temperature", "temperature of the latents, mean of noise seeds"),
        ("slots_kept", f"first slots kept of {num_latents}; the others hold the mean over rows"),
    )
    for axis, (key, title) in zip(axes, titles):
        at = [point["at"] for point in sweeps[key]]
        accuracy = np.asarray([point["accuracy"] for point in sweeps[key]])
        spread = np.asarray(
            [[point["difference"] - point["low"], point["high"] - point["difference"]] for point in sweeps[key]]
        )
        axis.errorbar(at, 100 * accuracy, yerr=100 * spread.T.clip(0), fmt="o-", color=OWN, capsize=3)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[1].set_xticks([point["at"] for point in sweeps["slots_kept"]])
    axes[0].set_ylabel("accuracy, per cent")
    figure.suptitle(
        f"{sweeps['num_rows']} rows; bars: 95% of the paired difference from temperature 0 with every slot",
        fontsize=10,
    )
    return _save(figure, path)


def draw_cosines(structure, path):
    """Draws the cosine of each pair of slots, within rows and across rows, beside those of text and image tokens."""
    figure, axes = _figure(2, len(structure), (2.3 * len(structure) + 0.8, 5.4), squeeze=False)
    for column, (name, found) in enumerate(structure.items()):
        for line, (key, where) in enumerate((("within_matrix", "within a row"), ("across_matrix", "across rows"))):
            axis = axes[line, column]
            picture = axis.imshow(found[key], vmin=-1, vmax=1, cmap="RdBu_r")
            axis.set_title(name.replace(", ", ",\n") if line == 0 else "", fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(where)
            if len(found[key]) <= MAX_SLOTS:
                for (i, j), value in np.ndenumerate(np.asarray(found[key])):
                    color = "white" if abs(value) > 0.6 else "black"
                    axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(picture, ax=axes, shrink=0.6, label="mean cosine")
    figure.suptitle("Slots (tokens, evenly spread over the prompt) against each other")
    return _save(figure, path)


def draw_relevance(maps, titles, path):
    """
    Draws relevance maps over photographs: the mean of the slots, and the first slots.

    Args:
        maps (`list[tuple[PIL.Image.Image, torch.Tensor]]`): image and map `(K, G, G)` of each row, one at least.
        titles (`list[str]`): question of each row.
        path (`str` or `Path`): where to write.
    """
    num_slots = min(maps[0][1].shape[0], MAX_SLOTS)
    names = ["", "mean of all slots", *(f"slot {slot + 1}" for slot in range(num_slots))]
    figure, axes = _figure(len(maps), len(names), (2.2 * len(names), 2.5 * len(maps) + 0.6), squeeze=False)
    top = max(float(relevance.max()) for _, relevance in maps)
    for line, ((image, relevance), title) in enumerate(zip(maps, titles)):
        layers = [None, relevance.mean(0), *relevance[:num_slots]]
        for column, (axis, layer) in enumerate(zip(axes[line], layers)):
            extent = (0, image.width, image.height, 0)
            axis.imshow(image if layer is None else image.convert("L"), extent=extent, cmap="gray")
            if layer is not None:
                drawn = axis.imshow(layer.numpy(), extent=extent, cmap="inferno", vmin=0, vmax=top, alpha=0.65)
            axis.set_title(
                _wrapped(title) if column == 0 else names[column] if line == 0 else "", fontsize=8, parse_math=False
            )
            axis.set_xticks([])
            axis.set_yticks([])
    figure.colorbar(
        drawn, ax=axes, shrink=0.6, label="distance Z moves when a cell is greyed out\n(1: as far as another row's Z)"
    )
    return _save(figure, path)


def draw_gap(diagnosis, path):
    """Draws what separates training from inference: accuracy and loss under either Z, and the KL of each slot."""
    figure, (accuracy, nll, kl) = _figure(1, 3, (12, 3.8))
    changes = diagnosis["changes"]
    names = {"own": "prior Z", "posterior": "posterior Z", "latents off": "latents off"}
    colors = [OWN, OTHER, "grey"]
    accuracy.bar(list(names.values()), [100 * changes[name]["accuracy"] for name in names], color=colors)
    accuracy.set_ylabel("accuracy, per cent")
    accuracy.axhline(100 * diagnosis["baselines"]["constant"], color="black", linewidth=0.8, linestyle="--")
    accuracy.set_title("dashed: constant answer per kind", fontsize=9)
    nll.bar(list(names.values()), [diagnosis["nll"][name] for name in names], color=colors)
    nll.set_ylabel("-log p(gold), nats per answer")
    divergence = diagnosis["divergence"]
    slots = np.arange(len(divergence["forward_kl_by_slot"]))
    kl.bar(slots - 0.2, divergence["forward_kl_by_slot"], 0.4, label="forward, KL(q || p)", color=OWN)
    kl.bar(slots + 0.2, divergence["reverse_kl_by_slot"], 0.4, label="reverse, KL(p || q)", color=OTHER)
    kl.set_xticks(slots, [str(slot + 1) for slot in slots])
    kl.set_xlabel("slot")
    kl.set_ylabel("KL, nats")
    kl.legend(fontsize=8)
    figure.suptitle("Posterior against prior: what training sees and what inference has")
    return _save(figure, path)


def draw_kl_history(log_history, path):
    """Draws both KL terms over training; `None` where none was logged."""
    curves = {"forward_kl": ("forward, KL(q || p)", OWN), "reverse_kl": ("reverse, KL(p || q)", OTHER)}
    points = {key: [(entry["step"], entry[key]) for entry in log_history if key in entry] for key in curves}
    if not any(points.values()):
        return None
    figure, axis = _figure(1, 1, (7, 4))
    for key, (label, color) in curves.items():
        if points[key]:
            axis.plot(*zip(*points[key]), label=label, color=color)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("KL, nats per slot")
    axis.set_title("KL over training")
    axis.grid(alpha=0.3)
    axis.legend()
    return _save(figure, path)


def _figure(num_rows, num_columns, size, **settings):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(num_rows, num_columns, **settings)


def _save(figure, path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _wrapped(text, width=26, num_lines=3):
    import textwrap

    return "\n".join(textwrap.wrap(text, width, max_lines=num_lines, placeholder=" ..."))
