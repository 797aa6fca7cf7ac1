"""The plan of the experiment on following instructions: its students, its methods, and which trainings are missing."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bench.reproduce import methods_plan
from bench.reproduce.methods_plan import Options, Student

TUNING_SEED, TEST_SEEDS = 0, (1, 2, 3)
# The student by which every method chooses its options.
TUNED = "half"
# Budgets that all methods share: the labels of the settings, or the seconds in which SLIM learns from these.
LABELS, SECONDS = "labels", "seconds"
REFERENCE = "slim"
# A budget of seconds that is this close to a method's seconds for the labels has the same student.
_SAME = 0.1

STUDENTS = {
    "two_thirds": Student(layers=(0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16, 17, 19, 20, 22, 24, 26, 28, 29)),
    "half": methods_plan.STUDENTS["half"],
}
# Models that are measured without a method: the teacher, and each student before and after the training that all share.
TEACHER, BEFORE, START = "teacher", "before", "start"


class Method(NamedTuple):
    """A way to train a student.

    Attributes:
        title: Name in tables.
        options: Fields of the configuration of its trainer.
        learning_rates: Learning rates that are tried on the development part.
    """

    title: str
    options: Options
    learning_rates: tuple[float, ...]


# `bench.reproduce.methods` chose these, and the first learning rates, for SFT, KD and SLIM. A student that has learned
# already may need a lower one.
_LOGITS = {"rest": "renorm", "kd_weight": 3.0}
METHODS = {
    "sft": Method("SFT on the responses", {"method": "sft"}, (7.07e-4, 1.41e-4)),
    "kd": Method("KD", {"method": "kd", **_LOGITS}, (1e-3, 2e-4)),
    "slim": Method("SLIM", {"method": "slim", **_LOGITS}, (1e-3, 2e-4)),
    "minillm": Method("MiniLLM", {"method": "minillm"}, (1e-4, 2e-5)),
}


@dataclasses.dataclass(frozen=True)
class Unit:
    """One training.

    Attributes:
        op: "trial", measured on the development part, or "test".
        student: Name of a kind of student.
        method: Name of a method.
        budget: "labels" or "seconds".
        labels: Number of labels to learn from; of tokens that the student draws, for MiniLLM.
        seed: Seed of the documents and their order, and of what the student draws.
        options: Fields of the configuration of the method's trainer.
    """

    op: str
    student: str
    method: str
    budget: str
    labels: int
    seed: int
    options: Options

    @property
    def name(self) -> str:
        """The unit in words."""
        return (
            f"{self.op}, {self.student}, {self.method}, {self.labels:,} labels (budget of {self.budget}), "
            f"seed {self.seed}, learning rate {self.options['learning_rate']:g}"
        )


class Rows:
    """The rows of one set of settings and data.

    Args:
        rows: All rows of a file.
        identity: Settings and data; rows with others do not count.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], identity: dict[str, Any]) -> None:
        self.rows = [row for row in rows if identity.items() <= row.items()]

    def find(self, **fields: Any) -> dict[str, Any] | None:
        """Returns the newest row with these fields."""
        # A file gives tuples back as lists.
        fields = json.loads(json.dumps(fields))
        return next((row for row in reversed(self.rows) if fields.items() <= row.items()), None)

    def of(self, unit: Unit) -> dict[str, Any] | None:
        """Returns the row of a finished unit."""
        return self.find(**dataclasses.asdict(unit))

    def choice(self, method: str) -> dict[str, Any] | None:
        """Returns the row in which a method's options were chosen."""
        return self.find(op="choice", method=method)

    def tested(self, student: str, method: str, budget: str, seed: int) -> dict[str, Any] | None:
        """Returns the row of a method's student by its chosen options; None if it was not trained yet."""
        choice = self.choice(method)
        if choice is None:
            return None
        same = {"op": "test", "student": student, "method": method, "seed": seed, "options": choice["options"]}
        labels = self.find(**same, budget=LABELS)
        if budget == LABELS or labels is None:
            return labels
        wanted = self._labels_in_time(student, labels, seed)
        if wanted is None:
            return None
        if abs(wanted / labels["labels"] - 1) <= _SAME:
            return labels
        return self.find(**same, budget=SECONDS, labels=wanted)

    def missing(self, student: str, method: str, seed: int, labels: int) -> Unit | None:
        """Returns the next training that a method lacks: that of the labels, then that of the seconds.

        The budget of seconds is known when the reference has learned from the labels.
        """
        choice = self.choice(method)
        if choice is None:
            return None
        unit = Unit("test", student, method, LABELS, labels, seed, choice["options"])
        done = self.of(unit)
        if done is None:
            return unit
        wanted = self._labels_in_time(student, done, seed)
        if wanted is None or self.tested(student, method, SECONDS, seed) is not None:
            return None
        return dataclasses.replace(unit, budget=SECONDS, labels=wanted)

    def _labels_in_time(self, student: str, row: dict[str, Any], seed: int) -> int | None:
        """Returns from how many labels a method learns while the reference learns from those of the settings."""
        reference = self.tested(student, REFERENCE, LABELS, seed)
        if reference is None:
            return None
        return max(1, round(row["labels"] * reference["processor_seconds"] / row["processor_seconds"]))


def trials(method: str, labels: int) -> list[Unit]:
    """Returns the trials of a method, by which it chooses its learning rate."""
    kind = METHODS[method]
    return [
        Unit("trial", TUNED, method, LABELS, labels, TUNING_SEED, {**kind.options, "learning_rate": rate})
        for rate in kind.learning_rates
    ]


def chosen(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the fields of a choice, from the rows of all trials: the one with the highest Rouge-L."""
    best = max(rows, key=lambda row: row["rouge_l"])
    fields = ("student", "method", "options", "rouge_l", "labels_per_step")
    return {"op": "choice"} | {name: best[name] for name in fields} | {"trials": len(rows)}


def pairs(rows: Rows, student: str, seed: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields the students of a seed that a judge compares: the reference's with those of other methods, by budget."""
    for budget, method in itertools.product((LABELS, SECONDS), METHODS):
        ours, theirs = (rows.tested(student, name, budget, seed) for name in (REFERENCE, method))
        is_new = budget == LABELS or (theirs is not None and theirs["budget"] == SECONDS)
        if method != REFERENCE and ours is not None and theirs is not None and is_new:
            yield ours, theirs
