"""The Triton kernels of ``sample_logits`` and ``sample_distinct``, which read a row once and a small part of it again.

``row_softmax_kernel`` sums the row and writes the largest logit of each of some hundred lanes. These give a lower bound
of what a truncation can keep, so ``sample_logits_kernel`` finds the threshold and runs the race among few candidates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels import _checks
from slimkernels.ops.triton import launch
from slimkernels.ops.triton._math import double, order_keys
from slimkernels.ops.triton._race import (
    NO_ID,
    clear_leaders,
    finite_top,
    is_ahead,
    race_of_candidates,
    race_of_row,
    score_of,
    seed_of_row,
)
from slimkernels.ops.triton._row_softmax import (
    ENTROPY,
    FIELDS_OF_ROW,
    LOG_SUM,
    LOG_TEMPERED,
    TOP,
    lanes_of,
    logprob_of,
    option_of,
    row_softmax,
)
from slimkernels.ops.triton._truncation import key_of, truncate

LOWEST_TEMPERATURE = tl.constexpr(_checks.LOWEST_TEMPERATURE)
HIGHEST_TEMPERATURE = tl.constexpr(_checks.HIGHEST_TEMPERATURE)

# Programs per multiprocessor if programs need scratch. Each reuses its scratch for all of its rows.
_PROGRAMS_OF_PROCESSOR = 4


@triton.jit(do_not_specialize=["num_distinct", "seed", "position", "top_k"])
def sample_logits_kernel(
    logits_ptr,  # (N, V), rows `row_stride` apart
    row_stride: tl.int64,
    softmax_ptr,  # (N, FIELDS)
    lanes_max_ptr,  # (N, LANES), or None if nothing is truncated
    num_rows,
    vocab_size,
    num_distinct,
    seed: tl.int64,
    seeds_ptr,  # (N,) or () int64, or None
    position: tl.int64,
    positions_ptr,  # (N,) int64 or None, like the other tensors of options
    temperature: tl.float64,
    temperatures_ptr,
    top_k: tl.int64,
    top_ks_ptr,
    top_p: tl.float64,
    top_ps_ptr,
    min_p: tl.float64,
    min_ps_ptr,
    values_ptr,  # (programs, capacity) candidates in the dtype of the logits; None if nothing is truncated
    candidates_ptr,  # (programs, capacity) int32, their ids
    lanes_ptr,  # (programs, LANES) int32
    capacity,
    scores_ptr,  # (programs, room) float64 scores of the leaders; None for a single draw
    ids_ptr,  # (programs, room) int32
    room,
    token_ptr,  # (N, num_distinct) int64
    logprob_ptr,  # (N, num_distinct)
    truncated_logprob_ptr,  # (N, num_distinct)
    entropy_ptr,  # (N,)
    SEED_PER_ROW: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROOM: tl.constexpr,
):
    """Samples the rows; each program takes every `num_programs`-th row."""
    program = tl.program_id(0).to(tl.int64)
    if values_ptr is not None:
        values_ptr += program * capacity
        candidates_ptr += program * capacity
        lanes_ptr += program * LANES
    if scores_ptr is not None:
        scores_ptr += program * room
        ids_ptr += program * room
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.full((), 0, tl.int64) + row  # row offsets need 64-bit products
        sample_row(
            logits_ptr + row * row_stride,
            softmax_ptr + row * FIELDS_OF_ROW,
            lanes_max_ptr,
            row,
            vocab_size,
            num_distinct,
            seed_of_row(row, seed, seeds_ptr, SEED_PER_ROW),
            option_of(row, position, positions_ptr),
            option_of(row, double(temperature), temperatures_ptr),
            option_of(row, top_k, top_ks_ptr),
            option_of(row, double(top_p), top_ps_ptr),
            option_of(row, double(min_p), min_ps_ptr),
            values_ptr,
            candidates_ptr,
            lanes_ptr,
            capacity,
            scores_ptr,
            ids_ptr,
            room,
            token_ptr + row * num_distinct,
            logprob_ptr + row * num_distinct,
            truncated_logprob_ptr + row * num_distinct,
            entropy_ptr + row,
            ACC,
            LANES,
            GROUP,
            BLOCK,
            BLOCK_ROOM,
        )


@triton.jit
def sample_row(
    row_ptr,
    softmax_ptr,
    lanes_max_ptr,
    row,
    vocab_size,
    num_distinct,
    seed,
    position,
    temperature,
    top_k,
    top_p,
    min_p,
    values_ptr,
    candidates_ptr,
    lanes_ptr,
    capacity,
    scores_ptr,
    ids_ptr,
    room,
    token_ptr,
    logprob_ptr,
    truncated_logprob_ptr,
    entropy_ptr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROOM: tl.constexpr,
):
    """Truncates one row, draws from it, and writes the draws."""
    X: tl.constexpr = row_ptr.dtype.element_ty
    given_top = tl.load(softmax_ptr + TOP)
    log_kept = tl.load(softmax_ptr + LOG_TEMPERED)
    greedy = temperature == 0  # the argmax; the other options have no effect
    divides = (temperature >= LOWEST_TEMPERATURE) & (temperature <= HIGHEST_TEMPERATURE)
    sound = (greedy | divides) & is_share(top_p) & is_share(min_p) & (top_k >= 0)
    exists = sound & (given_top == given_top)
    one_valued = greedy | (given_top == float("inf")) | ~exists
    temperature = tl.where(one_valued, 1.0, temperature)
    top = finite_top(given_top, ACC)
    # Eligible are only logits equal to the largest (argmax, or +inf), else every logit above -inf.
    least_key = tl.where(one_valued, key_of(given_top, X), key_of(tl.full((), float("-inf"), tl.float32), X) + 1)
    log_kept = tl.where(greedy, 0.0, log_kept)
    found = -1  # number of candidates; -1 if they are the whole row
    if values_ptr is not None:  # noqa: SIM102 -- a compile-time condition, unlike the next
        if ~one_valued:
            least_key, kept, found = truncate(
                row_ptr,
                vocab_size,
                lanes_max_ptr + row * LANES,
                top,
                tl.exp(log_kept),
                temperature,
                tl.where(top_k >= vocab_size, 0, top_k),
                top_p,
                min_p,
                values_ptr,
                candidates_ptr,
                lanes_ptr,
                capacity,
                ACC,
                LANES,
                GROUP,
                BLOCK,
            )
            log_kept = tl.log(kept)

    leader = draw_ids(
        row_ptr,
        vocab_size,
        least_key,
        exists,
        greedy,
        top,
        temperature,
        seed,
        position,
        values_ptr,
        candidates_ptr,
        found,
        scores_ptr,
        ids_ptr,
        room,
        ACC,
        BLOCK,
        BLOCK_ROOM,
    )
    write_draws(
        row_ptr,
        softmax_ptr,
        num_distinct,
        exists,
        leader,
        top,
        temperature,
        log_kept,
        scores_ptr,
        ids_ptr,
        room,
        token_ptr,
        logprob_ptr,
        truncated_logprob_ptr,
        entropy_ptr,
        BLOCK_ROOM,
    )


@triton.jit
def draw_ids(
    row_ptr,
    vocab_size,
    least_key,
    exists,
    greedy,
    top,
    temperature,
    seed,
    position,
    values_ptr,
    candidates_ptr,
    found,
    scores_ptr,
    ids_ptr,
    room,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROOM: tl.constexpr,
):
    """Runs the race among the eligible ids; returns the drawn id, the last of them if there are several, or NO_ID."""
    if scores_ptr is not None:
        clear_leaders(scores_ptr, ids_ptr, room, BLOCK_ROOM)
    leader = tl.full((), NO_ID, tl.int32)
    if exists:
        if greedy:
            leader = first_reaching(row_ptr, vocab_size, least_key, BLOCK)
            if scores_ptr is not None:
                tl.store(scores_ptr, tl.full((), 0.0, tl.float64))
                tl.store(ids_ptr, leader)
        else:
            among_candidates = False
            if values_ptr is not None:
                among_candidates = found >= 0
                if among_candidates:
                    leader = race_of_candidates(
                        row_ptr,
                        values_ptr,
                        candidates_ptr,
                        found,
                        least_key,
                        top,
                        temperature,
                        seed,
                        position,
                        scores_ptr,
                        ids_ptr,
                        room,
                        ACC,
                        BLOCK,
                        BLOCK_ROOM,
                    )
            if not among_candidates:
                leader = race_of_row(
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
                    ACC,
                    BLOCK,
                    BLOCK_ROOM,
                )
    return leader


@triton.jit
def write_draws(
    row_ptr,
    softmax_ptr,
    num_distinct,
    exists,
    leader,
    top,
    temperature,
    log_kept,
    scores_ptr,
    ids_ptr,
    room,
    token_ptr,
    logprob_ptr,
    truncated_logprob_ptr,
    entropy_ptr,
    BLOCK_ROOM: tl.constexpr,
):
    """Writes the drawn ids in the order of their scores, with their log-probabilities, and the row's entropy."""
    given_top = tl.load(softmax_ptr + TOP)
    log_sum = tl.load(softmax_ptr + LOG_SUM)
    absent = tl.where(exists, float("-inf"), float("nan"))
    tl.store(entropy_ptr, tl.where(exists, tl.load(softmax_ptr + ENTROPY), float("nan")))
    if scores_ptr is None:
        z = tl.load(row_ptr + leader, mask=leader != NO_ID, other=0.0).to(tl.float64)
        truncated_logprob = score_of(z, top, temperature) - log_kept
        drawn = leader != NO_ID
        tl.store(token_ptr, tl.where(drawn, leader, -1).to(tl.int64))
        tl.store(logprob_ptr, tl.where(drawn, logprob_of(z, given_top, log_sum), absent))
        tl.store(truncated_logprob_ptr, tl.where(drawn, truncated_logprob, absent))
    else:
        tl.debug_barrier()  # threads read leaders that others stored
        offs = tl.arange(0, BLOCK_ROOM)
        for begin in range(0, num_distinct, BLOCK_ROOM):
            slots = begin + offs
            scores = tl.load(scores_ptr + slots, mask=slots < room, other=float("-inf"))
            ids = tl.load(ids_ptr + slots, mask=slots < room, other=NO_ID)
            drawn = ids != NO_ID
            # Vacant places come last, in any order, because they are identical.
            rank = tl.where(drawn, 0, slots)
            for other in range(0, room):
                other_score = tl.load(scores_ptr + other)
                other_id = tl.load(ids_ptr + other)
                rank += (drawn & is_ahead(other_score, other_id, scores, ids)).to(tl.int32)
            z = tl.load(row_ptr + ids, mask=drawn, other=0.0).to(tl.float64)
            truncated_logprob = score_of(z, top, temperature) - log_kept
            mask = slots < num_distinct
            tl.store(token_ptr + rank, tl.where(drawn, ids, -1).to(tl.int64), mask=mask)
            tl.store(logprob_ptr + rank, tl.where(drawn, logprob_of(z, given_top, log_sum), absent), mask=mask)
            tl.store(truncated_logprob_ptr + rank, tl.where(drawn, truncated_logprob, absent), mask=mask)
        tl.debug_barrier()  # the next row overwrites the leaders


