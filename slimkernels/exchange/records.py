"""Streams records from parquet, Arrow and JSON-lines files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimkernels.text_files import read_lines

_SUFFIXES = (".parquet", ".arrow", ".jsonl")
# A record can have thousands of tokens with a list each, so few are read at a time.
_RECORDS_AT_ONCE = 16


def require_pyarrow() -> Any:
    """Imports pyarrow with its parquet module.

    Raises:
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "teacher files of other projects are read and written by the package pyarrow, which is not installed: "
            "pip install 'slimkernels[exchange]'"
        ) from error
    return pyarrow


def source_files(source: str | os.PathLike[str], suffixes: Sequence[str] = _SUFFIXES) -> list[Path]:
    """Returns the file, or the files of a folder with the first suffix that occurs in it, in numerical order.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: The file has another suffix, or the folder has no file with one of the suffixes.
    """
    path = Path(source)
    wanted = ", ".join(suffixes)
    if path.is_file():
        if path.suffix not in suffixes:
            raise ValueError(f"source must end in one of {wanted}, got {path}")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"source not found: there is no file or folder {path}")
    for suffix in suffixes:
        if files := sorted(path.glob(f"*{suffix}"), key=lambda file: _numerical(file.name)):
            return files
    raise ValueError(f"the folder {path} must hold files that end in one of {wanted}, got none")


def read_batches(
    source: str | os.PathLike[str], columns: Sequence[str] | None = None, optional: Sequence[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Yields the location of each record, and the record as a dict of pyarrow scalars.

    Args:
        source: A .parquet or .arrow file, or a folder of them.
        columns: Columns to read, all of which must exist; None reads all.
        optional: Further columns to read where they exist.

    Raises:
        ImportError, FileNotFoundError, ValueError: The same as in ``read_records``.
    """
    pyarrow = require_pyarrow()
    for path in source_files(source, _SUFFIXES[:2]):
        number = 0
        try:
            for batch in _batches(pyarrow, path, columns, optional):
                require_columns(batch.schema.names, columns or (), str(path))
                for index in range(batch.num_rows):
                    number += 1
                    yield f"{path}, record {number}", {name: batch[name][index] for name in batch.schema.names}
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error


def read_records(source: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the location of each record, and the record as Python numbers, strings and lists.

    Args:
        source: A .parquet, .arrow or .jsonl file, or a folder of them.

    Raises:
        ImportError: pyarrow is not installed, and the source is not a .jsonl file.
        FileNotFoundError: There is no such file or folder.
        ValueError: A file cannot be read.
    """
    files = source_files(source)
    if files[0].suffix != ".jsonl":
        for where, record in read_batches(source):
            yield where, {name: value.as_py() for name, value in record.items()}
        return
    for path in files:
        for number, line in enumerate(read_lines(path), 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}: must be a JSON object, got {type(record).__name__}")
            yield where, record


def require_columns(names: Sequence[str], needed: Sequence[str], where: str) -> None:
    """Checks that all needed columns exist.

    Raises:
        ValueError: Columns are missing; the message names them and the existing ones.
    """
    if missing := [name for name in needed if name not in names]:
        raise ValueError(f"{where}: has no column {', '.join(missing)}, only {', '.join(sorted(names))}")


def flat_list(scalar: Any, what: str) -> np.ndarray:
    """Returns a pyarrow list of numbers as an array (T,)."""
    values = scalar.values
    if values is None:
        raise ValueError(f"{what} must be a list, got null")
    return values.to_numpy(zero_copy_only=False)


def ragged_list(scalar: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns all numbers of a pyarrow list of lists, and the (R,) lengths of its lists."""
    lists = scalar.values
    if lists is None or lists.null_count:
        raise ValueError(f"{what} must be a list of lists, got null")
    return lists.flatten().to_numpy(zero_copy_only=False), lists.value_lengths().to_numpy().astype(np.int64)


def _batches(pyarrow: Any, path: Path, columns: Sequence[str] | None, optional: Sequence[str]) -> Iterator[Any]:
    if path.suffix == ".arrow":
        with pyarrow.memory_map(str(path)) as file:
            # datasets' save_to_disk writes this format.
            yield from pyarrow.ipc.open_stream(file)
        return
    with pyarrow.parquet.ParquetFile(path) as file:
        require_columns(file.schema_arrow.names, columns or (), str(path))
        if columns is not None:
            columns = [*columns, *(name for name in optional if name in file.schema_arrow.names)]
        yield from file.iter_batches(_RECORDS_AT_ONCE, columns=columns)


def _numerical(name: str) -> list[Any]:
    """Returns a sort key that puts data_10 after data_9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
