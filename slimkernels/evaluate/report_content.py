"""What a report says: from records and what was run to blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimkernels.evaluate import summary
from slimkernels.evaluate.gemini import DECODER as OUTPUTS
from slimkernels.evaluate.report_blocks import Block, Cell, Chart, Heading, Paragraph, Table, mark_best
from slimkernels.evaluate.report_charts import dot_chart, line_chart
from slimkernels.evaluate.statistics import Interval
from slimkernels.evaluate.summary import Budget, Comparison, Overall, Records
from slimkernels.evaluate.tasks import ROUGE

TITLE = "Side-by-side evaluation"
_METRICS = {
    "strict": "strict: the announced answer",
    "flexible": "flexible: the announced answer, or else the last possible one",
    "last_number": "last number",
    ROUGE: "Rouge-L F1",
}


def content(records: Records, described: Mapping[str, Any]) -> list[Block]:
    """The report but its outputs: the verdict, what was run, scores, differences, and slices."""
    comparisons = summary.compare(records)
    blocks: list[Block] = [*_verdict(records, comparisons), *_what_was_run(records, described)]
    blocks += _overall(records)
    for task in records.tasks:
        blocks += _scores(records, task)
    blocks += _differences(comparisons)
    for task in records.tasks:
        blocks += _slices(records, task)
    return blocks


def _verdict(records: Records, comparisons: Sequence[Comparison]) -> list[Block]:
    blocks: list[Block] = [Heading("Is a difference real?")]
    if not comparisons:
        return [*blocks, Paragraph("There is one model and decoder only: nothing is compared.")]
    for task in records.tasks:
        metric = records.metrics(task)[0]
        found = [entry for entry in comparisons if (entry.task, entry.metric) == (task, metric)]
        shown = [entry for entry in found if entry.difference.is_shown]
        if not found:
            continue
        numbers = {entry.difference.num_samples for entry in found}
        samples = f"{min(numbers)}" if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"
        sentences = [_sentence(entry) for entry in shown]
        if len(shown) < len(found):
            others = [f"{entry.a} and {entry.b}" for entry in found if entry not in shown]
            rest = "any two" if len(others) == len(found) > 1 else "; nor between ".join(others)
            sentences.append(f"No difference shown between {rest}.")
        blocks.append(Paragraph(f"{task}, {_name(metric)}, samples: {samples}. {' '.join(sentences)}"))
    return blocks


def _sentence(entry: Comparison) -> str:
    difference = entry.difference
    higher, lower = (entry.b, entry.a) if difference.value > 0 else (entry.a, entry.b)
    low, high = sorted((abs(difference.low), abs(difference.high)))
    points = f"{100 * abs(difference.value):.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{higher} is higher than {lower} by {points}."


def _what_was_run(records: Records, described: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = [Heading("What was run")]
    if described.get("models"):
        blocks.append(
            Table(
                ["model", "identity (hash of its files, precision and prompt style)"],
                [[entry["model"], entry["identity"]] for entry in described["models"]],
            )
        )
    if described.get("decoders"):
        rows = [
            [entry["decoder"], ", ".join(f"{name} {value}" for name, value in entry["settings"].items())]
            for entry in described["decoders"]
        ]
        blocks.append(Table(["decoder", "settings"], rows))
    if described.get("tasks"):
        rows = [
            [entry["task"], f"{entry['samples']} of {entry['available']}", entry["file"], entry["hash"]]
            for entry in described["tasks"]
        ]
        blocks.append(Table(["task", "samples", "file", "hash"], rows))
    facts = [
        f"{title} {', '.join(map(str, described[name])) if isinstance(described[name], list) else described[name]}"
        for name, title in (
            ("seeds", "Seeds of the draws:"),
            ("shots", "Worked examples before each question:"),
            ("batch_questions", "Questions decoded together:"),
            ("machine", "Machine:"),
        )
        if name in described
    ]
    if "versions" in described:
        facts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in described["versions"].items()))
    if facts:
        blocks.append(Paragraph(". ".join(facts) + "."))
    for entry in described.get("outputs", ()):
        blocks.append(Paragraph(entry["explained"]))
        if entry["published"]:
            blocks.append(Table(["score", "here", "published", "rows that agree"], entry["published"]))
    return blocks


def _overall(records: Records) -> list[Block]:
    """Every task's first score, a column for each arm."""
    rows: list[Sequence[Cell | str]] = []
    for task in records.tasks:
        metric = records.metrics(task)[0]
        found = [records.scores(arm, task, metric).values() for arm in records.arms]
        means = [sum(scores) / len(scores) if scores else None for scores in found]
        texts = [_percent(mean) if mean is not None else "not run" for mean in means]
        samples = "/".join(dict.fromkeys(str(len(scores)) for scores in found if scores))
        rows.append([f"{task}, {metric.replace('_', ' ')} %", *mark_best(texts, means), samples])
    return [Heading("Overall"), Table(["task", *map(str, records.arms), "samples"], rows)]


