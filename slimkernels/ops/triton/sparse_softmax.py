"""The Triton kernel of ``sparse_softmax``: one program per row, its K entries a block at a time."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slimkernels.ops.triton import launch
from slimkernels.ops.triton._math import double
from slimkernels.ops.triton._teacher import kept_entries, log_q_tail_of, log_sum_exp_of_entries, teacher_q_norm


@triton.jit
def sparse_softmax_kernel(
    ids_ptr,  # (N, K)
    logits_ptr,  # (N, K)
    lse_ptr,  # (N,) or None
    rest_lse_ptr,  # (N,), NaN where unknown, or None
    logprobs_ptr,  # (N, K)
    tail_logprob_ptr,  # (N,)
    top_k,
    vocab_size,
    temperature: tl.float64,
    REST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes one row per program: counts and checks its ids, sums its entries, writes its log-probabilities."""
    row = tl.program_id(0).to(tl.int64)
    inv_temperature = (1 / double(temperature)).to(ACC)
    ids_ptr += row * top_k
    logits_ptr += row * top_k
    logprobs_ptr += row * top_k
    offs_k = tl.arange(0, BLOCK_K)

    kept = kept_entries(ids_ptr, top_k, vocab_size, BLOCK_K)
    lse = tl.full((), float("nan"), tl.float64)
    if lse_ptr is not None:
        lse = tl.load(lse_ptr + row).to(tl.float64)
    rest_lse = tl.full((), float("nan"), tl.float64)
    if rest_lse_ptr is not None:
        rest_lse = tl.load(rest_lse_ptr + row).to(tl.float64)
    lse_on = log_sum_exp_of_entries(logits_ptr, kept, inv_temperature, ACC, BLOCK_K)
    q_norm = teacher_q_norm(lse_on, lse, rest_lse, kept, vocab_size, REST)
    tail = tl.full((), float("-inf"), tl.float64)
    if REST == "ghost":
        tail = log_q_tail_of(lse_on, lse, rest_lse, q_norm, kept, vocab_size)
    if REST == "zero_logit":
        unkept = (vocab_size - kept).to(tl.float64)
        tail = tl.where(unkept > 0, tl.log(tl.maximum(unkept, 1.0)) - q_norm, tail)

    # Raising would need a synchronisation, so bad rows become NaN.
    broken = kept < 0
    for begin in range(0, top_k, BLOCK_K):
        k = begin + offs_k
        x = tl.load(logits_ptr + k, mask=k < kept, other=float("-inf")).to(ACC) * inv_temperature
        logprobs = tl.where(k < kept, (x.to(tl.float64) - q_norm).to(ACC), float("-inf"))
        tl.store(logprobs_ptr + k, tl.where(broken, float("nan"), logprobs), mask=k < top_k)
    tl.store(tail_logprob_ptr + row, tl.where(broken, float("nan"), tail))


def sparse_softmax_rows(
    ids: Tensor,
    logits: Tensor,
    lse: Tensor | None,
    rest_lse: Tensor | None,
    temperature: float,
    rest: str,
    vocab_size: int,
    logprobs: Tensor,
    tail_logprob: Tensor,
) -> int:
    """Launches the kernel, and returns 0: learning of a bad row would need a synchronisation."""
    num_rows, top_k = logits.shape
    settings = launch.settings_of("sparse_softmax", logits)
    launch.run(
        sparse_softmax_kernel,
        num_rows,
        settings,
        logits,
        ids,
        logits,
        lse,
        rest_lse,
        logprobs,
        tail_logprob,
        top_k,
        vocab_size,
        temperature,
        REST=rest,
        ACC=launch.accumulation_dtype(logits.dtype),
        BLOCK_K=launch.block_of(settings, top_k),
    )
    return 0
