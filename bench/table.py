"""Writes the README's tables from the newest figures in bench/results.

python -m bench.table --results bench/results --readme README.md [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from bench import records
from bench.blocks import BLOCKS
from bench.ops.case import OURS
from bench.ops_table import ops_table

FIGURES = {
    "speedup.png": "Speed-up over every peer, per case",
    "roofline.png": "Achieved bytes and flops per second beside what the machine was measured to reach",
    "growth.png": "Time over N, V and K, with fitted exponents",
}

CUDA_PREFIX = "cuda_"


def speed_table(rows: list[dict], figures: tuple[str, ...] = ()) -> str:
    """One line per case, each from one commit on one machine; ratios are to the peer measured in the same run."""
    cases = [case for case in records.newest_cases(rows) if case.row.get("sweep") is None]
    threads = sorted({count for case in cases for count in case.threads})
    on_gpu = any(case.row["isa"].startswith(("sm_", "gfx")) for case in cases)
    # The title and alignment of every column, and its cell in every line.
    columns = {
        ("op", "---"): [f"`{case.row['op']}` {case.row['mode']}" for case in cases],
        ("shape", "---"): [case.row["shape"] for case in cases],
        ("dtype", "---"): [case.row["dtype"] for case in cases],
        ("time" if on_gpu else f"on {' / '.join(map(str, threads))} threads", "---:"): [
            _figures(case, threads) for case in cases
        ],
        ("peer", "---"): [case.row["peer"] or "" for case in cases],
        ("speed-up", "---:"): [
            _per_threads([case.speedup(case.row["peer"], count) for count in threads], "x") for case in cases
        ],
        ("times the floor", "---:"): [
            _per_threads([case.over_floor(count) for count in threads], "x") for case in cases
        ],
        ("peak extra memory, ours / peer", "---:"): [_memory(case) for case in cases],
    }
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    lines = [_line(title for title, _ in columns), f"|{'|'.join(rule for _, rule in columns)}|"]
    lines += [_line(cells) for cells in zip(*columns.values(), strict=True)]
    commits = Counter(case.row["commit"] for case in cases)
    several = len(commits) > 1
    named = ", ".join(commit + (f" ({count} cases)" if several else "") for commit, count in commits.items())
    machines = "; ".join(
        dict.fromkeys(f"{case.row['device']}, {case.row['isa']}, torch {case.row['torch']}" for case in cases)
    )
    dates = sorted({case.row["date"][:10] for case in cases})
    floor = (
        "Floor: the bytes that must move over the copy bandwidth, or the flops over the matrix rate, both measured "
        "beside the case, whichever takes longer. "
    )
    lines += [
        "",
        f"Medians on {machines}; {'commits' if several else 'commit'} {named}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; providers take turns in one run. "
        f"{floor if ('times the floor', '---:') in columns else ''}"
        "Every figure, with its spread, is in [bench/results](bench/results).",
    ]
    for name in figures:
        lines += ["", f"![{FIGURES[name.removeprefix(CUDA_PREFIX)]}](bench/results/{name})"]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figures(case: records.CaseRecord, threads: list[int]) -> str:
    timings = [case.timing(OURS, count) for count in threads]
    return _per_threads([timing and timing["p50"] for timing in timings], f" {case.row['unit']}")


def _per_threads(values: list[float | None], unit: str) -> str:
    """5.0 / 2.6 ms; a dash for a thread count that was not measured, nothing where none was."""
    if all(value is None for value in values):
        return ""
    return " / ".join("-" if value is None else f"{value:.{0 if value >= 100 else 1}f}" for value in values) + unit


def _memory(case: records.CaseRecord) -> str:
    ours = case.peak_bytes(OURS)
    theirs = case.peak_bytes(case.row["peer"])
    return "" if ours is None or theirs is None else f"{ours / 2**20:.0f} / {theirs / 2**20:.0f} MiB"


def replace_block(text: str, name: str, content: str) -> str:
    """The text with what stands between the markers of a block replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--readme", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="fail where the README is not what the results say")
    args = parser.parse_args()
    text = args.readme.read_text()
    updated = replace_block(text, "ops", ops_table())
    for device, block, prefix in (("cpu", "bench", ""), ("cuda", "bench-cuda", CUDA_PREFIX)):
        rows = records.read(args.results / f"{device}.jsonl")
        if rows:
            figures = tuple(prefix + name for name in FIGURES if (args.results / f"{prefix}{name}").exists())
            updated = replace_block(updated, block, speed_table(rows, figures))
    for name, show in BLOCKS.items():
        if rows := records.read(args.results / f"{name}.jsonl"):
            updated = replace_block(updated, name.replace("_", "-"), show(rows))
    if args.check:
        sys.exit(updated != text and f"{args.readme} does not show {args.results}: run `make plots`")
    args.readme.write_text(updated)


if __name__ == "__main__":
    main()
