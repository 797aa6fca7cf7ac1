"""Output files in the layout of neulab/gemini-benchmark, with their strict and last-number accuracies recomputed.

A row has ``qid, prompt, question, generated_text, answer``. Published rows also have the scores ``is_correct,
is_correct_last`` and the numbers ``predict, predict_last``. The published files were scored by one of two rules, so
``is_correct`` has one of two meanings: it judges the first number after the last "The answer is" (no answer without
that phrase), or the first number after the last "Answer:" (the last number without that phrase). For a file with
``is_correct``, the rule that agrees with more of its rows is used; for other files, the first rule. A report on files
of different rules compares the last number (``comparable``). Both rules, and the last number, ignore text from a
question on that the model asks itself.

References: Akter et al. 2023, "An in-depth look at Gemini's language abilities", arXiv 2312.11444.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slimkernels.evaluate.records import Record, content_key

FIELDS = ("qid", "prompt", "question", "generated_text", "answer")
DECODER = "outputs"
# Each metric is compared with this published column.
PUBLISHED = {"strict": "is_correct", "last_number": "is_correct_last"}

# A sign belongs to a number even right after another number, because the published files were scored that way.
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+")


class Outputs(NamedTuple):
    """A scored file.

    Attributes:
        records: One record per row.
        strict_rule: Meaning of "strict" for this file, in words.
        agreement: Number of rows whose published score equals ours, and number of rows that have one, by metric.
    """

    records: list[Record]
    strict_rule: str
    agreement: dict[str, tuple[int, int]]


def read_outputs(path: str | os.PathLike[str]) -> Outputs:
    """Reads and scores a file; its folder names the model, and the folder above names the task.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A row does not have the layout; the message names the row and what it lacks.
    """
    path = Path(path)
    rows = _read_rows(path)
    rule = max(STRICT_RULES, key=lambda name: _agreement(rows, STRICT_RULES[name], PUBLISHED["strict"])[0])
    model, task = path.resolve().parent.name, path.resolve().parent.parent.name
    rules = {"strict": STRICT_RULES[rule], "last_number": last_number}
    records = []
    for order, row in enumerate(rows):
        answers = {name: find(row["generated_text"]) for name, find in rules.items()}
        records.append(
            Record(
                key=content_key(row["qid"], row["prompt"], row["generated_text"], row["answer"]),
                model=model,
                decoder=DECODER,
                task=f"{task} ({DECODER})",
                sample=str(row["qid"]),
                order=order,
                seed=None,
                prompt=row["prompt"],
                question=row["question"].strip(),
                reference=str(row["answer"]),
                output=row["generated_text"],
                answers=answers,
                scores={name: float(_is_correct(answer, row["answer"])) for name, answer in answers.items()},
                published={name: row[name] for name in row if name not in FIELDS},
            )
        )
    agreement = {name: _agreement(rows, find, PUBLISHED[name]) for name, find in rules.items()}
    return Outputs(records, rule, agreement)


def comparable(files: Sequence[Outputs]) -> list[Record]:
    """Returns the records of files for one report, in which no score has two meanings.

    Where the strict scores of a task's files follow different rules, the last number, whose rule is the same in all
    files, becomes the task's main score, and each strict score is named by its rule.
    """
    rules: dict[str, set[str]] = {}
    for file in files:
        rules.setdefault(file.records[0].task, set()).add(file.strict_rule)
    records = []
    for file in files:
        if len(rules[file.records[0].task]) == 1:
            records += file.records
            continue
        name = STRICT_NAMES[file.strict_rule]
        for record in file.records:
            answers, scores = (
                {"last_number": values["last_number"], name: values["strict"]}
                for values in (record.answers, record.scores)
            )
            records.append(dataclasses.replace(record, answers=answers, scores=scores))
    return records


def after_the_answer_is(text: str) -> str | None:
    """Returns the first number after the last "The answer is"; None without that phrase or a number after it."""
    _, marker, after = text.partition("Q:")[0].rpartition("The answer is")
    return _first(after) if marker else None


def after_answer_colon(text: str) -> str | None:
    """Returns the first number after the last "Answer:"; the last number without that phrase or a number after it."""
    text = text.partition("\nQ:")[0]
    _, marker, after = text.rpartition("Answer:")
    found = _first(after) if marker else None
    return last_number(text) if found is None else found


def last_number(text: str) -> str | None:
    """Returns the last number before the first question that the model asks itself."""
    numbers = _NUMBER.findall(text.partition("Q:")[0])
    return numbers[-1].replace(",", "") if numbers else None


_Finder = Callable[[str], str | None]
STRICT_RULES: dict[str, _Finder] = {
    'the first number after the last "The answer is"': after_the_answer_is,
    'the first number after the last "Answer:", or else the last number': after_answer_colon,
}

# Names of the strict score by its rule, where a report has both.
STRICT_NAMES = dict(zip(STRICT_RULES, ('strict by "The answer is"', 'strict by "Answer:"'), strict=True))


def _first(text: str) -> str | None:
    found = _NUMBER.search(text)
    return None if found is None else found[0].replace(",", "")


def _is_correct(answer: str | None, reference: str) -> bool:
    return answer is not None and float(answer) == float(str(reference).replace(",", ""))


def _agreement(rows: Sequence[Mapping[str, Any]], find: _Finder, column: str) -> tuple[int, int]:
    scored = [row for row in rows if column in row]
    agreeing = sum(_is_correct(find(row["generated_text"]), row["answer"]) == bool(row[column]) for row in scored)
    return agreeing, len(scored)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"outputs not found: {path} is not a file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            missing = [name for name in FIELDS if name not in row]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, must be a JSON object: {error}") from error
        if missing:
            raise ValueError(
                f"{path}, line {number}, must have the fields {', '.join(FIELDS)}, but has no {', '.join(missing)}"
            )
        if not all(isinstance(row[name], str) for name in ("prompt", "question", "generated_text")):
            raise ValueError(f"{path}, line {number}: prompt, question and generated_text must be strings")
        try:
            float(str(row["answer"]).replace(",", ""))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: answer must be a number, got {row['answer']!r}") from error
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} must hold at least one row, got none")
    return rows
