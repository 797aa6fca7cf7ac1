"""The walks of slim_loss over a student's row (V) and over its kept ids S (K), a block at a time."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from slimkernels.ops.triton._math import log_add_exp
from slimkernels.ops.triton._slim_terms import LOG2_E, add_exactly, diverge, powers, unit_logits
from slimkernels.ops.triton._teacher import finite_norm


class TeacherRow(NamedTuple):
    """A teacher's row.

    Attributes:
        ids_ptr: Pointer to the row of ids.
        logits_ptr: Pointer to the row of logits.
        kept: Number of ids before the padding, the size of S.
        inv_temperature: 1 / T, accumulation dtype.
    """

    ids_ptr: tl.tensor
    logits_ptr: tl.tensor
    kept: tl.tensor
    inv_temperature: tl.tensor


class RowSums(NamedTuple):
    """Sums over a student's row.

    Attributes:
        e: exp((z - level) / T), float64.
        e_one: The same at temperature 1.
        y: Finite y, float64.
        num_minus_inf: Count of y = -inf.
    """

    e: tl.tensor
    e_one: tl.tensor
    y: tl.tensor
    num_minus_inf: tl.tensor


class KeptSums(NamedTuple):
    """Sums over the student's logits at S.

    Attributes:
        e: exp((z - level) / T), float64.
        y: Finite y, float64.
        num_minus_inf: Count of y = -inf.
        label_entry: The label's index in S, -1 where the label is off S.
    """

    e: tl.tensor
    y: tl.tensor
    num_minus_inf: tl.tensor
    label_entry: tl.tensor


class Outcomes(NamedTuple):
    """Numbers that make the outcomes' probabilities; those at S in the accumulation dtype, the others float64.

    Attributes:
        level: Level of the student's y.
        p_offset: log p = (y - level) * scale + p_offset.
        teacher_level: Level of the teacher's logits.
        q_offset: log q = (logit - teacher_level) / T + q_offset.
        blend_norm: The q of D is exp(t log q + (1 - t) log p - blend_norm), where the teacher is blended.
        log_p_tail: The student's mass off S, for "ghost" only.
        log_q_tail: The mass off S of the q of D, for "ghost" only.
        log_q_on: Minus infinity where the q of D has no mass at S.
        gate: Factor of the forward KL in "gated".
    """

    level: tl.tensor
    p_offset: tl.tensor
    teacher_level: tl.tensor
    q_offset: tl.tensor
    blend_norm: tl.tensor
    log_p_tail: tl.tensor
    log_q_tail: tl.tensor
    log_q_on: tl.tensor
    gate: tl.tensor


class DenseGradient(NamedTuple):
    """Numbers of the gradient off S, which is a few exponentials and a constant; all in the accumulation dtype.

    dy = off_scale * exp((z - level) / T) + one_scale * exp(z - level_one) + constant, where the second term is dropped
    at T = 1.
    """

    level: tl.tensor
    off_scale: tl.tensor
    level_one: tl.tensor
    one_scale: tl.tensor
    constant: tl.tensor


class KeptGradient(NamedTuple):
    """Numbers of the gradient on S, all in the accumulation dtype.

    dy = one_scale * exp(z - level) + uniform + kd_scale * (slope - p * mean_slope), plus at_label at the label.
    """

    one_scale: tl.tensor
    uniform: tl.tensor
    kd_scale: tl.tensor
    mean_slope: tl.tensor
    at_label: tl.tensor


@triton.jit
def store_stats(stats_ptr, num_rows, loss, ce, kd, weight, teacher_mass, student_mass, lse):
    """Stores one number into each of the seven rows of ``stats``."""
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
    """Fills the gradient of a row that is ignored or faulty."""
    for begin in tl.range(0, vocab_size, BLOCK_V, num_stages=4):
        v = begin + tl.arange(0, BLOCK_V)
        tl.store(dlogits_ptr + v, tl.zeros((BLOCK_V,), tl.float32) + value, mask=v < vocab_size)


@triton.jit
def sum_row(row, level, EXACT: tl.constexpr, SUMS_LOGITS: tl.constexpr, MODE: tl.constexpr):
    """Computes the ``RowSums`` of a row; the exponentials at T exactly where asked for, the y only where asked for."""
    ACC: tl.constexpr = MODE.acc
    BLOCK_V: tl.constexpr = MODE.block_v
    # Exact sums start from 1, which no exponential exceeds; other sums need no order of their terms.
    high = tl.full((BLOCK_V,), 1.0, ACC)
    low = tl.zeros((BLOCK_V,), ACC)
    one = tl.zeros((BLOCK_V,), ACC)
    y_sum = tl.zeros((BLOCK_V,), ACC)
    num_minus_inf = tl.zeros((BLOCK_V,), tl.int32)
    for begin in tl.range(0, row.vocab_size, BLOCK_V, num_stages=4):
        v = begin + tl.arange(0, BLOCK_V)
        mask_v = v < row.vocab_size
        y = unit_logits(row, v, mask_v, MODE, "evict_last")
        if EXACT:
            high, low = add_exactly(high, low, powers(y, level, row.exponent))
        else:
            low += powers(y, level, row.exponent)
        if MODE.two_temperatures:
            one += powers(y, level, row.exponent_one)
        if SUMS_LOGITS:
            is_minus_inf = y == float("-inf")
            y_sum += tl.where(is_minus_inf, 0.0, y)
            num_minus_inf += (is_minus_inf & mask_v).to(tl.int32)
    e = tl.sum((high.to(tl.float64) - 1) + low.to(tl.float64))
    e_one = e
    if MODE.two_temperatures:
        e_one = tl.sum(one.to(tl.float64))
    return RowSums(e, e_one, tl.sum(y_sum.to(tl.float64)), tl.sum(num_minus_inf))


@triton.jit
def highest_below(row, cap, below, MODE: tl.constexpr):
    """Finds the largest y of a row that is at most ``cap`` and less than ``below``; -inf where there is none."""
    best = tl.full((MODE.block_v,), float("-inf"), MODE.acc)
    for begin in tl.range(0, row.vocab_size, MODE.block_v, num_stages=4):
        v = begin + tl.arange(0, MODE.block_v)
        y = unit_logits(row, v, v < row.vocab_size, MODE, "evict_last")
        best = tl.where((y <= cap) & (y < below) & (y > best), y, best)
    return tl.max(best)


@triton.jit
def sum_row_up_to(row, highest, level, MODE: tl.constexpr):
    """Computes the exact sum of the exponentials of every y <= highest of a row."""
    ACC: tl.constexpr = MODE.acc
    BLOCK_V: tl.constexpr = MODE.block_v
    high = tl.full((BLOCK_V,), 1.0, ACC)
    low = tl.zeros((BLOCK_V,), ACC)
    for begin in tl.range(0, row.vocab_size, BLOCK_V, num_stages=4):
        v = begin + tl.arange(0, BLOCK_V)
        y = unit_logits(row, v, v < row.vocab_size, MODE, "evict_last")
        high, low = add_exactly(high, low, tl.where(y <= highest, powers(y, level, row.exponent), 0.0))
    return tl.sum((high.to(tl.float64) - 1) + low.to(tl.float64))


@triton.jit
def sum_kept_up_to(row, teacher, highest, level, MODE: tl.constexpr):
    """Computes the exact sum of the exponentials of every y <= highest at S."""
    ACC: tl.constexpr = MODE.acc
    BLOCK_K: tl.constexpr = MODE.block_k
    high = tl.full((BLOCK_K,), 1.0, ACC)
    low = tl.zeros((BLOCK_K,), ACC)
    for begin in range(0, teacher.kept, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        y = kept_logits(row, teacher, k, MODE)
        high, low = add_exactly(high, low, tl.where(y <= highest, powers(y, level, row.exponent), 0.0))
    return tl.sum((high.to(tl.float64) - 1) + low.to(tl.float64))


@triton.jit
def sum_off(row, teacher, total, level, MODE: tl.constexpr):
    """Computes the sum of the exponentials off S from the ``total`` of the row, and the level they are relative to.

    The row and S are summed from the very same exponentials, each exactly to about 48 bits in float32, and subtracted.
    Where too little is left, the logits that are too large to be off S are dropped from both sums and the exponentials
    start from the largest of the others, until enough is left.
    """
    SMALL: tl.constexpr = 1e-3 if tl.float64 == MODE.acc else 1e-6
    kept = teacher.kept
    off = total - sum_kept_up_to(row, teacher, float("inf"), level, MODE)
    off = tl.where(kept == row.vocab_size, 0.0, off)
    searching = (kept < row.vocab_size) & (total > 0)
    while searching & (off < SMALL * total):
        # No exponential off S can be larger than this; the rounding of the sums is far below it.
        bound = tl.maximum(off, 0.0) + 1e-8 * total
        cap = level + tl.log(bound * 1.01) * (LOG2_E / row.exponent.to(tl.float64)) + tl.abs(level) * 1e-6
        # A bound that excludes nothing means that S has many exponentials near 1 and there is one off S: that is exact.
        searching = bound < 0.5
        if searching:
            highest = highest_below(row, cap.to(MODE.acc), level, MODE)
            level = tl.where(highest == float("-inf"), level, highest)
            total = sum_row_up_to(row, highest, level, MODE)
            off = total - sum_kept_up_to(row, teacher, highest, level, MODE)
    return tl.maximum(off, 0.0), level


@triton.jit
def kept_logits(row, teacher, k, MODE: tl.constexpr):
    """Loads the student's y at entries k of S, -inf where there is no entry."""
    ids = tl.load(teacher.ids_ptr + k, mask=k < teacher.kept, other=0)
    return unit_logits(row, ids, k < teacher.kept, MODE, "evict_last")


