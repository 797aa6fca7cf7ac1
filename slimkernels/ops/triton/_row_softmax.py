"""The first kernel of every sampling op: reads each row once and finds its softmax and where its large logits are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.ops.triton import launch
from slimkernels.ops.triton._math import double
from slimkernels.ops.triton._race import clamped_inverse

# Fields that the kernel writes for a row, float64. TOP is the largest logit: +inf if logits of +inf share the mass, NaN
# if the row has no softmax.
FIELDS = 4
FIELDS_OF_ROW = tl.constexpr(FIELDS)
TOP, LOG_SUM, ENTROPY, LOG_TEMPERED = (tl.constexpr(field) for field in range(FIELDS))


@triton.jit
def row_softmax_kernel(
    logits_ptr,  # (N, V), rows `row_stride` apart
    row_stride: tl.int64,
    vocab_size,
    temperature: tl.float64,
    temperatures_ptr,  # (N,) float64 or None
    softmax_ptr,  # (N, FIELDS)
    lanes_max_ptr,  # (N, LANES) of the dtype of the logits, or None
    TEMPERED: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Writes the softmax fields of a row and, if asked for, the largest logit of each lane; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    softmax_ptr += row * FIELDS_OF_ROW
    temperature = option_of(row, double(temperature), temperatures_ptr)
    temperature = tl.where(temperature > 0, temperature, 1.0)
    lanes_max, top, exps, moments, tempered = sums_of_row(
        logits_ptr, vocab_size, clamped_inverse(temperature), TEMPERED, ACC, LANES, GROUP
    )
    log_sum = tl.log(exps)
    entropy = tl.maximum(log_sum - moments / exps, 0.0)
    # True if the row has no NaN, no +inf, and a logit above -inf.
    if (exps > 0.5) & (exps < 1e300):
        tl.store(softmax_ptr + LOG_TEMPERED, tl.log(tempered))
    else:
        infinite = count_of_infinite(logits_ptr, vocab_size, ACC, LANES * GROUP)
        top = tl.where(infinite > 0, float("inf"), float("nan")).to(tl.float64)
        log_sum = tl.log(tl.maximum(infinite, 1).to(tl.float64))
        entropy = log_sum
        tl.store(softmax_ptr + LOG_TEMPERED, log_sum)
    tl.store(softmax_ptr + TOP, top)
    tl.store(softmax_ptr + LOG_SUM, log_sum)
    tl.store(softmax_ptr + ENTROPY, entropy)
    if lanes_max_ptr is not None:
        tl.store(lanes_max_ptr + row * LANES + tl.arange(0, LANES), lanes_max.to(logits_ptr.dtype.element_ty))


@triton.jit
def option_of(row, number, per_row_ptr):
    """Returns the option of a row: its value in the tensor if there is one, else the number."""
    option = number
    if per_row_ptr is not None:
        option = tl.load(per_row_ptr + row)
    return option


@triton.jit
def sums_of_row(
    row_ptr,
    vocab_size,
    inv_temperature,
    TEMPERED: tl.constexpr,
    ACC: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Computes the largest logit of every lane and of the row, and the row's sums of exp(d), d exp(d) and exp(d / T).

    Here d = z - top; the sums are float64. If not TEMPERED, the sum of exp(d) is returned in place of the last.

    A lane reads GROUP neighbouring ids out of every LANES * GROUP. It keeps its own sums and its own level, so threads
    need not synchronise before the whole row has been read.
    """
    # d is limited to this, so that d exp(d) is 0 instead of -inf * 0.
    NO_MASS: tl.constexpr = -750.0 if ACC.primitive_bitwidth == 64 else -104.0
    inv_temperature_of_lane = inv_temperature.to(ACC)
    offs = tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    level = tl.full((LANES,), float("-inf"), ACC)
    exps = tl.zeros((LANES,), ACC)
    moments = tl.zeros((LANES,), ACC)
    tempered = tl.zeros((LANES,), ACC)
    for begin in range(0, vocab_size, LANES * GROUP):
        z = tl.load(row_ptr + begin + offs, mask=begin + offs < vocab_size, other=float("-inf")).to(ACC)
        higher = tl.maximum(level, tl.max(z, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        step = level - shift
        factor = tl.exp(step)
        d = z - shift[:, None]
        e = tl.exp(d)
        # The step of a lane that was empty is -inf, and 0 * -inf would be NaN.
        moments = tl.where(factor > 0, factor * (moments + step * exps), 0.0) + tl.sum(e * tl.maximum(d, NO_MASS), 1)
        exps = factor * exps + tl.sum(e, 1)
        if TEMPERED:
            tempered = tempered * tl.exp(step * inv_temperature_of_lane)
            tempered += tl.sum(tl.exp(d * inv_temperature_of_lane), 1)
        level = higher

    top = tl.max(level)
    fall = tl.where(level == float("-inf"), float("-inf"), level - top).to(tl.float64)
    weight = tl.exp(fall)
    wide_exps = exps.to(tl.float64)
    all_exps = tl.sum(weight * wide_exps)
    all_moments = tl.sum(tl.where(weight > 0, weight * (moments.to(tl.float64) + fall * wide_exps), 0.0))
    all_tempered = all_exps
    if TEMPERED:
        all_tempered = tl.sum(tl.exp(fall * inv_temperature) * tempered.to(tl.float64))
    return level, top.to(tl.float64), all_exps, all_moments, all_tempered


@triton.jit
def count_of_infinite(row_ptr, vocab_size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Counts the logits that are +inf; returns 0 for a row with a NaN, which has no distribution either."""
    offs = tl.arange(0, BLOCK)
    infinite = 0
    nans = 0
    for begin in range(0, vocab_size, BLOCK):
        z = tl.load(row_ptr + begin + offs, mask=begin + offs < vocab_size, other=0.0).to(ACC)
        infinite += tl.sum((z == float("inf")).to(tl.int32))
        nans += tl.sum((z != z).to(tl.int32))
    return tl.where(nans > 0, 0, infinite)


@triton.jit
def logprob_of(z, top, log_sum):
    """Computes the log softmax of a logit in float64."""
    limit = tl.where(z == float("inf"), -log_sum, float("-inf"))
    return tl.where(top == float("inf"), limit, z - top - log_sum)


def lanes_of(logits: Tensor) -> tuple[int, int]:
    """Returns the number of lanes, and the number of neighbouring ids that a lane loads at a time (16 bytes)."""
    group = 16 // logits.dtype.itemsize
    return launch.block_of(launch.settings_of("row_softmax", logits), logits.shape[-1]) // group, group


def row_softmax(
    logits: Tensor, temperature: float, temperatures: Tensor | None, *, tempered: bool, with_lanes: bool
) -> tuple[Tensor, Tensor | None]:
    """Launches the kernel; returns the fields (N, FIELDS) and, if asked for, the largest logit per lane (N, LANES).

    Args:
        logits: (N, V).
        temperature: T of LOG_TEMPERED for all rows.
        temperatures: (N,) float64 in place of ``temperature``, or None.
        tempered: Whether to compute LOG_TEMPERED at T; otherwise it equals LOG_SUM.
        with_lanes: Whether to return the largest logit of each lane.
    """
    num_rows, vocab_size = logits.shape
    lanes, group = lanes_of(logits)
    softmax = torch.empty(num_rows, FIELDS, dtype=torch.float64, device=logits.device)
    lanes_max = logits.new_empty(num_rows, lanes) if with_lanes else None
    launch.run(
        row_softmax_kernel,
        num_rows,
        launch.settings_of("row_softmax", logits),
        logits,
        logits,
        logits.stride(0),
        vocab_size,
        temperature,
        temperatures,
        softmax,
        lanes_max,
        TEMPERED=tempered,
        ACC=launch.accumulation_dtype(logits.dtype),
        LANES=lanes,
        GROUP=group,
    )
    return softmax, lanes_max
