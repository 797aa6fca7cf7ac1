"""``capture_logits``: streams logits that were computed elsewhere, in arrays or files, into a store."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimkernels.models.sparse_targets import CHUNK_ROWS
from slimkernels.ops.topk_logits import topk_logits
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import StoreWriter
from slimkernels.teacher.added_documents import AddedDocuments, CaptureReport
from slimkernels.teacher.corpus import TokenizedDocument
from slimkernels.teacher.selection import Selection, resolve_selection
from slimkernels.teacher.vocabulary import CapturedVocabulary, captured_vocabulary


class _Rows(NamedTuple):
    """The logits of one document, which ``read(start, stop)`` reads."""

    count: int
    vocab_size: int
    read: Callable[[int, int], Any]


def capture_logits(
    logits: str | os.PathLike[str] | np.ndarray | Tensor | Iterable[np.ndarray | Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    documents: Iterable[Sequence[int]],
    store_path: str | os.PathLike[str],
    *,
    name: str,
    top_k: int | None = None,
    top_fraction: float | None = None,
    temperatures: Sequence[float] = (1.0,),
    codec: str = "affine8",
    shard_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CaptureReport:
    """Adds documents to a store, with the kept logits of every token but the first.

    Equivalent to, for document i of T tokens and its logits (T, V), whose row t predicts token t + 1::

        writer.add(ids, torch.arange(1, T), topk_logits(logits[i][:-1], top_k, top_fraction, target=ids[1:]))

    The last row of a document, which predicts the token after its end, may be missing. Files are read a few hundred
    rows at a time. Documents that are in the store are skipped and their logits not read, so the same call continues
    after a kill. Log-probabilities are valid logits.

    Args:
        logits: A ``.npy`` or ``.safetensors`` file, an array, or an iterable of arrays, of float32, bfloat16, float16
            or float64. The shape decides the meaning:

            - (N, V): the rows of all documents, one document after the other, with N = sum(T) or sum(T - 1).
            - (B, T, V): the documents of a batch, padded at the end.
            - an array (T or T - 1, V) per document. In a ``.safetensors`` file, the tensors are named by the
              number of the document: "0", "1", ..., or with a common prefix, as in "logits.0".
        tokenizer: The teacher's tokenizer; its fingerprint goes into the store. Columns beyond its ids pad the head
            and are not read. With None the store has no fingerprint, and every column counts.
        documents: Token id lists, in the order of the logits, each of at least 2 tokens.
        store_path: New directory, or a store made with the same settings.
        name: Name of the teacher, kept in the store.
        top_k: K, the number of entries to keep of every row.
        top_fraction: K as a share of the vocabulary; 0.05 if neither this nor ``top_k`` is given.
        temperatures: Temperatures at which the log-sum-exp of the whole row is kept; 1.0 is always the first.
        codec: Codec of the store: "affine8", "affine6", "bfloat16" or "float32".
        shard_rows: Rows at which a shard is full, the same as in ``StoreWriter``.
        progress: Called as progress(documents, tokens) after each document, with the totals so far, skipped documents
            included.

    Returns:
        CaptureReport.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is of another kind, the logits have another shape or dtype or do not match the documents,
            or a token id is outside the vocabulary.
        FloatingPointError: A row's logits are not finite.
        SettingsMismatchError: The store was made with another teacher, tokenizer, selection or codec.
    """
    ids_of = [TokenizedDocument.of(ids) for ids in documents]
    _check_documents(ids_of)
    rows_of = _open(logits, [len(ids) for ids in ids_of])
    first = next(rows_of, None)
    if first is None:
        raise ValueError("logits must hold the logits of at least one document, got none")
    vocabulary = captured_vocabulary(tokenizer, first.vocab_size, store_path, "the logits have")
    selection = resolve_selection(
        "top_k", vocabulary.size, temperatures=temperatures, top_k=top_k, top_fraction=top_fraction
    )
    with StoreWriter(
        store_path,
        vocab_size=vocabulary.size,
        tokenizer_fingerprint=vocabulary.fingerprint,
        teacher={"name": name},
        selection=selection.description,
        temperatures=selection.temperatures,
        codec=codec,
        shard_rows=shard_rows,
    ) as writer:
        added, number = AddedDocuments(writer, progress), -1
        for number, rows in enumerate(itertools.chain([first], rows_of)):
            if number >= len(ids_of):
                raise ValueError(f"logits must have one array per document, got more than the {len(ids_of)} documents")
            ids = ids_of[number]
            _check_rows(rows, ids, first.vocab_size, number)
            vocabulary.check(ids, number)
            added.add(
                ids, None if writer.has(ids, ids.teacher_ids) else _select(rows, ids, vocabulary, selection, number)
            )
            added.show_progress()
        if number + 1 < len(ids_of):
            raise ValueError(f"logits must have one array per document, got {number + 1} for {len(ids_of)}")
    return added.report()


def _select(
    rows: _Rows, ids: TokenizedDocument, vocabulary: CapturedVocabulary, selection: Selection, number: int
) -> SparseLogits:
    """Returns the kept logits of the labels of a document."""
    parts = []
    for start in range(0, len(ids) - 1, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, len(ids) - 1)
        chunk = _as_tensor(rows.read(start, stop))[:, : vocabulary.size]
        label = torch.tensor(ids[start + 1 : stop + 1])
        part = topk_logits(chunk, selection.top_k, target=label, temperatures=selection.temperatures)
        if not torch.isfinite(part.lse).all():
            raise FloatingPointError(f"the logits of document {number} are not finite in rows {start} to {stop - 1}")
        parts.append(part)
    return SparseLogits.cat(parts)[torch.tensor(ids.labels, dtype=torch.int64) - 1]


def _as_tensor(chunk: Any) -> Tensor:
    # Copies the rows, because torch warns about arrays that are not writable, such as mapped ones.
    return chunk if isinstance(chunk, Tensor) else torch.from_numpy(np.array(chunk))


def _check_documents(ids_of: list[TokenizedDocument]) -> None:
    if not ids_of:
        raise ValueError("documents must hold at least one document, got none")
    short = next((number for number, ids in enumerate(ids_of) if len(ids) < 2), None)
    if short is not None:
        raise ValueError(f"every document must have at least 2 tokens, got {len(ids_of[short])} in document {short}")


def _check_rows(rows: _Rows, ids: list[int], vocab_size: int, number: int) -> None:
    if rows.vocab_size != vocab_size:
        raise ValueError(f"document {number} has logits of {rows.vocab_size} columns, the first {vocab_size}")
    if rows.count not in (len(ids) - 1, len(ids)):
        raise ValueError(
            f"document {number} has {len(ids)} tokens, so {len(ids)} or {len(ids) - 1} rows of logits are expected, "
            f"got {rows.count}: give the documents as the teacher read them"
        )


def _open(logits: Any, lengths: list[int]) -> Iterator[_Rows]:
    """Returns the logits of each document; raises at once for a file or an array that cannot hold them."""
    if isinstance(logits, (str, os.PathLike)):
        path = Path(logits)
        if not path.is_file():
            raise FileNotFoundError(f"logits not found: there is no file {path}")
        if path.suffix == ".npy":
            return _split(_load_numpy(path), lengths)
        if path.suffix == ".safetensors":
            return _open_safetensors(path, lengths)
        raise ValueError(f"logits must be a .npy or a .safetensors file, got {path}")
    if isinstance(logits, (np.ndarray, Tensor)):
        return _split(logits, lengths)
    return map(_one, logits)


def _load_numpy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a .npy file: {error}") from error


def _open_safetensors(path: Path, lengths: list[int]) -> Iterator[_Rows]:
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a .safetensors file: {error}") from error
    names = list(file.keys())
    if len(names) == 1 and not names[0][-1:].isdecimal():
        return _split(_Slice(file, names[0]), lengths)
    stem = names[0].rstrip("0123456789") if names else ""
    numbered = {name.removeprefix(stem): name for name in names}
    wanted = [str(number) for number in range(len(names))]
    if set(numbered) != set(wanted):
        raise ValueError(
            f"the tensors of {path} must be one (N, V) or (B, T, V), or one per document named by its number from 0, "
            f"as in logits.0, logits.1; got {sorted(names)[:5]}"
        )
    return (_one(_Slice(file, numbered[number])) for number in wanted)


class _Slice:
    """A tensor of a safetensors file, of which only indexed parts are read."""

    def __init__(self, file: Any, name: str) -> None:
        self._slice = file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())
        self.ndim = len(self.shape)
        # An empty slice gives the dtype without reading the tensor.
        self.dtype = self._slice[tuple(slice(0, 0) for _ in self.shape)].dtype

    def __getitem__(self, index: Any) -> Tensor:
        return self._slice[index]


def _one(array: Any) -> _Rows:
    _check_array(array, (2,))
    return _Rows(array.shape[0], array.shape[1], lambda start, stop: array[start:stop])


def _split(array: Any, lengths: list[int]) -> Iterator[_Rows]:
    """Splits one array, flat or padded, into the logits of documents."""
    _check_array(array, (2, 3))
    if array.ndim == 3:
        if array.shape[0] != len(lengths) or array.shape[1] < max(lengths) - 1:
            raise ValueError(
                f"logits must have shape (B, T, V) for {len(lengths)} documents of up to {max(lengths)} tokens, got "
                f"{tuple(array.shape)}"
            )
        return (_padded(array, number, length) for number, length in enumerate(lengths))
    total = array.shape[0]
    for missing in (0, 1):
        counts = [length - missing for length in lengths]
        if sum(counts) == total:
            ends = itertools.accumulate(counts)
            return (_part(array, end - count, count) for end, count in zip(ends, counts, strict=True))
    raise ValueError(
        f"logits must have {sum(lengths)} or {sum(lengths) - len(lengths)} rows for {len(lengths)} documents of "
        f"{sum(lengths)} tokens, got shape {tuple(array.shape)}: give the documents as the teacher read them"
    )


def _padded(array: Any, number: int, length: int) -> _Rows:
    return _Rows(min(length, array.shape[1]), array.shape[2], lambda start, stop: array[number, start:stop])


def _part(array: Any, first: int, count: int) -> _Rows:
    return _Rows(count, array.shape[1], lambda start, stop: array[first + start : first + stop])


def _check_array(array: Any, dimensions: tuple[int, ...]) -> None:
    dtype = str(array.dtype).removeprefix("torch.")
    if array.ndim not in dimensions or dtype not in ("float32", "bfloat16", "float16", "float64"):
        shapes = " or ".join({2: "(N, V)", 3: "(B, T, V)"}[count] for count in dimensions)
        raise ValueError(
            f"logits must have shape {shapes} and dtype float32, bfloat16, float16 or float64, got "
            f"{tuple(array.shape)} {dtype}"
        )
