"""The Triton kernel of ``slim_loss``: one program per row, read twice (the second time from L2) and written once.

The four stages of every backend are functions here: ``sum_student``, ``sum_teacher``, ``measure`` and
``write_gradient``. ``ops/README.md`` lists their names and equations; y is z / unit, see ``unit_logits``.

Off the kept ids S the gradient is one scalar of the row times exp((z - level) / T), plus a constant, whatever the
divergence. So the row is written densely, and the K entries of S and the label are written afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.ops.triton import launch
from slimkernels.ops.triton._math import double
from slimkernels.ops.triton._slim_passes import (
    DenseGradient,
    KeptGradient,
    Outcomes,
    TeacherRow,
    blend,
    dense_gradient_at,
    diverge_kept,
    fill_row,
    highest_below,
    highest_kept,
    highest_of_teacher,
    scatter_kept_gradient,
    store_stats,
    sum_kept,
    sum_kept_of_teacher,
    sum_off,
    sum_row,
    write_kept_gradient,
    write_row,
)
from slimkernels.ops.triton._slim_statistics import entropy_of_teacher, fill_statistics, store_statistics
from slimkernels.ops.triton._slim_terms import Mode, Options, diverge, missing_slope, student_row, unit_logits, weigh
from slimkernels.ops.triton._teacher import finite_norm, kept_entries, log_q_tail_of, teacher_q_norm


class RowNumbers(NamedTuple):
    """Pointers to one number per row, and the row; those that are not given are None."""

    n: tl.tensor
    row_scale_ptr: tl.tensor
    teacher_lse_ptr: tl.tensor
    teacher_lse_one_ptr: tl.tensor
    teacher_rest_lse_ptr: tl.tensor
    target_logit_ptr: tl.tensor
    token_weight_ptr: tl.tensor


class StudentSums(NamedTuple):
    """Results of stage 1, float64 except for the levels and ``label_y``, which have the accumulation dtype.

    Attributes:
        level: Level of the exponentials off S.
        on_level: Level of the exponentials on S.
        lse: Log-sum-exp of z / T.
        lse_one: Log-sum-exp of z.
        lse_on: Log-sum-exp of z / T on S.
        off_e: Sum of exp((z - level) / T) off S, for "ghost" only.
        sum_z: Sum of z, where it is needed.
        off_scaled_z: Sum of z / T off S, where it is needed.
        label_y: The label's y.
        log_s_y: Log-probability of the label at temperature 1.
        label_entry: The label's index in S, -1 where the label is off S.
    """

    level: tl.tensor
    on_level: tl.tensor
    lse: tl.tensor
    lse_one: tl.tensor
    lse_on: tl.tensor
    off_e: tl.tensor
    sum_z: tl.tensor
    off_scaled_z: tl.tensor
    label_y: tl.tensor
    log_s_y: tl.tensor
    label_entry: tl.tensor


class TeacherSums(NamedTuple):
    """Results of stage 2, float64 except for the level, which has the accumulation dtype.

    Attributes:
        level: Largest logit at S, 0 where all are -inf.
        lse_on: Log-sum-exp of logit / T at S.
        lse: The given log-sum-exp of the whole row at T, NaN where it is unknown.
        q_norm: log q = logit / T - q_norm at S.
        log_q_tail: log(1 - a), the teacher's mass off S, for "ghost" only.
        log_t_y: Log-probability of the label at temperature 1.
        rest_lse: Log-sum-exp of logit / T off S, NaN where it is unknown or not needed.
    """

    level: tl.tensor
    lse_on: tl.tensor
    lse: tl.tensor
    q_norm: tl.tensor
    log_q_tail: tl.tensor
    log_t_y: tl.tensor
    rest_lse: tl.tensor


class Measures(NamedTuple):
    """Results of stage 3, float64.

    Attributes:
        loss: Loss of the row.
        ce: Cross entropy.
        kd: D * T^2.
        w: Token weight.
        w_slope: dw / d log s_y.
        teacher_mass: a, the teacher's mass on S.
        student_mass: P, the student's mass on S.
        mean_slope: Sum of p * dD/dp over all outcomes.
        off_factor: dD/d(z / T) off S is off_factor * exp((z - level) / T) + off_constant.
        off_constant: See ``off_factor``.
    """

    loss: tl.tensor
    ce: tl.tensor
    kd: tl.tensor
    w: tl.tensor
    w_slope: tl.tensor
    teacher_mass: tl.tensor
    student_mass: tl.tensor
    mean_slope: tl.tensor
    off_factor: tl.tensor
    off_constant: tl.tensor


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def slim_loss_kernel(
    logits_ptr,  # (N, V)
    dlogits_ptr,  # (N, V), logits_ptr itself, or None: no gradient
    stats_ptr,  # (M, N): loss, ce, kd, weight, teacher_mass, student_mass, lse, and the statistics that MODE asks for
    target_ptr,  # (N,)
    row_scale_ptr,  # (N,) or None
    ids_ptr,  # (N, K) or None: no teacher
    teacher_ptr,  # (N, K)
    teacher_lse_ptr,  # (N,) at the temperature, or None
    teacher_lse_one_ptr,  # (N,) at temperature 1
    teacher_rest_lse_ptr,  # (N,) at the temperature, NaN where unknown, or None where it is not needed
    target_logit_ptr,  # (N,) or None
    token_weight_ptr,  # (N,) or None
    kept_gradient_ptr,  # (N, K) scratch of the dtype of dlogits
    logits_stride,
    dlogits_stride,
    num_rows,
    vocab_size,
    top_k,
    ignore_index,
    temperature: tl.float64,
    beta: tl.float64,
    alpha: tl.float64,
    forward_weight: tl.float64,
    entropy_threshold: tl.float64,
    teacher_blend: tl.float64,
    tail_weight: tl.float64,
    ce_weight: tl.float64,
    kd_weight: tl.float64,
    label_smoothing: tl.float64,
    z_loss_weight: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    MODE: tl.constexpr,
):
    """Computes one row per program: fills an ignored or faulty row, runs the four stages on any other."""
    BLOCK_V: tl.constexpr = MODE.block_v
    BLOCK_K: tl.constexpr = MODE.block_k
    n = tl.program_id(0).to(tl.int64)
    logits_ptr += n * logits_stride
    if dlogits_ptr is not None:
        dlogits_ptr += n * dlogits_stride
    kept = 0
    if MODE.has_teacher:
        ids_ptr += n * top_k
        teacher_ptr += n * top_k
        if dlogits_ptr is not None:
            kept_gradient_ptr += n * top_k
        kept = kept_entries(ids_ptr, top_k, vocab_size, BLOCK_K)
    target = tl.load(target_ptr + n)
    ignored = target == ignore_index
    # Raising would need a synchronisation, so bad rows become NaN.
    faulty = (target < 0) | (target >= vocab_size) | (kept < 0)
    if ignored | faulty:
        fill = tl.where(ignored, 0.0, float("nan"))
        store_stats(stats_ptr + n, num_rows, fill, fill, fill, fill, fill, fill, fill)
        if MODE.statistics != "none":
            fill_statistics(stats_ptr + n, num_rows, fill, MODE)
        if dlogits_ptr is not None:
            fill_row(dlogits_ptr, vocab_size, fill, BLOCK_V)
    else:
        options = Options(
            double(temperature),
            double(beta),
            double(alpha),
            double(forward_weight),
            double(entropy_threshold),
            double(teacher_blend),
            double(tail_weight),
            double(ce_weight),
            double(kd_weight),
            double(label_smoothing),
            double(z_loss_weight),
            double(logit_scale),
        )
        row = student_row(logits_ptr, vocab_size, options.temperature, double(softcap), options.logit_scale, MODE)
        teacher = TeacherRow(ids_ptr, teacher_ptr, kept, (1 / options.temperature).to(MODE.acc))
        numbers = RowNumbers(
            n,
            row_scale_ptr,
            teacher_lse_ptr,
            teacher_lse_one_ptr,
            teacher_rest_lse_ptr,
            target_logit_ptr,
            token_weight_ptr,
        )
        student_sums = sum_student(row, teacher, target, MODE)
        teacher_sums = sum_teacher(teacher, student_sums.label_entry, vocab_size, numbers, options, MODE)
        outcomes = outcomes_of(row, teacher, student_sums, teacher_sums, options, MODE)
        m = measure(row, teacher, student_sums, teacher_sums, outcomes, numbers, options, MODE)
        store_stats(
            stats_ptr + n, num_rows, m.loss, m.ce, m.kd, m.w, m.teacher_mass, m.student_mass, student_sums.lse_one
        )
        if MODE.statistics != "none":
            store_statistics(
                stats_ptr + n, num_rows, row, teacher, target, student_sums, teacher_sums, options.temperature, MODE
            )
        if dlogits_ptr is not None:
            write_gradient(
                dlogits_ptr,
                kept_gradient_ptr,
                row,
                teacher,
                target,
                student_sums,
                outcomes,
                m,
                numbers,
                options,
                MODE,
            )


@triton.jit
def sum_student(row, teacher, target, MODE: tl.constexpr):
    """Computes the ``StudentSums`` of a row."""
    GHOST: tl.constexpr = MODE.has_teacher and MODE.rest == "ghost"
    SUMS_LOGITS: tl.constexpr = MODE.smooths or (MODE.has_teacher and MODE.rest == "zero_logit")
    minus_inf = tl.full((), float("-inf"), tl.float64)
    zero = tl.full((), 0.0, tl.float64)

    # The exponentials of a row are relative to its largest kept logit, which is near its maximum, or to the maximum of
    # its first block where nothing is kept.
    level = tl.full((), float("-inf"), MODE.acc)
    on_level = level
    if MODE.has_teacher:
        level = highest_kept(row, teacher, MODE)
        on_level = tl.where(level == float("-inf"), 0.0, level)
    if level == float("-inf"):
        first = tl.arange(0, MODE.block_v)
        level = tl.max(unit_logits(row, first, first < row.vocab_size, MODE, "evict_last"))
    sums = sum_row(row, level, GHOST, SUMS_LOGITS, MODE)
    # Far above the level exponentials overflow, and before that carry the rounding of their arguments.
    sound = (sums.e < 1e9) & (sums.e_one < 1e9) & (level > float("-inf"))
    if ~sound:
        level = highest_below(row, float("inf"), float("inf"), MODE)
        level = tl.where(level == float("-inf"), 0.0, level)
        sums = sum_row(row, level, GHOST, SUMS_LOGITS, MODE)
    lse = level * row.scale + tl.log(sums.e)
    lse_one = level * row.unit + tl.log(sums.e_one)
    sum_z = tl.where(sums.num_minus_inf > 0, minus_inf, sums.y * row.unit)

    lse_on = minus_inf
    off_e = zero
    off_scaled_z = zero
    label_entry = -1
    if MODE.has_teacher:
        on = sum_kept(row, teacher, target, on_level, SUMS_LOGITS, MODE)
        lse_on = on_level * row.scale + tl.log(on.e)
        label_entry = on.label_entry
        off_scaled_z = tl.where(sums.num_minus_inf > on.num_minus_inf, minus_inf, (sums.y - on.y) * row.scale)
        if GHOST:
            off_e, level = sum_off(row, teacher, sums.e, level, MODE)
    label_y = unit_logits(row, target, target >= 0, MODE, "")
    log_s_y = label_y * row.unit - lse_one
    return StudentSums(level, on_level, lse, lse_one, lse_on, off_e, sum_z, off_scaled_z, label_y, log_s_y, label_entry)


@triton.jit
def sum_teacher(teacher, label_entry, vocab_size, numbers, options, MODE: tl.constexpr):
    """Computes the ``TeacherSums`` of a row; without a teacher they are not used."""
    # Triton 3.5 takes a constant as an argument only where it is bound to a name.
    REST: tl.constexpr = MODE.rest
    minus_inf = tl.full((), float("-inf"), tl.float64)
    level = tl.full((), 0.0, MODE.acc)
    lse_on = minus_inf
    lse = tl.full((), float("nan"), tl.float64)
    q_norm = lse
    log_q_tail = minus_inf
    log_t_y = minus_inf
    rest_lse = lse
    if MODE.has_teacher:
        log_t_y = tl.load(teacher.logits_ptr + label_entry, mask=label_entry >= 0, other=float("-inf")).to(tl.float64)
        level = highest_of_teacher(teacher, MODE)
        level = tl.where(level == float("-inf"), 0.0, level)
        lse_on = level / options.temperature + tl.log(sum_kept_of_teacher(teacher, level, MODE))
        if numbers.teacher_lse_ptr is not None:
            lse = tl.load(numbers.teacher_lse_ptr + numbers.n).to(tl.float64)
        if numbers.teacher_rest_lse_ptr is not None:
            rest_lse = tl.load(numbers.teacher_rest_lse_ptr + numbers.n).to(tl.float64)
        q_norm = teacher_q_norm(lse_on, lse, rest_lse, teacher.kept, vocab_size, REST)
        if MODE.rest == "ghost":
            log_q_tail = log_q_tail_of(lse_on, lse, rest_lse, q_norm, teacher.kept, vocab_size)
        if numbers.target_logit_ptr is not None:
            known = tl.load(numbers.target_logit_ptr + numbers.n).to(tl.float64)
            log_t_y = tl.where(known == known, known, log_t_y)
        if numbers.teacher_lse_one_ptr is not None:
            log_t_y -= finite_norm(tl.load(numbers.teacher_lse_one_ptr + numbers.n).to(tl.float64))
    return TeacherSums(level, lse_on, lse, q_norm, log_q_tail, log_t_y, rest_lse)


@triton.jit
def outcomes_of(row, teacher, student_sums, teacher_sums, options, MODE: tl.constexpr):
    """Makes the ``Outcomes`` from the student's and the teacher's sums; without a teacher they are not used."""
    minus_inf = tl.full((), float("-inf"), tl.float64)
    p_norm = student_sums.lse
    if MODE.rest == "renorm_both":
        p_norm = student_sums.lse_on
    p_offset = tl.where(student_sums.lse_on == minus_inf, 0.0, student_sums.on_level * row.scale - p_norm)
    q_offset = teacher_sums.level / options.temperature - teacher_sums.q_norm
    log_p_tail = minus_inf
    if MODE.has_teacher and MODE.rest == "ghost":
        log_p_tail = student_sums.level * row.scale + tl.log(student_sums.off_e) - student_sums.lse
    gate = tl.full((), 0.0, tl.float64)
    if MODE.has_teacher and MODE.divergence == "gated":
        entropy = entropy_of_teacher(teacher, teacher_sums, options.temperature, row.vocab_size, MODE)
        gate = tl.where(entropy > options.entropy_threshold, options.forward_weight, gate)
    outcomes = Outcomes(
        student_sums.on_level,
        p_offset.to(MODE.acc),
        teacher_sums.level,
        q_offset.to(MODE.acc),
        tl.full((), 0.0, MODE.acc),
        log_p_tail,
        teacher_sums.log_q_tail,
        teacher_sums.lse_on,
        gate,
    )
    if MODE.has_teacher and MODE.blends:
        outcomes = blend(row, teacher, outcomes, options, MODE)
    return outcomes


@triton.jit
def measure(row, teacher, student_sums, teacher_sums, outcomes, numbers, options, MODE: tl.constexpr):
    """Computes the ``Measures`` of a row from the sums and outcomes of both."""
    minus_inf = tl.full((), float("-inf"), tl.float64)
    zero = tl.full((), 0.0, tl.float64)
    lse_one = student_sums.lse_one
    ce = -student_sums.log_s_y
    if MODE.smooths:
        smoothing = options.label_smoothing
        ce = (1 - smoothing) * ce + smoothing * (lse_one - student_sums.sum_z / row.vocab_size)
    loss = tl.where(options.ce_weight == 0, 0.0, options.ce_weight * ce)
    loss += tl.where(options.z_loss_weight == 0, 0.0, options.z_loss_weight * lse_one * lse_one)

    kd = zero
    w = zero
    w_slope = zero
    teacher_mass = zero
    student_mass = zero
    mean_slope = zero
    off_factor = zero
    off_constant = zero
    if MODE.has_teacher:
        given = zero
        if numbers.token_weight_ptr is not None:
            given = tl.load(numbers.token_weight_ptr + numbers.n).to(tl.float64)
        w, w_slope = weigh(student_sums.log_s_y, teacher_sums.log_t_y, given, MODE)
        teacher_mass = tl.exp(teacher_sums.lse_on - finite_norm(teacher_sums.lse))
        student_mass = tl.exp(student_sums.lse_on - student_sums.lse)

        value, mean_slope = diverge_kept(row, teacher, outcomes, options, MODE)
        # The factor that turns exp((z - level) / T) into p.
        to_p = tl.exp(tl.where(student_sums.lse == minus_inf, 0.0, student_sums.level * row.scale - student_sums.lse))
        if MODE.rest == "ghost":
            off_e = student_sums.off_e
            share, slope = diverge(outcomes.log_q_tail, outcomes.log_p_tail, outcomes.gate, options, MODE)
            value += tl.where(options.tail_weight == 0, 0.0, options.tail_weight * share)
            # The forward slopes add up to exactly -1, or to 0 in a teacher's row of nothing but -inf; rounding their
            # sum would drown a small (1 - a) - (1 - P).
            if MODE.divergence == "forward_kl" or MODE.divergence == "soft_ce":
                is_empty = (outcomes.log_q_on == minus_inf) & (outcomes.log_q_tail == minus_inf)
                mean_slope = tl.where(is_empty, zero, -1.0)
            else:
                mean_slope += slope
            p_tail = tl.exp(outcomes.log_p_tail)
            change = (options.tail_weight - 1) * (slope + missing_slope(outcomes.gate, options, MODE) * p_tail)
            slope += change
            mean_slope += change
            coefficient = slope - p_tail * mean_slope
            off_factor = tl.where(off_e == 0, 0.0, coefficient / tl.where(off_e == 0, 1.0, off_e))
        elif MODE.rest == "zero_logit":
            unkept = (row.vocab_size - teacher.kept).to(tl.float64)
            each = tl.exp(-teacher_sums.q_norm)
            expected_z = student_sums.off_scaled_z - unkept * student_sums.lse
            if MODE.divergence == "forward_kl":
                expected_z += unkept * teacher_sums.q_norm
            # An outcome of the mass 0 has no share, whatever the student gives it.
            value -= tl.where((unkept > 0) & (each != 0), each * expected_z, 0.0)
            mean_slope = tl.where((unkept == 0) & (teacher_sums.lse_on == minus_inf), zero, -1.0)
            off_factor = -mean_slope * to_p
            off_constant = -each
        elif MODE.rest != "renorm_both":
            off_factor = -mean_slope * to_p
        kd = value * options.temperature * options.temperature
        loss += tl.where(options.kd_weight == 0, 0.0, options.kd_weight * w * kd)
    return Measures(loss, ce, kd, w, w_slope, teacher_mass, student_mass, mean_slope, off_factor, off_constant)


@triton.jit
def write_gradient(
    dlogits_ptr,
    kept_gradient_ptr,
    row,
    teacher,
    target,
    student_sums,
    outcomes,
    m,
    numbers,
    options,
    MODE: tl.constexpr,
):
    """Writes the gradient of a row: by z it is softmax_scale * s + uniform + kd_scale * dD/d(z / T), plus at_label."""
    minus_inf = tl.full((), float("-inf"), tl.float64)
    lse_one = student_sums.lse_one
    row_scale = options.logit_scale
    if numbers.row_scale_ptr is not None:
        row_scale *= tl.load(numbers.row_scale_ptr + numbers.n).to(tl.float64)
    # A weight of 0 drops the divergence from the gradient, even where it is infinite.
    drops_kd = options.kd_weight == 0
    through_weight = tl.where(drops_kd | (m.w_slope == 0), 0.0, options.kd_weight * m.kd * m.w_slope)
    softmax_scale = row_scale * (options.ce_weight + 2 * options.z_loss_weight * lse_one - through_weight)
    kd_scale = tl.where(drops_kd, 0.0, row_scale * options.kd_weight * m.w * options.temperature)
    uniform = -row_scale * options.ce_weight * options.label_smoothing / row.vocab_size
    at_label = (row_scale * (through_weight - options.ce_weight * (1 - options.label_smoothing))).to(MODE.acc)

    is_empty = lse_one == minus_inf
    one_scale = softmax_scale * tl.exp(tl.where(is_empty, 0.0, student_sums.level * row.unit - lse_one))
    off_scale = tl.where(drops_kd, 0.0, kd_scale * m.off_factor)
    if not MODE.two_temperatures:
        # At T = 1 both softmaxes are the same exponentials.
        off_scale += one_scale
    constant = (uniform + tl.where(drops_kd, 0.0, kd_scale * m.off_constant)).to(MODE.acc)
    dense = DenseGradient(
        student_sums.level, off_scale.to(MODE.acc), student_sums.level, one_scale.to(MODE.acc), constant
    )
    if MODE.has_teacher:
        on_one_scale = softmax_scale * tl.exp(tl.where(is_empty, 0.0, student_sums.on_level * row.unit - lse_one))
        kept_gradient = KeptGradient(
            on_one_scale.to(MODE.acc),
            uniform.to(MODE.acc),
            kd_scale.to(MODE.acc),
            m.mean_slope.to(MODE.acc),
            at_label,
        )
        write_kept_gradient(kept_gradient_ptr, row, teacher, target, outcomes, kept_gradient, options, MODE)
    # The kept logits must have been read before they are overwritten.
    tl.debug_barrier()
    write_row(dlogits_ptr, row, dense, MODE)
    # Every entry must be written before another thread overwrites it with the gradient on S or at the label.
    tl.debug_barrier()
    if MODE.has_teacher:
        scatter_kept_gradient(dlogits_ptr, teacher, kept_gradient_ptr, MODE)
    if student_sums.label_entry < 0:
        dense_at_label = DenseGradient(
            dense.level, dense.off_scale, dense.level_one, dense.one_scale, constant + at_label
        )
        tl.store(dlogits_ptr + target, dense_gradient_at(student_sums.label_y, row, dense_at_label, MODE))


def slim_loss_rows(
    logits: Tensor,
    dlogits: Tensor | None,
    stats: Tensor,
    target: Tensor,
    row_scale: Tensor | None,
    ids: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_lse: Tensor | None,
    teacher_lse_one: Tensor | None,
    teacher_rest_lse: Tensor | None,
    target_logit: Tensor | None,
    token_weight: Tensor | None,
    temperature: float,
    rest: str,
    divergence: str,
    weighting: str,
    detach_weight: bool,
    beta: float,
    alpha: float,
    forward_weight: float,
    entropy_threshold: float,
    teacher_blend: float,
    tail_weight: float,
    ce_weight: float,
    kd_weight: float,
    label_smoothing: float,
    z_loss_weight: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    statistics: str,
) -> int:
    """Launches the kernel, and returns 0: learning of a bad row would need a synchronisation."""
    num_rows, vocab_size = logits.shape
    settings = launch.settings_of("slim_loss", logits)
    top_k = 0
    kept_gradient = None
    if ids is not None:
        top_k = ids.shape[1]
        if dlogits is not None:
            kept_gradient = torch.empty_like(ids, dtype=logits.dtype)
    launch.run(
        slim_loss_kernel,
        num_rows,
        settings,
        logits,
        logits,
        dlogits,
        stats,
        target,
        row_scale,
        ids,
        teacher_logits,
        teacher_lse,
        teacher_lse_one,
        teacher_rest_lse if rest == "ghost" or divergence == "gated" or statistics != "none" else None,
        target_logit,
        token_weight,
        kept_gradient,
        logits.stride(0),
        0 if dlogits is None else dlogits.stride(0),
        num_rows,
        vocab_size,
        top_k,
        ignore_index,
        temperature,
        beta,
        alpha,
        forward_weight,
        entropy_threshold,
        teacher_blend,
        tail_weight,
        ce_weight,
        kd_weight,
        label_smoothing,
        z_loss_weight,
        softcap,
        logit_scale,
        MODE=Mode(
            has_teacher=ids is not None,
            rest=rest,
            divergence=divergence,
            weighting=weighting,
            detach_weight=detach_weight,
            two_temperatures=temperature != 1,
            blends=teacher_blend != 1,
            smooths=label_smoothing > 0,
            softcap=softcap > 0,
            statistics=statistics,
            acc=launch.accumulation_dtype(logits.dtype),
            block_v=launch.block_of(settings, vocab_size),
            block_k=launch.block_of(settings, top_k),
        ),
    )
    return 0
