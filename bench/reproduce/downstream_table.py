"""The documentation's table of the students' answers to multiple-choice questions."""

from __future__ import annotations

import numpy as np

from bench.reproduce.downstream import BEFORE, TEACHER
from bench.reproduce.methods_plan import METHODS, SUPPORTS
from bench.reproduce.methods_results import STUDENT_NAMES
from slimkernels.evaluate.statistics import Difference, bootstrap_interval, holm, paired_difference

REFERENCE = "sft"
_TITLES = {TEACHER: "the teacher", BEFORE: "before training"}


def downstream_table(rows: list[dict]) -> str:
    """Tabulates accuracy by task, with 95 % intervals over questions, and paired differences from SFT over all."""
    rows, tasks = _newest(rows)
    last = rows[-1]
    counts = {row["task"]: row["num_samples"] for row in rows}
    heads = [f"{task} ({counts[task]})" for task in tasks]
    lines = [f"| | {' | '.join(heads)} | all questions | minus SFT |", f"|---|{'---:|' * (len(heads) + 2)}"]
    guessing = {row["task"]: row["guessing"] for row in rows}
    whole = sum(guessing[task] * counts[task] for task in tasks) / sum(counts[task] for task in tasks)
    for (student, labels), found in _by_student(rows, tasks).items():
        changes = _changes(found, REFERENCE)
        for method, values in found.items():
            change = changes.get(method)
            shown = "" if change is None else f"{_interval(change[:3], '+')}, p {change.p_value:.2f}"
            cells = [_interval(bootstrap_interval(values[task])) for task in tasks]
            lines.append(
                f"| {_title(student, labels, method)} | {' | '.join(cells)} | "
                f"{_interval(bootstrap_interval(_all(values)))} | {shown} |"
            )
    lines.append(f"| guessing | {' | '.join(f'{100 * guessing[task]:.1f}' for task in tasks)} | {100 * whole:.1f} |  |")
    seeds = sorted({row["seed"] for row in rows if row["method"] in METHODS | SUPPORTS})
    lines += [
        "",
        f"Accuracy in %, by the likelihood of each answer, of the first questions of each task, asked through lm-eval "
        f"{last['lm_eval']}. Brackets hold 95 % bootstrap intervals over questions, each the mean over seeds "
        f"{', '.join(map(str, seeds))}; p is of the sign-flip test, adjusted over a student's methods by Holm's "
        f"method. {last['device']}, commit {last['commit']}, {last['date'][:10]}.",
    ]
    return "\n".join(lines)


def changes(rows: list[dict], method: str, to: str) -> dict[tuple[str, int], Difference]:
    """Returns by how much a method's accuracy over all questions is above another's, by kind of student and labels.

    The p-values are adjusted over all methods that were asked, by Holm's method.
    """
    found = {student: _changes(values, to) for student, values in _by_student(*_newest(rows)).items()} if rows else {}
    return {student: changes[method] for student, changes in found.items() if method in changes}


def _newest(rows: list[dict]) -> tuple[list[dict], list[str]]:
    """Returns the rows that ask as many questions as the newest, and their tasks."""
    rows = [row for row in rows if row["limit"] == rows[-1]["limit"]]
    return rows, list(dict.fromkeys(row["task"] for row in rows))


def _by_student(rows: list[dict], tasks: list[str]) -> dict[tuple, dict[str, dict[str, np.ndarray]]]:
    """Returns each question's mean over seeds, by student and labels, then by method, then by task."""
    by_student = {}
    for student, labels in dict.fromkeys((row["student"], row["labels"]) for row in rows):
        own = [row for row in rows if (row["student"], row["labels"]) == (student, labels)]
        found = {method: _values(own, method, tasks) for method in dict.fromkeys(row["method"] for row in own)}
        by_student[student, labels] = {method: values for method, values in found.items() if values}
    return by_student


def _changes(found: dict[str, dict[str, np.ndarray]], to: str) -> dict[str, Difference]:
    compared = [method for method in found if to in found and method != to]
    differences = [paired_difference(_all(found[to]), _all(found[method])) for method in compared]
    return dict(zip(compared, holm(differences), strict=True))


def _values(rows: list[dict], method: str, tasks: list[str]) -> dict[str, np.ndarray]:
    """Returns each question's mean over seeds, by task; empty unless every task was asked."""
    newest = {(row["task"], row["seed"]): row["right"] for row in rows if row["method"] == method}
    found = {
        task: np.array([[int(right) for right in rights] for (name, _), rights in newest.items() if name == task])
        for task in tasks
    }
    return {task: values.mean(0) for task, values in found.items()} if all(map(len, found.values())) else {}


def _all(values: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate(list(values.values()))


def _interval(values: tuple[float, float, float], sign: str = "") -> str:
    return "{0:{3}.1f} [{1:{3}.1f}, {2:{3}.1f}]".format(*(100 * value for value in values), sign)


def _title(student: str | None, labels: int, method: str) -> str:
    title = _TITLES.get(method) or (METHODS | SUPPORTS)[method].title
    if student is None:
        return title
    kind = STUDENT_NAMES[student].split(",")[0].lower()
    return f"{kind}, {title}" + (f", {labels:,} labels" if labels else "")
