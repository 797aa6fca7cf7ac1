"""``Store``: reads the documents of a store; each is checked and decoded on access."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.packed_logits import PackedHidden, PackedLogits
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store.codec import (
    document_hash,
    require_little_endian,
)
from slimkernels.store.errors import (
    SettingsMismatchError,
)
from slimkernels.store.format import StoreSettings, shard_layout
from slimkernels.store.head import StoredHead
from slimkernels.store.identity import is_same_tokenizer, prompts_fingerprint, rows_fingerprint, store_fingerprint
from slimkernels.store.manifest import load_manifest, load_shards
from slimkernels.store.prompts import prompts_name
from slimkernels.store.shard import TENSOR_DTYPES, Shard, open_shard, tokens_as_int32

# Each mapped shard holds a file descriptor; systems commonly allow 1024.
_MAX_MAPPED = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A sequence of tokens and the teacher's logits for some of them.

    Attributes:
        input_ids: (T,) int64.
        positions: (R,) int64, ascending in [1, T). Row r of ``teacher`` predicts ``input_ids[positions[r]]``.
        teacher: SparseLogits (R, K): ids int32, logits, lse, target_logit and rest_lse float32. K is the number of
            entries of the largest row (at least 1); smaller rows are padded with id -1 and logit 0, and so is the
            whole row where the teacher's distribution over these ids is not known at all. ``rest_lse`` is
            NaN in rows that were stored without it, and None if the store has it for no row. Those of a store of
            hidden states are ``linear_topk_logits`` of them and of the teacher's head.
        prompt_length: Number of tokens at the beginning that are a prompt; 0 where the store does not know.
    """

    input_ids: Tensor
    positions: Tensor
    teacher: SparseLogits
    prompt_length: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class PackedDocument:
    """A document with undecoded rows, R of PackedLogits or PackedHidden, for :func:`slimkernels.decode_logits`."""

    input_ids: Tensor
    positions: Tensor
    teacher: PackedLogits | PackedHidden
    prompt_length: int = 0


def _with_rows(
    settings: StoreSettings, top_k: int | None, top_fraction: float | None, temperatures: Sequence[float] | None
) -> StoreSettings:
    """Returns the settings of a store of hidden states whose readers make other rows."""
    if settings.hidden is None:
        raise ValueError(
            "top_k, top_fraction and temperatures must be None for a store of logits, whose rows are fixed, got "
            f"{top_k}, {top_fraction} and {temperatures}"
        )
    hidden = settings.hidden
    if (top_k, top_fraction) != (None, None):
        hidden = dataclasses.replace(hidden, top_k=_checks.resolve_top_k(top_k, top_fraction, settings.vocab_size))
    resolved = settings.temperatures if temperatures is None else _checks.resolve_temperatures(temperatures)
    return dataclasses.replace(settings, hidden=hidden, temperatures=resolved)


