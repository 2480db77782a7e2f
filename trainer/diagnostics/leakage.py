"""What separates training from inference: posterior against prior, and whether the posterior hands the answer over.

Shapes: N rows, K latent slots, Z latent size.
"""

import numpy as np

from ..evaluation.scores import paired_difference
from ..objective import forward_kl, latent_statistics, reverse_kl


def divergence(prior, posterior):
    """
    How far prior and posterior are apart, and how wide each is.

    Args:
        prior, posterior (`tuple[torch.Tensor, torch.Tensor]`): mean and log-variance, each `(N, K, Z)`.

    Returns:
        `dict`: `forward_kl` and `reverse_kl` in nats per slot and `forward_kl_by_slot`, `reverse_kl_by_slot`; `active_units`,
        dimensions whose forward KL exceeds 0.01 nats, of `num_units`; `prior_std`, `posterior_std`, the mean deviation of the
        two; `prior_spread`, `posterior_spread`, the deviation of their means over rows, averaged over dimensions.
    """
    return {
        **latent_statistics(prior, posterior),
        "num_units": prior[0][0].numel(),
        "forward_kl_by_slot": forward_kl(prior, posterior).sum(-1).mean(0).tolist(),
        "reverse_kl_by_slot": reverse_kl(prior, posterior).sum(-1).mean(0).tolist(),
        "prior_spread": prior[0].std(0).mean().item(),
        "posterior_spread": posterior[0].std(0).mean().item(),
    }


def copying(says_wrong, says_wrong_anyway, seed=0, groups=None):
    """
    How often the decoder says the wrong answer that the posterior has read: leakage, directly.

    Args:
        says_wrong (`list[bool]`): with Z of the posterior that read a wrong answer, the decoder says that answer.
        says_wrong_anyway (`list[bool]`): it says that same answer with Z of the prior, which has read none.
        seed (`int`, defaults to 0): of the bootstrap.
        groups (`list`, *optional*): rows of one group, of one image say, are drawn together.

    Returns:
        `dict[str, float]`: `rate` and `base_rate` in 0..1; `difference` with `low` and `high`, 95%, paired; `num_groups`.
    """
    sides = [np.asarray(side, dtype=float) for side in (says_wrong_anyway, says_wrong)]
    return {
        "rate": float(sides[1].mean()),
        "base_rate": float(sides[0].mean()),
        **paired_difference(*sides, groups, seed),
        "num_groups": len(says_wrong if groups is None else set(groups)),
    }


def norm_ratio(embedded, embedding_norm):
    """Mean norm of latents as they enter the decoder, `(N, K, D)`, over that of a typical token embedding."""
    return float(embedded.float().norm(dim=-1).mean() / embedding_norm)
