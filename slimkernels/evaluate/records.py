"""Everything a model was asked and answered, as lines of JSON that survive a kill and are never made twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from slimkernels.durable import Journal, whole_lines, write_atomically


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample, answered once.

    Attributes:
        key: ``content_key`` of what decides the output: model, decoder, task, sample and seed.
        model: Its label.
        decoder: Its name.
        task: Its name.
        sample: The sample's id in its task.
        order: Its place in the order in which the task's samples are taken.
        seed: Of the noise; None where there is none.
        prompt: All that the model read.
        question: The sample's own part of it.
        reference: The right answer.
        output: What the decoder answered with.
        answers: Extracted from the output, by metric; None where none was found.
        scores: By metric; in [0, 1], but for those that ``metric.py`` gives another unit.
        choices: Of a multiple-choice question.
        tokens: Generated for it, those of discarded chains and branches included; None where unknown.
        output_tokens: Of the output; None where unknown.
        seconds: It took; of samples decoded together, its share. None where unknown.
        finished: Whether the output came to its end by itself; None where unknown.
        candidates: What the output was chosen from: ``text``, ``tokens`` (of the candidate), ``spent`` (tokens
            generated for the sample until it was there), ``score`` (the decoder's), ``sum_logprob``; of
            multiple choice the choices, without tokens.
        published: Scores that came with the output, from elsewhere.
        labels: Of a document whose labels were predicted; its scores are means over them. None: an answered question.
        judged: By the name of a judge, its rating and what came with it, as ``judge.py`` has it.
    """

    key: str
    model: str
    decoder: str
    task: str
    sample: str
    order: int
    seed: int | None
    prompt: str
    question: str
    reference: str
    output: str
    answers: Mapping[str, str | None]
    scores: Mapping[str, float]
    choices: tuple[str, ...] = ()
    tokens: int | None = None
    output_tokens: int | None = None
    seconds: float | None = None
    finished: bool | None = None
    candidates: tuple[Mapping[str, Any], ...] = ()
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels: int | None = None
    judged: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def to_line(self) -> bytes:
        """As one line of JSON."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Record:
        """Reads ``to_line``.

        Raises:
            ValueError: It is no JSON, or not of a record.
        """
        fields = json.loads(line)
        try:
            fields["choices"], fields["candidates"] = tuple(fields["choices"]), tuple(fields["candidates"])
            return cls(**fields)
        except (TypeError, KeyError) as error:
            raise ValueError(f"it is not a record ({error})") from error


def content_key(*parts: Any) -> str:
    """A name for what decides an output; equal parts have equal names in every process."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def record_path(*names: str, decided_by: Sequence[Any]) -> str:
    """The file of records in a run's folder: readable, and another one where what decides its outputs is another."""
    name = "--".join("".join(c if c.isalnum() or c in "-._" else "-" for c in part) for part in names)
    return f"records/{name}--{content_key(*decided_by)[:8]}.jsonl"


class RecordFile:
    """Records of one model, decoder and task: read when opened, then appended to, a whole line at a time.

    A last line that a kill tore is dropped. Only one process has the file open at a time.

    Args:
        path: Made if it is not there, with its folder.

    Raises:
        ValueError: A line other than a torn last one is no record: which.
        FileInUseError: Another process has the file open.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self.path)
        try:
            self.records = {record.key: record for record in read_records(self.path)}
        except BaseException:
            self.close()
            raise

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def append(self, record: Record) -> None:
        """Writes one record; when this returns it is on the disk.

        Raises:
            OSError: It could not be written whole.
        """
        self._journal.append(record.to_line())
        self.records[record.key] = record

    def close(self) -> None:
        """Lets other processes have the file."""
        self._journal.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a file, of equal keys the last; a torn last line is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is no record: which.
    """
    records = {}
    with open(path, "rb") as file:
        for number, line in enumerate(whole_lines(file), 1):
            try:
                record = Record.from_line(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}, must be a record: {error}; delete the line to redo it"
                ) from error
            records[record.key] = record
    return list(records.values())


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Replaces a file of records, whole or not at all."""
    write_atomically(path, b"".join(record.to_line() for record in records))
