"""Compares the speed of two commits of this package on one machine."""

from __future__ import annotations

import contextlib
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import records
from bench.machine import ROOT, commit
from bench.ops.processes import start_worker

# The memory layout of a process shifts its times by more than they vary between rounds, so each side gets several
# processes. Six are the least whose ratios have an interval of 95 % confidence.
LEAST_PAIRS = 6
CONFIDENCE = 0.95


def compare(ref: str, threads: list[int], options: list[str], num_pairs: int = LEAST_PAIRS) -> str:
    """Times the commit ``ref`` and this checkout and returns a report, as ``report`` writes it.

    Args:
        ref: Commit to compare with; it is checked out and built in a temporary folder.
        threads: Thread counts to measure with.
        options: Options for ``bench.ops.worker``.
        num_pairs: Number of pairs of processes, at least ``LEAST_PAIRS``; more of them narrow the intervals.
    """
    with built_worktree(ref) as base, tempfile.TemporaryDirectory() as folder:
        sides = {"old": base, "new": ROOT}
        for pair in range(num_pairs):
            # The second process of a pair finds a warmer machine, so the sides take turns at being second.
            for side in sorted(sides, reverse=pair % 2 == 0):
                print(f"pair {pair + 1} of {num_pairs}: {side}", file=sys.stderr, flush=True)
                for count in threads:
                    out = ["--out", str(Path(folder, f"{side}{pair}.jsonl")), "--ours", "--again"]
                    start_worker(sides[side], "time", count, [*options, *out], quiet=True)
        pairs = [
            tuple(records.read(Path(folder, f"{side}{pair}.jsonl")) for side in ("old", "new"))
            for pair in range(num_pairs)
        ]
        # The base counts as dirty because its bench folder was replaced; its package was not touched.
        return report(pairs, old=commit(base).removesuffix("-dirty"), new=commit(ROOT))


def report(pairs: list[tuple[list[dict], list[dict]]], old: str, new: str) -> str:
    """Returns a line per case and thread count that both commits have, with old time over new time.

    The ratio is the median over the pairs, followed by its interval of at least 95 % confidence; above 1, the new
    commit is faster.

    Args:
        pairs: Results of the old and of the new commit, per pair of processes.
        old: Name of the old commit.
        new: Name of the new commit.
    """
    by_key = [tuple({_key(row): row for row in rows} for rows in pair) for pair in pairs]
    lines = [f"time of {old} over time of {new}; median of {len(pairs)} pairs of processes [95 % interval]"]
    for key, first in by_key[0][1].items():
        if not all(key in side for pair in by_key for side in pair):
            continue
        ratios = [old_rows[key]["p50"] / new_rows[key]["p50"] for old_rows, new_rows in by_key]
        if first["metric"] == "throughput":
            ratios = [1 / ratio for ratio in ratios]
        least, largest = interval_of_median(ratios)
        now = statistics.median(new_rows[key]["p50"] for _, new_rows in by_key)
        lines.append(
            f"{statistics.median(ratios):6.3f}x [{least:.3f}, {largest:.3f}]  {first['op']} {first['shape']} "
            f"{first['dtype']}{' sweep ' + first['sweep'] if first['sweep'] else ''}, {first['threads']} threads: "
            f"{now:.3g} {first['unit']} now"
        )
    return "\n".join(lines)


def interval_of_median(values: list[float]) -> tuple[float, float]:
    """Returns the narrowest pair of order statistics that covers the median with at least 95 % confidence.

    A value lies below the median with probability 1/2, so the number of those that do is binomial, whatever their
    distribution.
    """
    ordered, count = sorted(values), len(values)
    outside, rank = 2 / 2**count, 0
    if outside > 1 - CONFIDENCE:
        raise ValueError(f"values must be at least {LEAST_PAIRS}, got {count}: no interval of 95 % confidence exists")
    while outside + 2 * math.comb(count, rank + 1) / 2**count <= 1 - CONFIDENCE:
        rank += 1
        outside += 2 * math.comb(count, rank) / 2**count
    return ordered[rank], ordered[-1 - rank]


def _key(row: dict) -> tuple:
    return (*records.case_of(row), row["threads"])


@contextlib.contextmanager
def built_worktree(ref: str) -> Iterator[Path]:
    """Yields a checkout of ``ref`` with its own extension but this checkout's benchmarks, and removes it afterwards."""
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "base")
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(root), ref], check=True)
        try:
            print(f"building {ref}", file=sys.stderr, flush=True)
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            built = subprocess.run(build, cwd=root, capture_output=True, text=True, check=False)
            if built.returncode != 0:
                sys.exit(f"{ref} does not build here:\n{built.stderr}")
            shutil.rmtree(root / "bench", ignore_errors=True)
            shutil.copytree(ROOT / "bench", root / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
            yield root
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(root)], check=False)
