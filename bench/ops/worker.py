"""Measures times or peak memory with one thread count, in a process that ``bench.run`` starts.

Every thread count needs its own process because compiled peers have it baked in. Times and memory need different
processes because they need different allocator settings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench import records
from bench.machine import machine
from bench.ops.case import OURS, Case, Work
from bench.ops.cases import all_cases
from bench.ops.clock import clock, copy_bytes_per_second, matmul_flops_per_second
from bench.ops.cuda_cases import cuda_cases
from bench.ops.measure import peak_extra_bytes, percentiles, time_providers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--metric", choices=("time", "memory"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--ours", action="store_true", help="skip the peers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_default_device(args.device)
    where = machine()
    rows = [] if args.again else records.read(args.out)
    cases = selected(
        cuda_cases() if args.device == "cuda" else all_cases(), args.only, args.quick, args.metric, args.threads
    )
    todo = pending(cases, rows, where, args.metric)
    print(f"{args.metric} on {args.threads} threads: {len(todo)} cases, {len(cases) - len(todo)} skipped", flush=True)
    for case in todo:
        try:
            work = case.gated_work(args.ours)
        except AssertionError as error:
            print(f"{case.name}: not timed, {error}", file=sys.stderr, flush=True)
            continue
        figures = times(case, work, args.rounds) if args.metric == "time" else peaks(work)
        records.append(args.out, [row_of(case, provider, where, fields) for provider, fields in figures.items()])
        print(summary(case, figures), flush=True)


def selected(cases: list[Case], only: str, quick: bool, metric: str, threads: int) -> list[Case]:
    """Returns the requested cases, without those for which the metric or the thread count is meaningless."""
    return [
        case
        for case in cases
        if only in case.name
        and (case.quick or not quick)
        and (case.has_memory or metric == "time")
        and (threads == 1 or not case.single_core)
    ]


def pending(cases: list[Case], rows: list[dict], where: dict, metric: str) -> list[Case]:
    """Returns the cases without figures from this commit, machine and thread count."""
    metrics = ("time", "throughput") if metric == "time" else (records.MEMORY,)
    done = records.measured(rows, where, metrics)
    return [case for case in cases if records.case_of(row_of(case, OURS, {}, {})) not in done]


def times(case: Case, work: Work, rounds: int) -> dict[str, dict]:
    """Times every provider and returns the fields of its row."""
    # Measured anew for every case, because on a shared host they may change twofold within minutes.
    bandwidth = copy_bytes_per_second()
    flop_rate = matmul_flops_per_second(case.dtype) if case.floor_flops else None
    floor_seconds = max(case.floor_bytes / bandwidth, case.floor_flops / flop_rate if flop_rate else 0)
    shared = {
        "floor": case.figure(floor_seconds),
        "floor_bytes": case.floor_bytes,
        "floor_flops": case.floor_flops,
        "copy_bytes_per_s": bandwidth,
        "matmul_flops_per_s": flop_rate,
    }
    figures = {}
    for provider, seconds in time_providers(case, work, rounds).items():
        measured = percentiles([case.figure(value) for value in seconds])
        work.prepare(provider)
        host_seconds = clock().host_seconds(work.providers[provider])
        host = {} if host_seconds is None else {"host_ms": 1e3 * host_seconds}
        kind = {"metric": case.metric, "unit": case.unit, **host}
        figures[provider] = {**kind, **measured, "rounds": len(seconds), **shared}
    return figures


def peaks(work: Work) -> dict[str, dict]:
    """Measures the peak memory of every provider and returns the fields of its row."""
    return {
        provider: {"metric": records.MEMORY, "unit": "bytes", "p50": peak_extra_bytes(work, run)}
        for provider, run in work.providers.items()
    }


def row_of(case: Case, provider: str, where: dict, fields: dict) -> dict:
    """Returns a row of the results file."""
    return {
        "op": case.op,
        "provider": provider,
        "mode": case.mode,
        "shape": case.shape,
        "dtype": case.dtype_name,
        "sizes": case.sizes,
        "sweep": case.sweep,
        **fields,
        "peer": case.peers[0] if case.peers else None,
        **where,
    }


def summary(case: Case, figures: dict[str, dict]) -> str:
    """Returns a line about a case's figures for the console."""
    ours = figures[OURS]
    if ours["unit"] == "bytes":
        return f"{case.name}: " + ", ".join(f"{name} {row['p50'] / 2**20:.0f} MiB" for name, row in figures.items())
    line = f"{case.name}: {ours['p50']:.3g} {ours['unit']}, floor {ours['floor']:.3g} {ours['unit']}"
    if "host_ms" in ours:
        line += f", {ours['host_ms']:.3g} ms of the host to launch it"
    ratios = [f"{row['p50'] / ours['p50']:.2f}x {name}" for name, row in figures.items() if name != OURS]
    return ", ".join([line, *ratios])


if __name__ == "__main__":
    main()
