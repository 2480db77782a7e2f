"""How latents lie to each other, what they depend on, and what can be read from them.

A cosine to some target is no quality figure, and none is computed here. Shapes: N rows, K slots, D any size.
"""

from collections import Counter

import numpy as np
import torch


NUM_FOLDS = 5
MIN_GROUPS_OF_AN_ANSWER = 2 * NUM_FOLDS  # rarer answers are left out of the probe


def cosines(vectors):
    """
    Cosine similarity within rows and across rows.

    Args:
        vectors (`torch.Tensor`): `(N, K, D)`, at least two rows.

    Returns:
        `dict`: `within`, the mean over pairs of different slots of a row, `None` for one slot; `across`, the mean over pairs of
        different rows in one slot; and the `(K, K)` means of each pair of slots behind them, `within_matrix` and
        `across_matrix`, as lists.
    """
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    num_rows, num_slots, _ = unit.shape
    pairs = torch.einsum("nid,njd->ij", unit, unit)
    within = pairs / num_rows  # (K, K)
    total = unit.sum(0)  # (K, D)
    across = (total @ total.T - pairs) / (num_rows * (num_rows - 1))  # (K, K), without a row and itself
    others = ~torch.eye(num_slots, dtype=torch.bool)
    return {
        "within": within[others].mean().item() if num_slots > 1 else None,
        "across": across.diagonal().mean().item(),
        "within_matrix": within.tolist(),
        "across_matrix": across.tolist(),
    }


def typical_distance(latents, partners):
    """
    Mean distance of two rows' Z.

    Args:
        latents (`torch.Tensor`): `(N, K, D)`.
        partners (`torch.LongTensor`): `(N,)`, another row for each, -1 where there is none.

    Returns:
        `float`: over the rows that have a partner.
    """
    paired = partners >= 0
    return float((latents[paired] - latents[partners[paired]]).flatten(1).norm(dim=1).mean())


def relative_distance(latents, changed, typical):
    """
    How far a change of the input moves Z, in units of the distance between two rows.

    Args:
        latents (`torch.Tensor`), changed (`torch.Tensor`): `(N, K, D)`, before and after.
        typical (`float`): see [`typical_distance`].

    Returns:
        `float`: 0 where the change does nothing, 1 where it moves Z as far as another row's Z is.
    """
    return float((changed - latents).flatten(1).norm(dim=1).mean() / typical)


def probe(latents, labels, groups=None, seed=0):
    """
    How well a linear classifier reads the answer off Z, on rows held out from it.

    Args:
        latents (`torch.Tensor`): `(N, K, D)`.
        labels (`list[str]`): the answer of each row; answers of fewer than ten groups are left out.
        groups (`list`, *optional*): rows of one group, of one image say, are never on both sides. Each row by default.
        seed (`int`, defaults to 0): of the five folds.

    Returns:
        `dict` or `None`: `accuracy`, `majority` (the most frequent answer) and `chance` (one over the number of answers) in 0..1,
        `num_rows`, `num_labels`; `None` where fewer than two answers are left.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    groups = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    counts = Counter(label for label, _ in set(zip(labels, groups.tolist())))
    kept = [row for row, label in enumerate(labels) if counts[label] >= MIN_GROUPS_OF_AN_ANSWER]
    targets = np.asarray([labels[row] for row in kept])
    if len(set(targets)) < 2:
        return None
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    features = latents.flatten(1).double().numpy()[kept]
    folds = list(GroupKFold(NUM_FOLDS, shuffle=True, random_state=seed).split(features, targets, groups[kept]))
    if any(len(set(targets[train])) < 2 for train, _ in folds):
        return None
    predicted = cross_val_predict(classifier, features, targets, cv=folds)
    return {
        "accuracy": float((predicted == targets).mean()),
        "majority": max(Counter(targets).values()) / len(targets),
        "chance": 1 / len(set(targets)),
        "num_rows": len(targets),
        "num_labels": len(set(targets)),
    }
