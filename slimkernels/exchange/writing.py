"""Turns the rows of any source into SparseLogits, checks their alignment, and writes a store."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from slimkernels import _checks
from slimkernels.sparse_logits import SparseLogits, rest_of_logprobs
from slimkernels.store import Store, StoreWriter
from slimkernels.store.errors import NotAStoreError
from slimkernels.store.identity import is_same_tokenizer

# Placeholders for "no entry" are at or below this value in every format: -999 to -1e9, the lowest float or -inf. No
# float32 softmax reaches so low.
_LEAST_LOGPROB = -999.0
# Rows by which the alignment is judged before anything is written.
_JUDGED_ROWS = 512


class ImportReport(NamedTuple):
    """The result of one import.

    Attributes:
        documents: Documents added to the store.
        rows: Teacher rows of these documents.
        skipped: Documents that were in the store already, or have no teacher row.
        label_share: Share of the added rows whose label is among the kept ids; NaN without rows. A good teacher of
            natural text keeps most labels.
    """

    documents: int
    rows: int
    skipped: int
    label_share: float


class Document(NamedTuple):
    """One document of a source: its location, (T,) token ids, (R,) positions, (R, K) logits, length of its prompt."""

    where: str
    input_ids: np.ndarray
    positions: np.ndarray
    teacher: SparseLogits
    prompt_length: int = 0


class Meaning(NamedTuple):
    """The definition of the numbers of a source.

    Attributes:
        temperature: T in log softmax(logits / T).
        whole_row: Whether the softmax was over the vocabulary; otherwise it was over the kept ids, or is not known.
    """

    temperature: float
    whole_row: bool

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures at which the store keeps the lse."""
        return (1.0, self.temperature) if self.whole_row and self.temperature != 1 else (1.0,)

    def rows(self, ids: np.ndarray, values: np.ndarray, valid: np.ndarray) -> SparseLogits:
        """Converts rows with ids in any order to SparseLogits.

        The logits are T * value, which equals the logits at temperature 1 up to a constant. If the softmax was over the
        vocabulary, the lse at T is 0, and ``rest_lse`` at T is that of the remaining mass. Any other lse is that of the
        kept ids, also for a row whose mass exceeds 1 due to rounding, and any other ``rest_lse`` is not known.

        Args:
            ids: (R, K) integers.
            values: (R, K) log-probabilities.
            valid: (R, K) bool, at least one in every row; the other entries are ignored.

        Returns:
            SparseLogits (R, K) float32 with ids ascending.

        Raises:
            ValueError: A row holds an id twice, or a value is NaN or infinite.
        """
        order = np.argsort(np.where(valid, ids, np.iinfo(np.int64).max), axis=-1, kind="stable")
        order = order[:, : int(valid.sum(-1).max(initial=1))]
        ids, values, valid = (np.take_along_axis(array, order, -1) for array in (ids, values, valid))
        _raise_at((valid & ~np.isfinite(values)).any(-1), "holds a value that is NaN or infinite")
        _raise_at((valid[:, 1:] & (ids[:, 1:] == ids[:, :-1])).any(-1), "holds an id twice")
        logits = np.where(valid, self.temperature * values.astype(np.float64), -np.inf)
        lse = np.stack([np.logaddexp.reduce(logits / t, -1) for t in self.temperatures], -1)
        rest_lse = None
        if self.whole_row:
            lse[:, -1] = np.maximum(lse[:, -1], 0.0)
            rest_lse = torch.full(lse.shape, math.nan)
            rest_lse[:, -1] = rest_of_logprobs(torch.from_numpy(logits / self.temperature))
        return SparseLogits(
            ids=torch.from_numpy(np.where(valid, ids, -1).astype(np.int32)),
            logits=torch.from_numpy(np.where(valid, logits, 0.0).astype(np.float32)),
            lse=torch.from_numpy(lse.astype(np.float32)),
            temperatures=self.temperatures,
            rest_lse=rest_lse,
        )


def document(
    where: str, meaning: Meaning, input_ids: Any, positions: Any, ids: np.ndarray, values: np.ndarray, valid: np.ndarray
) -> Document:
    """Makes a document from the data of a source, without placeholders and the rows that have no other entry.

    A value of at most -999, such as -9999 or -inf, is a placeholder for an entry that is not there.

    Raises:
        ValueError: The same as in ``Meaning.rows``, with the location of the document.
    """
    # The negation keeps NaN, which is an error and no placeholder.
    valid = valid & ~(values <= _LEAST_LOGPROB)
    kept = valid.any(-1)
    try:
        teacher = meaning.rows(ids[kept], values[kept], valid[kept])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Document(where, np.asarray(input_ids), np.asarray(positions, dtype=np.int64)[kept], teacher)


def padded(rows: Sequence[Sequence[float]], dtype: type) -> np.ndarray:
    """Pads ragged rows with 0 to an array (R, K)."""
    array = np.zeros((len(rows), max(map(len, rows), default=0)), dtype)
    for line, row in zip(array, rows, strict=True):
        line[: len(row)] = row
    return array


