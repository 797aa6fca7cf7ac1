"""``HeadTeacher``: a teacher's hidden states and lm_head, whose rows ``linear_slim_loss`` makes chunk by chunk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.ops._chunks import head_numbers, read_numbers, scaled_and_capped
from slimkernels.ops._kept_logits import empty_rows
from slimkernels.ops._slim_options import SlimOptions
from slimkernels.ops.linear_topk_logits import linear_topk_logits
from slimkernels.ops.vocab_parallel.slice import whole
from slimkernels.sparse_logits import SparseLogits


@dataclasses.dataclass(frozen=True, eq=False)
class HeadTeacher:
    """Rows of ``linear_topk_logits`` that ``linear_slim_loss`` makes and drops within its own loop over chunks.

    In place of ``teacher``, this is equivalent to the rows of::

        linear_topk_logits(hidden, weight, top_k, top_fraction, bias=bias, target=target,
                           temperatures=(1.0, temperature), softcap=softcap, logit_scale=logit_scale)

    with the loss's own ``target`` and ``temperature``, without the (N, K) rows: extra memory is O(chunk_rows * V). With
    K = V nothing is selected or copied, because the loss reads the teacher's product itself. With ``kd_weight=0``
    nothing is made of the teacher, and the loss's fields of the divergence are 0.

    Args:
        hidden: (..., E) float32, bfloat16, float16 or float64, the teacher's last hidden states, one row for each row
            of the student's. E and the dtype may differ from the student's. Gets no gradient, like every field.
        weight: (V, E) of the same dtype, the teacher's lm_head weight. V is the student's vocabulary, or less where
            only the student's head is padded; a teacher's padding must be cut off, ``weight[:V]``.
        top_k: K, 1 to V. Give this or ``top_fraction``.
        top_fraction: K as a share of the vocabulary, ``ceil(top_fraction * V)``; 1.0 is distillation from full rows.
        bias: (V,) of the same dtype, or None.
        softcap: Positive limit of the teacher's logits, or None for no limit.
        logit_scale: Positive factor on the teacher's logits, applied before the softcap.

    Raises:
        ValueError: Shapes do not match, an option is out of its range, or a field is one rank's part of a tensor.
        TypeError: Dtypes are not supported or differ, or two teachers are compared with ``==``.

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
        for name in ("hidden", "weight", "bias"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, whole(given, f"HeadTeacher.{name}"))
        _checks.check_head(self.hidden, self.weight, self.bias)
        _checks.resolve_top_k(self.top_k, self.top_fraction, self.weight.shape[0])
        _checks.as_positive(self.logit_scale, "logit_scale")
        if self.softcap is not None:
            _checks.as_positive(self.softcap, "softcap")

    def __eq__(self, other: object) -> bool:
        """Returns whether both are the same object.

        Raises:
            TypeError: The other is another HeadTeacher.
        """
        if self is not other and isinstance(other, HeadTeacher):
            raise TypeError("HeadTeachers have no ==: compare their fields, for example with torch.equal")
        return self is other

    __hash__ = object.__hash__

    @property
    def num_kept(self) -> int:
        """K, the number of logits that are kept of every row."""
        return _checks.resolve_top_k(self.top_k, self.top_fraction, self.weight.shape[0])

    def rows(self, target: Tensor | None = None, temperatures: Sequence[float] = (1.0,)) -> SparseLogits:
        """Returns the rows (..., K) that ``linear_topk_logits`` makes of this teacher, for where they must be held."""
        head = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return linear_topk_logits(**head, target=target, temperatures=temperatures)


class TeacherHead(NamedTuple):
    """A ``HeadTeacher`` as arguments of the operator, in the order of ``HEAD_SCHEMA``; ``hidden`` None for none."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    operand: Tensor | None = None
    top_k: int = 0
    softcap: float = 0.0
    logit_scale: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields that are tensors; they come first."""
        return self[:4]

    @property
    def settings(self) -> tuple[int | float, ...]:
        """The fields that are numbers."""
        return self[4:]


HEAD_SCHEMA = (
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_operand, SymInt top_k,"
    " float teacher_softcap, float teacher_logit_scale"
)


def teacher_head(teacher: HeadTeacher, hidden: Tensor, weight: Tensor) -> TeacherHead:
    """Checks a teacher against the student's hidden (..., D) and weight (V, D), and flattens it to rows."""
    leading_shape = tuple(hidden.shape[:-1])
    if tuple(teacher.hidden.shape[:-1]) != leading_shape:
        raise ValueError(
            f"teacher.hidden must hold one row for each row of hidden, {leading_shape}, "
            f"got {tuple(teacher.hidden.shape[:-1])}"
        )
    if teacher.weight.shape[0] > weight.shape[0]:
        raise ValueError(
            f"teacher.weight must have at most the {weight.shape[0]} rows of weight, got {teacher.weight.shape[0]}: "
            f"cut the rows that pad it, teacher.weight[:{weight.shape[0]}]"
        )
    _checks.check_same_device(teacher.hidden, "teacher.hidden", hidden, "hidden")
    numbers = head_numbers((), teacher.softcap, teacher.logit_scale)
    return TeacherHead(
        teacher.hidden.detach().reshape(-1, teacher.hidden.shape[-1]),
        teacher.weight.detach(),
        None if teacher.bias is None else teacher.bias.detach(),
        numbers.operand,
        teacher.num_kept,
        numbers.softcap,
        numbers.logit_scale,
    )


