"""The Gumbel race for Triton: finds the ids of a row with the largest score plus counter-based Gumbel noise.

The method is that of ``csrc/cpu/gumbel.h``. An upper bound of score plus noise takes a few instructions. The few ids
whose bound reaches the score of the last leader are evaluated in float64 with the scalar formula of the reference, so
the outcome is the same as on a CPU.

An id is eligible if the order key of its logit z is at least ``least_key``. Its score is (z - top) / T, where ``top``
is the largest finite logit. Leaders are the best ids so far.
"""

from __future__ import annotations

import triton
import triton.language as tl

from slimkernels.ops.triton._math import order_keys

# Marks a vacant place. It is larger than every id, so it loses every tie.
NO_ID = tl.constexpr(0x7FFFFFFF)
LARGEST_NOISE = tl.constexpr(22.9)  # noise of bits = 0, rounded up
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def random_words(c0, c1, seed, position):
    """Computes the four words of Philox-4x32-10 for each counter (c0, c1, position), as in reference_sampling.py."""
    c0 = c0.to(tl.uint32)
    zero = c0 * 0
    seed = seed.to(tl.uint64)
    position = position.to(tl.uint64)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32) + zero
    k1 = (seed >> 32).to(tl.uint32) + zero
    c2 = (position & 0xFFFFFFFF).to(tl.uint32) + zero
    c3 = (position >> 32).to(tl.uint32) + zero
    return tl.philox_impl(c0, c1.to(tl.uint32) + zero, c2, c3, k0, k1)


@triton.jit
def seed_of_row(row, seed, seeds_ptr, PER_ROW: tl.constexpr):
    """Returns the seed of a row: its own, or the one drawn for it from the seed of the call, as in the reference.

    The seed of the call is ``seed``, or a tensor () at ``seeds_ptr``.
    """
    if PER_ROW:
        seed = tl.load(seeds_ptr + row)
    else:
        if seeds_ptr is not None:
            seed = tl.load(seeds_ptr)
        w0, w1, _, _ = random_words(row, tl.full((), 0xFFFFFFFF, tl.uint32), seed, row * 0)
        drawn = w0.to(tl.uint64) | (w1.to(tl.uint64) << 32)
        seed = tl.where(row == 0, seed, drawn.to(tl.int64))
    return seed


@triton.jit
def noise_words(groups, seed, position):
    """Computes the random bits of four neighbouring ids for each group (id // 4)."""
    return random_words(groups, tl.full((), 0, tl.uint32), seed, position)


