"""Measures times and peak memory of a case's providers in this process."""

from __future__ import annotations

from collections.abc import Callable

from bench.ops.case import OURS, Case, Work
from bench.ops.clock import clock


def percentiles(values: list[float]) -> dict[str, float]:
    """Returns the 20th, 50th and 80th percentile without interpolation, so that each is a measured value."""
    ordered = sorted(values)
    return {f"p{p}": ordered[round(p / 100 * (len(ordered) - 1))] for p in (20, 50, 80)}


def rounds_for(seconds: float, rounds: int, compared: bool) -> int:
    """Returns the number of rounds of a provider, smaller if a call is slow.

    Args:
        seconds: Time of one call.
        rounds: Number of rounds of a fast provider.
        compared: Whether the provider takes part in the reported ratio: ours or the first peer.
    """
    if seconds <= 1:
        return rounds
    if seconds <= 3:
        return min(rounds, 5 if compared else 3)
    return min(rounds, 3 if compared else 2)


def time_providers(case: Case, work: Work, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds per call of every provider, one value per round.

    Providers take turns within a round, so a change in the machine affects all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in work.providers}
    planned, calls = {}, {}
    timer = clock()
    for name, run in work.providers.items():
        work.prepare(name)
        seconds = timer.seconds(run)
        planned[name] = rounds_for(seconds, rounds, name in (OURS, *case.peers[:1]))
        calls[name] = timer.calls_per_round(seconds)
    for turn in range(rounds):
        for name, run in work.providers.items():
            # A provider with fewer rounds takes them spread over the whole run.
            if (turn + 1) * planned[name] // rounds > turn * planned[name] // rounds:
                work.prepare(name)
                times[name].append(timer.seconds(run, calls[name]))
    return times


def peak_extra_bytes(work: Work, run: Callable[[], object]) -> int:
    """Returns the peak memory of a call in bytes, without the inputs and the gradients that it must return.

    Subtracting a gradient that does not exist yet at the peak would hide that much memory. So the peak is taken twice,
    with all gradients and with the first one alone (the other leaves frozen). From each peak the gradients made are
    subtracted, and the larger difference counts.
    """
    peaks = []
    for frozen in ((), work.leaves[1:])[: 1 + (len(work.leaves) > 1)]:
        for leaf in work.leaves:
            leaf.grad = None
            leaf.requires_grad_(all(leaf is not other for other in frozen))
        peak = clock().peak_bytes(run)
        made = sum(leaf.grad.nbytes for leaf in work.leaves if leaf.grad is not None)
        peaks.append(peak - made)
    for leaf in work.leaves:
        leaf.requires_grad_()
    return max(*peaks, 0)
