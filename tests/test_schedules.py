"""The weights of the two KL terms, step by step."""

import inspect
import itertools

import numpy as np
import pytest

from trainer import AMVLSFTConfig
from trainer.schedules import kl_weights, phase, phases, ramp, resolve_steps


pytestmark = pytest.mark.any_release


NUM_STEPS = 100
ORDERS = ("forward_first", "reverse_first", "together")


def trajectory(num_steps=NUM_STEPS, **settings):
    """(beta, gamma) of every step of a run."""
    settings = {"beta": 2.0, "gamma": 0.5, **settings}
    return [kl_weights(step, num_steps, **settings) for step in range(num_steps)]


def test_a_value_below_one_is_a_share_of_the_run_and_others_are_steps():
    assert resolve_steps(0.25, 80) == 20
    assert resolve_steps(0, 80) == 0
    assert resolve_steps(1, 80) == 1  # one step, not the whole run
    assert resolve_steps(30, 80) == 30


def test_ramp_rises_linearly_from_its_start_to_one():
    assert [ramp(step, 2, 4) for step in range(8)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize("start", [0, 3])
def test_ramp_without_length_is_a_step(start):
    assert [ramp(step, start, 0) for step in range(5)] == [float(step >= start) for step in range(5)]


def test_forward_first_delays_the_reverse_term():
    weights = trajectory(order="forward_first", warmup_steps=10, delay_steps=30)
    assert [beta for beta, _ in weights[:11]] == pytest.approx([0.2 * n for n in range(1, 11)] + [2.0])
    assert [gamma for _, gamma in weights[:30]] == [0] * 30
    assert [gamma for _, gamma in weights[30:41]] == pytest.approx([0.05 * n for n in range(1, 11)] + [0.5])
    assert set(weights[40:]) == {(2.0, 0.5)}


def test_reverse_first_delays_the_forward_term():
    weights = trajectory(order="reverse_first", warmup_steps=10, delay_steps=30)
    assert [beta for beta, _ in weights[:30]] == [0] * 30
    assert [beta for beta, _ in weights[30:40]] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert [gamma for _, gamma in weights[:10]] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert set(weights[40:]) == {(2.0, 0.5)}


def test_together_delays_neither():
    weights = trajectory(order="together", warmup_steps=10, delay_steps=30)
    assert all(gamma == pytest.approx(beta / 4) and beta > 0 for beta, gamma in weights)
    assert set(weights[9:]) == {(2.0, 0.5)}


@pytest.mark.parametrize("order", ORDERS)
def test_shares_of_the_run_are_the_same_schedule_as_steps(order):
    shares = trajectory(order=order, warmup_steps=0.1, delay_steps=0.3)
    steps = trajectory(order=order, warmup_steps=10, delay_steps=30)
    np.testing.assert_allclose(shares, steps, rtol=1e-12)
    assert len(set(steps)) >= 10  # a schedule, not a constant


@pytest.mark.parametrize("order", ORDERS)
def test_shares_follow_the_length_of_the_run(order):
    short = trajectory(order=order, warmup_steps=0.1, delay_steps=0.3)
    long = trajectory(10 * NUM_STEPS, order=order, warmup_steps=0.1, delay_steps=0.3)
    np.testing.assert_allclose(long[9::10], short, rtol=1e-12)


@pytest.mark.parametrize(("order", "first"), [("forward_first", (2.0, 0.0)), ("reverse_first", (0.0, 0.5))])
def test_without_warm_up_each_term_is_at_its_full_weight_at_once(order, first):
    weights = trajectory(order=order, warmup_steps=0, delay_steps=30)
    assert set(weights[:30]) == {first}
    assert set(weights[30:]) == {(2.0, 0.5)}


def test_without_warm_up_and_delay_both_are_on_from_the_first_step():
    for order in ORDERS:
        assert set(trajectory(order=order, warmup_steps=0, delay_steps=0)) == {(2.0, 0.5)}


@pytest.mark.parametrize("order", ORDERS)
def test_weights_never_fall_and_never_exceed_the_full_ones(order):
    grid = itertools.product([1, 2, 3, 7, 100], [0, 0.1, 0.99, 1, 2.5, 500], [0, 0.3, 1, 500])
    for num_steps, warmup_steps, delay_steps in grid:
        settings = (num_steps, 2.0, 0.5, order, warmup_steps, delay_steps)
        # A resumed run may go past `num_steps`.
        weights = np.array([kl_weights(step, *settings) for step in range(num_steps + 1000)])  # (steps, 2)
        assert (np.diff(weights, axis=0) >= 0).all(), settings
        assert (weights >= 0).all() and (weights <= (2.0, 0.5)).all(), settings
        assert tuple(weights[-1]) == (2.0, 0.5), settings


def test_a_delay_beyond_the_run_leaves_the_second_term_off():
    assert {gamma for _, gamma in trajectory(delay_steps=NUM_STEPS, order="forward_first")} == {0.0}
    assert {beta for beta, _ in trajectory(delay_steps=NUM_STEPS, order="reverse_first")} == {0.0}


def weights_of(config):
    settings = (config.beta, config.gamma, config.kl_order, config.kl_warmup_steps, config.kl_delay_steps)
    return [kl_weights(step, NUM_STEPS, *settings) for step in range(NUM_STEPS)]


def test_by_default_both_terms_warm_up_together_to_one_weight(tmp_path):
    config = AMVLSFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    weights = weights_of(config)
    assert all(beta == gamma > 0 for beta, gamma in weights)
    assert 0 < weights[0][0] < weights[-1][0] == config.beta == config.gamma


def test_in_the_papers_order_the_reverse_term_sets_in_later_and_stays_weaker(tmp_path):
    config = AMVLSFTConfig(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, gamma=0.001, kl_order="forward_first"
    )
    weights = weights_of(config)
    full_beta = next(step for step, (beta, _) in enumerate(weights) if beta == config.beta)
    first_gamma = next(step for step, (_, gamma) in enumerate(weights) if gamma > 0)
    assert weights[0][0] > 0 and full_beta < first_gamma
    assert all(gamma < beta for beta, gamma in weights)
    assert weights[-1] == (config.beta, config.gamma)


def test_defaults_of_the_function_are_those_of_the_configuration(tmp_path):
    config = AMVLSFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    parameters = inspect.signature(kl_weights).parameters
    for name in ("order", "warmup_steps", "delay_steps"):
        assert parameters[name].default == getattr(config, f"kl_{name}"), name


# ---------------------------------------------------------------------------------------------------------------------
# What a step's weights are called
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"order": "forward_first"},
            [("forward warm-up", 0, 9), ("forward alone", 9, 30), ("reverse ramp", 30, 39), ("both", 39, 100)],
        ),
        (
            {"order": "reverse_first"},
            [("reverse warm-up", 0, 9), ("reverse alone", 9, 30), ("forward ramp", 30, 39), ("both", 39, 100)],
        ),
        ({"order": "together"}, [("warm-up of both", 0, 9), ("both", 9, 100)]),
        ({"order": "together", "gamma": 0.0}, [("forward warm-up", 0, 9), ("forward alone", 9, 100)]),
        (
            {"order": "forward_first", "beta": 0.0},
            [("no KL term", 0, 30), ("reverse warm-up", 30, 39), ("reverse alone", 39, 100)],
        ),
        ({"beta": 0.0, "gamma": 0.0}, [("no KL term", 0, 100)]),
        ({"warmup_steps": 0, "delay_steps": 0, "order": "forward_first"}, [("both", 0, 100)]),
        ({"delay_steps": 1000, "order": "forward_first"}, [("forward warm-up", 0, 9), ("forward alone", 9, 100)]),
    ],
)
def test_the_phases_of_a_run_by_name(settings, expected):
    assert phases(100, **{"beta": 2.0, "gamma": 0.5, **settings}) == expected


@pytest.mark.parametrize("num_steps", [1, 7, 100, 1013])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("warmup", "delay"), [(0.1, 0.3), (0.5, 0.2), (0, 3), (13, 2), (0.999, 0.999)])
def test_the_phases_are_those_of_each_step_and_name_what_its_weights_are(num_steps, order, warmup, delay):
    settings = (num_steps, 2.0, 0.5, order, warmup, delay)
    found = phases(*settings)
    assert [start for _, start, _ in found] + [num_steps] == [0] + [end for _, _, end in found]
    assert [name for name, start, end in found for _ in range(start, end)] == [
        phase(step, *settings) for step in range(num_steps)
    ]
    for step in range(num_steps):
        beta, gamma = kl_weights(step, *settings)
        name = phase(step, *settings)
        assert (beta == 2.0 and gamma == 0.5) == (name == "both")
        assert (beta > 0 and gamma > 0) == (name in ("both", "warm-up of both", "forward ramp", "reverse ramp"))
        assert ("alone" in name) == ({beta / 2.0, gamma / 0.5} == {0.0, 1.0})