@triton.jit
def teacher_logits(teacher, k, MODE: tl.constexpr):
    """Loads the teacher's logits at entries k of S, -inf where there is no entry."""
    return tl.load(teacher.logits_ptr + k, mask=k < teacher.kept, other=float("-inf")).to(MODE.acc)


@triton.jit
def highest_kept(row, teacher, MODE: tl.constexpr):
    """Finds the student's largest y at S."""
    best = tl.full((MODE.block_k,), float("-inf"), MODE.acc)
    for begin in range(0, teacher.kept, MODE.block_k):
        best = tl.maximum(best, kept_logits(row, teacher, begin + tl.arange(0, MODE.block_k), MODE))
    return tl.max(best)


@triton.jit
def highest_of_teacher(teacher, MODE: tl.constexpr):
    """Finds the teacher's largest logit at S."""
    best = tl.full((MODE.block_k,), float("-inf"), MODE.acc)
    for begin in range(0, teacher.kept, MODE.block_k):
        best = tl.maximum(best, teacher_logits(teacher, begin + tl.arange(0, MODE.block_k), MODE))
    return tl.max(best)


@triton.jit
def sum_kept(row, teacher, target, level, SUMS_LOGITS: tl.constexpr, MODE: tl.constexpr):
    """Computes the ``KeptSums``; the y only where asked for."""
    e = tl.full((), 0.0, tl.float64)
    y_sum = tl.full((), 0.0, tl.float64)
    num_minus_inf = 0
    label_index = 0
    for begin in range(0, teacher.kept, MODE.block_k):
        k = begin + tl.arange(0, MODE.block_k)
        y = kept_logits(row, teacher, k, MODE)
        e += tl.sum(powers(y, level, row.exponent).to(tl.float64))
        is_label = tl.load(teacher.ids_ptr + k, mask=k < teacher.kept, other=-1) == target
        label_index += tl.sum(tl.where(is_label, k + 1, 0))
        if SUMS_LOGITS:
            is_minus_inf = y == float("-inf")
            y_sum += tl.sum(tl.where(is_minus_inf, 0.0, y).to(tl.float64))
            num_minus_inf += tl.sum((is_minus_inf & (k < teacher.kept)).to(tl.int32))
    return KeptSums(e, y_sum, num_minus_inf, label_index - 1)


