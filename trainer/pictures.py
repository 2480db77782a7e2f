"""Draws the curves of a training run."""

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


def plot_training_curves(log_history, path, title=None):
    """
    Draws what [`AMVLSFTTrainer`] logged into a PNG.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        path (`str` or `Path`): where to write; the folder is made.
        title (`str`, *optional*): above the picture.

    Returns:
        `Path`: the file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (label, curves) in zip(axes.flat, PANELS, strict=True):
        for key, name in curves.items():
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.5)
        if label.startswith("KL") and axis.lines:
            axis.set_yscale("log")  # it spans orders of magnitude while a posterior settles
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    if title:
        figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
