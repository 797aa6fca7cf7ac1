"""The Triton kernels of ``sample_targets``: two read every row, one finds each draw, one counts the draws.

The weights, their sums and the points are those of reference_sampling.py: integers, so that the block size and the
order of the threads change nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.ops.triton import launch
from slimkernels.ops.triton._math import double, widen
from slimkernels.ops.triton._race import random_words, seed_of_row
from slimkernels.ops.triton._row_softmax import FIELDS_OF_ROW, LOG_SUM, TOP, logprob_of, option_of, row_softmax

# 2^25 / ln 2
RATE = tl.constexpr(48408812.64624594)
# 63 * 2^25
LARGEST_FALL = tl.constexpr(2113929216.0)


@triton.jit
def draw_weights(z, top, temperature, shift, ACC: tl.constexpr):
    """Computes the int64 weights of logits in a row whose largest logit is ``top``; -inf has none."""
    rate = tl.minimum(tl.maximum(RATE / temperature, 7.888609052210118e-31), 2.1267647932558654e37).to(ACC)
    wide = widen(z, ACC)
    infinite = top == float("inf")
    # Logits of +inf share the mass as equal ones do.
    wide = tl.where(infinite, tl.where(wide == float("inf"), 0.0, float("-inf")), wide)
    level = tl.where(infinite, 0.0, top).to(ACC)
    fixed = tl.minimum((level - wide) * rate, LARGEST_FALL).to(tl.int32)
    fraction = fixed.to(tl.uint32) << 7
    power = fraction * 0 + 234126
    power = 2737501 - tl.umulhi(fraction, power)
    power = 20571132 - tl.umulhi(fraction, power)
    power = 119165493 - tl.umulhi(fraction, power)
    power = 515877902 - tl.umulhi(fraction, power)
    power = 1488521986 - tl.umulhi(fraction, power)
    power = 2147483648 - tl.umulhi(fraction, power)
    return (power.to(tl.int64) << shift) >> (fixed >> 25).to(tl.int64)


@triton.jit(do_not_specialize=["shift"])
def sum_weights_kernel(
    logits_ptr,  # (N, V), rows `row_stride` apart
    row_stride: tl.int64,
    softmax_ptr,  # (N, FIELDS)
    vocab_size,
    shift: tl.int64,
    temperature: tl.float64,
    sums_ptr,  # (N, num_blocks + 1) int64
    num_blocks,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the sums of the weights before each block of a row, and of the whole row; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    sums_ptr += row * (num_blocks + 1)
    top = tl.load(softmax_ptr + row * FIELDS_OF_ROW + TOP)
    temperature = double(temperature)
    offs = tl.arange(0, BLOCK)
    total = tl.full((), 0, tl.int64)
    if top == top:
        for block in range(0, num_blocks):
            ids = block * BLOCK + offs
            z = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
            tl.store(sums_ptr + block, total)
            total += tl.sum(draw_weights(z, top, temperature, shift, ACC))
        tl.store(sums_ptr + num_blocks, total)


@triton.jit(do_not_specialize=["shift", "rounds", "seed", "position"])
def draw_targets_kernel(
    logits_ptr,  # (N, V), rows `row_stride` apart
    row_stride: tl.int64,
    softmax_ptr,  # (N, FIELDS)
    vocab_size,
    shift: tl.int64,
    rounds,
    seed: tl.int64,
    seeds_ptr,  # (N,) or () int64, or None
    position: tl.int64,
    positions_ptr,  # (N,) int64 or None
    temperature: tl.float64,
    sums_ptr,  # (N, num_blocks + 1) int64
    num_blocks,
    drawn_ptr,  # (N, rounds) int32
    SEED_PER_ROW: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
):
    """Draws one id per program: finds the block that holds the draw's point, and the id in the block."""
    index = tl.program_id(0).to(tl.int64)
    row = index // rounds
    draw = (index - row * rounds).to(tl.int32)
    logits_ptr += row * row_stride
    sums_ptr += row * (num_blocks + 1)
    top = tl.load(softmax_ptr + row * FIELDS_OF_ROW + TOP)
    token = tl.full((), -1, tl.int32)
    if top == top:
        total = tl.load(sums_ptr + num_blocks)
        point = point_of_draw(
            draw, seed_of_row(row, seed, seeds_ptr, SEED_PER_ROW), option_of(row, position, positions_ptr), total
        )
        # The blocks up to which all weights sum to no more than the point come before the block that holds it.
        block = tl.full((), 0, tl.int32)
        offs_sums = tl.arange(0, BLOCK_SUMS)
        for begin in range(0, num_blocks, BLOCK_SUMS):
            ends = begin + offs_sums
            sums = tl.load(sums_ptr + ends + 1, mask=ends < num_blocks, other=0x7FFFFFFFFFFFFFFF)
            block += tl.sum((sums <= point).to(tl.int32))
        ids = block * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
        prefix_sums = tl.cumsum(draw_weights(z, top, double(temperature), shift, ACC), 0)
        token = block * BLOCK + tl.sum((tl.load(sums_ptr + block) + prefix_sums <= point).to(tl.int32))
    tl.store(drawn_ptr + row * rounds + draw, token)


@triton.jit
def point_of_draw(draw, seed, position, total):
    """Computes floor(u total / 2^62), u being 62 bits of Philox; the halves of 31 bits overflow no int64."""
    w0, w1, w2, w3 = random_words(draw // 2, tl.full((), 0xFFFFFFFE, tl.uint32), seed, position)
    low = (tl.where(draw % 2 == 0, w0, w2) >> 1).to(tl.int64)
    high = (tl.where(draw % 2 == 0, w1, w3) >> 1).to(tl.int64)
    total_low = total & 0x7FFFFFFF
    total_high = total >> 31
    return high * total_high + ((high * total_low + low * total_high + ((low * total_low) >> 31)) >> 31)


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
    block = launch.block_of(settings, vocab_size)
    num_blocks = triton.cdiv(vocab_size, block)
    shift = 31 - (vocab_size - 1).bit_length()
    accumulation = launch.accumulation_dtype(logits.dtype)
    softmax, _ = row_softmax(logits, 1.0, None, tempered=False, with_lanes=False)
    sums = torch.empty(num_rows, num_blocks + 1, dtype=torch.int64, device=logits.device)
    launch.run(
        sum_weights_kernel,
        num_rows,
        settings,
        logits,
        logits,
        logits.stride(0),
        softmax,
        vocab_size,
        shift,
        temperature,
        sums,
        num_blocks,
        ACC=accumulation,
        BLOCK=block,
    )
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
        shift,
        rounds,
        seed,
        seeds,
        position,
        positions,
        temperature,
        sums,
        num_blocks,
        drawn,
        SEED_PER_ROW=seeds is not None and seeds.ndim > 0,
        ACC=accumulation,
        BLOCK=block,
        BLOCK_SUMS=min(triton.next_power_of_2(num_blocks), 1024),
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
