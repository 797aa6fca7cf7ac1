"""The distribution of the teacher's entropy over the rows and the documents of a store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from slimkernels.store.reader import Store

_QUANTILES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1.0}


def document_entropies(store: Store) -> np.ndarray:
    """Returns the teacher's mean entropy in each document, (D,) float64 nats, as in ``stats``; NaN without a row."""
    return np.array([rows.mean() if len(rows) else np.nan for rows in _entropies(store)], dtype=np.float64)


def stats(path: str | os.PathLike[str], *, num_bins: int = 10) -> dict[str, Any]:
    """Returns the distribution of the teacher's entropy in a store, from its rows alone.

    The entropy of a row, in nats, is that of its kept ids and one outcome for all others, at temperature 1:
    -sum(q log q) with q of ``sparse_softmax(rest="ghost")``. It is at most that of the teacher's whole row, and that of
    the draws in a store of draws.

    Args:
        path: Directory of the store.
        num_bins: Number of bins of the histograms.

    Returns:
        A dict that JSON can hold: ``documents`` and ``rows``, and under ``token_entropy`` and ``document_entropy`` (the
        means of the documents that have rows) the ``mean``, the ``quantiles`` by name, and a ``histogram`` with its
        ``edges`` (num_bins + 1), from 0 to the largest number (1 where that is 0), and
        ``counts``. Without rows, these two are None.

    Raises:
        StoreError: The store cannot be opened, or a row is damaged.
        ValueError: ``num_bins`` is not positive.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    store = Store(path)
    rows = [entropies for entropies in _entropies(store) if len(entropies)]
    found: dict[str, Any] = {"documents": len(store), "rows": store.num_rows}
    for name, values in (("token_entropy", rows), ("document_entropy", [[of_one.mean()] for of_one in rows])):
        found[name] = _distribution(np.concatenate(values), num_bins) if rows else None
    return found


def _entropies(store: Store) -> Iterator[np.ndarray]:
    """Yields the entropies (R,) of the rows of each document."""
    # The op's kernels are loaded only here, as little other code of a store needs them.
    from slimkernels.ops.sparse_softmax import sparse_softmax

    for index in range(len(store)):
        logprobs, tail = sparse_softmax(store[index].teacher, rest="ghost")
        outcomes = torch.cat([logprobs, tail[:, None]], -1).double().exp()
        yield torch.special.entr(outcomes).sum(-1).numpy()


def _distribution(values: np.ndarray, num_bins: int) -> dict[str, Any]:
    quantiles = np.quantile(values, list(_QUANTILES.values()))
    # A histogram needs a range that is not empty.
    largest = float(values.max()) or 1.0
    counts, edges = np.histogram(values, num_bins, range=(0.0, largest))
    return {
        "mean": float(values.mean()),
        "quantiles": dict(zip(_QUANTILES, quantiles.tolist(), strict=True)),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
