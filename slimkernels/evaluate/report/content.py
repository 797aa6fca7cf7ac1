"""The content of a report: makes blocks from records and the description of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimkernels.evaluate import summary
from slimkernels.evaluate.cell import NO_DECODER
from slimkernels.evaluate.heldout import LOSS
from slimkernels.evaluate.judge import ratings_of
from slimkernels.evaluate.published_outputs import DECODER as OUTPUTS
from slimkernels.evaluate.records import Record
from slimkernels.evaluate.report.blocks import Block, Cell, Chart, Heading, Paragraph, Table, mark_best
from slimkernels.evaluate.report.charts import dot_chart, line_chart
from slimkernels.evaluate.score_units import JUDGE, column, metric
from slimkernels.evaluate.served import PLAIN
from slimkernels.evaluate.statistics import Interval
from slimkernels.evaluate.summary import Arm, Budget, Comparison, Overall, Records
from slimkernels.evaluate.tasks import ROUGE
from slimkernels.models.perplexity import perplexity

TITLE = "Side-by-side evaluation"


def content(records: Records, described: Mapping[str, Any]) -> list[Block]:
    """Returns the blocks of a report without its outputs: verdict, what was run, scores, differences, and slices."""
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
        return [*blocks, Paragraph("There is only one model and decoder, so nothing is compared.")]
    for task in records.tasks:
        for name in _overall_metrics(records.metrics(task)):
            found = [entry for entry in comparisons if (entry.task, entry.metric) == (task, name)]
            shown = [entry for entry in found if entry.difference.is_shown]
            if not found:
                continue
            numbers = {entry.difference.num_samples for entry in found}
            samples = f"{min(numbers)}" if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"
            sentences = _sentences(shown)
            if len(shown) < len(found):
                others = [f"{entry.a} and {entry.b}" for entry in found if entry not in shown]
                rest = "any two" if len(others) == len(found) > 1 else ", or between ".join(others)
                sentences.append(f"No difference shown between {rest}.")
            blocks.append(Paragraph(f"{task}, {metric(name).title}, samples: {samples}. {' '.join(sentences)}"))
    return blocks


def _better(entry: Comparison) -> tuple[Arm, Arm, str]:
    """Returns the better arm, the worse arm, and whether the better one is "lower" or "higher"."""
    lower_is_better = metric(entry.metric).lower_is_better
    better, worse = (entry.b, entry.a) if (entry.difference.value > 0) != lower_is_better else (entry.a, entry.b)
    return better, worse, "lower" if lower_is_better else "higher"


def _sentences(entries: Sequence[Comparison]) -> list[str]:
    """Writes a sentence for each arm that is better than others."""
    beaten: dict[tuple[Arm, str], list[str]] = {}
    for entry in entries:
        difference, shown = entry.difference, metric(entry.metric)
        better, worse, word = _better(entry)
        low, high = sorted((abs(difference.low), abs(difference.high)))
        by = f"{shown.text(abs(difference.value))} {shown.difference_unit} [{shown.text(low)}, {shown.text(high)}]"
        beaten.setdefault((better, word), []).append(f"than {worse} by {by}")
    return [f"{better} is {word} {', '.join(others)}." for (better, word), others in beaten.items()]


def _what_was_run(records: Records, described: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = [Heading("What was run")]
    models = described.get("models", ())
    local = [[entry["model"], entry["identity"]] for entry in models if "served" not in entry]
    if local:
        blocks.append(Table(["model", "identity (hash of files, precision and prompt style)"], local))
    blocks += _served([entry for entry in models if "served" in entry])
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
            ("seeds", "Sampling seeds:"),
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
    if described.get("unfinished"):
        blocks.append(Paragraph(f"The run is unfinished. Outputs so far: {'; '.join(described['unfinished'])}."))
    if "judge" in described:
        asked = described["judge"]
        blocks.append(Paragraph(f"Judge: {asked['model']} at {asked['url']}, with a prompt of hash {asked['prompt']}."))
    for entry in described.get("outputs", ()):
        blocks.append(Paragraph(entry["explained"]))
        if entry["published"]:
            blocks.append(Table(["score", "computed", "published", "rows that agree"], entry["published"]))
    return blocks


def _served(models: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Describes models behind servers: a table of the known facts, and what is unknown."""
    if not models:
        return []
    rows = []
    for entry in models:
        known = entry["served"]
        facts = ", ".join(f"{name} {value}" for name, value in known["said"].items()) or "nothing"
        rows.append([entry["model"], known["model"], known["url"], known["style"], facts, entry["identity"]])
    head = ["served model", "name on the server", "server", "prompt style", "facts stated by the server"]
    said = "A server shows neither the weights of a model nor their precision."
    if any(entry["served"]["style"] == PLAIN for entry in models):
        said += f" Run with --prompt-style plain to ask local models in {PLAIN} as well."
    notes = dict.fromkeys(note for entry in models for note in entry["served"]["notes"])
    searched = Paragraph(f"Search with a server: {'; '.join(notes)}.")
    return [Table([*head, "identity (hash of these columns and the template)"], rows), Paragraph(said), searched]


