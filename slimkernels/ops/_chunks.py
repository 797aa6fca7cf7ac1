"""Chunks of rows for the linear ops, which hold the logits of one chunk at a time in one buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.ops._library import accumulation_dtype, operand_of

# (bytes of logits, least rows) of a chunk on a CPU, by the size of an entry. The bytes keep a chunk in the last-level
# cache; the rows keep the matrix products at their full rate (bfloat16, V = 32000, D = 2048 on a Zen 5: 256 rows
# 1.01 TFLOP/s, 128 rows 0.92).
_CHUNKS = {2: (16 * 2**20, 256), 4: (32 * 2**20, 128), 8: (32 * 2**20, 128)}
# Matrix products of a GPU reach their full rate with the first number of rows. A chunk has fewer, down to the second
# number, where its logits would take more than a quarter of the free memory.
_CUDA_ROWS, _CUDA_LEAST_ROWS = 4096, 256
# Rows of a chunk begin at multiples of this many entries. cuBLAS has its fast kernels only for rows that are aligned
# to 16 bytes, which those of an odd V are not; 64 entries are also whole lines of the cache.
_ROW_ALIGNMENT = {"cpu": 1, "cuda": 64}


def checked_chunk_rows(chunk_rows: int | None) -> int:
    """Checks ``chunk_rows`` and returns what the operators take, 0 standing for None."""
    if chunk_rows is None:
        return 0
    number = _checks.as_integer(chunk_rows, "chunk_rows")
    if number < 1:
        raise ValueError(f"chunk_rows must be a positive integer, got {chunk_rows}")
    return number


def resolve_chunk_rows(chunk_rows: int, hidden: Tensor, vocab_size: int) -> int:
    """Returns the rows per chunk: ``chunk_rows``, or for 0 what suits the device, equal chunks. Never synchronises."""
    if chunk_rows:
        return chunk_rows
    num_rows, row_bytes = hidden.shape[0], vocab_size * hidden.dtype.itemsize
    if hidden.device.type == "cuda":
        fitting = _CUDA_ROWS
        while fitting > _CUDA_LEAST_ROWS and fitting * row_bytes > _free_bytes(hidden.device) // 4:
            fitting //= 2
    else:
        chunk_bytes, least_rows = _CHUNKS[hidden.dtype.itemsize]
        fitting = max(chunk_bytes // row_bytes, least_rows)
    return max(math.ceil(num_rows / max(math.ceil(num_rows / fitting), 1)), 1)


def _free_bytes(device: torch.device) -> int:
    """Returns the memory that the device and torch's allocator have left."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # The driver must not be asked while a stream is captured into a graph.
    if torch.cuda.is_current_stream_capturing():
        return held + torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_reserved(device)
    return held + torch.cuda.mem_get_info(device)[0]


def row_chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of each chunk with their logits (rows, V), which the next chunk overwrites."""
    num_rows = hidden.shape[0]
    vocab_size = weight.shape[0]
    row_stride = vocab_size + -vocab_size % _ROW_ALIGNMENT.get(hidden.device.type, 1)
    buffer = hidden.new_empty(min(chunk_rows, num_rows), row_stride)[:, :vocab_size]
    for begin in range(0, num_rows, chunk_rows):
        rows = slice(begin, min(begin + chunk_rows, num_rows))
        logits = buffer[: rows.stop - rows.start]
        if bias is None:
            torch.mm(hidden[rows], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[rows], weight.t(), out=logits)
        yield rows, logits


class HeadNumbers(NamedTuple):
    """Float options of an op over the rows of an lm_head, as its operator takes them.

    Attributes:
        temperatures: Temperatures of the log-sum-exps.
        softcap: Limit of the logits, 0 for none.
        logit_scale: Factor on the logits.
        is_plain: Whether the logits are the product itself.
        operand: The numbers in a compiled graph, where the other fields are constants that nobody reads; else None.
    """

    temperatures: list[float]
    softcap: float
    logit_scale: float
    is_plain: bool
    operand: Tensor | None


def head_numbers(temperatures: Sequence[float], softcap: float | None, logit_scale: float) -> HeadNumbers:
    """Checks ``softcap`` and ``logit_scale`` and returns them with the temperatures."""
    logit_scale = _checks.as_positive(logit_scale, "logit_scale")
    softcap = None if softcap is None else _checks.as_positive(softcap, "softcap")
    is_plain = softcap is None and logit_scale == 1
    numbers = [*temperatures, 0.0 if softcap is None else softcap, logit_scale]
    defaults = [*(1.0 for _ in temperatures), 0.0, 1.0]
    operand = operand_of(numbers, defaults)
    *given, cap, scale = numbers if operand is None else defaults
    return HeadNumbers(given, cap, scale, is_plain, operand)


def read_numbers(
    temperatures: Sequence[float], softcap: float, logit_scale: float, operand: Tensor | None
) -> tuple[Sequence[float], float, float]:
    """Returns the numbers that an operator was given, as constants or in its operand."""
    if operand is not None:
        *temperatures, softcap, logit_scale = operand.tolist()
    return temperatures, softcap, logit_scale


def scaled_and_capped(product: Tensor, logit_scale: float, softcap: float) -> Tensor:
    """Returns ``softcap * tanh(logit_scale * product / softcap)``, without tanh where ``softcap`` is 0.

    The result is float32 (float64 for float64), and ``product`` itself if that is its dtype.
    """
    logits = product.to(accumulation_dtype(product.dtype)).mul_(logit_scale)
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits
