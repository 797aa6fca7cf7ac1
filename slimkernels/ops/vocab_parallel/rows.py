"""The rows of a vocabulary-parallel loss: what this rank's slice of them sums to, and what all slices do.

Names as in csrc/cpu/slim_row.h: z student logits, s = softmax(z), p = softmax(z / T), q the teacher, S its kept ids, w
the token's weight, D the divergence. The numbers of a row (N,) are float64; tensors over S, (rows, K), exist for a
chunk of rows at a time, but for the student's logits at S.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from slimkernels.ops._library import accumulation_dtype
from slimkernels.ops._slim_options import SlimOptions
from slimkernels.ops.vocab_parallel import softmax_gradient  # noqa: F401 -- defines the operator
from slimkernels.ops.vocab_parallel.slice import VocabSlice
from slimkernels.ops.vocab_parallel.terms import (
    diverge,
    effective,
    log1m_exp,
    log_sum_exp,
    slice_log_sums,
    transform_slope,
    weigh,
)

# What a rank tells of each row: log-sum-exps at temperature 1 and T of its slice, at T of what is outside and inside
# S, the label's z, sums of z, all and inside S; and what all ranks must agree on.
PARTIALS = ("lse_one", "lse", "off", "on", "label_z", "sum_z", "sum_kept_z", "target", "start", "size")


class VocabRows:
    """First ``read`` for each chunk of rows, then ``settle`` once, then ``write_gradient`` for each chunk."""

    def __init__(self, dtype: torch.dtype, target: Tensor, options: SlimOptions, vocab: VocabSlice) -> None:
        self.vocab, self.target, self.options = vocab, target, options
        self.active = target != options.ignore_index
        self._acc = accumulation_dtype(dtype)
        self._has_teacher = options.ids is not None
        # Read where there is a teacher only, who has all three.
        self._ids = cast(Tensor, options.ids)
        self._teacher_logits = cast(Tensor, options.teacher_logits)
        self._teacher_lse_one = cast(Tensor, options.teacher_lse_one)
        self._temperature = options.temperature if self._has_teacher else 1.0
        self._ghost = self._has_teacher and options.rest == "ghost"
        self._sums_z = options.label_smoothing > 0 or (self._has_teacher and options.rest == "zero_logit")
        self._partials = target.new_zeros(len(PARTIALS), target.numel(), dtype=torch.float64)
        self._unsound = torch.zeros_like(self.active)
        if self._has_teacher:
            self._kept_logits = torch.empty_like(self._ids, dtype=dtype)
        self._chunks: list[slice] = []

    def read(self, rows: slice, logits: Tensor) -> None:
        """Sums up the slice's logits (rows, V_local)."""
        self._chunks.append(rows)
        options, active, acc = self.options, self.active[rows], self._acc
        part = dict(zip(PARTIALS, self._partials[:, rows].unbind(), strict=True))
        part["lse_one"][:], _ = slice_log_sums(logits, active, None, options, 1.0)
        label, owned = self.vocab.columns(self.target[rows].unsqueeze(1))
        label_z = effective(logits.gather(1, label), options, acc).masked_fill(~owned, -math.inf)
        part["label_z"][:] = label_z.squeeze(1)
        part["target"][:] = self.target[rows]
        part["start"][:], part["size"][:] = self.vocab.start, self.vocab.size
        if self._sums_z:
            plain = options.softcap == 0
            z = logits if plain else effective(logits, options, acc)
            part["sum_z"][:] = z.sum(1, dtype=acc) * (options.logit_scale if plain else 1.0)
        if not self._has_teacher:
            return
        columns, owned = self.vocab.columns(self._ids[rows])
        self._kept_logits[rows] = logits.gather(1, columns)
        z = self._kept_z(rows, owned)
        part["on"][:] = log_sum_exp(z / self._temperature)
        part["sum_kept_z"][:] = z.masked_fill(~owned, 0.0).sum(1, dtype=torch.float64)
        self._unsound[rows] = _unsorted(self._ids[rows])
        if self._ghost:
            own_ids = self.vocab.own_ids(self._ids[rows]).masked_fill(self._unsound[rows].unsqueeze(1), -1)
            _, part["off"][:] = slice_log_sums(logits, active, own_ids, options, self._temperature)
        elif self._temperature == 1:
            part["lse"][:] = part["lse_one"]
        else:
            part["lse"][:], _ = slice_log_sums(logits, active, None, options, self._temperature)

    def settle(self) -> tuple[Tensor, Tensor]:
        """Makes the numbers of all slices from those of each: the loss (N,) and the statistics (7, N)."""
        options = self.options
        gathered: dict[str, Tensor] = dict(zip(PARTIALS, self.vocab.gather(self._partials).unbind(1), strict=True))
        self._vocab_size = gathered["size"].sum(0)
        self._sound = self.vocab.sound_rows(gathered, self.target, self.active, self._highest_id(), self._unsound)
        self._lse_one = gathered["lse_one"].logsumexp(0)
        label_z, sum_z = gathered["label_z"].amax(0), gathered["sum_z"].sum(0)
        log_student = label_z - self._lse_one
        smoothing = options.label_smoothing
        ce = -log_student
        if smoothing:
            ce = (1 - smoothing) * ce + smoothing * (self._lse_one - sum_z / self._vocab_size)
        loss = options.ce_weight * ce if options.ce_weight else torch.zeros_like(ce)
        if options.z_loss_weight:
            loss = loss + options.z_loss_weight * self._lse_one.square()
        kd = w = teacher_mass = student_mass = through_weight = torch.zeros_like(ce)
        if self._has_teacher:
            self._on = gathered["on"].logsumexp(0)
            self._off = gathered["off"].logsumexp(0)
            self._lse = torch.logaddexp(self._off, self._on) if self._ghost else gathered["lse"].logsumexp(0)
            log_teacher, teacher_mass = self._read_teacher()
            w, w_slope = weigh(log_student, log_teacher, options.token_weight, options)
            kd = self._diverge(sum_z - gathered["sum_kept_z"].sum(0)) * options.temperature**2
            student_mass = (self._on - self._lse).exp()
            if options.kd_weight:
                loss = loss + options.kd_weight * w * kd
            through_weight = (options.kd_weight * kd * w_slope).masked_fill(w_slope == 0, 0.0)
            self._kd_scale = options.kd_weight * w * options.temperature
        self._softmax_scale = options.ce_weight + 2 * options.z_loss_weight * self._lse_one - through_weight
        self._label_slope = through_weight - options.ce_weight * (1 - smoothing)
        self._everywhere = -options.ce_weight * smoothing / self._vocab_size
        stats = torch.stack([loss, ce, kd, w, teacher_mass, student_mass, self._lse_one])
        stats = stats.masked_fill(~self._sound, math.nan).masked_fill(~self.active, 0.0).to(self._acc)
        return stats[0].clone(), stats

    def write_gradient(self, rows: slice, logits: Tensor, out: Tensor, row_scale: Tensor) -> None:
        """The gradient of sum(row_scale * loss) by the slice's logits (rows, V_local) into ``out``, maybe over them."""
        options, acc, active = self.options, self._acc, self.active[rows]
        scale = row_scale.double().masked_fill(~self._sound[rows], math.nan).masked_fill(~active, 0.0)
        numbers = self._dense_numbers(rows, scale).masked_fill(~active, 0.0).to(acc)
        label, own_label = self.vocab.columns(self.target[rows].unsqueeze(1))
        label_z = effective(logits.gather(1, label), options, acc)
        at_label = (scale * self._label_slope[rows]).to(acc).unsqueeze(1)
        at_column = _dense(label_z, numbers, self._temperature) + at_label.masked_fill(~own_label, 0.0)
        at_column = at_column * transform_slope(label_z, options)
        columns, values = label, at_column
        if self._has_teacher:
            columns, owned = self.vocab.columns(self._ids[rows])
            values = self._kept_gradient(rows, owned, scale, at_label)
            # The label may be kept. Entries of other slices write once more what is written at the label's column.
            is_label = (columns == label) & owned
            kept_here = values.masked_fill(~is_label, 0.0).sum(1, keepdim=True)
            at_column = torch.where(is_label.any(1, keepdim=True), kept_here, at_column)
            columns = torch.cat([torch.where(owned, columns, label), label], dim=1)
            values = torch.cat([torch.where(owned, values, at_column), at_column], dim=1)
        torch.ops.slimkernels.softmax_gradient_rows(
            logits, out, numbers, self._temperature, options.softcap, options.logit_scale
        )
        out.scatter_(1, columns, values.masked_fill(~active.unsqueeze(1), 0.0).to(out.dtype))

    def _kept_z(self, rows: slice, owned: Tensor) -> Tensor:
        """The student's effective logits at S (rows, K), -inf where another slice has them."""
        return effective(self._kept_logits[rows], self.options, self._acc).masked_fill(~owned, -math.inf)

    def _teacher_z(self, rows: slice) -> Tensor:
        """The teacher's logits / T (rows, K), -inf at padding."""
        scaled = self._teacher_logits[rows].to(self._acc) / self.options.temperature
        return scaled.masked_fill(self._ids[rows] < 0, -math.inf)

    def _highest_id(self) -> Tensor | None:
        return self._ids.amax(1) if self._has_teacher else None

    def _read_teacher(self) -> tuple[Tensor, Tensor]:
        """Its log-probability of the label, and its mass on S; every rank has the teacher's rows whole."""
        options = self.options
        log_kept, label_logit = torch.empty_like(self._lse), torch.empty_like(self._lse)
        for rows in self._chunks:
            scaled = self._teacher_z(rows)
            log_kept[rows] = log_sum_exp(scaled)
            at_label = scaled.masked_fill(self._ids[rows] != self.target[rows].unsqueeze(1), -math.inf)
            label_logit[rows] = at_label.amax(1).double() * options.temperature
        if options.target_logit is not None:
            label_logit = torch.where(options.target_logit.isnan(), label_logit, options.target_logit.double())
        self._num_unkept = self._vocab_size - (self._ids >= 0).sum(1)
        lse = torch.full_like(log_kept, math.nan) if options.teacher_lse is None else options.teacher_lse.double()
        self._log_teacher_tail = log1m_exp(log_kept - lse).masked_fill(self._num_unkept == 0, -math.inf)
        if options.rest in ("renorm", "renorm_both"):
            self._q_norm = log_kept.masked_fill(log_kept == -math.inf, 0.0)  # nothing kept has mass, and so it stays
        elif options.rest == "zero_logit":
            self._q_norm = torch.logaddexp(log_kept, self._num_unkept.log())
        else:
            self._q_norm = lse
        self._p_norm = self._on if options.rest == "renorm_both" else self._lse
        return label_logit - self._teacher_lse_one.double(), (log_kept - lse).exp()

    def _kept_terms(self, rows: slice, owned: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """At S (rows, K): z, p, the share of D and p * dD/dp; 0 where another slice has the entry."""
        z = self._kept_z(rows, owned)
        log_p = z / self.options.temperature - self._p_norm[rows].to(self._acc).unsqueeze(1)
        log_p = log_p.masked_fill(~owned, -math.inf)
        log_q = self._teacher_z(rows) - self._q_norm[rows].to(self._acc).unsqueeze(1)
        share, slope = diverge(log_q, log_p, self.options)
        return z, log_p.exp(), share.masked_fill(~owned, 0.0), slope.masked_fill(~owned, 0.0)

    def _diverge(self, sum_off: Tensor) -> Tensor:
        """D of every row, without T^2; keeps what its gradient is made of."""
        options = self.options
        sums = self._lse.new_empty(2, self._lse.numel())
        for rows in self._chunks:
            _, owned = self.vocab.columns(self._ids[rows])
            _, _, share, slope = self._kept_terms(rows, owned)
            sums[0, rows] = share.sum(1, dtype=torch.float64)
            sums[1, rows] = slope.sum(1, dtype=torch.float64)
        self.vocab.add_up(sums)
        value, self._mean_slope = sums
        # By z / T, outside S, the gradient of D is `factor` * exp(z / T - level) + `constant`.
        self._off_level, self._off_constant = self._lse, torch.zeros_like(value)
        if self._ghost:
            log_tail = self._off - self._lse
            share, slope = diverge(self._log_teacher_tail, log_tail, options)
            value = value + share
            # The forward slopes add up to exactly -1; rounding their sum would drown a small (1 - a) - (1 - P).
            forward = options.divergence in ("forward_kl", "soft_ce")
            self._mean_slope = torch.full_like(value, -1.0) if forward else self._mean_slope + slope
            self._off_factor = slope - log_tail.exp() * self._mean_slope
            self._off_level = self._off
        elif options.rest == "zero_logit":
            each = (-self._q_norm).exp()
            expected = sum_off / options.temperature - self._num_unkept * self._lse
            if options.divergence == "forward_kl":
                expected = expected + self._num_unkept * self._q_norm
            value = value - (each * expected).masked_fill(self._num_unkept == 0, 0.0)
            self._mean_slope = torch.full_like(value, -1.0)
            self._off_factor, self._off_constant = torch.ones_like(value), -each
        elif options.rest == "renorm_both":
            self._off_factor = torch.zeros_like(value)
        else:
            self._off_factor = -self._mean_slope
        return value

    def _dense_numbers(self, rows: slice, scale: Tensor) -> Tensor:
        """What ``softmax_gradient_rows`` takes (5, rows), float64."""
        lse_one, softmax_scale = self._lse_one[rows], self._softmax_scale[rows] * scale
        constant = self._everywhere[rows] * scale
        if not self._has_teacher:
            level = _level(lse_one, self._acc)
            nothing = torch.zeros_like(level)
            return torch.stack([softmax_scale * (level - lse_one).exp(), level, nothing, nothing, constant])
        kd_scale, off_level = self._kd_scale[rows] * scale, self._off_level[rows]
        constant = constant + kd_scale * self._off_constant[rows]
        level, level_one = _level(off_level * self._temperature, self._acc), _level(lse_one, self._acc)
        factor = kd_scale * self._off_factor[rows] * (level / self._temperature - off_level).exp()
        if self._temperature == 1:
            # Both softmaxes are the same exponentials.
            factor = factor + softmax_scale * (level - lse_one).exp()
            factor_one = torch.zeros_like(factor)
        else:
            factor_one = softmax_scale * (level_one - lse_one).exp()
        return torch.stack([factor.masked_fill(off_level == -math.inf, 0.0), level, factor_one, level_one, constant])

    def _kept_gradient(self, rows: slice, owned: Tensor, scale: Tensor, at_label: Tensor) -> Tensor:
        """The gradient by the student's logits at S (rows, K)."""

        def column(values: Tensor) -> Tensor:
            return values.to(self._acc).unsqueeze(1)

        z, p, _, slope = self._kept_terms(rows, owned)
        dz = (z - column(self._lse_one[rows])).exp() * column(self._softmax_scale[rows] * scale)
        dz = dz + column(self._everywhere[rows] * scale)
        dz = dz + (slope - p * column(self._mean_slope[rows])) * column(self._kd_scale[rows] * scale)
        is_label = self._ids[rows] == self.target[rows].unsqueeze(1)
        dz = dz + at_label * is_label
        return dz * transform_slope(z, self.options)


def _dense(z: Tensor, numbers: Tensor, temperature: float) -> Tensor:
    """``softmax_gradient_rows`` at one column (rows, 1), by z."""
    factor, level, factor_one, level_one, constant = numbers.unsqueeze(-1)
    dz = ((z - level) / temperature).exp() * factor + constant
    return dz if temperature == 1 else dz + (z - level_one).exp() * factor_one


def _level(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """What exponentials are relative to: a number that the kernel has without rounding."""
    return lse.masked_fill(lse == -math.inf, 0.0).to(dtype).double()


def _unsorted(ids: Tensor) -> Tensor:
    """Which rows of ids (rows, K) do not ascend strictly and end in padding."""
    before, after = ids[:, :-1], ids[:, 1:]
    return ((after >= 0) & (after <= before)).any(1) | ((after >= 0) & (before < 0)).any(1) | (ids < -1).any(1)
