"""Where documents come from: your files, read by ``datasets``, and the prompts from which a teacher writes its own."""

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
    """The short English openings that come with the package: stories, explanations, letters, dialogues, lists."""
    return _lines(importlib.resources.files("slimkernels").joinpath("data/prompts.txt").read_text(encoding="utf-8"))


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Every line is blank.
    """
    _require_file(path, "prompts")
    prompts = _lines(Path(path).read_text(encoding="utf-8"))
    if not prompts:
        raise ValueError(f"the prompt file {path} must hold at least one line that is not blank")
    return prompts


def read_documents(
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    text_field: str = "text",
    max_length: int | None = 1024,
) -> Iterator[list[int]]:
    """Reads a corpus as token ids, one document after the other; the file is streamed, never held whole.

    ``.jsonl`` and ``.json`` hold an object per line, ``.parquet`` a row per document; in ``.txt`` a blank line ends a
    document. Text is encoded as the tokenizer does by default (a tokenizer that starts every text with a special
    token does so here). A field of integer lists is taken as token ids, unchanged: read what
    ``generate_documents`` wrote with ``text_field="input_ids"``.

    Args:
        path: The file.
        tokenizer: The teacher's; None for a field of token ids.
        text_field: The name of the field or column; "text" for ``.txt``.
        max_length: Longer documents are split into pieces of this many tokens, at least 2; None keeps them whole.

    Returns:
        An iterator of token id lists. Blank texts, and pieces of less than 2 tokens, are left out: they have no
        label.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The ending is not one of the four, the field is missing, a value is neither text nor token ids,
            text without a tokenizer, or no document has 2 tokens. The first is raised at once, the others when the
            iterator gets there.
    """
    check_corpus_file(path)
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, a token and its label, got {max_length}")
    return _documents(Path(path), tokenizer, text_field, max_length)


def check_corpus_file(path: str | os.PathLike[str]) -> None:
    """Checks that ``read_documents`` will find a file of a kind it reads, before a teacher is loaded for it.

    Raises:
        FileNotFoundError, ValueError: As ``read_documents``.
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
    import datasets
    from datasets.exceptions import DatasetGenerationError

    loader, options = _LOADERS[path.suffix.lower()]
    try:
        yield from datasets.load_dataset(loader, data_files=str(path), split="train", streaming=True, **options)
    except StopIteration:  # What datasets raises for an empty file.
        return
    # pyarrow's errors are ValueErrors.
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