@triton.jit
def is_share(value):
    """Returns whether a value is in [0, 1]; False for NaN."""
    return (value >= 0) & (value <= 1)


@triton.jit
def first_reaching(row_ptr, vocab_size, least_key, BLOCK: tl.constexpr):
    """Returns the lowest id whose key is at least ``least_key``."""
    offs = tl.arange(0, BLOCK)
    first = tl.full((BLOCK,), NO_ID, tl.int32)
    for begin in range(0, vocab_size, BLOCK):
        z = tl.load(row_ptr + begin + offs, mask=begin + offs < vocab_size, other=float("-inf"))
        first = tl.minimum(first, tl.where(order_keys(z) >= least_key, begin + offs, NO_ID))
    return tl.min(first)


def sample_logits_rows(
    logits: Tensor,
    m: int,
    seed: int,
    seeds: Tensor | None,
    position: int,
    positions: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    top_k: int,
    top_ks: Tensor | None,
    top_p: float,
    top_ps: Tensor | None,
    min_p: float,
    min_ps: Tensor | None,
    token: Tensor,
    logprob: Tensor,
    truncated_logprob: Tensor,
    entropy: Tensor,
) -> int:
    """Launches the kernels. Returns 0 (no fault) always, because reading faults back would need a sync."""
    num_rows, vocab_size = logits.shape
    settings = launch.settings_of("sample_logits", logits)
    block = launch.block_of(settings, vocab_size)
    lanes, group = lanes_of(logits)
    room = min(m, vocab_size)
    top_k_truncates = top_ks is not None or 0 < top_k < vocab_size
    truncates = top_k_truncates or top_ps is not None or top_p < 1 or min_ps is not None or min_p > 0
    truncates = truncates and not (temperatures is None and temperature == 0)
    softmax, lanes_max = row_softmax(
        logits,
        temperature,
        temperatures,
        # With top-k the sum over the kept ids is used in place of the sum over the row.
        tempered=temperatures is not None
        or (temperature not in (0, 1) and (top_ks is not None or not top_k_truncates)),
        with_lanes=truncates,
    )

    num_programs = num_rows
    if truncates or m > 1:
        num_programs = min(num_rows, _PROGRAMS_OF_PROCESSOR * launch.num_processors(logits.device))

    def scratch(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_programs, columns, dtype=dtype, device=logits.device)

    values = candidates = live_lanes = scores = ids = None
    capacity = 0 if vocab_size <= block else max(vocab_size // 8, lanes, block)
    if truncates:
        values, candidates = scratch(capacity, logits.dtype), scratch(capacity, torch.int32)
        live_lanes = scratch(lanes, torch.int32)
    if m > 1:
        scores, ids = scratch(room, torch.float64), scratch(room, torch.int32)
    launch.run(
        sample_logits_kernel,
        num_programs,
        settings,
        logits,
        logits,
        logits.stride(0),
        softmax,
        lanes_max,
        num_rows,
        vocab_size,
        m,
        seed,
        seeds,
        position,
        positions,
        temperature,
        temperatures,
        top_k,
        top_ks,
        top_p,
        top_ps,
        min_p,
        min_ps,
        values,
        candidates,
        live_lanes,
        capacity,
        scores,
        ids,
        room,
        token,
        logprob,
        truncated_logprob,
        entropy,
        SEED_PER_ROW=seeds is not None and seeds.ndim > 0,
        ACC=launch.accumulation_dtype(logits.dtype),
        LANES=lanes,
        GROUP=group,
        BLOCK=block,
        BLOCK_ROOM=min(block, triton.next_power_of_2(m)),
    )
    return 0
