"""Reads corpora of documents through ``datasets``, and the prompts from which a teacher generates its own."""

from __future__ import annotations

import importlib.resources
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "paragraph"}),
}
_TEXTS_AT_ONCE = 64


def shipped_prompts() -> list[str]:
    """Returns the short English openings of the package: stories, explanations, letters, dialogues, lists."""
    return _lines(importlib.resources.files("slimkernels").joinpath("data/prompts.txt").read_text(encoding="utf-8"))


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Returns the lines of a text file that are not blank.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Every line is blank.
    """
    _require_file(path, "prompts")
    prompts = _lines(Path(path).read_text(encoding="utf-8"))
    if not prompts:
        raise ValueError(f"the prompt file {path} must hold at least one line that is not blank")
    return prompts


def without_end(ids: list[int], end: Any) -> list[int]:
    """Removes an end of text that a tokenizer appends to a prompt, because the prompt continues."""
    return ids[:-1] if ids and ids[-1] == end else ids


def read_documents(
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    text_field: str = "text",
    max_length: int | None = 1024,
) -> Iterator[list[int]]:
    """Streams the documents of a corpus as token ids.

    ``.jsonl`` and ``.json`` hold an object per line, ``.parquet`` a row per document; in ``.txt`` a blank line ends a
    document. Text is encoded with the defaults of the tokenizer, including a special token at the start of every text
    if it adds one. A field of integer lists is taken as token ids, unchanged: use ``text_field="input_ids"`` for the
    output of ``generate_documents``.

    Args:
        path: Path of the file.
        tokenizer: The teacher's tokenizer; None for a field of token ids.
        text_field: Name of the field or column; "text" for ``.txt``.
        max_length: Largest number of tokens, at least 2; longer documents are split into pieces. None keeps them whole.

    Returns:
        An iterator of token id lists, without blank texts and pieces of fewer than 2 tokens, which have no label.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The suffix is not one of the four, the field is missing, a value is neither text nor token ids,
            there is text but no tokenizer, or no document has 2 tokens. The first is raised at once, the others by the
            iterator.
    """
    check_corpus_file(path)
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, a token and its label, got {max_length}")
    return _documents(Path(path), tokenizer, text_field, max_length)


def check_corpus_file(path: str | os.PathLike[str]) -> None:
    """Checks that a file exists and has a suffix that ``read_documents`` reads, before a teacher is loaded for it.

    Raises:
        FileNotFoundError, ValueError: The same as in ``read_documents``.
    """
    _require_file(path, "corpus")
    if Path(path).suffix.lower() not in _LOADERS:
        raise ValueError(f"the corpus file must end in one of {', '.join(_LOADERS)}, got {path}")


def _documents(
    path: Path, tokenizer: PreTrainedTokenizerBase | None, text_field: str, max_length: int | None
) -> Iterator[list[int]]:
    found = False
    values = _values(path, text_field)
    while batch := list(itertools.islice(values, _TEXTS_AT_ONCE)):
        for ids in _encode(batch, tokenizer):
            for piece in [ids] if max_length is None else _split(ids, max_length):
                if len(piece) >= 2:
                    found = True
                    yield piece
    if not found:
        raise ValueError(f"the corpus {path} must hold at least one document of 2 tokens, got none")


def _split(ids: list[int], max_length: int) -> list[list[int]]:
    return [ids[start : start + max_length] for start in range(0, len(ids), max_length)]


def _values(path: Path, text_field: str) -> Iterator[str | list[int]]:
    for number, record in enumerate(_records(path), 1):
        if text_field not in record:
            raise ValueError(
                f"the corpus {path} has no field {text_field!r} in record {number}, only {sorted(record)}: name one "
                "of them as text_field"
            )
        value = record[text_field]
        if not isinstance(value, str) and not (isinstance(value, list) and all(type(item) is int for item in value)):
            raise ValueError(
                f"the field {text_field!r} must be text or a list of token ids, got {type(value).__name__} in record "
                f"{number} of {path}"
            )
        yield value


def _records(path: Path) -> Iterator[dict[str, Any]]:
    # Heavy, and only needed for files.
    import datasets
    from datasets.exceptions import DatasetGenerationError

    loader, options = _LOADERS[path.suffix.lower()]
    try:
        yield from datasets.load_dataset(loader, data_files=str(path), split="train", streaming=True, **options)
    # datasets raises StopIteration for an empty file.
    except StopIteration:
        return
    # The errors of pyarrow are ValueErrors.
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(f"the corpus {path} cannot be read as {path.suffix[1:]}: {error}") from error


def _encode(batch: list[str | list[int]], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[list[int]]:
    encoded: Iterator[list[int]] = iter(())
    if texts := [value for value in batch if isinstance(value, str)]:
        if tokenizer is None:
            raise ValueError("the corpus holds text: give the tokenizer it was captured with")
        encoded = iter(tokenizer(texts)["input_ids"])
    for value in batch:
        if isinstance(value, str):
            ids = next(encoded)
            yield ids if value.strip() else []
        else:
            yield value


def _require_file(path: str | os.PathLike[str], what: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what} file not found: there is no file {path}")


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
