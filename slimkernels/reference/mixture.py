"""The mixture of several teachers' rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.reference.arithmetic import as_constant, logsumexp
from slimkernels.reference.rows import sparse_softmax
from slimkernels.sparse_logits import SparseLogits


def mix(parts: Sequence[SparseLogits], weights: Sequence[float | Tensor]) -> SparseLogits:
    """Mixes the distributions of several teachers: p = sum of w_m q_m, q_m that of ``sparse_softmax`` with "ghost".

    The outcomes are the ids that any input keeps, and one bucket of all others. Where an input does not keep an id, its
    probability of that id is in its bucket and stays in the mixture's. So the log-probabilities are exact where every
    input keeps the union of ids; elsewhere those at the ids are lower bounds, and the bucket an upper one, of the
    mixture of the whole rows. All outcomes sum to 1.

    An input of weight 0 counts for nothing in its row, as if it were not given: neither its ids nor a NaN. Nor does a
    row without any mass, whose lse is -inf, add anything to the mixture.

    Args:
        parts: Rows of each teacher, of one leading shape (...); only temperature 1 is read.
        weights: Weight of each teacher, a number or (...); at least 0, and 1 in sum. A number 0 drops its teacher.

    Returns:
        Log-probabilities at temperature 1, lse 0. ids and logits (..., sum K_m), ids ascending and padded with -1.
        ``rest_lse`` is the log-probability of the bucket; NaN where that of one input is not known, None without any
        known one. ``target_logit`` is the log of the sum of w_m exp(target_logit_m - lse_m), None unless all have it. A
        row of which an input's lse is NaN or +inf has lse NaN.
    """
    used = [(part, weight) for part, weight in zip(parts, weights, strict=True) if isinstance(weight, Tensor) or weight]
    dtype = torch.float64 if any(part.lse.dtype == torch.float64 for part, _ in used) else torch.float32
    every, kept, tails, labels, bad = [], [], [], [], []
    for given, weight in used:
        part = as_constant(given, dtype)
        share = torch.as_tensor(weight, dtype=dtype, device=part.device).expand(part.leading_shape)
        every.append(part.ids.masked_fill((share == 0).unsqueeze(-1), -1))
        lse = part.lse_at(1.0)
        counts = (share > 0) & (lse != -math.inf)
        bad.append(counts & ~(lse < math.inf))
        q = sparse_softmax(part, rest="ghost")
        rest_lse = part.rest_lse_at(1.0)
        unknown = torch.ones_like(counts) if rest_lse is None else rest_lse.isnan()
        kept.append((q.logprobs + share.log().unsqueeze(-1)).masked_fill(~counts.unsqueeze(-1), -math.inf))
        tails.append((q.tail_logprob + share.log()).masked_fill(unknown, math.nan).masked_fill(~counts, -math.inf))
        if part.target_logit is not None:
            labels.append((part.target_logit - lse + share.log()).masked_fill(~counts, -math.inf))

    ids = distinct(torch.cat(every, dim=-1))
    logprobs = torch.full(ids.shape, -math.inf, dtype=dtype, device=ids.device)
    for own, values in zip(every, kept, strict=True):
        is_same = (ids.unsqueeze(-1) == own.unsqueeze(-2)) & (ids >= 0).unsqueeze(-1)
        logprobs = torch.logaddexp(logprobs, values.unsqueeze(-2).where(is_same, -math.inf).amax(-1))
    lse = torch.zeros_like(tails[0]).masked_fill(torch.stack(bad).any(0), math.nan)
    return SparseLogits(
        ids=ids,
        logits=logprobs.masked_fill(ids < 0, 0.0),
        lse=lse.unsqueeze(-1),
        target_logit=logsumexp(torch.stack(labels, dim=-1)) if len(labels) == len(used) else None,
        rest_lse=None
        if all(part.rest_lse is None for part, _ in used)
        else logsumexp(torch.stack(tails, dim=-1)).unsqueeze(-1),
    )


def distinct(ids: Tensor) -> Tensor:
    """Returns the ids (..., L) of every row, each once, ascending and padded with -1."""
    none = torch.iinfo(torch.int32).max
    ids = ids.masked_fill(ids < 0, none).sort(-1).values
    is_repeated = torch.zeros_like(ids, dtype=torch.bool)
    is_repeated[..., 1:] = ids[..., 1:] == ids[..., :-1]
    ids = ids.masked_fill(is_repeated, none).sort(-1).values
    return ids.masked_fill(ids == none, -1)
