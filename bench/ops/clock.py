"""How a device is timed, what it reaches, and how much of its memory a call takes."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

# Long enough that reading a CPU's clock costs nothing; shorter calls are repeated within a round.
SHORTEST_ROUND_SECONDS = 2e-3
# More than any GPU's second-level cache.
_FLUSH_BYTES = 2**28


class CpuClock:
    """Wall time of calls in a row, and resident memory."""

    def seconds(self, run: Callable[[], object], calls: int = 1) -> float:
        """Per call."""
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    def calls_per_round(self, seconds: float) -> int:
        """How many calls a round takes together."""
        return max(1, round(SHORTEST_ROUND_SECONDS / seconds))

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most memory that a call takes over what there was before it."""
        gc.collect()
        _return_free_pages()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_bytes("VmRSS")
        run()
        return _status_bytes("VmHWM") - before


class CudaClock:
    """Time between events of the current stream, each call on a cold second-level cache; the allocator's memory."""

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def seconds(self, run: Callable[[], object], calls: int = 1) -> float:
        """Per call."""
        total = 0.0
        for _ in range(calls):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            begin.record()
            run()
            end.record()
            end.synchronize()
            total += begin.elapsed_time(end) / 1e3
        return total / calls

    def calls_per_round(self, _seconds: float) -> int:
        """One, because every call finds a flushed cache."""
        return 1

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most memory that a call takes over what there was before it."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def clock() -> CpuClock | CudaClock:
    """That of torch's default device."""
    return CudaClock() if torch.get_default_device().type == "cuda" else CpuClock()


def copy_bytes_per_second() -> float:
    """What the device copies between tensors far larger than any cache, reads and writes counted."""
    source = torch.ones(2**25 if torch.get_default_device().type == "cpu" else 2**28)
    target = torch.empty_like(source)
    timer = clock()
    return 2 * source.nbytes / min(timer.seconds(lambda: target.copy_(source)) for _ in range(8))


def matmul_flops_per_second(dtype: torch.dtype) -> float:
    """What the device reaches in the product that an lm_head takes: (N, D) by (V, D) transposed."""
    rows, depth, columns = (1024, 2048, 4096) if torch.get_default_device().type == "cpu" else (4096, 4096, 16384)
    left, right = torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype)
    timer = clock()
    return 2 * rows * depth * columns / min(timer.seconds(lambda: left @ right.T) for _ in range(5))


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(match.group(1)) * 1024 if match else 0


def _return_free_pages() -> None:
    """Pages that an earlier call left in the allocator would be used again without showing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
