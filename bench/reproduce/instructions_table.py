"""The findings of the experiment on following instructions: paired differences with intervals, and its tables."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.reproduce.instructions_judge import Verdict, agrees, preference
from bench.reproduce.instructions_plan import (
    BEFORE,
    LABELS,
    METHODS,
    REFERENCE,
    SECONDS,
    START,
    STUDENTS,
    TEACHER,
    TEST_SEEDS,
    Rows,
    pairs,
)
from bench.reproduce.methods_results import Change, adjusted
from bench.reproduce.sample_efficiency_results import Estimate
from slimkernels.evaluate.statistics import bootstrap_interval, paired_difference

_BOUNDS = {TEACHER: "the teacher", START: "what all methods start from", BEFORE: "before any training"}
_BUDGETS = {LABELS: "as many labels", SECONDS: "as much time"}


class Compared(NamedTuple):
    """A method, which the reference is compared with.

    Attributes:
        student: Name of a kind of student.
        method: Name of a method.
        budget: Budget that both share.
    """

    student: str
    method: str
    budget: str

    def __str__(self) -> str:
        return f"{_layers(self.student)}, {_BUDGETS[self.budget]}"


class Results:
    """The rows of the newest settings and data.

    Args:
        rows: Rows of the results file, at least one.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.last = rows[-1]
        self.found = Rows(rows, {name: self.last[name] for name in ("settings", "data")})

    def tested(self, student: str, method: str, budget: str) -> list[dict[str, Any]]:
        """Returns the rows of a method's students, one per seed; none unless all seeds are there."""
        rows = [self.found.tested(student, method, budget, seed) for seed in TEST_SEEDS]
        return [row for row in rows if row] if all(rows) else []

    def bound(self, student: str | None, method: str) -> list[dict[str, Any]]:
        """Returns the row of a model that no method trained, as a list."""
        row = self.found.find(op="bound", student=student, method=method)
        return [row] if row else []

    def changes(self) -> dict[Compared, Change]:
        """Returns by how much Rouge-L rises from other methods to the reference, with p-values adjusted over all."""
        measured = {}
        for compared in _comparisons():
            theirs = self.tested(*compared)
            ours = self.tested(compared.student, REFERENCE, compared.budget)
            if ours and theirs:
                documents = paired_difference(_values(theirs), _values(ours))
                by_seed = [one["rouge_l"] - other["rouge_l"] for one, other in zip(ours, theirs, strict=True)]
                measured[compared] = Change(documents, Estimate.of(by_seed))
        return dict(zip(measured, adjusted(list(measured.values())), strict=True))

    def judged(self, compared: Compared) -> list[dict[str, Any]]:
        """Returns the newest judge's verdicts on a method's students, one row per seed; none unless all are there."""
        last = self.found.find(op="judged")
        if last is None:
            return []
        same = {name: last[name] for name in ("judge", "examples")} | {"op": "judged", "ours": REFERENCE}
        rows = []
        for seed in TEST_SEEDS:
            both = list(pairs(self.found, compared.student, seed))
            row = None
            if any((theirs["method"], theirs["budget"]) == compared[1:] for _, theirs in both):
                row = self.found.find(**same, **compared._asdict(), seed=seed)
            rows.append(row)
        return [row for row in rows if row] if all(rows) else []


def instructions_table(rows: Sequence[dict[str, Any]]) -> str:
    """Writes the section of the documentation: Rouge-L of each kind of student, and how a judge prefers SLIM."""
    results = Results(rows)
    changes = results.changes()
    parts = [_student_table(results, student, changes) for student in STUDENTS]
    parts += [_findings(changes), _judge_table(results), _progress(results), _conditions(results)]
    return "\n\n".join(part for part in parts if part)


def _comparisons() -> list[Compared]:
    methods = [name for name in METHODS if name != REFERENCE]
    return [Compared(*each) for each in itertools.product(STUDENTS, methods, (LABELS, SECONDS))]


def _values(rows: Sequence[dict[str, Any]], dataset: str | None = None) -> list[float]:
    """Returns each prompt's mean Rouge-L over seeds, of one data set or of all."""
    chosen = [[row["scores"][name] for name in row["scores"] if dataset in (None, name)] for row in rows]
    return np.mean([np.concatenate(parts) for parts in chosen], axis=0).tolist()


