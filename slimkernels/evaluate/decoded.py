"""Files of ``slimkernels decode --out`` as records, and one reader for these and for outputs from elsewhere."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from slimkernels.durable import whole_lines
from slimkernels.evaluate.answers import AnswerKind
from slimkernels.evaluate.own_questions import asked, kind_of_answers, own_sample
from slimkernels.evaluate.published_outputs import Outputs, read_outputs
from slimkernels.evaluate.records import Record, content_key
from slimkernels.evaluate.scoring import score
from slimkernels.evaluate.tasks import TEXT, Sample

TASK = "decoded questions"
_FIELDS = ("index", "question", "reference", "text", "decoder", "model", "seed", "num_tokens", "seconds", "finished")


def read_all_outputs(paths: Sequence[str], *, kind: str | None = None) -> dict[str, Outputs]:
    """Reads and scores files, each written by ``slimkernels decode --out`` or in the layout of ``published_outputs``.

    Args:
        paths: Files to read.
        kind: Kind of the answers in files of ``decode``; None finds it as ``load_questions`` does, over all files.

    Raises:
        FileNotFoundError, ValueError: As ``read_outputs``; or an answer of ``decode`` has no reference to score it by.
    """
    decoded = {path: _read_decoded(path) for path in paths if _is_decoded(path)}
    samples = [_sample(path, row) for path, rows in decoded.items() for row in rows]
    found = kind or (kind_of_answers(samples) if samples else None)
    names = Counter((rows[0]["model"], rows[0]["decoder"]) for rows in decoded.values())
    files = {}
    for path in paths:
        if path not in decoded:
            files[path] = read_outputs(path)
            continue
        rows = decoded[path]
        several = names[rows[0]["model"], rows[0]["decoder"]] > 1
        # Runs that differ in other settings are told apart by their files.
        suffix = f" ({Path(path).stem})" if several else ""
        records = [_record(path, row, cast(str, found), suffix) for row in rows]
        files[path] = Outputs(records, f"the announced answer, of the kind {found!r}", {})
    return files


def _is_decoded(path: str) -> bool:
    """Returns whether a file's first line has the fields of ``decode``."""
    try:
        with open(path, encoding="utf-8") as file:
            first = json.loads(file.readline() or "null")
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and set(_FIELDS) <= set(first)


def _read_decoded(path: str) -> list[Mapping[str, Any]]:
    with open(path, "rb") as file:
        return [json.loads(line) for line in whole_lines(file)]


def _sample(path: str | os.PathLike[str], row: Mapping[str, Any]) -> Sample:
    if row["reference"] is None:
        raise ValueError(
            f"{path}, question {row['index'] + 1}, has no reference to score it by: run decode with --reference-field"
        )
    return own_sample(row, "question", "reference", "choices")


def _record(path: str, row: Mapping[str, Any], kind: str, suffix: str) -> Record:
    answers = cast("AnswerKind | None", None if kind == TEXT else kind)
    sample = asked(_sample(path, row), answers)
    number = row["index"] + 1
    record = Record(
        key=content_key("decode", row["settings"], row["index"], row["question"], row["text"]),
        model=row["model"],
        decoder=f"{row['decoder']}{suffix}",
        task=TASK,
        # Files with other questions at the same place have no samples in common.
        sample=f"{number}, {content_key(row['question'])[:6]}",
        order=row["index"],
        seed=row["seed"],
        prompt=sample.question,
        question=sample.question,
        reference=sample.reference,
        output=row["text"],
        answers={},
        scores={},
        choices=sample.choices,
        tokens=row["num_tokens"],
        seconds=row["seconds"],
        finished=row["finished"],
        kind=kind,
    )
    return score(record)
