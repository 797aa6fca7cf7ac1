"""Times every case's providers in turn, round by round, and appends one JSON line per figure.

python -m bench.run --out bench/results/cpu.jsonl [--quick] [--rounds 7] [--threads 2]

Times are taken in a process whose allocator keeps its pages: a fresh page costs more than the arithmetic on it, and
whether an output of tens of megabytes gets fresh ones depends on what ran before. Peak memory is taken in a second
process whose allocator returns them at once.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.cases import Case, all_cases
from slimkernels import _C


def machine() -> dict:
    """What a figure depends on besides the code."""
    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        found = {key: re.search(rf"^{key}\s*:\s*(.*)$", text, re.M) for key in ("model name", "cpu family", "model")}
        name, family, model = (match.group(1) if match else "?" for match in found.values())
        cpu = f"{name} (family {family}, model {model})"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": cpu,
        "isa": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{p}": ordered[round(p / 100 * (len(ordered) - 1))] for p in (20, 50, 80)}


def time_ms(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds per provider; providers take turns, so that a change in the machine meets them all."""
    times: dict[str, list[float]] = {name: [] for name in case.providers}
    for run in case.providers.values():
        run()  # warms caches, compiles, and touches the pages it will use again
    for _ in range(rounds):
        for name, run in case.providers.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: percentiles(values) for name, values in times.items()}


def _status_bytes(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.M)
    return int(match.group(1)) * 1024 if match else 0


def peak_extra_bytes(case: Case, run: Callable[[], object]) -> int:
    """The most resident memory besides the inputs and the gradients that any implementation must return.

    A gradient that does not exist yet at the peak would hide as much of it. So the peak is taken twice, with every
    gradient and with the first alone (the others' inputs frozen), each less the gradients made, and the larger counts.
    """
    peaks = []
    for frozen in ((), case.grads[1:]):
        for leaf in case.grads:
            leaf.grad = None
            leaf.requires_grad_(all(leaf is not other for other in frozen))
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_bytes("VmRSS")
        run()
        made = sum(leaf.grad.nbytes for leaf in case.grads if leaf.grad is not None)
        peaks.append(_status_bytes("VmHWM") - before - made)
    for leaf in case.grads:
        leaf.requires_grad_()
    return max(*peaks, 0)


def copy_bytes_per_second() -> float:
    """What this machine's threads copy, reads and writes counted."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def matmul_flops_per_second(dtype: torch.dtype) -> float:
    left = torch.randn(1024, 2048).to(dtype)
    right = torch.randn(2048, 4096).to(dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * 1024 * 2048 * 4096 / best


KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
RETURN_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of every provider (default 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="the smallest shape of every op only")
    parser.add_argument("--metric", choices=("time", "memory"), help="one of the two, in this process")
    args = parser.parse_args()
    if args.metric is None:
        for metric, environment in (("time", KEEP_PAGES), ("memory", RETURN_PAGES)):
            command = [sys.executable, "-m", "bench.run", *sys.argv[1:], "--metric", metric]
            subprocess.run(command, env=os.environ | environment, check=True)
        return
    torch.set_num_threads(args.threads)
    bandwidth = copy_bytes_per_second()
    rates = {dtype: matmul_flops_per_second(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    where = machine()
    args.out.parent.mkdir(parents=True, exist_ok=True)

    with args.out.open("a") as out:

        def write(case: Case, provider: str, metric: str, unit: str, figures: dict) -> None:
            row = {"op": case.op, "provider": provider, "mode": case.mode, "shape": case.shape, "dtype": case.dtype}
            row |= {"metric": metric, "unit": unit, **figures, "peer": case.peer} | where
            out.write(json.dumps(row) + "\n")
            out.flush()

        for build in all_cases(args.quick):
            case = build()
            try:
                case.check()
            except AssertionError as error:
                print(f"{case.name}: not timed, {error}", file=sys.stderr)
                continue
            if args.metric == "memory":
                for provider, run in case.providers.items() if case.grads else ():
                    run()
                    write(case, provider, "peak_extra_memory", "bytes", {"p50": peak_extra_bytes(case, run)})
                continue
            floor_ms = 1e3 * max(case.floor_bytes / bandwidth, case.floor_flops / rates[case.dtype])
            times = time_ms(case, args.rounds)
            for provider, figures in times.items():
                write(case, provider, "time", "ms", figures | {"floor_ms": floor_ms})
            ours, peer = times["slimkernels"]["p50"], times[case.peer]["p50"]
            print(f"{case.name}: {ours:.2f} ms, {peer / ours:.1f}x {case.peer}, {ours / floor_ms:.1f}x floor")


if __name__ == "__main__":
    main()
