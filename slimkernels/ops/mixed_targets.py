"""``mixed_targets``: an unbiased sparse teacher with exact probabilities of the likeliest ids and a sampled tail."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.ops.sample_targets import sample_targets
from slimkernels.ops.topk_logits import topk_logits
from slimkernels.sparse_logits import SparseLogits


def mixed_targets(
    logits: Tensor,
    top_k: int,
    rounds: int,
    seed: int | Tensor,
    *,
    position: int | Tensor,
    temperature: float = 1.0,
    target: Tensor | None = None,
) -> SparseLogits:
    """Keeps the K likeliest ids with ``log q``, and ids drawn from the rest with ``log(m * count / rounds)``.

    Here q = softmax(logits / T), m is the mass of q outside the K ids, and ``count`` is how often an id was drawn in
    ``rounds`` draws. Equivalent, in distribution, to::

        q = torch.softmax(logits / temperature, -1)
        head = logits.topk(top_k).indices
        tail = q.scatter(-1, head, 0.0)
        drawn = torch.multinomial(tail, rounds, replacement=True)
        count = torch.zeros_like(q).scatter_add_(-1, drawn, torch.ones_like(drawn, dtype=q.dtype))
        share = tail.sum(-1, keepdim=True) * count / rounds + (q - tail)
        # ids where share > 0, logits = log(share), lse = 0

    A row is a complete distribution (lse 0), to be used at temperature 1 with rest "zero" or "renorm", which agree
    because no mass is missing. Its expectation over the draws is q, so the expected gradient of ``slim_loss`` on it is
    the dense one. Only the tail is random: the variance is m^2 / rounds times that of a single draw from the tail,
    whereas ``sample_targets`` draws the head as well. The draws are those of ``sample_targets``: with one seed per row,
    a row's draws depend on its own logits, seed and position only. Memory is O(N V).

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, any stride.
        top_k: K, number of ids that are always kept, 1 to V; ties go to the lowest id.
        rounds: Number of draws from the rest of a row, at least 1.
        seed: int64, a number or a tensor (...). As in ``sample_logits``, a number is spread over the rows: equal rows
            draw independently. A tensor (...) is used as given.
        position: int64, a number, which is the same for all rows, or a tensor (...).
        temperature: T, positive.
        target: (...) int64 labels, or None. ``target_logit`` is then the label's exact log softmax(logits) at
            temperature 1; it is NaN for a negative label, which means no label.

    Returns:
        SparseLogits with K + min(rounds, V - K) entries per row: ids int32 ascending, padded with -1; logits, lse
        (..., 1), rest_lse (..., 1), which is -inf, and target_logit (...) float32 (float64 for float64 logits). A row
        with a NaN or ``+inf``, or of ``-inf`` only, keeps no id, and its rest_lse is NaN.

    Raises:
        ValueError: K is outside [1, V], rounds is below 1, the temperature is not positive, or a tensor has another
            shape or device. On CPU also a target at or above V; on CUDA such a row's target_logit is NaN instead.
        TypeError: A dtype is not supported.

    Supports: cpu and cuda x (float32, bfloat16, float16, float64) x no backward x deterministic.

    Precision: m is the log-sum-exp of the entries outside the K, never 1 minus the mass of the others.

    References: Anshumann et al. 2025, "Sparse Logit Sampling", arXiv 2503.16870, which draws every id.

    >>> sparse = mixed_targets(torch.tensor([[5.0, 1.0, 1.0, -20.0]]), 1, 64, 0, position=0)
    >>> sparse.ids[0, :3].tolist(), round(sparse.logits[0, :3].exp().sum().item(), 6)
    ([0, 1, 2], 1.0)
    """
    _checks.check_vocabulary(logits, "logits", "(..., V)")
    temperature = _checks.as_temperature(temperature)
    rows = logits.detach()
    temperatures = (1.0, temperature)
    head = topk_logits(rows, top_k, target=target, temperatures=temperatures)
    tail_rows = rows.scatter(-1, head.ids.long(), -math.inf)
    tail = sample_targets(tail_rows, rounds, seed, position=position, temperature=temperature)
    tail_lse = topk_logits(tail_rows, 1, temperatures=temperatures).lse_at(temperature)

    lse = head.lse_at(temperature)[..., None]
    head_shares = head.logits.to(lse.dtype) / temperature - lse
    # In a row without a tail nothing was drawn, so the NaN of its tail_shares is masked below.
    tail_shares = tail.logits + tail_lse[..., None] - lse
    num_drawn = min(tail.top_k, logits.shape[-1] - top_k)
    ids = torch.cat([head.ids, tail.ids[..., :num_drawn]], -1)
    shares = torch.cat([head_shares, tail_shares[..., :num_drawn]], -1)
    ids = ids.masked_fill(~torch.isfinite(shares) | ~torch.isfinite(lse), -1)

    order = torch.where(ids < 0, torch.iinfo(torch.int32).max, ids).argsort(-1)
    ids = ids.gather(-1, order)
    return SparseLogits(
        ids=ids,
        logits=shares.gather(-1, order).masked_fill(ids < 0, 0.0),
        lse=torch.zeros_like(lse),
        # The draws represent the rest, so no mass is left out. In a row without ids the rest is unknown.
        rest_lse=torch.where(ids[..., :1] < 0, math.nan, -math.inf).to(lse.dtype),
        target_logit=None if head.target_logit is None else head.target_logit - head.lse[..., 0],
    )
