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
        entropy: (...) entropy of the student at temperature 1, in nats. This field and those after it are None unless
            ``statistics`` asks for them, and NaN where ``lse`` is NaN.
        teacher_entropy: (...) entropy of the teacher's outcomes at T: its kept ids, and one for all other ids. It is a
            lower bound of the entropy of the teacher's row; NaN where the teacher's lse at T is unknown.
        argmax_kept: (...) 1 where the student's largest logit, the first of equal ones, is at a kept id; else 0.
        argmax_correct: (...) 1 where it is at the label; else 0.
        teacher_surer: (...) 1 where the teacher gives the label more probability than the student does, at temperature
            1; else 0.
        overlap: (...) share of the row's K kept ids that are among the student's K largest logits; of equal logits
            those with the lowest ids count. None with ``statistics="without_overlap"``.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    weight: Tensor
    teacher_mass: Tensor
    student_mass: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    argmax_kept: Tensor | None = None
    argmax_correct: Tensor | None = None
    teacher_surer: Tensor | None = None
    overlap: Tensor | None = None


# Number of statistics (M, N) that the kernels write for each value of the option `statistics`: the first M fields of
# SlimLoss in their order, each per row.
NUM_STATS = {"none": 7, "without_overlap": 12, "all": 13}


def reduction_scale(target: Tensor, ignore_index: int, reduction: str, num_items, dtype: torch.dtype) -> Tensor | None:
    """Returns the factor (N,) of each row's loss in the reduced loss, None for "none". Never synchronises."""
    _checks.check_one_of(reduction, "reduction", ("mean", "sum", "none"))
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
    if num_items is None:
        return counted / counted.sum().clamp(min=1)
    if isinstance(num_items, Tensor):
        num_items = _checked_tensor(num_items)
        # Without items there is nothing to divide by, and the loss is 0.
        return counted / num_items.masked_fill(num_items == 0, 1) * (num_items != 0)
    number = _checks.as_at_least_zero(num_items, "num_items")
    return counted / number if number else torch.zeros_like(counted)


def _checked_tensor(num_items: Tensor) -> Tensor:
    """Checks a tensor of one element and returns it as a scalar; its value is read on a CPU only."""
    _checks.check_no_gradient(num_items, "num_items")
    if num_items.numel() != 1 or num_items.dtype == torch.bool or num_items.is_complex():
        raise ValueError(
            f"num_items must be one number for the whole batch, got a tensor of shape {tuple(num_items.shape)} and "
            f"{num_items.dtype}: sum the counts of all devices"
        )
    if num_items.device.type == "cpu" and not torch.compiler.is_compiling():
        _checks.as_at_least_zero(num_items, "num_items")
    return num_items.detach().reshape(())


def scale_in_forward(row_scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns ``row_scale`` where the forward pass reduces the loss and makes its gradient, None where it cannot.

    It cannot for float16: its gradients underflow unless they are multiplied by the loss scale before they are
    rounded, and only the backward pass knows the loss scale.
    """
    return None if dtype == torch.float16 else row_scale


def pack_result(loss: Tensor, stats: Tensor, row_scale: Tensor | None, leading_shape: torch.Size) -> SlimLoss:
    """Packs a loss and statistics (M, N) into a ``SlimLoss`` with the leading shape restored.

    A ``loss`` (N,) is reduced by ``row_scale`` first, where there is one; a scalar ``loss`` is reduced already.
    """
    if row_scale is None:
        loss = loss.reshape(leading_shape)
    elif loss.ndim:
        loss = (loss * row_scale).sum()
    else:
        # The operator's backward pass refers to its own loss, and the caller may change this one in place.
        loss = loss.clone()
    return SlimLoss(loss, *(row.reshape(leading_shape) for row in stats[1:].unbind()))
