"""Offers a store as torch datasets, by index or as a stream shared by ranks and workers, and collates batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from slimkernels.packed_logits import PackedHidden, PackedLogits
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store.order import DocumentOrder, OrderIterator
from slimkernels.store.reader import Document, PackedDocument, Store


class StoreDataset(Dataset):
    """A map-style dataset of the documents of a store, for a ``DataLoader`` or a trainer.

    Shards are memory-mapped, and every document is checked when it is read. Workers, forked or spawned, map the files
    themselves. ``DocumentOrder`` is the sampler that shuffles, splits by rank and resumes.

    Args:
        store: A ``Store``, or the directory of one.
        packed: Whether rows come as ``PackedLogits``, a third of the bytes to send between processes and to a GPU,
            where ``slimkernels.decode_logits`` decodes them, or as ``PackedHidden`` from a store of hidden states;
            otherwise they come as ``SparseLogits``.

    Attributes:
        temperatures: Temperatures of the rows that are trained on.

    Raises:
        StoreError: The store cannot be opened.

    >>> import tempfile, torch
    >>> from slimkernels.store import StoreWriter
    >>> teacher = SparseLogits(torch.tensor([[1, 3]], dtype=torch.int32), torch.zeros(1, 2), torch.ones(1, 1))
    >>> with tempfile.TemporaryDirectory() as path:
    ...     with StoreWriter(path, vocab_size=4, tokenizer_fingerprint="", teacher={}, selection={}) as writer:
    ...         for label in range(4):
    ...             writer.add([2, label], [1], teacher)
    ...     dataset = StoreDataset(path)
    ...     order = DocumentOrder(len(dataset), seed=7, rank=0, world_size=2)
    ...     loader = torch.utils.data.DataLoader(dataset, 2, sampler=order, collate_fn=collate_documents)
    ...     [batch["target"].tolist() for batch in loader]
    [[1, 2]]
    """

    def __init__(self, store: Store | str | os.PathLike[str], *, packed: bool = True) -> None:
        self.store = store if isinstance(store, Store) else Store(store)
        self.packed = packed
        self.temperatures = self.store.temperatures

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.store.vocab_size

    @property
    def tokenizer_fingerprint(self) -> str:
        """Fingerprint of the tokenizer of the documents."""
        return self.store.tokenizer_fingerprint

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> PackedDocument | Document:
        """Reads one document and checks every byte of it."""
        return self.store.packed(index) if self.packed else self.store[index]


def packed_kind(store: Store) -> tuple[Any, ...]:
    """Returns what the packed rows of two stores have in common if they can be in one batch: codec, V and head."""
    hidden = store.settings.hidden
    # Packed hidden states share a head, and are made into rows of one K.
    head = None if hidden is None else (hidden.head_checksum, hidden.top_k)
    # The 8-bit and the 6-bit codec are unpacked to the same codes.
    return store.settings.codec.rstrip("68"), store.vocab_size, head


class StoreIterableDataset(IterableDataset):
    """A stream of the documents of a store: shuffled by (seed, epoch), split by rank and worker, resumable.

    Every document of an epoch goes to one worker of one rank, whatever their numbers. ``even`` decides about a
    remainder between ranks; workers never drop or repeat a document.

    A stopped epoch continues with exactly the remaining documents, in the same order::

        for epoch in range(dataset.epoch, num_epochs):
            dataset.set_epoch(epoch)
            loader = DataLoader(dataset, batch_size=8, num_workers=2, collate_fn=collate_documents)
            for step, batch in enumerate(loader):
                ...
                state = dataset.state_dict(documents_read=8 * (step + 1))  # for load_state_dict, before the loop

    ``torchdata.stateful_dataloader.StatefulDataLoader`` keeps the position of every worker without this.

    Args:
        store: A ``Store``, or the directory of one.
        packed: Whether rows come packed, as in ``StoreDataset``, or as ``SparseLogits``.
        batch_size: Batch size of the ``DataLoader``. Workers take this many documents in turn, so that the batches and
            their order do not depend on the number of workers.
        shuffle: Whether to shuffle; False reads documents in stored order.
        seed: Seed of the order, the same on every rank.
        rank: Rank of this process, by default that of ``torch.distributed``. Give 0, and a ``world_size`` of 1, for a
            loader that accelerate splits over its processes itself.
        world_size: Number of processes, by default that of ``torch.distributed``.
        even: None, "drop" or "repeat", explained in ``DocumentOrder``.

    Raises:
        StoreError: The store cannot be opened.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        *,
        packed: bool = True,
        batch_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        even: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.documents = StoreDataset(store, packed=packed)
        self.batch_size = batch_size
        self.order = DocumentOrder(
            len(self.documents), shuffle=shuffle, seed=seed, rank=rank, world_size=world_size, even=even
        )

    @property
    def epoch(self) -> int:
        """The epoch that an iteration reads."""
        return self.order.epoch

    def set_epoch(self, epoch: int) -> None:
        """Calls ``DocumentOrder.set_epoch``."""
        self.order.set_epoch(epoch)

    def state_dict(self, documents_read: int = 0) -> dict[str, Any]:
        """Returns the position after this many documents of this rank since the iteration began."""
        return self.order.state_dict(documents_read)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Calls ``DocumentOrder.load_state_dict``."""
        self.order.load_state_dict(state)

    def __len__(self) -> int:
        """Returns the number of documents that all workers of this rank read together in an iteration."""
        return len(self.order)

    def __iter__(self) -> DocumentIterator:
        worker = get_worker_info()
        place = {} if worker is None else {"worker": worker.id, "num_workers": worker.num_workers}
        return DocumentIterator(self.documents, self.order, block_size=self.batch_size, **place)


class DocumentIterator(OrderIterator):
    """An iterator over the documents of one worker; its state is its position in the order."""

    def __init__(self, documents: StoreDataset, order: DocumentOrder, **place: int) -> None:
        super().__init__(order, **place)
        self._documents = documents

    def __next__(self) -> Any:
        return self._documents[super().__next__()]


# Libraries also put descriptions of these into a batch, which have no rows to count.
_ROWS = (torch.Tensor, SparseLogits, PackedLogits, PackedHidden)


class DocumentBatch(dict[str, Any]):
    """The batch of ``collate_documents``: a dict whose labels and rows of the teacher belong together.

    Libraries make another one of changed values, such as tensors on another device.

    Raises:
        ValueError: The numbers of rows differ, because something has cut some of the values.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rows = {name: self.get(name) for name in ("rows", "target", "teacher")}
        found = {name: len(value) for name, value in rows.items() if isinstance(value, _ROWS)}
        if len(set(found.values())) > 1:
            counts = ", ".join(f"{count} in {name}" for name, count in found.items())
            raise ValueError(
                f"a batch of documents must have as many labels as rows of the teacher, got {counts}: labels cannot be "
                "cut like documents, as accelerate does with dispatch_batches=True, its default for a stream; set "
                "dispatch_batches=False"
            )


