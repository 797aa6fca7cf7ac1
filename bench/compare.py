"""Two commits of this package, timed in turn on one machine."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import records
from bench.machine import ROOT, commit

# A process has its own memory layout, which moves a time by more than its rounds tell; hence several of each.
PAIRS = 5


def compare(ref: str, threads: list[int], options: list[str]) -> str:
    """Lines with old time over new time for every case that both commits have: above 1, the new one is faster."""
    from bench.run import start_worker

    with built_worktree(ref) as base, tempfile.TemporaryDirectory() as folder:
        sides = {"old": base, "new": ROOT}
        for pair in range(PAIRS):
            # Whoever goes second finds the machine warmer: take turns at that, too.
            for side in sorted(sides, reverse=pair % 2 == 0):
                print(f"pair {pair + 1} of {PAIRS}: {side}", file=sys.stderr, flush=True)
                for count in threads:
                    out = ["--out", str(Path(folder, f"{side}{pair}.jsonl")), "--ours", "--again"]
                    start_worker(sides[side], "time", count, [*options, *out], quiet=True)
        pairs = [
            tuple(records.read(Path(folder, f"{side}{pair}.jsonl")) for side in ("old", "new")) for pair in range(PAIRS)
        ]
        # Only its benchmarks were replaced.
        return report(pairs, old=commit(base).removesuffix("-dirty"), new=commit(ROOT))


def report(pairs: list[tuple[list[dict], list[dict]]], old: str, new: str) -> str:
    """One line per case and thread count: the median ratio of the pairs, with the least and the largest."""
    by_key = [tuple({_key(row): row for row in rows} for rows in pair) for pair in pairs]
    lines = [f"time of {old} over time of {new}; median of {len(pairs)} pairs of processes [least, largest]"]
    for key, first in by_key[0][1].items():
        if not all(key in side for pair in by_key for side in pair):
            continue
        ratios = [old_rows[key]["p50"] / new_rows[key]["p50"] for old_rows, new_rows in by_key]
        if first["metric"] == "throughput":
            ratios = [1 / ratio for ratio in ratios]
        now = statistics.median(new_rows[key]["p50"] for _, new_rows in by_key)
        lines.append(
            f"{statistics.median(ratios):6.2f}x [{min(ratios):.2f}, {max(ratios):.2f}]  {first['op']} {first['shape']} "
            f"{first['dtype']}{' sweep ' + first['sweep'] if first['sweep'] else ''}, {first['threads']} threads: "
            f"{now:.3g} {first['unit']} now"
        )
    return "\n".join(lines)


def _key(row: dict) -> tuple:
    return (*records.case_of(row), row["threads"])


@contextlib.contextmanager
def built_worktree(ref: str) -> Iterator[Path]:
    """A checkout of ``ref`` with its own extension and this checkout's benchmarks, removed afterwards."""
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
