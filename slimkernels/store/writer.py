"""``StoreWriter``: appends documents to a store; a kill at any moment loses none that was reported written."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from slimkernels.durable import sync_directory, write_atomically, write_durably
from slimkernels.packed_logits import HeadWeights
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store.codec import (
    document_hash,
    require_little_endian,
)
from slimkernels.store.contexts import NO_CONTEXT, context_hash, contexts_content, contexts_name
from slimkernels.store.directory import lock_directory, make_directory
from slimkernels.store.errors import DuplicateDocumentError, SettingsMismatchError, TeacherContextError
from slimkernels.store.format import (
    MANIFEST_NAME,
    TEMPORARY_SUFFIX,
    HiddenSettings,
    ShardEntry,
    StoreSettings,
    shard_name,
)
from slimkernels.store.head import head_settings, write_head
from slimkernels.store.hidden import HIDDEN_BITS
from slimkernels.store.identity import changed_settings
from slimkernels.store.manifest import manifest_content, seal_manifest, version_of
from slimkernels.store.prompts import prompts_content, prompts_name
from slimkernels.store.reader import Store
from slimkernels.store.shard import tokens_as_int32
from slimkernels.store.shard_writing import PendingDocument, write_shard
from slimkernels.store.teacher_rows import encode_teacher

_SHARD_BYTES = 64 << 20


class StoreWriter:
    """Creates a store, or appends to one that was made with the same settings.

    ``add`` buffers a document. ``flush`` writes the buffered documents as one shard; ``close`` and the end of the
    ``with`` block, also by an exception, flush too. When ``flush`` returns, the documents are on the disk and survive a
    kill or a power cut; a kill before that leaves the store as it was. Documents are either whole or absent. ``add``
    flushes when a shard is full. Only one writer at a time can open a store; readers can always read it. A store keeps
    the version of the format in which it was made. Version 1 has no ``rest_lse``, so a store of that version is
    continued without it, and the releases that made it can still read it.

    Args:
        path: Directory of the store, made if it does not exist.
        vocab_size: V, in [1, 2^31).
        tokenizer_fingerprint: Text that identifies the tokenizer; an existing store is compared with
            ``is_same_tokenizer``.
        teacher: JSON object that describes the teacher (name, revision, dtype, ...). Where it has "weights", a
            fingerprint, an existing store is compared by that alone, so the teacher can be renamed.
        selection: JSON object that describes how the kept ids were chosen.
        temperatures: Temperatures of every teacher's lse; the first is 1.0.
        codec: Encoding of the logits: "affine8" (8 bits; an error of at most half a step of (max - min) / 255, the
            kept probability of a row preserved), "affine6" (the same with 6 bits), "bfloat16" or "float32". Or that of
            the teacher's final hidden states, from which readers make the rows: "hidden16" (bfloat16) or "hidden8"
            (8 bits and a scale per row).
        head: The teacher's head over the V ids, which a store of hidden states keeps; None for one of logits.
        top_k: K, the number of logits of the rows that readers of a store of hidden states make, unless they ask for
            another one; None for a store of logits.
        shard_rows: Number of rows at which a shard is full; None means about 64 MiB.
        lock_wait_s: Seconds to wait for another writer to finish.
        hidden: Settings of a part of a store of hidden states, whose head is in the store's directory.

    Raises:
        ValueError: A setting is out of range, or ``head`` and ``top_k`` are not those of a store of hidden states.
        SettingsMismatchError: The store exists with other settings, or is a store of parts.
        StoreLockedError: Another writer holds the store.
        NotAStoreError: The path holds other files.
        StoreError: The existing store is damaged; the subclass says how.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int,
        tokenizer_fingerprint: str,
        teacher: dict[str, Any],
        selection: dict[str, Any],
        temperatures: Sequence[float] = (1.0,),
        codec: str = "affine8",
        head: HeadWeights | None = None,
        top_k: int | None = None,
        shard_rows: int | None = None,
        lock_wait_s: float = 0.0,
        hidden: HiddenSettings | None = None,
    ) -> None:
        require_little_endian()
        self.path = Path(path)
        if (head is None and hidden is None) == (codec in HIDDEN_BITS):
            raise ValueError(
                f"head must be given with the codecs {list(HIDDEN_BITS)} and no other, got codec={codec!r} "
                f"{'without' if head is None else 'with'} a head"
            )
        if head is not None and hidden is None:
            hidden = hidden_settings(head, top_k, vocab_size)
        self.settings = StoreSettings(
            vocab_size=vocab_size,
            tokenizer_fingerprint=tokenizer_fingerprint,
            teacher=teacher,
            selection=selection,
            # StoreSettings converts it to a tuple and checks it.
            temperatures=cast(tuple[float, ...], temperatures),
            codec=codec,
            hidden=hidden,
        )
        self._head = head
        if shard_rows is not None and (type(shard_rows) is not int or shard_rows < 1):
            raise ValueError(f"shard_rows must be an int of at least 1, or None for about 64 MiB, got {shard_rows!r}")
        self._shard_rows = shard_rows
        self._version = version_of(self.settings)
        self._pending: list[PendingDocument] = []
        self._pending_rows = self._pending_bytes = 0
        make_directory(self.path)
        # Closes the lock's descriptor, which releases the lock, also if the writer is dropped without close().
        self._release = weakref.finalize(self, os.close, lock_directory(self.path, lock_wait_s))
        try:
            self._shards, self._stored = self._resume()
        except BaseException:
            self._release()
            raise

    def add(
        self,
        input_ids: Any,
        positions: Any,
        teacher: SparseLogits | Tensor,
        *,
        prompt_length: int = 0,
        teacher_ids: Sequence[int] | None = None,
    ) -> None:
        """Buffers one document.

        Args:
            input_ids: (T,) integers in [0, V), T >= 1, as a tensor, an array or a list.
            positions: (R,) integers, ascending in [1, T). Row r predicts ``input_ids[positions[r]]``.
            teacher: SparseLogits (R, K) for V ids. Kept logits are finite. A row that keeps no
                entry must have its ``lse`` as its ``rest_lse``: nothing is known of its distribution, and under
                ``rest="ghost"`` its label is trained on by the cross entropy alone.
                The affine codecs drop the entries of a row that lie more than ``FAR_NATS[codec]`` times the largest
                temperature below its maximum, because one such entry would make the steps of all others coarse.
                Their mass is added to ``rest_lse``. Rows with and without ``rest_lse`` can be in one store.
                A NaN ``target_logit`` means that the teacher's logit of the label is not known. Without a
                ``target_logit`` it is taken from the kept logits, and is -inf for a label that is not kept. In a store
                of hidden states, the hidden states (R, D) that the head is given for these rows.
            prompt_length: Number of tokens at the beginning that are a prompt, in [0, T]; 0 if that is not known.
            teacher_ids: Token ids that the teacher read in place of the document, if it read others, such as the
                document behind a prefix. The store keeps their hash, which ``has`` compares.

        Raises:
            DuplicateDocumentError: A document with these ids is already stored or buffered.
            ValueError: Any other argument is invalid; nothing is buffered then.
        """
        self._require_open()
        ids = tokens_as_int32(input_ids, self.settings.vocab_size)
        digest = document_hash(ids)
        context = context_hash(teacher_ids)
        if digest in self._stored:
            raise DuplicateDocumentError(
                f"a document of these {len(ids)} token ids is in the store already: skip it when `input_ids in writer`"
            )
        at = _positions_as_int32(positions, len(ids))
        if not 0 <= prompt_length <= len(ids):
            raise ValueError(
                f"prompt_length must lie in [0, {len(ids)}], the number of input_ids, got {prompt_length!r}"
            )
        first_row, with_rest = self._pending_rows, self._version > 1
        rows = encode_teacher(self.settings, ids, at, teacher, first_row=first_row, with_rest=with_rest)
        self._pending.append(PendingDocument(ids, digest, at, rows, int(prompt_length), context))
        self._stored[digest] = context
        self._pending_rows += len(rows)
        self._pending_bytes += ids.nbytes + at.nbytes + rows.nbytes
        if self._shard_rows is None:
            full = self._pending_bytes >= _SHARD_BYTES
        else:
            full = self._pending_rows >= self._shard_rows
        if full:
            self.flush()

    def flush(self) -> None:
        """Writes the buffered documents, which are durable when this returns; without any, does nothing."""
        self._require_open()
        if not self._pending:
            return
        name = shard_name(len(self._shards))
        shard_temporary = self.path / (name + TEMPORARY_SUFFIX)
        manifest_temporary = self.path / (MANIFEST_NAME + TEMPORARY_SUFFIX)
        entry = write_shard(self.settings, self._pending, shard_temporary, name)
        lengths = np.array([document.prompt_length for document in self._pending])
        if lengths.any():
            # Read only with the shard that it names, so that it needs no temporary name.
            write_durably(self.path / prompts_name(name), [prompts_content(entry.checksum, lengths)])
        contexts = [document.context for document in self._pending]
        if any(context != NO_CONTEXT for context in contexts):
            write_durably(self.path / contexts_name(name), [contexts_content(entry.checksum, contexts)])
        shards = (*self._shards, entry)
        write_durably(manifest_temporary, [seal_manifest(manifest_content(self.settings, shards, self._version))])
        sync_directory(self.path)
        # Until the manifest lists the shard, the temporary manifest accounts for it.
        os.replace(shard_temporary, self.path / name)
        sync_directory(self.path)
        os.replace(manifest_temporary, self.path / MANIFEST_NAME)
        sync_directory(self.path)
        self._shards = shards
        self._pending = []
        self._pending_rows = self._pending_bytes = 0

    def close(self) -> None:
        """Flushes and unlocks the store; a second call does nothing."""
        if self._release.alive:
            try:
                self.flush()
            finally:
                self._release()

    def __contains__(self, input_ids: object) -> bool:
        """Returns whether a document with these token ids is stored or buffered."""
        return document_hash(tokens_as_int32(input_ids, self.settings.vocab_size)) in self._stored

    def has(self, input_ids: Any, teacher_ids: Sequence[int] | None = None) -> bool:
        """Returns whether a document is stored or buffered, with rows that the teacher gave in the same context.

        Args:
            input_ids: Token ids of the document.
            teacher_ids: Token ids that the teacher reads in its place; None for the document itself.

        Raises:
            TeacherContextError: The document is there, but the teacher read other tokens.
        """
        ids = tokens_as_int32(input_ids, self.settings.vocab_size)
        found = self._stored.get(document_hash(ids))
        if found is None:
            return False
        context = context_hash(teacher_ids)
        if found != context:
            there, here = ("none" if one == NO_CONTEXT else one.hex() for one in (found, context))
            raise TeacherContextError(
                f"{self.path} has rows of a document of {len(ids)} tokens, {ids[:8].tolist()}..., that the teacher "
                f"gave behind another prefix (hash {there} there, {here} here): use the prefixes of that capture or "
                "another directory, and give each document once, with one prefix"
            )
        return True

    def __len__(self) -> int:
        """Returns the number of documents, buffered ones included."""
        return len(self._stored)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if not self._release.alive:
            raise ValueError(f"the writer of {self.path} is closed: make a new StoreWriter to append")

    def _resume(self) -> tuple[tuple[ShardEntry, ...], dict[bytes, bytes]]:
        """Returns the shards, and the hashes of what the teacher read by those of the documents."""
        manifest = self.path / MANIFEST_NAME
        if not manifest.exists():
            # Before the manifest, so that a store always has its head.
            if self._head is not None:
                write_head(self.path, self._head)
            write_atomically(manifest, seal_manifest(manifest_content(self.settings, (), self._version)))
            return (), {}
        store = Store(self.path)
        if store.num_parts is not None:
            raise SettingsMismatchError(
                f"{self.path} is a store of {store.num_parts} parts: write it with a RankWriter, or use another "
                "directory"
            )
        for name in changed_settings(store.settings, self.settings):
            stored, asked = getattr(store.settings, name), getattr(self.settings, name)
            raise SettingsMismatchError(
                f"{self.path} was made with {name}={stored!r}, but {name}={asked!r} was requested: "
                "use the same settings, or another directory"
            )
        # The teacher keeps the name, and the tokenizer the fingerprint, that it had when the store was made.
        self.settings = store.settings
        self._version = store.manifest["version"]
        # Remove what a killed writer left, and the temporary manifest last, because it accounts for the shard.
        name = shard_name(len(store.shards))
        for leftover in (
            *(prompts_name(name), contexts_name(name)),
            *(name + TEMPORARY_SUFFIX, name, MANIFEST_NAME + TEMPORARY_SUFFIX),
        ):
            (self.path / leftover).unlink(missing_ok=True)
        shards = map(store.shard, range(len(store.shards)))
        return store.shards, {
            digest: context
            for shard in shards
            for digest, context in zip(shard.hashes(), shard.context_hashes(), strict=True)
        }


