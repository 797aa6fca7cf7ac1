"""A report's blocks as Markdown, without its charts and outputs."""

from __future__ import annotations

from collections.abc import Sequence

from slimkernels.evaluate.report.blocks import AllOutputs, Block, Cell, Heading, Items, Paragraph, Table

_MARKS = {"": "{}", "best": "**{}**", "second": "*{}*", "warning": "{} (!)"}


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """Writes the whole document."""
    parts = [f"# {_escape(title)}"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {_escape(block.text)}")
        elif isinstance(block, Paragraph):
            parts.append(_escape(block.text))
        elif isinstance(block, Table):
            lines = [_row(block.head), _row(["---"] * len(block.head)), *map(_row, block.rows)]
            parts.append("\n".join(lines))
        elif isinstance(block, Items):
            parts.append("\n".join(f"- **{_escape(subject)}**: {_escape(said)}" for subject, said in block.entries))
        elif isinstance(block, AllOutputs):
            parts.append("In `records.jsonl`, and on the page.")
    return "\n\n".join(parts) + "\n"


def _row(cells: Sequence[Cell | str]) -> str:
    texts = []
    for cell in cells:
        text, mark = (cell, "") if isinstance(cell, str) else cell
        texts.append(_MARKS[mark].format(_escape(text)))
    return f"| {' | '.join(texts)} |"


def _escape(text: str) -> str:
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")
