"""Judges the claims of the papers by committed results, and writes the table of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import records
from bench.reproduce.methods_plan import BUDGETS, METHODS, STUDENTS, SUPPORT_LABELS
from bench.reproduce.methods_results import ADAPTIVE, CONSTANT, REFERENCE, STUDENT_NAMES, Results, difference
from slimkernels.evaluate.statistics import Difference, holm

# More than this much more perplexity would count as a cost of keeping only the largest logits.
MARGIN = 0.02
SHOWN, NOT_SHOWN, CONTRADICTED, NOT_MEASURED = "shown", "not shown", "contradicted", "not measured"
INSTRUCTIONS_COMMAND = "[`bench.reproduce.instructions`](#instruction-following)"
METHODS_COMMAND = "[`bench.reproduce.methods`](#methods-that-are-all-tuned-alike)"


class Claim(NamedTuple):
    """A line of the table.

    Attributes:
        paper: Paper that makes the claim.
        claim: The claim in our words.
        measured: Figures measured here.
        verdict: One of "shown", "not shown", "contradicted", "not measured".
        command: Command that measures it.
    """

    paper: str
    claim: str
    measured: str
    verdict: str
    command: str


def claims_table(results: Path) -> str:
    """Tabulates the claims; what no results file has is said to be not measured."""
    lines = ["| paper | claim | measured here | verdict | command |", "|---|---|---|---|---|"]
    sources = (records.read(results / f"{name}.jsonl") for name in ("methods", "instructions"))
    lines += [f"| {' | '.join(claim)} |" for claim in claims(*sources)]
    lines += [
        "",
        f"Differences are of held-out perplexity, with 95 % intervals over documents, paired, means over three seeds. "
        f"A claim is shown, or contradicted, where the interval of every kind of student that was measured lies on "
        f"that side of zero and the sign-flip test, adjusted over all these comparisons by Holm's method, rejects "
        f"equality; that 5 % of the logits suffice, where the intervals end below {100 * MARGIN:+.0f} %.",
    ]
    return "\n".join(lines)


def claims(rows: Sequence[dict[str, Any]], instructions: Sequence[dict[str, Any]]) -> list[Claim]:
    """Returns the claims of the papers that this package is for.

    Args:
        rows: Rows of the comparison of methods.
        instructions: Rows of the experiment on following instructions.
    """
    found = _results(rows)
    logits, kd, weight = _adaptive(found)
    return [
        Claim("SLIM", "the teacher's logits help beyond its text", *logits, METHODS_COMMAND),
        Claim("SLIM", "SLIM is better than KD", *kd, METHODS_COMMAND),
        Claim("SLIM", "a weight per token helps, compared with the same weight for all", *weight, METHODS_COMMAND),
        Claim("SLIM", "the largest 5 % of the logits suffice", *_sufficient(found), METHODS_COMMAND),
        Claim("SLIM", "SLIM is better than MiniLLM", *_minillm(instructions), INSTRUCTIONS_COMMAND),
        Claim("SLIM", "SLIM is better on downstream tasks", "", NOT_MEASURED, ""),
        Claim("SLIM", "teachers of 70B parameters can be distilled", "", NOT_MEASURED, ""),
        Claim("PathFinder", "6 % better than other ways to decode, on three tasks", "", NOT_MEASURED, ""),
        Claim(
            "Gemini's language abilities",
            "how served models compare",
            "its files of outputs are scored again by their own rules, where a user has them",
            NOT_MEASURED,
            "`slimkernels compare --outputs FILE`",
        ),
    ]


def weight_sentence(rows: Sequence[dict[str, Any]]) -> str:
    """Answers whether SLIM's adaptive weight helps, with a space at the end; empty before it was measured.

    Args:
        rows: Rows of the comparison of methods.
    """
    changes = _changes(_results(rows))[REFERENCE]
    if not changes:
        return ""
    answer = {SHOWN: "Yes", CONTRADICTED: "No", NOT_SHOWN: "Not shown"}[_verdict([change for _, change in changes])]
    return (
        f"Does the adaptive weight help? {answer}: tuned alike over 3 seeds, SLIM's perplexity differs from KD's by "
        f"{' and '.join(f'{_percent(change)} ({at})' for at, change in changes)}. "
    )


def healed_sentence(rows: Sequence[dict[str, Any]]) -> str:
    """Returns what the teacher's logits are worth when half of its layers are healed; empty before it was measured.

    Args:
        rows: Rows of the comparison of methods.
    """
    for results in _results(rows):
        for labels in sorted(BUDGETS, reverse=True):
            text, logits = (results.tested(name, labels) for name in ("sft", REFERENCE))
            if results.student == "half" and text and logits:
                change = difference(logits, text, "perplexity")
                percent, low, high = (100 * math.expm1(value) for value in change[:3])
                return (
                    f"Half of a model's layers, healed on {labels:,} of its own tokens, end at {percent:.0f} % higher "
                    f"perplexity without such logits than with them (95 % interval {low:.0f} to {high:.0f} %, "
                    f"{len(text.rows)} seeds, both tuned alike; "
                    "[SFT to KD](docs/reproduced.md#methods-that-are-all-tuned-alike))."
                )
    return ""


def _results(rows: Sequence[dict[str, Any]]) -> list[Results]:
    return [Results(rows, student) for student in STUDENTS if any(row["student"] == student for row in rows)]


def _minillm(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    if not rows:
        return "", NOT_MEASURED
    settings = rows[-1]["settings"]
    return f"SLIM had {settings['steps']} steps, MiniLLM {settings['minillm_steps']}: not a fair comparison", NOT_SHOWN


def _adaptive(found: Sequence[Results]) -> list[tuple[str, str]]:
    """Returns what was measured of SLIM compared with SFT, KD and KD with SLIM's mean weight, and the verdicts."""
    return [
        (_measured(f"SLIM to {METHODS[name].title}", changes), _verdict([change for _, change in changes]))
        for name, changes in _changes(found).items()
    ]


