"""What ``slim_loss`` and ``linear_slim_loss`` share: their options, checked once, and their result."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.ops._library import accumulation_dtype
from slimkernels.sparse_logits import SparseLogits, widen_float8

DIVERGENCES = ("forward_kl", "soft_ce", "reverse_kl", "jsd", "skew_kl")
PROPER_ON_BOTH_SIDES = ("ghost", "renorm_both")
WEIGHTS = ("teacher_over_student", "student_over_teacher", "none")
NUM_STATS = 7


class SlimLoss(NamedTuple):
    """What a loss op returns; everything but ``loss`` is detached. Ignored tokens are 0 in every field.

    Attributes:
        loss: Scalar for "mean" and "sum", (...) for "none"; float32 (float64 for float64 logits), as all fields.
        ce: (...) cross entropy of the label, natural log, label smoothing included.
        kd: (...) T^2 times the divergence, before any weight.
        weight: (...) w, the token's weight on ``kd``.
        teacher_mass: (...) a, what the teacher gives to the kept ids at T. NaN where its lse at T is not known.
        student_mass: (...) P, what the student gives to them.
        lse: (...) the student's log-sum-exp at temperature 1.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    weight: Tensor
    teacher_mass: Tensor
    student_mass: Tensor
    lse: Tensor


class SlimOptions(NamedTuple):
    """The operators' arguments after the operands, in the order of their schema (N rows, K entries)."""

    ids: Tensor | None
    teacher_logits: Tensor | None
    teacher_lse: Tensor | None
    teacher_lse_one: Tensor | None
    target_logit: Tensor | None
    token_weight: Tensor | None
    temperature: float
    rest: str
    divergence: str
    weighting: str
    detach_weight: bool
    beta: float
    alpha: float
    ce_weight: float
    kd_weight: float
    label_smoothing: float
    z_loss_weight: float
    softcap: float
    logit_scale: float
    ignore_index: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields that hold a value per row."""
        return self[:6]

    def rows(self, rows: slice) -> SlimOptions:
        """The same options for some of the rows."""
        names = self._fields[: len(self.tensors)]
        return self._replace(
            **{name: None if t is None else t[rows] for name, t in zip(names, self.tensors, strict=True)}
        )


OPTIONS_SCHEMA = (
    "Tensor? ids, Tensor? teacher_logits, Tensor? teacher_lse, Tensor? teacher_lse_one, Tensor? target_logit,"
    " Tensor? token_weight, float temperature, str rest, str divergence, str weighting, bool detach_weight, float beta,"
    " float alpha, float ce_weight, float kd_weight, float label_smoothing, float z_loss_weight, float softcap,"
    " float logit_scale, int ignore_index"
)


def resolve_options(
    like: Tensor,
    like_name: str,
    teacher: SparseLogits | None,
    *,
    weight: str | Tensor,
    weight_name: str,
    softcap: float | None,
    **options,
) -> SlimOptions:
    """Checks the options against rows ``like`` (..., V or D) and brings the teacher's fields to flat rows."""
    _checks.is_positive(options["temperature"], "temperature")
    _checks.is_one_of(options["rest"], "rest", _checks.RESTS)
    _checks.is_one_of(options["divergence"], "divergence", DIVERGENCES)
    if options["divergence"] in ("reverse_kl", "jsd", "skew_kl") and options["rest"] not in PROPER_ON_BOTH_SIDES:
        raise ValueError(
            f"divergence={options['divergence']!r} needs a proper distribution on both sides: rest must be 'ghost' or "
            f"'renorm_both', got {options['rest']!r}"
        )
    if not 0 < options["beta"] < 1:
        raise ValueError(f"beta must be in (0, 1), got {options['beta']}")
    if not 0 <= options["alpha"] < 1:
        raise ValueError(f"alpha must be in [0, 1), got {options['alpha']}")
    if not 0 <= options["label_smoothing"] < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {options['label_smoothing']}")
    for name in ("ce_weight", "kd_weight", "z_loss_weight"):
        _checks.is_at_least_zero(options[name], name)
    _checks.is_positive(options["logit_scale"], "logit_scale")
    if softcap is not None:
        _checks.is_positive(softcap, "softcap")
    leading_shape = tuple(like.shape[:-1])
    token_weight = None
    if isinstance(weight, Tensor):
        if tuple(weight.shape) != leading_shape:
            raise ValueError(f"{weight_name} must have shape {leading_shape}, got {tuple(weight.shape)}")
        _checks.same_device(weight, weight_name, like, like_name)
        token_weight, weight = weight, "tensor"
    else:
        _checks.is_one_of(weight, weight_name, WEIGHTS)
    dtype = accumulation_dtype(like.dtype)

    def per_row(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().to(dtype).reshape(-1).contiguous()

    if teacher is not None:
        _check_teacher(teacher, like, like_name)
    kept_logits = None
    if teacher is not None:
        kept_logits = widen_float8(teacher.logits.detach().reshape(-1, teacher.top_k)).contiguous()
    return SlimOptions(
        ids=None if teacher is None else teacher.ids.reshape(-1, teacher.top_k).contiguous(),
        teacher_logits=kept_logits,
        teacher_lse=per_row(_lse_or_none(teacher, options["rest"], options["temperature"])),
        teacher_lse_one=None if teacher is None else per_row(teacher.lse[..., 0]),
        target_logit=None if teacher is None else per_row(teacher.target_logit),
        token_weight=per_row(token_weight),
        weighting=weight,
        softcap=softcap or 0.0,
        **options,
    )


def _check_teacher(teacher: SparseLogits, like: Tensor, like_name: str) -> None:
    if not isinstance(teacher, SparseLogits):
        raise TypeError(f"teacher must be a SparseLogits, got {type(teacher).__name__}: make one with topk_logits")
    if teacher.leading_shape != tuple(like.shape[:-1]):
        raise ValueError(
            f"teacher must hold one row for each row of {like_name}, {tuple(like.shape[:-1])}, "
            f"got {teacher.leading_shape}"
        )
    _checks.same_device(teacher.ids, "teacher", like, like_name)


def _lse_or_none(teacher: SparseLogits | None, rest: str, temperature: float) -> Tensor | None:
    if teacher is None:
        return None
    try:
        return teacher.lse_at(temperature)
    except ValueError:
        if rest in _checks.RESTS_WITH_LSE:
            raise
        return None  # it would only be reported, as teacher_mass


def reduction_scale(target: Tensor, ignore_index: int, reduction: str, num_items, dtype: torch.dtype) -> Tensor | None:
    """What each row's loss is multiplied by before the sum, (N,); None for "none". Never synchronises."""
    _checks.is_one_of(reduction, "reduction", ("mean", "sum", "none"))
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items is what reduction='mean' divides by; got it with reduction={reduction!r}")
    if reduction == "none":
        return None
    counted = (target != ignore_index).to(dtype)
    if reduction == "sum":
        return counted
    return counted / (counted.sum().clamp(min=1) if num_items is None else num_items)


def scale_in_forward(row_scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The scale an operator reduces with, and makes the gradient with, in its forward pass.

    None for float16: its gradients underflow unless the loss scale, known in the backward pass, comes before rounding.
    """
    return None if dtype == torch.float16 else row_scale


def pack_result(loss: Tensor, stats: Tensor, row_scale: Tensor | None, leading_shape: torch.Size) -> SlimLoss:
    """Reduces what the operator left per row, names the rows of ``stats`` (7, N), restores the leading shape."""
    if row_scale is None:
        loss = loss.reshape(leading_shape)
    elif loss.ndim:
        loss = (loss * row_scale).sum()
    return SlimLoss(loss, *(row.reshape(leading_shape) for row in stats[1:].unbind()))
