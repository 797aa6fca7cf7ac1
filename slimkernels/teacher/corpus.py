"""Reads corpora of documents, and the prompts from which a teacher generates its own."""

from __future__ import annotations

import importlib.resources
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from slimkernels.teacher.chat import assistant_tokens, is_conversation, with_system
from slimkernels.text_files import check_characters, read_json_records, read_lines

_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
_PROMPT_FIELDS = ("prompt", "text")
_TEXTS_AT_ONCE = 64


class TokenizedDocument(list[int]):
    """The token ids of a document, with what is known about them; it equals the list of its ids.

    Attributes:
        positions: Ascending positions in [1, T) of the tokens that are labels; None for every token but the first.
        prompt_length: Number of tokens at the beginning that are a prompt; 0 if that is not known.
        teacher_ids: Token ids that the teacher reads in place of the document, such as the document behind a prefix
            that the student does not see; they end in the document's tokens from its first label on. None for the
            document itself.

    Raises:
        ValueError: ``teacher_ids`` end in other tokens, or have none before the first label.
    """

    def __init__(
        self,
        input_ids: Iterable[int],
        *,
        positions: Sequence[int] | None = None,
        prompt_length: int = 0,
        teacher_ids: Iterable[int] | None = None,
    ) -> None:
        super().__init__(input_ids)
        self.positions = None if positions is None else list(positions)
        self.prompt_length = prompt_length
        self.teacher_ids = None if teacher_ids is None else list(teacher_ids)
        if self.teacher_ids == list(self) or not self.labels:
            self.teacher_ids = None
        if self.teacher_ids is not None:
            end = self[self.labels[0] :]
            if len(self.teacher_ids) <= len(end) or self.teacher_ids[-len(end) :] != end:
                raise ValueError(
                    f"teacher_ids must end in the document's {len(end)} tokens from its first label on, after at least "
                    f"one other token, got {len(self.teacher_ids)} that end in {self.teacher_ids[-8:]}: put the prefix "
                    "before the document's tokens"
                )

    @property
    def read_ids(self) -> list[int]:
        """The token ids that the teacher reads."""
        return self if self.teacher_ids is None else self.teacher_ids

    @property
    def shift(self) -> int:
        """The number of places by which a label is further along in ``read_ids`` than in the document."""
        return len(self.read_ids) - len(self)

    @classmethod
    def of(cls, input_ids: Sequence[int]) -> TokenizedDocument:
        """Returns a document as it is, or a list of token ids as one whose labels are every token but the first."""
        return input_ids if isinstance(input_ids, cls) else cls(input_ids)

    @property
    def labels(self) -> list[int]:
        """The positions of the labels."""
        return list(range(1, len(self))) if self.positions is None else self.positions

    def part(self, start: int, stop: int, begin: Sequence[int] = ()) -> TokenizedDocument:
        """Returns the tokens [start, stop) after the tokens ``begin``, with their labels.

        A part after the first of a document with ``teacher_ids`` has none, as the teacher did not read it so.
        """
        positions, shift = self.positions, len(begin) - start
        if positions is not None:
            positions = [p + shift for p in positions if max(start, 1 - shift) <= p < stop]
        prompt_length = 0 if start else min(self.prompt_length, stop)
        teacher_ids = None
        if self.teacher_ids is not None and not start:
            teacher_ids = self.teacher_ids[: len(self.teacher_ids) - max(0, len(self) - stop)]
        return TokenizedDocument(
            [*begin, *self[start:stop]], positions=positions, prompt_length=prompt_length, teacher_ids=teacher_ids
        )


def shipped_prompts() -> list[str]:
    """Returns the short English openings of the package: stories, explanations, letters, dialogues, lists."""
    text = importlib.resources.files("slimkernels").joinpath("data/prompts.txt").read_text(encoding="utf-8")
    return _not_blank(text.split("\n"))


def read_prompts(path: str | os.PathLike[str], *, text_field: str | None = None) -> list[str]:
    """Returns the prompts of a file: the field of each record, or the lines of a text file that are not blank.

    Args:
        path: Path of a ``.jsonl``, ``.json`` or ``.parquet`` file of records, or of a text file with any other suffix.
        text_field: Name of the field or column; None for "prompt", or else "text".

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file has no prompt that is not blank, a record lacks the field or holds something else than
            text there, or the file is not in UTF-8.
    """
    _require_file(path, "prompts")
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES or path.suffix.lower() == ".txt":
        prompts = _not_blank(read_lines(path))
    else:
        fields = _PROMPT_FIELDS if text_field is None else (text_field,)
        prompts = []
        for number, value in enumerate(_values(path, "prompt file", fields), 1):
            if not isinstance(value.content, str):
                raise ValueError(f"a prompt must be text, got a list in record {number} of {path}")
            if value.content.strip():
                prompts.append(value.content)
    if not prompts:
        raise ValueError(f"the prompt file {path} must hold at least one line that is not blank")
    return prompts


def without_end(ids: list[int], end: Any) -> list[int]:
    """Removes an end of text that a tokenizer appends to a prompt, because the prompt continues."""
    return ids[:-1] if ids and ids[-1] == end else ids