def _student_table(results: Results, student: str, changes: dict[Compared, Change]) -> str:
    models = [
        (title, results.bound(None if name == TEACHER else student, name), name) for name, title in _BOUNDS.items()
    ]
    models[1:1] = [(method.title, results.tested(student, name, LABELS), name) for name, method in METHODS.items()]
    if not any(rows for _, rows, name in models if name != TEACHER):
        return ""
    counts = {name: len(values) for _, rows, _ in models for row in rows for name, values in row["scores"].items()}
    heads = [f"{name} ({count})" for name, count in counts.items()] + ["all"]
    for _ in _BUDGETS:
        heads += ["SLIM minus it", "over seeds", "p"]
    heads.insert(len(counts) + 4, "all, as much time")
    lines = [f"| {_layers(student)} | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for title, rows, name in models:
        if not rows:
            continue
        cells = [_interval(bootstrap_interval(_values(rows, dataset))) for dataset in counts]
        cells.append(_interval(bootstrap_interval(_values(rows))))
        cells += _change_cells(changes.get(Compared(student, name, LABELS)))
        in_time = results.tested(student, name, SECONDS) if name in METHODS else []
        cells.append(_interval(bootstrap_interval(_values(in_time))) if in_time else "")
        cells += _change_cells(changes.get(Compared(student, name, SECONDS)))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _findings(changes: dict[Compared, Change]) -> str:
    """Says which differences are shown, one line per kind of student and budget."""
    lines = []
    for student, budget in itertools.product(STUDENTS, _BUDGETS):
        said: dict[str, list[str]] = {}
        for compared, change in changes.items():
            if (compared.student, compared.budget) == (student, budget):
                better = "better than" if change.seeds.mean > 0 else "worse than"
                kind = better if change.is_shown else "not shown to differ from"
                said.setdefault(kind, []).append(METHODS[compared.method].title)
        if said:
            found = ", and ".join(f"{kind} {' and '.join(names)}" for kind, names in said.items())
            lines.append(f"- {_layers(student)}, {_BUDGETS[budget]}: by Rouge-L SLIM is {found}.")
    return "\n".join(lines)


def in_points(change: Change) -> str:
    """Returns text such as "+0.6 [+0.2, +1.0], over seeds [-0.7, +1.9]"."""
    return "{}, over seeds [{:+.1f}, {:+.1f}]".format(_interval(change.documents, "+"), *change.seeds[1:])


def _change_cells(change: Change | None) -> list[str]:
    if change is None:
        return ["", "", ""]
    seeds = "[{:+.1f}, {:+.1f}]".format(*change.seeds[1:])
    return [_interval(change.documents, "+"), seeds, f"{change.documents.p_value:.3f}"]


def _judge_table(results: Results) -> str:
    found = {compared: results.judged(compared) for compared in _comparisons()}
    found = {compared: rows for compared, rows in found.items() if rows}
    if not found:
        return ""
    measured = []
    for rows in found.values():
        by_seed = [[preference(verdict) for verdict in _verdicts(row)] for row in rows]
        documents = paired_difference([0.5] * len(by_seed[0]), np.mean(by_seed, axis=0).tolist())
        measured.append(Change(documents, Estimate.of([statistics.fmean(one) - 0.5 for one in by_seed])))
    lines = ["| | judge prefers SLIM, % | over seeds | p | same in both orders, % |", "|---|---:|---:|---:|---:|"]
    for (compared, rows), change in zip(found.items(), adjusted(measured), strict=True):
        preferred = [100 * (0.5 + value) for value in change.documents[:3]]
        seeds = "[{:.0f}, {:.0f}]".format(*(100 * (0.5 + value) for value in change.seeds[1:]))
        same = statistics.fmean(agrees(verdict) for row in rows for verdict in _verdicts(row))
        title, p_value = f"SLIM or {METHODS[compared.method].title}; {compared}", change.documents.p_value
        lines.append(f"| {title} | {_interval(preferred, digits=0)} | {seeds} | {p_value:.3f} | {100 * same:.0f} |")
    judge = next(iter(found.values()))[0]["judge"]
    return "\n".join([*lines, "", _judge_sentence(results, judge)])


def _judge_sentence(results: Results, judge: dict[str, str]) -> str:
    own = [row for row in results.found.rows if row["op"] == "judged" and row["judge"] == judge]
    verdicts = [verdict for row in own if row["ours"] == REFERENCE for verdict in _verdicts(row)]
    first = statistics.fmean(one > 0.5 for ours, theirs in verdicts for one in (ours, 1 - theirs))
    known = [verdict for row in own if row["ours"] == TEACHER for verdict in _verdicts(row)]
    check = ""
    if known:
        right, same = (statistics.fmean(map(judged, known)) for judged in (preference, agrees))
        check = (
            f" Of the teacher and what all methods start from it prefers the teacher in {100 * right:.0f} %, and the "
            f"same in both orders in {100 * same:.0f} %."
        )
    agreed = statistics.fmean(map(agrees, verdicts))
    return (
        f"The judge, {judge['model']} behind llama.cpp, sees each pair in both orders and prefers the response of the "
        f"larger mean probability, in which a preference for the first or the second cancels. In {100 * agreed:.0f} % "
        f"of the pairs it names the same response in both orders (a coin in 50 %), and it names the response that it "
        f"sees first in {100 * first:.0f} %.{check}"
    )


def _verdicts(row: dict[str, Any]) -> list[Verdict]:
    return [(verdict[0], verdict[1]) for verdicts in row["verdicts"].values() for verdict in verdicts]


def _progress(results: Results) -> str:
    planned = list(itertools.product(STUDENTS, METHODS, (LABELS, SECONDS), TEST_SEEDS))
    run = sum(results.found.tested(*each) is not None for each in planned)
    return f"Not finished: {run} of {len(planned)} of the test's students are there." if run < len(planned) else ""


def _conditions(results: Results) -> str:
    chosen, rows = results.last["settings"], results.found.rows
    choices = {METHODS[name].title: results.found.choice(name) for name in METHODS}
    rates = ", ".join(f"{title} {row['options']['learning_rate']:g}" for title, row in choices.items() if row)
    tried = " or ".join(dict.fromkeys(str(row["trials"]) for row in choices.values() if row))
    took = []
    for name in METHODS:
        found = (results.found.tested(student, name, LABELS, seed) for student in STUDENTS for seed in TEST_SEEDS)
        if own := [row for row in found if row]:
            seconds, steps = (statistics.fmean(row[field] for row in own) for field in ("processor_seconds", "steps"))
            labels = statistics.fmean(row["labels_learned"] for row in own)
            took.append(f"{METHODS[name].title} {seconds:.0f} s for {steps:.0f} steps and {labels:,.0f} labels")
    documents, stored = (results.last[name] for name in ("documents", "labels_stored"))
    non_ascii = max(max(row["non_ascii"].values()) for row in rows if "non_ascii" in row)
    devices, commits = (", ".join(dict.fromkeys(row[name] for row in rows)) for name in ("device", "commit"))
    threads = ", ".join(dict.fromkeys(str(row["threads"]) for row in rows))
    return (
        f"Rouge-L (F1 in %, with stemming) of responses of at most {chosen['max_new_tokens']} tokens, decoded "
        f"greedily. Brackets hold 95 % bootstrap intervals over prompts, paired, each the mean over seeds "
        f"{', '.join(map(str, TEST_SEEDS))}, and, over seeds, t-intervals of the paired differences; p is of the "
        f"sign-flip test over prompts, adjusted over all comparisons by Holm's method. A difference is shown where "
        f"both intervals exclude 0 and p is below 0.05. Teacher: {chosen['teacher']}. All methods start from a student "
        f"that learned from all {documents:,} training responses ({stored:,} labels) by SFT, and learn from "
        f"{chosen['labels']:,} labels more, or for as much processor time as SLIM; MiniLLM's labels are the tokens "
        f"that the student draws. Mean processor time of training: {'; '.join(took)}. Learning rates, each the better "
        f"of {tried} on {chosen['development_examples']} held-out training examples with the student of "
        f"{_layers('half')}: {rates}; other options as the comparison of methods chose them. Training examples with "
        f"held-out or repeated instructions were removed. Rouge's tokenizer drops characters outside ASCII, which "
        f"occur in at most {non_ascii} of a model's responses or of the references. {devices}, {threads} thread, "
        f"commits {commits}, {results.last['date'][:10]}."
    )


def _layers(student: str) -> str:
    return f"{len(STUDENTS[student].layers or ())} layers"


def _interval(values: Sequence[float], sign: str = "", digits: int = 1) -> str:
    return "{0:{3}.{4}f} [{1:{3}.{4}f}, {2:{3}.{4}f}]".format(*values[:3], sign, digits)
