"""The number of children of each open leaf, where close scores get more of them than distant ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def share_children(scores: Sequence[float] | np.ndarray, factor: int, temperature: float) -> list[int]:
    """Shares L * factor children out among L leaves by their scores: one for each, and the others by a softmax.

    children_j = 1 + share of L * (factor - 1) in proportion to exp(score_j / temperature)

    Shares are rounded down, and the children that this leaves over go to the largest remainders, ties to the leaf that
    comes first. Equal scores thus give every leaf ``factor`` children, and one that leads by several temperatures gets
    almost all but one for each other leaf. A score that is NaN or -inf gets one child.

    Args:
        scores: Scores (L,) of the leaves, best first.
        factor: Mean number of children, at least 1.
        temperature: Difference of scores that changes a share by a factor of e, > 0.

    Returns:
        The number of children of each leaf, L * factor in all.

    References: Wu et al. 2024, "Inference Scaling Laws", arXiv 2408.00724: the widths of REBASE are a softmax of
    rewards too, rounded one by one, and 0 for some leaves; here pruning alone ends leaves.
    """
    values = np.asarray(scores, np.float64)
    extra = len(values) * (factor - 1)
    known = np.isfinite(values)
    if not known.any():
        return [factor] * len(values)
    weights = np.zeros(len(values))
    with np.errstate(over="ignore"):  # a difference that is too large for float64 gives no share
        weights[known] = np.exp((values[known] - values[known].max()) / temperature)
    shares = extra * weights / weights.sum()
    children = np.floor(shares).astype(int)
    left = extra - int(children.sum())
    children[np.argsort(children - shares, kind="stable")[:left]] += 1
    return (1 + children).tolist()
