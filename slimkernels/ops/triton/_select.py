"""Selection from a row by bisection of order keys, without a sort: functions that Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from slimkernels.ops.triton._math import order_keys, value_of_key, widen


@triton.jit
def select_key(x_ptr, length, readable, low, high, rank, most, ACC: tl.constexpr, BLOCK_V: tl.constexpr):
    """Bisects [low, high] for the key of the rank-th largest entry, or for a key that rank to ``most`` entries reach.

    Stopping early saves half of the steps if the values differ. Returns the key, the number of entries that reach it,
    and, if that is more than ``most``, the number of entries above it.
    """
    reaching = length + tl.zeros((), tl.int32)
    above = tl.zeros((), tl.int32)
    while (low < high) & (reaching > most):
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
        count = count_reaching(x_ptr, length, readable, middle, ACC, BLOCK_V)
        enough = count >= rank
        low = tl.where(enough, middle, low)
        reaching = tl.where(enough, count, reaching)
        high = tl.where(enough, high, middle - 1)
        above = tl.where(enough, above, count)
    return low, reaching, above


@triton.jit
def count_reaching(x_ptr, length, readable, key, ACC: tl.constexpr, BLOCK_V: tl.constexpr):
    """Counts the entries that reach a key."""
    offs_v = tl.arange(0, BLOCK_V)
    threshold = widen(value_of_key(key, x_ptr.dtype.element_ty), ACC)
    counts = tl.zeros((BLOCK_V,), tl.int32)
    for begin in range(0, length, BLOCK_V):
        i = begin + offs_v
        x = widen(load_entries(x_ptr, i, length, readable), ACC)
        counts += (reaches_key(x, threshold) & (i < length)).to(tl.int32)
    return tl.sum(counts)


@triton.jit
def largest_key(x_ptr, length, readable, lowest, BLOCK_V: tl.constexpr):
    """Returns the largest key of the entries; ``lowest`` of none."""
    offs_v = tl.arange(0, BLOCK_V)
    largest = tl.zeros((BLOCK_V,), lowest.dtype) + lowest
    for begin in range(0, length, BLOCK_V):
        i = begin + offs_v
        largest = tl.maximum(largest, order_keys(load_entries(x_ptr, i, length, readable)))
    return tl.max(largest)


@triton.jit
def load_entries(x_ptr, i, length, readable):
    """Loads entries i < ``length`` and returns -inf for others; memory is read up to ``readable``.

    Triton uses vector loads only if the limit of the mask is known to be a multiple of the vector length.
    """
    x = tl.load(x_ptr + i, mask=i < readable, other=float("-inf"))
    return tl.where(i < length, x, float("-inf"))


@triton.jit
def reaches_key(x, threshold):
    """Returns whether x >= threshold in the order of keys: NaN reaches every threshold, and only NaN reaches NaN."""
    return (x >= threshold) | (x != x)