def hidden_settings(head: HeadWeights, top_k: int | None, vocab_size: int) -> HiddenSettings:
    """Returns the settings of a store of hidden states, for the arguments of ``StoreWriter``.

    Raises:
        ValueError: The head has another number of rows, or ``top_k`` is not given or out of range.
    """
    if head.weight.shape[0] != vocab_size:
        raise ValueError(
            f"head must have vocab_size={vocab_size} rows, got {head.weight.shape[0]}: leave out the rows that pad it"
        )
    if type(top_k) is not int or not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k must be an int in [1, {vocab_size}] with a head, got {top_k!r}")
    return head_settings(head, top_k)


def _positions_as_int32(positions: Any, num_tokens: int) -> np.ndarray:
    at = torch.as_tensor(positions)
    if at.numel() == 0:
        at = at.to(torch.int64)
    if at.ndim != 1 or at.is_floating_point() or at.is_complex() or at.dtype == torch.bool:
        raise ValueError(f"positions must be integers, shape (R,), got {tuple(at.shape)} {at.dtype}")
    array = at.detach().cpu().to(torch.int64).numpy()
    if len(array) and (array[0] < 1 or array[-1] >= num_tokens or (np.diff(array) <= 0).any()):
        raise ValueError(
            f"positions must be ascending in [1, {num_tokens}), the number of input_ids, got {array.tolist()[:8]}..."
        )
    return array.astype(np.int32)
