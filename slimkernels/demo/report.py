"""What the demonstration prints and writes: a table, learning curves, and every number as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from slimkernels.durable import write_json

LABELS = {"sft": "SFT (labels only)", "kd": "KD (CE + KL)", "slim": "SLIM (CE + w * KL)"}


def report(results: dict[str, Any], output_dir: Path, console: Console) -> None:
    """Writes ``results.json`` and ``learning_curves.png`` and prints the table.

    Args:
        results: ``store`` and ``heldout``, the ``store.info`` of both; ``students``: for each method its ``curve``,
            a list of ``evaluate_store`` metrics with ``tokens_seen``, and ``train_tokens_per_second``.
        output_dir: Where the two files go.
        console: Where the table goes.
    """
    write_json(output_dir / "results.json", results)
    plot_curves(results, output_dir / "learning_curves.png")
    console.print(results_table(results))


def results_table(results: dict[str, Any]) -> Table:
    """One row per method, last the teacher on the same labels."""
    heldout = results["heldout"]
    table = Table(
        title=f"Held-out: {heldout['documents']} documents, {heldout['rows']:,} labels, from prompts not trained on",
        caption="KL: to the teacher, nats per token. At best: lowest along the curve, on these labels.",
    )
    table.add_column("method", no_wrap=True)
    for name in ("perplexity", "at best\n(after)", "KL", "at best\n(after)", "tokens\nper s", "store\nB/token"):
        table.add_column(name, justify="right")
    for method, student in results["students"].items():
        curve = student["curve"]
        last = curve[-1]
        best_perplexity = min(curve, key=lambda point: point["perplexity"])
        best_kl = min(curve, key=lambda point: point["kl_ghost"])
        table.add_row(
            LABELS[method],
            f"{last['perplexity']:.1f}",
            f"{best_perplexity['perplexity']:.1f} ({best_perplexity['tokens_seen'] / 1000:.0f}k)",
            f"{last['kl_ghost']:.3f}",
            f"{best_kl['kl_ghost']:.3f} ({best_kl['tokens_seen'] / 1000:.0f}k)",
            f"{student['train_tokens_per_second']:,.0f}",
            # The labels alone need no logits.
            "-" if method == "sft" else f"{results['store']['bytes_per_token']:,.0f}",
        )
    table.add_row("teacher", f"{last['teacher_perplexity']:.1f}", "", "0.000", "", "", "", style="dim")
    return table


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """Held-out perplexity and KL to the teacher against the tokens trained on, one line per method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    perplexity, divergence = figure.subplots(1, 2)
    for method, student in results["students"].items():
        # The untrained student's perplexity, about V, would flatten everything else.
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
