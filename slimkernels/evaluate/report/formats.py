"""Scores, intervals and shares as the texts of a report's cells."""

from __future__ import annotations

from collections.abc import Sequence

from slimkernels.evaluate.report.blocks import Cell, mark_best
from slimkernels.evaluate.score_units import metric
from slimkernels.evaluate.statistics import Interval
from slimkernels.models.perplexity import perplexity

UNKNOWN = "unknown"


def score_cells(name: str, intervals: Sequence[Interval | None]) -> list[Cell]:
    """Makes the cells of a score with their intervals, and marks the best and second best value."""
    return _marked(
        [UNKNOWN if interval is None else _interval(name, interval) for interval in intervals], name, intervals
    )


def perplexity_cells(name: str, losses: Sequence[Interval | None]) -> list[Cell]:
    """Makes the cells of the perplexities of mean losses, exp(loss), as ``score_cells`` does."""
    texts = [UNKNOWN if loss is None else _between(*map(perplexity_text, loss)) for loss in losses]
    return _marked(texts, name, losses)


def perplexity_text(loss: float) -> str:
    """Formats exp(loss) with four digits."""
    return f"{perplexity(loss):,.4g}"


def percent(share: float | None) -> str:
    """Formats a share in percent, without the sign."""
    return UNKNOWN if share is None else f"{100 * share:.1f}"


def number(value: float | None, places: int) -> str:
    """Formats a number with so many decimal places."""
    return UNKNOWN if value is None else f"{value:,.{places}f}"


def _marked(texts: Sequence[str], name: str, intervals: Sequence[Interval | None]) -> list[Cell]:
    values = [None if interval is None else interval.value for interval in intervals]
    return mark_best(texts, values, lower_is_better=metric(name).lower_is_better)


def _interval(name: str, interval: Interval) -> str:
    return _between(*map(metric(name).text, interval))


def _between(value: str, low: str, high: str) -> str:
    return f"{value} [{low}, {high}]"
