"""Functions of the Triton kernels over a teacher's row: its ids, its normaliser, and its mass outside its ids."""

from __future__ import annotations

import triton
import triton.language as tl

from slimkernels.ops.triton._math import log1m_exp, log_add_exp


@triton.jit
def kept_entries(ids_ptr, top_k, vocab_size, BLOCK_K: tl.constexpr):
    """Counts the ids of a row before its padding; -1 where they do not ascend strictly inside [0, vocab_size)."""
    offs_k = tl.arange(0, BLOCK_K)
    kept = 0
    bad = 0
    for begin in range(0, top_k, BLOCK_K):
        k = begin + offs_k
        mask_k = k < top_k
        ids = tl.load(ids_ptr + k, mask=mask_k, other=-1)
        before = tl.load(ids_ptr + k - 1, mask=mask_k & (k > 0), other=-2)
        padding = ids == -1
        sound = tl.where(padding, True, (ids >= 0) & (ids < vocab_size) & ((before > -1) | (k == 0)) & (ids > before))
        kept += tl.sum((mask_k & ~padding).to(tl.int32))
        bad += tl.sum((mask_k & ~sound).to(tl.int32))
    return tl.where(bad > 0, -1, kept)


@triton.jit
def log_sum_exp_of_entries(logits_ptr, kept, inv_temperature, ACC: tl.constexpr, BLOCK_K: tl.constexpr):
    """Computes the log-sum-exp of the first ``kept`` logits times ``inv_temperature``, float64; -inf of none."""
    offs_k = tl.arange(0, BLOCK_K)
    level = tl.full((), float("-inf"), ACC)
    total = tl.full((), 0.0, tl.float64)
    for begin in range(0, kept, BLOCK_K):
        mask_k = begin + offs_k < kept
        x = tl.load(logits_ptr + begin + offs_k, mask=mask_k, other=float("-inf")).to(ACC) * inv_temperature
        higher = tl.maximum(level, tl.max(x))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp((level - shift).to(tl.float64)) + tl.sum(tl.exp(x - shift)).to(tl.float64)
        level = higher
    return level + tl.log(total)


@triton.jit
def teacher_q_norm(lse_on, lse, rest_lse, kept, vocab_size, REST: tl.constexpr):
    """Computes the normaliser of the teacher's row: log q = logit / T - q_norm on its ids.

    A ``rest_lse`` of NaN is unknown. A known one makes the outcomes of "ghost" add up to 1 whatever rounded the logits.
    """
    if REST == "renorm" or REST == "renorm_both":
        q_norm = lse_on
    elif REST == "zero_logit":
        unkept = (vocab_size - kept).to(tl.float64)
        q_norm = tl.where(unkept > 0, log_add_exp(lse_on, tl.log(tl.maximum(unkept, 1.0))), lse_on)
    elif REST == "ghost":
        q_norm = tl.where(rest_lse == rest_lse, log_add_exp(lse_on, rest_lse), lse)
    else:
        q_norm = lse
    return finite_norm(q_norm)


@triton.jit
def finite_norm(norm):
    """Replaces -inf, the normaliser of a row without mass, by 0, so that -inf - (-inf) never occurs."""
    return tl.where(norm == float("-inf"), 0.0, norm)


@triton.jit
def log_q_tail_of(lse_on, lse, rest_lse, q_norm, kept, vocab_size):
    """Computes log(1 - a), the teacher's mass outside its ids; exactly -inf where it keeps every id or has no mass.

    A ``rest_lse`` of NaN is unknown; then 1 - a is a difference, which rounding makes worthless below about 1e-5.
    """
    known = rest_lse == rest_lse
    is_whole = (kept == vocab_size) | (lse == float("-inf"))
    difference = tl.where(is_whole, float("-inf"), log1m_exp(lse_on - q_norm))
    return tl.where(known, rest_lse - q_norm, difference)
