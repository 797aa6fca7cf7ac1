"""Charts as inline SVG in the colours of the page: dots with intervals, and lines over slices."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from slimkernels.evaluate.score_units import Metric
from slimkernels.evaluate.statistics import Interval

_WIDTH = 440
_LEFT = 30
_ROW = 38
# About as many characters of a name as fit the width.
_MAX_NAME = 50
# Series differ in shape as well as in colour (the page defines the classes .s0 to .s5).
NUM_STYLES = 6


class Axis(NamedTuple):
    """An axis that ends at its first and last mark.

    Attributes:
        marks: Marked values in ascending order.
        texts: Texts of the marks.
    """

    marks: Sequence[float]
    texts: Sequence[str]

    @classmethod
    def of(cls, values: Sequence[float], metric: Metric) -> Axis:
        """Makes an axis from 0 to the highest possible score, or in round steps around the values without one."""
        if metric.highest is not None:
            marks = [metric.highest * share for share in (0, 0.25, 0.5, 0.75, 1)]
            return cls(marks, [f"{metric.factor * mark:g}" for mark in marks])
        low, high = min(values), max(values)
        rough = max((high - low) / 4, 1e-3)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first, last = math.floor(low / step), math.floor(high / step) + 1
        marks = [step * index for index in range(first, last + 1)]
        return cls(marks, [f"{mark:.6g}" for mark in marks])

    def share(self, value: float) -> float:
        """Returns the position of a value on the axis, from 0 to 1."""
        return (value - self.marks[0]) / (self.marks[-1] - self.marks[0])


def dot_chart(labels: Sequence[str], intervals: Sequence[Interval], metric: Metric, title: str) -> str:
    """Draws one row for each label: its name, a dot at its value, and a line over its interval."""
    height = _ROW * len(labels) + 34
    axis = Axis.of([end for interval in intervals for end in interval], metric)

    def across(value: float) -> float:
        return _across(axis.share(value))

    parts = [_draw(axis, height - 24, 8)]
    for row, (label, interval) in enumerate(zip(labels, intervals, strict=True)):
        y = _ROW * row + 34
        parts.append(f'<text x="{_LEFT}" y="{y - 11}">{_name(label)}</text>')
        parts.append(
            f'<path class="s{row % NUM_STYLES} whisker" d="M{across(interval.low):.1f} {y}H{across(interval.high):.1f}'
            f'M{across(interval.low):.1f} {y - 5}v10M{across(interval.high):.1f} {y - 5}v10"/>'
        )
        parts.append(_marker(row, across(interval.value), y))
    return _svg(height, title, parts)


def line_chart(
    labels: Sequence[str],
    series: Sequence[Sequence[float | None]],
    names: Sequence[str],
    metric: Metric,
    title: str,
) -> str:
    """Draws a line over the labels for each name; None is a missing value."""
    axis = Axis.of([value for values in series for value in values if value is not None], metric)
    top, bottom = 12 + 20 * len(names), 150 + 20 * len(names)
    step = (_WIDTH - 2 * _LEFT) / max(len(labels), 1)
    parts = []
    for mark, text in zip(axis.marks, axis.texts, strict=True):
        y = bottom - axis.share(mark) * (bottom - top)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - 8}"/>')
        parts.append(f'<text class="small" x="{_LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for index, label in enumerate(labels):
        x = _LEFT + step * (index + 0.5)
        parts.append(
            f'<text class="small" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{html.escape(label)}</text>'
        )
    for row, (values, name) in enumerate(zip(series, names, strict=True)):
        points = [
            (_LEFT + step * (index + 0.5), bottom - axis.share(value) * (bottom - top))
            for index, value in enumerate(values)
            if value is not None
        ]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        if len(points) > 1:
            parts.append(f'<path class="s{row % NUM_STYLES} line" d="M{path}"/>')
        parts += [_marker(row, x, y) for x, y in points]
        parts += [
            _marker(row, _LEFT + 6, 12 + 20 * row),
            f'<text x="{_LEFT + 18}" y="{17 + 20 * row}">{_name(name)}</text>',
        ]
    return _svg(bottom + 30, title, parts)


def _name(text: str) -> str:
    """Escapes a name, of which a long one keeps its end."""
    return html.escape(text if len(text) <= _MAX_NAME else f"\u2026{text[1 - _MAX_NAME :]}")


def _across(share: float) -> float:
    return _LEFT + share * (_WIDTH - 2 * _LEFT)


def _draw(axis: Axis, y: float, top: float) -> str:
    places = [_across(axis.share(mark)) for mark in axis.marks]
    lines = "".join(f"M{x:.1f} {top}V{y}" for x in places)
    texts = "".join(
        f'<text class="small" x="{x:.1f}" y="{y + 16}" text-anchor="middle">{text}</text>'
        for x, text in zip(places, axis.texts, strict=True)
    )
    return f'<path class="grid" d="{lines}"/>{texts}'


def _marker(style: int, x: float, y: float) -> str:
    name = f'class="s{style % NUM_STYLES} marker"'
    shapes = (
        f'<circle {name} cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
        f'<rect {name} x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>',
        f'<path {name} d="M{x:.1f} {y - 6:.1f}l6 10.5h-12z"/>',
        f'<path {name} d="M{x:.1f} {y - 6.5:.1f}l6.5 6.5-6.5 6.5-6.5-6.5z"/>',
        f'<path {name} d="M{x:.1f} {y + 6:.1f}l6-10.5h-12z"/>',
        f'<rect {name} x="{x - 6:.1f}" y="{y - 3:.1f}" width="12" height="6"/>',
    )
    return shapes[style % NUM_STYLES]


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    name = html.escape(title, quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