@triton.jit
def sum_kept_of_teacher(teacher, level, MODE: tl.constexpr):
    """Computes the sum of the teacher's exp((logit - level) / T) at S, in float64."""
    e = tl.full((), 0.0, tl.float64)
    for begin in range(0, teacher.kept, MODE.block_k):
        logits = teacher_logits(teacher, begin + tl.arange(0, MODE.block_k), MODE)
        e += tl.sum(tl.exp((logits - level) * teacher.inv_temperature).to(tl.float64))
    return e


@triton.jit
def kept_outcomes(row, teacher, k, outcomes, options, MODE: tl.constexpr):
    """Computes y, log p and the log q of D at entries k of S; all are -inf where there is no entry."""
    y = kept_logits(row, teacher, k, MODE)
    log_p = (y - outcomes.level) * row.scale.to(MODE.acc) + outcomes.p_offset
    logits = teacher_logits(teacher, k, MODE)
    log_q = (logits - outcomes.teacher_level) * teacher.inv_temperature + outcomes.q_offset
    if MODE.blends:
        t = options.teacher_blend
        log_q = log_q * t.to(MODE.acc) + (log_p * (1 - t).to(MODE.acc) - outcomes.blend_norm)
    return y, log_p, log_q


@triton.jit
def blend(row, teacher, outcomes, options, MODE: tl.constexpr):
    """Turns the teacher of ``Outcomes`` into softmax(t log q + (1 - t) log p) over the outcomes."""
    t = options.teacher_blend
    minus_inf = tl.full((), float("-inf"), tl.float64)
    log_q_tail = minus_inf
    if MODE.rest == "ghost":
        log_q_tail = t * outcomes.log_q_tail + (1 - t) * outcomes.log_p_tail
    level = tl.full((), float("-inf"), MODE.acc)
    for begin in range(0, teacher.kept, MODE.block_k):
        _, _, log_q = kept_outcomes(row, teacher, begin + tl.arange(0, MODE.block_k), outcomes, options, MODE)
        level = tl.maximum(level, tl.max(log_q))
    level = tl.where(level == float("-inf"), 0.0, level)
    total = tl.full((), 0.0, tl.float64)
    for begin in range(0, teacher.kept, MODE.block_k):
        _, _, log_q = kept_outcomes(row, teacher, begin + tl.arange(0, MODE.block_k), outcomes, options, MODE)
        total += tl.sum(tl.exp(log_q - level).to(tl.float64))
    log_q_on = level + tl.log(total)
    norm = finite_norm(log_add_exp(log_q_on, log_q_tail))
    return Outcomes(
        outcomes.level,
        outcomes.p_offset,
        outcomes.teacher_level,
        outcomes.q_offset,
        norm.to(MODE.acc),
        outcomes.log_p_tail,
        log_q_tail - norm,
        log_q_on - norm,
        outcomes.gate,
    )


