"""When the two KL terms set in, and what that is called: pure functions of the step."""


def resolve_steps(value, num_steps):
    """A number of steps, or a share of `num_steps` where `value` is below 1, as transformers reads `warmup_steps`."""
    return value * num_steps if value < 1 else float(value)


def ramp(step, start, length):
    """0 until `start`, then linear, 1 from `start + length` on; steps count from 0."""
    if step < start:
        return 0.0
    return 1.0 if length <= 0 else min(1.0, (step - start + 1) / length)


def kl_weights(step, num_steps, beta, gamma, order="together", warmup_steps=0.1, delay_steps=0.3):
    """
    The weights of the forward and of the reverse term at one optimiser step.

    A term warms up from the start, or, where it is the second, after `delay_steps` and as long. The paper calls its order
    forward-first; its numbers are not stated.

    Args:
        step (`int`): optimiser steps done, from 0.
        num_steps (`int`): optimiser steps of the whole run.
        beta (`float`), gamma (`float`): full weights of the forward and of the reverse term.
        order (`"together"`, `"forward_first"` or `"reverse_first"`, defaults to `"together"`): which term is first; `"together"`
            delays neither.
        warmup_steps (`float`, defaults to 0.1), delay_steps (`float`, defaults to 0.3): steps, or a share of the run
            where below 1.

    Returns:
        `tuple[float, float]`: beta and gamma at that step.
    """
    forward, reverse = _shares(step, num_steps, order, warmup_steps, delay_steps)
    return beta * forward, gamma * reverse


def phase(step, num_steps, beta, gamma, order="together", warmup_steps=0.1, delay_steps=0.3):
    """
    What the schedule of the KL terms is at, at one optimiser step, in words.

    Args:
        step, num_steps, beta, gamma, order, warmup_steps, delay_steps: see [`kl_weights`].

    Returns:
        `str`: `"forward warm-up"` and `"forward alone"`, `"reverse warm-up"` and `"reverse alone"` while the other term is still, or
        always, without weight; `"warm-up of both"`; `"reverse ramp"` or `"forward ramp"` where that one sets in beside the other,
        which has its full weight; `"both"`; `"no KL term"`.
    """
    forward, reverse = _shares(step, num_steps, order, warmup_steps, delay_steps)
    forward, reverse = forward if beta > 0 else 0.0, reverse if gamma > 0 else 0.0
    if forward == reverse == 0:
        return "no KL term"
    if reverse == 0:
        return "forward warm-up" if forward < 1 else "forward alone"
    if forward == 0:
        return "reverse warm-up" if reverse < 1 else "reverse alone"
    if forward < 1:
        return "warm-up of both" if reverse < 1 else "forward ramp"
    return "reverse ramp" if reverse < 1 else "both"


def phases(num_steps, beta, gamma, order="together", warmup_steps=0.1, delay_steps=0.3):
    """
    All phases of a run in their order.

    Args:
        num_steps, beta, gamma, order, warmup_steps, delay_steps: see [`kl_weights`].

    Returns:
        `list[tuple[str, int, int]]`: a [`phase`], the first step in it, counted from 0, and the one after its last.
    """
    settings = (num_steps, beta, gamma, order, warmup_steps, delay_steps)
    warmup, delay = resolve_steps(warmup_steps, num_steps), resolve_steps(delay_steps, num_steps)
    # A phase begins where a term sets in or has its full weight, give or take what rounding makes of it.
    near = {int(min(place, num_steps)) + i for place in (0, warmup, delay, delay + warmup) for i in range(-2, 3)}
    found = []
    for step in sorted(step for step in near if 0 <= step < num_steps):
        name = phase(step, *settings)
        if not found or found[-1][0] != name:
            found.append((name, step))
    ends = [start for _, start in found[1:]] + [num_steps]
    return [(name, start, end) for (name, start), end in zip(found, ends)]


def _shares(step, num_steps, order, warmup_steps, delay_steps):
    """Of its full weight, what each term has."""
    warmup, delay = resolve_steps(warmup_steps, num_steps), resolve_steps(delay_steps, num_steps)
    forward_start = delay if order == "reverse_first" else 0.0
    reverse_start = delay if order == "forward_first" else 0.0
    return ramp(step, forward_start, warmup), ramp(step, reverse_start, warmup)
