"""Differences between arms in a report: the real ones in a short list, and all of them in a table."""

from __future__ import annotations

from collections.abc import Sequence

from slimkernels.evaluate.report.blocks import Block, Cell, Heading, Items, Paragraph, Table
from slimkernels.evaluate.score_units import metric
from slimkernels.evaluate.summary import Arm, Comparison, Records

# A score's entry in the list names at most so many real differences, and so many pairs without one.
_MAX_SHOWN, _MAX_UNDECIDED = 6, 3


def overall_metrics(metrics: Sequence[str]) -> list[str]:
    """Returns the main metric, and others in other units; other percentages only read the same answer differently."""
    return [name for name in metrics if name == metrics[0] or metric(name).unit != "%"]


def real_differences(records: Records, comparisons: Sequence[Comparison]) -> list[Block]:
    """Lists the real differences of each score, the largest first; scores of which the same is said share an entry."""
    heading = Heading("Which differences are real")
    if not comparisons:
        is_alone = len(records.arms) == 1
        reason = "There is only one model and decoder" if is_alone else "No two models or decoders share a sample"
        return [heading, Paragraph(f"{reason}, so nothing is compared.")]
    shown: dict[str, list[str]] = {}
    undecided: dict[str, list[str]] = {}
    for task in records.tasks:
        for name in overall_metrics(records.metrics(task)):
            own = [entry for entry in comparisons if (entry.task, entry.metric) == (task, name)]
            real = sorted(
                (entry for entry in own if entry.difference.is_shown),
                key=lambda entry: abs(entry.difference.value),
                reverse=True,
            )
            if own:
                said = " ".join([*_better_than(real), *_undecided(own)])
                (shown if real else undecided).setdefault(said, []).append(f"{task}, {name.replace('_', ' ')}")
    entries = [("; ".join(scores), said) for said, scores in [*shown.items(), *undecided.items()]]
    explained = (
        "A difference is called real if its 95 % interval excludes 0 and a paired test, adjusted for all "
        f"{len(comparisons)} comparisons of this report, gives p below 0.05."
    )
    return [heading, Items(entries), Paragraph(explained)]


def all_differences(comparisons: Sequence[Comparison]) -> list[Block]:
    """Tabulates every difference with its interval and p-value."""
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
    return [Heading("All differences"), Table(head, rows), Paragraph(explained)]


def _better(entry: Comparison) -> tuple[Arm, Arm, str]:
    """Returns the better arm, the worse arm, and whether the better one is "lower" or "higher"."""
    lower_is_better = metric(entry.metric).lower_is_better
    better, worse = (entry.b, entry.a) if (entry.difference.value > 0) != lower_is_better else (entry.a, entry.b)
    return better, worse, "lower" if lower_is_better else "higher"


def _better_than(real: Sequence[Comparison]) -> list[str]:
    """Writes a sentence for each arm that is better than others, and counts what is left out."""
    beaten: dict[tuple[Arm, str], list[str]] = {}
    for entry in real[:_MAX_SHOWN]:
        difference, shown = entry.difference, metric(entry.metric)
        better, worse, word = _better(entry)
        low, high = sorted((abs(difference.low), abs(difference.high)))
        by = f"{shown.text(abs(difference.value))} {shown.difference_unit} [{shown.text(low)}, {shown.text(high)}]"
        beaten.setdefault((better, word), []).append(f"than {worse} by {by}")
    sentences = [f"{better} is {word} {', '.join(others)}." for (better, word), others in beaten.items()]
    more = len(real) - _MAX_SHOWN
    return sentences if more <= 0 else [*sentences, f"Smaller real differences, in the table of all: {more}."]


def _undecided(found: Sequence[Comparison]) -> list[str]:
    """Names the pairs without a real difference, or counts them if they are many."""
    others = [f"{entry.a} and {entry.b}" for entry in found if not entry.difference.is_shown]
    if not others:
        return []
    if len(others) == len(found) > 1:
        return ["No difference shown between any two."]
    if len(others) > _MAX_UNDECIDED:
        return [f"No difference shown for the other {len(others)} of {len(found)} pairs."]
    return [f"No difference shown between {', or between '.join(others)}."]
