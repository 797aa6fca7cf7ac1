"""``Trace``: the record of a search in a file, from which a killed search resumes and its trees can be shown."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slimkernels.durable import JsonLines, read_json_lines
from slimkernels.search.checks import Check
from slimkernels.search.config import PathFinderConfig
from slimkernels.search.engine import Engine
from slimkernels.search.outcome import Result
from slimkernels.search.question import Progress, Question, QuestionSearch, count_repeats, plain_prompt
from slimkernels.search.tree import Status

_VERSION = 1
_FIRST_KEY = "slimkernels_trace"
_NEW_SETTINGS = ("answer_kind",)  # which traces of version 0.1.0 do not name
# Options that these do not name either: a search without them is the same as before.
_NEW_OPTIONS = ("stop_when_agreed", "branching_temperature", "score_steps", "merge_siblings", "merge_embed")
_OF_SCORES = ("score_weight", "score_reduction")  # which mean nothing without ``score_steps``


class TraceMismatchError(ValueError):
    """The trace is of another search, or of another version of the format."""


class TraceDamagedError(ValueError):
    """A line of the trace contradicts the lines before it."""


class TracedQuestion(NamedTuple):
    """One question in a trace.

    Attributes:
        question: Question that was searched.
        progress: State of its search.
        result: The selected ``node`` (or None), ``text``, ``answer`` and ``finished``, and the ``candidates`` (nodes)
            with their ``scores``; None if the search of the question is not complete.
    """

    question: Question
    progress: Progress
    result: Mapping[str, Any] | None


class TraceContent(NamedTuple):
    """The content of a trace.

    Attributes:
        header: Engine, configuration, checks and questions, as returned by ``header_of``.
        questions: Questions in the order in which they were given.
    """

    header: Mapping[str, Any]
    questions: list[TracedQuestion]


def header_of(
    engine: Engine, config: PathFinderConfig, checks: Sequence[Check], questions: Sequence[Question]
) -> dict[str, Any]:
    """Returns everything that must be equal for a search to resume, as JSON values.

    Functions and checks are identified by their names, ``score_steps`` and checks also by their ``settings`` if they
    have any. The number of questions that are searched at the same time may differ.
    """
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("batch_questions", "step_end")
        and not (field.name in _NEW_OPTIONS and getattr(config, field.name) is None)
    }
    fields["end_markers"] = list(config.end_markers)
    if not isinstance(config.branching_factor, int):
        fields["branching_factor"] = list(config.branching_factor)
    step_end = config.step_end
    fields["step_end"] = None if step_end is None else _name(step_end)
    if config.merge_embed is not None:
        fields["merge_embed"] = _name(config.merge_embed)
    if config.score_steps is None:
        fields = {name: value for name, value in fields.items() if name not in _OF_SCORES}
    else:
        fields["score_steps"] = {"name": _name(config.score_steps), **getattr(config.score_steps, "settings", {})}
    counted = count_repeats([question._replace(repeat=None) for question in questions])
    return {
        _FIRST_KEY: _VERSION,
        "engine": engine.identity(),
        "config": fields,
        "checks": [{"name": check.name, **getattr(check, "settings", {})} for check in checks],
        "questions": [
            {"prompt": plain_prompt(question.prompt), "context": question.context}
            | ({"choices": list(question.choices)} if question.choices else {})
            | ({"repeat": question.repeat} if question.repeat != usual.repeat else {})
            for question, usual in zip(questions, counted, strict=True)
        ],
    }


def _name(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


class Trace:
    """The file of one search: a header, a line for each complete depth of a question, and a line for its result.

    The line of a depth holds the new nodes (``Tree.record``) and the earlier nodes whose status changed. The file is
    locked until the trace is closed.

    Args:
        path: File to create, or to continue if it exists.
        header: Header of this search.

    Raises:
        TraceMismatchError: The file is the trace of another search.
        TraceDamagedError: A line of the file contradicts the lines before it.
        DamagedLineError, FileInUseError, ForeignFileError: As in ``JsonLines``.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self._lines = JsonLines(path, _FIRST_KEY)
        try:
            if self._lines.found:
                _check_header(self._lines.found[0], header, path)
                self._traced = _restore(self._lines.found, path)
            else:
                self._lines.append(header)
                self._traced = _restore([dict(header)], path)
        except BaseException:
            self._lines.close()
            raise
        self._statuses = [traced.progress.tree.status.copy() for traced in self._traced]

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def progress(self, index: int) -> Progress:
        """Returns the state from which the search of a question resumes."""
        return self._traced[index].progress

    def write_depth(self, search: QuestionSearch) -> None:
        """Records a complete depth of a question."""
        progress = search.progress
        first = len(self._statuses[search.index])
        line = {
            "question": search.index,
            "depth": progress.depth,
            "num_tokens": progress.num_tokens,
            "seconds": round(progress.seconds, 3),
            "changed": self._changed(search),
            "nodes": [search.tree.record(node) for node in range(first, len(search.tree))],
        }
        self._lines.append(line)
        self._statuses[search.index] = search.tree.status.copy()

    def write_result(self, search: QuestionSearch, result: Result) -> None:
        """Records the result of a question, unless the trace already holds the same."""
        content = {
            "node": result.node,
            "text": result.text,
            "answer": result.answer,
            "finished": result.finished,
            "candidates": [candidate.node for candidate in result.candidates],
            "scores": result.scores,
        }
        if content != self._traced[search.index].result:
            self._lines.append({"question": search.index, "result": content, "changed": self._changed(search)})

    def _changed(self, search: QuestionSearch) -> list[dict[str, Any]]:
        """Returns the recorded nodes whose status has changed since."""
        before = self._statuses[search.index]
        changed = np.flatnonzero(before != search.tree.status[: len(before)]).tolist()
        records = [search.tree.record(node) for node in changed]
        return [{name: record[name] for name in ("node", "status", "reason")} for record in records]