def collate_documents(
    documents: Sequence[Document | PackedDocument], *, pad_token_id: int = 0, with_teacher: bool = True
) -> dict[str, Any]:
    """Makes one right-padded batch of B documents of at most T tokens with N labels in total.

    A ``DataLoader`` that is given no ``collate_fn`` calls this with the defaults.

    Args:
        documents: Documents of a store, either all packed or none.
        pad_token_id: Token that fills ``input_ids`` after each document; never a label and never attended to.
        with_teacher: Whether to include the teacher.

    Returns:
        ``input_ids`` (B, T) int64; ``attention_mask`` (B, T) int64; ``rows`` (N,) int64, the index in B * T of the
        hidden state that predicts each label; ``target`` (N,) int64; ``prompt_lengths`` (B,) int64, the number of
        tokens of each document's prompt, or those before its first label where that is not known; ``teacher``
        PackedLogits, PackedHidden or SparseLogits of N rows, or None.

    Raises:
        ValueError: There are no documents, or a position is outside [1, T).
    """
    if not documents:
        raise ValueError("documents must hold at least one document, got none")
    length = max(len(document.input_ids) for document in documents)
    input_ids = torch.full((len(documents), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(documents), length), dtype=torch.int64)
    rows, targets = [], []
    for index, document in enumerate(documents):
        tokens, positions = document.input_ids, document.positions
        if len(positions) and not 1 <= int(positions.min()) <= int(positions.max()) < len(tokens):
            raise ValueError(
                f"positions must lie in [1, {len(tokens)}), got {int(positions.min())} to {int(positions.max())}"
            )
        input_ids[index, : len(tokens)] = tokens
        attention_mask[index, : len(tokens)] = 1
        rows.append(index * length + positions - 1)
        targets.append(tokens[positions])
    teacher = None
    if with_teacher:
        kind: Any = type(documents[0].teacher)
        teacher = kind.cat([document.teacher for document in documents])
    return DocumentBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        rows=torch.cat(rows),
        target=torch.cat(targets),
        prompt_lengths=torch.tensor([_prompt_length(document) for document in documents]),
        teacher=teacher,
    )


def _collate_default(documents: Sequence[Document | PackedDocument], *, collate_fn_map: Any = None) -> dict[str, Any]:
    return collate_documents(documents)


# A DataLoader without a collate_fn looks here for types that are no tensors.
default_collate_fn_map.update(dict.fromkeys((Document, PackedDocument), _collate_default))


def _prompt_length(document: Document | PackedDocument) -> int:
    if document.prompt_length:
        return document.prompt_length
    return int(document.positions[0]) if len(document.positions) else len(document.input_ids)
