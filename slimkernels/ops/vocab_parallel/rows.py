"""The rows of a vocabulary-parallel loss, from the sums of this rank's slice up to the numbers of the gradient.

``VocabRows`` runs the stages 1 to 3 that all backends share, and ``gradient.RowGradients`` runs stage 4;
``ops/README.md`` lists their names and equations. Numbers of a row (N,) are float64. Tensors over S, (rows, K), exist
for a chunk of rows at a time, except for the student's logits at S.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.ops._library import accumulation_dtype
from slimkernels.ops._slim_options import SlimOptions
from slimkernels.ops.vocab_parallel.divergences import blend, diverge, missing_slope
from slimkernels.ops.vocab_parallel.gradient import RowGradients, row_scales
from slimkernels.ops.vocab_parallel.kept import KeptEntries
from slimkernels.ops.vocab_parallel.slice import VocabSlice
from slimkernels.ops.vocab_parallel.terms import (
    Measures,
    StudentSums,
    TeacherSums,
    effective,
    entropy_of_parts,
    finite_norm,
    log1m_exp,
    log_sum_exp,
    slice_log_sum_and_entropy,
    slice_log_sums,
    weigh,
)

# Numbers that each rank sends for every row: log-sum-exps of its slice at temperature 1 and at T, and at T off S
# and on S; the label's z; the sums of z over the slice and over S; and four numbers that the ranks check.
PARTIALS = ("lse_one", "lse", "lse_off", "lse_on", "label_z", "sum_z", "sum_z_on", "target", "start", "size")
# With statistics each rank also sends the entropy of its slice's softmax, its largest logit, and the id of that logit.
STATISTICS = ("entropy", "top", "argmax")


class SettledRows(NamedTuple):
    """The loss (N,) and the statistics (M, N) of all rows, and the writer of their gradient."""

    loss: Tensor
    stats: Tensor
    gradient: RowGradients


class VocabRows:
    """The rows of one call: ``read`` takes the logits of one chunk of rows after the other, ``settle`` follows once."""

    def __init__(self, dtype: torch.dtype, target: Tensor, options: SlimOptions, vocab: VocabSlice) -> None:
        self._vocab, self._target, self._options = vocab, target, options
        self._active = target != options.ignore_index
        self._acc = accumulation_dtype(dtype)
        self._kept = None if options.ids is None else KeptEntries(options, vocab, dtype)
        self._temperature = 1.0 if self._kept is None else options.temperature
        self._has_ghost = self._kept is not None and options.rest == "ghost"
        self._sums_z = options.label_smoothing > 0 or (self._kept is not None and options.rest == "zero_logit")
        self._watches = options.statistics != "none"
        self._needs_entropy = self._watches or options.divergence == "gated"
        self._names = PARTIALS + STATISTICS if self._watches else PARTIALS
        self._partials = target.new_zeros(len(self._names), target.numel(), dtype=torch.float64)
        self._chunks: list[slice] = []

    def read(self, rows: slice, logits: Tensor) -> None:
        """Sums this rank's slice of the logits (rows, V_local): its part of stage 1."""
        self._chunks.append(rows)
        options, active, acc = self._options, self._active[rows], self._acc
        part = dict(zip(self._names, self._partials[:, rows].unbind(), strict=True))
        if self._watches:
            part["lse_one"][:], part["entropy"][:] = slice_log_sum_and_entropy(logits, active, options)
            top, column = logits.max(1)
            part["top"][:], part["argmax"][:] = top, column + self._vocab.start
        else:
            part["lse_one"][:], _ = slice_log_sums(logits, active, None, options, 1.0)
        label, owned = self._vocab.columns(self._target[rows].unsqueeze(1))
        label_z = effective(logits.gather(1, label), options, acc).masked_fill(~owned, -math.inf)
        part["label_z"][:] = label_z.squeeze(1)
        part["target"][:] = self._target[rows]
        part["start"][:], part["size"][:] = self._vocab.start, self._vocab.size
        if self._sums_z:
            plain = options.softcap == 0
            z = logits if plain else effective(logits, options, acc)
            part["sum_z"][:] = z.sum(1, dtype=acc) * (options.logit_scale if plain else 1.0)
        if self._kept is None:
            return
        self._kept.read(rows, logits)
        _, owned = self._kept.columns(rows)
        z = self._kept.z(rows, owned)
        part["lse_on"][:] = log_sum_exp(z / self._temperature)
        part["sum_z_on"][:] = z.masked_fill(~owned, 0.0).sum(1, dtype=torch.float64)
        if self._has_ghost:
            own_ids = self._kept.own_ids(rows)
            _, part["lse_off"][:] = slice_log_sums(logits, active, own_ids, options, self._temperature)
        elif self._temperature == 1:
            part["lse"][:] = part["lse_one"]
        else:
            part["lse"][:], _ = slice_log_sums(logits, active, None, options, self._temperature)

    def settle(self) -> SettledRows:
        """Exchanges the sums with the other ranks, and computes the loss and the statistics."""
        gathered: dict[str, Tensor] = dict(zip(self._names, self._vocab.gather(self._partials).unbind(1), strict=True))
        vocab_size = gathered["size"].sum(0)
        highest_id, unsorted = (None, None) if self._kept is None else (self._kept.highest_id(), self._kept.unsorted)
        sound = self._vocab.sound_rows(gathered, self._target, self._active, highest_id, unsorted)
        student = self._sum_student(gathered)
        teacher = None if self._kept is None else self._sum_teacher(self._kept, vocab_size)
        mixed = teacher
        if self._kept is not None and teacher is not None and self._options.teacher_blend != 1:
            mixed = self._blend(self._kept, student, teacher)
        m = self._measure(student, teacher, mixed, vocab_size)
        stats = torch.stack([m.loss, m.ce, m.kd, m.w, m.teacher_mass, m.student_mass, student.lse_one])
        if self._watches:
            stats = torch.cat([stats, self._statistics(student, teacher)])
        stats = stats.masked_fill(~sound, math.nan).masked_fill(~self._active, 0.0).to(self._acc)
        gradient = RowGradients(
            vocab=self._vocab,
            options=self._options,
            acc=self._acc,
            target=self._target,
            active=self._active,
            sound=sound,
            kept=self._kept,
            student=student,
            teacher=mixed,
            measures=m,
            scales=row_scales(self._options, student, m, vocab_size),
        )
        return SettledRows(stats[0].clone(), stats, gradient)

    def _sum_student(self, gathered: dict[str, Tensor]) -> StudentSums:
        """Adds up the slices: the rest of stage 1."""
        lse_one = gathered["lse_one"].logsumexp(0)
        label_z, sum_z = gathered["label_z"].amax(0), gathered["sum_z"].sum(0)
        lse = lse_on = lse_off = lse_one
        if self._kept is not None:
            lse_on = gathered["lse_on"].logsumexp(0)
            lse_off = gathered["lse_off"].logsumexp(0)
            lse = torch.logaddexp(lse_off, lse_on) if self._has_ghost else gathered["lse"].logsumexp(0)
        sum_z_off = sum_z - gathered["sum_z_on"].sum(0)
        entropy = argmax = lse_one
        if self._watches:
            entropy = entropy_of_parts(gathered["lse_one"] - lse_one, gathered["entropy"])
            is_top = gathered["top"] == gathered["top"].amax(0)
            argmax = gathered["argmax"].masked_fill(~is_top, math.inf).amin(0)
        return StudentSums(lse_one, lse, lse_on, lse_off, label_z - lse_one, entropy, argmax, sum_z, sum_z_off)

    def _sum_teacher(self, kept: KeptEntries, vocab_size: Tensor) -> TeacherSums:
        """Sums the teacher's rows, which every rank has whole: stage 2."""
        options = self._options
        lse_on, label_logit, inside = (torch.empty_like(vocab_size) for _ in range(3))
        for rows in self._chunks:
            teacher_z = kept.teacher_z(rows)
            lse_on[rows] = log_sum_exp(teacher_z)
            at_label = teacher_z.masked_fill(~kept.is_label(rows, self._target), -math.inf)
            label_logit[rows] = at_label.amax(1).double() * options.temperature
            if self._needs_entropy:
                log_q = teacher_z.double() - lse_on[rows].unsqueeze(1)
                inside[rows] = -(log_q.exp() * log_q).masked_fill(teacher_z == -math.inf, 0.0).sum(1)
        if options.target_logit is not None:
            label_logit = torch.where(options.target_logit.isnan(), label_logit, options.target_logit.double())
        num_unkept = vocab_size - (kept.ids >= 0).sum(1)
        lse = torch.full_like(lse_on, math.nan) if options.teacher_lse is None else options.teacher_lse.double()
        is_whole = (num_unkept == 0) | (lse == -math.inf)
        ghost_norm, log_q_tail = lse, log1m_exp(lse_on - lse).masked_fill(is_whole, -math.inf)
        if options.teacher_rest_lse is not None:
            rest_lse = options.teacher_rest_lse.double()
            summed = torch.logaddexp(lse_on, rest_lse)
            is_known = ~rest_lse.isnan()
            ghost_norm = torch.where(is_known, summed, ghost_norm)
            log_q_tail = torch.where(is_known, rest_lse - finite_norm(summed), log_q_tail)
        ghost_norm = finite_norm(ghost_norm)
        if options.rest in ("renorm", "renorm_both"):
            q_norm = lse_on
        elif options.rest == "zero_logit":
            q_norm = torch.logaddexp(lse_on, num_unkept.log())
        else:
            q_norm = ghost_norm if options.rest == "ghost" else lse
        q_norm, entropy = finite_norm(q_norm), lse
        gate = blend_norm = torch.zeros_like(lse)
        if self._needs_entropy:
            log_masses = torch.stack([lse_on - ghost_norm, log_q_tail])
            entropy = entropy_of_parts(log_masses, torch.stack([inside, torch.zeros_like(inside)]))
        if options.divergence == "gated":
            gate = options.forward_weight * (entropy > options.entropy_threshold)
        log_t_y = label_logit
        if options.teacher_lse_one is not None:
            log_t_y = label_logit - finite_norm(options.teacher_lse_one.double())
        return TeacherSums(lse_on, lse, q_norm, log_q_tail, log_t_y, entropy, num_unkept, gate.double(), blend_norm)

    def _blend(self, kept: KeptEntries, student: StudentSums, teacher: TeacherSums) -> TeacherSums:
        """Returns the teacher with the mixture softmax(t log q + (1 - t) log p) over the outcomes in its place."""
        sums = student.lse.new_empty(1, student.lse.numel())
        for rows in self._chunks:
            _, owned = kept.columns(rows)
            _, _, log_q = kept.outcomes(rows, owned, student, teacher)
            sums[0, rows] = log_sum_exp(log_q)
        log_q_on = self._vocab.gather(sums)[:, 0].logsumexp(0)
        log_q_tail = torch.full_like(log_q_on, -math.inf)
        if self._has_ghost:
            log_q_tail = blend(teacher.log_q_tail, student.lse_off - student.lse, self._options)
        norm = finite_norm(torch.logaddexp(log_q_on, log_q_tail))
        return teacher._replace(lse_on=log_q_on, log_q_tail=log_q_tail - norm, blend_norm=norm)

    def _statistics(self, student: StudentSums, teacher: TeacherSums | None) -> Tensor:
        """Computes the statistics (5, N) after ``lse``: those that are computed only where they are asked for."""
        none = torch.zeros_like(student.entropy)
        teacher_entropy = argmax_kept = surer = none
        if teacher is not None and self._kept is not None:
            teacher_entropy = teacher.entropy
            argmax_kept = (self._kept.ids == student.argmax.unsqueeze(1)).any(1)
            surer = teacher.log_t_y > student.log_s_y
        fields = (student.entropy, teacher_entropy, argmax_kept, student.argmax == self._target, surer)
        return torch.stack([field.double() for field in fields]).masked_fill(student.lse_one.isnan(), math.nan)

    def _measure(
        self, student: StudentSums, teacher: TeacherSums | None, mixed: TeacherSums | None, vocab_size: Tensor
    ) -> Measures:
        """Computes the loss of every row and its terms, D from the ``mixed`` teacher: stage 3."""
        options, smoothing = self._options, self._options.label_smoothing
        ce = -student.log_s_y
        if smoothing:
            ce = (1 - smoothing) * ce + smoothing * (student.lse_one - student.sum_z / vocab_size)
        loss = options.ce_weight * ce if options.ce_weight else torch.zeros_like(ce)
        if options.z_loss_weight:
            loss = loss + options.z_loss_weight * student.lse_one.square()
        if self._kept is None or teacher is None or mixed is None:
            none = torch.zeros_like(ce)
            return Measures(loss, ce, *[none] * 8, off_level=student.lse)
        w, w_slope = weigh(student.log_s_y, teacher.log_t_y, options.token_weight, options)
        value, mean_slope, off_factor, off_constant, off_level = self._diverge(self._kept, student, mixed)
        kd = value * options.temperature**2
        if options.kd_weight:
            loss = loss + options.kd_weight * w * kd
        else:
            # A weight of 0 drops the divergence from the gradient, even where it is infinite.
            w_slope, mean_slope, off_factor, off_constant = (
                torch.zeros_like(of_kd) for of_kd in (w_slope, mean_slope, off_factor, off_constant)
            )
        return Measures(
            loss=loss,
            ce=ce,
            kd=kd,
            w=w,
            w_slope=w_slope,
            teacher_mass=(teacher.lse_on - finite_norm(teacher.lse)).exp(),
            student_mass=(student.lse_on - student.lse).exp(),
            mean_slope=mean_slope,
            off_factor=off_factor,
            off_constant=off_constant,
            off_level=off_level,
        )

    def _diverge(self, kept: KeptEntries, student: StudentSums, teacher: TeacherSums) -> tuple[Tensor, ...]:
        """Computes D without T^2, and the mean_slope, off_factor, off_constant and off_level of ``Measures``."""
        options = self._options
        sums = student.lse.new_empty(2, student.lse.numel())
        for rows in self._chunks:
            _, owned = kept.columns(rows)
            _, _, share, slope = kept.terms(rows, owned, student, teacher)
            sums[0, rows] = share.sum(1, dtype=torch.float64)
            sums[1, rows] = slope.sum(1, dtype=torch.float64)
        self._vocab.add_up(sums)
        value, mean_slope = sums
        off_level, off_constant = student.lse, torch.zeros_like(value)
        # The forward slopes add up to exactly -1, or to 0 in a teacher's row of nothing but -inf; rounding their sum
        # would drown a small (1 - a) - (1 - P).
        forward_slope = torch.full_like(value, -1.0)
        if self._has_ghost:
            log_p_tail = student.lse_off - student.lse
            share, slope = diverge(teacher.log_q_tail, log_p_tail, teacher.gate, options)
            if options.tail_weight:
                value = value + options.tail_weight * share
            is_empty = (teacher.lse_on == -math.inf) & (teacher.log_q_tail == -math.inf)
            is_forward = options.divergence in ("forward_kl", "soft_ce")
            mean_slope = forward_slope.masked_fill(is_empty, 0.0) if is_forward else mean_slope + slope
            p_tail = log_p_tail.exp()
            if options.tail_weight != 1:
                change = (options.tail_weight - 1) * (slope + missing_slope(teacher.gate, options) * p_tail)
                slope, mean_slope = slope + change, mean_slope + change
            off_factor = slope - p_tail * mean_slope
            off_level = student.lse_off
        elif options.rest == "zero_logit":
            each = (-teacher.q_norm).exp()
            expected_z = student.sum_z_off / options.temperature - teacher.num_unkept * student.lse
            if options.divergence == "forward_kl":
                expected_z = expected_z + teacher.num_unkept * teacher.q_norm
            # An outcome of the mass 0 has no share, whatever the student gives it.
            value = value - (each * expected_z).masked_fill((teacher.num_unkept == 0) | (each == 0), 0.0)
            mean_slope = forward_slope.masked_fill((teacher.num_unkept == 0) & (teacher.lse_on == -math.inf), 0.0)
            off_factor, off_constant = -mean_slope, -each
        elif options.rest == "renorm_both":
            off_factor = torch.zeros_like(value)
        else:
            off_factor = -mean_slope
        return value, mean_slope, off_factor, off_constant, off_level
