"""The AMVL objective as pure functions: tensors in, tensors out (arXiv 2607.00461).

    L = NTP + beta * KL( sg[q] || p ) + gamma * KL( sg[p] || q ),    q = q(Z | x, y), p = p(Z | x), sg = stop-gradient

Shapes: B batch, K latent slots, Z latent size.
"""

import torch


# A latent dimension is active where its KL, averaged over rows, exceeds this many nats (Burda et al. 2016 use the
# variance of the mean; AMVL's diagnostics use the KL).
ACTIVE_UNIT_THRESHOLD = 0.01


def gaussian_kl(mean_a, log_variance_a, mean_b, log_variance_b):
    """
    KL(a || b) of diagonal Gaussians, one value per dimension.

        KL = 1/2 * ( log_variance_b - log_variance_a + (variance_a + (mean_a - mean_b)^2) / variance_b - 1 )

    Args:
        mean_a, log_variance_a, mean_b, log_variance_b (`torch.Tensor`): any one shape.

    Returns:
        `torch.Tensor`: of that shape, in nats.
    """
    log_ratio = log_variance_a - log_variance_b
    squared_distance = (mean_a - mean_b).square() * torch.exp(-log_variance_b)
    return 0.5 * (torch.exp(log_ratio) + squared_distance - log_ratio - 1.0)


def forward_kl(prior, posterior):
    """KL( sg[q] || p ) `(B, K, Z)` in nats: its gradient reaches the prior alone. `prior`, `posterior`: (mean, log-variance)."""
    return gaussian_kl(*(part.detach() for part in posterior), *prior)


def reverse_kl(prior, posterior):
    """KL( sg[p] || q ) `(B, K, Z)` in nats: its gradient reaches the posterior alone. `prior`, `posterior`: (mean, log-variance)."""
    return gaussian_kl(*(part.detach() for part in prior), *posterior)


def reduce_kl(kl, reduction, num_rows=None):
    """
    Mean over rows of the KL summed or averaged over slots and dimensions.

    Args:
        kl (`torch.Tensor`): `(B, K, Z)` in nats.
        reduction (`"mean"` or `"sum"`): over K and Z. Not stated in the paper.
        num_rows (`float`, *optional*): rows to divide by instead of B, for a step made of several batches.

    Returns:
        `torch.Tensor`: scalar, in nats per dimension or nats.
    """
    per_row = kl.sum(dim=(1, 2)) if reduction == "sum" else kl.mean(dim=(1, 2))
    return per_row.sum() / (kl.shape[0] if num_rows is None else num_rows)


def amvl_loss(
    ntp,
    prior,
    posterior,
    beta,
    gamma,
    ntp_weight=1.0,
    prior_ntp=None,
    prior_ntp_weight=0.0,
    reduction="mean",
    num_rows=None,
):
    """
    The whole objective and its parts.

    Args:
        ntp (`torch.Tensor`): scalar next-token loss decoded from the posterior's sample, in nats per token.
        prior, posterior (`tuple[torch.Tensor, torch.Tensor]`): mean and log-variance, each `(B, K, Z)`.
        beta (`float`), gamma (`float`): weights of the forward and of the reverse term.
        ntp_weight (`float`, defaults to 1.0): 0 for the paper's ablations without it.
        prior_ntp (`torch.Tensor`, *optional*): the next-token loss decoded from the prior's sample (Sohn et al. 2015).
        prior_ntp_weight (`float`, defaults to 0.0): its weight.
        reduction (`str`, defaults to `"mean"`), num_rows (`float`, *optional*): see [`reduce_kl`].

    Returns:
        `tuple`: the scalar total, and a `dict` of its weighted terms, which sum to it.
    """
    terms = {
        "ntp": ntp_weight * ntp,
        "forward": beta * reduce_kl(forward_kl(prior, posterior), reduction, num_rows),
        "reverse": gamma * reduce_kl(reverse_kl(prior, posterior), reduction, num_rows),
    }
    if prior_ntp is not None:
        terms["prior_ntp"] = prior_ntp_weight * prior_ntp
    return sum(terms.values()), terms


@torch.no_grad()
def latent_statistics(prior, posterior):
    """
    What to watch while training.

    Args:
        prior, posterior (`tuple[torch.Tensor, torch.Tensor]`): mean and log-variance, each `(B, K, Z)`.

    Returns:
        `dict[str, float]`: `forward_kl` and `reverse_kl` in nats per slot, `prior_std` and `posterior_std`, and
        `active_units`, the number of the K * Z dimensions whose forward KL exceeds 0.01 nats.
    """
    forward, reverse = forward_kl(prior, posterior), reverse_kl(prior, posterior)
    return {
        "forward_kl": forward.sum(-1).mean().item(),
        "reverse_kl": reverse.sum(-1).mean().item(),
        "prior_std": torch.exp(0.5 * prior[1]).mean().item(),
        "posterior_std": torch.exp(0.5 * posterior[1]).mean().item(),
        "active_units": float((forward.mean(0) > ACTIVE_UNIT_THRESHOLD).sum()),
    }
