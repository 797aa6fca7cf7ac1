"""How the linear ops walk over rows: a chunk's logits at a time, in one buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# (bytes of logits, least rows) by the size of an entry: what keeps a chunk in the last-level cache, and the matrix
# products at their full rate (bfloat16, V = 32000, D = 2048 on a Zen 5: 256 rows 1.01 TFLOP/s, 128 rows 0.92).
_CHUNKS = {2: (16 * 2**20, 256), 4: (32 * 2**20, 128), 8: (32 * 2**20, 128)}


def resolve_chunk_rows(chunk_rows: int | None, num_rows: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Rows per chunk: as asked, or what the bytes of ``_CHUNKS`` hold, spread evenly over the chunks."""
    if chunk_rows is not None:
        if not isinstance(chunk_rows, int) or chunk_rows < 1:
            raise ValueError(f"chunk_rows must be a positive integer, got {chunk_rows}")
        return chunk_rows
    chunk_bytes, least_rows = _CHUNKS[dtype.itemsize]
    fitting = max(chunk_bytes // (vocab_size * dtype.itemsize), least_rows)
    return max(math.ceil(num_rows / max(math.ceil(num_rows / fitting), 1)), 1)


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
