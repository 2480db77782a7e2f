"""Interventions on Z with all else fixed, and what a swap of Z costs.

Shapes: N rows, K latent slots, Z latent size. Every intervention takes `(N, K, Z)` and gives `(N, K, Z)`.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..evaluation.scores import paired_bootstrap, paired_difference
from .asking import ask, read_latents
from .questions import is_right, read_questions, said


SAME = 1e-3  # of the typical distance of Z from its mean: below this distance, two Z are one
ROUNDING = 16  # times the precision of Z, over its typical norm: a distance that rounding makes
NO_PARTNER = -1


# ---------------------------------------------------------------------------------------------------------------------
# On Z alone
# ---------------------------------------------------------------------------------------------------------------------


def zero(latents):
    """Every number 0."""
    return torch.zeros_like(latents)


def shared_mean(latents):
    """One tensor for all rows: their mean, slot by slot. It says nothing of a row."""
    return latents.mean(0, keepdim=True).expand_as(latents).clone()


def gaussian_noise(latents, seed=0):
    """Independent noise with the mean and deviation that each number has over the rows."""
    generator = torch.Generator().manual_seed(seed)
    return latents.mean(0) + latents.std(0) * torch.randn(latents.shape, generator=generator)


def matched_norm_noise(latents, seed=0):
    """A random direction in each slot, as long as the slot was."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    return noise * latents.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)


def first_slot_repeated(latents):
    """The first slot in the place of all."""
    return latents[:, :1].expand_as(latents).clone()


def only_slot(latents, slot):
    """One slot as it is, the others the mean over rows."""
    kept = shared_mean(latents)
    kept[:, slot] = latents[:, slot]
    return kept


def first_slots(latents, num_kept):
    """The first slots as they are, the others the mean over rows; as many slots as ever enter the decoder."""
    kept = shared_mean(latents)
    kept[:, :num_kept] = latents[:, :num_kept]
    return kept


def swapped(latents, partners):
    """Each row gets the Z of its partner, `(N,)` indices; a row without one keeps its own."""
    partners = torch.as_tensor(partners)
    return latents[torch.where(partners == NO_PARTNER, torch.arange(len(latents)), partners)]


# ---------------------------------------------------------------------------------------------------------------------
# Who swaps with whom
# ---------------------------------------------------------------------------------------------------------------------


def same_latents(latents, tolerance=SAME, chunk=512):
    """
    Which rows have one and the same Z: those close to the first of their group, whatever all rows have in common.

    Args:
        latents (`torch.Tensor`): `(N, K, Z)`.
        tolerance (`float`, defaults to 1e-3): largest distance to the first row of a group, over the median distance of Z from the
            mean over rows; a distance of the size of rounding is none in any case.
        chunk (`int`, defaults to 512): rows compared at a time.

    Returns:
        `numpy.ndarray`: `(N,)`, a group number per row.
    """
    flat = latents.flatten(1).double()
    centred = flat - flat.mean(0)
    typical, norm = (float(side.norm(dim=1).median()) for side in (centred, flat))
    limit = max(tolerance * typical, ROUNDING * torch.finfo(latents.dtype).eps * norm)
    groups = torch.full((len(flat),), -1)
    for start in range(0, len(flat), chunk):
        near = torch.cdist(centred[start : start + chunk], centred) <= limit
        for row, close in enumerate(near, start):
            if groups[row] < 0:
                groups[close & (groups < 0)] = row
                groups[row] = row
    return groups.numpy()


def derange(labels, groups=None, seed=0):
    """
    A permutation of the rows under which no row gets one of its own label.

    Within a group the rows are shuffled, sorted by label and turned by the size of the largest label: that pairs no row with
    its own label as long as no label has more than half of the group. Where one has, those of its rows that would meet
    their own label get no partner. The same seed gives the same partners.

    Args:
        labels (`Sequence`): `(N,)`; rows of one label must not meet.
        groups (`Sequence`, *optional*): `(N,)`; partners come from the same group. One group by default.
        seed (`int`, defaults to 0): of the shuffle.

    Returns:
        `torch.LongTensor`: `(N,)`, a partner per row, -1 for a row that has none.
    """
    draw = np.random.default_rng(seed)
    labels = np.unique(np.asarray([str(label) for label in labels]), return_inverse=True)[1]
    groups = [0] * len(labels) if groups is None else groups
    groups = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)[1]
    partners = np.full(len(labels), NO_PARTNER)
    for group in range(groups.max() + 1):
        rows = draw.permutation(np.flatnonzero(groups == group))
        names = draw.permutation(labels.max() + 1)  # labels in no order
        rows = rows[np.argsort(names[labels[rows]], kind="stable")]
        others = np.roll(rows, -np.bincount(labels[rows]).max())
        differ = labels[rows] != labels[others]
        partners[rows[differ]] = others[differ]
    return torch.from_numpy(partners)


