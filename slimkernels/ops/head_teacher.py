"""``HeadTeacher``: a teacher's hidden states and lm_head, whose rows ``linear_slim_loss`` makes chunk by chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.ops._slim_options import SlimOptions


@dataclass(frozen=True)
class HeadTeacher:
    """Rows of ``linear_topk_logits`` that ``linear_slim_loss`` makes and drops within its own loop over chunks.

    In place of ``teacher``, this is equivalent to the rows of::

        linear_topk_logits(hidden, weight, top_k, top_fraction, bias=bias, target=target,
                           temperatures=(1.0, temperature), softcap=softcap, logit_scale=logit_scale)

    with the loss's own ``target`` and ``temperature``, without the (N, K) rows: extra memory is O(chunk_rows * V).

    Args:
        hidden: (..., E) float32, bfloat16, float16 or float64, the teacher's last hidden states, one row for each row
            of the student's. E and the dtype may differ from the student's. Gets no gradient, like every field.
        weight: (V, E) of the same dtype, the teacher's lm_head weight, over the student's vocabulary.
        top_k: K, 1 to V. Give this or ``top_fraction``.
        top_fraction: K as a share of the vocabulary, ``ceil(top_fraction * V)``; 1.0 is distillation from full rows.
        bias: (V,) of the same dtype, or None.
        softcap: Positive limit of the teacher's logits, or None for no limit.
        logit_scale: Positive factor on the teacher's logits, applied before the softcap.

    Raises:
        ValueError: Shapes do not match, or an option is out of its range.
        TypeError: Dtypes are not supported or differ.

    >>> teacher = HeadTeacher(torch.eye(2), torch.zeros(4, 2), top_fraction=0.5)
    >>> teacher.num_kept
    2
    """

    hidden: Tensor
    weight: Tensor
    top_k: int | None = None
    top_fraction: float | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        _checks.check_head(self.hidden, self.weight, self.bias)
        _checks.resolve_top_k(self.top_k, self.top_fraction, self.weight.shape[0])
        _checks.as_positive(self.logit_scale, "logit_scale")
        if self.softcap is not None:
            _checks.as_positive(self.softcap, "softcap")

    @property
    def num_kept(self) -> int:
        """K, the number of logits that are kept of every row."""
        return _checks.resolve_top_k(self.top_k, self.top_fraction, self.weight.shape[0])


class TeacherHead(NamedTuple):
    """A ``HeadTeacher`` as arguments of the operator, in the order of ``HEAD_SCHEMA``; ``hidden`` None for none."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    top_k: int = 0
    softcap: float = 0.0
    logit_scale: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields that are tensors; they come first."""
        return self[:3]

    @property
    def settings(self) -> tuple[int | float, ...]:
        """The fields that are numbers."""
        return self[3:]

    def options_of(self, rows: slice, options: SlimOptions, target: Tensor, dtype: torch.dtype) -> SlimOptions:
        """Returns the options of some of the rows, with the teacher's rows made for them.

        Args:
            rows: The rows.
            options: Options of all rows.
            target: (N,) labels of all rows.
            dtype: Dtype of the teacher's log-sum-exps and label logits.
        """
        given = options.rows(rows)
        if self.hidden is None or self.weight is None:
            return given
        hidden, labels = self.hidden[rows], target[rows]
        counted = labels != options.ignore_index
        # Labels outside the vocabulary are left to the loss's kernel, which names their row.
        labels = labels.masked_fill(~counted | (labels >= self.weight.shape[0]), -100)
        # Leaving out the ignored rows would need a synchronisation on CUDA.
        kept = None if hidden.device.type != "cpu" or bool(counted.all()) else counted.nonzero().squeeze(1)
        if kept is not None:
            hidden, labels = hidden[kept], labels[kept]
        temperature = options.temperature
        temperatures = [1.0] if temperature == 1 else [1.0, temperature]
        is_plain = not self.softcap and self.logit_scale == 1
        values, ids, lse, rest_lse, target_logit = torch.ops.slimkernels.linear_topk_logits(
            hidden, self.weight, self.bias, self.top_k, labels, temperatures, self.softcap, self.logit_scale, is_plain,
            max(hidden.shape[0], 1), None
        )  # fmt: skip
        per_row = (lse[:, -1], lse[:, 0], rest_lse[:, -1], target_logit)
        fields = (ids, values, *(field.to(dtype).contiguous() for field in per_row))
        if kept is not None:
            fills = (-1, 0.0, 0.0, 0.0, -math.inf, 0.0)
            num_rows = counted.shape[0]
            fields = tuple(
                field.new_full((num_rows, *field.shape[1:]), fill).index_copy_(0, kept, field)
                for field, fill in zip(fields, fills, strict=True)
            )
        return given._replace(**dict(zip(_ROW_FIELDS, fields, strict=True)))


_ROW_FIELDS = SlimOptions._fields[:6]
HEAD_SCHEMA = (
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, SymInt top_k, float teacher_softcap,"
    " float teacher_logit_scale"
)


def teacher_head(teacher: HeadTeacher, hidden: Tensor, weight: Tensor) -> TeacherHead:
    """Checks a teacher against the student's hidden (..., D) and weight (V, D), and flattens it to rows."""
    leading_shape = tuple(hidden.shape[:-1])
    if tuple(teacher.hidden.shape[:-1]) != leading_shape:
        raise ValueError(
            f"teacher.hidden must hold one row for each row of hidden, {leading_shape}, "
            f"got {tuple(teacher.hidden.shape[:-1])}"
        )
    if teacher.weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"teacher.weight must have the vocabulary of weight, {weight.shape[0]} rows, "
            f"got {teacher.weight.shape[0]}: cut the rows that pad either head"
        )
    _checks.check_same_device(teacher.hidden, "teacher.hidden", hidden, "hidden")
    return TeacherHead(
        teacher.hidden.detach().reshape(-1, teacher.hidden.shape[-1]),
        teacher.weight.detach(),
        None if teacher.bias is None else teacher.bias.detach(),
        teacher.num_kept,
        0.0 if teacher.softcap is None else _checks.as_positive(teacher.softcap, "softcap"),
        _checks.as_positive(teacher.logit_scale, "logit_scale"),
    )
