"""Building blocks of a report, independent of its format: headings, paragraphs, lists, tables and charts."""

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
class Items:
    """A list, each entry of which is a subject and what is said of it."""

    entries: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a head; the first cell of a row is its name."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]


class Chart(NamedTuple):
    """An SVG element with a caption."""

    svg: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Charts:
    """Charts next to each other, or below each other where the page is narrow."""

    charts: Sequence[Chart]


@dataclasses.dataclass(frozen=True)
class AllOutputs:
    """The place of the outputs side by side, which a format takes from the records."""


Block = Heading | Paragraph | Items | Table | Charts | AllOutputs


def mark_best(cells: Sequence[str], values: Sequence[float | None], *, lower_is_better: bool = False) -> list[Cell]:
    """Makes the cells of a score and marks its best and second best values.

    The first word of a cell is its value as it is printed. Values that are printed alike have equal marks; if all are,
    none is marked.
    """
    printed = [text.split()[0] for text in cells]
    known = [(value, text) for value, text in zip(values, printed, strict=True) if value is not None]
    ranked = list(dict.fromkeys(text for _, text in sorted(known, reverse=not lower_is_better)))
    marks: dict[str, Literal["best", "second"]] = {}
    if len(ranked) > 1:
        marks = {ranked[0]: "best", ranked[1]: "second"}
    return [
        Cell(text, "" if value is None else marks.get(word, ""))
        for text, word, value in zip(cells, printed, values, strict=True)
    ]
