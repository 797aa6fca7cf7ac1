"""Turns the teacher's largest log-probabilities, as other trainers carry them in a batch, into this package's loss."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from slimkernels.ops.linear_slim_loss import linear_slim_loss
from slimkernels.ops.slim_loss import slim_loss
from slimkernels.ops.slim_result import SlimLoss
from slimkernels.sparse_logits import SparseLogits, rest_of_logprobs

# Treatments of the teacher's mass outside its kept ids that do not read this mass.
_WITHOUT_REST = ("renorm", "renorm_both")
# Sorts behind every id.
_NO_ID = torch.iinfo(torch.int32).max


def rows_of_logprobs(
    ids: Tensor,
    logprobs: Tensor,
    target: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    has_whole_mass: bool = True,
) -> SparseLogits:
    """Returns a teacher's rows from ids and log-probabilities in any order, as servers and trainers hand them out.

    Args:
        ids: (..., K) integers, distinct within a row; negative ones are padding.
        logprobs: (..., K) floating-point natural logarithms; -inf, and any value at padding, is not kept.
        target: (...) int64 labels, for the log-probability of the label where it is among ``ids``; None for none.
        mask: (..., K), 0 or False at padding; None where ``ids`` alone say it.
        has_whole_mass: Whether the values are normalised over the whole vocabulary at temperature 1, so that the mass
            outside the kept ids is known. False for logits, and for values that were normalised on the kept ids: such
            rows are taken to have no other mass, which only rest "renorm" and "renorm_both" allow.

    Returns:
        SparseLogits (..., K) without a gradient, ids ascending. ``target_logit`` is NaN for a label that is not kept.

    Raises:
        ValueError: The shapes differ.

    >>> rows = rows_of_logprobs(torch.tensor([[7, 2, -1]]), torch.tensor([[0.5, 0.25, 1.0]]).log())
    >>> rows.ids.tolist(), round(rows.rest_lse.exp().item(), 4)
    ([[2, 7, -1]], 0.25)
    """
    for name, tensor in {"logprobs": logprobs, "mask": mask}.items():
        if tensor is not None and tensor.shape != ids.shape:
            raise ValueError(f"{name} must have the shape of ids, {tuple(ids.shape)}, got {tuple(tensor.shape)}")
    if target is not None and target.shape != ids.shape[:-1]:
        raise ValueError(f"target must have shape {tuple(ids.shape[:-1])}, as ids without K, got {tuple(target.shape)}")
    logprobs = logprobs.detach()
    is_kept = (ids >= 0) & (logprobs > -math.inf)
    if mask is not None:
        is_kept &= mask.bool()
    ids, order = ids.masked_fill(~is_kept, _NO_ID).sort(-1)
    is_kept = ids != _NO_ID
    values = logprobs.gather(-1, order).float().masked_fill(~is_kept, -math.inf)
    lse = torch.zeros_like(values[..., :1]) if has_whole_mass else values.logsumexp(-1, keepdim=True)
    label = None
    if target is not None:
        is_label = is_kept & (ids == target[..., None])
        label = torch.where(is_label, values, -math.inf).amax(-1).masked_fill(~is_label.any(-1), math.nan)
    return SparseLogits(
        ids=ids.masked_fill(~is_kept, -1).int(),
        logits=values.masked_fill(~is_kept, 0.0),
        lse=lse,
        target_logit=label,
        rest_lse=rest_of_logprobs(values.double())[..., None].float() if has_whole_mass else None,
    )


def loss_of_logprobs(
    target: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    *,
    logits: Tensor | None = None,
    hidden: Tensor | None = None,
    mask: Tensor | None = None,
    has_whole_mass: bool = True,
    **options: Any,
) -> SlimLoss:
    """Computes ``slim_loss`` of logits, or ``linear_slim_loss`` of hidden states, and a teacher's log-probabilities.

    Args:
        target: (...) int64 labels.
        ids: See ``rows_of_logprobs``.
        logprobs: See ``rows_of_logprobs``.
        logits: (..., V) of the student, or this rank's slice of them with ``group``.
        hidden: (..., D) hidden states in place of ``logits``, with ``weight`` (V, D) among the options.
        mask: See ``rows_of_logprobs``.
        has_whole_mass: See ``rows_of_logprobs``.
        **options: Options of ``slim_loss`` or ``linear_slim_loss``.

    Returns:
        SlimLoss.

    Raises:
        ValueError: The teacher's mass outside its kept ids is not known, and ``rest`` reads it; or the cases of the
            loss.
    """
    if not has_whole_mass:
        check_rest(options.get("rest", "renorm"))
    if (logits is None) == (hidden is None):
        raise ValueError("either logits or hidden must be given")
    rows = rows_of_logprobs(ids, logprobs, target, mask=mask, has_whole_mass=has_whole_mass)
    if hidden is not None:
        return linear_slim_loss(hidden, target=target, teacher=rows, **options)
    return slim_loss(cast(Tensor, logits), target, rows, **options)


def check_rest(rest: str) -> None:
    """Checks an option ``rest`` for a teacher whose values are normalised on its kept ids alone.

    Raises:
        ValueError: It reads the teacher's mass outside them, which is not known.
    """
    if rest not in _WITHOUT_REST:
        raise ValueError(
            f"rest must be one of {_WITHOUT_REST} where the teacher's values are normalised on its kept ids alone, so "
            f"that its mass on all others is lost, got {rest!r}"
        )
