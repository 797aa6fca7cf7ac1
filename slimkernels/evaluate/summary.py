"""Summaries of records: scores with intervals, paired differences, slices, and scores within a smaller budget."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, cast

import numpy as np

from slimkernels.evaluate.answers import AnswerKind, before_next_question, same_answer
from slimkernels.evaluate.records import Record
from slimkernels.evaluate.score_units import JUDGE
from slimkernels.evaluate.scoring import count_dropped, kind_of, vote
from slimkernels.evaluate.statistics import (
    Difference,
    Interval,
    bootstrap_interval,
    holm,
    paired_difference,
    wilson_interval,
)
from slimkernels.evaluate.tasks import TEXT

_NUM_RESAMPLES = 10_000


class Arm(NamedTuple):
    """One side of a comparison: a model with a decoder, or with an empty decoder if nothing is decoded."""

    model: str
    decoder: str

    def __str__(self) -> str:
        return f"{self.model} · {self.decoder}" if self.decoder else self.model


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit on the tokens or the seconds spent on each question."""

    unit: Literal["tokens", "seconds"]
    limit: float


@dataclasses.dataclass(frozen=True)
class Overall:
    """The results of an arm on a task.

    Attributes:
        arm: Model and decoder.
        task: Name of the task.
        samples: Number of different samples.
        labels: Total number of labels of documents; None for questions.
        seeds: Seeds of the sampling; empty for decoders without randomness.
        scores: Mean and interval by metric. Seeds of a sample are averaged first; documents are weighted by labels.
        extracted: Share of outputs in which an answer was found by metric, or which a judge rated.
        empty: Share of outputs without any text; None for documents.
        finished: Share of outputs that ended before a limit cut them off; None if unknown.
        tokens: Mean number of tokens generated for a question; None if unknown.
        seconds: Mean wall time of a question or document; None if unknown.
        output_tokens: Mean number of tokens of an output; None if unknown.
        dropped: Number of letters outside ASCII in outputs and references, which Rouge-L drops, and of all letters.
        within: Share of right answers within a budget by its unit; None if unknown.
    """

    arm: Arm
    task: str
    samples: int
    labels: int | None
    seeds: tuple[int, ...]
    scores: Mapping[str, Interval]
    extracted: Mapping[str, float]
    empty: float | None
    finished: float | None
    tokens: float | None
    seconds: float | None
    output_tokens: float | None
    dropped: tuple[int, int]
    within: Mapping[str, float | None]


class Comparison(NamedTuple):
    """The difference of a metric between two arms on a task, ``b`` minus ``a``."""

    task: str
    metric: str
    a: Arm
    b: Arm
    difference: Difference


class Slice(NamedTuple):
    """A part of a task's samples.

    Attributes:
        label: Range of values that the part covers.
        counts: Number of outputs in the part for each arm.
        scores: Mean score of these outputs for each arm; None if it has none.
    """

    label: str
    counts: list[int]
    scores: list[float | None]


class Records:
    """Records grouped by arm and task, both in the order of their first record.

    Attributes:
        arms: All arms.
        tasks: Names of all tasks.

    Raises:
        ValueError: There are no records.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._cells: dict[tuple[Arm, str], list[Record]] = defaultdict(list)
        for record in records:
            self._cells[Arm(record.model, record.decoder), record.task].append(record)
        if not self._cells:
            raise ValueError("records must be at least one, got none: there is nothing to report")
        self.arms = list(dict.fromkeys(arm for arm, _ in self._cells))
        self.tasks = list(dict.fromkeys(task for _, task in self._cells))

    def of(self, arm: Arm, task: str) -> list[Record]:
        """Returns the records of an arm on a task."""
        return self._cells.get((arm, task), [])

    def metrics(self, task: str) -> list[str]:
        """Returns the names of a task's metrics, the main one first."""
        own = (record for (_, name), records in self._cells.items() if name == task for record in records)
        return list(dict.fromkeys(metric for record in own for metric in record.scores))

    def arms_on(self, task: str) -> list[Arm]:
        """Returns the arms that have records of a task."""
        return [arm for arm in self.arms if self.of(arm, task)]

    def scores(self, arm: Arm, task: str, metric: str) -> dict[str, float]:
        """Returns the mean score over seeds of every sample that has this metric."""
        found: dict[str, list[float]] = defaultdict(list)
        for record in self.of(arm, task):
            if metric in record.scores:
                found[record.sample].append(record.scores[metric])
        return {sample: sum(values) / len(values) for sample, values in found.items()}

    def weights(self, arm: Arm, task: str) -> dict[str, int]:
        """Returns the weight of every sample in a mean: its number of labels for a document, 1 for a question."""
        return {record.sample: record.labels or 1 for record in self.of(arm, task)}