def _scores(records: Records, task: str) -> list[Block]:
    budgets = summary.budgets(records, task)
    arms = [arm for arm in records.arms if records.of(arm, task)]
    rows = [summary.overall(records, arm, task, budgets) for arm in arms]
    metrics = records.metrics(task)
    columns: list[tuple[str, Sequence[Cell | str]]] = [("model · decoder", [str(row.arm) for row in rows])]
    for metric in metrics:
        intervals = [row.scores[metric] for row in rows]
        cells = [_interval(interval) for interval in intervals]
        columns.append((f"{metric.replace('_', ' ')} %", mark_best(cells, [interval.value for interval in intervals])))
    if ROUGE not in metrics:
        columns += [
            (f"{metric.replace('_', ' ')} found %", [_found(row, metric) for row in rows])
            for metric in rows[0].extracted
        ]
    for budget in budgets:
        shares = [row.within[budget.unit] for row in rows]
        columns.append((_budget(budget), mark_best([_percent(share) for share in shares], shares)))
    columns += [
        ("samples", [str(row.samples) for row in rows]),
        ("seeds", [_seeds(row) for row in rows]),
        ("tokens per question", [_number(row.tokens, 0) for row in rows]),
        ("seconds per question", [_number(row.seconds, 2) for row in rows]),
        ("tokens of the output", [_number(row.output_tokens, 0) for row in rows]),
        ("ended by itself %", [_percent(row.finished) for row in rows]),
        ("empty %", [Cell(_percent(row.empty), "warning" if row.empty == 1 else "") for row in rows]),
    ]
    if ROUGE in metrics:
        columns.append(("non-ASCII letters left out", [f"{row.dropped[0]} of {row.dropped[1]}" for row in rows]))
    # A column that says "unknown" all the way down says nothing.
    columns = [(name, cells) for name, cells in columns if any(cell != _UNKNOWN for cell in cells)]
    table = Table([name for name, _ in columns], list(zip(*(cells for _, cells in columns), strict=True)))
    title = f"{task}: {_name(metrics[0])}, % with 95 % intervals"
    chart = dot_chart([str(row.arm) for row in rows], [row.scores[metrics[0]] for row in rows], title)
    explained = (
        "Bold: the best of a column; italic: the second. In brackets: 95 % intervals, Wilson's for shares of right "
        "answers, bootstrap for others. Whether two differ is in the table of differences, not in their intervals."
    )
    if budgets:
        explained += (
            " Within a budget: right, had every question been stopped after so many tokens or seconds, the least that "
            "a decoder of several candidates spends on average; independent chains count as one after the other. "
            "Seconds are a question's share of its batch."
        )
    silent = [str(row.arm) for row in rows if row.empty == 1]
    blocks: list[Block] = [Heading(f"Scores: {task}"), table, Chart(chart, title), Paragraph(explained)]
    if silent:
        blocks.insert(1, Paragraph(f"Answered nothing at all: {', '.join(silent)}."))
    return blocks


def _differences(comparisons: Sequence[Comparison]) -> list[Block]:
    if not comparisons:
        return []
    rows = []
    for task, metric, a, b, difference in comparisons:
        interval = f"{_signed(difference.value)} [{_signed(difference.low)}, {_signed(difference.high)}]"
        verdict = difference.verdict.replace("a is", f"{a} is").replace("b is", f"{b} is")
        cell = Cell(verdict, "best" if difference.is_shown else "")
        rows.append(
            [
                f"{task}, {metric.replace('_', ' ')}",
                str(a),
                str(b),
                interval,
                f"{difference.p_value:.3g}",
                str(difference.num_samples),
                cell,
            ]
        )
    head = ["task, score", "a", "b", "b - a, points", "p", "samples", "verdict"]
    explained = (
        "Paired by sample, seeds of a sample averaged first. In brackets: 95 % percentile bootstrap interval (10,000 "
        f"resamples, seed 0). p: two-sided sign-flip test, adjusted by Holm for the {len(rows)} comparisons here. A "
        "difference is shown where the interval leaves 0 out and p is below 0.05."
    )
    return [Heading("Differences"), Table(head, rows), Paragraph(explained)]


def _slices(records: Records, task: str) -> list[Block]:
    blocks: list[Block] = [Heading(f"Where: {task}, {records.metrics(task)[0].replace('_', ' ')} %")]
    names = [str(arm) for arm in records.arms]
    for title in summary.SLICES:
        found = summary.slices(records, task, title)
        rows = []
        for part in found:
            scores = mark_best(
                [
                    f"{_percent(score)} (n={count})" if count else "none"
                    for score, count in zip(part.scores, part.counts, strict=True)
                ],
                part.scores,
            )
            rows.append([part.label, *scores])
        blocks += [Heading(f"By {title}", 3), Table([title, *names], rows)]
        if len(found) > 1:
            series = [[part.scores[index] for part in found] for index in range(len(names))]
            chart = line_chart([part.label for part in found], series, names, f"{task} by {title}")
            blocks.append(Chart(chart, f"{task}, % by {title}"))
    return blocks


_UNKNOWN = "unknown"


def _name(metric: str) -> str:
    return _METRICS.get(metric, metric)


def _found(row: Overall, metric: str) -> Cell:
    return Cell(_percent(row.extracted[metric]), "warning" if row.extracted[metric] == 0 else "")


def _seeds(row: Overall) -> str:
    return ", ".join(map(str, row.seeds)) or (_UNKNOWN if row.arm.decoder == OUTPUTS else "no draws")


def _budget(budget: Budget) -> str:
    return f"% within {budget.limit:.0f} tokens" if budget.unit == "tokens" else f"% within {budget.limit:.2g} s"


def _interval(interval: Interval) -> str:
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _percent(share: float | None) -> str:
    return _UNKNOWN if share is None else f"{100 * share:.1f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _number(value: float | None, places: int) -> str:
    return _UNKNOWN if value is None else f"{value:,.{places}f}"
