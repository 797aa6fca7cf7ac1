"""Scoring of records: extracts answers from an output and compares them with the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from slimkernels.evaluate.answers import AnswerKind, canonical, extract, same_answer
from slimkernels.evaluate.judge import ratings_of
from slimkernels.evaluate.records import Record
from slimkernels.evaluate.score_units import JUDGE
from slimkernels.evaluate.tasks import ROUGE, TASKS, TEXT, Task


def score(record: Record) -> Record:
    """Returns the record with answers and scores computed from its output, and with its judges' ratings as scores.

    Records without a kind (``kind_of``) are returned unchanged.

    Raises:
        ImportError: Rouge-L needs the package rouge-score, which is not installed.
    """
    kind = kind_of(record)
    if kind is None:
        return record
    if kind == TEXT:
        scores: Mapping[str, float] = {ROUGE: rouge_l(record.output, record.reference)}
        answers: Mapping[str, str | None] = {ROUGE: record.output.strip() or None}
        return dataclasses.replace(record, answers=answers, scores={**scores, **_judged(record)})
    # The first metric is the main one. It is the flexible answer, by which decoders vote as well.
    kind = cast(AnswerKind, kind)
    found = extract(record.output, kind, record.choices)
    answers = {"flexible": found.flexible, "strict": found.strict}
    scores = {name: float(same_answer(answer, record.reference, kind)) for name, answer in answers.items()}
    return dataclasses.replace(record, answers=answers, scores={**scores, **_judged(record)})


def _judged(record: Record) -> dict[str, float]:
    rated = {JUDGE + judge: rating.value for judge, rating in ratings_of(record).items()}
    return {name: value for name, value in rated.items() if value is not None}


def check_scorer(task: Task) -> None:
    """Raises ImportError where a task's scores need a package that is missing."""
    if task.kind is None:
        _rouge_scorer()


def kind_of(record: Record) -> str | None:
    """Returns the kind of the answers to a record's task, ``TEXT`` for free texts, or None where nothing is extracted.

    The latter are records of held-out documents, of multiple choice, and of outputs that were published with scores.
    """
    if record.task in TASKS:
        return TASKS[record.task][0] or TEXT
    return record.kind or None


def vote(record: Record, text: str) -> str | None:
    """Returns the flexible answer that a candidate's text votes for; None without one, and for free texts."""
    kind = kind_of(record)
    if kind in (None, TEXT):
        return None
    answer = extract(text, cast(AnswerKind, kind), record.choices).flexible
    return None if answer is None else canonical(answer, cast(AnswerKind, kind))


def rouge_l(output: str, reference: str) -> float:
    """Computes the Rouge-L F1 score of two texts, in [0, 1], by the package rouge-score with stemming.

    Its tokenizer keeps only digits and the letters a to z, so texts in other scripts score 0; ``count_dropped`` counts
    the letters that it drops.

    Raises:
        ImportError: rouge-score is not installed.

    References: Lin 2004, "ROUGE: a package for automatic evaluation of summaries".
    """
    return float(_rouge_scorer().score(reference, output)["rougeL"].fmeasure)


def count_dropped(text: str) -> int:
    """Counts the letters and digits outside ASCII, which Rouge-L's tokenizer drops."""
    return sum(character.isalnum() and not character.isascii() for character in text)


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise ImportError(
            "Rouge-L needs the package rouge-score: pip install 'slimkernels[evaluate]'", name=error.name
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=True)
