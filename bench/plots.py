"""Draws every figure from the committed results alone.

python -m bench.plots --results bench/results
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench import overview, records
from bench.ops.case import OURS
from bench.records import CaseRecord
from bench.reproduce.sample_efficiency_plot import sample_efficiency

SHORT_DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}
# A peer keeps its colour wherever it appears.
PALETTE = [*mpl.colormaps["tab10"].colors, *mpl.colormaps["Set2"].colors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the JSONL, which gets the figures")
    args = parser.parse_args()
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    for device, prefix in (("cpu", ""), ("cuda", "cuda_")):
        if (args.results / f"{device}.jsonl").exists():
            draw_all(args.results, records.newest_cases(records.read(args.results / f"{device}.jsonl")), prefix)
    if rows := records.read(args.results / "sample_efficiency.jsonl"):
        _save(sample_efficiency(rows), args.results / "sample_efficiency.png")
    if found := overview.Results.read(args.results):
        _save(overview.overview_figure(found), args.results / "overview.png")


def draw_all(folder: Path, cases: list[CaseRecord], prefix: str) -> None:
    """Writes the figures of one device's cases."""
    whole = [case for case in cases if case.row.get("sweep") is None]
    for name, draw, chosen in (
        ("speedup.png", speedups, [case for case in whole if case.peers]),
        # Older rows have no floor and cannot be placed.
        ("roofline.png", roofline, [case for case in whole if case.row.get("copy_bytes_per_s")]),
        ("growth.png", growth, [case for case in cases if case.row.get("sweep")]),
    ):
        path = folder / f"{prefix}{name}"
        if not chosen:
            print(f"{path}: not drawn, the results have no such cases")
            continue
        _save(draw(chosen), path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    print(path)


def speedups(cases: list[CaseRecord]) -> plt.Figure:
    """Draws one bar per peer, on the most threads of the case; ours is faster where a bar reaches to the right of 1."""
    names = list(dict.fromkeys(name for case in cases for name in case.peers))
    colours = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}
    heights = [len(case.peers) + 1 for case in cases]
    figure, axes = plt.subplots(figsize=(9, 0.17 * sum(heights) + 1.2))
    at, ticks, labels = 0, [], []
    for case in cases:
        first = at
        for name in case.peers:
            ratio = case.speedup(name, case.threads[-1])
            if ratio is not None:
                axes.barh(at, ratio - 1, left=1, height=0.9, color=colours[name])
                _write(axes, max(ratio, 1), at, f"{ratio:.{1 if ratio > 2 else 2}f}")
            at += 1
        ticks.append((first + at - 1) / 2)
        labels.append(_label(case))
        at += 1
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    marks = (0.5, 1, 2, 3, 5, 10, 20, 30, 50)
    axes.xaxis.set_major_locator(FixedLocator(marks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_yticks(ticks, labels)
    axes.set_ylim(at - 0.5, -1)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("time of the peer over time of ours, same run")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    axes.legend(handles, names, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False, fontsize=8)
    axes.set_title(
        _caption(cases, f"{_threads(cases)} threads"), fontsize=8, loc="left", y=-0.9 / figure.get_figheight()
    )
    return figure


def roofline(cases: list[CaseRecord]) -> plt.Figure:
    """Draws the bytes and flops per second that ours reaches, with the rate that the machine was measured to reach."""
    bound = {True: [], False: []}
    for case in cases:
        bound[bool(case.row["matmul_flops_per_s"])].append(case)
    panels = [(flops, chosen) for flops, chosen in ((False, bound[False]), (True, bound[True])) if chosen]
    heights = [sum(len(case.threads) + 0.6 for case in chosen) + 2 for _, chosen in panels]
    figure, all_axes = plt.subplots(
        len(panels), 1, figsize=(9, 0.19 * sum(heights) + 1), height_ratios=heights, squeeze=False, layout="constrained"
    )
    most = _threads(cases)
    for axes, (flops, chosen) in zip(all_axes[:, 0], panels, strict=True):
        at, ticks, labels = 0.0, [], []
        for case in chosen:
            first = at
            for count in case.threads:
                row = case.timing(OURS, count)
                limit = row["matmul_flops_per_s"] if flops else row["copy_bytes_per_s"]
                amount = (row["floor_flops"] if flops else row["floor_bytes"]) / 1e9
                achieved = amount / _seconds(row)
                axes.barh(at, achieved, height=0.9, color=PALETTE[0], alpha=1 if count == most else 0.5)
                axes.plot([limit / 1e9] * 2, [at - 0.5, at + 0.5], color="black", linewidth=1.5)
                share = f"{achieved:.0f}, {1e9 * achieved / limit:.0%} of {limit / 1e9:.0f}"
                _write(axes, max(achieved, limit / 1e9), at, f"{share}, {count} thread{'s' * (count > 1)}")
                at += 1
            ticks.append((first + at - 1) / 2)
            labels.append(_label(case))
            at += 0.6
        axes.set_yticks(ticks, labels)
        axes.set_ylim(at - 0.5, -0.8)
        axes.margins(x=0.22)
        axes.set_xlim(left=0)
        axes.set_xlabel("GFLOP/s of the matrix products" if flops else "GB/s of what must be read and written")
    all_axes[0, 0].set_title(
        "Achieved rates of ours (bars) and the machine's measured rate on as many threads (ticks)\n"
        + _caption(cases, "floor bytes and flops"),
        fontsize=8,
        loc="left",
    )
    return figure


def growth(cases: list[CaseRecord]) -> plt.Figure:
    """Draws log-log curves over N, V and K, on one thread and on the most, with least-squares exponents."""
    threads = sorted({count for case in cases for count in case.threads})
    ops = list(dict.fromkeys(case.row["op"] for case in cases))
    letters = [letter for letter in "NVK" if any(case.row["sweep"] == letter for case in cases)]
    figure, all_axes = plt.subplots(
        1, len(letters), figsize=(4 * len(letters), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, letter in zip(all_axes[0], letters, strict=True):
        marks: set[int] = set()
        for index, op in enumerate(ops):
            chosen = [case for case in cases if case.row["op"] == op and case.row["sweep"] == letter]
            for count in threads:
                points = sorted(
                    (case.row["sizes"][letter], case.timing(OURS, count)) for case in chosen if case.timing(OURS, count)
                )
                if len(points) < 2:
                    continue
                sizes = [size for size, _ in points]
                marks.update(sizes)
                middle = [row["p50"] for _, row in points]
                spread = [[m - row["p20"] for m, (_, row) in zip(middle, points, strict=True)]]
                spread.append([row["p80"] - m for m, (_, row) in zip(middle, points, strict=True)])
                exponent = records.fitted_exponent(list(zip(sizes, middle, strict=True)))
                axes.errorbar(
                    sizes,
                    middle,
                    yerr=spread,
                    marker="o",
                    markersize=4,
                    linestyle="-" if count == threads[-1] else "--",
                    color=PALETTE[index],
                    label=f"{op}, {count} thread{'s' * (count > 1)}: ${letter}^{{{exponent:.2f}}}$",
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted(marks)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.tick_params(axis="x", labelrotation=30 if len(marks) > 3 else 0)
        axes.set_xlabel(letter)
        axes.grid(which="both", linewidth=0.3)
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.16), handlelength=3)
    all_axes[0, 0].set_ylabel("ms, median with p20 and p80")
    figure.suptitle(_caption(cases, _middle(cases)), fontsize=8)
    return figure


def _write(axes: plt.Axes, x: float, y: float, text: str) -> None:
    """Writes a small number at the end of a bar."""
    axes.annotate(text, (x, y), (3, 0), textcoords="offset points", va="center", size=7)


def _seconds(row: dict) -> float:
    """Returns the time of a call in seconds; a throughput is converted by its floor, which has the same unit."""
    floor_seconds = row["floor_bytes"] / row["copy_bytes_per_s"]
    return row["p50"] / 1e3 if row["unit"] == "ms" else floor_seconds * row["floor"] / row["p50"]


def _label(case: CaseRecord) -> str:
    row = case.row
    return f"{row['op']} {row['shape'].partition(' ')[0]} {SHORT_DTYPES[row['dtype']]}"


def _threads(cases: list[CaseRecord]) -> int:
    return max(case.threads[-1] for case in cases)


def _middle(cases: list[CaseRecord]) -> str:
    """Returns the sizes that do not vary, for every op."""
    texts = []
    for op in dict.fromkeys(case.row["op"] for case in cases):
        points = [case.row["sizes"] for case in cases if case.row["op"] == op]
        middle = {letter: sorted(sizes[letter] for sizes in points)[len(points) // 2] for letter in points[0]}
        texts.append(f"{op} around " + ", ".join(f"{letter}={size}" for letter, size in middle.items()))
    return "; ".join(texts)


def _caption(cases: list[CaseRecord], what: str) -> str:
    machines = dict.fromkeys(f"{case.row['device']}, {case.row['isa']}" for case in cases)
    commits = dict.fromkeys(case.row["commit"] for case in cases)
    return f"{what}; {'; '.join(machines)}; commit {', '.join(commits)}"


if __name__ == "__main__":
    main()
