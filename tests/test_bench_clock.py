"""The clock of a GPU, on a simulated device: what it counts must not depend on how fast the host launches."""

from __future__ import annotations

import time
import types

import pytest
import torch

from bench.ops.clock import CudaClock

CYCLES_PER_SECOND = 1e9
KERNEL = 40e-6


class SimulatedDevice:
    """A host's clock and a stream that runs what the host has launched, in order, from the time of the launch on."""

    def __init__(self) -> None:
        self.host = 0.0
        self.stream_end = 0.0

    def launch(self, seconds: float, host_seconds: float = 1e-6) -> None:
        self.host += host_seconds
        self.stream_end = max(self.stream_end, self.host) + seconds

    def synchronize(self) -> None:
        self.host = max(self.host, self.stream_end)

    def install(self, monkeypatch) -> None:
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                device.launch(0.0)
                self.time = device.stream_end

            def query(self) -> bool:
                return self.time <= device.host

            def synchronize(self) -> None:
                device.host = max(device.host, self.time)

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.time - self.time)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: device.launch(cycles / CYCLES_PER_SECOND))
        monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
        monkeypatch.setattr(time, "perf_counter", lambda: device.host)
        flush = types.SimpleNamespace(zero_=lambda: device.launch(50e-6))
        monkeypatch.setattr(torch, "empty", lambda *_args, **_kwargs: flush)


@pytest.fixture
def device(monkeypatch) -> SimulatedDevice:
    device = SimulatedDevice()
    device.install(monkeypatch)
    return device


@pytest.mark.parametrize("host_seconds", [5e-6, 300e-6, 3e-3])
def test_the_time_of_a_call_is_that_of_the_device(device, host_seconds):
    def run() -> None:
        device.launch(KERNEL, host_seconds)
        device.launch(KERNEL, host_seconds)

    clock = CudaClock()
    assert clock.seconds(run, calls=3) == pytest.approx(2 * KERNEL)
    assert clock.host_seconds(run) == pytest.approx(2 * host_seconds)


def test_a_call_that_waits_for_the_device_is_timed_with_its_gaps(device):
    def run() -> None:
        device.launch(KERNEL, 20e-6)
        device.synchronize()
        device.launch(KERNEL, 20e-6)

    assert CudaClock().seconds(run) == pytest.approx(2 * KERNEL + 20e-6)
