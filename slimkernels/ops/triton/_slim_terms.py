"""The pieces of a row of slim_loss that do not depend on how it is read: logits, divergences, the token's weight."""

from __future__ import annotations

import triton
import triton.language as tl

from slimkernels.ops.triton._math import double, expm1, log_add_exp

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def unit_logits(row_ptr, index, mask, inner, SOFTCAP: tl.constexpr, ACC: tl.constexpr, HINT: tl.constexpr):
    """Effective logits over ``unit`` (the softcap, or the logit scale), -inf outside ``mask``.

    The factor is left to the exponent that takes a difference of two of them: a product beside a subtraction may be
    contracted to a fused multiply-add in one place and not in another, and the same logit must give the same
    exponential wherever it is read.
    """
    y = tl.load(row_ptr + index, mask=mask, other=float("-inf"), eviction_policy=HINT).to(ACC)
    if SOFTCAP:
        y = tl.where(mask, tanh(y * inner), float("-inf"))
    return y


@triton.jit
def tanh(x):
    """Within a few units in the last place of float32, or float64."""
    magnitude = tl.abs(x)
    if x.dtype.primitive_bitwidth == 64:
        t = expm1(-2 * magnitude)
        result = -t / (t + 2)
    else:
        square = x * x  # Cephes tanhf for small arguments, as csrc/cpu/vec.h
        p = square * -5.70498872745e-3 + 2.06390887954e-2
        p = p * square - 5.37397155531e-2
        p = p * square + 1.33314422036e-1
        p = p * square - 3.33332819422e-1
        small = p * square * magnitude + magnitude
        result = tl.where(magnitude < 0.625, small, 1 - 2 / (tl.exp(2 * magnitude) + 1))
    return tl.where(x < 0, -result, result)


@triton.jit
def powers(y, level, exponent):
    """The exponential of (y - level) * exponent / log2(e), the same bits wherever it is called with the same values."""
    return tl.exp2((y - level) * exponent)


@triton.jit
def add_exactly(high, low, x):
    """Adds x >= 0 to the sum high + low, whose halves do not overlap; loses nothing where x <= high.

    Fast two-sum, Dekker 1971, "A floating-point technique for extending the available precision".
    """
    total = high + x
    return total, low + (x - (total - high))


@triton.jit
def diverge(log_q, log_p, beta, alpha, DIVERGENCE: tl.constexpr):
    """One outcome's share of D, and p * dD/dp; for blocks and for the ghost bucket's doubles alike."""
    q = tl.exp(log_q)
    p = tl.exp(log_p)
    if DIVERGENCE == "forward_kl":
        share = tl.where(q == 0, 0.0, q * (log_q - log_p))
        slope = -q
    elif DIVERGENCE == "soft_ce":
        share = tl.where(q == 0, 0.0, -q * log_p)
        slope = -q
    elif DIVERGENCE == "reverse_kl":
        # An outcome the teacher excludes would make D infinite, and a rounded-away tail with it: it is left out.
        excluded = log_q == float("-inf")
        share = tl.where((p == 0) | excluded, 0.0, p * (log_p - log_q))
        slope = tl.where(excluded, 0.0, share + p)
    elif DIVERGENCE == "jsd":
        weight = double(beta)
        log_m = log_add_exp(log_q + tl.log(weight).to(q.dtype), log_p + tl.log(1 - weight).to(q.dtype))
        slope = tl.where(p == 0, 0.0, p * (log_p - log_m) * (1 - weight).to(q.dtype))
        share = tl.where(q == 0, 0.0, q * (log_q - log_m) * weight.to(q.dtype)) + slope
    else:
        tl.static_assert(DIVERGENCE == "skew_kl")
        weight = double(alpha)
        log_m = log_add_exp(log_q + tl.log(weight).to(q.dtype), log_p + tl.log(1 - weight).to(q.dtype))
        share = tl.where(q == 0, 0.0, q * (log_q - log_m))
        slope = tl.where((q == 0) | (p == 0), 0.0, tl.exp(log_p + log_q - log_m) * (weight - 1).to(q.dtype))
    return share, slope


@triton.jit
def weigh(log_student, log_teacher, given, WEIGHTING: tl.constexpr, DETACH: tl.constexpr):
    """The token's weight w, and dw / d log s_y (0 where detached), in float64."""
    value = tl.full((), 1.0, tl.float64)
    slope = tl.full((), 0.0, tl.float64)
    if WEIGHTING == "tensor":
        value = given
    elif WEIGHTING != "none":
        tl.static_assert(WEIGHTING == "teacher_over_student" or WEIGHTING == "student_over_teacher")
        sign: tl.constexpr = 1 if WEIGHTING == "teacher_over_student" else -1
        # A label the teacher gives nothing decides alone, also where the student gives it nothing either.
        impossible = log_teacher == float("-inf")
        log_ratio = sign * tl.where(impossible, log_teacher, log_teacher - log_student)
        ratio = tl.exp(tl.where(log_ratio > 30, 30.0, log_ratio))
        value = -expm1(-ratio)
        if not DETACH:
            slope = tl.where(log_ratio <= 30, -sign * ratio * tl.exp(-ratio), 0.0)
    return value, slope
