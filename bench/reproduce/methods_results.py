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
from bench.reproduce.sample_efficiency_results import Estimate
from slimkernels.evaluate.statistics import Difference, holm, paired_difference
from slimkernels.models.perplexity import perplexity

REFERENCE = "kd"
# The adaptive weight is compared with equal weights that were chosen alike, and with its own mean.
ADAPTIVE, CONSTANT = "slim", "kd_mean"
STUDENT_NAMES = {"half": "Half of the teacher's layers, healed", "random": "A new student of random weights"}
_INTERVALS = (
    f"Brackets hold 95 % bootstrap intervals over the test's documents, paired, each the mean over seeds "
    f"{', '.join(map(str, TEST_SEEDS))}, and, over seeds, t-intervals of the paired differences; p is of the sign-flip "
    f"test over documents, adjusted over the methods by Holm's method. A difference is shown where both intervals "
    f"exclude 0 and p is below 0.05. "
)
_SECONDS = "Seconds are shown of trainings that had the machine to themselves. "
_MEASURES = {"perplexity": 1, "KL": 2}
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

    def by_seed(self, measure: str) -> list[float]:
        """Returns each seed's mean loss or KL over the labels."""
        return [row["loss" if measure == "perplexity" else "kl"] for row in self.rows]

    def mean(self, measure: str) -> float:
        """Returns the mean loss or KL over seeds and labels."""
        return statistics.fmean(self.by_seed(measure))


class Change(NamedTuple):
    """The change from one method to another, in nats.

    Attributes:
        documents: Difference over the test's documents, each the mean over the seeds. It tells how far these students
            differ on other documents.
        seeds: Mean over the seeds with its t-interval. It tells how far other texts and seeds could change it.
    """

    documents: Difference
    seeds: Estimate

    @property
    def is_shown(self) -> bool:
        """Whether documents and seeds show it: both intervals exclude 0, and the sign-flip test rejects equality."""
        return self.documents.is_shown and (self.seeds.low > 0 or self.seeds.high < 0)


def adjusted(changes: Sequence[Change]) -> list[Change]:
    """Returns the changes with p-values adjusted by Holm's method."""
    found = holm([change.documents for change in changes])
    return [change._replace(documents=documents) for change, documents in zip(changes, found, strict=True)]


class Results:
    """The newest settings of one kind of student.

    All students of a budget of labels are measured on the same documents, and those of a seed learned from the same
    text. Where other machines wrote other texts, the one counts by which most methods have all seeds, or else the
    newest.

    Args:
        rows: Rows of the results file.
        student: Name of a kind of student, of which there is a row.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], student: str) -> None:
        own = [row for row in rows if row["student"] == student]
        self.student, self.last = student, own[-1]
        self.rows = [row for row in own if row["settings"] == self.last["settings"]]
        self._texts = {labels: self._text_of_seeds(labels) for labels in BUDGETS}
        self.found = Rows(self.rows, self.last["settings"], lambda unit: self._texts[unit.labels].get(unit.seed, ""))
        self.trials = {name: [row for row in self._of("trial") if row["method"] == name] for name in METHODS}

    def _text_of_seeds(self, labels: int) -> dict[int, str]:
        rows = [row for row in self.rows if row["op"] == "test" and row["labels"] == labels]
        best = 0, -1
        chosen: dict[int, str] = {}
        for part in {_part(row): None for row in rows}:
            texts = {row["seed"]: row["text"] for row in rows if _part(row) == part}
            own = [index for index, row in enumerate(rows) if texts.get(row["seed"]) == row["text"]]
            seeds: dict[str, set[int]] = {}
            for index in own:
                seeds.setdefault(rows[index]["method"], set()).add(rows[index]["seed"])
            size = sum(found.issuperset(TEST_SEEDS) for found in seeds.values()), own[-1]
            if size > best:
                best, chosen = size, texts
        return chosen

    def _of(self, op: str) -> list[dict[str, Any]]:
        return list({(str(Unit.of(row)), row["text"]): row for row in self.rows if row["op"] == op}.values())

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
    ) -> dict[str, Change]:
        """Returns how every tested method differs from one of them, with p-values adjusted by Holm's method."""
        reference = self.tested(to, labels)
        tested = {name: self.tested(name, labels) for name in names if name != to}
        if reference is None:
            return {}
        found = {name: difference(reference, ours, measure) for name, ours in tested.items() if ours is not None}
        return dict(zip(found, adjusted(list(found.values())), strict=True))


def difference(reference: Tested, ours: Tested, measure: str) -> Change:
    """Returns the paired change from one method to another."""
    documents = paired_difference(reference.means(measure), ours.means(measure), weights=ours.labels)
    pairs = zip(reference.by_seed(measure), ours.by_seed(measure), strict=True)
    return Change(documents, Estimate.of([ours - theirs for theirs, ours in pairs]))


