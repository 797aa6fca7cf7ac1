"""The walks of slim_loss: over a student's row (V), a block at a time, and over its kept ids S (K)."""

from __future__ import annotations

import triton
import triton.language as tl

from slimkernels.ops.triton._slim_terms import LOG2_E, add_exactly, diverge, powers, unit_logits


@triton.jit
def store_stats(stats_ptr, num_rows, loss, ce, kd, weight, teacher_mass, student_mass, lse):
    """One number into each of the seven rows of ``stats``."""
    step = tl.full((), num_rows, tl.int64)
    tl.store(stats_ptr, loss)
    tl.store(stats_ptr + step, ce)
    tl.store(stats_ptr + 2 * step, kd)
    tl.store(stats_ptr + 3 * step, weight)
    tl.store(stats_ptr + 4 * step, teacher_mass)
    tl.store(stats_ptr + 5 * step, student_mass)
    tl.store(stats_ptr + 6 * step, lse)


@triton.jit
def fill_row(dlogits_ptr, vocab_size, value, BLOCK_V: tl.constexpr):
    """The gradient of a row that is ignored or faulty."""
    for begin in tl.range(0, vocab_size, BLOCK_V, num_stages=4):
        v = begin + tl.arange(0, BLOCK_V)
        tl.store(dlogits_ptr + v, tl.zeros((BLOCK_V,), tl.float32) + value, mask=v < vocab_size)


