"""``JsonLines``: a file to which one JSON object after the other is appended, and which outlives its writer's death."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class DamagedLineError(ValueError):
    """A whole line of the file is not a JSON object."""


class ForeignFileError(ValueError):
    """The file is of another kind; it is left as it is."""


class FileInUseError(BlockingIOError):
    """Another process writes the file."""


def read_json_lines(path: str | os.PathLike[str], first_key: str) -> list[dict[str, Any]]:
    """The objects in the file; a last line that its writer did not finish is left out.

    Args:
        path: Of the file.
        first_key: With which the file begins.

    Raises:
        FileNotFoundError: There is no such file.
        ForeignFileError: The file begins with something else.
        DamagedLineError: A line other than the last is not a JSON object.
    """
    return _parse(Path(path).read_bytes(), path, first_key)[0]


class JsonLines:
    """The file, held for appending: no other process can open it so until ``close``.

    A process that is killed loses at most the line that it was writing, which the next ``append`` overwrites.

    Args:
        path: Created where it is not there.
        first_key: The first key of the first object that is appended to a new file.

    Attributes:
        found: The objects that were there.

    Raises:
        FileInUseError: Another process has it open.
        ForeignFileError: The file begins with something else.
        DamagedLineError: A line other than the last is not a JSON object.
    """

    def __init__(self, path: str | os.PathLike[str], first_key: str) -> None:
        self.path = Path(path)
        self._file = open(self.path, "a+b")  # noqa: SIM115 -- closed by close
        try:
            self._lock()
            self._file.seek(0)
            self.found, self._whole_bytes = _parse(self._file.read(), path, first_key)
        except BaseException:
            self._file.close()
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one object; it is on the disk when this returns."""
        self._file.truncate(self._whole_bytes)
        self._whole_bytes += self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets others open the file."""
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileInUseError(f"{self.path} is being written by another process: wait for it") from error


def _parse(content: bytes, path: str | os.PathLike[str], first_key: str) -> tuple[list[dict[str, Any]], int]:
    """The objects, and the bytes of the lines that are whole."""
    begins = f'{{"{first_key}": '.encode()
    if not begins.startswith(content[: len(begins)]):
        raise ForeignFileError(f"{path} must be new, or begin with {begins.decode()!r}: give another path")
    *lines, torn = content.split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise DamagedLineError(f"line {number} of {path} must be a JSON object: restore the file, or remove it")
        records.append(record)
    return records, len(content) - len(torn)
