"""Writes the tables of README and docs from the newest figures in bench/results.

python -m bench.table --results bench/results [--documents README.md docs/speed.md] [--check]

A document names a block by its markers, ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; what stands between them is
replaced. Without ``--documents`` these are the README and all of docs/.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from bench import gpu_model, overview, records
from bench.blocks import BLOCKS
from bench.claims import advice, claims_table
from bench.machine import ROOT
from bench.ops.case import OURS
from bench.ops_table import ops_table

FIGURES = {
    "speedup.png": "Speed-up over every peer, per case",
    "roofline.png": "Bytes and flops per second that the ops reach, and those that the machine was measured to reach",
    "growth.png": "Time over N, V and K, with fitted exponents",
}

CUDA_PREFIX = "cuda_"
# Generated text names figures and documents from the root of the repository.
RESULTS_LINK, WIDTH = "](bench/results", 120
_NO_BREAK = "\N{NO-BREAK SPACE}"


def speed_table(rows: list[dict], figures: tuple[str, ...] = ()) -> str:
    """Returns one line per case, of one commit on one machine; ratios are to the peer measured in the same run."""
    cases = [case for case in records.newest_cases(rows) if case.row.get("sweep") is None]
    threads = sorted({count for case in cases for count in case.threads})
    on_gpu = any(case.row["isa"].startswith(("sm_", "gfx")) for case in cases)
    # Title and alignment of every column, with its cell in every line.
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
        ("time over its lower bound", "---:"): [
            _per_threads([case.over_floor(count) for count in threads], "x") for case in cases
        ],
        ("host time to launch it", "---:"): [_host(case, threads) for case in cases],
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
        "Lower bound: the time to move the bytes that must move, at the bandwidth of a copy, or to do the arithmetic, "
        "at the rate of a matrix product, whichever is longer; both rates are measured together with the case. "
    )
    lines += [
        "",
        f"Medians on {machines}; {'commits' if several else 'commit'} {named}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; providers take turns in one run. "
        f"{floor if ('time over its lower bound', '---:') in columns else ''}"
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


def _host(case: records.CaseRecord, threads: list[int]) -> str:
    """Returns the host's time to launch our op, for devices that work while the host goes on; nothing for others."""
    timings = [case.timing(OURS, count) for count in threads]
    times = [timing.get("host_ms") if timing else None for timing in timings]
    return _per_threads([None if ms is None else 1e3 * ms for ms in times], " \N{MICRO SIGN}s")


def _per_threads(values: list[float | None], unit: str) -> str:
    """Returns text such as 5.0 / 2.6 ms; a dash for a thread count that was not measured, nothing where none was."""
    if all(value is None for value in values):
        return ""
    return " / ".join("-" if value is None else f"{value:.{0 if value >= 100 else 1}f}" for value in values) + unit


def _memory(case: records.CaseRecord) -> str:
    ours = case.peak_bytes(OURS)
    theirs = case.peak_bytes(case.row["peer"])
    return "" if ours is None or theirs is None else f"{ours / 2**20:.0f} / {theirs / 2**20:.0f} MiB"


def all_blocks(results: Path) -> dict[str, str]:
    """Returns every block that the results have figures for, by its name."""
    blocks = {"ops": ops_table()}
    for device, name, prefix in (("cpu", "bench", ""), ("cuda", "bench-cuda", CUDA_PREFIX)):
        if rows := records.read(results / f"{device}.jsonl"):
            figures = tuple(prefix + figure for figure in FIGURES if (results / f"{prefix}{figure}").exists())
            blocks[name] = speed_table(rows, figures)
    for name, show in BLOCKS.items():
        if rows := records.read(results / f"{name}.jsonl"):
            blocks[name.replace("_", "-")] = show(rows)
    if rows := records.read(results / "methods.jsonl"):
        blocks["advice"] = advice(rows)
    if (counts := results / gpu_model.COMMITTED.name).exists():
        blocks["gpu-model"] = gpu_model.markdown_table(gpu_model.committed_results(counts))
    blocks["claims"] = claims_table(results)
    if found := overview.Results.read(results):
        blocks["headline"] = overview.headline(found)
        blocks["overview"] = overview.summary_table(found)
    return blocks


def with_blocks(text: str, blocks: dict[str, str], to_results: str) -> str:
    """Returns a document with the blocks that it has markers for replaced.

    Args:
        text: The document.
        blocks: Content by name.
        to_results: Path from the document's folder to that of the results.
    """
    for name, content in blocks.items():
        if f"<!-- {name}:begin -->" in text:
            content = content.replace(RESULTS_LINK, f"]({to_results}")
            text = replace_block(text, name, "\n".join(map(_wrapped, content.splitlines())))
    return text


def replace_block(text: str, name: str, content: str) -> str:
    """Returns the text with what stands between the markers of a block replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def _wrapped(line: str) -> str:
    """Breaks a line of prose; tables, figures and HTML stay on one line."""
    if line.startswith(("|", "!", "<")):
        return line
    indent = "  " if line.startswith("- ") else ""
    # Commands in backticks stay on one line.
    line = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", _NO_BREAK), line)
    filled = textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return filled.replace(_NO_BREAK, " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the JSONL")
    parser.add_argument(
        "--documents",
        type=Path,
        nargs="+",
        default=[ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))],
        help="files to write (default: README.md and docs/*.md)",
    )
    parser.add_argument("--check", action="store_true", help="fail where a document is not what the results say")
    args = parser.parse_args()
    blocks = all_blocks(args.results)
    for document in args.documents:
        text = document.read_text()
        updated = with_blocks(text, blocks, os.path.relpath(args.results, document.parent))
        if args.check and updated != text:
            sys.exit(f"{document} does not show {args.results}: run `make plots`")
        if updated != text:
            document.write_text(updated)


if __name__ == "__main__":
    main()
