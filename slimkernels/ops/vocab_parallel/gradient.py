"""Stage 4 of a vocabulary-parallel loss: the gradient of its rows by this rank's slice of the logits."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.ops._slim_options import SlimOptions
from slimkernels.ops.vocab_parallel import softmax_gradient  # noqa: F401 -- defines the operator
from slimkernels.ops.vocab_parallel.kept import KeptEntries
from slimkernels.ops.vocab_parallel.slice import VocabSlice
from slimkernels.ops.vocab_parallel.terms import Measures, StudentSums, TeacherSums, effective, transform_slope


class RowScales(NamedTuple):
    """Numbers of the gradient (N,), float64, before the factor of each row.

    By z the gradient is softmax_scale * s + uniform + kd_scale * dD/d(z / T), plus label_slope at the label.
    """

    softmax_scale: Tensor
    uniform: Tensor
    kd_scale: Tensor
    label_slope: Tensor


def row_scales(options: SlimOptions, student: StudentSums, measures: Measures, vocab_size: Tensor) -> RowScales:
    """Computes the ``RowScales`` of settled rows."""
    through_weight = (options.kd_weight * measures.kd * measures.w_slope).masked_fill(measures.w_slope == 0, 0.0)
    # A weight of 0 drops the divergence, even where w is not a number.
    w = measures.w if options.kd_weight else torch.zeros_like(measures.w)
    return RowScales(
        softmax_scale=options.ce_weight + 2 * options.z_loss_weight * student.lse_one - through_weight,
        uniform=-options.ce_weight * options.label_smoothing / vocab_size,
        kd_scale=options.kd_weight * w * options.temperature,
        label_slope=through_weight - options.ce_weight * (1 - options.label_smoothing),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class RowGradients:
    """The gradient of settled rows, which ``write`` makes for one chunk of rows at a time.

    Attributes:
        vocab: This rank's slice.
        options: Options of the loss.
        acc: Accumulation dtype.
        target: (N,) labels.
        active: (N,) whether the row is not ignored.
        sound: (N,) whether the row could be computed.
        kept: Kept entries of the rows; None without a teacher.
        student: Results of stage 1.
        teacher: Results of stage 2; None without a teacher.
        measures: Results of stage 3.
        scales: Numbers of the gradient that do not depend on the factor of each row.
    """

    vocab: VocabSlice
    options: SlimOptions
    acc: torch.dtype
    target: Tensor
    active: Tensor
    sound: Tensor
    kept: KeptEntries | None
    student: StudentSums
    teacher: TeacherSums | None
    measures: Measures
    scales: RowScales

    @property
    def temperature(self) -> float:
        """T of the exponentials off S; 1 without a teacher, whatever the options say."""
        return 1.0 if self.kept is None else self.options.temperature

    def write(self, rows: slice, logits: Tensor, out: Tensor, row_scale: Tensor) -> None:
        """Writes the gradient of sum(row_scale * loss) by the slice's logits (rows, V_local) to ``out``.

        ``out`` may be ``logits`` itself.
        """
        options, acc, active = self.options, self.acc, self.active[rows]
        scale = row_scale.double().masked_fill(~self.sound[rows], math.nan).masked_fill(~active, 0.0)
        numbers = self._dense_numbers(rows, scale).masked_fill(~active, 0.0).to(acc)
        label, own_label = self.vocab.columns(self.target[rows].unsqueeze(1))
        label_z = effective(logits.gather(1, label), options, acc)
        at_label = (scale * self.scales.label_slope[rows]).to(acc).unsqueeze(1)
        at_column = _dense(label_z, numbers, self.temperature) + at_label.masked_fill(~own_label, 0.0)
        at_column = at_column * transform_slope(label_z, options)
        columns, values = label, at_column
        if self.kept is not None and self.teacher is not None:
            columns, owned = self.kept.columns(rows)
            values = self._kept_gradient(self.kept, self.teacher, rows, owned, scale, at_label)
            # The label may be kept. Entries of other slices repeat the value written at the label's column.
            is_label = (columns == label) & owned
            kept_here = values.masked_fill(~is_label, 0.0).sum(1, keepdim=True)
            at_column = torch.where(is_label.any(1, keepdim=True), kept_here, at_column)
            columns = torch.cat([torch.where(owned, columns, label), label], dim=1)
            values = torch.cat([torch.where(owned, values, at_column), at_column], dim=1)
        torch.ops.slimkernels.softmax_gradient_rows(
            logits, out, numbers, self.temperature, options.softcap, options.logit_scale
        )
        out.scatter_(1, columns, values.masked_fill(~active.unsqueeze(1), 0.0).to(out.dtype))

    def _dense_numbers(self, rows: slice, scale: Tensor) -> Tensor:
        """Computes the numbers (5, rows) that ``softmax_gradient_rows`` takes, in float64."""
        lse_one, softmax_scale = self.student.lse_one[rows], self.scales.softmax_scale[rows] * scale
        constant = self.scales.uniform[rows] * scale
        if self.kept is None:
            level = _level(lse_one, self.acc)
            zero = torch.zeros_like(level)
            return torch.stack([softmax_scale * (level - lse_one).exp(), level, zero, zero, constant])
        measures, kd_scale = self.measures, self.scales.kd_scale[rows] * scale
        off_level = measures.off_level[rows]
        constant = constant + kd_scale * measures.off_constant[rows]
        level, level_one = _level(off_level * self.temperature, self.acc), _level(lse_one, self.acc)
        factor = kd_scale * measures.off_factor[rows] * (level / self.temperature - off_level).exp()
        if self.temperature == 1:
            # At T = 1 both softmaxes are the same exponentials.
            factor = factor + softmax_scale * (level - lse_one).exp()
            factor_one = torch.zeros_like(factor)
        else:
            factor_one = softmax_scale * (level_one - lse_one).exp()
        return torch.stack([factor.masked_fill(off_level == -math.inf, 0.0), level, factor_one, level_one, constant])

    def _kept_gradient(
        self, kept: KeptEntries, teacher: TeacherSums, rows: slice, owned: Tensor, scale: Tensor, at_label: Tensor
    ) -> Tensor:
        """Computes the gradient by the student's logits at S (rows, K)."""

        def column(values: Tensor) -> Tensor:
            return values.to(self.acc).unsqueeze(1)

        z, p, _, slope = kept.terms(rows, owned, self.student, teacher)
        dz = (z - column(self.student.lse_one[rows])).exp() * column(self.scales.softmax_scale[rows] * scale)
        dz = dz + column(self.scales.uniform[rows] * scale)
        if self.options.kd_weight:
            dz = dz + (slope - p * column(self.measures.mean_slope[rows])) * column(self.scales.kd_scale[rows] * scale)
        dz = dz + at_label * kept.is_label(rows, self.target)
        return dz * transform_slope(z, self.options)


def _dense(z: Tensor, numbers: Tensor, temperature: float) -> Tensor:
    """Computes ``softmax_gradient_rows`` by z at one column (rows, 1)."""
    factor, level, factor_one, level_one, constant = numbers.unsqueeze(-1)
    dz = ((z - level) / temperature).exp() * factor + constant
    return dz if temperature == 1 else dz + (z - level_one).exp() * factor_one


def _level(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds a log-sum-exp to a level that the kernel represents exactly; 0 for -inf."""
    return lse.masked_fill(lse == -math.inf, 0.0).to(dtype).double()
