"""``AnswerJournal``, which keeps each of a server's answers from the moment it comes until it is in a store."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimkernels.durable import JsonLines
from slimkernels.served_rows.rows import ServedDocument
from slimkernels.sparse_logits import SparseLogits

_FIRST_KEY = "rows_of"
_DTYPES = {"ids": "<i4", "logits": "<f4", "lse": "<f4", "target_logit": "<f4", "rest_lse": "<f4"}


class AnswerJournal:
    """A file of scored documents, one per line, locked for as long as it is open.

    A kill loses none of the documents for which ``append`` has returned.

    Args:
        path: Path of the file, which is created if it does not exist.
        rows_of: JSON object that says what the rows are of, such as the server's model and the number of entries.
        wait_s: Seconds to wait for another process that has the file open; ``math.inf`` waits without a limit.

    Raises:
        FileInUseError: Another process has the file open.
        ForeignFileError, DamagedLineError: The file is no such journal, or is damaged.
        ValueError: The file holds rows of something else.
    """

    def __init__(self, path: str | os.PathLike[str], rows_of: Mapping[str, Any], wait_s: float = 0.0) -> None:
        self.path, self._rows_of = Path(path), dict(rows_of)
        self._lines = JsonLines(path, _FIRST_KEY, wait_s)
        other = next((found for found in self._lines.found if found[_FIRST_KEY] != self._rows_of), None)
        if other is not None:
            self._lines.close()
            raise ValueError(
                f"{self.path} must hold rows of {self._rows_of}, got rows of {other[_FIRST_KEY]}: use the same "
                "settings, or another folder"
            )

    def found(self) -> Iterator[ServedDocument]:
        """Yields the documents that the file held when it was opened."""
        return map(_read, self._lines.found)

    def append(self, document: ServedDocument) -> None:
        """Appends a document, which is on the disk when this returns."""
        self._lines.append({_FIRST_KEY: self._rows_of} | _written(document))

    def clear(self) -> None:
        """Removes all documents, which are in a store by now."""
        self._lines.clear()
        self._lines.found.clear()

    def close(self) -> None:
        """Releases the lock, so that other processes can open the file."""
        self._lines.close()

    def __enter__(self) -> AnswerJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _written(document: ServedDocument) -> dict[str, Any]:
    teacher = document.teacher
    fields: dict[str, Any] = {"input_ids": document.input_ids, "positions": document.positions}
    for name, dtype in _DTYPES.items():
        array = getattr(teacher, name).numpy().astype(dtype)
        fields[name] = [list(array.shape), base64.b64encode(array.tobytes()).decode()]
    return fields


def _read(fields: Mapping[str, Any]) -> ServedDocument:
    tensors = {}
    for name, dtype in _DTYPES.items():
        shape, content = fields[name]
        array = np.frombuffer(base64.b64decode(content), dtype).reshape(shape)
        tensors[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    return ServedDocument(fields["input_ids"], fields["positions"], SparseLogits(**tensors))