def _overall(records: Records) -> list[Block]:
    """Tabulates the scores of all tasks with a column per arm; tasks with different arms get tables of their own."""
    by_arms: dict[tuple[Arm, ...], list[str]] = {}
    for task in records.tasks:
        by_arms.setdefault(tuple(records.arms_on(task)), []).append(task)
    blocks: list[Block] = [Heading("Overall")]
    for arms, tasks in by_arms.items():
        rows: list[Sequence[Cell | str]] = []
        for task in tasks:
            for name in _overall_metrics(records.metrics(task)):
                means = [records.mean(arm, task, name) for arm in arms]
                samples = "/".join(dict.fromkeys(str(len(records.scores(arm, task, name))) for arm in arms))
                rows.append([f"{task}, {column(name)}", *_marked(name, means), samples])
                if name == LOSS:
                    rows.append([f"{task}, perplexity", *_perplexities(means), samples])
        blocks.append(Table(["task", *map(str, arms), "samples"], rows))
    return blocks


def _overall_metrics(metrics: Sequence[str]) -> list[str]:
    """Returns the main metric, and others in other units; other percentages only read the same answer differently."""
    return [name for name in metrics if name == metrics[0] or metric(name).unit != "%"]


def _marked(name: str, means: Sequence[float | None]) -> list[Cell]:
    shown = metric(name)
    texts = [_UNKNOWN if mean is None else shown.text(mean) for mean in means]
    return mark_best(texts, means, lower_is_better=shown.lower_is_better)


def _perplexities(losses: Sequence[float | None]) -> list[Cell]:
    texts = [_UNKNOWN if loss is None else _perplexity(loss) for loss in losses]
    return mark_best(texts, losses, lower_is_better=True)


def _scores(records: Records, task: str) -> list[Block]:
    budgets = summary.budgets(records, task)
    rows = [summary.overall(records, arm, task, budgets) for arm in records.arms_on(task)]
    metrics = records.metrics(task)
    what = "question" if rows[0].labels is None else "document"
    columns: list[tuple[str, Sequence[Cell | str]]] = [
        ("model \u00b7 decoder" if what == "question" else "model", [str(row.arm) for row in rows])
    ]
    for name in metrics:
        intervals = [row.scores.get(name) for row in rows]
        values = [None if interval is None else interval.value for interval in intervals]
        cells = [_interval(name, interval) for interval in intervals]
        lower_is_better = metric(name).lower_is_better
        columns.append((column(name), mark_best(cells, values, lower_is_better=lower_is_better)))
        if name == LOSS:
            texts = [_UNKNOWN if interval is None else _perplexity(*interval) for interval in intervals]
            columns.append(("perplexity", mark_best(texts, values, lower_is_better=True)))
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
        columns.append((_budget(budget), mark_best([_percent(share) for share in shares], shares)))
    columns += [
        (f"{what}s", [str(row.samples) for row in rows]),
        ("labels", [_number(row.labels, 0) for row in rows]),
        ("seeds", [_seeds(row) for row in rows]),
        ("tokens per question", [_number(row.tokens, 0) for row in rows]),
        (f"seconds per {what}", [_number(row.seconds, 2) for row in rows]),
        ("output tokens", [_number(row.output_tokens, 0) for row in rows]),
        ("finished %", [_percent(row.finished) for row in rows]),
        ("empty %", [Cell(_percent(row.empty), "warning" if row.empty == 1 else "") for row in rows]),
    ]
    if ROUGE in metrics:
        columns.append(("non-ASCII letters dropped", [f"{row.dropped[0]} of {row.dropped[1]}" for row in rows]))
    # Columns in which every cell is unknown are left out.
    columns = [(head, cells) for head, cells in columns if set(cells) - {_UNKNOWN, Cell(_UNKNOWN)}]
    table = Table([name for name, _ in columns], list(zip(*(cells for _, cells in columns), strict=True)))
    title = f"{task}: {metric(metrics[0]).title}, {metric(metrics[0]).unit} with 95 % intervals"
    drawn = [row for row in rows if metrics[0] in row.scores]
    chart = dot_chart(
        [str(row.arm) for row in drawn], [row.scores[metrics[0]] for row in drawn], metric(metrics[0]), title
    )
    silent = [str(row.arm) for row in rows if row.empty == 1]
    blocks: list[Block] = [Heading(f"Scores: {task}"), table, Chart(chart, title)]
    if silent:
        blocks.insert(1, Paragraph(f"All outputs are empty: {', '.join(silent)}."))
    blocks += [Paragraph(text) for row in rows for text in _not_rated(records.of(row.arm, task), row)]
    explained = _explain_questions(bool(budgets)) if what == "question" else _explain_documents(records, task)
    return [*blocks, Paragraph(explained)]


