"""Writes the README's tables from the newest figures in bench/results.

python -m bench.table --results bench/results --readme README.md [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

METHODS = {"sft": "SFT: labels only", "kd": "KD: labels + top 5 % logits", "slim": "SLIM: adaptive weight"}


def newest(rows: list[dict], keys: tuple[str, ...]) -> dict[tuple, dict]:
    """The last row of every figure."""
    latest: dict[tuple, dict] = {}
    for row in rows:
        latest[tuple(row[key] for key in keys)] = row
    return latest


def speed_table(rows: list[dict]) -> str:
    """One line per case, ratios to the peer measured in the same run."""
    latest = newest(rows, ("op", "shape", "dtype", "mode", "provider", "metric", "threads"))
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
    row = rows[-1]
    lines += [
        "",
        f"Medians on {row['threads']} threads of {row['device']}, {row['isa']}, torch {row['torch']}, commit "
        f"{row['commit']}, {row['date'][:10]}; providers take turns in one run. Every figure, with spread and floor, "
        "is in [bench/results](bench/results).",
    ]
    return "\n".join(lines)


def demo_table(rows: list[dict]) -> str:
    """What the demo's students reached on documents that none of them was trained on."""
    latest = newest(rows, ("method",))
    lines = ["| student | held-out perplexity | KL to the teacher | at its best |", "|---|---:|---:|---:|"]
    for (method,), row in latest.items():
        last = row["curve"][-1]
        best = min(row["curve"], key=lambda point: point["perplexity"])
        lines.append(
            f"| {METHODS[method]} | {last['perplexity']:.0f} | {last['kl_ghost']:.2f} nats | "
            f"{best['perplexity']:.0f}, {best['kl_ghost']:.2f} nats after {best['tokens_seen'] / 1000:.0f}k tokens |"
        )
    row = rows[-1]
    lines += [
        "",
        f"One `make demo`: SmolLM2-135M-Instruct (held-out perplexity {row['teacher_perplexity']:.1f}) writes "
        f"{row['train_rows']:,} tokens; the same small randomly initialised student learns from them three ways, and "
        f"is measured on {row['heldout_rows']:,} tokens from other prompts. One seed, so read differences of a few per "
        f"cent as none. Its logits take {row['store_bytes_per_token'] / 1000:.1f} kB per token, "
        f"{row['store_bits_per_entry']:.2f} bits per kept entry. {row['device']}, {row['threads']} threads, "
        f"{row['date'][:10]}.",
    ]
    return "\n".join(lines)


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
    updated = text
    for name, file, draw in (("bench", "cpu.jsonl", speed_table), ("demo", "demo.jsonl", demo_table)):
        rows = [json.loads(line) for line in (args.results / file).read_text().splitlines()]
        updated = replace_block(updated, name, draw(rows))
    if args.check:
        sys.exit(updated != text and f"{args.readme} does not show {args.results}: run `make plots`")
    args.readme.write_text(updated)


if __name__ == "__main__":
    main()
