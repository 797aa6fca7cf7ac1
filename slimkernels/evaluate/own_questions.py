"""Questions of the user's own: a .jsonl file with one record per question, whose fields are named, as a task."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from slimkernels.evaluate.answers import ANSWER_KINDS, AnswerKind, canonical, extract
from slimkernels.evaluate.tasks import TASKS, TEXT, Sample, Task, check_num_samples, read_task
from slimkernels.text_files import check_characters

_KIND_FIELD = "kind"
_KINDS = (*ANSWER_KINDS, TEXT)
_NAME = re.compile(r"[\w.-]+")
_BARE_NUMBER = re.compile(r"[-+$\u20ac\u00a3\u2212]*\s?[\d,]*\.?\d+(?:/\d+)?\s?%?")


def load_questions(
    name: str,
    path: str | os.PathLike[str],
    num_samples: int | None = None,
    *,
    template: str,
    question_field: str = "question",
    reference_field: str = "answer",
    choices_field: str = "choices",
    kind: AnswerKind | str | None = None,
) -> Task:
    """Reads a task from a file.

    Args:
        name: Name of the task in the report; no name of a task that the package has.
        path: .jsonl file with an object per line, or .json file with a list of objects. If there are fields ``id``
            and ``kind``, they name the question and the kind of its answer, which is the same in the whole file.
        num_samples: Number of samples to take, at least 1, from the start of a shuffled order that is the same for all
            runs; None takes all.
        template: Prompt, with ``{question}`` where the question and its choices go.
        question_field: Field with the text of the question.
        reference_field: Field with the correct answer: a text, a number, or true or false. A worked solution may stand
            in front of an announced answer, as in GSM8K.
        choices_field: Field with the list of the choices' texts; the correct answer is then a letter or one of them.
            It may be missing.
        kind: Kind of the answers, "number", "yes_no", "letter", "any" or "text" (scored by Rouge-L). None is the kind
            that the file states, else "letter" where there are choices, else "number" or "yes_no" if all correct
            answers are, else "any".

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A record is not a question, a field is missing, or the template has no ``{question}``; the message
            names the record.
    """
    check_num_samples(num_samples)
    if not _NAME.fullmatch(name) or name in (*TASKS, "heldout"):
        raise ValueError(
            f"a task of your own needs a name of letters, digits, '.', '_' and '-' that no other task has, got {name!r}"
        )
    if "{question}" not in template:
        raise ValueError(f"template must contain {{question}}, where the question goes, got {template!r}")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"questions not found: there is no file {path}")

    def read(row: Mapping[str, Any]) -> Sample:
        return own_sample(row, question_field, reference_field, choices_field)

    stated: set[str] = set()

    def read_with_kind(row: Mapping[str, Any]) -> Sample:
        if kind is None and _KIND_FIELD in row:
            stated.add(_kind(row[_KIND_FIELD]))
        return read(row)

    # The kind depends on all answers, so the file is read a second time, by its kind.
    samples = read_task(name, None, path, path.name, read_with_kind, None, template).samples
    if len(stated) > 1:
        raise ValueError(
            f"{path} must hold answers of one kind, got {' and '.join(sorted(stated))} in its field {_KIND_FIELD!r}: "
            "put the questions of each kind into a file of their own, and give each file as a task"
        )
    found = kind or next(iter(stated), None) or kind_of_answers(samples)
    answers = cast("AnswerKind | None", None if found == TEXT else found)
    return read_task(name, answers, path, path.name, lambda row: asked(read(row), answers), num_samples, template)


def own_sample(row: Mapping[str, Any], question_field: str, reference_field: str, choices_field: str) -> Sample:
    """Returns a record's question, correct answer and choices as they stand in its fields.

    Raises:
        ValueError: A field is missing or of another type.
    """
    for field in (question_field, reference_field):
        if field not in row:
            raise ValueError(f"there is no field {field!r}, only {sorted(row)}")
    question, choices = row[question_field], row.get(choices_field) or ()
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the field {question_field!r} must be text, got {question!r}")
    check_characters(question, f"the field {question_field!r}")
    if not isinstance(choices, (list, tuple)) or len(choices) > 26:
        raise ValueError(f"the field {choices_field!r} must be a list of at most 26 texts, got {choices!r}")
    reference = _reference(row[reference_field])
    return Sample(str(row.get("id", "")), question.strip(), reference, tuple(map(str, choices)))


def _kind(value: Any) -> str:
    """Returns the kind that a record states."""
    if value not in _KINDS:
        raise ValueError(
            f"the field {_KIND_FIELD!r} must be one of {', '.join(_KINDS)}, got {json.dumps(value)}; rename a field "
            "that means something else"
        )
    return value


def _reference(answer: Any) -> str:
    """Returns a JSON value as a text: true and false are yes and no."""
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    if not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError(f"the correct answer must be a text, a number, true or false, got {json.dumps(answer)}")
    return str(answer).strip()


def kind_of_answers(samples: Sequence[Sample]) -> AnswerKind:
    """Returns the most special kind that all correct answers have."""
    if all(sample.choices for sample in samples):
        return "letter"
    references = [sample.reference for sample in samples]
    if all(_BARE_NUMBER.fullmatch(text) or extract(text, "number").strict is not None for text in references):
        return "number"
    if all(canonical(text, "yes_no") is not None for text in references):
        return "yes_no"
    return "any"


def asked(sample: Sample, kind: AnswerKind | None) -> Sample:
    """Returns a sample with its choices in the question, and with the correct answer alone as its reference."""
    question, reference = sample.question, sample.reference
    if sample.choices:
        letters = [chr(ord("A") + index) for index in range(len(sample.choices))]
        lines = [f"({letter}) {text}" for letter, text in zip(letters, sample.choices, strict=True)]
        question = "\n".join([question, *lines])
        if kind == "letter" and reference.upper() not in letters:
            if reference not in sample.choices:
                raise ValueError(f"the correct answer must be one of the choices or its letter, got {reference!r}")
            reference = letters[sample.choices.index(reference)]
    if kind in ("number", "any"):
        announced = extract(reference, kind).strict
        reference = reference if announced is None else announced
    return Sample(sample.id, question, reference, sample.choices)
