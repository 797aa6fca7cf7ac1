"""The plan of the comparison of methods: its methods, how each is tuned, and which trainings a file still lacks."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Options = dict[str, Any]
# Trainings by which every method chooses its options, with their number of labels and their seed.
TRIALS, TUNING_LABELS, TUNING_SEED = 6, 25_000, 0
TEST_SEEDS = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train a student.

    Attributes:
        title: Name in tables.
        options: Fields of ``SlimConfig``.
        teacher: Source of the teacher's rows: a store of its largest logits ("top", or fewer: "top_1_percent",
            "top_50", "top_20", "top_5"), of draws ("draws") or of hidden states ("hidden"); "online", the teacher
            itself; or "none".
        values: Other values of the method's own options, in the order in which they are tried.
        weighs: Whether the divergence has a weight to choose.
        follows: Name of a method whose chosen options this one takes over; it then has no trials of its own.
    """

    title: str
    options: Options
    teacher: str = "top"
    values: dict[str, tuple] = dataclasses.field(default_factory=dict)
    weighs: bool = True
    follows: str | None = None


# A row is all that a new method takes. Options that are not named have the defaults of SlimConfig.
METHODS = {
    "sft": Method(
        "SFT on the teacher's text", {"method": "sft"}, "none", values={"label_smoothing": (0.1,)}, weighs=False
    ),
    "kd": Method("KD", {"method": "kd", "rest": "renorm"}, values={"rest": ("ghost",)}),
    "slim": Method("SLIM", {"method": "slim", "rest": "renorm"}, values={"rest": ("ghost",)}),
    "slim_inverse": Method(
        "SLIM, inverse ratio",
        {"method": "slim", "token_weight": "student_over_teacher", "rest": "renorm"},
        values={"rest": ("ghost",)},
    ),
    "kd_mean": Method("KD, SLIM's mean weight", {"method": "kd"}, follows="slim"),
    "reverse_kl": Method("reverse KL", {"method": "reverse_kl", "rest": "ghost"}, values={"rest": ("renorm_both",)}),
    "jsd": Method("JSD", {"method": "jsd", "beta": 0.5}, values={"beta": (0.1, 0.9)}),
    "skew_kl": Method(
        "skew KL", {"method": "kd", "divergence": "skew_kl", "alpha": 0.1}, values={"alpha": (0.3, 0.03)}
    ),
    "skew_reverse_kl": Method(
        "skew reverse KL",
        {"method": "kd", "divergence": "skew_reverse_kl", "alpha": 0.1},
        values={"alpha": (0.3, 0.03)},
    ),
    "tvd": Method("total variation", {"method": "kd", "divergence": "tvd"}),
    "ab": Method(
        "AB divergence",
        {"method": "kd", "divergence": "ab", "alpha": 0.2, "beta": 0.7},
        values={"alpha": (0.6,), "beta": (0.3,)},
    ),
    "gated": Method(
        "reverse KL, gated",
        {"method": "kd", "divergence": "gated", "entropy_threshold": 0.8},
        values={"entropy_threshold": (1.6, 0.4)},
    ),
    "taid": Method(
        "TAID",
        {"method": "kd", "schedules": {"teacher_blend": "taid:0.4:1.0"}},
        values={"schedules": ({"teacher_blend": "linear:0.4:1.0"},)},
    ),
    "sampled": Method("sampled KD", {"method": "sampled", "rest": "renorm"}, "draws", values={"rest": ("zero",)}),
    "dense_kd": Method("dense KD", {"method": "kd"}, teacher="online"),
    "gkd": Method(
        "GKD",
        {"method": "gkd", "on_policy_fraction": 0.5, "beta": 0.5, "max_new_tokens": 120},
        teacher="online",
        values={"beta": (0.1, 0.9), "on_policy_fraction": (0.25,)},
        weighs=False,
    ),
}
# Methods that are tested, by the number of labels that they learn from.
BUDGETS = {
    25_000: tuple(METHODS),
    100_000: ("sft", "kd", "slim", "kd_mean", "dense_kd", "sampled"),
    400_000: ("sft", "kd", "slim"),
}
_SUPPORTS = {"top": "5 %", "top_1_percent": "1 %", "top_50": "top 50", "top_20": "top 20", "top_5": "top 5"}
_RESTS = {"renorm": "renormalised", "ghost": "with the rest as one more entry"}
# KD by the options that were chosen for it, from less of the teacher than all of its logits.
SUPPORTS = {
    f"{kind}_{rest}": Method(f"{title}, {words}", {"rest": rest}, kind, follows="kd")
    for kind, title in _SUPPORTS.items()
    for rest, words in _RESTS.items()
} | {
    "all": Method("all, from the teacher itself", {}, "online", follows="kd"),
    "hidden": Method("all, from stored hidden states", {}, "hidden", follows="kd"),
    # The paper's weight, which decides the default.
    "weight_1": Method("5 %, weight of the divergence 1", {"kd_weight": 1.0}, follows="kd"),
}
SUPPORT_LABELS = 25_000


