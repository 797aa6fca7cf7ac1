"""Results of the demonstration: tables, every model's text, learning curves, and every number as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slimkernels.durable import write_json

LABELS = {"sft": "SFT (labels only)", "kd": "KD (CE + KL)", "slim": "SLIM (CE + w * KL)"}


def report(results: dict[str, Any], output_dir: Path, console: Console) -> None:
    """Writes ``results.json`` and ``learning_curves.png`` and prints the tables.

    Args:
        results: Numbers of a run: ``heldout``, its ``store.info``; ``before``, the metrics of ``evaluate_store`` of the
            student that every method starts from; ``students``, for each method its ``curve``, a list of such metrics
            with ``tokens_seen``, ``kd_weight`` and ``train_tokens_per_second``; ``prompt``, ``teacher_text`` and the
            ``shown`` text of every student.
        output_dir: Folder for the two files.
        console: Console to print the tables to.
    """
    write_json(output_dir / "results.json", results)
    plot_curves(results, output_dir / "learning_curves.png")
    for table in (results_table(results), curve_table(results), texts_table(results)):
        console.print(table)
        console.print()


def results_table(results: dict[str, Any]) -> Table:
    """Returns a table with a row for the student before training, one per method, and one for the teacher."""
    heldout, before = results["heldout"], results["before"]
    table = _table(
        f"Held-out: {heldout['documents']} documents, {heldout['rows']:,} labels, from prompts not trained on",
        "KL to the teacher: nats per token. SFT: cross-entropy of the labels. KD and SLIM: the same + weight * KL. "
        "SLIM weights every token by itself; KD's weight is the mean of SLIM's, so both give the KL the same share. "
        "Nothing was tuned on this text, and one seed cannot tell close methods apart.",
    )
    table.add_column("model")
    for name in ("perplexity", "KL to\nthe teacher", "weight\nof the KL", "trained on\ntokens", "tokens\nper s"):
        table.add_column(name, justify="right")
    table.add_row("before", _perplexity(before["perplexity"]), f"{before['kl_ghost']:.3f}", "-", "0", "")
    for method, student in results["students"].items():
        last = student["curve"][-1]
        table.add_row(
            method.upper(),
            _perplexity(last["perplexity"]),
            f"{last['kl_ghost']:.3f}",
            "-" if method == "sft" else f"{student['kd_weight']:.2f}{' (mean)' * (method == 'slim')}",
            f"{last['tokens_seen']:,}",
            f"{student['train_tokens_per_second']:,.0f}",
        )
    table.add_row("teacher", _perplexity(before["teacher_perplexity"]), "0.000", "", "", "", style="dim")
    return table


def curve_table(results: dict[str, Any]) -> Table:
    """Returns the held-out perplexity and KL of every method after so many tokens."""
    table = _table("Curve: perplexity, KL to the teacher", None)
    table.add_column("tokens", justify="right")
    for method in results["students"]:
        table.add_column(method.upper(), justify="right")
    for points in zip(*(student["curve"] for student in results["students"].values()), strict=True):
        cells = [f"{_perplexity(point['perplexity'])}, {point['kl_ghost']:.2f}" for point in points]
        table.add_row(f"{points[0]['tokens_seen']:,}", *cells)
    return table


def texts_table(results: dict[str, Any]) -> Table:
    """Returns what every model writes after the same prompt."""
    table = _table(f'"{results["prompt"]}", continued with the same random numbers', None)
    table.add_column("model")
    table.add_column("text", overflow="fold", min_width=60)
    texts = {"before": results["before"]["shown"]}
    texts |= {method.upper(): student["shown"] for method, student in results["students"].items()}
    for name, text in (texts | {"teacher": results["teacher_text"]}).items():
        shown = " ".join(text.removeprefix(results["prompt"]).split())
        # The text of a ruined model may hold characters that move the cursor.
        table.add_row(name, Text("".join(letter if letter.isprintable() else "?" for letter in shown)))
    return table


def _table(title: str, caption: str | None) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )


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
        # The perplexity before training, in the thousands, would compress the rest of the curve.
        curve = [point for point in student["curve"] if point["tokens_seen"]]
        seen = [point["tokens_seen"] for point in curve]
        for axes, name in ((perplexity, "perplexity"), (divergence, "kl_ghost")):
            axes.plot(seen, [point[name] for point in curve], marker="o", markersize=3, label=LABELS[method])
    before = results["before"]
    perplexity.axhline(before["teacher_perplexity"], color="grey", linestyle=":", label="teacher")
    perplexity.set(yscale="log", ylabel="held-out perplexity", title=f"before: {_perplexity(before['perplexity'])}")
    divergence.set(ylabel="held-out KL to the teacher, nats per token", title=f"before: {before['kl_ghost']:.2f}")
    for axes in (perplexity, divergence):
        axes.set_xlabel("tokens trained on")
        axes.grid(alpha=0.3)
    perplexity.legend()
    figure.savefig(path, dpi=120)
