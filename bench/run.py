"""Times every case and its peers and appends one JSON line per figure, or compares two commits.

python -m bench.run --out bench/results/cpu.jsonl [--only topk] [--quick] [--rounds 7] [--threads 1 2] [--again]
python -m bench.run --out bench/results/cuda.jsonl --device cuda [--only topk] [--rounds 51]
python -m bench.run --base main [--only topk] [--threads 2]

A case that the file already has from the same commit, machine and thread count is skipped, so an interrupted run
continues where it stopped; ``--again`` measures it once more.

Times are taken in processes whose allocator keeps freed pages: a fresh page costs more than the arithmetic on it, and
whether an output of tens of megabytes gets fresh pages depends on what ran before. Peak memory is taken with the
largest thread count, in a process whose allocator returns pages at once.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bench.compare import LEAST_PAIRS, compare
from bench.machine import ROOT, one_at_a_time
from bench.ops.processes import start_worker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSONL file to append to")
    parser.add_argument("--base", metavar="REF", help="compare this checkout with commit REF instead of writing rows")
    parser.add_argument(
        "--pairs", type=int, default=LEAST_PAIRS, help="pairs of processes with --base, at least 6 (default 6)"
    )
    parser.add_argument(
        "--rounds", type=int, help="timed runs of every provider, at least 5 (default 7; with --base 31; on cuda 51)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="each device has its own cases")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=default_threads(), help="thread counts; each gets its own process"
    )
    parser.add_argument(
        "--only", default="", help="run only cases whose name contains this, such as slim_loss-256x32000 or -float16"
    )
    parser.add_argument("--quick", action="store_true", help="run only the smallest shape of every op")
    parser.add_argument("--again", action="store_true", help="measure cases that the file already has once more")
    args = parser.parse_args()
    if (args.out is None) == (args.base is None):
        parser.error("give exactly one of --out and --base")
    if args.pairs < LEAST_PAIRS:
        parser.error(f"--pairs must be at least {LEAST_PAIRS}, got {args.pairs}")
    # --base needs more rounds, because the two sides run in different processes and cannot alternate within a round;
    # it can afford them, because no peer is timed.
    args.rounds = args.rounds or (31 if args.base else 51 if args.device == "cuda" else 7)
    if args.rounds < 5:
        parser.error(f"--rounds must be at least 5 for meaningful percentiles, got {args.rounds}")
    options = ["--rounds", str(args.rounds), "--only", args.only, "--device", args.device]
    options += ["--quick"] if args.quick else []
    if args.device == "cuda":
        args.threads = [1]  # one process is enough: the host's threads only launch
    with one_at_a_time():
        if args.base:
            print(compare(args.base, args.threads, options, args.pairs))
            return
        options += ["--out", str(args.out.resolve()), *(["--again"] if args.again else [])]
        for threads in args.threads:
            start_worker(ROOT, "time", threads, options)
        start_worker(ROOT, "memory", max(args.threads), options)


def default_threads() -> list[int]:
    """Returns the thread counts 1 and the number of cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({1, cores})


if __name__ == "__main__":
    main()
