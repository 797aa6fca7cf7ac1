"""``ShareOrder``: an order of the documents of several stores in which each store has a fixed share of every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slimkernels import _checks
from slimkernels.store.order import DocumentOrder


class ShareOrder(DocumentOrder):
    """A ``DocumentOrder`` in which a fixed share of the documents of every epoch comes from each store.

    Equivalent to, for the documents of a store and its part of each epoch::

        passes = concatenate([permutation(seed, store, number) for number in range(infinity)])
        part = passes[epoch * count : (epoch + 1) * count]

    So a store continues in every epoch where it stopped in the one before, and reads all of its documents before it
    reads one of them again. An epoch has as many documents as there are in all stores together; those of
    the stores are in random places of it. Everything depends on (seed, epoch) alone, so the order is split by rank,
    resumed and repeated as that of ``DocumentOrder`` is.

    Args:
        stores: Documents of each store, (D,) indices in [0, ``num_documents``); two stores may share some.
        shares: A positive number for each store; an epoch's documents are in these proportions, to one document.
        num_documents: Number of documents of all stores together.
        **options: ``shuffle``, ``seed``, ``rank``, ``world_size`` and ``even`` of ``DocumentOrder``. Without
            ``shuffle`` a store is read in stored order, and the documents of the stores are spread evenly.

    Attributes:
        counts: Number of documents of each store in an epoch.

    Raises:
        ValueError: The shares are not positive or not as many as the stores, or a store has no document in an epoch.

    >>> order = ShareOrder([[0, 1, 2], [3]], [1, 1], num_documents=4, shuffle=False, rank=0, world_size=1)
    >>> list(order), order.set_epoch(1), list(order)
    ([0, 3, 1, 3], None, [2, 3, 0, 3])
    """

    def __init__(
        self,
        stores: Sequence[Sequence[int] | np.ndarray],
        shares: Sequence[float],
        *,
        num_documents: int,
        **options: Any,
    ) -> None:
        super().__init__(num_documents, **options)
        self.shares = checked_shares(shares, len(stores), "shares")
        self._stores = [np.asarray(documents, np.int64) for documents in stores]
        self.counts = _counts(num_documents, self.shares)
        for number, (documents, count) in enumerate(zip(self._stores, self.counts, strict=True)):
            if not len(documents) or not count:
                raise ValueError(
                    f"shares must give each store a document of the {num_documents} of an epoch, got {self.shares} and "
                    f"store {number} with {len(documents)} documents, {count} of them in an epoch: leave it out, or "
                    "give it a larger share"
                )

    def permutation(self, epoch: int) -> np.ndarray:
        """Returns the documents of all ranks in an epoch, (num_documents,) int64, some of them more than once."""
        numbers = np.repeat(np.arange(len(self.counts)), self.counts)
        # Each store's documents lie at the centres of equal parts of the epoch.
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        store_of = numbers[places.argsort(kind="stable")]
        if self.shuffle:
            store_of = store_of[super().permutation(epoch)]
        order = np.empty(self.num_documents, np.int64)
        for number, count in enumerate(self.counts):
            order[store_of == number] = self._part(number, epoch * count, count)
        return order

    def _part(self, number: int, start: int, count: int) -> np.ndarray:
        """Returns ``count`` documents of a store from ``start`` on, counted over all passes through it."""
        size = len(self._stores[number])
        first, last = start // size, (start + count - 1) // size
        passes = np.concatenate([self._pass(number, index) for index in range(first, last + 1)])
        return passes[start - first * size :][:count]

    def _pass(self, number: int, index: int) -> np.ndarray:
        documents = self._stores[number]
        if not self.shuffle:
            return documents
        # The counter keeps the numbers of the stores apart from each other and from those of the epoch.
        noise = np.random.Philox(counter=[0, 0, 0, number + 1], key=[self.seed, index]).random_raw(len(documents))
        return documents[noise.argsort(kind="stable")]

    def _identity(self) -> dict[str, Any]:
        sizes = [len(documents) for documents in self._stores]
        return {**super()._identity(), "shares": self.shares, "store_sizes": sizes}


def checked_shares(values: Sequence[float], number: int, name: str) -> list[float]:
    """Checks that there is a positive, finite number for each of the stores, and returns them as floats."""
    if len(values) != number:
        raise ValueError(f"{name} must be as many as the stores, {number}, got {len(values)}")
    return [_checks.as_positive(value, name) for value in values]


def _counts(num_documents: int, shares: Sequence[float]) -> list[int]:
    """Divides documents in proportion to the shares; the largest remainders get one more."""
    # Relative to the largest one, so that no sum of them overflows.
    relative = [share / max(shares) for share in shares]
    exact = [num_documents * share / sum(relative) for share in relative]
    counts = [int(count) for count in exact]
    by_remainder = sorted(range(len(shares)), key=lambda number: counts[number] - exact[number])
    for number in by_remainder[: num_documents - sum(counts)]:
        counts[number] += 1
    return counts
