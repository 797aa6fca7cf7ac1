"""``MixedStores``: several stores as one data set, which reads each document from the stores that hold it."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from slimkernels.sparse_logits import SparseLogits
from slimkernels.store.codec import document_hash
from slimkernels.store.dataset import StoreDataset, packed_kind
from slimkernels.store.errors import SettingsMismatchError
from slimkernels.store.identity import is_same_tokenizer, joined_fingerprint
from slimkernels.store.order import DocumentOrder
from slimkernels.store.reader import Document, PackedDocument, Store
from slimkernels.store.shard import tokens_as_int32
from slimkernels.store.shares import ShareOrder, checked_shares

logger = logging.getLogger(__name__)


class MixedStores(Dataset):
    """A map-style dataset of the documents of several stores, such as those of several teachers, each document once.

    A document is read from the store that holds it. Where several do, ``weights`` decide:

    - None: It is read from the first of them in the order of ``stores``, which a warning says.
    - A number for each store: Its rows are mixed by ``SparseLogits.mix``, with the weights of the stores that have a
      row at this position, divided by their sum. All rows of the data set are log-probabilities then, also those that
      one store has, at temperature 1 alone and not packed.

    Args:
        stores: Stores or their directories, with one vocabulary and one tokenizer.
        weights: Weight of each store's teacher, positive.
        shares: Share of the documents of an epoch that come from each store, positive numbers in proportion; None reads
            every document once. A document of several stores is among those of each. ``order`` and ``SlimTrainer``
            follow them.

    Attributes:
        datasets: A ``StoreDataset`` for each store, which decodes the rows unless all stores are packed alike.
        weights: Weights as floats, or None.
        shares: Shares as floats, or None.

    Raises:
        StoreError: A store cannot be opened; ``SettingsMismatchError`` if its vocabulary or tokenizer is not that of
            the first.
        ValueError: There are no stores, or weights or shares are not positive or not as many as the stores.
    """

    def __init__(
        self,
        stores: Sequence[Store | str | os.PathLike[str]],
        *,
        weights: Sequence[float] | None = None,
        shares: Sequence[float] | None = None,
    ) -> None:
        if isinstance(stores, str | os.PathLike | Store) or not stores:
            raise ValueError(f"stores must be a list of at least one store, got {stores!r}")
        opened = [store if isinstance(store, Store) else Store(store) for store in stores]
        check_alike(opened)
        self.weights = None if weights is None else checked_shares(weights, len(opened), "weights")
        self.shares = None if shares is None else checked_shares(shares, len(opened), "shares")
        packed = weights is None and len(set(map(packed_kind, opened))) == 1
        self.datasets = [StoreDataset(store, packed=packed) for store in opened]
        if weights is not None:
            for dataset in self.datasets:
                dataset.temperatures = (1.0,)
        self._index_by_hash: dict[bytes, int] = {}
        indices = [np.fromiter(map(self._index_of, store.hashes()), np.int64, len(store)) for store in opened]
        # The index of every document in every store, (documents, stores), -1 where the store lacks it.
        self._places = np.full((len(self._index_by_hash), len(opened)), -1, np.int64)
        for number, documents in enumerate(indices):
            self._places[documents, number] = np.arange(len(documents))
        num_shared = int(((self._places >= 0).sum(1) > 1).sum())
        if num_shared and weights is None:
            logger.warning(
                "%d of %d documents are in several stores, and are read from the first that holds them: give weights "
                "to mix their rows",
                num_shared,
                len(self),
            )
        if shares is not None:
            self.order()

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.datasets[0].vocab_size

    @property
    def tokenizer_fingerprint(self) -> str:
        """Fingerprint of the tokenizer of the documents; empty where no store knows it."""
        return next(filter(None, (dataset.tokenizer_fingerprint for dataset in self.datasets)), "")

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures of every document's lse."""
        return self.datasets[0].temperatures

    @property
    def has_rest_lse(self) -> bool:
        """Whether the rows of a store have a ``rest_lse``."""
        return any(dataset.store.has_rest_lse for dataset in self.datasets)

    @property
    def rows_fingerprint(self) -> str:
        """A hash of the rows of all stores and of the weights."""
        return joined_fingerprint([dataset.store.rows_fingerprint for dataset in self.datasets], self.weights)

    def order(self, **options: Any) -> DocumentOrder:
        """Returns the sampler of the documents, with the options of ``DocumentOrder``; it follows ``shares``."""
        if self.shares is None:
            return DocumentOrder(len(self), **options)
        stores = [np.flatnonzero(places >= 0) for places in self._places.T]
        return ShareOrder(stores, self.shares, num_documents=len(self), **options)

    def find(self, input_ids: Any) -> int | None:
        """Returns the index of the document with these token ids, or None if no store holds it."""
        return self._index_by_hash.get(document_hash(tokens_as_int32(input_ids, self.vocab_size)))

    def _index_of(self, digest: bytes) -> int:
        """Returns the index of a document by its hash, the next free one for a document that is new."""
        return self._index_by_hash.setdefault(digest, len(self._index_by_hash))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> PackedDocument | Document:
        """Reads one document from the stores that hold it, and checks every byte of it."""
        held = [(number, int(place)) for number, place in enumerate(self._places[index]) if place >= 0]
        if self.weights is None:
            number, place = held[0]
            return self.datasets[number][place]
        documents = [self.datasets[number].store[place] for number, place in held]
        return _mixed(documents, [self.weights[number] for number, _ in held])

    # A store has this name for documents with rows as they are stored.
    packed = __getitem__


