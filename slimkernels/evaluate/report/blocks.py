"""Building blocks of a report, independent of its format: headings, paragraphs, tables and charts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple


class Cell(NamedTuple):
    """A cell of a table, and the mark by which it stands out in its column."""

    text: str
    mark: Literal["", "best", "second", "warning"] = ""


@dataclasses.dataclass(frozen=True)
class Heading:
    """The heading of a section; its level is 2 or 3."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a head; the first cell of a row is its name."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]


@dataclasses.dataclass(frozen=True)
class Chart:
    """An SVG element with a caption."""

    svg: str
    caption: str


Block = Heading | Paragraph | Table | Chart


def mark_best(cells: Sequence[str], values: Sequence[float | None], *, lower_is_better: bool = False) -> list[Cell]:
    """Makes the cells of a column and marks its best and second best values.

    Equal values have equal marks. If all values are equal, none is marked.
    """
    ranked = sorted({value for value in values if value is not None}, reverse=not lower_is_better)
    marks: dict[float, Literal["best", "second"]] = {}
    if len(ranked) > 1:
        marks = {ranked[0]: "best", ranked[1]: "second"}
    return [
        Cell(text, "" if value is None else marks.get(value, "")) for text, value in zip(cells, values, strict=True)
    ]
