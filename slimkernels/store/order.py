"""DocumentOrder: which documents a rank and a worker of it read in an epoch, and from where a stopped epoch goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

EVEN = ("drop", "repeat")


class DocumentOrder(Sampler[int]):
    """The documents of a rank, in the order of an epoch; a sampler for a ``DataLoader`` over a ``StoreDataset``.

    Equivalent to, the permutation being made of the counter-based random numbers of (seed, epoch) alone, so that it is
    the same with every version of numpy and torch::

        order = permutation(seed, epoch, num_documents) if shuffle else arange(num_documents)
        return order[documents_done + rank :: world_size]

    Whatever ``world_size`` is, every document belongs to one rank. Where it does not divide ``num_documents``, the
    first ranks have one document more than the others, unless ``even`` says what to do about it. Holds the order,
    8 bytes a document, while it is iterated over.

    An iteration begins where ``load_state_dict`` says, else at the start of the epoch, which ``set_epoch`` chooses;
    it is a function of the two and of nothing else, so a loop calls ``set_epoch`` before every epoch. Both reach the
    workers of a ``DataLoader`` that keeps them (``persistent_workers``).

    Args:
        num_documents: The documents of the store.
        shuffle: False reads them in stored order.
        seed: Of the order, 0 to 2^64 - 1; the same on every rank.
        rank: This process among ``world_size``; both by default those of ``torch.distributed`` where it is
            initialised, else 0 of 1.
        world_size: The number of processes that share an epoch.
        even: None: each document once. "drop": the last ``num_documents % world_size`` of the order are left out of
            this epoch. "repeat": documents from the start of the order fill the last round. With either, all ranks
            have the same number, as a loop needs in which they wait for each other at every step.

    Raises:
        ValueError: An argument out of its range.
    """

    def __init__(
        self,
        num_documents: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        even: str | None = None,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank and world_size must be given together, got rank={rank}, world_size={world_size}")
        if rank is None or world_size is None:
            rank, world_size = _process_rank()
        for name, value, least, most in (
            ("num_documents", num_documents, 0, (1 << 62) - 1),
            ("seed", seed, 0, (1 << 64) - 1),
            ("world_size", world_size, 1, (1 << 31) - 1),
            ("rank", rank, 0, world_size - 1),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must lie in [{least}, {most}], got {value}")
        if even is not None and even not in EVEN:
            raise ValueError(f"even must be None or one of {EVEN}, got {even!r}")
        self.num_documents = num_documents
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.even = even
        # The epoch, and the documents of it that all ranks together have read. Shared, so that workers that outlive an
        # epoch see the next one.
        self._place = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that an iteration reads."""
        return int(self._place[0])

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of an epoch; the epoch it is in already stays at its place, also one just loaded."""
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        if epoch != self.epoch:
            self._place.copy_(torch.tensor([epoch, 0]))

    def __len__(self) -> int:
        """The documents that an iteration of this rank reads."""
        return self._count(int(self._place[1]))

    def __iter__(self) -> OrderIterator:
        return OrderIterator(self)

    def state_dict(self, documents_read: int = 0) -> dict[str, Any]:
        """The place in the epoch, for ``load_state_dict``.

        Args:
            documents_read: How many documents every rank has read since the iteration began. Workers read ahead, so
                only the loop that uses the documents knows; an iterator knows by itself.
        """
        epoch, done = self._place.tolist()
        return {**self._identity(), "epoch": epoch, "documents_done": done + documents_read * self.world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where ``state_dict`` of this class or of its iterator was, with any number of ranks or workers.

        Raises:
            ValueError: The state is of another order, or of one worker among several: their iterators take it.
        """
        self._check(state)
        if state.get("num_workers", 1) != 1:
            raise ValueError(
                f"the state is that of worker {state['worker']} of {state['num_workers']} and says nothing of the "
                "others: use state_dict(documents_read=...) of the dataset or the order"
            )
        done = state["documents_done"] + state.get("documents_read", 0) * state.get("world_size", self.world_size)
        self._place.copy_(torch.tensor([state["epoch"], done]))

    def permutation(self, epoch: int) -> np.ndarray:
        """(num_documents,) int64: the order of all ranks' documents in an epoch."""
        if not self.shuffle:
            return np.arange(self.num_documents)
        # Streams of a bit generator are fixed by numpy's compatibility policy; those of its distributions are not.
        return np.random.Philox(key=[self.seed, epoch]).random_raw(self.num_documents).argsort(kind="stable")

    def _count(self, documents_done: int) -> int:
        left = max(0, self.num_documents - documents_done)
        if self.even == "drop":
            return left // self.world_size
        extra = self.world_size - 1 if self.even == "repeat" else self.world_size - 1 - self.rank
        return (left + extra) // self.world_size

    def _identity(self) -> dict[str, Any]:
        return {"num_documents": self.num_documents, "shuffle": self.shuffle, "seed": self.seed}

    def _check(self, state: dict[str, Any]) -> None:
        changed = [
            f"{name}={state.get(name)!r} there, {value!r} here"
            for name, value in self._identity().items()
            if state.get(name) != value
        ]
        if changed:
            raise ValueError(f"state must be of the same order of the same documents, but: {'; '.join(changed)}")


class OrderIterator(Iterator[int]):
    """Indices of documents for one worker of a rank: workers take blocks of ``block_size`` documents in turn.

    Since a ``DataLoader`` takes a batch from its workers in turn, blocks of a batch give the batches of no worker.
    """

    def __init__(self, order: DocumentOrder, *, worker: int = 0, num_workers: int = 1, block_size: int = 1) -> None:
        self._order = order
        self._worker, self._num_workers, self._block_size = worker, num_workers, block_size
        self._begin(*order._place.tolist(), read=0)

    def _begin(self, epoch: int, done: int, read: int) -> None:
        self._epoch, self._done, self._read = epoch, done, read
        self._permutation = self._order.permutation(epoch)
        self._count = self._order._count(done)

    def __next__(self) -> int:
        block, offset = divmod(self._read, self._block_size)
        at = (block * self._num_workers + self._worker) * self._block_size + offset
        if at >= self._count:
            raise StopIteration
        self._read += 1
        order = self._order
        # Past the end only with even="repeat", which begins again.
        return int(self._permutation[(self._done + at * order.world_size + order.rank) % order.num_documents])

    def state_dict(self) -> dict[str, Any]:
        """The place of this worker; with one worker, also a state of the order."""
        return {
            **self._order._identity(),
            "epoch": self._epoch,
            "documents_done": self._done,
            "documents_read": self._read,
            "world_size": self._order.world_size,
            "worker": self._worker,
            "num_workers": self._num_workers,
            "block_size": self._block_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where an iterator of the same worker among as many was.

        Raises:
            ValueError: The state is of another order or worker.
        """
        self._order._check(state)
        own = self.state_dict()
        names = ("world_size", "worker", "num_workers", "block_size")
        if any(state.get(name) != own[name] for name in names):
            raise ValueError(
                f"state must be of the same worker of the same rank, {[own[name] for name in names]} for {names}, got "
                f"{[state.get(name) for name in names]}: keep the number of ranks and workers and the batch size, or "
                "continue with state_dict(documents_read=...) of the dataset or the order"
            )
        self._begin(state["epoch"], state["documents_done"], state["documents_read"])


def _process_rank() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
