"""Charts as inline SVG, in the page's own colours: dots with intervals, and lines over slices."""

from __future__ import annotations

import html
from collections.abc import Sequence

from slimkernels.evaluate.statistics import Interval

_WIDTH = 440
_LEFT = 30
_ROW = 46
# Series are told apart by shape as well as by colour (the page defines .s0 ... .s5).
NUM_STYLES = 6


def dot_chart(labels: Sequence[str], intervals: Sequence[Interval], title: str) -> str:
    """One row for each label: its name, a dot at its value, and a line over its interval; values in [0, 1]."""
    height = _ROW * len(labels) + 30
    parts = [_axis(height - 24, 8)]
    for row, (label, interval) in enumerate(zip(labels, intervals, strict=True)):
        y = _ROW * row + 34
        parts.append(f'<text x="{_LEFT}" y="{y - 13}">{html.escape(label)}</text>')
        parts.append(
            f'<path class="s{row % NUM_STYLES} whisker" d="M{_x(interval.low):.1f} {y}H{_x(interval.high):.1f}'
            f'M{_x(interval.low):.1f} {y - 5}v10M{_x(interval.high):.1f} {y - 5}v10"/>'
        )
        parts.append(_marker(row, _x(interval.value), y))
    return _svg(height, title, parts)


def line_chart(
    labels: Sequence[str], series: Sequence[Sequence[float | None]], names: Sequence[str], title: str
) -> str:
    """A line for each name over the labels; values in [0, 1], None where there is none."""
    top, bottom = 12 + 20 * len(names), 150 + 20 * len(names)
    step = (_WIDTH - 2 * _LEFT) / max(len(labels), 1)
    parts = []
    for share in (0, 0.5, 1):
        y = bottom - share * (bottom - top)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - 8}"/>')
        parts.append(f'<text class="small" x="{_LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{share * 100:.0f}</text>')
    for index, label in enumerate(labels):
        x = _LEFT + step * (index + 0.5)
        parts.append(
            f'<text class="small" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{html.escape(label)}</text>'
        )
    for row, (values, name) in enumerate(zip(series, names, strict=True)):
        points = [
            (_LEFT + step * (index + 0.5), bottom - value * (bottom - top))
            for index, value in enumerate(values)
            if value is not None
        ]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        if len(points) > 1:
            parts.append(f'<path class="s{row % NUM_STYLES} line" d="M{path}"/>')
        parts += [_marker(row, x, y) for x, y in points]
        parts += [
            _marker(row, _LEFT + 6, 12 + 20 * row),
            f'<text x="{_LEFT + 18}" y="{17 + 20 * row}">{html.escape(name)}</text>',
        ]
    return _svg(bottom + 30, title, parts)


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - 2 * _LEFT)


def _axis(y: float, top: float) -> str:
    marks = (0, 0.25, 0.5, 0.75, 1)
    lines = "".join(f"M{_x(share):.1f} {top}V{y}" for share in marks)
    texts = "".join(
        f'<text class="small" x="{_x(share):.1f}" y="{y + 16}" text-anchor="middle">{share * 100:.0f}</text>'
        for share in marks
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