def read_trace(path: str | os.PathLike[str]) -> TraceContent:
    """Reads a trace, even one that is still being written.

    Raises:
        FileNotFoundError: There is no such file.
        TraceMismatchError: The trace is of another version of the format.
        TraceDamagedError, DamagedLineError, ForeignFileError: As in ``Trace``.
    """
    lines = read_json_lines(path, _FIRST_KEY)
    if not lines:
        raise TraceDamagedError(f"{path} must begin with a header on a line of its own, but has no complete line")
    _check_version(lines[0], path)
    return TraceContent(lines[0], _restore(lines, path))


def _check_version(header: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    if header.get(_FIRST_KEY) != _VERSION:
        raise TraceMismatchError(
            f"{path} must be a trace of version {_VERSION}, got {header.get(_FIRST_KEY)!r}: use the release that "
            "wrote it, or give another path"
        )


def _check_header(found: Mapping[str, Any], header: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    _check_version(found, path)
    for part in ("engine", "config"):
        was, now = found.get(part, {}), header[part]
        for name in sorted({*was, *now}):
            # A trace of an earlier release does not name a setting that is new since.
            if name in _NEW_SETTINGS and name not in was:
                continue
            if was.get(name) != now.get(name):
                raise _mismatch(path, f"{part} {name}", was.get(name), now.get(name))
    if found.get("checks") != header["checks"]:
        raise _mismatch(path, "checks", found.get("checks"), header["checks"])
    asked, now_asked = found.get("questions", []), header["questions"]
    if len(asked) != len(now_asked):
        raise _mismatch(path, "number of questions", len(asked), len(now_asked))
    for index, (was, now) in enumerate(zip(asked, now_asked, strict=True)):
        if was != now:
            raise _mismatch(path, f"questions[{index}]", was, now)


def _mismatch(path: str | os.PathLike[str], field: str, was: object, now: object) -> TraceMismatchError:
    return TraceMismatchError(
        f"{path} is the trace of another search: its {field} is {_short(was)}, this search's {_short(now)}; give "
        "another path, or search with the trace's settings"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _restore(lines: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> list[TracedQuestion]:
    """Returns the state of every question after the last of the lines."""
    number = 1
    try:
        traced = [
            TracedQuestion(
                Question(asked["prompt"], asked["context"], tuple(asked.get("choices", ()))), Progress(), None
            )
            for asked in lines[0]["questions"]
        ]
        for number, line in enumerate(lines[1:], 2):  # noqa: B007 -- the error message names the line
            question = traced[line["question"]]
            tree = question.progress.tree
            for change in line["changed"]:
                if not 0 <= change["node"] < len(tree):
                    raise ValueError(f"there is no node {change['node']} to change")
                tree.mark(change["node"], Status[change["status"].upper()], change["reason"])
            if "result" in line:
                traced[line["question"]] = question._replace(result=line["result"])
                continue
            for record in line["nodes"]:
                tree.restore(record)
            question.progress.depth = line["depth"]
            question.progress.num_tokens = line["num_tokens"]
            question.progress.seconds = line["seconds"]
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise TraceDamagedError(
            f"line {number} of {Path(path)} cannot follow those before it ({type(error).__name__}: {error}): restore "
            "the file, or remove it"
        ) from error
    return traced