def read_documents(
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    text_field: str = "text",
    teacher_prefix_field: str | None = None,
    max_length: int | None = 1024,
    num_documents: int | None = None,
    num_tokens: int | None = None,
) -> Iterator[TokenizedDocument]:
    """Streams the documents of a corpus as token ids.

    ``.jsonl`` and ``.json`` hold an object per line or an array of objects, ``.parquet`` a row per document; only the
    field is read, so that the others may hold anything. In ``.txt`` blank lines end a document. Files are in UTF-8, or
    in UTF-16 with a byte order mark.

    The field decides what a document is:

    - Text is encoded with the defaults of the tokenizer, including a special token at the start of every text if it
      adds one.
    - A list of integers is taken as token ids, unchanged: use ``text_field="input_ids"`` for the output of
      ``generate_documents``. Where the record has its ``prompt`` too, the document knows how long its prompt is.
    - A list of messages (objects with ``role`` and ``content``) is encoded with the tokenizer's chat template. Its
      labels are the tokens of the assistant alone, as with TRL's ``assistant_only_loss``.

    A document of more than ``max_length`` tokens is split. If it begins with the tokenizer's start of text, so does
    each of its pieces.

    ``teacher_prefix_field`` names a field with what the teacher reads before the document and the student does not see,
    such as the solution of its task. The document's tokens and labels stay as they are; ``teacher_ids`` are those that
    the teacher reads:

    - Text, or a list of token ids, is put before text and token ids, encoded on its own as a prompt is, without a
      separator. If both begin with the tokenizer's start of text, the teacher reads that of the prefix alone. Every
      piece of a document that is split is behind the prefix.
    - Text is put into the system message of a conversation, before what that says; without one it becomes the first
      message. Such a conversation is not split.
    - Empty text and an empty list are no prefix: the teacher reads the document alone. A record without the field, or
      with null, is an error.

    Args:
        path: Path of the file.
        tokenizer: The teacher's tokenizer; None for a field of token ids.
        text_field: Name of the field or column; not used for ``.txt``.
        teacher_prefix_field: Name of the field or column with the teacher's prefix; None for no prefix.
        max_length: Largest number of tokens, at least 2; longer documents are split into pieces. None keeps them whole.
        num_documents: Number of documents, or pieces of them, after which to stop; None for all.
        num_tokens: Number of tokens after which to stop, which cuts the last document; at least 2, None for all.

    Returns:
        An iterator of documents, which are lists of token ids, without blank texts and pieces that have no label
        (fewer than 2 tokens, or none of the assistant).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The suffix is not one of the four, a number is out of range, the field is missing, a value is none
            of the three, text holds half of a surrogate pair, there is text but no tokenizer, the file is in another
            encoding, or no document has 2 tokens; or a prefix is missing, is neither text nor token ids, or belongs to
            a conversation that is too long.
            The first two are raised at once, the others by the iterator.
    """
    check_corpus_file(path)
    if teacher_prefix_field is not None and Path(path).suffix.lower() == ".txt":
        raise ValueError(f"teacher_prefix_field must be None for a .txt file, which has no fields, got {path}")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, a token and its label, got {max_length}")
    for name, value, least in (("num_documents", num_documents, 1), ("num_tokens", num_tokens, 2)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    values = _values(Path(path), "corpus", (text_field,), teacher_prefix_field)
    return _capped(_documents(values, Path(path), tokenizer, max_length), num_documents, num_tokens)


def check_corpus_file(path: str | os.PathLike[str]) -> None:
    """Checks that a file exists and has a suffix that ``read_documents`` reads, before a teacher is loaded for it.

    Raises:
        FileNotFoundError, ValueError: The same as in ``read_documents``.
    """
    _require_file(path, "corpus")
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise ValueError(f"the corpus file must end in one of {', '.join(_SUFFIXES)}, got {path}")


class _Value(NamedTuple):
    """The field of a record, the prompt that the record names, or "", and the teacher's prefix, or an empty one."""

    content: str | list[Any]
    prompt: str = ""
    prefix: str | list[int] = ""


def _capped(
    documents: Iterator[TokenizedDocument], num_documents: int | None, num_tokens: int | None
) -> Iterator[TokenizedDocument]:
    left = num_tokens
    for document in itertools.islice(documents, num_documents):
        if left is not None:
            document = document.part(0, left) if left < len(document) else document
            left -= len(document)
        if document.labels:
            yield document
        if left is not None and left < 2:
            return


def _documents(
    values: Iterator[_Value], path: Path, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None
) -> Iterator[TokenizedDocument]:
    found = False
    start = None if tokenizer is None else tokenizer.bos_token_id
    while batch := list(itertools.islice(values, _TEXTS_AT_ONCE)):
        for value, document in zip(batch, _encode(batch, tokenizer, path), strict=True):
            prefix = [] if is_conversation(value.content) else _prefix_ids(value.prefix, tokenizer)
            for piece in [document] if max_length is None else _split(document, max_length, start):
                if piece.labels:
                    found = True
                    yield _behind(prefix, piece, start) if prefix else piece
    if not found:
        raise ValueError(f"the corpus {path} must hold at least one document of 2 tokens, got none")


def _prefix_ids(prefix: str | list[int], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if not isinstance(prefix, str):
        return prefix
    if not prefix:
        return []
    if tokenizer is None:
        raise ValueError("the teacher's prefix is text: give the tokenizer it was captured with")
    return without_end(list(tokenizer(prefix)["input_ids"]), tokenizer.eos_token_id)


def _behind(prefix: list[int], document: TokenizedDocument, start: Any) -> TokenizedDocument:
    """Returns a document that the teacher reads behind a prefix, with one start of text in all."""
    has_two = start is not None and prefix[0] == document[0] == start
    return TokenizedDocument(
        document,
        positions=document.positions,
        prompt_length=document.prompt_length,
        teacher_ids=[*prefix, *document[1 if has_two else 0 :]],
    )


def _split(document: TokenizedDocument, max_length: int, start: Any) -> Iterator[TokenizedDocument]:
    """Splits a document; each piece begins with the start of text if the document does.

    Raises:
        ValueError: The document is too long, and is a conversation that the teacher reads with another system message.
    """
    if document.teacher_ids is not None and len(document) > max_length:
        raise ValueError(
            f"a conversation with a teacher's prefix must have at most max_length={max_length} tokens, because its "
            f"pieces would lack the prefix, got {len(document)}: raise max_length or shorten it"
        )
    begin = [] if start is None or document[:1] != [start] else [start]
    yield document.part(0, max_length)
    step = max_length - len(begin)
    for first in range(max_length, len(document), step):
        yield document.part(first, min(first + step, len(document)), begin)


def _values(path: Path, what: str, fields: Sequence[str], prefix_field: str | None = None) -> Iterator[_Value]:
    """Yields the first of the fields that each record has, and the prefix where its field is named."""
    for number, record in enumerate(_records(path, what, fields, prefix_field), 1):
        name = next((name for name in fields if name in record), None)
        if name is None:
            raise ValueError(
                f"the {what} {path} has no field {' or '.join(map(repr, fields))} in record {number}, only "
                f"{sorted(record)}: name one of them as text_field"
            )
        value = record[name]
        if not isinstance(value, str) and not _is_token_ids(value) and not is_conversation(value):
            raise ValueError(
                f"the field {name!r} must be text, a list of token ids or a list of messages, got "
                f"{type(value).__name__} in record {number} of {path}"
            )
        if not _is_token_ids(value):
            check_characters(value, f"the field {name!r} in record {number} of {path}")
        prompt = record.get("prompt")
        prefix: Any = "" if prefix_field is None else record.get(prefix_field)
        if not isinstance(prefix, str) and not _is_token_ids(prefix):
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
        yield _Value(value, prompt if isinstance(prompt, str) else "", prefix)


def _is_token_ids(value: Any) -> bool:
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
            for batch in file.iter_batches(_TEXTS_AT_ONCE, columns=columns):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"the {what} {path} cannot be read as parquet: {error}") from error


def _paragraphs(path: Path) -> Iterator[str]:
    """Yields the runs of lines of a text file between blank ones."""
    for is_text, lines in itertools.groupby(read_lines(path), key=lambda line: bool(line.strip())):
        if is_text:
            yield "\n".join(lines)


def _encode(batch: list[_Value], tokenizer: PreTrainedTokenizerBase | None, path: Path) -> Iterator[TokenizedDocument]:
    encoded: Iterator[list[int]] = iter(())
    if tokenizer is None and not all(_is_token_ids(value.content) for value in batch):
        raise ValueError("the corpus holds text: give the tokenizer it was captured with")
    if tokenizer is not None and (texts := [value.content for value in batch if isinstance(value.content, str)]):
        encoded = iter(tokenizer(texts)["input_ids"])
    for content, prompt, prefix in batch:
        if isinstance(content, str):
            ids = next(encoded)
            yield TokenizedDocument(ids if content.strip() else [])
        elif tokenizer is not None and is_conversation(content):
            try:
                ids, positions = assistant_tokens(tokenizer, content)
                teacher_ids = None
                if isinstance(prefix, str) and prefix:
                    teacher_ids, _ = assistant_tokens(tokenizer, with_system(content, prefix))
                document = TokenizedDocument(ids, positions=positions, teacher_ids=teacher_ids)
            except ValueError as error:
                raise ValueError(f"the corpus {path}: {error}") from error
            yield document
        else:
            yield TokenizedDocument(content, prompt_length=_prompt_length(content, prompt, tokenizer))


def _prompt_length(ids: list[int], prompt: str, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Returns the number of tokens of the prompt with which token ids begin, or 0 if they begin with another text."""
    if tokenizer is None or not prompt:
        return 0
    begin = without_end(list(tokenizer(prompt)["input_ids"]), tokenizer.eos_token_id)
    return len(begin) if ids[: len(begin)] == begin else 0


def _require_file(path: str | os.PathLike[str], what: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what} file not found: there is no file {path}")


def _not_blank(lines: Iterable[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip()]
