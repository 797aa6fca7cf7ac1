"""Measures a device: times, memory of a call, copy bandwidth and matrix-product rate."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

# Long enough to make the cost of reading a CPU's clock negligible; shorter calls are repeated within a round.
SHORTEST_ROUND_SECONDS = 2e-3
# Larger than the second-level cache of any GPU.
_FLUSH_BYTES = 2**28
# The device's pauses before a timed call, in seconds: the first that is tried, and the last.
_FIRST_PAUSE, _LONGEST_PAUSE = 2e-4, 0.2
_CALIBRATION_CYCLES = 10**7


class CpuClock:
    """A clock of a CPU: wall time of consecutive calls, and resident memory."""

    def host_seconds(self, _run: Callable[[], object]) -> None:
        """Returns None: on a CPU the host's time is the time of the call."""

    def seconds(self, run: Callable[[], object], calls: int = 1) -> float:
        """Returns the mean time of ``calls`` calls."""
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    def calls_per_round(self, seconds: float) -> int:
        """Returns the number of calls that are timed together, given the time of one."""
        return max(1, round(SHORTEST_ROUND_SECONDS / seconds))

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Returns the peak memory of a call, minus the memory in use before it."""
        gc.collect()
        _return_free_pages()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_bytes("VmRSS")
        run()
        return _status_bytes("VmHWM") - before


class CudaClock:
    """A clock of a GPU: time between events of the current stream, and memory of torch's allocator.

    Every call starts with a cold second-level cache. The device pauses before the first event until the host has
    launched the whole call, so the time is that of the device; ``host_seconds`` is that of the host. A call that waits
    for the device itself cannot be launched beforehand, and its time includes the host's.
    """

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._pauses: dict[Callable[[], object], float] = {}
        torch.cuda._sleep(_CALIBRATION_CYCLES)  # the first launch loads the kernel
        self._cycles_per_second = _CALIBRATION_CYCLES / self._between_events(
            lambda: torch.cuda._sleep(_CALIBRATION_CYCLES)
        )

    def seconds(self, run: Callable[[], object], calls: int = 1) -> float:
        """Returns the mean time of ``calls`` calls on the device."""
        return sum(self._device_seconds(run) for _ in range(calls)) / calls

    def host_seconds(self, run: Callable[[], object], calls: int = 5) -> float:
        """Returns the least time that the host takes to launch a call, out of ``calls`` calls to an idle device."""
        times = []
        for _ in range(calls):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return min(times)

    def _device_seconds(self, run: Callable[[], object]) -> float:
        pause = self._pauses.get(run, _FIRST_PAUSE)
        while True:
            self._flush.zero_()
            torch.cuda._sleep(int(pause * self._cycles_per_second))
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            was_paused = not begin.query()  # false if the pause ended before the call was launched
            end.synchronize()
            if was_paused or pause >= _LONGEST_PAUSE:
                self._pauses[run] = pause
                return begin.elapsed_time(end) / 1e3
            pause *= 4

    def _between_events(self, run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def calls_per_round(self, _seconds: float) -> int:
        """Returns 1, because the cache is flushed before every call."""
        return 1

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Returns the peak memory of a call, minus the memory in use before it."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def clock() -> CpuClock | CudaClock:
    """Returns a clock of torch's default device."""
    return CudaClock() if torch.get_default_device().type == "cuda" else CpuClock()


def copy_bytes_per_second() -> float:
    """Returns the copy bandwidth between tensors far larger than any cache; reads and writes both count."""
    source = torch.ones(2**25 if torch.get_default_device().type == "cpu" else 2**28)
    target = torch.empty_like(source)
    timer = clock()
    return 2 * source.nbytes / min(timer.seconds(lambda: target.copy_(source)) for _ in range(8))


def matmul_flops_per_second(dtype: torch.dtype) -> float:
    """Returns the rate of a matrix product like that of an lm_head: (N, D) times (V, D) transposed."""
    rows, depth, columns = (1024, 2048, 4096) if torch.get_default_device().type == "cpu" else (4096, 4096, 16384)
    left, right = torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype)
    timer = clock()
    return 2 * rows * depth * columns / min(timer.seconds(lambda: left @ right.T) for _ in range(5))


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(match.group(1)) * 1024 if match else 0


def _return_free_pages() -> None:
    """Returns free pages to the system, because reusing them would not show in the peak of the next call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
