"""Writing of a report: one static HTML page, the same content as Markdown, and every record as a line of JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkernels.durable import write_atomically
from slimkernels.evaluate.published_outputs import PUBLISHED, Outputs
from slimkernels.evaluate.records import Record, write_records
from slimkernels.evaluate.report.content import TITLE, content
from slimkernels.evaluate.report.html import to_html
from slimkernels.evaluate.report.markdown import to_markdown
from slimkernels.evaluate.summary import Records

PAGE, MARKDOWN, RECORDS = "report.html", "report.md", "records.jsonl"


def write_report(
    records: Sequence[Record], output_dir: str | os.PathLike[str], described: Mapping[str, Any] | None = None
) -> Path:
    """Writes ``report.html``, ``report.md`` and ``records.jsonl``, each atomically.

    Args:
        records: Scored records of all models, decoders and tasks.
        output_dir: Folder of the report, created if it does not exist.
        described: Description of the run, as ``load_run`` or ``describe_outputs`` returns it.

    Returns:
        The path of the page.

    Raises:
        ValueError: There are no records.
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
    """Describes outputs from elsewhere for the report: how they are scored, and how often published scores agree."""
    entries = []
    rules: dict[str, set[str]] = {}
    for outputs in files.values():
        rules.setdefault(outputs.records[0].task, set()).add(outputs.strict_rule)
    for path, outputs in files.items():
        differs = len(rules[outputs.records[0].task]) > 1
        other = " Other files of its task follow another rule, so the last number is compared." if differs else ""
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
                f'The score "strict" judges {outputs.strict_rule}.{other}',
                "published": published,
            }
        )
    return {"outputs": entries}


def _write(path: Path, text: str) -> None:
    # JSON may hold lone surrogates, which UTF-8 cannot encode.
    write_atomically(path, text.encode("utf-8", "replace"))
