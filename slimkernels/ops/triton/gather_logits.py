"""The Triton kernel of ``gather_logits``: a launch per temperature, whose programs take several rows each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.ops.triton import launch
from slimkernels.ops.triton._math import log_add_exp, widen
from slimkernels.ops.triton._row_sums import copy_target_logit, exp_at, log_sum_exp, resident_programs
from slimkernels.ops.triton._teacher import kept_entries


@triton.jit
def gather_logits_kernel(
    logits_ptr,  # (N, V), rows row_stride apart
    ids_ptr,  # (N, K)
    target_ptr,  # (N,) or None
    values_ptr,  # (N, K), or None: they are written already
    lse_ptr,  # (N, M)
    rest_lse_ptr,  # (N, M)
    target_logit_ptr,  # (N,) or None
    marks_ptr,  # (programs, BLOCK) int8 scratch, all 0
    num_rows,
    num_programs,
    row_stride,
    vocab_size,
    top_k,
    num_temperatures,
    column,
    inv_temperature: tl.float64,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gathers the logits at the ids, and sums them and the others apart; a program takes every num_programs-th row."""
    offs = tl.arange(0, BLOCK)
    marks_ptr += tl.program_id(0).to(tl.int64) * BLOCK
    for row in range(tl.program_id(0), num_rows, num_programs):
        far_row = tl.zeros((), tl.int64) + row
        row_ptr = logits_ptr + far_row * row_stride
        row_ids_ptr = ids_ptr + far_row * top_k
        # Raising would need a synchronisation, so bad rows become NaN.
        kept = kept_entries(row_ids_ptr, top_k, vocab_size, BLOCK)
        broken = kept < 0
        copy_target_logit(row_ptr, target_ptr, target_logit_ptr, row, vocab_size, ACC)

        on_level, on_total, on_nan = empty_sum(ACC)
        for begin in range(0, top_k, BLOCK):
            k = begin + offs
            ids = tl.load(row_ids_ptr + k, mask=k < kept, other=0)
            x = tl.load(row_ptr + ids, mask=k < kept, other=float("-inf"))
            if values_ptr is not None:
                padding = tl.where(broken, float("nan"), 0.0)
                shown = tl.where(k < kept, x, padding.to(x.dtype))
                tl.store(values_ptr + far_row * top_k + k, shown, mask=k < top_k)
            on_level, on_total, on_nan = add_block(on_level, on_total, on_nan, widen(x, ACC), inv_temperature, ACC)

        level, total, nan = empty_sum(ACC)
        first = 0
        for begin in range(0, vocab_size, BLOCK):
            # The next ids ascend, so those in this block come first. They are marked, and their marks removed again.
            place = tl.load(row_ids_ptr + first + offs, mask=first + offs < kept, other=0x7FFFFFFF) - begin
            is_here = place < BLOCK
            tl.store(marks_ptr + place, 1, mask=is_here)
            tl.debug_barrier()  # threads read marks that others stored
            is_kept = tl.load(marks_ptr + offs) != 0
            v = begin + offs
            x = widen(tl.load(row_ptr + v, mask=v < vocab_size, other=float("-inf")), ACC)
            x = tl.where(is_kept, float("-inf"), x)
            level, total, nan = add_block(level, total, nan, x, inv_temperature, ACC)
            tl.debug_barrier()  # threads still read the marks that others remove
            tl.store(marks_ptr + place, 0, mask=is_here)
            tl.debug_barrier()  # the marks of the next block may be at the same places
            first += tl.sum(is_here.to(tl.int32))

        on = log_of_sum(on_level, on_total, on_nan, inv_temperature)
        rest = log_of_sum(level, total, nan, inv_temperature)
        lse = tl.where((on != on) | (rest != rest), float("nan"), log_add_exp(on, rest))
        out = far_row * num_temperatures + column
        tl.store(lse_ptr + out, tl.where(broken, float("nan"), lse))
        tl.store(rest_lse_ptr + out, tl.where(broken, float("nan"), rest))


@triton.jit
def empty_sum(ACC: tl.constexpr):
    """Returns the level, the sum of exponentials and the number of NaN of nothing."""
    return tl.full((), float("-inf"), ACC), tl.full((), 0.0, tl.float64), tl.full((), 0, tl.int32)


@triton.jit
def add_block(level, total, nan, x, inv_temperature, ACC: tl.constexpr):
    """Adds a block to a sum of exp((x - level) / T); the level becomes the largest element so far."""
    nan += tl.sum((x != x).to(tl.int32))
    higher = tl.maximum(level, tl.max(tl.where(x == x, x, float("-inf"))))
    # Relative to 0 where nothing is finite, so that inf - inf never occurs.
    shift = tl.where(tl.abs(higher) < float("inf"), higher, 0.0)
    old = tl.where(tl.abs(level) < float("inf"), level, shift)
    total = total * exp_at(old - shift, inv_temperature, ACC).to(tl.float64)
    return higher, total + tl.sum(exp_at(x - shift, inv_temperature, ACC)).to(tl.float64), nan


@triton.jit
def log_of_sum(level, total, nan, inv_temperature):
    """Returns the log of a sum: its level if that is not finite, NaN if it has a NaN."""
    return tl.where(nan > 0, float("nan"), log_sum_exp(level, total, inv_temperature))


def gather_logits_rows(
    logits: Tensor,
    ids: Tensor,
    target: Tensor | None,
    temperatures: list[float],
    values: Tensor,
    lse: Tensor,
    rest_lse: Tensor,
    target_logit: Tensor | None,
) -> int:
    """Launches the kernel. Returns 0 (no fault) always, because reading faults back would need a sync."""
    num_rows, vocab_size = logits.shape
    settings = launch.settings_of("gather_logits", logits)
    block = launch.block_of(settings, vocab_size)
    num_programs = min(num_rows, resident_programs(logits.device, settings.num_warps))
    marks = logits.new_zeros(num_programs, block, dtype=torch.int8)
    for column, temperature in enumerate(temperatures):
        is_first = column == 0
        launch.run(
            gather_logits_kernel,
            num_programs,
            settings,
            logits,
            logits,
            ids,
            target if is_first else None,
            values if is_first else None,
            lse,
            rest_lse,
            target_logit if is_first else None,
            marks,
            num_rows,
            num_programs,
            logits.stride(0),
            vocab_size,
            ids.shape[1],
            len(temperatures),
            column,
            1 / temperature,
            ACC=launch.accumulation_dtype(logits.dtype),
            BLOCK=block,
        )
    return 0
