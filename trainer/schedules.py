"""When the two KL terms set in: pure functions of the step."""


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
    warmup, delay = resolve_steps(warmup_steps, num_steps), resolve_steps(delay_steps, num_steps)
    forward_start = delay if order == "reverse_first" else 0.0
    reverse_start = delay if order == "forward_first" else 0.0
    return beta * ramp(step, forward_start, warmup), gamma * ramp(step, reverse_start, warmup)
