"""The Triton kernel of ``slim_loss``: one program per row, read twice (the second time from L2) and written once.

Off the kept ids S the gradient is one scalar of the row times exp((z - level) / T), plus a constant, whatever the
divergence. So the row is written densely, and the K entries and the label are put in afterwards.

The mass outside S is never 1 minus the rest in float32: the row and S are summed from the very same float32
exponentials, each sum exact to about 48 bits, and subtracted. Where too little is left, every logit that is too large
to be outside S is left out of both sums and the exponentials start from the largest of the others, until something is.

Names as in csrc/cpu/slim_row.h: z student logits, s = softmax(z), p = softmax(z / T), q the teacher, w the token's
weight, D the divergence; y is z / unit (see ``unit_logits``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.ops.triton import launch
from slimkernels.ops.triton._math import double
from slimkernels.ops.triton._slim_passes import (
    diverge_kept,
    fill_row,
    gradient_of,
    highest_below,
    highest_kept,
    scatter_kept_gradient,
    store_stats,
    sum_kept,
    sum_off,
    sum_row,
    write_kept_gradient,
    write_row,
)
from slimkernels.ops.triton._slim_terms import LOG2_E, diverge, unit_logits, weigh
from slimkernels.ops.triton._teacher import kept_entries, log_ghost, teacher_log_norm


@triton.jit
def slim_loss_kernel(
    logits_ptr,  # (N, V)
    dlogits_ptr,  # (N, V), logits_ptr itself, or None: no gradient
    stats_ptr,  # (7, N): loss, ce, kd, weight, teacher_mass, student_mass, lse
    target_ptr,  # (N,)
    row_scale_ptr,  # (N,) or None
    ids_ptr,  # (N, K) or None: no teacher
    teacher_ptr,  # (N, K)
    teacher_lse_ptr,  # (N,) at the temperature, or None
    teacher_lse_one_ptr,  # (N,) at temperature 1
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
    ce_weight: tl.float64,
    kd_weight: tl.float64,
    label_smoothing: tl.float64,
    z_loss_weight: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    REST: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    DETACH: tl.constexpr,
    TWO_TEMPERATURES: tl.constexpr,  # T is not 1
    SMOOTHS: tl.constexpr,  # label_smoothing is not 0
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per row: its ignored or faulty rows are filled, the others are read, measured and written."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    if dlogits_ptr is not None:
        dlogits_ptr += row * dlogits_stride
    kept = 0
    if ids_ptr is not None:
        ids_ptr += row * top_k
        teacher_ptr += row * top_k
        if dlogits_ptr is not None:
            kept_gradient_ptr += row * top_k
        kept = kept_entries(ids_ptr, top_k, vocab_size, BLOCK_K)
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    # No host reads what a row did wrong: its numbers are NaN.
    faulty = (target < 0) | (target >= vocab_size) | (kept < 0)
    if ignored | faulty:
        fill = tl.where(ignored, 0.0, float("nan"))
        store_stats(stats_ptr + row, num_rows, fill, fill, fill, fill, fill, fill, fill)
        if dlogits_ptr is not None:
            fill_row(dlogits_ptr, vocab_size, fill, BLOCK_V)
    else:
        slim_row(
            logits_ptr,
            dlogits_ptr,
            stats_ptr + row,
            target,
            row_scale_ptr,
            ids_ptr,
            teacher_ptr,
            teacher_lse_ptr,
            teacher_lse_one_ptr,
            target_logit_ptr,
            token_weight_ptr,
            kept_gradient_ptr,
            row,
            num_rows,
            vocab_size,
            kept,
            double(temperature),
            beta,
            alpha,
            double(ce_weight),
            double(kd_weight),
            double(label_smoothing),
            double(z_loss_weight),
            double(softcap),
            double(logit_scale),
            REST,
            DIVERGENCE,
            WEIGHTING,
            DETACH,
            TWO_TEMPERATURES,
            SMOOTHS,
            SOFTCAP,
            ACC,
            BLOCK_V,
            BLOCK_K,
        )


@triton.jit
def slim_row(
    row_ptr,
    dlogits_ptr,
    stats_ptr,
    target,
    row_scale_ptr,
    ids_ptr,
    teacher_ptr,
    teacher_lse_ptr,
    teacher_lse_one_ptr,
    target_logit_ptr,
    token_weight_ptr,
    kept_gradient_ptr,
    row,
    num_rows,
    vocab_size,
    kept,
    temperature,
    beta,
    alpha,
    ce_weight,
    kd_weight,
    label_smoothing,
    z_loss_weight,
    softcap,
    logit_scale,
    REST: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    DETACH: tl.constexpr,
    TWO_TEMPERATURES: tl.constexpr,
    SMOOTHS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A row that is neither ignored nor faulty; the pointers are at it, but for those to one number a row."""
    HAS_TEACHER: tl.constexpr = ids_ptr is not None
    GHOST: tl.constexpr = HAS_TEACHER and REST == "ghost"
    SUMS_LOGITS: tl.constexpr = SMOOTHS or (HAS_TEACHER and REST == "zero_logit")
    minus_inf = tl.full((), float("-inf"), tl.float64)
    zero = tl.full((), 0.0, tl.float64)
    unit = logit_scale
    inner = tl.full((), 1.0, ACC)
    if SOFTCAP:
        unit = softcap
        inner = (logit_scale / softcap).to(ACC)
    exponent = (unit / temperature * LOG2_E).to(ACC)
    exponent_one = (unit * LOG2_E).to(ACC)
    target_y = unit_logits(row_ptr, target, target >= 0, inner, SOFTCAP, ACC, "")

    # The exponentials of a row are relative to its largest kept logit, which is near its maximum, or to the maximum of
    # its first block where nothing is kept.
    level = tl.full((), float("-inf"), ACC)
    on_level = level
    teacher_level = level
    if HAS_TEACHER:
        level, teacher_level = highest_kept(row_ptr, ids_ptr, teacher_ptr, kept, inner, SOFTCAP, ACC, BLOCK_K)
        on_level = tl.where(level == float("-inf"), 0.0, level)
        teacher_level = tl.where(teacher_level == float("-inf"), 0.0, teacher_level)
    if level == float("-inf"):
        first = tl.arange(0, BLOCK_V)
        level = tl.max(unit_logits(row_ptr, first, first < vocab_size, inner, SOFTCAP, ACC, "evict_last"))
    total, total_one, sum_y, gone = sum_row(
        row_ptr,
        vocab_size,
        level,
        exponent,
        exponent_one,
        inner,
        GHOST,
        TWO_TEMPERATURES,
        SUMS_LOGITS,
        SOFTCAP,
        ACC,
        BLOCK_V,
    )
    # Far above the level exponentials overflow, and before that carry the rounding of their arguments.
    sound = (total < 1e9) & (total_one < 1e9) & (level > float("-inf"))
    if ~sound:
        level = highest_below(row_ptr, vocab_size, float("inf"), float("inf"), inner, SOFTCAP, ACC, BLOCK_V)
        level = tl.where(level == float("-inf"), 0.0, level)
        total, total_one, sum_y, gone = sum_row(
            row_ptr,
            vocab_size,
            level,
            exponent,
            exponent_one,
            inner,
            GHOST,
            TWO_TEMPERATURES,
            SUMS_LOGITS,
            SOFTCAP,
            ACC,
            BLOCK_V,
        )
    scale = unit / temperature
    lse = level * scale + tl.log(total)
    lse_one = level * unit + tl.log(total_one)
    log_student = target_y * unit - lse_one

    ce = -log_student
    if SMOOTHS:
        sum_z = tl.where(gone > 0, minus_inf, sum_y * unit)
        ce = (1 - label_smoothing) * ce + label_smoothing * (lse_one - sum_z / vocab_size)
    loss = tl.where(ce_weight == 0, 0.0, ce_weight * ce)
    loss += tl.where(z_loss_weight == 0, 0.0, z_loss_weight * lse_one * lse_one)

    kd = zero
    w = zero
    w_slope = zero
    teacher_mass = zero
    student_mass = zero
    # D's gradient by z / T is `slope - p * mean_slope` on S and `off_factor * exp((z - level) / T) + off_constant` off.
    mean_slope = zero
    off_factor = zero
    off_constant = zero
    p_norm = zero
    q_norm = zero
    labels = 0  # that are kept: 0 or 1
    if HAS_TEACHER:
        on_total, teacher_total, on_y, on_gone, labels, label_logit = sum_kept(
            row_ptr, ids_ptr, teacher_ptr, kept, target, on_level, teacher_level, exponent, (1 / temperature).to(ACC),
            inner, SUMS_LOGITS, SOFTCAP, ACC, BLOCK_K
        )  # fmt: skip
        log_on = on_level * scale + tl.log(on_total)
        log_kept = teacher_level / temperature + tl.log(teacher_total)
        teacher_lse = tl.full((), float("nan"), tl.float64)
        if teacher_lse_ptr is not None:
            teacher_lse = tl.load(teacher_lse_ptr + row).to(tl.float64)
        log_norm = teacher_log_norm(log_kept, teacher_lse, kept, vocab_size, REST)
        student_norm = lse
        if REST == "renorm_both":
            student_norm = log_on

        log_teacher = tl.where(labels > 0, label_logit, minus_inf)
        if target_logit_ptr is not None:
            known = tl.load(target_logit_ptr + row).to(tl.float64)
            log_teacher = tl.where(known == known, known, log_teacher)
        if teacher_lse_one_ptr is not None:
            log_teacher -= tl.load(teacher_lse_one_ptr + row).to(tl.float64)
        given = zero
        if token_weight_ptr is not None:
            given = tl.load(token_weight_ptr + row).to(tl.float64)
        w, w_slope = weigh(log_student, log_teacher, given, WEIGHTING, DETACH)

        p_norm = tl.where(log_on == minus_inf, 0.0, on_level * scale - student_norm)
        q_norm = teacher_level / temperature - log_norm
        value, mean_slope = diverge_kept(
            row_ptr, ids_ptr, teacher_ptr, kept, on_level, teacher_level, scale.to(ACC), (1 / temperature).to(ACC),
            p_norm.to(ACC), q_norm.to(ACC), beta, alpha, inner, DIVERGENCE, SOFTCAP, ACC, BLOCK_K
        )  # fmt: skip
        teacher_mass = tl.exp(log_kept - teacher_lse)
        student_mass = tl.exp(log_on - lse)
        # exp((z - level) / T) to p.
        to_p = tl.exp(tl.where(lse == minus_inf, 0.0, level * scale - lse))
        if REST == "ghost":
            off_total, level = sum_off(
                row_ptr, vocab_size, ids_ptr, kept, total, level, exponent, inner, SOFTCAP, ACC, BLOCK_V, BLOCK_K
            )
            log_tail = level * scale + tl.log(off_total) - lse
            log_rest = log_ghost(log_kept - teacher_lse, kept, vocab_size)
            share, slope = diverge(log_rest, log_tail, beta, alpha, DIVERGENCE)
            value += share
            # The forward slopes add up to exactly -1; rounding their sum would drown a small (1 - a) - (1 - P).
            if DIVERGENCE == "forward_kl" or DIVERGENCE == "soft_ce":
                mean_slope = zero - 1
            else:
                mean_slope += slope
            coefficient = slope - tl.exp(log_tail) * mean_slope
            off_factor = tl.where(off_total == 0, 0.0, coefficient / tl.where(off_total == 0, 1.0, off_total))
        elif REST == "zero_logit":
            unkept = (vocab_size - kept).to(tl.float64)
            each = tl.exp(-log_norm)
            expected_z = tl.where(gone > on_gone, minus_inf, (sum_y - on_y) * scale) - unkept * lse
            if DIVERGENCE == "forward_kl":
                expected_z += unkept * log_norm
            value -= tl.where(unkept > 0, each * expected_z, 0.0)
            mean_slope = zero - 1
            off_factor = to_p
            off_constant = -each
        elif REST != "renorm_both":
            off_factor = -mean_slope * to_p
        kd = value * temperature * temperature
        loss += tl.where(kd_weight == 0, 0.0, kd_weight * w * kd)
    store_stats(stats_ptr, num_rows, loss, ce, kd, w, teacher_mass, student_mass, lse_one)

    if dlogits_ptr is not None:
        row_scale = zero + 1
        if row_scale_ptr is not None:
            row_scale = tl.load(row_scale_ptr + row).to(tl.float64)
        through_weight = tl.where(w_slope == 0, 0.0, kd_weight * kd * w_slope)
        # The gradient by z is `softmax_scale` * s + `everywhere` + `kd_scale` * dD/d(z / T), and more at the label.
        # What is left of the way to the logits is 1 - y^2 with a softcap.
        row_scale *= logit_scale
        softmax_scale = row_scale * (ce_weight + 2 * z_loss_weight * lse_one - through_weight)
        kd_scale = row_scale * kd_weight * w * temperature
        everywhere = -row_scale * ce_weight * label_smoothing / vocab_size
        at_label = (row_scale * (through_weight - ce_weight * (1 - label_smoothing))).to(ACC)

        one_scale = softmax_scale * tl.exp(tl.where(lse_one == minus_inf, 0.0, level * unit - lse_one))
        off_scale = kd_scale * off_factor
        if not TWO_TEMPERATURES:
            # Both softmaxes are the same exponentials.
            off_scale += one_scale
        constant = (everywhere + kd_scale * off_constant).to(ACC)
        if HAS_TEACHER:
            on_one_scale = softmax_scale * tl.exp(tl.where(lse_one == minus_inf, 0.0, on_level * unit - lse_one))
            write_kept_gradient(
                row_ptr, ids_ptr, teacher_ptr, kept_gradient_ptr, kept, target, on_level, teacher_level, scale.to(ACC),
                (1 / temperature).to(ACC), p_norm.to(ACC), q_norm.to(ACC), exponent_one, on_one_scale.to(ACC),
                everywhere.to(ACC), kd_scale.to(ACC), mean_slope.to(ACC), at_label, beta, alpha, inner, DIVERGENCE,
                SOFTCAP, ACC, BLOCK_K
            )  # fmt: skip
        # The kept logits must have been read before they are overwritten.
        tl.debug_barrier()
        write_row(
            row_ptr, dlogits_ptr, vocab_size, level, exponent, off_scale.to(ACC), exponent_one, one_scale.to(ACC),
            constant, inner, TWO_TEMPERATURES, SOFTCAP, ACC, BLOCK_V
        )  # fmt: skip
        # Every entry must be there before another thread puts a better one in its place.
        tl.debug_barrier()
        if HAS_TEACHER:
            scatter_kept_gradient(dlogits_ptr, ids_ptr, kept_gradient_ptr, kept, BLOCK_K)
        if labels == 0:
            dy = gradient_of(
                target_y, level, exponent, off_scale.to(ACC), exponent_one, one_scale.to(ACC), constant + at_label,
                TWO_TEMPERATURES, SOFTCAP
            )  # fmt: skip
            tl.store(dlogits_ptr + target, dy)


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
    target_logit: Tensor | None,
    token_weight: Tensor | None,
    temperature: float,
    rest: str,
    divergence: str,
    weighting: str,
    detach_weight: bool,
    beta: float,
    alpha: float,
    ce_weight: float,
    kd_weight: float,
    label_smoothing: float,
    z_loss_weight: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
) -> int:
    """Launches the kernel; always 0, because the host does not wait to learn what is wrong with a row."""
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
        ce_weight,
        kd_weight,
        label_smoothing,
        z_loss_weight,
        softcap,
        logit_scale,
        REST=rest,
        DIVERGENCE=divergence,
        WEIGHTING=weighting,
        DETACH=detach_weight,
        TWO_TEMPERATURES=temperature != 1,
        SMOOTHS=label_smoothing > 0,
        SOFTCAP=softcap > 0,
        ACC=launch.accumulation_dtype(logits.dtype),
        BLOCK_V=launch.block_of(settings, vocab_size),
        BLOCK_K=launch.block_of(settings._replace(block=settings.block), top_k),
    )
    return 0
