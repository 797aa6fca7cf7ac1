"""The documentation's table of the students' answers to multiple-choice questions."""

from __future__ import annotations

import numpy as np

from bench.reproduce.downstream import BEFORE, TEACHER
from bench.reproduce.methods_plan import METHODS, SUPPORTS
from bench.reproduce.methods_results import STUDENT_NAMES
from slimkernels.evaluate.statistics import bootstrap_interval, holm, paired_difference

REFERENCE = "sft"
_TITLES = {TEACHER: "the teacher", BEFORE: "before training"}


def downstream_table(rows: list[dict]) -> str:
    """Tabulates accuracy by task, with 95 % intervals over questions, and paired differences from SFT over all."""
    last = rows[-1]
    rows = [row for row in rows if row["limit"] == last["limit"]]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    counts = {row["task"]: row["num_samples"] for row in rows}
    heads = [f"{task} ({counts[task]})" for task in tasks]
    lines = [f"| | {' | '.join(heads)} | all questions | minus SFT |", f"|---|{'---:|' * (len(heads) + 2)}"]
    guessing = {row["task"]: row["guessing"] for row in rows}
    whole = sum(guessing[task] * counts[task] for task in tasks) / sum(counts[task] for task in tasks)
    for student, labels in dict.fromkeys((row["student"], row["labels"]) for row in rows):
        own = [row for row in rows if (row["student"], row["labels"]) == (student, labels)]
        found = {method: _values(own, method, tasks) for method in dict.fromkeys(row["method"] for row in own)}
        found = {method: values for method, values in found.items() if values}
        compared = [method for method in found if REFERENCE in found and method != REFERENCE]
        changes = [paired_difference(_all(found[REFERENCE]), _all(found[method])) for method in compared]
        adjusted = dict(zip(compared, holm(changes), strict=True))
        for method, values in found.items():
            change = adjusted.get(method)
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
