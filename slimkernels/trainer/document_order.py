"""The order in which a training reads the documents of its stores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from slimkernels.store import DocumentOrder, Store, StoreDataset, document_entropies

ORDERS = ("random", "easy-first")


def easy_first(dataset: Any, seed: int) -> DocumentOrder:
    """Returns an order in ten buckets of the teacher's mean entropy, the lowest first and shuffled within each.

    All rows are read once. The order is that of all processes, over which the trainer's loader splits it.

    Args:
        dataset: A ``Store`` or ``StoreDataset``, or a ``ConcatDataset`` or ``Subset`` of them.
        seed: Seed of the order.

    Raises:
        ValueError: The data set is another one.
    """
    entropies = _entropies(dataset)
    return DocumentOrder(len(entropies), seed=seed, rank=0, world_size=1, difficulty=entropies.numpy())


def _entropies(dataset: Any) -> Tensor:
    if isinstance(dataset, ConcatDataset):
        return torch.cat([_entropies(one) for one in dataset.datasets])
    if isinstance(dataset, Subset):
        return _entropies(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, Store | StoreDataset):
        return torch.from_numpy(document_entropies(dataset if isinstance(dataset, Store) else dataset.store))
    raise ValueError(
        f"document_order 'easy-first' needs documents of stores, whose rows have an entropy, got "
        f"{type(dataset).__name__}: pass a StoreDataset, or a ConcatDataset or Subset of them"
    )
