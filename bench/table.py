"""Writes the README's table from the newest figures in a JSONL file.

python -m bench.table --results bench/results/cpu.jsonl --readme README.md [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"


def newest(rows: list[dict]) -> dict[tuple, dict]:
    """The last row of every figure."""
    latest: dict[tuple, dict] = {}
    for row in rows:
        latest[tuple(row[key] for key in ("op", "shape", "dtype", "mode", "provider", "metric", "threads"))] = row
    return latest


def table(rows: list[dict]) -> str:
    """Markdown: one line per case, ratios to the peer measured in the same run."""
    latest = newest(rows)
    lines = [
        "| op | shape | dtype | time | peer | speed-up | peak extra memory, ours / peer |",
        "|---|---|---|---:|---|---:|---:|",
    ]
    for (op, shape, dtype, mode, provider, metric, threads), row in latest.items():
        if provider != "slimkernels" or metric != "time":
            continue
        peer = latest[op, shape, dtype, mode, row["peer"], "time", threads]
        memory = ""
        ours = latest.get((op, shape, dtype, mode, provider, "peak_extra_memory", threads))
        if ours is not None:
            theirs = latest[op, shape, dtype, mode, row["peer"], "peak_extra_memory", threads]
            memory = f"{ours['p50'] / 2**20:.0f} / {theirs['p50'] / 2**20:.0f} MiB"
        lines.append(
            f"| `{op}` {mode} | {shape} | {dtype} | {row['p50']:.1f} ms | {row['peer']} {peer['p50']:.1f} ms | "
            f"{peer['p50'] / row['p50']:.1f}x | {memory} |"
        )
    row = next(iter(latest.values()))
    lines += [
        "",
        f"Medians on {row['threads']} threads of {row['device']}, {row['isa']}, torch {row['torch']}, commit "
        f"{row['commit']}, {row['date'][:10]}; providers take turns in one run. Every figure, with spread and floor, "
        "is in [bench/results](bench/results).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--readme", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="fail where the README is not what the results say")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.results.read_text().splitlines()]
    text = args.readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    updated = f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"
    if args.check:
        sys.exit(updated != text and f"{args.readme} does not show {args.results}: run `make plots`")
    args.readme.write_text(updated)


if __name__ == "__main__":
    main()
