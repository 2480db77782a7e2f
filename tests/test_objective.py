"""The objective's pure functions: the closed-form KL, what each term's gradient reaches, reductions, statistics."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from trainer.objective import (
    ACTIVE_UNIT_THRESHOLD,
    amvl_loss,
    forward_kl,
    gaussian_kl,
    latent_statistics,
    reduce_kl,
    reverse_kl,
)


pytestmark = pytest.mark.any_release


B, K, Z = 5, 3, 7
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -8.0, 4.0  # the bounds of AMVLConfig


def gaussian(seed, requires_grad=False, shape=(B, K, Z)):
    """(mean, log-variance) in float64."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad) for _ in range(2)
    )


def as_normal(mean, log_variance):
    return Normal(mean, torch.exp(0.5 * log_variance))


def gradients(output, *inputs):
    return torch.autograd.grad(output, inputs, allow_unused=True, retain_graph=True)


# ---------------------------------------------------------------------------------------------------------------------
# The KL
# ---------------------------------------------------------------------------------------------------------------------


def test_kl_equals_torch_distributions():
    a, b = gaussian(0), gaussian(1)
    expected = kl_divergence(as_normal(*a), as_normal(*b))
    torch.testing.assert_close(gaussian_kl(*a, *b), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(gaussian_kl(*b, *a), expected, rtol=0.1)  # the direction is told apart


def test_kl_equals_monte_carlo():
    num_samples = 200_000
    a, b = gaussian(2, shape=(4,)), gaussian(3, shape=(4,))
    torch.manual_seed(4)
    samples = as_normal(*a).sample((num_samples,))
    log_ratio = as_normal(*a).log_prob(samples) - as_normal(*b).log_prob(samples)  # (num_samples, 4)
    standard_error = log_ratio.std(0) / math.sqrt(num_samples)
    assert (standard_error < 0.02 * gaussian_kl(*a, *b)).all()  # fine enough to tell a wrong formula
    assert ((log_ratio.mean(0) - gaussian_kl(*a, *b)).abs() < 4 * standard_error).all()


def test_kl_gradients_equal_finite_differences():
    inputs = [*gaussian(5, requires_grad=True), *gaussian(6, requires_grad=True)]
    assert torch.autograd.gradcheck(gaussian_kl, inputs)


def test_kl_is_zero_between_equal_gaussians_and_positive_elsewhere():
    a, b = gaussian(7), gaussian(8)
    assert torch.equal(gaussian_kl(*a, *a), torch.zeros(B, K, Z, dtype=torch.float64))
    assert (gaussian_kl(*a, *b) > 0).all()


@pytest.mark.parametrize("log_variance_a", [MIN_LOG_VARIANCE, MAX_LOG_VARIANCE])
@pytest.mark.parametrize("log_variance_b", [MIN_LOG_VARIANCE, MAX_LOG_VARIANCE])
def test_kl_at_the_bounds_of_the_log_variance_is_finite_in_fp32(log_variance_a, log_variance_b):
    leaves = [torch.full((1, 1, 2), value) for value in (3.0, log_variance_a, -3.0, log_variance_b)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    kl = gaussian_kl(*leaves)
    expected = gaussian_kl(*(leaf.double() for leaf in leaves))
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)
    assert kl.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(kl.sum(), *leaves))


# ---------------------------------------------------------------------------------------------------------------------
# Where gradients go
# ---------------------------------------------------------------------------------------------------------------------


def test_forward_term_is_kl_from_posterior_to_prior_and_moves_the_prior_alone():
    prior, posterior = gaussian(10, requires_grad=True), gaussian(11, requires_grad=True)
    term = forward_kl(prior, posterior)
    torch.testing.assert_close(term, kl_divergence(as_normal(*posterior), as_normal(*prior)))
    of_prior, of_posterior = gradients(term.sum(), *prior), gradients(term.sum(), *posterior)
    assert all(gradient.abs().min() > 0 for gradient in of_prior)
    assert of_posterior == (None, None)


def test_reverse_term_is_kl_from_prior_to_posterior_and_moves_the_posterior_alone():
    prior, posterior = gaussian(12, requires_grad=True), gaussian(13, requires_grad=True)
    term = reverse_kl(prior, posterior)
    torch.testing.assert_close(term, kl_divergence(as_normal(*prior), as_normal(*posterior)))
    of_prior, of_posterior = gradients(term.sum(), *prior), gradients(term.sum(), *posterior)
    assert of_prior == (None, None)
    assert all(gradient.abs().min() > 0 for gradient in of_posterior)


def test_one_sided_gradients_equal_finite_differences():
    prior, posterior = gaussian(14), gaussian(15)
    moving = gaussian(16, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *part: forward_kl(part, posterior), moving)
    assert torch.autograd.gradcheck(lambda *part: reverse_kl(prior, part), moving)


# ---------------------------------------------------------------------------------------------------------------------
# The total
# ---------------------------------------------------------------------------------------------------------------------


def test_terms_are_the_weighted_parts_and_sum_to_the_total():
    prior, posterior = gaussian(20), gaussian(21)
    ntp, prior_ntp = torch.tensor(2.5, dtype=torch.float64), torch.tensor(3.5, dtype=torch.float64)
    total, terms = amvl_loss(
        ntp, prior, posterior, beta=0.7, gamma=0.2, ntp_weight=0.5, prior_ntp=prior_ntp, prior_ntp_weight=0.25
    )
    expected = {
        "ntp": 0.5 * ntp,
        "forward": 0.7 * kl_divergence(as_normal(*posterior), as_normal(*prior)).mean(),
        "reverse": 0.2 * kl_divergence(as_normal(*prior), as_normal(*posterior)).mean(),
        "prior_ntp": 0.25 * prior_ntp,
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, msg=name)
    torch.testing.assert_close(total, sum(expected.values()))


