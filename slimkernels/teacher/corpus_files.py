"""The records of corpus files: JSON, parquet and text, and the fields of each record that are read."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slimkernels.teacher.chat import is_conversation
from slimkernels.text_files import check_characters, read_json_records, read_lines

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
ROWS_AT_ONCE = 64


def check_corpus_file(path: str | os.PathLike[str]) -> None:
    """Checks that a file exists and has a suffix that ``read_documents`` reads, before a teacher is loaded for it.

    Raises:
        FileNotFoundError, ValueError: The same as in ``read_documents``.
    """
    require_file(path, "corpus")
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"the corpus file must end in one of {', '.join(SUFFIXES)}, got {path}")


def require_file(path: str | os.PathLike[str], what: str) -> None:
    """Raises FileNotFoundError where there is no such file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what} file not found: there is no file {path}")


class CorpusValue(NamedTuple):
    """The field of a record, the prompt that the record names, or "", and the teacher's prefix, or an empty one."""

    content: str | list[Any]
    prompt: str = ""
    prefix: str | list[int] = ""


def corpus_values(
    path: Path, what: str, fields: Sequence[str], prefix_field: str | None = None
) -> Iterator[CorpusValue]:
    """Yields the first of the fields that each record has, and the prefix where its field is named."""
    for number, record in enumerate(_records(path, what, fields, prefix_field), 1):
        name = next((name for name in fields if name in record), None)
        if name is None:
            raise ValueError(
                f"the {what} {path} has no field {' or '.join(map(repr, fields))} in record {number}, only "
                f"{sorted(record)}: name one of them as text_field"
            )
        value = record[name]
        if not isinstance(value, str) and not is_token_ids(value) and not is_conversation(value):
            raise ValueError(
                f"the field {name!r} must be text, a list of token ids or a list of messages, got "
                f"{type(value).__name__} in record {number} of {path}"
            )
        if not is_token_ids(value):
            check_characters(value, f"the field {name!r} in record {number} of {path}")
        prompt = record.get("prompt")
        prefix: Any = "" if prefix_field is None else record.get(prefix_field)
        if not isinstance(prefix, str) and not is_token_ids(prefix):
            raise ValueError(
                f"the teacher's prefix must be text or a list of token ids in every record, empty for none, got "
                f"{type(prefix).__name__} in the field {prefix_field!r} of record {number} of {path}"
            )
        if isinstance(prefix, str):
            check_characters(prefix, f"the field {prefix_field!r} in record {number} of {path}")
        elif prefix and is_conversation(value):
            raise ValueError(
                f"the teacher's prefix of a conversation must be text, got a list in record {number} of {path}"
            )
        yield CorpusValue(value, prompt if isinstance(prompt, str) else "", prefix)


def is_token_ids(value: Any) -> bool:
    """Returns whether a field holds token ids."""
    return isinstance(value, list) and all(type(item) is int for item in value)


def _records(path: Path, what: str, fields: Sequence[str], prefix_field: str | None) -> Iterator[dict[str, Any]]:
    kind = path.suffix.lower()
    if kind == ".txt":
        yield from ({fields[0]: text} for text in _paragraphs(path))
    elif kind == ".parquet":
        yield from _rows(path, what, fields, ("prompt", *([] if prefix_field is None else [prefix_field])))
    else:
        try:
            for number, record in enumerate(read_json_records(path), 1):
                if not isinstance(record, dict):
                    raise ValueError(f"record {number} must be an object, got {type(record).__name__}")
                yield record
        except ValueError as error:
            raise ValueError(f"the {what} {path} cannot be read as {kind[1:]}: {error}") from error


def _rows(path: Path, what: str, fields: Sequence[str], others: Sequence[str]) -> Iterator[dict[str, Any]]:
    # Heavy, and only needed for these files.
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in dict.fromkeys((*fields, *others)) if name in names]
            if not set(fields) & set(columns):
                # The error names all columns, which are not read.
                yield dict.fromkeys(names)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"the {what} {path} cannot be read as parquet: {error}") from error


def _paragraphs(path: Path) -> Iterator[str]:
    """Yields the runs of lines of a text file between blank ones."""
    for is_text, lines in itertools.groupby(read_lines(path), key=lambda line: bool(line.strip())):
        if is_text:
            yield "\n".join(lines)
