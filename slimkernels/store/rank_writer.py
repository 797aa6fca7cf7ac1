"""``RankWriter``: lets several ranks fill one store together, each its own parts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from slimkernels.durable import write_atomically
from slimkernels.packed_logits import HeadWeights
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store.codec import document_hash
from slimkernels.store.directory import lock_directory, make_directory
from slimkernels.store.errors import NotAStoreError, SettingsMismatchError, StoreError
from slimkernels.store.format import MANIFEST_NAME, MAX_PARTS, part_name, part_of
from slimkernels.store.head import write_head
from slimkernels.store.manifest import load_manifest, parse_parts, parts_content, seal_manifest
from slimkernels.store.shard import tokens_as_int32
from slimkernels.store.writer import StoreWriter, hidden_settings

# The lock of a killed rank may outlive it for a moment, and longer on a network file system.
_LOCK_WAIT_S = 30.0


def check_num_parts(num_parts: int | None) -> None:
    """Checks a number of parts, which None leaves open.

    Raises:
        ValueError: It is out of range.
    """
    if num_parts is not None and (type(num_parts) is not int or not 1 <= num_parts <= MAX_PARTS):
        raise ValueError(f"num_parts must be an int in [1, {MAX_PARTS}], or None, got {num_parts!r}")


class RankWriter:
    """The writer of one of several ranks that fill a store together.

    The store is a directory of parts, each a store with its own lock. The hash of a document selects its part, and part
    p belongs to rank ``p % num_ranks``. So no document is stored twice, and ranks never wait for each other. A rank
    that died can be started again, alone or with the others, and the number of ranks may change. ``Store`` reads all
    parts as one store.

    Args:
        path: Directory of the store, made if it does not exist. It may hold a store without parts, which only rank 0
            writes.
        rank: This rank, in [0, num_ranks).
        num_ranks: Number of ranks that run now; 1 opens every part.
        num_parts: Number of parts, in [1, 2^16], fixed when the store is made; 1 makes a store without parts. None
            takes the number of an existing store, and ``num_ranks`` for a new one.
        options: Settings of the store and ``shard_rows``, the same as in ``StoreWriter``.

    Raises:
        SettingsMismatchError: The store exists with other settings or another number of parts.
        StoreLockedError: Another writer holds one of the parts.
        NotAStoreError: The path holds other files.
        ValueError: ``rank``, ``num_ranks`` or ``num_parts`` is out of range.
        StoreError: The existing store is damaged; the subclass says how.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        rank: int = 0,
        num_ranks: int = 1,
        num_parts: int | None = None,
        **options: Any,
    ) -> None:
        if type(rank) is not int or type(num_ranks) is not int or not 0 <= rank < num_ranks:
            raise ValueError(f"rank must be an int in [0, num_ranks), got rank={rank!r} and num_ranks={num_ranks!r}")
        check_num_parts(num_parts)
        self.path = Path(path)
        self.vocab_size: int = options["vocab_size"]
        head = options.pop("head", None)
        if num_ranks > 1:
            options["lock_wait_s"] = _LOCK_WAIT_S
        stored = self._stored_parts()
        if head is not None:
            # Parts have no head of their own: it is in the store's directory.
            options["hidden"] = hidden_settings(head, options.pop("top_k", None), self.vocab_size)
        if stored is None and (num_parts or num_ranks) > 1:
            self._make_parts(num_parts or num_ranks, options, head)
            # Another rank may have made the store in the meantime.
            stored = self._stored_parts()
        if stored is not None and num_parts not in (None, stored):
            raise SettingsMismatchError(
                f"{self.path} was made with {stored} parts, but num_parts={num_parts} was requested: use the same "
                "number, or another directory"
            )
        self.num_parts = stored or 1
        self._writers: dict[int, StoreWriter] = {}
        with contextlib.ExitStack() as stack:
            for part in range(rank, self.num_parts, num_ranks):
                folder = self.path if self.num_parts == 1 else self.path / part_name(part)
                written: dict[str, Any] = {"head": head} if self.num_parts == 1 else {}
                try:
                    self._writers[part] = stack.enter_context(StoreWriter(folder, **options, **written))
                except StoreError as error:
                    raise error if error.file is None else error.within(folder.name) from error
            self._stack = stack.pop_all()

    @property
    def parts(self) -> tuple[int, ...]:
        """The parts of this rank; empty if there are more ranks than parts."""
        return tuple(self._writers)

    def part_of(self, input_ids: Any) -> int | None:
        """Returns the part of a document with these token ids, or None if it belongs to another rank."""
        part = 0
        if self.num_parts > 1:
            part = part_of(document_hash(tokens_as_int32(input_ids, self.vocab_size)), self.num_parts)
        return part if part in self._writers else None

    def add(self, input_ids: Any, positions: Any, teacher: SparseLogits | Tensor, **options: Any) -> None:
        """Buffers one document as ``StoreWriter.add`` does; raises ValueError for a document of another rank."""
        part = self.part_of(input_ids)
        if part is None:
            raise ValueError("the document belongs to another rank: add it only where `part_of(input_ids)` is not None")
        self._writers[part].add(input_ids, positions, teacher, **options)

    def flush(self) -> None:
        """Writes the buffered documents of every part of this rank."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Flushes and unlocks every part; a second call does nothing."""
        self._stack.close()

    def __contains__(self, input_ids: object) -> bool:
        """Returns whether a document with these token ids is stored or buffered in a part of this rank."""
        part = self.part_of(input_ids)
        return part is not None and input_ids in self._writers[part]

    def has(self, input_ids: Any, teacher_ids: Sequence[int] | None = None) -> bool:
        """Returns ``StoreWriter.has``; False for a document of another rank."""
        part = self.part_of(input_ids)
        return part is not None and self._writers[part].has(input_ids, teacher_ids)

    def __len__(self) -> int:
        """Returns the number of documents in the parts of this rank, buffered ones included."""
        return sum(map(len, self._writers.values()))

    def __enter__(self) -> RankWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stored_parts(self) -> int | None:
        """Returns the number of parts of the existing store, or None if there is no store."""
        if not (self.path / MANIFEST_NAME).exists():
            return None
        content = load_manifest(self.path)[1]
        return parse_parts(content)[1] if "parts" in content else 1

    def _make_parts(self, num_parts: int, options: dict[str, Any], head: HeadWeights | None) -> None:
        """Makes the parts and then the manifest, so that a manifest implies that all parts exist."""
        names = [part_name(part) for part in range(num_parts)]
        make_directory(self.path, parts=names)
        descriptor = lock_directory(self.path, _LOCK_WAIT_S)
        try:
            if (self.path / MANIFEST_NAME).exists():
                return
            for name in names:
                with StoreWriter(self.path / name, **options) as writer:
                    if len(writer):
                        raise NotAStoreError(
                            f"{self.path / name} holds documents, but {self.path} has lost its {MANIFEST_NAME}: put it "
                            "back, or use another directory"
                        )
            if head is not None:
                write_head(self.path, head)
            write_atomically(self.path / MANIFEST_NAME, seal_manifest(parts_content(writer.settings, num_parts)))
        finally:
            os.close(descriptor)
