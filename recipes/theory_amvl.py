"""Trains AMVL where everything is known in closed form, and holds the one against the other: how much leaks, over gamma.

    python recipes/theory_amvl.py --output_dir theory

One row is x, y and a latent z, all of them numbers and Gaussian:

    x ~ N(0, 1),   y = a x + r,   r ~ N(0, residual^2)              r is what x does not say of y
    q(z | x, y) = N(A x + B y, 1)                                   B is the leak
    p(z | x)    = N(w x, t^2)                                       the prior cannot see y
    p(y | x, z) = N(c x + d z, noise^2)                             the decoder
    loss        = -log p(y | x, z ~ q) + beta KL(sg[q] || p) + gamma KL(sg[p] || q)

A, B, w, t, c and d are trained with [`~trainer.objective.amvl_loss`] as it is; the posterior's variance is 1, which sets the unit
of z. With z of the signal-to-noise ratio rho = B^2 residual^2, the best decoder is left with residual^2 / (1 + rho), so that the
loss falls with rho by residual^2 / (2 noise^2 (1 + rho)^2), and the reverse term, whose prior is held still, rises by gamma / 2:

    rho    = max(0, residual / (noise sqrt(gamma)) - 1)             nothing leaks from gamma = (residual / noise)^2 on
    w - A  = B a,   |B| = sqrt(rho) / residual                      the leak's average stays in the prior's mean
    t^2    = 1 + rho                                                and the leak itself in its variance

beta does not appear: the forward term only makes the prior follow. At inference z comes from the prior and is right about x alone:
the squared error is residual^2 (1 + rho / (1 + rho)), where training saw residual^2 / (1 + rho). That is the gap between training
and inference that leakage makes, up to twice the error of a decoder that never used z.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from trainer.measuring import render
from trainer.objective import amvl_loss


@dataclass
class TheoryArguments:
    """The world, and how long it is trained in."""

    output_dir: str = field(default="theory", metadata={"help": "Where table and plot go."})
    gammas: list[float] = field(
        default_factory=lambda: [0.03, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
        metadata={"help": "Weights of the reverse term, above 0: without it the leak grows for ever."},
    )
    beta: float = field(default=1.0, metadata={"help": "Weight of the forward term."})
    slope: float = field(default=0.7, metadata={"help": "a, what x says of y."})
    residual: float = field(default=1.0, metadata={"help": "Standard deviation of what x does not say."})
    noise: float = field(default=0.5, metadata={"help": "Standard deviation of the decoder."})
    num_steps: int = field(default=3000, metadata={"help": "Steps of Adam for each gamma."})
    batch_size: int = field(default=4096, metadata={"help": "Rows of a step, drawn afresh."})
    seed: int = field(default=0, metadata={"help": "Of the rows and the start."})

    def __post_init__(self):
        for name in ("beta", "residual", "noise", "num_steps", "batch_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        if not self.gammas or not all(0 < gamma < math.inf for gamma in self.gammas):
            raise ValueError(
                f"`gammas` must be above 0, got {self.gammas}: without the reverse term there is no closed form, the leak grows."
            )


def closed_form(arguments, gamma):
    """
    What training must come to.

    Returns:
        `dict[str, float]`: `leak` (rho), `mean` (|w - A|), `variance` (t^2), and the squared errors `error_posterior` and
        `error_prior` of y decoded from either, over residual^2.
    """
    leak = max(0.0, arguments.residual / (arguments.noise * math.sqrt(gamma)) - 1)
    return {
        "leak": leak,
        "mean": abs(arguments.slope) * math.sqrt(leak) / arguments.residual,
        "variance": 1 + leak,
        "error_posterior": 1 / (1 + leak),
        "error_prior": 1 + leak / (1 + leak),
    }


def train(arguments, gamma):
    """
    Trains the six numbers; they are averaged over the last third of the steps, in which the step size goes to 0.

    Returns:
        `dict[str, float]`: as [`closed_form`], measured.
    """
    generator = torch.Generator().manual_seed(arguments.seed)
    start = 0.3 * torch.randn(6, generator=generator)
    start[1], start[5] = 0.3, 0.3  # no leak and a decoder that does not read z are a saddle: training would sit there
    weights = start.requires_grad_()  # A, B, w, log t^2, c, d
    optimizer = torch.optim.Adam([weights], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.num_steps)
    average, num_averaged = torch.zeros(6), 0
    for step in range(arguments.num_steps):
        x, r, epsilon = torch.randn(3, arguments.batch_size, generator=generator)
        y = arguments.slope * x + arguments.residual * r
        a, b, w, log_variance, c, d = weights
        posterior_mean = a * x + b * y
        z = posterior_mean + epsilon
        ntp = ((y - c * x - d * z) ** 2).mean() / (2 * arguments.noise**2)
        shape = (-1, 1, 1)  # (B, K, Z)
        prior = (w * x).reshape(shape), log_variance.expand(arguments.batch_size).reshape(shape)
        posterior = posterior_mean.reshape(shape), torch.zeros(arguments.batch_size).reshape(shape)
        loss, _ = amvl_loss(ntp, prior, posterior, arguments.beta, gamma)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if 3 * step >= 2 * arguments.num_steps:
            average, num_averaged = average + weights.detach(), num_averaged + 1
    return measure(arguments, *(average / num_averaged).tolist())


def measure(arguments, a, b, w, log_variance, c, d):
    """Leak, contamination and errors of six numbers, exactly: everything is Gaussian."""
    variance = math.exp(log_variance)
    on_x = arguments.slope - c - d * (a + b * arguments.slope)  # of what is left of y, decoded from the posterior
    on_residual = (1 - d * b) * arguments.residual
    with_prior = arguments.slope - c - d * w
    return {
        "leak": (b * arguments.residual) ** 2,
        "mean": abs(w - a),
        "variance": variance,
        "error_posterior": (on_x**2 + on_residual**2 + d**2) / arguments.residual**2,
        "error_prior": (with_prior**2 + arguments.residual**2 + d**2 * variance) / arguments.residual**2,
    }


TITLES = {
    "leak": "leak, rho",
    "mean": "|w - A|",
    "variance": "t^2",
    "error_posterior": "error, posterior z",
    "error_prior": "error, prior z",
}


def largest_difference(results):
    """The largest difference of a measured value from its closed form: relative, or absolute where that is below 1."""
    return max(
        abs(result["measured"][key] - exact) / max(exact, 1.0)
        for result in results
        for key, exact in result["closed"].items()
    )


def table_of(results):
    rows = [
        [f"{result['gamma']:g}", *(f"{result['measured'][key]:.3f} / {result['closed'][key]:.3f}" for key in TITLES)]
        for result in results
    ]
    return "Trained / closed form, over gamma", ["gamma", *TITLES.values()], rows


def plot(arguments, results, path):
    """Draws what was trained as points on the closed form's curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    contamination, errors = figure.subplots(1, 2)
    gammas = torch.logspace(math.log10(min(arguments.gammas)), math.log10(max(arguments.gammas)), 200).tolist()
    curves = [closed_form(arguments, gamma) for gamma in gammas]
    for axis, keys in ((contamination, ("leak", "mean", "variance")), (errors, ("error_posterior", "error_prior"))):
        for key in keys:
            (line,) = axis.plot(gammas, [curve[key] for curve in curves], label=TITLES[key])
            axis.plot(
                [result["gamma"] for result in results],
                [result["measured"][key] for result in results],
                "o",
                color=line.get_color(),
            )
        axis.set_xscale("log")
        axis.set_xlabel("gamma, weight of the reverse term")
        axis.grid(alpha=0.3)
        axis.legend()
    contamination.set_title("What leaks, and what of it stays in the prior (points: trained)")
    errors.set_title("Squared error of y / residual^2")
    figure.savefig(path, dpi=110)


def main(arguments):
    results = [
        {"gamma": gamma, "closed": closed_form(arguments, gamma), "measured": train(arguments, gamma)}
        for gamma in arguments.gammas
    ]
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    difference = largest_difference(results)
    plot(arguments, results, folder / "theory.png")
    facts = f"Largest difference: {100 * difference:.2f}%, of 1 where the value is smaller."
    settings = ", ".join(
        f"{key} {value:g}" for key, value in asdict(arguments).items() if isinstance(value, (int, float))
    )
    (folder / "theory.md").write_text(
        "\n".join([f"{settings}\n", render(table_of(results), markdown=True), facts, ""])
    )
    (folder / "theory.json").write_text(json.dumps(results, indent=1))
    print(
        "\n".join([settings, "", render(table_of(results), markdown=False), facts, f"Plot: {folder / 'theory.png'}"])
    )
    return difference


if __name__ == "__main__":
    main(*HfArgumentParser(TheoryArguments).parse_args_into_dataclasses())