# ---------------------------------------------------------------------------------------------------------------------
# What an intervention does
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Change:
    """
    What an intervention changed, paired row by row; intervals are 95% by bootstrap.

    Args:
        num_rows (`int`): rows compared.
        num_groups (`int`): images among them; what intervals draw.
        accuracy (`float`): under the intervention, in 0..1.
        difference, low, high (`float`): of accuracy, intervention minus own Z.
        flip_rate (`float`): share of answers that say something else, see [`~trainer.diagnostics.questions.said`].
        text_flip_rate (`float`): share of answers that are another text, be it in form alone.
        log_prob, log_prob_low, log_prob_high (`float`): change of log p(gold), in nats per row.
    """

    num_rows: int
    num_groups: int
    accuracy: float
    difference: float
    low: float
    high: float
    flip_rate: float
    text_flip_rate: float
    log_prob: float | None = None
    log_prob_low: float | None = None
    log_prob_high: float | None = None


def change(own, other, questions, kept=None, seed=0, groups=None):
    """
    Compares the answers under an intervention with those under the rows' own Z.

    Args:
        own, other ([`Answers`]): of the same rows.
        questions (`list[Question]`): of the rows.
        kept (`Sequence[int]`, *optional*): the rows that count, all by default.
        seed (`int`, defaults to 0): of the bootstrap.
        groups (`list`, *optional*): rows of one group, of one image say, are drawn together.

    Returns:
        [`Change`], or `None` where no row counts.
    """
    kept = range(len(questions)) if kept is None else [int(row) for row in kept]
    if not len(kept):
        return None
    groups = kept if groups is None else [groups[row] for row in kept]
    right = [[float(is_right(side.texts[row], questions[row])) for row in kept] for side in (own, other)]
    texts = [(own.texts[row], other.texts[row], questions[row]) for row in kept]
    found = Change(
        num_rows=len(kept),
        num_groups=len(set(groups)),
        accuracy=float(np.mean(right[1])),
        **paired_difference(*right, groups, seed),
        flip_rate=float(np.mean([said(one, question) != said(two, question) for one, two, question in texts])),
        text_flip_rate=float(np.mean([one != two for one, two, _ in texts])),
    )
    if own.log_prob is not None and other.log_prob is not None:
        sides = [[float(side.log_prob[row]) for row in kept] for side in (own, other)]
        found.log_prob, found.log_prob_low, found.log_prob_high = paired_bootstrap(*sides, groups, seed=seed)
    return found


def swap_cost(model, processor, rows, batch_size=64, seed=0, max_new_tokens=16):
    """
    Accuracy with each row's own Z and with another row's, the shortest test of whether latents are used.

    Args:
        model ([`AMVLForConditionalGeneration`]), processor ([`AMVLProcessor`]): of a trained model.
        rows (`datasets.Dataset`): rows as [`AMVLDataCollator`] takes them; by `kind`, otherwise by `source`, where they have it.
        batch_size (`int`, defaults to 64), max_new_tokens (`int`, defaults to 16): of generation.
        seed (`int`, defaults to 0): of partners, see [`derange`], and bootstrap.

    Returns:
        `dict`: lists with an entry per row, `own_right` and `swapped_right` (`bool`) and `kinds`; `by_kind`, for each kind and
        for `"all"` the accuracies `own` and `swapped`, `difference`, `low` and `high` (95%, paired), and `num_rows`;
        `num_without_partner`, rows that keep their own Z since more than half of all rows have that same Z.
    """
    questions = read_questions(rows)
    read = read_latents(model, processor, rows, questions, batch_size, posterior=False)
    latents = read.prior[0]
    partners = derange(same_latents(latents), seed=seed)
    arms = {"own": latents, "swapped": swapped(latents, partners)}
    answers = ask(model, processor, rows, questions, arms, batch_size, max_new_tokens, with_log_prob=False)
    own, other = ([is_right(text, question) for text, question in zip(answers[arm].texts, questions)] for arm in arms)
    kinds = [question.kind for question in questions]
    return {
        "own_right": own,
        "swapped_right": other,
        "kinds": kinds,
        "by_kind": cost_by_kind(own, other, kinds, seed, read.groups),
        "num_without_partner": int((partners == NO_PARTNER).sum()),
    }


def cost_by_kind(own, other, kinds, seed=0, groups=None):
    """
    Accuracy under two choices of latents, for each kind and for `"all"` rows.

    Returns:
        `dict[str, dict]`: see [`swap_cost`].
    """
    places = {"all": list(range(len(kinds)))}
    for place, kind in enumerate(kinds):
        if kind != "all":
            places.setdefault(kind, []).append(place)
    table = {}
    for kind, rows in places.items():
        pair = [[float(side[row]) for row in rows] for side in (own, other)]
        together = None if groups is None else [groups[row] for row in rows]
        table[kind] = {
            "own": float(np.mean(pair[0])),
            "swapped": float(np.mean(pair[1])),
            **paired_difference(*pair, together, seed),
            "num_rows": len(rows),
        }
    return table
