"""The content of a report, in the order in which a reader asks: scores, real differences, slices, outputs, details."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimkernels.evaluate import summary
from slimkernels.evaluate.heldout import LOSS
from slimkernels.evaluate.judge import ratings_of
from slimkernels.evaluate.report.blocks import (
    AllOutputs,
    Block,
    Cell,
    Chart,
    Charts,
    Heading,
    Paragraph,
    Table,
    mark_best,
)
from slimkernels.evaluate.report.charts import line_chart
from slimkernels.evaluate.report.described import published_outputs, what_was_run
from slimkernels.evaluate.report.details import task_chart, task_details
from slimkernels.evaluate.report.differences import all_differences, overall_metrics, real_differences
from slimkernels.evaluate.report.formats import perplexity_cells, score_cells
from slimkernels.evaluate.score_units import column, metric
from slimkernels.evaluate.summary import Arm, Overall, Records

TITLE = "Side-by-side evaluation"
# So many tasks are drawn at the top; the charts of further ones stand with their details.
_MAX_CHARTS = 6


def content(records: Records, described: Mapping[str, Any]) -> list[Block]:
    """Returns the blocks of a report; the block ``AllOutputs`` marks the place of the outputs."""
    comparisons = summary.compare(records)
    budgets = {task: summary.budgets(records, task) for task in records.tasks}
    results = {
        task: [summary.overall(records, arm, task, budgets[task]) for arm in records.arms_on(task)]
        for task in records.tasks
    }
    blocks: list[Block] = [Heading("Overall"), *_overall(records, results)]
    blocks += [Paragraph(text) for text in _warnings(records, results, described)]
    blocks += real_differences(records, comparisons)
    blocks.append(Heading("Slices"))
    for task in records.tasks:
        blocks += _slices(records, task)
    blocks += [Heading("Outputs side by side"), AllOutputs(), Heading("Scores in detail")]
    for number, (task, rows) in enumerate(results.items()):
        blocks += task_details(records, rows, budgets[task])
        if number >= _MAX_CHARTS:
            blocks.append(Charts([task_chart(records, rows)]))
    return [*blocks, *all_differences(comparisons), *what_was_run(described), *published_outputs(described)]


def _overall(records: Records, results: Mapping[str, Sequence[Overall]]) -> list[Block]:
    """Tabulates and draws the scores of all tasks; tasks with different arms get tables of their own."""
    by_arms: dict[tuple[Arm, ...], list[str]] = {}
    for task, rows in results.items():
        by_arms.setdefault(tuple(row.arm for row in rows), []).append(task)
    tables: list[Block] = [_table(records, arms, [results[task] for task in tasks]) for arms, tasks in by_arms.items()]
    charts = Charts([task_chart(records, rows) for rows in list(results.values())[:_MAX_CHARTS]])
    explained = (
        "Brackets hold 95 % intervals: Wilson's for shares of right answers, bootstrap intervals for other scores."
    )
    if any(metric(name).lower_is_better for task in results for name in records.metrics(task)):
        explained = f"Lower is better for losses, perplexities and KL divergences. {explained}"
    if len(records.arms) > 1:
        explained = (
            f"Bold marks the best value of a score, italics the second best. {explained} The list below tells which "
            "differences are real; overlapping intervals do not."
        )
    return [*tables, charts, Paragraph(explained)]


def _table(records: Records, arms: Sequence[Arm], results: Sequence[Sequence[Overall]]) -> Table:
    """Tabulates the scores of arms on their tasks; whichever are more, scores or arms, go down the page."""
    lines: list[Sequence[Cell | str]] = []
    for rows in results:
        task = rows[0].task
        for name in overall_metrics(records.metrics(task)):
            intervals = [row.scores.get(name) for row in rows]
            samples = "/".join(dict.fromkeys(str(len(records.scores(arm, task, name))) for arm in arms))
            lines.append([f"{task}, {column(name)}", *score_cells(name, intervals), samples])
            if name == LOSS:
                lines.append([f"{task}, perplexity", *perplexity_cells(name, intervals), samples])
    head = ["task, score", *map(str, arms), "samples"]
    if len(lines) > len(arms):
        return Table(head, lines)
    head[0] = "model \u00b7 decoder" if any(arm.decoder for arm in arms) else "model"
    turned = list(zip(head, *lines, strict=True))
    return Table(list(map(str, turned[0])), turned[1:])


def _warnings(records: Records, results: Mapping[str, Sequence[Overall]], described: Mapping[str, Any]) -> list[str]:
    """Returns sentences on what makes scores incomplete: an unfinished run, empty outputs, outputs without a rating."""
    found = []
    if described.get("unfinished"):
        found.append(f"The run is unfinished. Outputs so far: {'; '.join(described['unfinished'])}.")
    for task, rows in results.items():
        silent = [str(row.arm) for row in rows if row.empty == 1]
        if silent:
            found.append(f"{task}: All outputs are empty: {', '.join(silent)}.")
        for row in rows:
            found += _not_rated(records, row)
    return found


def _not_rated(records: Records, row: Overall) -> list[str]:
    own = records.of(row.arm, row.task)
    errors: dict[str, list[str]] = {}
    for record in own:
        for judge, rating in ratings_of(record).items():
            if rating.error is not None:
                errors.setdefault(judge, []).append(rating.error)
    return [
        f"Not rated by {judge}: {len(found)} of {len(own)} outputs of {row.arm}. The first error: {found[0]}."
        for judge, found in errors.items()
    ]


def _slices(records: Records, task: str) -> list[Block]:
    name = records.metrics(task)[0]
    shown = metric(name)
    blocks: list[Block] = []
    names = [str(arm) for arm in records.arms_on(task)]
    for title in summary.slices_of(records, task):
        found = summary.slices(records, task, title)
        rows = []
        for part in found:
            scores = mark_best(
                [
                    "none" if score is None else f"{shown.text(score)} (n={count})"
                    for score, count in zip(part.scores, part.counts, strict=True)
                ],
                part.scores,
                lower_is_better=shown.lower_is_better,
            )
            rows.append([part.label, *scores])
        heading = f"{task}, {column(name)} by {title}"
        blocks += [Heading(heading, 3), Table([title, *names], rows)]
        if len(found) > 1:
            series = [[part.scores[index] for part in found] for index in range(len(names))]
            chart = line_chart([part.label for part in found], series, names, shown, heading)
            blocks.append(Charts([Chart(chart, heading)]))
    return blocks
