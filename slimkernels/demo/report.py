"""Results of the demonstration: a table, learning curves, and every number as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from slimkernels.durable import write_json

LABELS = {"sft": "SFT (labels only)", "kd": "KD (CE + KL)", "slim": "SLIM (CE + w * KL)"}


def report(results: dict[str, Any], output_dir: Path, console: Console) -> None:
    """Writes ``results.json`` and ``learning_curves.png`` and prints the table.

    Args:
        results: Numbers of a run: ``store`` and ``heldout``, the ``store.info`` of both; ``students``, for each method
            its ``curve``, a list of ``evaluate_store`` metrics with ``tokens_seen``, and ``train_tokens_per_second``.
        output_dir: Folder for the two files.
        console: Console to print the table to.
    """
    write_json(output_dir / "results.json", results)
    plot_curves(results, output_dir / "learning_curves.png")
    console.print(results_table(results))


def results_table(results: dict[str, Any]) -> Table:
    """Returns a table with one row per method and one for the teacher; it fits 80 columns."""
    heldout = results["heldout"]
    table = Table(
        title=f"Held-out: {heldout['documents']} documents, {heldout['rows']:,} labels, from prompts not trained on",
        caption=(
            "SFT: labels only. KD: cross-entropy + KL. SLIM: cross-entropy + w * KL. KL: divergence from the teacher, "
            "nats per token. Lowest: over the learning curve, on these labels, after so many tokens."
        ),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("method")
    for name in ("perplexity", "lowest\n(after)", "KL", "lowest\n(after)", "tokens\nper s", "store\nB/token"):
        table.add_column(name, justify="right", overflow="fold")
    for method, student in results["students"].items():
        curve = student["curve"]
        last = curve[-1]
        table.add_row(
            method.upper(),
            _perplexity(last["perplexity"]),
            _lowest(curve, "perplexity", _perplexity),
            f"{last['kl_ghost']:.3f}",
            _lowest(curve, "kl_ghost", "{:.3f}".format),
            f"{student['train_tokens_per_second']:,.0f}",
            # Training on the labels alone needs no store.
            "-" if method == "sft" else f"{results['store']['bytes_per_token']:,.0f}",
        )
    table.add_row("teacher", _perplexity(last["teacher_perplexity"]), "", "0.000", "", "", "", style="dim")
    return table


def _lowest(curve: list[dict[str, float]], metric: str, form: Callable[[float], str]) -> str:
    point = min(curve, key=lambda point: point[metric])
    return f"{form(point[metric])} ({point['tokens_seen'] / 1000:.0f}k)"


def _perplexity(value: float) -> str:
    if value < 1000:
        return f"{value:.1f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """Draws held-out perplexity and KL to the teacher over the tokens trained on, one line per method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    perplexity, divergence = figure.subplots(1, 2)
    for method, student in results["students"].items():
        # The untrained student's perplexity, about V, would compress the rest of the curve.
        curve = [point for point in student["curve"] if point["tokens_seen"]]
        seen = [point["tokens_seen"] for point in curve]
        for axes, name in ((perplexity, "perplexity"), (divergence, "kl_ghost")):
            axes.plot(seen, [point[name] for point in curve], marker="o", markersize=3, label=LABELS[method])
    perplexity.axhline(curve[-1]["teacher_perplexity"], color="grey", linestyle=":", label="teacher")
    perplexity.set(yscale="log", ylabel="held-out perplexity")
    divergence.set(ylabel="held-out KL(teacher || student), nats per token")
    for axes in (perplexity, divergence):
        axes.set_xlabel("tokens trained on")
        axes.grid(alpha=0.3)
    perplexity.legend()
    figure.savefig(path, dpi=120)
