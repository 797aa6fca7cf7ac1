"""``SlimLoss``, the result of ``slim_loss`` and ``linear_slim_loss``, and how per-row losses are reduced to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels import _checks


class SlimLoss(NamedTuple):
    """A loss and its statistics per token, which are detached. Ignored tokens are 0 in every field.

    Attributes:
        loss: Scalar for "mean" and "sum", (...) for "none"; float32 (float64 for float64 logits), like all fields.
        ce: (...) cross entropy of the label in nats, label smoothing included.
        kd: (...) T^2 times the divergence, before any weight.
        weight: (...) w, the weight of ``kd`` in the token's loss.
        teacher_mass: (...) a, the teacher's mass on the kept ids at T; NaN where the teacher's lse at T is unknown.
        student_mass: (...) P, the student's mass on the kept ids at T.
        lse: (...) log-sum-exp of the student's logits at temperature 1.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    weight: Tensor
    teacher_mass: Tensor
    student_mass: Tensor
    lse: Tensor


# Rows of the statistics (NUM_STATS, N) that the kernels write: the fields of SlimLoss in their order, each per row.
NUM_STATS = len(SlimLoss._fields)


def reduction_scale(target: Tensor, ignore_index: int, reduction: str, num_items, dtype: torch.dtype) -> Tensor | None:
    """Returns the factor (N,) of each row's loss in the reduced loss, None for "none". Never synchronises."""
    _checks.is_one_of(reduction, "reduction", ("mean", "sum", "none"))
    if num_items is not None and reduction != "mean":
        raise ValueError(
            f"num_items must be None with reduction={reduction!r}, because only 'mean' divides by it: use "
            "reduction='mean', or divide the result yourself"
        )
    if reduction == "none":
        return None
    counted = (target != ignore_index).to(dtype)
    if reduction == "sum":
        return counted
    return counted / (counted.sum().clamp(min=1) if num_items is None else num_items)


def scale_in_forward(row_scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns ``row_scale`` where the forward pass reduces the loss and makes its gradient, None where it cannot.

    It cannot for float16: its gradients underflow unless they are multiplied by the loss scale before they are
    rounded, and only the backward pass knows the loss scale.
    """
    return None if dtype == torch.float16 else row_scale


def pack_result(loss: Tensor, stats: Tensor, row_scale: Tensor | None, leading_shape: torch.Size) -> SlimLoss:
    """Packs a loss and statistics (NUM_STATS, N) into a ``SlimLoss`` with the leading shape restored.

    A ``loss`` (N,) is reduced by ``row_scale`` first, where there is one; a scalar ``loss`` is reduced already.
    """
    if row_scale is None:
        loss = loss.reshape(leading_shape)
    elif loss.ndim:
        loss = (loss * row_scale).sum()
    return SlimLoss(loss, *(row.reshape(leading_shape) for row in stats[1:].unbind()))