class ChunkedRows:
    """The options of a loss for one chunk of rows after the other, with the teacher's rows made for each chunk.

    Args:
        head: The teacher; one without ``hidden`` leaves the options as they are.
        options: Options of all rows.
        target: (N,) labels of all rows.
        dtype: Dtype of the teacher's log-sum-exps and label logits.
        vocab_size: V, the student's vocabulary.
        chunk_rows: Largest number of rows of a chunk.
    """

    def __init__(
        self,
        head: TeacherHead,
        options: SlimOptions,
        target: Tensor,
        dtype: torch.dtype,
        vocab_size: int,
        chunk_rows: int,
    ) -> None:
        self._options, self._target, self._dtype, self._vocab_size = options, target, dtype, vocab_size
        self._hidden = head.hidden
        if head.hidden is None or head.weight is None:
            return
        self._weight, self._bias, self._top_k = head.weight, head.bias, head.top_k
        _, self._softcap, self._logit_scale = read_numbers((), head.softcap, head.logit_scale, head.operand)
        self._is_plain = not self._softcap and self._logit_scale == 1
        self._temperatures = [1.0] if options.temperature == 1 else [1.0, options.temperature]
        # The logits of a chunk and their ids, where all are kept.
        self._whole: tuple[Tensor, Tensor] | None = None
        if self._top_k == self._weight.shape[0]:
            num_rows = min(chunk_rows, head.hidden.shape[0])
            ids = torch.arange(self._top_k, dtype=torch.int32, device=target.device).repeat(num_rows, 1)
            self._whole = head.hidden.new_empty(num_rows, self._top_k), ids

    def options_of(self, rows: slice) -> SlimOptions:
        """Returns the options of some of the rows."""
        given = self._options.rows(rows)
        if self._hidden is None:
            return given
        hidden, labels = self._hidden[rows], self._target[rows]
        counted = labels != self._options.ignore_index
        # Labels outside the student's vocabulary are left to the loss's kernel, which names their row.
        labels = labels.masked_fill(~counted | (labels >= self._vocab_size), -100)
        kept = None
        # Leaving out the ignored rows would need a synchronisation on CUDA.
        if hidden.device.type == "cpu":
            self._check_labels(labels, rows.start)
            if not counted.all():
                kept = counted.nonzero().squeeze(1)
                hidden, labels = hidden[kept], labels[kept]
        fields = self._largest(hidden, labels) if self._whole is None else self._all(hidden, labels, *self._whole)
        if kept is not None:
            fills = (-1, 0.0, 0.0, 0.0, -math.inf, 0.0)
            num_rows = counted.shape[0]
            fields = tuple(
                field.new_full((num_rows, *field.shape[1:]), fill).index_copy_(0, kept, field)
                for field, fill in zip(fields, fills, strict=True)
            )
        return given._replace(**dict(zip(_ROW_FIELDS, fields, strict=True)))

    def _check_labels(self, labels: Tensor, first_row: int) -> None:
        outside = labels >= self._weight.shape[0]
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"target[{first_row + row}] must be a token of the teacher's vocabulary, below "
                f"{self._weight.shape[0]}, or ignored, got {int(labels[row])}, a row that pads the student's head"
            )

    def _largest(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Selects the K largest logits of the rows."""
        values, ids, lse, rest_lse, target_logit = torch.ops.slimkernels.linear_topk_logits(
            hidden, self._weight, self._bias, self._top_k, labels, self._temperatures, self._softcap, self._logit_scale,
            self._is_plain, max(hidden.shape[0], 1), None
        )  # fmt: skip
        return ids, values, *self._per_row(lse[:, -1], lse[:, 0], rest_lse[:, -1], target_logit)

    def _all(self, hidden: Tensor, labels: Tensor, buffer: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        """Computes all logits of the rows in a buffer, where the loss reads them."""
        num_rows = hidden.shape[0]
        product = buffer[:num_rows]
        if self._bias is None:
            torch.mm(hidden, self._weight.t(), out=product)
        else:
            torch.addmm(self._bias, hidden, self._weight.t(), out=product)
        logits = product if self._is_plain else scaled_and_capped(product, self._logit_scale, self._softcap)
        # No id is asked for, so the sums are over whole rows.
        no_ids = labels.new_full((num_rows, 1), -1, dtype=torch.int32)
        outputs = empty_rows(logits, 1, labels, len(self._temperatures))
        torch.ops.slimkernels.gather_logits_rows(logits, no_ids, labels, self._temperatures, *outputs)
        _, lse, _, target_logit = outputs
        no_rest = torch.full_like(target_logit, -math.inf)
        return ids[:num_rows], logits, *self._per_row(lse[:, -1], lse[:, 0], no_rest, target_logit)

    def _per_row(self, *fields: Tensor) -> tuple[Tensor, ...]:
        return tuple(field.to(self._dtype).contiguous() for field in fields)


_ROW_FIELDS = SlimOptions._fields[:6]