@triton.jit
def sum_row(
    row_ptr,
    vocab_size,
    level,
    exponent,
    exponent_one,
    inner,
    EXACT: tl.constexpr,
    TWO_TEMPERATURES: tl.constexpr,
    SUMS_LOGITS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Of a row: the sums of its exponentials at T (exactly where asked for) and at 1, of its finite y, of its -inf."""
    high = tl.full((BLOCK_V,), 1.0, ACC)  # the exponentials are at most 1, or the sum need not be exact
    low = tl.zeros((BLOCK_V,), ACC)
    one = tl.zeros((BLOCK_V,), ACC)
    y_sum = tl.zeros((BLOCK_V,), ACC)
    num_gone = tl.zeros((BLOCK_V,), tl.int32)
    for begin in tl.range(0, vocab_size, BLOCK_V, num_stages=4):
        v = begin + tl.arange(0, BLOCK_V)
        mask_v = v < vocab_size
        y = unit_logits(row_ptr, v, mask_v, inner, SOFTCAP, ACC, "evict_last")
        if EXACT:
            high, low = add_exactly(high, low, powers(y, level, exponent))
        else:
            low += powers(y, level, exponent)
        if TWO_TEMPERATURES:
            one += powers(y, level, exponent_one)
        if SUMS_LOGITS:
            gone = y == float("-inf")
            y_sum += tl.where(gone, 0.0, y)
            num_gone += (gone & mask_v).to(tl.int32)
    total = tl.sum((high.to(tl.float64) - 1) + low.to(tl.float64))
    total_one = total
    if TWO_TEMPERATURES:
        total_one = tl.sum(one.to(tl.float64))
    return total, total_one, tl.sum(y_sum.to(tl.float64)), tl.sum(num_gone)


@triton.jit
def highest_below(
    row_ptr, vocab_size, cap, below, inner, SOFTCAP: tl.constexpr, ACC: tl.constexpr, BLOCK_V: tl.constexpr
):
    """The largest y of a row that is at most ``cap`` and less than ``below``; -inf where there is none."""
    best = tl.full((BLOCK_V,), float("-inf"), ACC)
    for begin in tl.range(0, vocab_size, BLOCK_V, num_stages=4):
        v = begin + tl.arange(0, BLOCK_V)
        y = unit_logits(row_ptr, v, v < vocab_size, inner, SOFTCAP, ACC, "evict_last")
        best = tl.where((y <= cap) & (y < below) & (y > best), y, best)
    return tl.max(best)


@triton.jit
def sum_row_up_to(
    row_ptr,
    vocab_size,
    highest,
    level,
    exponent,
    inner,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The exact sum of the exponentials of every y <= highest."""
    high = tl.full((BLOCK_V,), 1.0, ACC)
    low = tl.zeros((BLOCK_V,), ACC)
    for begin in tl.range(0, vocab_size, BLOCK_V, num_stages=4):
        v = begin + tl.arange(0, BLOCK_V)
        y = unit_logits(row_ptr, v, v < vocab_size, inner, SOFTCAP, ACC, "evict_last")
        high, low = add_exactly(high, low, tl.where(y <= highest, powers(y, level, exponent), 0.0))
    return tl.sum((high.to(tl.float64) - 1) + low.to(tl.float64))


@triton.jit
def sum_kept_up_to(
    row_ptr,
    ids_ptr,
    kept,
    highest,
    level,
    exponent,
    inner,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same over S."""
    high = tl.full((BLOCK_K,), 1.0, ACC)
    low = tl.zeros((BLOCK_K,), ACC)
    for begin in range(0, kept, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        y = kept_logits(row_ptr, ids_ptr, k, kept, inner, SOFTCAP, ACC)
        high, low = add_exactly(high, low, tl.where(y <= highest, powers(y, level, exponent), 0.0))
    return tl.sum((high.to(tl.float64) - 1) + low.to(tl.float64))


@triton.jit
def sum_off(
    row_ptr,
    vocab_size,
    ids_ptr,
    kept,
    total,
    level,
    exponent,
    inner,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sum of the exponentials outside S, and the level that they are relative to, from the sum of all."""
    SMALL: tl.constexpr = 1e-3 if tl.float64 == ACC else 1e-6
    off = total - sum_kept_up_to(row_ptr, ids_ptr, kept, float("inf"), level, exponent, inner, SOFTCAP, ACC, BLOCK_K)
    off = tl.where(kept == vocab_size, 0.0, off)
    searching = (kept < vocab_size) & (total > 0)
    while searching & (off < SMALL * total):
        # No exponential outside S can be larger than this, which the rounding of the sums is far below.
        bound = tl.maximum(off, 0.0) + 1e-8 * total
        cap = level + tl.log(bound * 1.01) * (LOG2_E / exponent.to(tl.float64)) + tl.abs(level) * 1e-6
        # A bound that excludes nothing means many exponentials near 1 inside S, and one such outside: that is exact.
        searching = bound < 0.5
        if searching:
            highest = highest_below(row_ptr, vocab_size, cap.to(ACC), level, inner, SOFTCAP, ACC, BLOCK_V)
            level = tl.where(highest == float("-inf"), level, highest)
            total = sum_row_up_to(row_ptr, vocab_size, highest, level, exponent, inner, SOFTCAP, ACC, BLOCK_V)
            off = total - sum_kept_up_to(row_ptr, ids_ptr, kept, highest, level, exponent, inner, SOFTCAP, ACC, BLOCK_K)
    return tl.maximum(off, 0.0), level


@triton.jit
def kept_logits(row_ptr, ids_ptr, k, kept, inner, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """The student's y at entries of S, -inf where there is none."""
    ids = tl.load(ids_ptr + k, mask=k < kept, other=0)
    return unit_logits(row_ptr, ids, k < kept, inner, SOFTCAP, ACC, "evict_last")


@triton.jit
def highest_kept(
    row_ptr, ids_ptr, teacher_ptr, kept, inner, SOFTCAP: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The student's largest y on S, and the teacher's largest logit."""
    student = tl.full((BLOCK_K,), float("-inf"), ACC)
    teacher = tl.full((BLOCK_K,), float("-inf"), ACC)
    for begin in range(0, kept, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        student = tl.maximum(student, kept_logits(row_ptr, ids_ptr, k, kept, inner, SOFTCAP, ACC))
        teacher = tl.maximum(teacher, tl.load(teacher_ptr + k, mask=k < kept, other=float("-inf")).to(ACC))
    return tl.max(student), tl.max(teacher)


@triton.jit
def sum_kept(
    row_ptr,
    ids_ptr,
    teacher_ptr,
    kept,
    target,
    level,
    teacher_level,
    exponent,
    inv_temperature,
    inner,
    SUMS_LOGITS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over S: both exponentials at T, the student's finite y and -inf, the label's entries and logit."""
    student = tl.full((), 0.0, tl.float64)
    teacher = tl.full((), 0.0, tl.float64)
    y_sum = tl.full((), 0.0, tl.float64)
    gone = 0
    labels = 0
    label_logit = tl.full((), 0.0, ACC)
    for begin in range(0, kept, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        y = kept_logits(row_ptr, ids_ptr, k, kept, inner, SOFTCAP, ACC)
        student += tl.sum(powers(y, level, exponent).to(tl.float64))
        logit = tl.load(teacher_ptr + k, mask=k < kept, other=float("-inf")).to(ACC)
        teacher += tl.sum(tl.exp((logit - teacher_level) * inv_temperature).to(tl.float64))
        here = tl.load(ids_ptr + k, mask=k < kept, other=-1) == target
        labels += tl.sum(here.to(tl.int32))
        label_logit += tl.sum(tl.where(here, logit, 0.0))
        if SUMS_LOGITS:
            without = (y == float("-inf")) & (k < kept)
            y_sum += tl.sum(tl.where(y == float("-inf"), 0.0, y).to(tl.float64))
            gone += tl.sum(without.to(tl.int32))
    return student, teacher, y_sum, gone, labels, label_logit.to(tl.float64)


@triton.jit
def kept_terms(
    row_ptr,
    ids_ptr,
    teacher_ptr,
    k,
    kept,
    level,
    teacher_level,
    scale,
    inv_temperature,
    p_norm,
    q_norm,
    beta,
    alpha,
    inner,
    DIVERGENCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
):
    """Of entries of S: y, log p, the share of D and p * dD/dp; 0 where there is no entry."""
    y = kept_logits(row_ptr, ids_ptr, k, kept, inner, SOFTCAP, ACC)
    logit = tl.load(teacher_ptr + k, mask=k < kept, other=float("-inf")).to(ACC)
    log_p = (y - level) * scale + p_norm
    log_q = (logit - teacher_level) * inv_temperature + q_norm
    share, slope = diverge(log_q, log_p, beta, alpha, DIVERGENCE)
    return y, log_p, tl.where(k < kept, share, 0.0), tl.where(k < kept, slope, 0.0)


@triton.jit
def diverge_kept(
    row_ptr,
    ids_ptr,
    teacher_ptr,
    kept,
    level,
    teacher_level,
    scale,
    inv_temperature,
    p_norm,
    q_norm,
    beta,
    alpha,
    inner,
    DIVERGENCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """D's sum over S, and that of p * dD/dp, in float64."""
    shares = tl.full((), 0.0, tl.float64)
    slopes = tl.full((), 0.0, tl.float64)
    for begin in range(0, kept, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        _, _, share, slope = kept_terms(
            row_ptr, ids_ptr, teacher_ptr, k, kept, level, teacher_level, scale, inv_temperature, p_norm, q_norm, beta,
            alpha, inner, DIVERGENCE, SOFTCAP, ACC
        )  # fmt: skip
        shares += tl.sum(share.to(tl.float64))
        slopes += tl.sum(slope.to(tl.float64))
    return shares, slopes


@triton.jit
def write_kept_gradient(
    row_ptr,
    ids_ptr,
    teacher_ptr,
    kept_gradient_ptr,
    kept,
    target,
    level,
    teacher_level,
    scale,
    inv_temperature,
    p_norm,
    q_norm,
    exponent_one,
    one_scale,
    everywhere,
    kd_scale,
    mean_slope,
    at_label,
    beta,
    alpha,
    inner,
    DIVERGENCE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient on S, into the scratch row: the logits are still needed."""
    for begin in range(0, kept, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        y, log_p, _, slope = kept_terms(
            row_ptr, ids_ptr, teacher_ptr, k, kept, level, teacher_level, scale, inv_temperature, p_norm, q_norm, beta,
            alpha, inner, DIVERGENCE, SOFTCAP, ACC
        )  # fmt: skip
        dy = powers(y, level, exponent_one) * one_scale + everywhere
        dy += (slope - tl.exp(log_p) * mean_slope) * kd_scale
        dy += tl.where(tl.load(ids_ptr + k, mask=k < kept, other=-1) == target, at_label, 0.0)
        if SOFTCAP:
            dy *= 1 - y * y
        tl.store(kept_gradient_ptr + k, dy, mask=k < kept)


@triton.jit
def gradient_of(
    y,
    level,
    exponent,
    off_scale,
    exponent_one,
    one_scale,
    constant,
    TWO_TEMPERATURES: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """The gradient at a logit outside S."""
    dy = powers(y, level, exponent) * off_scale + constant
    if TWO_TEMPERATURES:
        dy += powers(y, level, exponent_one) * one_scale
    if SOFTCAP:
        dy *= 1 - y * y
    return dy


@triton.jit
def write_row(
    row_ptr,
    dlogits_ptr,
    vocab_size,
    level,
    exponent,
    off_scale,
    exponent_one,
    one_scale,
    constant,
    inner,
    TWO_TEMPERATURES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The whole row as if it were outside S; what is inside may overflow and is overwritten."""
    for begin in tl.range(0, vocab_size, BLOCK_V, num_stages=4):
        v = begin + tl.arange(0, BLOCK_V)
        y = unit_logits(row_ptr, v, v < vocab_size, inner, SOFTCAP, ACC, "evict_first")
        dy = gradient_of(y, level, exponent, off_scale, exponent_one, one_scale, constant, TWO_TEMPERATURES, SOFTCAP)
        tl.store(dlogits_ptr + v, dy, mask=v < vocab_size, eviction_policy="evict_first")


@triton.jit
def scatter_kept_gradient(dlogits_ptr, ids_ptr, kept_gradient_ptr, kept, BLOCK_K: tl.constexpr):
    """Puts the scratch row where it belongs."""
    for begin in range(0, kept, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        ids = tl.load(ids_ptr + k, mask=k < kept, other=0)
        tl.store(dlogits_ptr + ids, tl.load(kept_gradient_ptr + k, mask=k < kept), mask=k < kept)