@dataclasses.dataclass(frozen=True)
class Student:
    """A kind of student.

    Attributes:
        layers: Indices of the teacher's layers that it keeps; None for a new student of random weights.
        passes: Passes over the documents.
        batch_size: Documents per optimizer step.
        learning_rate: Peak learning rate of every method's first trial, reached by a linear warm-up over a tenth of the
            steps and followed by a cosine decay.
        hidden_size: Width of a new student.
        num_layers: Layers of a new student.
        num_heads: Attention heads of a new student.
    """

    layers: tuple[int, ...] | None = None
    passes: int = 1
    batch_size: int = 4
    learning_rate: float = 1e-3
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4


STUDENTS = {
    "half": Student(layers=(0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 29)),
    "random": Student(passes=4, learning_rate=6e-3),
}


def trials(method: Method, learning_rate: float, loss_of: Callable[[Options], float]) -> Iterator[Options]:
    """Yields the options of a method's trials, a search along one option at a time.

    From the first values on, each trial changes one option of the best one so far, in turn: the divergence's weight
    times 3, or by 3 if that did not lower the loss; the learning rate times 2, or by 2; the method's own options; the
    learning rate times the square root of 2, or by it; and again from the beginning. What was tried is left out. The
    search is a function of the losses, so it can be continued from those that a file has.

    Args:
        method: The method.
        learning_rate: Learning rate of the first trial.
        loss_of: Returns the loss on the development part of options that were yielded before.
    """
    best = {**method.options, "learning_rate": learning_rate} | ({"kd_weight": 1.0} if method.weighs else {})
    tried = [best]
    yield best
    moved = True
    while moved:
        moved = False
        for alternatives in _moves(method):
            for change in alternatives:
                options = best | change(best)
                if options in tried:
                    continue
                moved = True
                tried.append(options)
                yield options
                if loss_of(options) < loss_of(best):
                    best = options
                    break


def _moves(method: Method) -> Iterator[tuple[Callable[[Options], Options], ...]]:
    """Yields groups of functions that take options and return those that they change."""
    if method.weighs:
        yield _times("kd_weight", 3), _times("kd_weight", 1 / 3)
    yield _times("learning_rate", 2), _times("learning_rate", 1 / 2)
    for name, values in method.values.items():
        yield tuple(lambda _, name=name, value=value: {name: value} for value in values)
    yield _times("learning_rate", 2**0.5), _times("learning_rate", 2**-0.5)


def _times(name: str, factor: float) -> Callable[[Options], Options]:
    # Three digits, so that a value that is reached in two ways is the same.
    return lambda options: {name: float(f"{options[name] * factor:.3g}")}


@dataclasses.dataclass(frozen=True)
class Unit:
    """One training.

    Attributes:
        op: "trial", measured on the development part, or "test".
        student: Name of a kind of student.
        method: Name of a method.
        labels: Number of labels to learn from.
        seed: Seed of the text, of the order of its documents and of a new student's weights.
        options: Fields of ``SlimConfig``.
    """

    op: str
    student: str
    method: str
    labels: int
    seed: int
    options: Options

    @classmethod
    def of(cls, row: dict[str, Any]) -> Unit:
        """Returns the unit of a row."""
        return cls(**{field.name: row[field.name] for field in dataclasses.fields(cls)})

    @property
    def name(self) -> str:
        """The unit in words."""
        options = ", ".join(f"{name} {value}" for name, value in self.options.items() if name != "method")
        return f"{self.op}, {self.student}, {self.method}, {self.labels:,} labels, seed {self.seed}: {options}"