@triton.jit
def kept_terms(row, teacher, k, outcomes, options, MODE: tl.constexpr):
    """Computes y, log p, the share of D and p * dD/dp at entries k of S; the last two are 0 where there is no entry."""
    y, log_p, log_q = kept_outcomes(row, teacher, k, outcomes, options, MODE)
    share, slope = diverge(log_q, log_p, outcomes.gate, options, MODE)
    return y, log_p, tl.where(k < teacher.kept, share, 0.0), tl.where(k < teacher.kept, slope, 0.0)


@triton.jit
def diverge_kept(row, teacher, outcomes, options, MODE: tl.constexpr):
    """Computes the sums over S of the shares of D and of p * dD/dp, in float64."""
    shares = tl.full((), 0.0, tl.float64)
    slopes = tl.full((), 0.0, tl.float64)
    for begin in range(0, teacher.kept, MODE.block_k):
        k = begin + tl.arange(0, MODE.block_k)
        _, _, share, slope = kept_terms(row, teacher, k, outcomes, options, MODE)
        shares += tl.sum(share.to(tl.float64))
        slopes += tl.sum(slope.to(tl.float64))
    return shares, slopes


@triton.jit
def write_kept_gradient(kept_gradient_ptr, row, teacher, target, outcomes, kept, options, MODE: tl.constexpr):
    """Writes the gradient on S into the scratch row, because the logits are still needed."""
    for begin in range(0, teacher.kept, MODE.block_k):
        k = begin + tl.arange(0, MODE.block_k)
        y, log_p, _, slope = kept_terms(row, teacher, k, outcomes, options, MODE)
        dy = powers(y, outcomes.level, row.exponent_one) * kept.one_scale + kept.uniform
        of_kd = (slope - tl.exp(log_p) * kept.mean_slope) * kept.kd_scale
        dy += tl.where(options.kd_weight == 0, 0.0, of_kd)
        is_label = tl.load(teacher.ids_ptr + k, mask=k < teacher.kept, other=-1) == target
        dy += tl.where(is_label, kept.at_label, 0.0)
        if MODE.softcap:
            dy *= 1 - y * y
        tl.store(kept_gradient_ptr + k, dy, mask=k < teacher.kept)


@triton.jit
def dense_gradient_at(y, row, dense, MODE: tl.constexpr):
    """Computes the gradient at a logit off S."""
    dy = powers(y, dense.level, row.exponent) * dense.off_scale + dense.constant
    if MODE.two_temperatures:
        dy += powers(y, dense.level_one, row.exponent_one) * dense.one_scale
    if MODE.softcap:
        dy *= 1 - y * y
    return dy


@triton.jit
def write_row(dlogits_ptr, row, dense, MODE: tl.constexpr):
    """Writes the whole row as if it were off S; the entries on S may overflow and are overwritten later.

    The row stays in L2 if it has such entries: overwriting two bytes of a sector that was evicted would read it again.
    """
    STORE_POLICY: tl.constexpr = "" if MODE.has_teacher else "evict_first"
    for begin in tl.range(0, row.vocab_size, MODE.block_v, num_stages=4):
        v = begin + tl.arange(0, MODE.block_v)
        y = unit_logits(row, v, v < row.vocab_size, MODE, "evict_first")
        dy = dense_gradient_at(y, row, dense, MODE)
        tl.store(dlogits_ptr + v, dy, mask=v < row.vocab_size, eviction_policy=STORE_POLICY)


@triton.jit
def scatter_kept_gradient(dlogits_ptr, teacher, kept_gradient_ptr, MODE: tl.constexpr):
    """Scatters the scratch row to the ids of S."""
    for begin in range(0, teacher.kept, MODE.block_k):
        k = begin + tl.arange(0, MODE.block_k)
        ids = tl.load(teacher.ids_ptr + k, mask=k < teacher.kept, other=0)
        tl.store(dlogits_ptr + ids, tl.load(kept_gradient_ptr + k, mask=k < teacher.kept), mask=k < teacher.kept)