def check_alike(stores: Sequence[Store]) -> None:
    """Checks that token ids mean the same in all stores; a tokenizer that is not known passes.

    Raises:
        SettingsMismatchError: Two stores have another vocabulary or tokenizer.
    """
    for one, other in itertools.combinations(stores, 2):
        alike = {
            "vocab_size": one.vocab_size == other.vocab_size,
            "tokenizer_fingerprint": not (one.tokenizer_fingerprint and other.tokenizer_fingerprint)
            or is_same_tokenizer(one.tokenizer_fingerprint, other.tokenizer_fingerprint),
        }
        for name in (name for name, is_alike in alike.items() if not is_alike):
            raise SettingsMismatchError(
                f"stores that are trained on together must have one {name}, got {getattr(one, name)!r} in {one.path} "
                f"and {getattr(other, name)!r} in {other.path}: capture them with one tokenizer"
            )


def _mixed(documents: Sequence[Document], weights: Sequence[float]) -> Document:
    """Returns one document of several with the same tokens, whose rows are mixed at every position that one has."""
    positions = torch.cat([document.positions for document in documents]).unique()
    parts, known = [], []
    for document, weight in zip(documents, weights, strict=True):
        if not len(document.positions):
            continue
        rows = torch.searchsorted(document.positions, positions).clamp(max=len(document.positions) - 1)
        parts.append(document.teacher[rows])
        known.append(weight * (document.positions[rows] == positions).double())
    if not parts:
        parts, known = [documents[0].teacher], [torch.ones(0)]
    # Only their proportions count, so that no sum of them overflows and no division is 0 / 0.
    shares = torch.stack(known)
    shares = shares / shares.amax(0)
    mixed = SparseLogits.mix(parts, list(shares / shares.sum(0)))
    # At least one column, as in a store.
    width = int((mixed.ids >= 0).sum(-1).max()) if len(mixed) else 1
    return Document(
        input_ids=documents[0].input_ids,
        positions=positions,
        teacher=dataclasses.replace(mixed, ids=mixed.ids[:, :width], logits=mixed.logits[:, :width]),
        prompt_length=next((document.prompt_length for document in documents if document.prompt_length), 0),
    )
