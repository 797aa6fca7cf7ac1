"""Top-k, top-p and min-p for Triton: finds one threshold on the order key of a logit, without sorting.

Ids with equal logits are kept or cut together, so a truncation keeps exactly the logits at or above some threshold. A
bisection finds it among candidates: the few ids above a lower bound of the threshold, or the whole row if those are
many.
"""

from __future__ import annotations

import triton
import triton.language as tl

from slimkernels.ops.triton._math import order_keys, value_of_key
from slimkernels.ops.triton._race import clamped_inverse, score_of


@triton.jit
def truncate(
    row_ptr,
    vocab_size,
    lanes_max_ptr,  # (LANES,)
    top,
    total,
    temperature,
    top_k,
    top_p,
    min_p,
    values_ptr,
    candidates_ptr,
    lanes_ptr,
    capacity,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finds the least key that the options keep.

    Returns the key, the kept sum of exp((z - top) / T), and the number of candidates; -1 if the candidates are the row.
    """
    X: tl.constexpr = row_ptr.dtype.element_ty
    inv_temperature = clamped_inverse(temperature)
    lowest = key_of(tl.full((), float("-inf"), tl.float32), X) + 1
    highest = key_of(top, X)
    least_min_p = lowest
    if min_p > 0:
        least_min_p = min_p_key(min_p, lowest, highest, top, temperature, ACC, X)

    # Two lower bounds of the least key: `certain` holds always, `least` may be a guess that is checked below.
    certain = least_min_p
    least = certain
    if vocab_size > BLOCK:
        if top_k > 0:
            certain = lowest
            if top_k <= LANES:
                # At least top_k lanes have a logit this large. Bounds from min-p are not used here, because top-p
                # counts the mass of the whole top-k.
                certain = lowest_key_under(
                    lanes_max_ptr, LANES, lowest, highest, top_k.to(tl.float64), top, inv_temperature, False, ACC, BLOCK
                )
            least = certain
        elif top_p < 1:
            allowed = (1 - top_p) * total
            # Ids below this mass can all be cut: together they have less than the allowed mass, however many they are.
            mass = 0.999 * allowed / vocab_size
            value = tl.maximum(top + temperature * tl.log(mass), value_of_key(lowest, X).to(ACC).to(tl.float64))
            certain = tl.maximum(certain, key_of(value, X) - 2)
            guess = sampled_key(row_ptr, vocab_size, values_ptr, highest, allowed, top, inv_temperature, ACC, BLOCK)
            least = tl.maximum(certain, guess)
    found = -1
    searching = (vocab_size > BLOCK) & (least > lowest)
    while searching:
        found = collect_candidates(
            row_ptr,
            vocab_size,
            lanes_max_ptr,
            least,
            lanes_ptr,
            values_ptr,
            candidates_ptr,
            capacity,
            LANES,
            GROUP,
            BLOCK,
        )
        searching = False
        if found > capacity:
            found = -1
        elif least > certain:
            # The margin covers the difference between sums taken in different orders.
            mass = amount_above(values_ptr, found, least - 1, top, inv_temperature, True, ACC, BLOCK)
            if not (mass > (1 + 1e-5) * top_p * total):
                found = -1
                least = certain
                searching = True
    if found < 0:
        least = lowest

    num_values = vocab_size
    field_ptr = row_ptr
    if found >= 0:
        num_values = found
        field_ptr = values_ptr
    if top_k > 0:
        least = lowest_key_under(
            field_ptr, num_values, least, highest, top_k.to(tl.float64), top, inv_temperature, False, ACC, BLOCK
        )
        total = amount_above(field_ptr, num_values, least - 1, top, inv_temperature, True, ACC, BLOCK)
    least = tl.maximum(least, least_min_p)
    if top_p < 1:
        least = lowest_key_under(
            field_ptr, num_values, least, highest, top_p * total, top, inv_temperature, True, ACC, BLOCK
        )
    kept = amount_above(field_ptr, num_values, least - 1, top, inv_temperature, True, ACC, BLOCK)
    return least, kept, found


@triton.jit
def key_of(value, X: tl.constexpr):
    """Returns the order key of a number after rounding it to the dtype of the logits."""
    if X.primitive_bitwidth < 32:
        value = value.to(tl.float32)  # the interpreter cannot convert float64 to bfloat16 directly
    return order_keys(value.to(X))


@triton.jit
def between(low, high):
    """Returns the mean rounded down, without the overflow of low + high."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def amount_above(
    values_ptr, num_values, key, top, inv_temperature, BY_MASS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """Returns the number of values above a key, or, BY_MASS, their sum of exp((z - top) / T), as float64."""
    offs = tl.arange(0, BLOCK)
    # Every thread keeps its own amount, so threads synchronise only once, at the end.
    amounts = tl.zeros((BLOCK,), ACC if BY_MASS else tl.int32)
    for begin in range(0, num_values, BLOCK):
        z = tl.load(values_ptr + begin + offs, mask=begin + offs < num_values, other=float("-inf"))
        above = order_keys(z) > key
        if BY_MASS:
            masses = tl.exp((z.to(ACC) - top.to(ACC)) * inv_temperature.to(ACC))
            amounts += tl.where(above, masses, 0.0)
        else:
            amounts += above.to(tl.int32)
    return tl.sum(amounts.to(tl.float64))


@triton.jit
def lowest_key_under(
    values_ptr,
    num_values,
    low,
    high,
    target,
    top,
    inv_temperature,
    BY_MASS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Returns the lowest key in [low, high] above which the amount is less than ``target``; ``high`` if none is."""
    while low < high:
        middle = between(low, high)
        enough = amount_above(values_ptr, num_values, middle, top, inv_temperature, BY_MASS, ACC, BLOCK) < target
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return low


@triton.jit
def min_p_key(min_p, lowest, highest, top, temperature, ACC: tl.constexpr, X: tl.constexpr):
    """Returns the lowest key whose exp((z - top) / T), computed in float64, is at least ``min_p``."""
    low = lowest - 1
    high = highest
    # If the estimate is good, this leaves a few keys to search.
    estimate = key_of(tl.maximum(top + temperature * tl.log(min_p), value_of_key(lowest, X).to(ACC).to(tl.float64)), X)
    below = tl.maximum(estimate - 4, low)
    if not reaches(below, min_p, lowest, top, temperature, X):
        low = below
    above = tl.minimum(estimate + 4, high)
    if reaches(above, min_p, lowest, top, temperature, X):
        high = above
    while low + 1 < high:  # a difference of keys may not fit into 32 bits
        middle = between(low, high)
        if reaches(middle, min_p, lowest, top, temperature, X):
            high = middle
        else:
            low = middle
    return high


@triton.jit
def reaches(key, min_p, lowest, top, temperature, X: tl.constexpr):
    """Returns whether min-p keeps a logit with this key."""
    value = value_of_key(tl.maximum(key, lowest), X).to(tl.float64)
    return (key >= lowest) & (tl.exp(score_of(value, top, temperature)) >= min_p)


@triton.jit
def sampled_key(
    row_ptr,
    vocab_size,
    scratch_ptr,  # (BLOCK,)
    highest,
    allowed,
    top,
    inv_temperature,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Guesses, from a sample, the key below which a row of more than BLOCK ids has nearly the mass ``allowed``.

    A sample represents the tail of a row well, because no single id there is large; it does not represent the head.
    """
    offs = tl.arange(0, BLOCK)
    # The sample consists of runs of 16 neighbours, so that every sector of memory that is read is used fully.
    ids = (offs // 16) * (vocab_size // (BLOCK // 16)) + offs % 16
    z = tl.load(row_ptr + ids)
    tl.debug_barrier()  # other threads may still read the scratch of the previous row
    tl.store(scratch_ptr + offs, z)
    tl.debug_barrier()
    keys = order_keys(z)
    high = tl.minimum(tl.max(keys), highest)
    total = tl.sum(tl.exp((z.to(ACC) - top.to(ACC)) * inv_temperature.to(ACC))).to(tl.float64)
    target = total - 0.7 * allowed * BLOCK / vocab_size
    lowest = key_of(tl.full((), float("-inf"), tl.float32), z.dtype) + 1
    return lowest_key_under(scratch_ptr, BLOCK, lowest, high, target, top, inv_temperature, True, ACC, BLOCK)


@triton.jit
def collect_candidates(
    row_ptr,
    vocab_size,
    lanes_max_ptr,  # (LANES,)
    least_key,
    lanes_ptr,  # (LANES,) scratch
    values_ptr,  # (capacity,)
    candidates_ptr,  # (capacity,)
    capacity,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes value and id of every logit whose key is at least ``least_key``, in ascending order of ids.

    Only lanes whose largest logit reaches the key are read again. Returns the number of such logits. Stops when the
    scratch is full; the result is then larger than ``capacity``.
    """
    tl.debug_barrier()  # other threads may still read the scratch that is overwritten
    lanes = tl.arange(0, LANES)
    live = order_keys(tl.load(lanes_max_ptr + lanes)) >= least_key
    tl.store(lanes_ptr + tl.cumsum(live.to(tl.int32)) - 1, lanes, mask=live)
    num_live = tl.sum(live.to(tl.int32))
    tl.debug_barrier()
    offs = tl.arange(0, BLOCK)
    num_visited = tl.cdiv(vocab_size, LANES * GROUP) * num_live * GROUP
    found = 0
    begin = 0
    while (begin < num_visited) & (found <= capacity):
        place = (begin + offs) // GROUP
        lane = tl.load(lanes_ptr + place % num_live)
        ids = ((place // num_live) * LANES + lane) * GROUP + offs % GROUP
        mask = (begin + offs < num_visited) & (ids < vocab_size)
        z = tl.load(row_ptr + ids, mask=mask, other=float("-inf"))
        kept = mask & (order_keys(z) >= least_key)
        slots = found + tl.cumsum(kept.to(tl.int32)) - 1
        tl.store(values_ptr + slots, z, mask=kept & (slots < capacity))
        tl.store(candidates_ptr + slots, ids, mask=kept & (slots < capacity))
        found += tl.sum(kept.to(tl.int32))
        begin += BLOCK
    tl.debug_barrier()
    return found
