"""The Triton kernel of ``softmax_gradient_rows``: one program per row, read once and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slimkernels.ops.triton import launch
from slimkernels.ops.triton._math import double
from slimkernels.ops.triton._slim_passes import fill_row
from slimkernels.ops.triton._slim_terms import LOG2_E, powers, unit_logits


@triton.jit
def softmax_gradient_kernel(
    logits_ptr,  # (N, V)
    gradient_ptr,  # (N, V), or logits_ptr itself
    numbers_ptr,  # (5, N): factor, level, factor_one, level_one, constant
    logits_stride,
    gradient_stride,
    num_rows,
    vocab_size,
    temperature: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    TWO_TEMPERATURES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row; y is z / unit as in slim_loss, and so are the levels."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    gradient_ptr += row * gradient_stride
    numbers_ptr += row
    step = tl.full((), num_rows, tl.int64)
    factor = tl.load(numbers_ptr).to(tl.float64)
    level = tl.load(numbers_ptr + step).to(tl.float64)
    factor_one = tl.load(numbers_ptr + 2 * step).to(tl.float64)
    level_one = tl.load(numbers_ptr + 3 * step).to(tl.float64)
    constant = tl.load(numbers_ptr + 4 * step).to(tl.float64)
    if (factor == 0) & (factor_one == 0) & (constant == 0):
        # Whatever the row holds does not count.
        fill_row(gradient_ptr, vocab_size, tl.full((), 0.0, tl.float64), BLOCK_V)
    else:
        unit = double(logit_scale)
        inner = tl.full((), 1.0, ACC)
        if SOFTCAP:
            unit = double(softcap)
            inner = (double(logit_scale) / unit).to(ACC)
        scale = double(logit_scale)
        exponent = (unit / double(temperature) * LOG2_E).to(ACC)
        exponent_one = (unit * LOG2_E).to(ACC)
        # What the rounding of a level changes goes into its factor.
        level_y = (level / unit).to(ACC)
        level_one_y = (level_one / unit).to(ACC)
        factor_y = (factor * scale * tl.exp((level_y.to(tl.float64) * unit - level) / double(temperature))).to(ACC)
        factor_one_y = (factor_one * scale * tl.exp(level_one_y.to(tl.float64) * unit - level_one)).to(ACC)
        constant_y = (constant * scale).to(ACC)
        for begin in tl.range(0, vocab_size, BLOCK_V, num_stages=4):
            v = begin + tl.arange(0, BLOCK_V)
            y = unit_logits(logits_ptr, v, v < vocab_size, inner, SOFTCAP, ACC, "evict_first")
            dy = powers(y, level_y, exponent) * factor_y + constant_y
            if TWO_TEMPERATURES:
                dy += powers(y, level_one_y, exponent_one) * factor_one_y
            if SOFTCAP:
                dy *= 1 - y * y
            tl.store(gradient_ptr + v, dy, mask=v < vocab_size, eviction_policy="evict_first")


def softmax_gradient_rows(
    logits: Tensor, gradient: Tensor, numbers: Tensor, temperature: float, softcap: float, logit_scale: float
) -> None:
    """Launches the kernel, with the settings of slim_loss, whose last pass it is."""
    num_rows, vocab_size = logits.shape
    settings = launch.settings_of("slim_loss", logits)
    launch.run(
        softmax_gradient_kernel,
        num_rows,
        settings,
        logits,
        logits,
        gradient,
        numbers,
        logits.stride(0),
        gradient.stride(0),
        num_rows,
        vocab_size,
        temperature,
        softcap,
        logit_scale,
        TWO_TEMPERATURES=temperature != 1,
        SOFTCAP=softcap > 0,
        ACC=launch.accumulation_dtype(logits.dtype),
        BLOCK_V=launch.block_of(settings, vocab_size),
    )
