"""Records of what a model was asked and answered, as lines of JSON that survive a kill; no answer is made twice."""

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
    """One answer of a model to one sample.

    Attributes:
        key: ``content_key`` of everything that decides the output: model, decoder, task, sample and seed.
        model: Label of the model.
        decoder: Name of the decoder; empty for tasks on which nothing is decoded.
        task: Name of the task.
        sample: Id of the sample in its task.
        order: Position of the sample in the task's fixed order.
        seed: Seed of the sampling; None for decoders without randomness.
        prompt: Full text that the model read.
        question: Part of the prompt that belongs to the sample.
        reference: Correct answer.
        output: Text that the decoder returned.
        answers: Answers extracted from the output, by metric; None for a metric that found no answer.
        scores: Scores by metric, in [0, 1] unless ``score_units`` gives the metric another unit.
        choices: Texts of the choices of a multiple-choice question.
        tokens: Number of tokens generated for the sample, including discarded chains and branches; None if unknown.
        output_tokens: Number of tokens of the output; None if unknown.
        seconds: Wall time, shared equally within a batch; None if unknown.
        finished: Whether the output ended before a limit cut it off; None if unknown.
        candidates: Candidates for the output, each with its ``text``, ``tokens`` (of the candidate), ``spent`` (tokens
            generated for the sample up to its end), ``score`` (by the decoder) and ``sum_logprob``. For multiple
            choice these are the choices, without token counts.
        published: Scores that came with an output from elsewhere, and a teacher's loss on a document.
        labels: Number of predicted labels of a document, over which its scores are means; None for a question.
        judged: Ratings by the name of the judge, as ``Judge.judged`` writes them.
        kind: Kind of the answers to questions of the user's own, or "text" for free texts; empty for other tasks.
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
    kind: str = ""

    def to_line(self) -> bytes:
        """Returns the record as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Record:
        """Reads a line that ``to_line`` made.

        Raises:
            ValueError: The line is not JSON, or not a record.
        """
        fields = json.loads(line)
        try:
            fields["choices"], fields["candidates"] = tuple(fields["choices"]), tuple(fields["candidates"])
            return cls(**fields)
        except (TypeError, KeyError) as error:
            raise ValueError(f"it is not a record ({error})") from error


def content_key(*parts: Any) -> str:
    """Hashes JSON values that decide an output to 24 hex digits, the same in every process and release."""
    return content_hash([json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()])


def content_hash(chunks: Iterable[bytes]) -> str:
    """Hashes bytes, given in chunks, to 24 hex digits."""
    digest = hashlib.blake2b(digest_size=12)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def record_path(*names: str, decided_by: Sequence[Any]) -> str:
    """Returns a file's path in a run's folder: readable names, and a hash of everything that decides its records."""
    name = "--".join("".join(c if c.isalnum() or c in "-._" else "-" for c in part) for part in names)
    return f"records/{name}--{content_key(*decided_by)[:8]}.jsonl"


class RecordFile:
    """A file with the records of one model, decoder and task, which are read when it is opened and then appended to.

    An incomplete last line, left by a kill, is dropped. Only one process can have the file open at a time.

    Args:
        path: Path of the file, created with its folder if it does not exist.

    Attributes:
        records: Records by key; of records with equal keys, the last.

    Raises:
        ValueError: A complete line is not a record; the message names the line.
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
        """Appends one record, which is on the disk when this returns.

        Raises:
            OSError: The record could not be written completely.
        """
        self._journal.append(record.to_line())
        self.records[record.key] = record

    def close(self) -> None:
        """Closes the file, so that other processes can open it."""
        self._journal.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Reads the records of a file, the last of those with equal keys; an incomplete last line is skipped.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A complete line is not a record; the message names the line.
    """
    records = {}
    with open(path, "rb") as file:
        for number, line in enumerate(whole_lines(file), 1):
            try:
                record = Record.from_line(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}, must be a record: {error}; delete the line to answer its sample again"
                ) from error
            records[record.key] = record
    return list(records.values())


def write_records(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Replaces a file of records atomically."""
    write_atomically(path, b"".join(record.to_line() for record in records))