@triton.jit
def random_bits(ids, seed, position):
    """Computes the random bits of arbitrary ids, with one Philox call per id."""
    w0, w1, w2, w3 = noise_words(ids // 4, seed, position)
    return tl.where(ids % 4 < 2, tl.where(ids % 4 == 0, w0, w1), tl.where(ids % 4 == 2, w2, w3))


@triton.jit
def noise_bound(bits):
    """Returns an upper bound, within rounding, of ``gumbel(bits)``: -log(1 - u) >= u + u^2 / 2, with u rounded down."""
    # The upper 23 bits become the fraction of a float in [1, 2); a conversion would cost four times as much.
    u = ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    return -tl.log(u + 0.5 * u * u)


@triton.jit
def gumbel(bits):
    """Computes the Gumbel variate of random bits. In float64 1 - u is exact, so log(1 - u) is as accurate as log1p."""
    u = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return -tl.log(-tl.log(1.0 - u))


@triton.jit
def finite_top(top, ACC: tl.constexpr):
    """Returns the top, or the largest finite number if it is +inf, so that differences to it are never NaN."""
    return tl.minimum(top, 1.7976931348623157e308 if ACC.primitive_bitwidth == 64 else LARGEST_FLOAT)


@triton.jit
def score_of(z, top, temperature):
    """Computes the score (z - top) / T; 0 if z >= top, which includes z = +inf, whose top is finite."""
    return tl.where(z < top, z - top, 0.0) / temperature


@triton.jit
def clamped_inverse(temperature):
    """Returns 1 / T, limited so that float32 can hold it and multiply it with any difference."""
    return tl.minimum(tl.maximum(1.0 / temperature, 1e-30), 1e30)


@triton.jit
def eligible_scores(z, least_key, top, inv_temperature, ACC: tl.constexpr):
    """Computes float32 scores for use in bounds: -inf for ids that are not eligible, finite for all others."""
    wide = z.to(ACC)
    score = tl.where(wide < top.to(ACC), (wide - top.to(ACC)) * inv_temperature.to(ACC), 0.0)
    score = tl.maximum(score, -LARGEST_FLOAT).to(tl.float32)
    return tl.where(order_keys(z) >= least_key, score, float("-inf"))


@triton.jit
def is_ahead(score, token, other_score, other_token):
    """Returns whether one perturbed score beats another; ties go to the lower id."""
    return (score > other_score) | ((score == other_score) & (token < other_token))


@triton.jit
def reach_of(score):
    """Returns the value that a bound must reach to be evaluated: finite, and below ``score`` by more than rounding."""
    reach = score - 1e-4 - 1e-6 * tl.abs(score)
    return tl.maximum(reach, -LARGEST_FLOAT).to(tl.float32)


@triton.jit
def enter_contenders(
    bounds,  # float32 tile, -inf for ids that are not eligible
    ids,  # the same shape
    row_ptr,
    seed,
    position,
    top,
    temperature,
    last_score,
    last_id,
    last_slot,
    scores_ptr,  # (room,) float64, or None if there is a single leader
    ids_ptr,  # (room,) int32, or None
    room,
    BLOCK_ROOM: tl.constexpr,
):
    """Evaluates every id of a tile whose bound reaches the last leader in float64, and enters it if it is ahead.

    Returns the score and id of the last leader afterwards, and its slot in the list of leaders.
    """
    best = tl.max(bounds)
    while best >= reach_of(last_score):
        token = tl.min(tl.where(bounds == best, ids, NO_ID))
        z = tl.load(row_ptr + token).to(tl.float64)
        score = score_of(z, top, temperature) + gumbel(random_bits(token, seed, position))
        if is_ahead(score, token, last_score, last_id):
            if scores_ptr is None:
                last_score = score
                last_id = token
            else:
                tl.debug_barrier()  # no reduction orders these stores after the last reads where one warp has the tile
                tl.store(scores_ptr + last_slot, score)
                tl.store(ids_ptr + last_slot, token)
                tl.debug_barrier()  # all threads read the leaders below
                last_score, last_id, last_slot = last_leader(scores_ptr, ids_ptr, room, BLOCK_ROOM)
        bounds = tl.where(ids == token, float("-inf"), bounds)
        best = tl.max(bounds)
    return last_score, last_id, last_slot


@triton.jit
def last_leader(scores_ptr, ids_ptr, room, BLOCK_ROOM: tl.constexpr):
    """Finds the leader that is behind all others; a vacant place is behind every leader."""
    offs = tl.arange(0, BLOCK_ROOM)
    last_score = tl.full((), float("inf"), tl.float64)
    last_id = tl.full((), -1, tl.int32)
    last_slot = tl.full((), 0, tl.int32)
    for begin in range(0, room, BLOCK_ROOM):
        slots = begin + offs
        scores = tl.load(scores_ptr + slots, mask=slots < room, other=float("inf"))
        ids = tl.load(ids_ptr + slots, mask=slots < room, other=-1)
        score = tl.min(scores)
        token = tl.max(tl.where(scores == score, ids, -1))
        slot = tl.min(tl.where((scores == score) & (ids == token), slots, NO_ID))
        behind = is_ahead(last_score, last_id, score, token)
        last_score = tl.where(behind, score, last_score)
        last_id = tl.where(behind, token, last_id)
        last_slot = tl.where(behind, slot, last_slot)
    return last_score, last_id, last_slot


@triton.jit
def clear_leaders(scores_ptr, ids_ptr, room, BLOCK_ROOM: tl.constexpr):
    """Makes every place vacant."""
    offs = tl.arange(0, BLOCK_ROOM)
    for begin in range(0, room, BLOCK_ROOM):
        slots = begin + offs
        tl.store(scores_ptr + slots, float("-inf"), mask=slots < room)
        tl.store(ids_ptr + slots, tl.full((BLOCK_ROOM,), NO_ID, tl.int32), mask=slots < room)
    tl.debug_barrier()


@triton.jit
def race_of_row(
    row_ptr,
    vocab_size,
    least_key,
    top,
    temperature,
    seed,
    position,
    scores_ptr,
    ids_ptr,
    room,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROOM: tl.constexpr,
):
    """Runs the race among the eligible ids of a row; returns the last leader's id."""
    inv_temperature = clamped_inverse(temperature)
    last_score = tl.full((), float("-inf"), tl.float64)
    last_id = tl.full((), NO_ID, tl.int32)
    last_slot = tl.full((), 0, tl.int32)
    groups = tl.arange(0, BLOCK // 4)
    offs = groups[:, None] * 4 + tl.arange(0, 4)[None, :]
    for begin in range(0, vocab_size, BLOCK):
        ids = begin + offs
        z = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
        scores = eligible_scores(z, least_key, top, inv_temperature, ACC)
        # Noise is the most expensive part, so skip tiles that cannot reach the leaders with any noise.
        if tl.max(scores) + LARGEST_NOISE >= reach_of(last_score):
            # One Philox call serves four neighbouring ids, whose words stay in the thread that computed them.
            w0, w1, w2, w3 = noise_words(begin // 4 + groups, seed, position)
            bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK // 4, 4))
            bounds = tl.where(scores == float("-inf"), scores, scores + noise_bound(bits))
            last_score, last_id, last_slot = enter_contenders(
                bounds,
                ids,
                row_ptr,
                seed,
                position,
                top,
                temperature,
                last_score,
                last_id,
                last_slot,
                scores_ptr,
                ids_ptr,
                room,
                BLOCK_ROOM,
            )
    return last_id


@triton.jit
def race_of_candidates(
    row_ptr,
    values_ptr,  # (num_candidates,)
    candidates_ptr,  # (num_candidates,) ids of the values, ascending
    num_candidates,
    least_key,
    top,
    temperature,
    seed,
    position,
    scores_ptr,
    ids_ptr,
    room,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROOM: tl.constexpr,
):
    """Runs the race among candidates that include every eligible id; returns the last leader's id."""
    inv_temperature = clamped_inverse(temperature)
    last_score = tl.full((), float("-inf"), tl.float64)
    last_id = tl.full((), NO_ID, tl.int32)
    last_slot = tl.full((), 0, tl.int32)
    offs = tl.arange(0, BLOCK)
    for begin in range(0, num_candidates, BLOCK):
        mask = begin + offs < num_candidates
        z = tl.load(values_ptr + begin + offs, mask=mask, other=float("-inf"))
        ids = tl.load(candidates_ptr + begin + offs, mask=mask, other=0)
        scores = eligible_scores(z, least_key, top, inv_temperature, ACC)
        bounds = tl.where(scores == float("-inf"), scores, scores + noise_bound(random_bits(ids, seed, position)))
        last_score, last_id, last_slot = enter_contenders(
            bounds,
            tl.where(mask, ids, NO_ID),
            row_ptr,
            seed,
            position,
            top,
            temperature,
            last_score,
            last_id,
            last_slot,
            scores_ptr,
            ids_ptr,
            room,
            BLOCK_ROOM,
        )
    return last_id
