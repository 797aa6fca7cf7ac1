"""The questions that ``slimkernels decode`` answers, and the predictions that it prints and writes."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slimkernels.cli.search_options import DEFAULT_REFERENCE_FIELD
from slimkernels.text_files import check_characters

if TYPE_CHECKING:
    from slimkernels.durable import JsonLines
    from slimkernels.search import PathFinder, Result


class Asked(NamedTuple):
    """A question of the input.

    Attributes:
        text: The question.
        record: All fields of its line in the file; empty for a question from the command line.
    """

    text: str
    record: Mapping[str, Any]


def read_questions(args: argparse.Namespace) -> list[Asked]:
    """Reads the question of the command line, or those of --questions."""
    if args.question is not None:
        text = sys.stdin.read().strip() if args.question == "-" else args.question
        if not text.strip():
            raise ValueError("the question must have text in it, got an empty one")
        return [Asked(text, {})]
    name = "the standard input" if args.questions == "-" else args.questions
    # Lines of JSON end at newlines alone: a string may hold other separators, such as U+2028. A file may begin with a
    # byte order mark.
    text = sys.stdin.read() if args.questions == "-" else Path(args.questions).read_text(encoding="utf-8")
    lines = text.removeprefix("\ufeff").split("\n")
    asked: list[Asked] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(asked) == args.samples:
            break
        asked.append(_read_question(args, line, f"line {number} of {name}"))
    if not asked:
        raise ValueError(f"{name} must hold at least one question, got none")
    return asked


def _read_question(args: argparse.Namespace, line: str, where: str) -> Asked:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} must be a JSON object: {error}") from error
    for field in filter(None, (args.question_field, args.reference_field)):
        if not isinstance(record, dict) or field not in record:
            fields = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{where} has no field {field!r}, only {fields}")
    text = record[args.question_field]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the field {args.question_field!r} must be text in {where}, got {text!r}")
    check_characters(text, f"the field {args.question_field!r} in {where}")
    return Asked(text, record)


def settings_of(args: argparse.Namespace, finder: PathFinder, template: str) -> str:
    """Returns a hash of everything that the predictions depend on, except for the questions."""
    from slimkernels.search.trace import header_of

    header = header_of(finder.engine, finder.config, finder.checks, [])
    content = [header, args.decoder, args.selector, args.verifier, args.nli, template, args.prompt_style == "plain"]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def answered_questions(results: JsonLines, settings: str, asked: Sequence[Asked]) -> set[int]:
    """Returns the indices of the questions for which the results file has a prediction."""
    for record in results.found:
        if record.get("settings") != settings:
            raise ValueError(f"{results.path} holds predictions of other settings or another model: give another --out")
        index = record["index"]
        if index >= len(asked) or asked[index].text != record.get("question"):
            raise ValueError(f"{results.path} holds predictions of other questions: give another --out")
    return {record["index"] for record in results.found}


def record_of(
    args: argparse.Namespace, index: int, asked: Asked, finder: PathFinder, result: Result, settings: str
) -> dict[str, Any]:
    """Returns the line of --out for a question."""
    return {
        "index": index,
        "question": asked.text,
        "reference": asked.record.get(args.reference_field or DEFAULT_REFERENCE_FIELD),
        "text": result.text,
        "answer": result.answer,
        "finished": result.finished,
        "unfinished_reason": _unfinished_reason(result),
        "candidates": [
            {
                "text": candidate.text,
                "answer": candidate.answer,
                "score": score,
                "sum_logprob": candidate.sum_logprob,
                "num_tokens": candidate.num_tokens,
                "weight": candidate.weight,
            }
            for candidate, score in zip(result.candidates, result.scores, strict=True)
        ],
        "num_tokens": result.num_tokens,
        "saved_tokens": result.saved_tokens,
        "seconds": round(result.seconds, 3),
        "ends": result.reasons,
        "notes": list(result.notes),
        "decoder": args.decoder,
        "model": args.model,
        "seed": finder.config.seed,
        "settings": settings,
    }


def _unfinished_reason(result: Result) -> str | None:
    if result.finished:
        return None
    return (result.node is not None and result.tree.reasons[result.node]) or result.notes[-1]


def summary_of(index: int, total: int, result: Result, known_notes: set[str]) -> str:
    """Returns what is printed of a result: its outcome, its answer and text, and the notes that are not yet known."""
    outcome = "finished" if result.finished else f"unfinished ({_unfinished_reason(result)})"
    answer = "" if result.answer is None else f"answer: {result.answer}\n"
    notes = "".join(f"note: {note}\n" for note in result.notes if note not in known_notes)
    known_notes.update(result.notes)
    return (
        f"question {index + 1} of {total}: {outcome}, {len(result.candidates)} candidates, {result.num_tokens} tokens, "
        f"{result.seconds:.1f} s\n{notes}{answer}{result.text.strip()}\n"
    )
