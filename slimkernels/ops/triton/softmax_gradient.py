"""The Triton kernel of ``softmax_gradient_rows``: one program per row, read once and written once."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from slimkernels.ops.triton import launch
from slimkernels.ops.triton._math import double
from slimkernels.ops.triton._slim_passes import DenseGradient, fill_row, write_row
from slimkernels.ops.triton._slim_terms import student_row


class DenseMode(NamedTuple):
    """Compile-time constants of the kernel: the fields of ``Mode`` that a walk over a student's row reads."""

    has_teacher: bool
    two_temperatures: bool
    softcap: bool
    acc: tl.dtype
    block_v: int


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
    MODE: tl.constexpr,
):
    """Computes the gradient of one row per program."""
    BLOCK_V: tl.constexpr = MODE.block_v
    n = tl.program_id(0).to(tl.int64)
    logits_ptr += n * logits_stride
    gradient_ptr += n * gradient_stride
    numbers_ptr += n
    step = tl.full((), num_rows, tl.int64)
    factor = tl.load(numbers_ptr).to(tl.float64)
    level = tl.load(numbers_ptr + step).to(tl.float64)
    factor_one = tl.load(numbers_ptr + 2 * step).to(tl.float64)
    level_one = tl.load(numbers_ptr + 3 * step).to(tl.float64)
    constant = tl.load(numbers_ptr + 4 * step).to(tl.float64)
    if (factor == 0) & (factor_one == 0) & (constant == 0):
        # The gradient is exactly 0 whatever the row holds, also NaN.
        fill_row(gradient_ptr, vocab_size, tl.full((), 0.0, tl.float64), BLOCK_V)
    else:
        scale = double(logit_scale)
        row = student_row(logits_ptr, vocab_size, double(temperature), double(softcap), scale, MODE)
        # Levels of y, and factors that make up for their rounding.
        level_y = (level / row.unit).to(MODE.acc)
        level_one_y = (level_one / row.unit).to(MODE.acc)
        level_error = level_y.to(tl.float64) * row.unit - level
        level_one_error = level_one_y.to(tl.float64) * row.unit - level_one
        dense = DenseGradient(
            level_y,
            (factor * scale * tl.exp(level_error / double(temperature))).to(MODE.acc),
            level_one_y,
            (factor_one * scale * tl.exp(level_one_error)).to(MODE.acc),
            (constant * scale).to(MODE.acc),
        )
        write_row(gradient_ptr, row, dense, MODE)


def softmax_gradient_rows(
    logits: Tensor, gradient: Tensor, numbers: Tensor, temperature: float, softcap: float, logit_scale: float
) -> None:
    """Launches the kernel with the settings of slim_loss, whose last pass does the same."""
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
        MODE=DenseMode(
            has_teacher=False,
            two_temperatures=temperature != 1,
            softcap=softcap > 0,
            acc=launch.accumulation_dtype(logits.dtype),
            block_v=launch.block_of(settings, vocab_size),
        ),
    )