def overall(records: Records, arm: Arm, task: str, budgets: Sequence[Budget] = ()) -> Overall:
    """Summarises an arm on a task of which it has records."""
    own = records.of(arm, task)
    weights, labels = records.weights(arm, task), [record.labels for record in own]
    scores = {metric: records.scores(arm, task, metric) for metric in records.metrics(task)}
    texts = [text for record in own for text in (record.output, record.reference)]
    return Overall(
        arm=arm,
        task=task,
        samples=len({record.sample for record in own}),
        labels=None if None in labels else sum(filter(None, labels)),
        seeds=tuple(sorted({record.seed for record in own if record.seed is not None})),
        scores={
            metric: _interval(list(found.values()), [weights[sample] for sample in found])
            for metric, found in scores.items()
            if found
        },
        extracted={
            metric: _mean([metric in record.scores and record.answers.get(metric, "") is not None for record in own])
            or 0.0
            for metric in scores
            if metric in own[0].answers or metric.startswith(JUDGE)
        },
        empty=None if own[0].labels is not None else _mean([not record.output.strip() for record in own]),
        finished=_mean([record.finished for record in own]),
        tokens=_mean([record.tokens for record in own]),
        seconds=_mean([record.seconds for record in own]),
        output_tokens=_mean([record.output_tokens for record in own]),
        dropped=(sum(map(count_dropped, texts)), sum(sum(map(str.isalnum, text)) for text in texts)),
        within={budget.unit: _mean([score_within(record, budget) for record in own]) for budget in budgets},
    )


def budgets(records: Records, task: str) -> list[Budget]:
    """Returns the budgets to compare arms within: the lowest mean costs of a question in arms with several candidates.

    There are no budgets if fewer than two arms recorded their cost, or if no arm has several candidates.
    """
    own = [record for arm in records.arms for record in records.of(arm, task)]
    if not own or kind_of(own[0]) in (None, TEXT):
        return []
    searching, spending = [], 0
    for arm in records.arms:
        own = records.of(arm, task)
        spending += bool(own) and all(record.tokens is not None and record.seconds is not None for record in own)
        if any(len(record.candidates) > 1 for record in own):
            searching.append(own)
    if spending < 2 or not searching:
        return []
    tokens = [_mean([record.tokens for record in own]) or 0.0 for own in searching]
    seconds = [_mean([record.seconds for record in own]) or 0.0 for own in searching]
    return [Budget("tokens", min(tokens)), Budget("seconds", min(seconds))]


def score_within(record: Record, budget: Budget) -> float | None:
    """Returns 1 if the answer would have been right had the decoder stopped at the budget, else 0; None if unknown.

    A stopped decoder chooses among the candidates completed within the budget: self-consistency by their votes, others
    by the scores that the candidates had in the end. Time is assumed to be proportional to tokens.
    """
    kind = kind_of(record)
    if record.tokens is None or record.seconds is None or kind in (None, TEXT):
        return None
    limit = budget.limit if budget.unit == "tokens" else budget.limit * record.tokens / max(record.seconds, 1e-9)
    # Half a token absorbs rounding: a mean of integers may fall just below the integer that it equals.
    there = [candidate for candidate in record.candidates if candidate["spent"] <= limit + 0.5]
    answers = [vote(record, candidate["text"]) for candidate in there]
    if record.decoder == "self-consistency":
        votes = Counter(answer for answer in answers if answer is not None)
        values = [float(votes[answer]) if answer is not None else 0.0 for answer in answers]
    else:
        values = [candidate["score"] for candidate in there]
    if not there:
        return 0.0
    best = max(range(len(there)), key=lambda index: (values[index], there[index]["sum_logprob"], -index))
    return float(same_answer(answers[best], record.reference, cast(AnswerKind, kind)))


