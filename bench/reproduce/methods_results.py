"""The findings of the comparison of methods: paired differences with intervals, tables, and sentences for the docs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from bench.reproduce.methods_plan import (
    BUDGETS,
    METHODS,
    STUDENTS,
    SUPPORT_LABELS,
    SUPPORTS,
    TEST_SEEDS,
    TRIALS,
    Rows,
    Unit,
    test_units,
)
from slimkernels.evaluate.statistics import Difference, holm, paired_difference
from slimkernels.models.perplexity import perplexity

REFERENCE = "kd"
# The adaptive weight is compared with equal weights that were chosen alike, and with its own mean.
ADAPTIVE, CONSTANT = "slim", "kd_mean"
STUDENT_NAMES = {"half": "Half of the teacher's layers, healed", "random": "A new student of random weights"}
_MEASURES = {"perplexity": 1, "KL": 2}
_LAST_HEADS = "perplexity, plain English", "seconds"
# Options that say what a method is, not what was chosen for it.
_NOT_CHOSEN = ("method", "divergence", "token_weight", "max_new_tokens")


class Tested(NamedTuple):
    """A method's students on the test part, one per seed.

    Attributes:
        rows: Rows, by seed in ascending order.
    """

    rows: list[dict[str, Any]]

    @property
    def labels(self) -> list[int]:
        """The number of labels of each document."""
        return [document[0] for document in self.rows[0]["per_document"]]

    def means(self, measure: str) -> list[float]:
        """Returns each document's mean loss ("perplexity") or KL per label, in nats, over the seeds."""
        at, labels = _MEASURES[measure], self.labels
        documents = zip(*(row["per_document"] for row in self.rows), strict=True)
        return [
            statistics.fmean(document[at] for document in seeds) / count
            for seeds, count in zip(documents, labels, strict=True)
        ]

    def mean(self, measure: str) -> float:
        """Returns the mean loss or KL over seeds and labels."""
        return statistics.fmean(row["loss" if measure == "perplexity" else "kl"] for row in self.rows)


class Results:
    """The newest settings of one kind of student.

    Args:
        rows: Rows of the results file.
        student: Name of a kind of student, of which there is a row.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], student: str) -> None:
        own = [row for row in rows if row["student"] == student]
        self.student, self.last = student, own[-1]
        self.rows = [row for row in own if row["settings"] == self.last["settings"]]
        self.found = Rows(self.rows, self.last["settings"])
        self.trials = {name: [row for row in self._of("trial") if row["method"] == name] for name in METHODS}

    def _of(self, op: str) -> list[dict[str, Any]]:
        return list({str(Unit.of(row)): row for row in self.rows if row["op"] == op}.values())

    def tested(self, name: str, labels: int) -> Tested | None:
        """Returns a method's students for a budget of labels; None unless all seeds are there."""
        units = test_units(self.found, self.student, [name], [labels], TEST_SEEDS)
        rows = [self.found.of(unit) for unit in units]
        return Tested([row for row in rows if row]) if rows and all(rows) else None

    def progress(self, labels: int) -> tuple[int, int]:
        """Returns how many of the units of a budget's test were run, and how many there are."""
        names = BUDGETS[labels]
        units = list(test_units(self.found, self.student, names, [labels], TEST_SEEDS))
        return sum(self.found.of(unit) is not None for unit in units), len(names) * len(TEST_SEEDS)

    def differences(
        self, labels: int, measure: str = "perplexity", *, names: Iterable[str] = METHODS, to: str = REFERENCE
    ) -> dict[str, Difference]:
        """Returns how every tested method differs from one of them, with p-values adjusted by Holm's method."""
        reference = self.tested(to, labels)
        tested = {name: self.tested(name, labels) for name in names if name != to}
        if reference is None:
            return {}
        found = {name: difference(reference, ours, measure) for name, ours in tested.items() if ours is not None}
        return dict(zip(found, holm(list(found.values())), strict=True))


def difference(reference: Tested, ours: Tested, measure: str) -> Difference:
    """Returns the paired difference of two methods over the test's documents, each the mean over the seeds, in nats."""
    return paired_difference(reference.means(measure), ours.means(measure), weights=ours.labels)


def methods_block(rows: Sequence[dict[str, Any]]) -> str:
    """Writes the section of the documentation: for each kind of student what was found, and how it was chosen."""
    parts = []
    for student in STUDENTS:
        if any(row["student"] == student for row in rows):
            parts += _student_part(Results(rows, student))
    return "\n\n".join(parts)


def _student_part(results: Results) -> list[str]:
    parts = [f"**{STUDENT_NAMES[results.student]}.**"]
    progress = {labels: results.progress(labels) for labels in BUDGETS}
    for labels in BUDGETS:
        if any(results.tested(name, labels) for name in METHODS):
            parts += [test_table(results, labels), *verdicts(results, labels)]
    if any(results.tested(name, SUPPORT_LABELS) for name in SUPPORTS):
        parts.append(support_table(results))
    missing = [
        f"{run} of {planned} with {labels:,} labels" for labels, (run, planned) in progress.items() if run < planned
    ]
    if missing:
        parts.append(f"Not finished: of the test's trainings, {', '.join(missing)} were run.")
    folded = "<details><summary>How the options were chosen, on the development part</summary>"
    return [*parts, folded, tuning_table(results), "</details>", _conditions(results)]


def test_table(results: Results, labels: int) -> str:
    """Tabulates the methods that were tested with a budget of labels, from the lowest perplexity to the highest."""
    tested = {name: results.tested(name, labels) for name in METHODS}
    order = sorted((found.mean("perplexity"), name) for name, found in tested.items() if found is not None)
    return _tested_table(results, labels, [name for _, name in order], REFERENCE, "KD", f"{labels:,} labels")


