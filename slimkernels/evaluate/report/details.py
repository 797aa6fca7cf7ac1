"""Everything that was measured on one task, in a table with a row per arm, and what its columns mean."""

from __future__ import annotations

from collections.abc import Sequence

from slimkernels.evaluate.cell import NO_DECODER
from slimkernels.evaluate.heldout import LOSS
from slimkernels.evaluate.published_outputs import DECODER as OUTPUTS
from slimkernels.evaluate.report.blocks import Block, Cell, Chart, Heading, Paragraph, Table, mark_best
from slimkernels.evaluate.report.charts import dot_chart
from slimkernels.evaluate.report.formats import UNKNOWN, number, percent, perplexity_cells, perplexity_text, score_cells
from slimkernels.evaluate.score_units import JUDGE, column, metric
from slimkernels.evaluate.summary import Budget, Overall, Records
from slimkernels.evaluate.tasks import ROUGE


def task_details(records: Records, rows: Sequence[Overall], budgets: Sequence[Budget]) -> list[Block]:
    """Tabulates the results of all arms on a task: every score, how much was found, and what it cost."""
    task, metrics = rows[0].task, records.metrics(rows[0].task)
    what = "question" if rows[0].labels is None else "document"
    columns: list[tuple[str, Sequence[Cell | str]]] = [
        ("model \u00b7 decoder" if what == "question" else "model", [str(row.arm) for row in rows])
    ]
    for name in metrics:
        intervals = [row.scores.get(name) for row in rows]
        columns.append((column(name), score_cells(name, intervals)))
        if name == LOSS:
            columns.append(("perplexity", perplexity_cells(name, intervals)))
    columns += [
        (
            f"{name} rated %" if name.startswith(JUDGE) else f"{name.replace('_', ' ')} found %",
            [_found(row, name) for row in rows],
        )
        for name in metrics
        if name in rows[0].extracted and name != ROUGE
    ]
    for budget in budgets:
        shares = [row.within[budget.unit] for row in rows]
        columns.append((_budget(budget), mark_best([percent(share) for share in shares], shares)))
    columns += [
        (f"{what}s", [str(row.samples) for row in rows]),
        ("labels", [number(row.labels, 0) for row in rows]),
        ("seeds", [_seeds(row) for row in rows]),
        ("tokens per question", [number(row.tokens, 0) for row in rows]),
        (f"seconds per {what}", [number(row.seconds, 2) for row in rows]),
        ("output tokens", [number(row.output_tokens, 0) for row in rows]),
        ("finished %", [percent(row.finished) for row in rows]),
        ("empty %", [Cell(percent(row.empty), "warning" if row.empty == 1 else "") for row in rows]),
    ]
    if ROUGE in metrics:
        columns.append(("non-ASCII letters dropped", [f"{row.dropped[0]} of {row.dropped[1]}" for row in rows]))
    # Columns in which every cell is unknown are left out.
    columns = [(head, cells) for head, cells in columns if set(cells) - {UNKNOWN, Cell(UNKNOWN)}]
    table = Table([name for name, _ in columns], list(zip(*(cells for _, cells in columns), strict=True)))
    explained = _explain_questions(metrics, bool(budgets)) if what == "question" else _explain_documents(records, task)
    return [Heading(f"Scores: {task}", 3), table, Paragraph(explained)]


def task_chart(records: Records, rows: Sequence[Overall]) -> Chart:
    """Draws the main score of all arms on a task with its intervals."""
    task, name = rows[0].task, records.metrics(rows[0].task)[0]
    drawn = [row for row in rows if name in row.scores]
    title = f"{task}, {column(name)} with 95 % intervals"
    svg = dot_chart([str(row.arm) for row in drawn], [row.scores[name] for row in drawn], metric(name), title)
    return Chart(svg, title)


def _explain_questions(metrics: Sequence[str], has_budgets: bool) -> str:
    # The titles say what the scores measure.
    sentences = [f"{'; '.join(metric(name).title for name in metrics)}."]
    if has_budgets:
        sentences.append(
            "The columns within a budget show the share of right answers if every question had been stopped after that "
            "many tokens or seconds. The budget is the lowest mean cost of a question among the decoders with several "
            "candidates; independent chains count as if they were generated one after the other."
        )
    sentences.append("The time of a batch is shared equally among its questions.")
    return " ".join(sentences)


def _explain_documents(records: Records, task: str) -> str:
    explained = (
        "Means are over all labels, and brackets hold 95 % bootstrap intervals over documents. Perplexity is "
        "exp(loss); loss is the mean -log p of the labels. kl is the KL divergence from the teacher over its kept ids "
        "and one bucket for all other ids, at temperature 1. The time of a batch is shared equally among its documents."
    )
    own = records.of(records.arms_on(task)[0], task)
    if all("teacher_loss" in record.published for record in own):
        labels = sum(record.labels or 0 for record in own)
        loss = sum(record.published["teacher_loss"] * (record.labels or 0) for record in own) / labels
        explained += f" The teacher's perplexity on these labels was {perplexity_text(loss)} at capture."
    return explained


def _found(row: Overall, name: str) -> Cell:
    share = row.extracted.get(name)
    return Cell(percent(share), "warning" if share == 0 else "")


def _seeds(row: Overall) -> str:
    return ", ".join(map(str, row.seeds)) or (UNKNOWN if row.arm.decoder in (OUTPUTS, NO_DECODER) else "no sampling")


def _budget(budget: Budget) -> str:
    return f"% within {budget.limit:.0f} tokens" if budget.unit == "tokens" else f"% within {budget.limit:.2g} s"
