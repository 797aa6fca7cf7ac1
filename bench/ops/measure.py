"""Times and peak memory of a case's providers, in this process."""

from __future__ import annotations

from collections.abc import Callable

from bench.ops.case import OURS, Case, Work
from bench.ops.clock import clock


def percentiles(values: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th, each a value that was measured."""
    ordered = sorted(values)
    return {f"p{p}": ordered[round(p / 100 * (len(ordered) - 1))] for p in (20, 50, 80)}


def rounds_for(seconds: float, rounds: int, compared: bool) -> int:
    """Fewer rounds for what takes long; ``compared`` is true of ours and of the peer that ratios are taken to."""
    if seconds <= 1:
        return rounds
    if seconds <= 3:
        return min(rounds, 5 if compared else 3)
    return min(rounds, 3 if compared else 2)


def time_providers(case: Case, work: Work, rounds: int) -> dict[str, list[float]]:
    """Seconds per call of every provider; they take turns, so that a change in the machine meets them all."""
    times: dict[str, list[float]] = {name: [] for name in work.providers}
    planned, calls = {}, {}
    timer = clock()
    for name, run in work.providers.items():
        seconds = timer.seconds(run)
        planned[name] = rounds_for(seconds, rounds, name in (OURS, *case.peers[:1]))
        calls[name] = timer.calls_per_round(seconds)
    for turn in range(rounds):
        for name, run in work.providers.items():
            # Spread over the run, not all at its beginning.
            if (turn + 1) * planned[name] // rounds > turn * planned[name] // rounds:
                times[name].append(timer.seconds(run, calls[name]))
    return times


def peak_extra_bytes(work: Work, run: Callable[[], object]) -> int:
    """The most memory besides the inputs and the gradients that any implementation must return.

    A gradient that does not exist yet at the peak would hide as much of it. So the peak is taken twice, with every
    gradient and with the first alone (the others' inputs frozen), each less the gradients made, and the larger counts.
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
