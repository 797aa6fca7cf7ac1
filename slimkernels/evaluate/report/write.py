"""Writes a report: one static page, the same as Markdown, and every record as a line of JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkernels.durable import write_atomically
from slimkernels.evaluate.gemini import PUBLISHED, Outputs
from slimkernels.evaluate.records import Record, write_records
from slimkernels.evaluate.report.content import TITLE, content
from slimkernels.evaluate.report.html import to_html
from slimkernels.evaluate.report.markdown import to_markdown
from slimkernels.evaluate.summary import Records

PAGE, MARKDOWN, RECORDS = "report.html", "report.md", "records.jsonl"


def write_report(
    records: Sequence[Record], output_dir: str | os.PathLike[str], described: Mapping[str, Any] | None = None
) -> Path:
    """Writes ``report.html``, ``report.md`` and ``records.jsonl``, each whole or not at all.

    Args:
        records: Of every model, decoder and task, scored.
        output_dir: Made if it is not there.
        described: What was run, as ``run`` writes it.

    Returns:
        The page.

    Raises:
        ValueError: No records.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    grouped = Records(records)
    blocks = content(grouped, described or {})
    _write(output_dir / PAGE, to_html(TITLE, blocks, grouped))
    _write(output_dir / MARKDOWN, to_markdown(TITLE, blocks))
    write_records(output_dir / RECORDS, records)
    return output_dir / PAGE


def describe_outputs(files: Mapping[str, Outputs]) -> dict[str, Any]:
    """What to say of outputs from elsewhere: how they were scored, and whether that is how they were before."""
    entries = []
    for path, outputs in files.items():
        published = []
        for metric, (agreeing, scored) in outputs.agreement.items():
            own = sum(record.scores[metric] for record in outputs.records) / len(outputs.records)
            if scored:
                before = sum(bool(record.published.get(PUBLISHED[metric])) for record in outputs.records) / scored
                name = f"{metric.replace('_', ' ')} ({PUBLISHED[metric]})"
                published.append([name, f"{100 * own:.2f}", f"{100 * before:.2f}", f"{agreeing} of {scored}"])
        entries.append(
            {
                "explained": f"{path}: {len(outputs.records)} outputs of {outputs.records[0].model}, scored again. "
                f"strict is {outputs.strict_rule}.",
                "published": published,
            }
        )
    return {"outputs": entries}


def _write(path: Path, text: str) -> None:
    # A lone surrogate, which JSON may hold, has no UTF-8.
    write_atomically(path, text.encode("utf-8", "replace"))
