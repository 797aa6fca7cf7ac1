"""The terms of a row of slim_loss, independent of how the row is read: logits, divergences, the token weight."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from slimkernels.ops.triton._math import expm1, log_add_exp

LOG2_E = tl.constexpr(1.4426950408889634)


class Mode(NamedTuple):
    """Compile-time constants of the slim_loss kernel.

    Attributes:
        has_teacher: Whether there is a teacher.
        rest: Treatment of the teacher's mass outside its ids.
        divergence: Name of the divergence.
        weighting: Name of the token weight.
        detach_weight: Whether the token weight is a constant to the gradient.
        two_temperatures: Whether T is not 1.
        blends: Whether the teacher's blend is not 1.
        smooths: Whether the label smoothing is not 0.
        softcap: Whether the logits have a softcap.
        statistics: Statistics to compute, a key of ``NUM_STATS``.
        acc: Accumulation dtype, float32 or float64.
        block_v: Entries of a row of logits per block.
        block_k: Entries of a teacher's row per block.
    """

    has_teacher: bool
    rest: str
    divergence: str
    weighting: str
    detach_weight: bool
    two_temperatures: bool
    blends: bool
    smooths: bool
    softcap: bool
    statistics: str
    acc: tl.dtype
    block_v: int
    block_k: int


class Options(NamedTuple):
    """Options of slim_loss that are numbers, in float64."""

    temperature: tl.tensor
    beta: tl.tensor
    alpha: tl.tensor
    forward_weight: tl.tensor
    entropy_threshold: tl.tensor
    teacher_blend: tl.tensor
    tail_weight: tl.tensor
    ce_weight: tl.tensor
    kd_weight: tl.tensor
    label_smoothing: tl.tensor
    z_loss_weight: tl.tensor
    logit_scale: tl.tensor


class StudentRow(NamedTuple):
    """A row of the student's logits, and the factors between the forms that a logit takes.

    Attributes:
        ptr: Pointer to the row.
        vocab_size: V.
        inner: Factor of a logit inside the tanh of the softcap; accumulation dtype.
        unit: z = y * unit, see ``unit_logits``; float64.
        scale: z / T = y * scale; float64.
        exponent: exp(z / T) = exp2(y * exponent); accumulation dtype.
        exponent_one: The same at temperature 1.
    """

    ptr: tl.tensor
    vocab_size: tl.tensor
    inner: tl.tensor
    unit: tl.tensor
    scale: tl.tensor
    exponent: tl.tensor
    exponent_one: tl.tensor


@triton.jit
def student_row(ptr, vocab_size, temperature, softcap, logit_scale, MODE: tl.constexpr):
    """Makes a ``StudentRow`` from the float64 options."""
    unit = logit_scale
    inner = tl.full((), 1.0, MODE.acc)
    if MODE.softcap:
        unit = softcap
        inner = (logit_scale / softcap).to(MODE.acc)
    scale = unit / temperature
    return StudentRow(ptr, vocab_size, inner, unit, scale, (scale * LOG2_E).to(MODE.acc), (unit * LOG2_E).to(MODE.acc))


@triton.jit
def unit_logits(row, index, mask, MODE: tl.constexpr, HINT: tl.constexpr):
    """Loads y = z / unit (the softcap, or the logit scale) of a row, -inf outside ``mask``.

    The unit is multiplied into the exponent, which takes a difference of two y. The compiler may contract a product
    next to a subtraction to a fused multiply-add in one place and not in another, and the same logit must give the same
    exponential wherever it is read.
    """
    y = tl.load(row.ptr + index, mask=mask, other=float("-inf"), eviction_policy=HINT).to(MODE.acc)
    if MODE.softcap:
        y = tl.where(mask, tanh(y * row.inner), float("-inf"))
    return y


@triton.jit
def tanh(x):
    """Computes tanh within a few units in the last place of float32 or float64."""
    magnitude = tl.abs(x)
    if x.dtype.primitive_bitwidth == 64:
        t = expm1(-2 * magnitude)
        result = -t / (t + 2)
    else:
        square = x * x  # Cephes tanhf for small arguments, as in csrc/cpu/exponentials.h
        p = square * -5.70498872745e-3 + 2.06390887954e-2
        p = p * square - 5.37397155531e-2
        p = p * square + 1.33314422036e-1
        p = p * square - 3.33332819422e-1
        small = p * square * magnitude + magnitude
        result = tl.where(magnitude < 0.625, small, 1 - 2 / (tl.exp(2 * magnitude) + 1))
    return tl.where(x < 0, -result, result)


@triton.jit
def powers(y, level, exponent):
    """Computes exp((y - level) * exponent / log2(e)), the same bits for the same values at every place of use."""
    return tl.exp2((y - level) * exponent)


@triton.jit
def add_exactly(high, low, x):
    """Adds x >= 0 to the sum high + low, whose halves do not overlap; loses nothing where x <= high.

    Fast two-sum, Dekker 1971, "A floating-point technique for extending the available precision".
    """
    total = high + x
    return total, low + (x - (total - high))


@triton.jit
def diverge(log_q, log_p, gate, options, MODE: tl.constexpr):
    """Computes an outcome's share of D and slope p * dD/dp, for blocks and for the ghost bucket's doubles.

    ``gate`` is the factor of the row's forward KL in "gated". The slopes of forward KL and skew KL are those of the
    divergence without - q + p, see ``missing_slope``: where p sums to 1, this is the same gradient.
    """
    DIVERGENCE: tl.constexpr = MODE.divergence
    PROPER: tl.constexpr = MODE.rest == "ghost" or MODE.rest == "renorm_both"
    q = tl.exp(log_q)
    p = tl.exp(log_p)
    if DIVERGENCE == "forward_kl":
        if PROPER:
            share = kl_share(log_q - log_p, q, p)
        else:
            share = tl.where(q == 0, 0.0, q * (log_q - log_p))
        slope = -q
    elif DIVERGENCE == "soft_ce":
        share = tl.where(q == 0, 0.0, -q * log_p)
        slope = -q
    elif DIVERGENCE == "reverse_kl" or DIVERGENCE == "gated":
        # An outcome with q = 0 is skipped: it would make D infinite. One whose q only underflows is not.
        excluded = log_q == float("-inf")
        slope = tl.where((p == 0) | excluded, 0.0, p * (log_p - log_q))
        share = tl.where(excluded, 0.0, kl_share(log_p - log_q, p, q))
        if DIVERGENCE == "gated":
            factor = gate.to(q.dtype)
            share += tl.where(factor == 0, 0.0, kl_share(log_q - log_p, q, p) * factor)
            slope -= q * factor
    elif DIVERGENCE == "jsd":
        beta = options.beta.to(q.dtype)
        rest = (1 - options.beta).to(q.dtype)
        log_m = log_mixture(log_q, log_p, options.beta)
        m = q * beta + p * rest
        share = kl_share(log_q - log_m, q, m) * beta + kl_share(log_p - log_m, p, m) * rest
        slope = tl.where(p == 0, 0.0, p * (log_p - log_m) * rest)
    elif DIVERGENCE == "skew_kl":
        alpha = options.alpha
        log_m = log_mixture(log_q, log_p, alpha)
        share = kl_share(log_q - log_m, q, q * alpha.to(q.dtype) + p * (1 - alpha).to(q.dtype))
        slope = tl.where((q == 0) | (p == 0), 0.0, tl.exp(log_p + log_q - log_m) * (alpha - 1).to(q.dtype))
    elif DIVERGENCE == "skew_reverse_kl":
        alpha = options.alpha
        log_m = log_mixture(log_p, log_q, alpha)
        excluded = log_m == float("-inf")
        m = p * alpha.to(q.dtype) + q * (1 - alpha).to(q.dtype)
        share = tl.where(excluded, 0.0, kl_share(log_p - log_m, p, m))
        by_mixture = (q - p) * tl.exp(log_p - log_m) * (alpha * (1 - alpha)).to(q.dtype)
        slope = tl.where((p == 0) | excluded, 0.0, p * (log_p - log_m) + by_mixture)
    elif DIVERGENCE == "tvd":
        share = tl.abs(q - p) * 0.5
        slope = tl.where(q == p, 0.0, tl.where(q < p, p * 0.5, p * -0.5))
    else:
        tl.static_assert(DIVERGENCE == "ab")
        share, slope = diverge_alpha_beta(log_q, log_p, options.alpha, options.beta)
    return share, slope


@triton.jit
def diverge_alpha_beta(log_q, log_p, alpha, beta):
    """Computes an outcome's share of the alpha-beta divergence and slope p * dD/dp.

    With x = log(q / p) and r = alpha + beta the share is p^r / (alpha beta) times
    alpha / r (exp(r x) - 1 - r x) - (exp(alpha x) - 1 - alpha x).
    """
    dtype: tl.constexpr = log_q.dtype
    a = alpha.to(dtype)
    both = (alpha + beta).to(dtype)
    of_q = (alpha / (alpha + beta)).to(dtype)
    of_p = (beta / (alpha + beta)).to(dtype)
    log_ratio = log_q - log_p
    near = tl.abs(log_ratio * both) < 0.5
    p_power = tl.exp(log_p * both)
    product = tl.exp(log_q * a + log_p * beta.to(dtype))
    remainder = exp_remainder(log_ratio * a)
    near_share = p_power * (exp_remainder(log_ratio * both) * of_q - remainder)
    far_share = tl.exp(log_q * both) * of_q + p_power * of_p - product
    share = tl.where(near, near_share, far_share) * (1 / (alpha * beta)).to(dtype)
    slope = tl.where(near, -p_power * (remainder + log_ratio * a), p_power - product) * (1 / alpha).to(dtype)
    return share, slope


@triton.jit
def missing_slope(gate, options, MODE: tl.constexpr):
    """Returns the factor c of the slopes c * p that ``diverge`` leaves out, in float64."""
    factor = tl.full((), 0.0, tl.float64)
    if MODE.divergence == "forward_kl" or MODE.divergence == "soft_ce":
        factor += 1
    elif MODE.divergence == "skew_kl":
        factor += 1 - options.alpha
    elif MODE.divergence == "gated":
        factor += gate
    return factor


@triton.jit
def log_mixture(log_a, log_b, share):
    """Computes the log of share * a + (1 - share) * b from log a, log b and a float64 share."""
    dtype: tl.constexpr = log_a.dtype
    return log_add_exp(log_a + tl.log(share).to(dtype), log_b + tl.log(1 - share).to(dtype))


@triton.jit
def kl_share(log_ratio, a, b):
    """Computes a log(a / b) - a + b, the share of an outcome of KL(a || b), from ``log_ratio`` = log(a / b).

    It is at least 0, and adds up to the usual KL where both sides sum to 1. Near a = b its terms would cancel.
    """
    near = a * exp_remainder(-log_ratio)
    share = tl.where(tl.abs(log_ratio) < 0.5, near, a * log_ratio - a + b)
    return tl.where(a == 0, b, share)


@triton.jit
def exp_remainder(x):
    """Computes exp(x) - 1 - x for |x| < 1/2, where its terms would cancel, by a series."""
    # x^2 / 2 * (1 + x / 3 * (1 + x / 4 * (1 + ...)))
    NUM_TERMS: tl.constexpr = 15 if x.dtype.primitive_bitwidth == 64 else 8
    series = x * 0 + 1
    for i in tl.static_range(NUM_TERMS, 2, -1):
        series = 1 + x * (1.0 / i) * series
    return x * x * 0.5 * series


@triton.jit
def weigh(log_s_y, log_t_y, given, MODE: tl.constexpr):
    """Computes the token weight w, and dw / d log s_y (0 where detached), in float64."""
    value = tl.full((), 1.0, tl.float64)
    slope = tl.full((), 0.0, tl.float64)
    if MODE.weighting == "tensor":
        value = given
    elif MODE.weighting != "none":
        tl.static_assert(MODE.weighting == "teacher_over_student" or MODE.weighting == "student_over_teacher")
        sign: tl.constexpr = 1 if MODE.weighting == "teacher_over_student" else -1
        # If the teacher's probability of the label is 0, the ratio ignores the student's, even at 0/0.
        impossible = log_t_y == float("-inf")
        log_ratio = sign * tl.where(impossible, log_t_y, log_t_y - log_s_y)
        ratio = tl.exp(tl.where(log_ratio > 30, 30.0, log_ratio))
        value = -expm1(-ratio)
        if not MODE.detach_weight:
            slope = tl.where(log_ratio <= 30, -sign * ratio * tl.exp(-ratio), 0.0)
    return value, slope
