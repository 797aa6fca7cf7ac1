"""A record's answers and scores, from its output."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

from slimkernels.evaluate.answers import extract, same_answer
from slimkernels.evaluate.judge import ratings_of
from slimkernels.evaluate.records import Record
from slimkernels.evaluate.score_units import JUDGE
from slimkernels.evaluate.tasks import ROUGE, TASKS, Task


def score(record: Record) -> Record:
    """The record with its answers and scores made anew, and what judges gave it; not one of ours: unchanged.

    Raises:
        ImportError: Rouge-L needs the package rouge-score.
    """
    if record.task not in TASKS:
        return record
    kind = TASKS[record.task][0]
    if kind is None:
        scores: Mapping[str, float] = {ROUGE: rouge_l(record.output, record.reference)}
        answers: Mapping[str, str | None] = {ROUGE: record.output.strip() or None}
        return dataclasses.replace(record, answers=answers, scores={**scores, **_judged(record)})
    # The flexible answer first: it is what a decoder votes by, and what arms are compared by first.
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


def vote(task: str, text: str, choices: tuple[str, ...]) -> str | None:
    """What a candidate's text counts for in a vote: its flexible answer; of a whole text, None."""
    kind = TASKS[task][0] if task in TASKS else None
    return None if kind is None else extract(text, kind, choices).flexible


def rouge_l(output: str, reference: str) -> float:
    """Rouge-L F1 of two texts, as rouge-score has it with stemming.

    Its tokenizer keeps the letters a to z and the digits alone; ``count_dropped`` says how much that leaves out.

    Raises:
        ImportError: The package is missing.

    References: Lin 2004, "ROUGE: a package for automatic evaluation of summaries".
    """
    return float(_rouge_scorer().score(reference, output)["rougeL"].fmeasure)


def count_dropped(text: str) -> int:
    """Letters and digits outside ASCII: what Rouge-L's tokenizer does not see."""
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