def _part(row: dict[str, Any]) -> tuple[int, ...]:
    """Returns the lengths of the test's documents, by which a part is known."""
    return tuple(document[0] for document in row["per_document"])


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
    heads = "perplexity", f"to {to_title}, %", "over seeds", "p", "KL to the teacher", f"to {to_title}, nats"
    columns: list[list[str]] = [[head] for head in (head, *heads, "perplexity, plain English", "seconds")]
    for name in names:
        found = results.tested(name, labels)
        if found is None:
            continue
        change, kl = differences.get(name), divergences.get(name)
        cells = (
            (METHODS | SUPPORTS)[name].title,
            f"{perplexity(found.mean('perplexity')):.2f}",
            _interval(percent(change.documents), 1) if change else "",
            "[{:+.1f}, {:+.1f}]".format(*percent(change.seeds)[1:]) if change else "",
            f"{change.documents.p_value:.4f}" if change else "",
            f"{found.mean('KL'):.3f}",
            _interval(kl.documents[:3], 3) if kl else "",
            _english(found.rows),
            _seconds(found.rows),
        )
        for column, cell in zip(columns, cells, strict=True):
            column.append(cell)
    # A column without figures is left out.
    lines = [_line(*cells) for cells in zip(*(column for column in columns if any(column[1:])), strict=True)]
    return "\n".join([lines[0], f"|---|{'---:|' * (lines[0].count(' | '))}", *lines[1:]])


def tuning_table(results: Results) -> str:
    """Tabulates the choice of every method, or how many of its trials were run."""
    lines = ["| method | chosen | perplexity | KL | trials |", "|---|---|---:|---:|---:|"]
    texts: dict[str, list[str]] = {}
    for name, trials in results.trials.items():
        planned = 1 if METHODS[name].follows else TRIALS
        choice = results.found.choice(results.student, name)
        if not trials:
            continue
        # A search that was begun elsewhere, on another text, may have left further trials.
        own = [row for row in trials if row["text"] == trials[-1]["text"]]
        best = min(own, key=lambda row: row["loss"])
        shown, count = f"not yet; best so far {in_words(best['options'])}", len(own)
        if choice:
            best = next(row for row in trials if (row["options"], row["loss"]) == (choice["options"], choice["loss"]))
            shown, count = in_words(best["options"]), choice["trials"]
        counted = f"{count} of {planned}"
        texts.setdefault(best["text"], []).append(METHODS[name].title)
        lines.append(_line(METHODS[name].title, shown, f"{best['perplexity']:.2f}", f"{best['kl']:.3f}", counted))
    if len(texts) > 1:
        groups = (f"Text {number}: {'; '.join(titles)}" for number, titles in enumerate(texts.values(), 1))
        lines += [
            "",
            f"Different machines wrote different texts; compare figures of one text only. {'. '.join(groups)}.",
        ]
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
    changes = {name: difference(other, ours, "perplexity") for name, other in others.items() if other and ours}
    said = []
    for name, change in zip(changes, adjusted(list(changes.values())), strict=True):
        effect = "helps" if change.seeds.mean < 0 else "hurts"
        found = f"The adaptive weight {effect}" if change.is_shown else "No effect of the adaptive weight is shown"
        said.append(f"{found}, compared with {name}: perplexity {in_percent(change)}.")
    return [f"With {labels:,} labels. {' '.join(said)}"] if said else []


def in_words(options: dict[str, Any]) -> str:
    """Returns text such as "rest renorm, learning_rate 0.001, kd_weight 3.0": what was chosen for a method."""
    return ", ".join(f"{name} {value}" for name, value in options.items() if name not in _NOT_CHOSEN)


def percent(values: Sequence[float]) -> list[float]:
    """Returns a mean and the ends of its interval, in nats, as percent of a perplexity."""
    return [100 * math.expm1(value) for value in values[:3]]


def in_percent(change: Change) -> str:
    """Returns text such as "+0.6 % [+0.2, +1.0], over seeds [-0.7, +1.9]"."""
    value, low, high = percent(change.documents)
    return "{:+.1f} % [{:+.1f}, {:+.1f}], over seeds [{:+.1f}, {:+.1f}]".format(
        value, low, high, *percent(change.seeds)[1:]
    )


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
    trials, tests = ([row for row in results.rows if row["op"] == op] for op in ("trial", "test"))
    measured = (tests or trials)[-1]
    start = f"{len(kind['layers'])} of its layers" if kind["layers"] else f"{kind['num_layers']} new layers"
    devices, commits = (", ".join(dict.fromkeys(row[name] for row in results.rows)) for name in ("device", "commit"))
    heldout = " or ".join(dict.fromkeys(f"{row['heldout_labels']:,}" for row in trials)) or "no"
    has_seconds = any(row["alone"] for row in tests)
    return (
        f"Teacher: {text['teacher']}, perplexity {measured['teacher_perplexity']:.2f}, which wrote all text, so that "
        f"SFT on it is sequence-level distillation. Student: {start}, {measured['parameters']:,} parameters; "
        f"{kind['passes']} pass{'es' * (kind['passes'] > 1)} over the documents, {kind['batch_size']} per step, in "
        f"bfloat16 autocast. Options were chosen by the loss on {heldout} labels of the development part. "
        f"{_INTERVALS if tests else ''}{_SECONDS if has_seconds else ''}{devices}; commits {commits}; "
        f"{last['date'][:10]}."
    )