def _changes(found: Sequence[Results]) -> dict[str, list[tuple[str, Difference]]]:
    """Returns what SLIM changes compared with other methods, by their names, with p-values adjusted over all."""
    measured = [
        (name, _at(result, labels), difference(theirs, ours, "perplexity"))
        for name in ("sft", REFERENCE, CONSTANT)
        for result in found
        for labels in BUDGETS
        if (ours := result.tested(ADAPTIVE, labels)) and (theirs := result.tested(name, labels))
    ]
    adjusted = holm([change for _, _, change in measured])
    by_name: dict[str, list[tuple[str, Difference]]] = {"sft": [], REFERENCE: [], CONSTANT: []}
    for (name, at, _), change in zip(measured, adjusted, strict=True):
        by_name[name].append((at, change))
    return by_name


def _sufficient(found: Sequence[Results]) -> tuple[str, str]:
    changes = [
        (_at(result, SUPPORT_LABELS), difference(theirs, ours, "perplexity"))
        for result in found
        if (ours := result.tested("top_renorm", SUPPORT_LABELS)) and (theirs := result.tested("all", SUPPORT_LABELS))
    ]
    if not changes:
        return "", NOT_MEASURED
    ends = [math.expm1(change.high) for _, change in changes]
    begins = [math.expm1(change.low) for _, change in changes]
    verdict = SHOWN if max(ends) < MARGIN else CONTRADICTED if min(begins) > MARGIN else NOT_SHOWN
    return _measured("KD from 5 % of the logits to all of them", changes), verdict


def _verdict(changes: Sequence[Difference]) -> str:
    if not changes:
        return NOT_MEASURED
    if all(change.is_shown and change.value < 0 for change in changes):
        return SHOWN
    return CONTRADICTED if all(change.is_shown and change.value > 0 for change in changes) else NOT_SHOWN


def _measured(what: str, changes: Sequence[tuple[str, Difference]]) -> str:
    cells = [f"{at}: {_percent(change)}" for at, change in changes]
    return f"{what}; {'; '.join(cells)}" if cells else ""


def _percent(change: Difference) -> str:
    return "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*(100 * math.expm1(value) for value in change[:3]))


def _at(results: Results, labels: int) -> str:
    return f"{STUDENT_NAMES[results.student].split(',')[0].lower()}, {labels:,} labels"