def test_prior_ntp_is_left_out_when_not_given():
    ntp = torch.tensor(1.0)
    _, terms = amvl_loss(ntp, gaussian(22), gaussian(23), beta=1.0, gamma=1.0, prior_ntp_weight=5.0)
    assert set(terms) == {"ntp", "forward", "reverse"}


@pytest.mark.parametrize("off", ["ntp_weight", "beta", "gamma"])
def test_a_weight_of_zero_removes_its_term_and_its_gradient(off):
    prior, posterior = gaussian(24, requires_grad=True), gaussian(25, requires_grad=True)
    ntp = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    weights = {"ntp_weight": 1.0, "beta": 1.0, "gamma": 1.0, off: 0.0}
    total, terms = amvl_loss(ntp, prior, posterior, **weights)
    name, leaves = {"ntp_weight": ("ntp", (ntp,)), "beta": ("forward", prior), "gamma": ("reverse", posterior)}[off]
    assert terms[name] == 0
    assert all(value > 0 for key, value in terms.items() if key != name)
    assert all((gradient == 0).all() for gradient in gradients(total, *leaves))
    others = [leaf for leaf in (ntp, *prior, *posterior) if not any(leaf is other for other in leaves)]
    assert all(gradient.abs().sum() > 0 for gradient in gradients(total, *others))


# ---------------------------------------------------------------------------------------------------------------------
# Reductions
# ---------------------------------------------------------------------------------------------------------------------


def test_reductions_over_slots_and_dimensions():
    kl = torch.rand(B, K, Z, dtype=torch.float64)
    torch.testing.assert_close(reduce_kl(kl, "mean"), kl.mean())
    torch.testing.assert_close(reduce_kl(kl, "sum"), kl.sum() / B)
    torch.testing.assert_close(reduce_kl(kl, "sum"), reduce_kl(kl, "mean") * K * Z)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_parts_of_a_step_add_up_to_the_whole(reduction):
    kl = torch.rand(B, K, Z, dtype=torch.float64)
    whole = reduce_kl(kl, reduction)
    parts = [reduce_kl(part, reduction, num_rows=B) for part in kl.split([1, 3, 1])]
    torch.testing.assert_close(sum(parts), whole)
    averaged = sum(reduce_kl(part, reduction) for part in kl.split([1, 3, 1])) / 3
    assert not torch.allclose(averaged, whole, rtol=1e-3)  # what plain averaging of unequal parts would give


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_of_parts_of_a_step_add_up_to_the_whole(reduction):
    prior, posterior = gaussian(30), gaussian(31)
    token_losses = torch.rand(B, dtype=torch.float64)
    settings = {"beta": 0.7, "gamma": 0.2, "reduction": reduction}
    whole, _ = amvl_loss(token_losses.mean(), prior, posterior, **settings)
    parts = [
        amvl_loss(
            token_losses[rows].sum() / B,
            tuple(part[rows] for part in prior),
            tuple(part[rows] for part in posterior),
            num_rows=B,
            **settings,
        )[0]
        for rows in (slice(0, 2), slice(2, B))
    ]
    torch.testing.assert_close(sum(parts), whole)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def test_statistics_are_in_nats_per_slot():
    prior, posterior = gaussian(40, requires_grad=True), gaussian(41, requires_grad=True)
    statistics = latent_statistics(prior, posterior)
    forward = kl_divergence(as_normal(*posterior), as_normal(*prior))
    reverse = kl_divergence(as_normal(*prior), as_normal(*posterior))
    expected = {
        "forward_kl": forward.sum() / (B * K),
        "reverse_kl": reverse.sum() / (B * K),
        "prior_std": as_normal(*prior).stddev.mean(),
        "posterior_std": as_normal(*posterior).stddev.mean(),
    }
    for name, value in expected.items():
        assert statistics[name] == pytest.approx(value.item(), rel=1e-12), name


def test_a_unit_is_active_where_its_mean_kl_over_rows_exceeds_the_threshold():
    num_rows = 4
    mean, log_variance = torch.zeros(num_rows, 1, 4), torch.zeros(num_rows, 1, 4)
    distance = math.sqrt(2 * ACTIVE_UNIT_THRESHOLD)  # a KL of exactly the threshold between unit Gaussians
    posterior_mean = mean.clone()
    posterior_mean[:, 0, 1] = 1.05 * distance  # active in every row
    posterior_mean[:, 0, 2] = 0.95 * distance  # in none
    posterior_mean[0, 0, 3] = 1.9 * distance  # in one row, but 3.6 / 4 of the threshold on average
    statistics = latent_statistics((mean, log_variance), (posterior_mean, log_variance))
    assert statistics["active_units"] == 1
    posterior_mean[0, 0, 3] = 2.1 * distance  # 4.4 / 4 of the threshold on average
    assert latent_statistics((mean, log_variance), (posterior_mean, log_variance))["active_units"] == 2


def test_equal_distributions_have_no_active_unit_and_no_loss():
    same = gaussian(42)
    statistics = latent_statistics(same, same)
    assert statistics["active_units"] == statistics["forward_kl"] == statistics["reverse_kl"] == 0
    total, _ = amvl_loss(torch.tensor(0.0), same, same, beta=1.0, gamma=1.0)
    assert total == 0