def _not_rated(own: Sequence[Record], row: Overall) -> list[str]:
    errors: dict[str, list[str]] = {}
    for record in own:
        for judge, rating in ratings_of(record).items():
            if rating.error is not None:
                errors.setdefault(judge, []).append(rating.error)
    return [
        f"Not rated by {judge}: {len(found)} of {len(own)} outputs of {row.arm}. The first error: {found[0]}."
        for judge, found in errors.items()
    ]


def _explain_questions(has_budgets: bool) -> str:
    explained = (
        "Bold marks the best value of a column, italics the second best. Brackets hold 95 % intervals: Wilson's for "
        "shares of right answers, bootstrap intervals for other scores. The table of differences shows whether two "
        "scores differ; their intervals do not."
    )
    if has_budgets:
        explained += (
            " The columns within a budget show the share of right answers if every question had been stopped after "
            "that many tokens or seconds. The budget is the lowest mean cost of a question among the decoders with "
            "several candidates; independent chains count as if they were generated one after the other. The time of "
            "a batch is shared equally among its questions."
        )
    return explained


def _explain_documents(records: Records, task: str) -> str:
    explained = (
        "Lower is better. Bold marks the best value of a column, italics the second best. Means are over all labels, "
        "and brackets hold 95 % bootstrap intervals over documents. Perplexity is exp(loss). kl is the KL divergence "
        "from the teacher over its kept ids and one bucket for all other ids, at temperature 1. The time of a batch is "
        "shared equally among its documents."
    )
    own = records.of(records.arms_on(task)[0], task)
    if all("teacher_loss" in record.published for record in own):
        labels = sum(record.labels or 0 for record in own)
        loss = sum(record.published["teacher_loss"] * (record.labels or 0) for record in own) / labels
        explained += f" The teacher's perplexity on these labels was {_perplexity(loss)} at capture."
    return explained


def _differences(comparisons: Sequence[Comparison]) -> list[Block]:
    if not comparisons:
        return []
    rows = []
    for entry in comparisons:
        task, name, a, b, difference = entry
        value, low, high = map(metric(name).signed, difference[:3])
        interval = f"{value} [{low}, {high}] {metric(name).difference_unit}"
        cell = Cell("no difference shown")
        if difference.is_shown:
            better, _, word = _better(entry)
            cell = Cell(f"{better} is {word}", "best")
        rows.append(
            [
                f"{task}, {name.replace('_', ' ')}",
                cell,
                str(a),
                str(b),
                interval,
                f"{difference.p_value:.3g}",
                str(difference.num_samples),
            ]
        )
    # The verdict is the second column, so that a phone shows it without scrolling sideways.
    head = ["task, score", "verdict", "a", "b", "b - a", "p", "samples"]
    explained = (
        "Scores are paired by sample. Seeds of a sample are averaged first, and documents are weighted by their "
        "labels. Brackets hold 95 % percentile bootstrap intervals (10,000 resamples, seed 0). p is the p-value of a "
        f"two-sided sign-flip test, adjusted by Holm's method for the {len(rows)} comparisons in this table. A "
        "difference is shown if the interval excludes 0 and p is below 0.05."
    )
    return [Heading("Differences"), Table(head, rows), Paragraph(explained)]


def _slices(records: Records, task: str) -> list[Block]:
    name = records.metrics(task)[0]
    shown = metric(name)
    blocks: list[Block] = [Heading(f"Slices: {task}, {column(name)}")]
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
        blocks += [Heading(f"By {title}", 3), Table([title, *names], rows)]
        if len(found) > 1:
            series = [[part.scores[index] for part in found] for index in range(len(names))]
            chart = line_chart([part.label for part in found], series, names, shown, f"{task} by {title}")
            blocks.append(Chart(chart, f"{task}, {column(name)} by {title}"))
    return blocks


_UNKNOWN = "unknown"


def _found(row: Overall, name: str) -> Cell:
    share = row.extracted.get(name)
    return Cell(_UNKNOWN if share is None else _percent(share), "warning" if share == 0 else "")


def _seeds(row: Overall) -> str:
    return ", ".join(map(str, row.seeds)) or (_UNKNOWN if row.arm.decoder in (OUTPUTS, NO_DECODER) else "no sampling")


def _budget(budget: Budget) -> str:
    return f"% within {budget.limit:.0f} tokens" if budget.unit == "tokens" else f"% within {budget.limit:.2g} s"


def _interval(name: str, interval: Interval | None) -> str:
    if interval is None:
        return _UNKNOWN
    value, low, high = map(metric(name).text, interval)
    return f"{value} [{low}, {high}]"


def _perplexity(loss: float, low: float | None = None, high: float | None = None) -> str:
    text = f"{perplexity(loss):,.4g}"
    return text if low is None or high is None else f"{text} [{_perplexity(low)}, {_perplexity(high)}]"


def _percent(share: float | None) -> str:
    return _UNKNOWN if share is None else f"{100 * share:.1f}"


def _number(value: float | None, places: int) -> str:
    return _UNKNOWN if value is None else f"{value:,.{places}f}"