def write_store(
    documents: Iterable[Document],
    store_path: str | os.PathLike[str],
    *,
    format_name: str,
    tokenizer: Any,
    vocab_size: int | None,
    teacher: str,
    meaning: Meaning,
    codec: str,
    check_alignment: bool,
) -> ImportReport:
    """Writes the documents of a source that does not describe itself.

    Args:
        documents: Documents made by ``document``.
        store_path: New directory, or a store made with the same settings, whose documents are skipped.
        format_name: Name of the source's format.
        tokenizer: A transformers tokenizer.
        vocab_size: V; None for that of the store if it exists and has this tokenizer, else ``len(tokenizer)``.
        teacher: Name of the teacher, or "".
        meaning: Definition of the numbers.
        codec: Codec of the store.
        check_alignment: Whether to check the documents with ``aligned`` first.

    Raises:
        ValueError: A document cannot be stored, or the rows are about other tokens.
        SettingsMismatchError: The store was made with other settings.
    """
    from slimkernels.models.fingerprints import tokenizer_fingerprint

    _checks.as_temperature(meaning.temperature)
    selection = {
        "kind": "imported",
        "format": format_name,
        "normalised_over": "vocabulary" if meaning.whole_row else "kept ids",
        "temperature": meaning.temperature,
    }
    fingerprint = tokenizer_fingerprint(tokenizer)
    settings = {
        "vocab_size": _vocab_size(tokenizer, fingerprint, store_path) if vocab_size is None else vocab_size,
        "tokenizer_fingerprint": fingerprint,
        "teacher": {"name": teacher},
        "selection": selection,
        "temperatures": meaning.temperatures,
        "codec": codec,
    }
    return write_documents(aligned(documents) if check_alignment else documents, store_path, settings)


def _vocab_size(tokenizer: Any, fingerprint: str, store_path: str | os.PathLike[str]) -> int:
    """Returns V, which a padding token that was added to the tokenizer does not change for an existing store."""
    try:
        stored = Store(store_path)
    except NotAStoreError:
        return len(tokenizer)
    return stored.vocab_size if is_same_tokenizer(stored.tokenizer_fingerprint, fingerprint) else len(tokenizer)


def write_documents(
    documents: Iterable[Document], store_path: str | os.PathLike[str], settings: dict[str, Any]
) -> ImportReport:
    """Writes documents into a store of the given settings (the keywords of ``StoreWriter``)."""
    documents = iter(documents)
    # The first document is read before the store is made, so that an unreadable source leaves nothing behind.
    first = next(documents, None)
    if first is None:
        raise ValueError("the source must hold at least one document, got none")
    added = rows = skipped = labels = 0
    with StoreWriter(store_path, **settings) as writer:
        for item in _chain(first, documents):
            try:
                if not len(item.positions) or item.input_ids in writer:
                    skipped += 1
                    continue
                writer.add(item.input_ids, item.positions, item.teacher, prompt_length=item.prompt_length)
            except ValueError as error:
                raise ValueError(f"{item.where}: {error}") from error
            added += 1
            rows += len(item.positions)
            labels += _labels_kept(item, 0)
    return ImportReport(added, rows, skipped, labels / rows if rows else float("nan"))


def aligned(documents: Iterable[Document]) -> Iterator[Document]:
    """Yields the same documents after checking on the first of them that each row is about its own label.

    None of the formats records whether row j is about token j or j + 1, and some do not contain the tokens. But a
    teacher's row keeps its own label much more often than that of a neighbour, and more often than any other label of
    the document.

    Raises:
        ValueError: The rows keep the label before or after their own more than twice as often as their own, or there
            are many rows and they keep their own label no more often than another one.
    """
    documents = iter(documents)
    first: list[Document] = []
    rows = 0
    for item in documents:
        first.append(item)
        rows += len(item.positions)
        if rows >= _JUDGED_ROWS:
            break
    own, before, after = (sum(_labels_kept(item, shift) for item in first) for shift in (0, -1, 1))
    other = sum(_labels_kept(item, len(item.positions) // 2, cyclic=True) for item in first)
    found = None
    # Both thresholds lie beyond what chance produces.
    if max(before, after) > 2 * own + 8:
        found = f"{before} keep the one before it" if before > after else f"{after} keep the one after it"
    elif rows >= _JUDGED_ROWS // 2 and own < min(other + 2 * math.sqrt(rows), 0.95 * rows):
        found = f"{other} keep one from elsewhere in the document"
    if found is not None:
        raise ValueError(
            f"the teacher's rows are about other tokens: of {rows} rows {own} keep their own label, but {found}. The "
            "rows have another alignment, or the token ids are not those that the teacher read; check_alignment=False "
            "imports them anyway"
        )
    yield from first
    yield from documents


def _labels_kept(item: Document, shift: int, cyclic: bool = False) -> int:
    """Counts the rows that keep the token ``shift`` places after their label, or the label ``shift`` rows before."""
    at = np.roll(item.positions, shift) if cyclic else item.positions + shift
    inside = (at >= 0) & (at < len(item.input_ids))
    labels = item.input_ids[at[inside]].astype(np.int64)
    return int((item.teacher.ids.numpy()[inside] == labels[:, None]).any(-1).sum())


def _chain(first: Document, rest: Iterator[Document]) -> Iterator[Document]:
    yield first
    yield from rest


def _raise_at(bad: np.ndarray | np.bool_, what: str) -> None:
    if bad.any():
        raise ValueError(f"teacher row {int(np.flatnonzero(bad)[0])} {what}")
