"""The Triton kernels of ``sample_targets``: one reads every row, one runs a race per draw, one counts the draws."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.ops.triton import launch
from slimkernels.ops.triton._math import double
from slimkernels.ops.triton._race import NO_ID, finite_top, race_of_row, seed_of_row
from slimkernels.ops.triton._row_softmax import FIELDS_OF_ROW, LOG_SUM, TOP, logprob_of, option_of, row_softmax
from slimkernels.ops.triton._truncation import key_of


@triton.jit(do_not_specialize=["rounds", "seed", "position"])
def draw_targets_kernel(
    logits_ptr,  # (N, V), rows `row_stride` apart
    row_stride: tl.int64,
    softmax_ptr,  # (N, FIELDS)
    vocab_size,
    rounds,
    seed: tl.int64,
    seeds_ptr,  # (N,) or () int64, or None
    position: tl.int64,
    positions_ptr,  # (N,) int64 or None
    temperature: tl.float64,
    drawn_ptr,  # (N, rounds) int32
    SEED_PER_ROW: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draws one id per program; the programs of a row are consecutive, so that its logits stay in the cache."""
    row = (tl.program_id(0) // rounds).to(tl.int64)
    draw = tl.program_id(0) % rounds
    logits_ptr += row * row_stride
    X: tl.constexpr = logits_ptr.dtype.element_ty
    top = tl.load(softmax_ptr + row * FIELDS_OF_ROW + TOP)
    infinite = top == float("inf")
    # Logits of -inf are never drawn; if there are logits of +inf, only those are drawn.
    least_key = tl.where(infinite, key_of(top, X), key_of(tl.full((), float("-inf"), tl.float32), X) + 1)
    token = tl.full((), NO_ID, tl.int32)
    if top == top:
        _, token = race_of_row(
            logits_ptr,
            vocab_size,
            least_key,
            finite_top(top, ACC),
            double(temperature),
            seed_of_row(row, seed, seeds_ptr, SEED_PER_ROW),
            option_of(row, position, positions_ptr),
            draw,
            None,
            None,
            1,
            ACC,
            BLOCK,
            1,
        )
    tl.store(drawn_ptr + row * rounds + draw, tl.where(token == NO_ID, -1, token))


@triton.jit(do_not_specialize=["rounds"])
def count_targets_kernel(
    logits_ptr,  # (N, V), rows `row_stride` apart
    row_stride: tl.int64,
    softmax_ptr,  # (N, FIELDS)
    vocab_size,
    sorted_ptr,  # (N, rounds) int32, drawn ids in ascending order; all -1 in a row without a distribution
    starts_ptr,  # (N, rounds) int32 scratch
    rounds,
    top_k,
    target_ptr,  # (N,) int64 or None
    ids_ptr,  # (N, K) int32
    log_shares_ptr,  # (N, K)
    target_logit_ptr,  # (N,) or None
    BLOCK: tl.constexpr,
):
    """Counts how often each id was drawn, from where it begins in the sorted draws; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    sorted_ptr += row * rounds
    starts_ptr += row * rounds
    ids_ptr += row * top_k
    log_shares_ptr += row * top_k
    padding = tl.full((), 0.0, tl.float64)
    num_drawn = rounds
    if target_ptr is not None:
        target = tl.load(target_ptr + row)
        # Raising would need a sync, so a row with a bad label keeps no id and its numbers are NaN.
        bad = target >= vocab_size
        padding = tl.where(bad, float("nan"), padding)
        num_drawn = tl.where(bad, 0, rounds)
        labelled = (target >= 0) & (target < vocab_size)
        z = tl.load(logits_ptr + row * row_stride + target, mask=labelled, other=0.0).to(tl.float64)
        softmax_ptr += row * FIELDS_OF_ROW
        logprob = logprob_of(z, tl.load(softmax_ptr + TOP), tl.load(softmax_ptr + LOG_SUM))
        tl.store(target_logit_ptr + row, tl.where(labelled, logprob, float("nan")))

    offs = tl.arange(0, BLOCK)
    distinct = 0
    for begin in range(0, num_drawn, BLOCK):
        i = begin + offs
        ids = tl.load(sorted_ptr + i, mask=i < rounds, other=-1)
        before = tl.load(sorted_ptr + i - 1, mask=(i > 0) & (i < rounds), other=-1)
        first = (ids >= 0) & (ids != before)
        slots = distinct + tl.cumsum(first.to(tl.int32)) - 1
        tl.store(ids_ptr + slots, ids, mask=first)
        tl.store(starts_ptr + slots, i, mask=first)
        distinct += tl.sum(first.to(tl.int32))
    tl.debug_barrier()  # threads read starts that others stored
    for begin in range(0, top_k, BLOCK):
        slots = begin + offs
        start = tl.load(starts_ptr + slots, mask=slots < distinct, other=0)
        end = tl.load(starts_ptr + slots + 1, mask=slots + 1 < distinct, other=rounds)
        log_share = tl.log((end - start).to(tl.float64) / rounds)
        tl.store(log_shares_ptr + slots, tl.where(slots < distinct, log_share, padding), mask=slots < top_k)
        tl.store(ids_ptr + slots, tl.full((BLOCK,), -1, tl.int32), mask=(slots >= distinct) & (slots < top_k))


def sample_targets_rows(
    logits: Tensor,
    rounds: int,
    seed: int,
    seeds: Tensor | None,
    position: int,
    positions: Tensor | None,
    temperature: float,
    target: Tensor | None,
    ids: Tensor,
    log_shares: Tensor,
    target_logit: Tensor | None,
) -> int:
    """Launches the kernels. Returns 0 (no fault) always, because reading faults back would need a sync."""
    num_rows, vocab_size = logits.shape
    settings = launch.settings_of("sample_targets", logits)
    softmax, _ = row_softmax(logits, 1.0, None, tempered=False, with_lanes=False)
    drawn = torch.empty(num_rows, rounds, dtype=torch.int32, device=logits.device)
    launch.run(
        draw_targets_kernel,
        num_rows * rounds,
        settings,
        logits,
        logits,
        logits.stride(0),
        softmax,
        vocab_size,
        rounds,
        seed,
        seeds,
        position,
        positions,
        temperature,
        drawn,
        SEED_PER_ROW=seeds is not None and seeds.ndim > 0,
        ACC=launch.accumulation_dtype(logits.dtype),
        BLOCK=launch.block_of(settings, vocab_size),
    )
    launch.run(
        count_targets_kernel,
        num_rows,
        settings,
        logits,
        logits,
        logits.stride(0),
        softmax,
        vocab_size,
        drawn.sort(-1).values,
        drawn,
        rounds,
        ids.shape[1],
        target,
        ids,
        log_shares,
        target_logit,
        BLOCK=launch.block_of(settings, rounds),
    )
    return 0