def support_table(results: Results) -> str:
    """Tabulates KD by how much of the teacher the student learns from."""
    head = f"KD on {SUPPORT_LABELS:,} labels, from these logits of the teacher"
    return _tested_table(results, SUPPORT_LABELS, list(SUPPORTS), "all", "all", head)


def _tested_table(results: Results, labels: int, names: Sequence[str], to: str, to_title: str, head: str) -> str:
    differences = results.differences(labels, names=names, to=to)
    divergences = results.differences(labels, "KL", names=names, to=to)
    heads = "perplexity", f"to {to_title}, %", "p", "KL to the teacher", f"to {to_title}, nats", *_LAST_HEADS
    lines = [_line(head, *heads), f"|---|{'---:|' * len(heads)}"]
    for name in names:
        found = results.tested(name, labels)
        if found is None:
            continue
        change, kl = differences.get(name), divergences.get(name)
        lines.append(
            _line(
                (METHODS | SUPPORTS)[name].title,
                f"{perplexity(found.mean('perplexity')):.2f}",
                _interval([100 * math.expm1(value) for value in change[:3]], 1) if change else "",
                f"{change.p_value:.4f}" if change else "",
                f"{found.mean('KL'):.3f}",
                _interval(kl[:3], 3) if kl else "",
                _english(found.rows),
                _seconds(found.rows),
            )
        )
    return "\n".join(lines)


def tuning_table(results: Results) -> str:
    """Tabulates the choice of every method, or how many of its trials were run."""
    lines = ["| method | chosen | perplexity | KL | trials |", "|---|---|---:|---:|---:|"]
    for name, trials in results.trials.items():
        planned = 1 if METHODS[name].follows else TRIALS
        choice = results.found.choice(results.student, name)
        if not trials:
            continue
        best = min(trials, key=lambda row: row["loss"])
        shown, count = f"not yet; best so far {_options(best['options'])}", len(trials)
        if choice:
            # A search that was begun elsewhere may have left further trials.
            best = next(row for row in trials if row["options"] == choice["options"])
            shown, count = _options(best["options"]), choice["trials"]
        counted = f"{count} of {planned}"
        lines.append(_line(METHODS[name].title, shown, f"{best['perplexity']:.2f}", f"{best['kl']:.3f}", counted))
    missing = [METHODS[name].title for name, trials in results.trials.items() if not trials]
    if missing:
        lines += ["", f"Not begun: {'; '.join(missing)}."]
    return "\n".join(lines)


def verdicts(results: Results, labels: int) -> list[str]:
    """Says whether the adaptive weight helps, as far as its students and those that it is compared with are there."""
    ours = results.tested(ADAPTIVE, labels)
    others = {
        "KD that was tuned alike": results.tested(REFERENCE, labels),
        "KD with the mean of SLIM's weights as its factor": results.tested(CONSTANT, labels),
    }
    found = {name: difference(other, ours, "perplexity") for name, other in others.items() if other and ours}
    said = []
    for (name, _), change in zip(found.items(), holm(list(found.values())), strict=True):
        percent = _interval([100 * math.expm1(value) for value in change[:3]], 1)
        effect = ("helps" if change.value < 0 else "hurts") if change.is_shown else "makes no difference that is shown"
        said.append(
            f"The adaptive weight {effect}, compared with {name}: perplexity {percent} %, p {change.p_value:.3f}."
        )
    return [f"With {labels:,} labels. {' '.join(said)}"] if said else []


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items() if name not in _NOT_CHOSEN)


def _english(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the mean perplexity on plain English, if all seeds were measured on it."""
    losses = [row["english"]["loss"] for row in rows if "english" in row]
    return f"{perplexity(statistics.fmean(losses)):.2f}" if len(losses) == len(rows) else ""


def _seconds(rows: Iterable[dict[str, Any]]) -> str:
    """Returns the mean time of the trainings that had the machine to themselves."""
    alone = [row["seconds"] for row in rows if row["alone"]]
    return f"{statistics.fmean(alone):.0f}" if alone else ""


def _interval(values: Sequence[float], digits: int) -> str:
    return "{0:+.{3}f} [{1:+.{3}f}, {2:+.{3}f}]".format(*values, digits)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _conditions(results: Results) -> str:
    last, text, kind = results.last, results.last["settings"]["text"], results.last["settings"]["student"]
    measured = next(row for row in reversed(results.rows) if row["op"] != "choice")
    start = f"{len(kind['layers'])} of its layers" if kind["layers"] else f"{kind['num_layers']} new layers"
    devices, commits = (", ".join(dict.fromkeys(row[name] for row in results.rows)) for name in ("device", "commit"))
    return (
        f"Teacher: {text['teacher']}, perplexity {measured['teacher_perplexity']:.2f}, which wrote all text, so that "
        f"SFT on it is sequence-level distillation. Student: {start}, {measured['parameters']:,} parameters; "
        f"{kind['passes']} pass{'es' * (kind['passes'] > 1)} over the documents, {kind['batch_size']} per step, in "
        f"bfloat16 autocast. Options were chosen by the loss on {_heldout(results, 'trial')} labels of the development "
        f"part. Brackets hold 95 % bootstrap intervals over the test's documents, paired, each the mean over seeds "
        f"{', '.join(map(str, TEST_SEEDS))}; p is of the sign-flip test, adjusted over the methods by Holm's method. "
        f"Seconds are shown of trainings that had the machine to themselves. {devices}; "
        f"commits {commits}; {last['date'][:10]}."
    )


def _heldout(results: Results, op: str) -> str:
    return next((f"{row['heldout_labels']:,}" for row in results.rows if row["op"] == op), "no")