class Store(Sequence[Document]):
    """The documents of a store, in the order they were added; a map-style dataset for data loaders.

    Opening reads the manifest and compares every shard's size and header with it. A document is decoded on access, and
    every byte of it is checked then, so a damaged one raises and is never returned. Shards are memory-mapped; instances
    can be pickled, forked and shared by threads.

    A store of parts, which several ranks have captured, is read as one store, one part after the other. ``num_parts``
    is their number, or None for a store without parts.

    Args:
        path: Directory of the store.
        vocab_size: V expected by the caller, or None for any.
        tokenizer_fingerprint: Tokenizer expected by the caller, or None for any.
        top_k: K of the rows that are made of stored hidden states; None, with ``top_fraction``, for the K of the store.
        top_fraction: K as a share of the vocabulary.
        temperatures: Temperatures of the log-sum-exp of these rows, 1.0 the first; None for those of the store.

    Raises:
        ValueError: ``top_k``, ``top_fraction`` or ``temperatures`` is out of range, or given for a store of logits.
        NotAStoreError: There is no manifest.
        SettingsMismatchError: The store is for another vocabulary or tokenizer.
        StoreError: The store is damaged; the subclass says how.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int | None = None,
        tokenizer_fingerprint: str | None = None,
        top_k: int | None = None,
        top_fraction: float | None = None,
        temperatures: Sequence[float] | None = None,
    ) -> None:
        require_little_endian()
        self.path = Path(path)
        self._manifest = load_manifest(self.path)[1]
        self.settings, self.num_parts, self.shards = load_shards(self.path, self._manifest)
        if (top_k, top_fraction, temperatures) != (None, None, None):
            self.settings = _with_rows(self.settings, top_k, top_fraction, temperatures)
        asked: dict[str, tuple[Any, Callable[[Any, Any], bool]]] = {
            "vocab_size": (vocab_size, operator.eq),
            "tokenizer_fingerprint": (tokenizer_fingerprint, is_same_tokenizer),
        }
        for name, (expected, is_same) in asked.items():
            stored = getattr(self.settings, name)
            if expected is not None and not is_same(stored, expected):
                raise SettingsMismatchError(
                    f"{self.path} was captured with {name}={stored!r}, but {name}={expected!r} is expected: "
                    "capture the teacher again with this tokenizer, or use the student that belongs to the store"
                )
        for entry in self.shards:
            open_shard(self.path, entry, shard_layout(self.settings, entry)).close()
        self._first_documents = np.cumsum([0, *(entry.documents for entry in self.shards)])
        self._mapped: dict[int, Shard] = {}
        self._index_by_hash: dict[bytes, int] | None = None

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json."""
        return self._manifest

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.settings.vocab_size

    @property
    def tokenizer_fingerprint(self) -> str:
        """Fingerprint of the tokenizer of the documents."""
        return self.settings.tokenizer_fingerprint

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures of every document's lse."""
        return self.settings.temperatures

    @property
    def fingerprint(self) -> str:
        """A hash of the documents, rows, lengths of prompts and settings, which does not depend on names and places."""
        return store_fingerprint(self.rows_fingerprint, self.prompts_fingerprint)

    @property
    def rows_fingerprint(self) -> str:
        """The part of ``fingerprint`` that does not depend on the lengths of prompts; one of version 0.1.0."""
        return rows_fingerprint(self.settings, self.shards)

    @property
    def prompts_fingerprint(self) -> str | None:
        """The part of ``fingerprint`` that only the lengths of prompts decide; None where no length is known."""
        return prompts_fingerprint(self._prompt_lengths(number) for number in range(len(self.shards)))

    @property
    def has_rest_lse(self) -> bool:
        """Whether the rows of all documents have a ``rest_lse``, which is NaN where it is not known."""
        return self.settings.hidden is not None or any(entry.rest_lse for entry in self.shards)

    def longest_document(self) -> int:
        """Returns the number of tokens of the longest document, from 8 bytes of the index for each document."""
        longest = 0
        for entry in self.shards:
            layout = shard_layout(self.settings, entry)
            spec = next(spec for spec in layout.tensors if spec.name == "document_token_offsets")
            with open_shard(self.path, entry, layout) as file:
                file.seek(spec.start)
                offsets = np.frombuffer(file.read(spec.stop - spec.start), TENSOR_DTYPES[spec.dtype])
            longest = max(longest, int(np.diff(offsets).max(initial=0)))
        return longest

    @property
    def head(self) -> StoredHead | None:
        """The teacher's head of a store of hidden states; None for one of logits."""
        hidden = self.settings.hidden
        return None if hidden is None else StoredHead.of(hidden, self.vocab_size, self.path)

    @property
    def num_rows(self) -> int:
        """The number of teacher rows of all documents."""
        return sum(entry.rows for entry in self.shards)

    def __len__(self) -> int:
        return int(self._first_documents[-1])

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...

    def __getitem__(self, index):
        """Decodes one document, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._document(index, Document, Shard.teacher)

    def packed(self, index: int) -> PackedDocument:
        """Returns one document, checked, with its rows still packed, to be copied to a GPU and decoded there."""
        return self._document(index, PackedDocument, Shard.packed)

    def _document(self, index: int, kind: Callable[..., Any], teacher: Callable[..., Any]):
        index, shard, local = self._locate(index)
        input_ids = shard.tokens(local, index)
        start, stop = shard.rows_of(local)
        return kind(
            input_ids=torch.from_numpy(input_ids.astype(np.int64)),
            positions=torch.from_numpy(shard.arrays["positions"][start:stop].astype(np.int64)),
            teacher=teacher(shard, start, stop, index),
            prompt_length=int(shard.arrays["prompt_lengths"][local]),
        )

    def row(self, index: int, position: int) -> SparseLogits:
        """Decodes the single row of document ``index`` that predicts its token ``position``, shape (1, K).

        Raises:
            KeyError: The teacher has no row at this position.
        """
        index, shard, local = self._locate(index)
        start, stop = shard.rows_of(local)
        at = start + int(np.searchsorted(shard.arrays["positions"][start:stop], position))
        if at == stop or shard.arrays["positions"][at] != position:
            raise KeyError(f"document {index} has no row at position {position}")
        return shard.teacher(at, at + 1, index)

    def hashes(self) -> Iterator[bytes]:
        """Yields the hash of the tokens of every document, in order."""
        for number in range(len(self.shards)):
            yield from self.shard(number).hashes()

    def find(self, input_ids: Any) -> int | None:
        """Returns the index of the document with these token ids, or None if it is not in the store."""
        if self._index_by_hash is None:
            self._index_by_hash = {digest: index for index, digest in enumerate(self.hashes())}
        return self._index_by_hash.get(document_hash(tokens_as_int32(input_ids, self.vocab_size)))

    def __contains__(self, input_ids: object) -> bool:
        """Returns whether a document with these token ids is stored."""
        return self.find(input_ids) is not None

    def _prompt_lengths(self, number: int) -> np.ndarray:
        """Returns the (D,) lengths of a shard's prompts; one without any is not mapped for that."""
        entry = self.shards[number]
        if not (self.path / prompts_name(entry.file)).exists():
            return np.zeros(entry.documents, np.int32)
        return self.shard(number).arrays["prompt_lengths"]

    def shard(self, number: int) -> Shard:
        """Returns one shard, mapped and with its index checked."""
        shard = self._mapped.pop(number, None)
        if shard is None:
            shard = Shard(self.path, self.settings, self.shards[number], has_rest_lse=self.has_rest_lse)
        # Reinserted last, so that the first is the least recently used one.
        self._mapped[number] = shard
        if len(self._mapped) > _MAX_MAPPED:
            self._mapped.pop(next(iter(self._mapped)), None)
        return shard

    def _locate(self, index: int) -> tuple[int, Shard, int]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} is out of range: the store holds {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self._first_documents, index, side="right")) - 1
        return index, self.shard(number), index - int(self._first_documents[number])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}: {len(self)} documents, {self.num_rows} rows, V={self.vocab_size})"
