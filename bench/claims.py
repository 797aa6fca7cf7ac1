"""Judges the claims of the papers by committed results, and writes the table of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import records
from bench.reproduce import instructions_plan, instructions_table
from bench.reproduce.downstream_table import changes as downstream_changes
from bench.reproduce.instructions_table import in_points
from bench.reproduce.methods_plan import BUDGETS, METHODS, STUDENTS, SUPPORT_LABELS
from bench.reproduce.methods_results import (
    ADAPTIVE,
    CONSTANT,
    REFERENCE,
    STUDENT_NAMES,
    Change,
    Results,
    adjusted,
    difference,
    in_percent,
    in_words,
    percent,
)

# More than this much more perplexity would count as a cost of keeping only the largest logits.
MARGIN = 0.02
SHOWN, NOT_SHOWN, CONTRADICTED, NOT_MEASURED = "shown", "not shown", "contradicted", "not measured"
INSTRUCTIONS_COMMAND = "[`bench.reproduce.instructions`](#instruction-following)"
DOWNSTREAM_COMMAND = "[`bench.reproduce.downstream`](#multiple-choice)"
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
    sources = (records.read(results / f"{name}.jsonl") for name in ("methods", "instructions", "downstream"))
    lines += [f"| {' | '.join(claim)} |" for claim in claims(*sources)]
    lines += [
        "",
        f"Differences are of held-out perplexity, or of Rouge-L where that is said, paired, with 95 % intervals over "
        f"documents or prompts and over three seeds. A claim is shown, or contradicted, where both intervals of every "
        f"kind of student that was measured lie on that side of zero and the sign-flip test over documents or prompts, "
        f"adjusted over all comparisons of the same measure by Holm's method, rejects equality; that 5 % of the logits "
        f"suffice, where the intervals end below {100 * MARGIN:+.0f} %.",
    ]
    return "\n".join(lines)


def claims(
    rows: Sequence[dict[str, Any]], instructions: Sequence[dict[str, Any]], downstream: Sequence[dict[str, Any]] = ()
) -> list[Claim]:
    """Returns the claims of the papers that this package is for.

    Args:
        rows: Rows of the comparison of methods.
        instructions: Rows of the experiment on following instructions.
        downstream: Rows of the students' answers to multiple-choice questions.
    """
    found = _results(rows)
    logits, kd, weight = _adaptive(found)
    return [
        Claim("SLIM", "the teacher's logits help beyond its text", *logits, METHODS_COMMAND),
        Claim("SLIM", "SLIM is better than KD", *kd, METHODS_COMMAND),
        Claim("SLIM", "a weight per token helps, compared with the same weight for all", *weight, METHODS_COMMAND),
        Claim("SLIM", "the largest 5 % of the logits suffice", *_sufficient(found), METHODS_COMMAND),
        *_instructions(instructions),
        Claim("SLIM", "SLIM is better on downstream tasks", *_downstream(downstream), DOWNSTREAM_COMMAND),
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


def advice(rows: Sequence[dict[str, Any]]) -> str:
    """Says what to use as far as it was measured, as a list.

    Args:
        rows: Rows of the comparison of methods, at least one.
    """
    found = _results(rows)
    tested = (
        (result, labels, result.tested("sft", labels), result.tested(REFERENCE, labels))
        for result in found
        for labels in BUDGETS
    )
    logits = [(_at(one, labels), difference(text, kd, "perplexity")) for one, labels, text, kd in tested if text and kd]
    logits = list(zip([at for at, _ in logits], adjusted([change for _, change in logits]), strict=True))
    weight, (sufficient, verdict) = _changes(found)[REFERENCE], _sufficient(found)
    lines = {
        SHOWN: "Learn from the teacher's logits, not from its text alone.",
        NOT_SHOWN: "That the teacher's logits help beyond its text is not shown.",
        CONTRADICTED: "Learn from the teacher's text alone: its logits make the student worse.",
    }
    said = [_advised(lines, "KD to SFT on the teacher's text", logits)]
    lines = {
        SHOWN: 'Use `method="slim"`: its adaptive weight helps.',
        NOT_SHOWN: '`method="kd"` is enough: no gain by the adaptive weight of `method="slim"` is shown.',
        CONTRADICTED: 'Use `method="kd"`: the adaptive weight of `method="slim"` makes the student worse.',
    }
    said.append(_advised(lines, "SLIM to KD", weight))
    choices = [(result, result.found.choice(result.student, REFERENCE)) for result in found]
    chosen = [f"for {_kind(result)}, {in_words(choice['options'])}" for result, choice in choices if choice]
    if chosen:
        said.append(f"Begin with the options that were chosen for KD: {'; '.join(chosen)}.")
    lines = {
        SHOWN: "The largest 5 % of the logits are enough.",
        NOT_SHOWN: f"That the largest 5 % of the logits cost less than {100 * MARGIN:.0f} % is not shown.",
        CONTRADICTED: "Keep more than the largest 5 % of the logits.",
    }
    if verdict != NOT_MEASURED:
        said.append(f"{lines[verdict]} {sufficient}.")
    return "\n".join(f"- {sentence}" for sentence in said if sentence)


def _advised(sentences: dict[str, str], what: str, changes: Sequence[tuple[str, Change]]) -> str:
    if not changes:
        return ""
    return f"{sentences[_verdict([change for _, change in changes])]} {_measured(what, changes)}."


def weight_sentence(rows: Sequence[dict[str, Any]]) -> str:
    """Answers whether SLIM's adaptive weight helps, with a space at the end; empty before it was measured.

    Args:
        rows: Rows of the comparison of methods.
    """
    changes = _changes(_results(rows))[REFERENCE]
    if not changes:
        return ""
    answers = {SHOWN: "Yes", CONTRADICTED: "No", NOT_SHOWN: "No gain is shown"}
    # The largest budget of each kind of student; the page has all of them.
    largest = {at.partition(",")[0]: (at, change) for at, change in changes}
    cells = ("{:+.1f} % [{:+.1f}, {:+.1f}] ({})".format(*percent(change.seeds), at) for at, change in largest.values())
    return (
        f"Does the adaptive weight help? {answers[_verdict([change for _, change in changes])]}: SLIM to tuned "
        f"KD, {' and '.join(cells)}. "
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
                value, low, high = percent(difference(logits, text, "perplexity").seeds)
                return (
                    f"Half of a model's layers, healed on {labels:,} of its own tokens, end at {value:.0f} % higher "
                    f"perplexity without such logits than with them (95 % interval over {len(text.rows)} seeds: "
                    f"{low:.0f} to {high:.0f} %; both tuned alike; "
                    "[SFT to KD](docs/reproduced.md#methods-that-are-all-tuned-alike))."
                )
    return ""


def _results(rows: Sequence[dict[str, Any]]) -> list[Results]:
    return [Results(rows, student) for student in STUDENTS if any(row["student"] == student for row in rows)]


def _instructions(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Returns the claims on following instructions, one per method that SLIM is compared with."""
    found = instructions_table.Results(rows).changes() if rows else {}
    said = []
    for name, method in instructions_plan.METHODS.items():
        if name == instructions_plan.REFERENCE:
            continue
        changes = {compared: change for compared, change in found.items() if compared.method == name}
        cells = [f"{compared}: {in_points(change)}" for compared, change in changes.items()]
        measured = f"Rouge-L, SLIM minus {method.title}; {'; '.join(cells)}" if cells else ""
        # More Rouge-L is better, unlike perplexity.
        verdict = _verdict(list(changes.values()), better=1)
        claim = f"SLIM follows instructions better than {method.title}"
        said.append(Claim("SLIM", claim, measured, verdict, INSTRUCTIONS_COMMAND))
    return said


