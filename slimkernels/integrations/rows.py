"""Turns the teacher's largest log-probabilities, as other trainers carry them in a batch, into this package's loss."""

from __future__ import annotations

import math
from typing import Any

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
# Largest sum of a row's probabilities that rounding explains, also where log-probabilities have 16 bits.
_LARGEST_MASS = 1.1


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
        logprobs: (..., K) floating-point natural logarithms; -inf, and any value at padding, is not kept. A NaN is
            kept, so that the loss of its row is NaN.
        target: (...) int64 labels, for the log-probability of the label where it is among ``ids``; None for none. Rows
            of negative labels may hold anything.
        mask: (..., K), 0 or False at padding; None where ``ids`` alone say it.
        has_whole_mass: Whether the values are normalised over the whole vocabulary at temperature 1, so that the mass
            outside the kept ids is known. False for logits, and for values that were normalised on the kept ids: such
            rows are taken to have no other mass, which only rest "renorm" and "renorm_both" allow.

    Returns:
        SparseLogits (..., K) without a gradient, ids ascending. ``target_logit`` is NaN for a label that is not kept.

    Raises:
        TypeError: ``ids`` are no integers, or ``logprobs`` no floating-point numbers.
        ValueError: The shapes differ; or the probabilities of a row sum to more than 1, as those of logits do. On other
            devices than a CPU such a row becomes NaN.

    >>> rows = rows_of_logprobs(torch.tensor([[7, 2, -1]]), torch.tensor([[0.5, 0.25, 1.0]]).log())
    >>> rows.ids.tolist(), round(rows.rest_lse.exp().item(), 4)
    ([[2, 7, -1]], 0.25)
    """
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"ids must be integers, got {ids.dtype}")
    if not logprobs.is_floating_point():
        raise TypeError(f"logprobs must be floating-point numbers, got {logprobs.dtype}")
    for name, tensor in {"logprobs": logprobs, "mask": mask}.items():
        if tensor is not None and tensor.shape != ids.shape:
            raise ValueError(f"{name} must have the shape of ids, {tuple(ids.shape)}, got {tuple(tensor.shape)}")
    if target is not None and target.shape != ids.shape[:-1]:
        raise ValueError(f"target must have shape {tuple(ids.shape[:-1])}, as ids without K, got {tuple(target.shape)}")
    logprobs = logprobs.detach()
    is_kept = (ids >= 0) & (logprobs != -math.inf)
    if mask is not None:
        is_kept &= mask.bool()
    ids, order = ids.long().masked_fill(~is_kept, _NO_ID).sort(-1)
    is_kept = ids != _NO_ID
    values = logprobs.gather(-1, order).float().masked_fill(~is_kept, -math.inf)
    if has_whole_mass:
        values = _with_a_mass(values, target)
    lse = values.new_zeros(*values.shape[:-1], 1) if has_whole_mass else values.logsumexp(-1, keepdim=True)
    label = None
    if target is not None:
        is_label = is_kept & (ids == target[..., None])
        label = values.masked_fill(~is_label, 0.0).sum(-1).masked_fill(~is_label.any(-1), math.nan)
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
    weight: Tensor | None = None,
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
        hidden: (..., D) hidden states in place of ``logits``.
        weight: (V, D) weight of the head, with ``hidden``.
        mask: See ``rows_of_logprobs``.
        has_whole_mass: See ``rows_of_logprobs``.
        **options: Options of ``slim_loss`` or ``linear_slim_loss``.

    Returns:
        SlimLoss.

    Raises:
        TypeError: As ``rows_of_logprobs``.
        ValueError: The teacher's mass outside its kept ids is not known, and ``rest`` reads it; or the cases of
            ``rows_of_logprobs`` and of the loss.
    """
    if not has_whole_mass:
        check_rest(options.get("rest", "renorm"))
    operand = weight if logits is None else logits
    if operand is None or (logits is None) == (hidden is None) or (weight is None) != (hidden is None):
        raise ValueError("either logits, or hidden and weight, must be given")
    # A mass outside all ids is rounding, and the student has none there.
    keeps_all = "group" not in options and ids.shape[-1] >= operand.shape[0 if logits is None else -1]
    rows = rows_of_logprobs(ids, logprobs, target, mask=mask, has_whole_mass=has_whole_mass and not keeps_all)
    if hidden is not None and weight is not None:
        return linear_slim_loss(hidden, weight, target, rows, **options)
    return slim_loss(operand, target, rows, **options)


def _with_a_mass(values: Tensor, target: Tensor | None) -> Tensor:
    """Checks that rows (..., K) of log-probabilities sum to 1 at most, where they have a label."""
    mass = values.exp().sum(-1)
    is_wrong = mass > _LARGEST_MASS
    if target is not None:
        is_wrong &= target >= 0
    if values.device.type != "cpu":
        # Raising would need a sync.
        return values.masked_fill(is_wrong[..., None], math.nan)
    if is_wrong.any():
        raise ValueError(
            "logprobs must be normalised over the vocabulary, so that the probabilities of a row sum to 1 at most, got "
            f"a sum of {mass[is_wrong][0].item():.4g}: subtract the logsumexp of all logits from them, or pass "
            "has_whole_mass=False where it is not known"
        )
    return values


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
