"""Pieces of the Triton kernels that sum the exponentials of a row: the launch, the label, the last steps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from slimkernels.ops.triton._math import double, widen

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def copy_target_logit(row_ptr, target_ptr, target_logit_ptr, row, vocab_size, ACC: tl.constexpr):
    """Copies the logit of a row's label, NaN for a label outside the vocabulary."""
    if target_ptr is not None:
        target = tl.load(target_ptr + row)
        inside = (target >= 0) & (target < vocab_size)
        x = widen(tl.load(row_ptr + target, mask=inside, other=0.0), ACC)
        tl.store(target_logit_ptr + row, tl.where(inside, x, float("nan")))


@triton.jit
def log_sum_exp(level, total, inv_temperature):
    """Returns the log-sum-exp of a row whose largest entry is ``level``: the level itself if it is not finite."""
    wide = level.to(tl.float64)
    finite = tl.abs(wide) < float("inf")
    return tl.where(finite, wide * double(inv_temperature) + tl.log(tl.where(finite, total, 1.0)), wide)


@triton.jit
def exp_at(x, inv_temperature, ACC: tl.constexpr):
    """Computes exp(x / T) with one multiplication."""
    return tl.exp2(x * (double(inv_temperature) * _LOG2E).to(ACC))


def resident_programs(device: torch.device, num_warps: int) -> int:
    """Returns the number of programs that the device runs at a time with 64 registers per thread."""
    if device.type != "cuda":
        return 2  # in the interpreter, so that a program takes several rows
    return torch.cuda.get_device_properties(device).multi_processor_count * max(32 // num_warps, 1)