class Rows:
    """The rows of one set of settings.

    Args:
        rows: All rows of a file.
        settings: Settings of the text and the students; rows with others do not count.
        text_of: Function from a unit to the digest of its text; rows of another text do not count. None for the text of
            the newest row that learned as much from the same seed, so that the methods of a table share theirs.
    """

    def __init__(
        self,
        rows: Iterable[dict[str, Any]],
        settings: dict[str, Any],
        text_of: Callable[[Unit], str] | None = None,
    ) -> None:
        self._found: dict[tuple[str, str], dict[str, Any]] = {}
        self._choices: dict[tuple[str, str], dict[str, Any]] = {}
        self._newest: dict[tuple[str, str, int, int], str] = {}
        self.settings, self._text_of = settings, text_of
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Takes up a row, if it has these settings."""
        if row["settings"] != self.settings:
            return
        if row["op"] == "choice":
            self._choices[row["student"], row["method"]] = row
        else:
            unit = Unit.of(row)
            self._found[_key(unit), row["text"]] = row
            self._newest[_learned(unit)] = row["text"]

    def of(self, unit: Unit) -> dict[str, Any] | None:
        """Returns the row of a finished unit."""
        text = self._newest.get(_learned(unit), "") if self._text_of is None else self._text_of(unit)
        return self._found.get((_key(unit), text))

    def choice(self, student: str, method: str) -> dict[str, Any] | None:
        """Returns the row in which a method's options were chosen."""
        return self._choices.get((student, method))


def _key(unit: Unit) -> str:
    return json.dumps(dataclasses.asdict(unit), sort_keys=True)


def _learned(unit: Unit) -> tuple[str, str, int, int]:
    return unit.op, unit.student, unit.labels, unit.seed


def options_for_test(rows: Rows, student: str, name: str) -> Options | None:
    """Returns the options by which a method is tested; None before they are chosen."""
    if name in SUPPORTS:
        choice = rows.choice(student, SUPPORTS[name].follows)
        return choice and choice["options"] | SUPPORTS[name].options
    choice = rows.choice(student, name)
    return choice and choice["options"]


def tuning_units(rows: Rows, student: str, name: str, *, labels: int, seed: int) -> Iterator[Unit]:
    """Yields a method's trials in turn; the row of each must be in ``rows`` before the next is asked for.

    A method that follows another has the other's chosen options, with the mean of its token weights in place of the
    weights, as its only trial, and none before they are chosen.
    """
    method = METHODS[name]

    def unit(options: Options) -> Unit:
        return Unit("trial", student, name, labels, seed, options)

    if method.follows is not None:
        leader = rows.choice(student, method.follows)
        if leader is not None:
            factor = float(f"{leader['options']['kd_weight'] * leader['mean_weight']:.4g}")
            changed = {"kd_weight": factor, "token_weight": "none"}
            yield unit(leader["options"] | {"method": method.options["method"]} | changed)
        return
    search = trials(method, STUDENTS[student].learning_rate, lambda options: _loss(rows, unit(options)))
    yield from map(unit, itertools.islice(search, TRIALS))


def chosen(rows: Rows, units: Sequence[Unit]) -> dict[str, Any]:
    """Returns the fields of a choice: the trial with the lowest loss on the development part."""
    best = min(units, key=lambda unit: _loss(rows, unit))
    row = rows.of(best) or {}
    return {
        "op": "choice",
        "student": best.student,
        "method": best.method,
        "options": best.options,
        "trials": len(units),
        "loss": row["loss"],
        "mean_weight": row["mean_weight"],
    }


def _loss(rows: Rows, unit: Unit) -> float:
    row = rows.of(unit)
    if row is None:
        raise ValueError(f"the trial before must be finished first: {unit.name}")
    return row["loss"]


def test_units(
    rows: Rows, student: str, names: Iterable[str], budgets: Iterable[int], seeds: Iterable[int]
) -> Iterator[Unit]:
    """Yields the units of the test, seed by seed, of the methods that have a budget and whose options are chosen.

    A support that has the logits and the options of the method which it follows shares that method's unit.
    """
    for labels, seed, name in itertools.product(budgets, seeds, names):
        options = options_for_test(rows, student, name)
        if options is not None and (labels == SUPPORT_LABELS if name in SUPPORTS else name in BUDGETS[labels]):
            yield Unit("test", student, _trained_as(rows, student, name), labels, seed, options)


def _trained_as(rows: Rows, student: str, name: str) -> str:
    """Returns the method that a support follows where both have the same logits and options, else its own name."""
    if name not in SUPPORTS or (followed := SUPPORTS[name].follows) is None:
        return name
    own = SUPPORTS[name].teacher, options_for_test(rows, student, name)
    return followed if own == (METHODS[followed].teacher, options_for_test(rows, student, followed)) else name