def _adaptive(found: Sequence[Results]) -> list[tuple[str, str]]:
    """Returns what was measured of SLIM compared with SFT, KD and KD with SLIM's mean weight, and the verdicts."""
    return [
        (_measured(f"SLIM to {METHODS[name].title}", changes), _verdict([change for _, change in changes]))
        for name, changes in _changes(found).items()
    ]


def _changes(found: Sequence[Results]) -> dict[str, list[tuple[str, Change]]]:
    """Returns what SLIM changes compared with other methods, by their names, with p-values adjusted over all."""
    measured = [
        (name, _at(result, labels), difference(theirs, ours, "perplexity"))
        for name in ("sft", REFERENCE, CONSTANT)
        for result in found
        for labels in BUDGETS
        if (ours := result.tested(ADAPTIVE, labels)) and (theirs := result.tested(name, labels))
    ]
    by_name: dict[str, list[tuple[str, Change]]] = {"sft": [], REFERENCE: [], CONSTANT: []}
    for (name, at, _), change in zip(measured, adjusted([change for *_, change in measured]), strict=True):
        by_name[name].append((at, change))
    return by_name


def _sufficient(found: Sequence[Results]) -> tuple[str, str]:
    changes = [
        (_at(result, SUPPORT_LABELS), difference(theirs, ours, "perplexity"))
        for result in found
        if (ours := result.tested(REFERENCE, SUPPORT_LABELS)) and (theirs := result.tested("all", SUPPORT_LABELS))
    ]
    if not changes:
        return "", NOT_MEASURED
    intervals = [percent(interval)[1:] for _, change in changes for interval in change]
    shown = all(high < 100 * MARGIN for _, high in intervals)
    contradicted = all(low > 100 * MARGIN for low, _ in intervals)
    verdict = SHOWN if shown else CONTRADICTED if contradicted else NOT_SHOWN
    return _measured("KD from 5 % of the logits to all of them", changes), verdict


def _downstream(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    found = downstream_changes(list(rows), ADAPTIVE, REFERENCE)
    if not found:
        return "", NOT_MEASURED
    cells = (
        f"{STUDENT_NAMES[student].split(',')[0].lower()}, {labels:,} labels: {{:+.1f}} [{{:+.1f}}, {{:+.1f}}]".format(
            *(100 * value for value in change[:3])
        )
        for (student, labels), change in found.items()
    )
    signs = {math.copysign(1, change.value) if change.is_shown else 0 for change in found.values()}
    verdict = {(1,): SHOWN, (-1,): CONTRADICTED}.get(tuple(signs), NOT_SHOWN)
    return f"SLIM minus KD, points of accuracy over all questions; {'; '.join(cells)}", verdict


def _verdict(changes: Sequence[Change], better: int = -1) -> str:
    """Returns the verdict on changes of which those of the sign ``better`` are improvements."""
    if not changes:
        return NOT_MEASURED
    if all(change.is_shown and better * change.seeds.mean > 0 for change in changes):
        return SHOWN
    return CONTRADICTED if all(change.is_shown and better * change.seeds.mean < 0 for change in changes) else NOT_SHOWN


def _measured(what: str, changes: Sequence[tuple[str, Change]]) -> str:
    cells = [f"{at}: {in_percent(change)}" for at, change in changes]
    return f"{what}; {'; '.join(cells)}" if cells else ""


def _at(results: Results, labels: int) -> str:
    return f"{_kind(results)}, {labels:,} labels"


def _kind(results: Results) -> str:
    return STUDENT_NAMES[results.student].split(",")[0].lower()
