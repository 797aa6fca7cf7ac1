"""``DocumentOrder``: assigns the documents of an epoch to ranks and workers, and resumes a stopped epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

EVEN = ("drop", "repeat")


class DocumentOrder(Sampler[int]):
    """A sampler of the documents of a rank in an epoch, for a ``DataLoader`` over a ``StoreDataset``.

    Equivalent to::

        order = permutation(seed, epoch, num_documents) if shuffle else arange(num_documents)
        if difficulty is not None:  # the easiest documents first, in num_buckets buckets of equal size
            order = order[bucket_of(difficulty)[order].argsort(stable=True)]
        return order[documents_done + rank :: world_size]

    The permutation depends only on the counter-based random numbers of (seed, epoch), so it is the same with every
    version of numpy and torch.

    For any ``world_size`` every document belongs to one rank. If it does not divide ``num_documents``, the first ranks
    have one document more than the others, unless ``even`` is set. While it is iterated over, the order takes 8 bytes
    per document.

    An iteration begins at the position given to ``load_state_dict``, or at the start of the epoch given to
    ``set_epoch``. It depends on nothing else, so a loop calls ``set_epoch`` before every epoch. Both calls reach the
    persistent workers of a ``DataLoader``.

    Args:
        num_documents: Number of documents in the store.
        shuffle: Whether to shuffle; False reads documents in stored order.
        seed: Seed of the order, in [0, 2^64); the same on every rank.
        rank: Rank of this process, in [0, world_size). By default rank and world size are those of
            ``torch.distributed`` if it is initialised, otherwise 0 and 1. Give 0 and 1 for a loader that accelerate
            splits over its processes itself.
        world_size: Number of processes that share an epoch.
        even: Treatment of a remainder. None reads each document once. "drop" leaves the last
            ``num_documents % world_size`` of the order out of this epoch. "repeat" fills the last round with documents
            from the start of the order. With "drop" and "repeat" all ranks have the same number of documents, which a
            loop with a synchronisation in every step needs.
        difficulty: (num_documents,) numbers, such as the teacher's entropies, by which the documents are sorted into
            buckets; an epoch reads the bucket of the smallest numbers first, that of NaN last, and is shuffled within
            each of them. None for no buckets.
        num_buckets: Number of buckets.

    Raises:
        ValueError: An argument is out of range.
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
        difficulty: Sequence[float] | np.ndarray | None = None,
        num_buckets: int = 10,
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
            ("num_buckets", num_buckets, 1, (1 << 31) - 1),
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
        self._buckets: np.ndarray | None = None
        if difficulty is not None:
            values = np.asarray(difficulty, dtype=np.float64)
            if values.shape != (num_documents,):
                raise ValueError(
                    f"difficulty must have a number for each document, shape ({num_documents},), got {values.shape}"
                )
            self._buckets = values.argsort(kind="stable").argsort(kind="stable") * num_buckets // max(num_documents, 1)
        # The epoch, and the number of its documents that all ranks together have read. In shared memory, so that
        # persistent workers see the next epoch.
        self._place = torch.zeros(2, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that an iteration reads."""
        return int(self._place[0])

    def set_epoch(self, epoch: int) -> None:
        """Moves to the start of an epoch; does nothing if this is the current epoch, so a loaded position stays."""
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        if epoch != self.epoch:
            self._place.copy_(torch.tensor([epoch, 0]))

    def __len__(self) -> int:
        """Returns the number of documents that an iteration of this rank reads."""
        return self._count(int(self._place[1]))

    def __iter__(self) -> OrderIterator:
        return OrderIterator(self)

    def state_dict(self, documents_read: int = 0) -> dict[str, Any]:
        """Returns the position in the epoch, for ``load_state_dict``.

        Args:
            documents_read: Number of documents that every rank has read since the iteration began. Workers read ahead,
                so only the loop that uses the documents knows this number.
        """
        epoch, done = self._place.tolist()
        return {**self._identity(), "epoch": epoch, "documents_done": done + documents_read * self.world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a position from ``state_dict`` of this class or its iterator; the number of ranks may change.

        Raises:
            ValueError: The state belongs to another order, or to one of several workers, whose iterators take it.
        """
        self._check(state)
        if state.get("num_workers", 1) != 1:
            raise ValueError(
                f"the state is that of worker {state['worker']} of {state['num_workers']} and says nothing about the "
                "others: use state_dict(documents_read=...) of the dataset or the order"
            )
        done = state["documents_done"] + state.get("documents_read", 0) * state.get("world_size", self.world_size)
        self._place.copy_(torch.tensor([state["epoch"], done]))

    def permutation(self, epoch: int) -> np.ndarray:
        """Returns the order of the documents of all ranks in an epoch, (num_documents,) int64."""
        keys = np.arange(self.num_documents)
        if self.shuffle:
            # numpy's compatibility policy fixes the streams of bit generators, but not those of distributions.
            keys = np.random.Philox(key=[self.seed, epoch]).random_raw(self.num_documents)
        return keys.argsort(kind="stable") if self._buckets is None else np.lexsort((keys, self._buckets))

    def _count(self, documents_done: int) -> int:
        left = max(0, self.num_documents - documents_done)
        if self.even == "drop":
            return left // self.world_size
        extra = self.world_size - 1 if self.even == "repeat" else self.world_size - 1 - self.rank
        return (left + extra) // self.world_size

    def _identity(self) -> dict[str, Any]:
        identity = {"num_documents": self.num_documents, "shuffle": self.shuffle, "seed": self.seed}
        if self._buckets is None:
            return identity
        return identity | {"buckets": hashlib.blake2b(self._buckets.astype("<i8").tobytes(), digest_size=8).hexdigest()}

    def _check(self, state: dict[str, Any]) -> None:
        changed = [
            f"{name}={state.get(name)!r} there, {value!r} here"
            for name, value in ({"buckets": None} | self._identity()).items()
            if state.get(name) != value
        ]
        if changed:
            raise ValueError(f"state must be of the same order of the same documents, but: {'; '.join(changed)}")


class OrderIterator(Iterator[int]):
    """An iterator over the document indices of one worker; workers take blocks of ``block_size`` documents in turn.

    A ``DataLoader`` takes batches from its workers in turn, so with blocks of the batch size the batches do not depend
    on the number of workers.
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
        # The index passes the end only with even="repeat", which starts again at the beginning.
        return int(self._permutation[(self._done + at * order.world_size + order.rank) % order.num_documents])

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of this worker; with one worker, this is also a state of the order."""
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
        """Continues at the position of an iterator of the same worker among the same number of workers.

        Raises:
            ValueError: The state belongs to another order or worker.
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
