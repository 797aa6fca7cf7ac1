"""Everything a model was asked and answered, as lines of JSON that survive a kill and are never made twice."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


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
        BlockingIOError: Another process has it open.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = self.path.read_bytes()
            self.records = {record.key: record for record in parse_records(content, self.path)}
            os.ftruncate(self._descriptor, content.rfind(b"\n") + 1)
        except BlockingIOError as error:
            self.close()
            raise BlockingIOError(f"{self.path} is being written by another run: wait until it has ended") from error
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
        line = record.to_line()
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)
        self.records[record.key] = record

    def close(self) -> None:
        """Lets other processes have the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

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
    return list({record.key: record for record in parse_records(Path(path).read_bytes(), path)}.values())


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Replaces a file of records, whole or not at all."""
    partial = Path(f"{os.fspath(path)}.tmp")
    with open(partial, "wb") as file:
        file.writelines(record.to_line() for record in records)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def parse_records(content: bytes, path: str | os.PathLike[str]) -> list[Record]:
    """The records of a file's whole lines.

    Raises:
        ValueError: A line is no record: which.
    """
    found = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            found.append(Record.from_line(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, must be a record: {error}; delete the line to redo it") from error
    return found
