"""Times every case beside its peers and appends one JSON line per figure, or compares two commits.

python -m bench.run --out bench/results/cpu.jsonl [--only topk] [--quick] [--rounds 7] [--threads 1 2] [--again]
python -m bench.run --out bench/results/cuda.jsonl --device cuda [--only topk] [--rounds 51]
python -m bench.run --base main [--only topk] [--threads 2]

A case that the file has from the same commit, machine and thread count is skipped, so that an interrupted run goes on
where it stopped; ``--again`` measures it once more.

Times are taken in processes whose allocator keeps its pages: a fresh page costs more than the arithmetic on it, and
whether an output of tens of megabytes gets fresh ones depends on what ran before. Peak memory is taken on the most
threads, in a process whose allocator returns pages at once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from bench.machine import ROOT

KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
RETURN_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSONL file to append to")
    parser.add_argument("--base", metavar="REF", help="compare this checkout with that commit, instead of writing rows")
    parser.add_argument(
        "--rounds", type=int, help="timed runs of every provider, at least 5 (default 7; with --base 31; on cuda 51)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda has cases of its own")
    parser.add_argument("--threads", type=int, nargs="+", default=default_threads(), help="one process each")
    parser.add_argument(
        "--only", default="", help="the cases whose name contains this, such as slim_loss-256x32000 or -float16"
    )
    parser.add_argument("--quick", action="store_true", help="the smallest shape of every op only")
    parser.add_argument("--again", action="store_true", help="also what the file already has")
    args = parser.parse_args()
    if (args.out is None) == (args.base is None):
        parser.error("one of --out and --base is needed")
    # A ratio between processes has no turns within a round to lean on, and only ours to time.
    args.rounds = args.rounds or (31 if args.base else 51 if args.device == "cuda" else 7)
    if args.rounds < 5:
        parser.error(f"--rounds must be at least 5 for percentiles that mean something, got {args.rounds}")
    options = ["--rounds", str(args.rounds), "--only", args.only, *(["--quick"] if args.quick else [])]
    if args.device == "cuda":  # said only then: an older commit does not know the option
        args.threads = [1]  # one process; the host's threads only launch
        options += ["--device", "cuda"]
    if args.base:
        from bench.compare import compare

        print(compare(args.base, args.threads, options))
        return
    options += ["--out", str(args.out.resolve()), *(["--again"] if args.again else [])]
    for threads in args.threads:
        start_worker(ROOT, "time", threads, options)
    start_worker(ROOT, "memory", max(args.threads), options)


def default_threads() -> list[int]:
    """One core and all of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({1, cores})


def start_worker(root: Path, metric: str, threads: int, options: list[str], quiet: bool = False) -> None:
    """Runs ``bench.ops.worker`` of the checkout at ``root``."""
    environment = os.environ | (KEEP_PAGES if metric == "time" else RETURN_PAGES)
    environment |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(root)}
    # Compiled code is cached without regard to the thread count that it has baked in.
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(ROOT / "build" / f"inductor-{threads}-threads")
    command = [sys.executable, "-m", "bench.ops.worker", "--metric", metric, "--threads", str(threads), *options]
    output = subprocess.DEVNULL if quiet else None
    subprocess.run(command, cwd=root, env=environment, stdout=output, check=True)


if __name__ == "__main__":
    main()