def compare(records: Records, *, seed: int = 0) -> list[Comparison]:
    """Compares every pair of arms on every task and metric, on the samples that both arms have.

    The p-values are adjusted for the number of comparisons in the whole report.
    """
    found = []
    for task in records.tasks:
        pairs = itertools.combinations(records.arms_on(task), 2)
        for metric, (a, b) in itertools.product(records.metrics(task), pairs):
            first, second = records.scores(a, task, metric), records.scores(b, task, metric)
            both = [sample for sample in first if sample in second]
            if both:
                pair = [first[sample] for sample in both], [second[sample] for sample in both]
                weights = [records.weights(a, task)[sample] for sample in both]
                found.append(Comparison(task, metric, a, b, paired_difference(*pair, weights=weights, seed=seed)))
    adjusted = holm([comparison.difference for comparison in found])
    return [comparison._replace(difference=difference) for comparison, difference in zip(found, adjusted, strict=True)]


def count_steps(output: str) -> int:
    """Counts reasoning steps up to the model's next question: lines with text, or the sentences of a single line."""
    lines = [line for line in before_next_question(output).splitlines() if line.strip()]
    if len(lines) == 1:
        return max(1, sum(1 for part in lines[0].replace("? ", ". ").replace("! ", ". ").split(". ") if part.strip()))
    return len(lines)


def count_words(text: str) -> int:
    """Counts the words of a text, separated by white space."""
    return len(text.split())


# Quantities by which the samples of a task are sliced, by title.
_DOCUMENT_SLICES: dict[str, Callable[[Record], float]] = {"document length (labels)": lambda record: record.labels or 0}
_SLICES: dict[str, Callable[[Record], float]] = {
    "question length (words)": lambda record: count_words(record.question),
    "output length (words)": lambda record: count_words(record.output),
    "reasoning steps": lambda record: count_steps(record.output),
}
# Multiple choice has no outputs to slice by.
_CHOICE_SLICES = {name: _SLICES[name] for name in ("question length (words)",)}


def slices_of(records: Records, task: str) -> dict[str, Callable[[Record], float]]:
    """Returns the quantities by which the samples of a task can be sliced, by title."""
    first = records.of(records.arms_on(task)[0], task)[0]
    if first.labels is not None:
        return _DOCUMENT_SLICES
    return _SLICES if first.decoder else _CHOICE_SLICES


def slices(records: Records, task: str, name: str, *, num_bins: int = 3) -> list[Slice]:
    """Splits the outputs of all arms on a task into parts of similar size, with each arm's mean of the main metric."""
    value_of, metric, arms = slices_of(records, task)[name], records.metrics(task)[0], records.arms_on(task)
    values = [value_of(record) for arm in arms for record in records.of(arm, task)]
    edges = np.unique(np.quantile(values, np.linspace(0, 1, num_bins + 1), method="inverted_cdf"))
    found = []
    for low, high in zip([-math.inf, *edges[1:-1]], edges[1:] if len(edges) > 1 else edges, strict=True):
        own = [
            [record for record in records.of(arm, task) if metric in record.scores and low < value_of(record) <= high]
            for arm in arms
        ]
        inside = [value for value in values if low < value <= high]
        if inside:
            label = f"{min(inside):.0f}" if min(inside) == max(inside) else f"{min(inside):.0f} to {max(inside):.0f}"
            means = [_weighted_mean([(record.scores[metric], record.labels or 1) for record in part]) for part in own]
            found.append(Slice(label, [len(part) for part in own], means))
    return found


def _interval(values: Sequence[float], weights: Sequence[float]) -> Interval:
    """Computes Wilson's interval for shares, since it holds for few samples, and the bootstrap's for other scores."""
    if all(value in (0, 1) for value in values) and set(weights) == {1}:
        return wilson_interval(int(sum(values)), len(values))
    return bootstrap_interval(values, weights=weights, num_resamples=_NUM_RESAMPLES)


def _weighted_mean(values: Sequence[tuple[float, float]]) -> float | None:
    """Returns the mean of (value, weight) pairs; None if there are none."""
    total = sum(weight for _, weight in values)
    return sum(value * weight for value, weight in values) / total if total else None


def _mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of values; None if one is unknown or there are none."""
    known = list(values)
    if not known or any(value is None for value in known):
        return None
    return float(np.mean([float(value) for value in known if value is not None]))
