"""How the linear ops walk over rows: a chunk's logits at a time, in one buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# (bytes of logits, least rows) by the size of an entry: what keeps a chunk in a CPU's last-level cache, and the matrix
# products at their full rate (bfloat16, V = 32000, D = 2048 on a Zen 5: 256 rows 1.01 TFLOP/s, 128 rows 0.92).
_CHUNKS = {2: (16 * 2**20, 256), 4: (32 * 2**20, 128), 8: (32 * 2**20, 128)}
# A GPU's matrix products are at their full rate with this many rows; fewer where a quarter of the free memory is less.
_CUDA_ROWS, _CUDA_LEAST_ROWS = 4096, 256


def checked_chunk_rows(chunk_rows: int | None) -> int:
    """What the operators take: the rows asked for, or 0 for what ``resolve_chunk_rows`` makes of the device."""
    if chunk_rows is None:
        return 0
    if not isinstance(chunk_rows, int) or chunk_rows < 1:
        raise ValueError(f"chunk_rows must be a positive integer, got {chunk_rows}")
    return chunk_rows


def resolve_chunk_rows(chunk_rows: int, hidden: Tensor, vocab_size: int) -> int:
    """Rows per chunk: as asked, or what the device holds well, spread evenly over the chunks. Never synchronises."""
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
    """What the device and torch's allocator have left; a capture into a graph may not ask the device."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if torch.cuda.is_current_stream_capturing():
        return held + torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_reserved(device)
    return held + torch.cuda.mem_get_info(device)[0]


def row_chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows of each chunk with their logits (rows, V), which the next chunk overwrites."""
    num_rows = hidden.shape[0]
    buffer = hidden.new_empty(min(chunk_rows, num_rows), weight.shape[0])
    for begin in range(0, num_rows, chunk_rows):
        rows = slice(begin, min(begin + chunk_rows, num_rows))
        logits = buffer[: rows.stop - rows.start]
        if bias is None:
            torch.mm(hidden[rows], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[rows], weight.t(), out=logits)
        yield rows, logits
