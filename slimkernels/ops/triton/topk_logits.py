"""The Triton kernels of ``topk_logits``.

1. A strided sample of a row gives a threshold that somewhat more than K entries reach.
2. One pass over the row appends those candidates to a scratch in the order of their ids, and sums the exponentials of
   all others relative to the threshold, which bounds them.
3. A bisection finds the exact K-th largest among the candidates.
4. The log-sum-exp of what is not kept is summed relative to the largest of it, which is a candidate.
5. The candidates are compacted to the outputs.

If the sample misleads (no more than K candidates, or more than the scratch holds), steps 3 to 5 work on the row itself,
which is slower but still exact. So they do if the row is short or a large part of it is kept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.ops.triton import launch
from slimkernels.ops.triton._math import order_keys, value_of_key, widen
from slimkernels.ops.triton._row_sums import copy_target_logit, exp_at, log_sum_exp, resident_programs
from slimkernels.ops.triton._select import count_reaching, largest_key, load_entries, reaches_key, select_key

# Adjacent entries that the sample reads at each position: a sector of memory for 16-bit logits.
_RUN = tl.constexpr(16)


@triton.jit
def topk_logits_kernel(
    logits_ptr,  # (N, V), rows row_stride apart
    target_ptr,  # (N,) or None
    values_ptr,  # (N, K)
    ids_ptr,  # (N, K)
    lse_ptr,  # (N, M)
    rest_lse_ptr,  # (N, M)
    target_logit_ptr,  # (N,) or None
    scratch_values_ptr,  # (programs, capacity) or None
    scratch_ids_ptr,  # (programs, capacity) or None
    num_rows,
    num_programs,
    row_stride,
    vocab_size,
    top_k,
    num_temperatures,
    inv_temperature: tl.float64,
    inv_second: tl.float64,
    sample_rank,
    sample_most,
    capacity,
    SAMPLE: tl.constexpr,  # number of entries of a row that are sampled; 0 for none
    TWO: tl.constexpr,  # whether there is a second temperature
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Selects the K largest logits of rows; each program takes every num_programs-th row and reuses its scratch."""
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    lowest = order_keys(tl.full((), float("-inf"), dtype))
    for row in range(tl.program_id(0), num_rows, num_programs):
        far_row = tl.zeros((), tl.int64) + row
        row_ptr = logits_ptr + far_row * row_stride
        copy_target_logit(row_ptr, target_ptr, target_logit_ptr, row, vocab_size, ACC)

        # The entries to select from: x_ptr (length,). The K-th largest has at least the key `low`.
        x_ptr = row_ptr
        length = vocab_size + tl.zeros((), tl.int32)
        readable = length
        low = lowest
        if SAMPLE > 0:
            found_ptr = scratch_values_ptr + tl.program_id(0).to(tl.int64) * capacity
            found_ids_ptr = scratch_ids_ptr + tl.program_id(0).to(tl.int64) * capacity
            guess = _guess_key(row_ptr, vocab_size, found_ptr, lowest, sample_rank, sample_most, SAMPLE, ACC, BLOCK_V)
            threshold = widen(value_of_key(guess, dtype), ACC)
            found, below, below_second = _collect(
                row_ptr,
                vocab_size,
                threshold,
                found_ptr,
                found_ids_ptr,
                capacity,
                inv_temperature,
                inv_second,
                TWO,
                ACC,
                BLOCK_V,
            )
            tl.debug_barrier()  # threads read candidates that others appended
            # A candidate that is not kept bounds all that is not kept.
            sufficient = (found > top_k) & (found <= capacity)
            x_ptr = tl.where(sufficient, found_ptr, row_ptr)
            length = tl.where(sufficient, found, length)
            readable = tl.where(sufficient, (found + 15) // 16 * 16, readable)
            low = tl.where(sufficient, guess, low)
            readable_ids = tl.where(sufficient, readable, 0)

        high = largest_key(x_ptr, length, readable, lowest, BLOCK_V)
        level = widen(value_of_key(high, dtype), ACC)
        total = _sum_exp(x_ptr, length, readable, level, inv_temperature, ACC, BLOCK_V)
        if SAMPLE > 0:
            total += tl.where(sufficient, below * exp_at(threshold - level, inv_temperature, ACC), 0.0)
        tl.store(lse_ptr + far_row * num_temperatures, log_sum_exp(level, total, inv_temperature))
        if TWO:
            total = _sum_exp(x_ptr, length, readable, level, inv_second, ACC, BLOCK_V)
            if SAMPLE > 0:
                total += tl.where(sufficient, below_second * exp_at(threshold - level, inv_second, ACC), 0.0)
            tl.store(lse_ptr + far_row * num_temperatures + 1, log_sum_exp(level, total, inv_second))

        kth, reaching, above = select_key(x_ptr, length, readable, low, high, top_k, top_k, ACC, BLOCK_V)
        # The entries that equal the key and are not kept; none if the bisection stopped at exactly K entries.
        dropped = reaching - top_k
        rest_high = kth
        if dropped == 0:
            rest_high = _largest_key_below(x_ptr, length, readable, kth, lowest, BLOCK_V)
        level = widen(value_of_key(rest_high, dtype), ACC)
        total = dropped + _sum_exp_below(x_ptr, length, readable, kth, level, inv_temperature, ACC, BLOCK_V)
        if SAMPLE > 0:
            total += tl.where(sufficient, below * exp_at(threshold - level, inv_temperature, ACC), 0.0)
        tl.store(rest_lse_ptr + far_row * num_temperatures, log_sum_exp(level, total, inv_temperature))
        if TWO:
            total = dropped + _sum_exp_below(x_ptr, length, readable, kth, level, inv_second, ACC, BLOCK_V)
            if SAMPLE > 0:
                total += tl.where(sufficient, below_second * exp_at(threshold - level, inv_second, ACC), 0.0)
            tl.store(rest_lse_ptr + far_row * num_temperatures + 1, log_sum_exp(level, total, inv_second))

        # If the bisection stopped at exactly K entries, all that equal the key are kept.
        ties = tl.where(reaching == top_k, top_k, top_k - above)
        kept = 0
        offs_v = tl.arange(0, BLOCK_V)
        for begin in range(0, length, BLOCK_V):
            i = begin + offs_v
            mask = i < length
            x = load_entries(x_ptr, i, length, readable)
            ids = i
            if SAMPLE > 0:
                candidate_ids = tl.load(found_ids_ptr + i, mask=i < readable_ids, other=0)
                ids = tl.where(sufficient, candidate_ids, i)
            keys = order_keys(x)
            larger = mask & (keys > kth)
            tied = mask & (keys == kth)
            # One scan counts both, the ties in the upper 16 bits: a block has at most 2**14 entries.
            counts = larger.to(tl.int32) + (tied.to(tl.int32) << 16)
            ahead = tl.cumsum(counts) - counts
            taken = larger | (tied & ((ahead >> 16) < ties))
            k = kept + (ahead & 0xFFFF) + tl.minimum(ahead >> 16, ties)
            tl.store(values_ptr + far_row * top_k + k, x, mask=taken)
            tl.store(ids_ptr + far_row * top_k + k, ids, mask=taken)
            counted = tl.sum(counts)
            kept += (counted & 0xFFFF) + tl.minimum(counted >> 16, ties)
            ties -= tl.minimum(counted >> 16, ties)
        tl.debug_barrier()  # the next row overwrites the scratch


@triton.jit
def topk_logits_lse_kernel(
    logits_ptr,  # (N, V), rows row_stride apart
    values_ptr,  # (N, K), already selected
    lse_ptr,  # (N, M)
    rest_lse_ptr,  # (N, M)
    row_stride,
    vocab_size,
    top_k,
    num_temperatures,
    column,
    inv_temperature: tl.float64,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Computes the log-sum-exps at one more temperature, of the row and of what is not kept; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    values_ptr += row * top_k
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    lowest = order_keys(tl.full((), float("-inf"), dtype))
    high = largest_key(row_ptr, vocab_size, vocab_size, lowest, BLOCK_V)
    level = widen(value_of_key(high, dtype), ACC)
    total = _sum_exp(row_ptr, vocab_size, vocab_size, level, inv_temperature, ACC, BLOCK_V)
    tl.store(lse_ptr + row * num_temperatures + column, log_sum_exp(level, total, inv_temperature))

    kth = _smallest_key(values_ptr, top_k, high, BLOCK_V)
    dropped = count_reaching(row_ptr, vocab_size, vocab_size, kth, ACC, BLOCK_V) - top_k
    rest_high = kth
    if dropped == 0:
        rest_high = _largest_key_below(row_ptr, vocab_size, vocab_size, kth, lowest, BLOCK_V)
    level = widen(value_of_key(rest_high, dtype), ACC)
    total = dropped + _sum_exp_below(row_ptr, vocab_size, vocab_size, kth, level, inv_temperature, ACC, BLOCK_V)
    tl.store(rest_lse_ptr + row * num_temperatures + column, log_sum_exp(level, total, inv_temperature))


@triton.jit
def _guess_key(
    row_ptr,
    vocab_size,
    scratch_ptr,  # (SAMPLE,) at least
    lowest,
    rank,
    most,
    SAMPLE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Returns a key that ``rank`` to about ``most`` of SAMPLE entries reach, taken in runs at equal distances."""
    stride = vocab_size // (SAMPLE // _RUN)
    offs_v = tl.arange(0, BLOCK_V)
    for begin in range(0, SAMPLE, BLOCK_V):
        i = begin + offs_v
        x = tl.load(row_ptr + (i // _RUN) * stride + i % _RUN, mask=i < SAMPLE, other=0.0)
        tl.store(scratch_ptr + i, x, mask=i < SAMPLE)
    tl.debug_barrier()  # threads read entries that others sampled
    high = largest_key(scratch_ptr, SAMPLE, SAMPLE, lowest, BLOCK_V)
    key, _, _ = select_key(scratch_ptr, SAMPLE, SAMPLE, lowest, high, rank, most, ACC, BLOCK_V)
    tl.debug_barrier()  # the caller overwrites the scratch
    return key


@triton.jit
def _collect(
    row_ptr,
    vocab_size,
    threshold,
    found_ptr,  # (capacity,)
    found_ids_ptr,  # (capacity,)
    capacity,
    inv_temperature,
    inv_second,
    TWO: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Appends the entries that reach the threshold, in the order of ids, as far as there is room.

    Returns the number of entries that reach it, and the sums of exp((x - threshold) / T) over all others.
    """
    offs_v = tl.arange(0, BLOCK_V)
    found = 0
    sums = tl.zeros((BLOCK_V,), ACC)
    second_sums = tl.zeros((BLOCK_V,), ACC)
    for begin in range(0, vocab_size, BLOCK_V):
        v = begin + offs_v
        x = tl.load(row_ptr + v, mask=v < vocab_size, other=float("-inf"))
        wide = widen(x, ACC)
        reaches = (v < vocab_size) & reaches_key(wide, threshold)
        counts = reaches.to(tl.int32)
        place = found + tl.cumsum(counts) - counts
        fits = reaches & (place < capacity)
        tl.store(found_ptr + place, x, mask=fits)
        tl.store(found_ids_ptr + place, v, mask=fits)
        found += tl.sum(counts)
        sums += tl.where(reaches, 0.0, exp_at(wide - threshold, inv_temperature, ACC))
        if TWO:
            second_sums += tl.where(reaches, 0.0, exp_at(wide - threshold, inv_second, ACC))
    return found, tl.sum(sums.to(tl.float64)), tl.sum(second_sums.to(tl.float64))


@triton.jit
def _largest_key_below(x_ptr, length, readable, key, lowest, BLOCK_V: tl.constexpr):
    """Returns the largest key that is smaller than ``key``; ``lowest`` if there is none."""
    offs_v = tl.arange(0, BLOCK_V)
    largest = tl.zeros((BLOCK_V,), lowest.dtype) + lowest
    for begin in range(0, length, BLOCK_V):
        keys = order_keys(load_entries(x_ptr, begin + offs_v, length, readable))
        largest = tl.where(keys < key, tl.maximum(largest, keys), largest)
    return tl.max(largest)


@triton.jit
def _smallest_key(x_ptr, length, highest, BLOCK_V: tl.constexpr):
    offs_v = tl.arange(0, BLOCK_V)
    smallest = tl.zeros((BLOCK_V,), highest.dtype) + highest
    for begin in range(0, length, BLOCK_V):
        i = begin + offs_v
        x = tl.load(x_ptr + i, mask=i < length, other=0.0)
        smallest = tl.where(i < length, tl.minimum(smallest, order_keys(x)), smallest)
    return tl.min(smallest)


@triton.jit
def _sum_exp(x_ptr, length, readable, level, inv_temperature, ACC: tl.constexpr, BLOCK_V: tl.constexpr):
    """Returns the sum of exp((x - level) / T) in float64; no x may exceed the level."""
    offs_v = tl.arange(0, BLOCK_V)
    sums = tl.zeros((BLOCK_V,), ACC)
    for begin in range(0, length, BLOCK_V):
        i = begin + offs_v
        x = widen(load_entries(x_ptr, i, length, readable), ACC)
        sums += exp_at(x - level, inv_temperature, ACC)
    return tl.sum(sums.to(tl.float64))


@triton.jit
def _sum_exp_below(x_ptr, length, readable, key, level, inv_temperature, ACC: tl.constexpr, BLOCK_V: tl.constexpr):
    """Returns the sum of exp((x - level) / T) over the entries below ``key``, in float64; none may exceed the level."""
    offs_v = tl.arange(0, BLOCK_V)
    sums = tl.zeros((BLOCK_V,), ACC)
    for begin in range(0, length, BLOCK_V):
        x = load_entries(x_ptr, begin + offs_v, length, readable)
        sums += tl.where(order_keys(x) < key, exp_at(widen(x, ACC) - level, inv_temperature, ACC), 0.0)
    return tl.sum(sums.to(tl.float64))


class Sampling(NamedTuple):
    """Parameters of the sample of a row.

    Attributes:
        size: Number of sampled entries.
        rank: Smallest number of sampled entries that reach the threshold.
        most: Largest number of sampled entries that reach the threshold, if none tie.
        capacity: Number of candidates that the scratch holds.
    """

    size: int
    rank: int
    most: int
    capacity: int


def sampling(vocab_size: int, top_k: int) -> Sampling | None:
    """Returns how rows are sampled; None if they are short or K is so large that collecting would save nothing.

    If entries are in random order, the sampled threshold is too high, or the candidates too many for the scratch, only
    in case of a deviation of more than four standard deviations.
    """
    size = min(max(triton.next_power_of_2(vocab_size // 32), 256), 4096)
    share = top_k / vocab_size
    rank = int(size * share + 4 * math.sqrt(size * share * (1 - share)) + 2)
    most = rank + rank // 8
    needed = math.ceil((most + 4 * math.sqrt(most) + 4) * vocab_size / size)
    capacity = (max(needed, size) + 63) // 64 * 64
    return Sampling(size, rank, most, capacity) if vocab_size >= 4 * size and 2 * capacity <= vocab_size else None


def topk_logits_rows(
    logits: Tensor,
    top_k: int,
    target: Tensor | None,
    temperatures: list[float],
    values: Tensor,
    ids: Tensor,
    lse: Tensor,
    rest_lse: Tensor,
    target_logit: Tensor | None,
) -> int:
    """Launches the kernels. Returns 0 (no fault) always, because reading faults back would need a sync."""
    num_rows, vocab_size = logits.shape
    settings = launch.settings_of("topk_logits", logits)
    constants = {
        "ACC": launch.accumulation_dtype(logits.dtype),
        "BLOCK_V": launch.block_of(settings, vocab_size),
    }
    num_programs = min(num_rows, resident_programs(logits.device, settings.num_warps))
    sample = sampling(vocab_size, top_k)
    scratch_values, scratch_ids = None, None
    if sample is not None:
        scratch_values = logits.new_empty(num_programs, sample.capacity)
        scratch_ids = logits.new_empty(num_programs, sample.capacity, dtype=torch.int32)
    else:
        sample = Sampling(0, 0, 0, 0)
    inverses = [1 / temperature for temperature in temperatures]
    launch.run(
        topk_logits_kernel,
        num_programs,
        settings,
        logits,
        logits,
        target,
        values,
        ids,
        lse,
        rest_lse,
        target_logit,
        scratch_values,
        scratch_ids,
        num_rows,
        num_programs,
        logits.stride(0),
        vocab_size,
        top_k,
        len(temperatures),
        inverses[0],
        inverses[1] if len(inverses) > 1 else 1.0,
        sample.rank,
        sample.most,
        sample.capacity,
        SAMPLE=sample.size,
        TWO=len(inverses) > 1,
        **constants,
    )
    for column in range(2, len(inverses)):
        launch.run(
            topk_logits_lse_kernel,
            num_rows,
            settings,
            logits,
            logits,
            values,
            lse,
            rest_lse,
            logits.stride(0),
            vocab_size,
            top_k,
            len(temperatures),
            column,
            inverses[column],
            **constants,
        )
    return 0
