"""``Shard``: one mapped file of documents; its index is checked at once, tokens and rows on access."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from slimkernels.packed_logits import PackedHidden, PackedLogits
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store.codec import (
    AFFINE_CODECS,
    HASH_BYTES,
    decode_rows,
    document_hash,
    packed_rows,
)
from slimkernels.store.contexts import read_context_hashes
from slimkernels.store.errors import (
    DocumentDamagedError,
    MissingShardError,
    ShardHeaderError,
    ShardIndexError,
    ShardSizeError,
)
from slimkernels.store.format import HiddenSettings, ShardEntry, ShardLayout, StoreSettings, new_digest, shard_layout
from slimkernels.store.head import StoredHead
from slimkernels.store.hidden import decode_hidden
from slimkernels.store.prompts import read_prompt_lengths

# bfloat16 is read as uint16.
TENSOR_DTYPES = {
    "I8": np.int8,
    "BF16": np.uint16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "I64": np.int64,
    "U64": np.uint64,
}
_VALUE_DTYPES = {"affine8": torch.uint8, "affine6": torch.uint8, "bfloat16": torch.bfloat16, "float32": torch.float32}
_CHECKED_ROWS = 64


def tokens_as_int32(input_ids: Any, vocab_size: int) -> np.ndarray:
    """Converts (T,) token ids of any integer type, T >= 1, each in [0, vocab_size), to int32."""
    ids = torch.as_tensor(input_ids)
    if ids.ndim != 1 or len(ids) == 0 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(
            f"input_ids must be at least one integer token id, shape (T,), got {tuple(ids.shape)} {ids.dtype}"
        )
    ids = ids.detach().cpu().to(torch.int64).numpy()
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"input_ids must lie in [0, {vocab_size}), got {ids.min()} to {ids.max()}")
    return ids.astype(np.int32)


class Shard:
    """A memory-mapped shard; size, header and index are checked on opening, documents and rows when they are read.

    Args:
        path: Directory of the store.
        settings: Settings of the store.
        entry: Entry of the shard in the manifest.
        has_rest_lse: Whether rows have a ``rest_lse`` also if the shard holds none; it is NaN then.

    Attributes:
        arrays: Tensors by name, and ``prompt_lengths`` (D,); ``id_words`` and ``values`` are flat, ``values`` as
            bytes. Those of the index are copies, so that they cannot change after the check; the others are mapped.
    """

    def __init__(self, path: Path, settings: StoreSettings, entry: ShardEntry, *, has_rest_lse: bool = False) -> None:
        self.settings = settings
        self.entry = entry
        self._path = path
        self._has_rest_lse = has_rest_lse
        layout = shard_layout(settings, entry)
        with open_shard(path, entry, layout) as file:
            head = layout.header + file.read(layout.head_bytes - len(layout.header))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.arrays: dict[str, np.ndarray] = {}
        digest = new_digest()
        digest.update(head)
        if digest.hexdigest() != entry.head_checksum:
            self._index_error("its bytes are not those that were written")
        for spec in layout.tensors:
            dtype = np.dtype(np.uint8 if spec.name == "values" else TENSOR_DTYPES.get(spec.dtype, np.uint8))
            count = (spec.stop - spec.start) // dtype.itemsize
            array = np.frombuffer(head if spec.stop <= layout.head_bytes else self._map, dtype, count, spec.start)
            self.arrays[spec.name] = array if spec.name in ("id_words", "values") else array.reshape(spec.shape)
        self._check_index()
        counts = np.diff(self.arrays["document_token_offsets"])
        self.arrays["prompt_lengths"] = read_prompt_lengths(path, entry, counts)

    def _check_index(self) -> None:
        entry, arrays = self.entry, self.arrays
        rows, tokens = arrays["document_row_offsets"], arrays["document_token_offsets"]
        self._check_offsets("document_row_offsets", entry.rows, 0)
        self._check_offsets("document_token_offsets", entry.tokens, 1)
        if "entry_offsets" in arrays:
            self._check_offsets("entry_offsets", entry.entries, 1)
            self._check_offsets("id_word_offsets", entry.id_words, 1)
        positions = arrays["positions"]
        rows_per_document = np.diff(rows)
        if (positions < 1).any() or (positions >= np.repeat(np.diff(tokens), rows_per_document)).any():
            self._index_error("a position lies outside its document")
        document = np.repeat(np.arange(entry.documents), rows_per_document)
        if ((np.diff(positions) <= 0) & (np.diff(document) == 0)).any():
            self._index_error("the positions of a document are not ascending")

    def _check_offsets(self, name: str, last: int, least: int) -> None:
        offsets = self.arrays[name]
        if offsets[0] != 0 or offsets[-1] != last or (np.diff(offsets) < least).any():
            self._index_error(f"{name} does not lead from 0 to {last} in steps of at least {least}")

    def _index_error(self, what: str) -> None:
        raise ShardIndexError(f"its index is damaged: {what}", file=self.entry.file)

    def hashes(self) -> list[bytes]:
        """Returns the hash of each document."""
        data = self.arrays["document_hashes"].tobytes()
        return [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]

    def context_hashes(self) -> list[bytes]:
        """Returns the hash of what the teacher read in place of each document, or ``NO_CONTEXT``."""
        return read_context_hashes(self._path, self.entry)

    def rows_of(self, document: int) -> tuple[int, int]:
        """Returns the rows [start, stop) of a document."""
        start, stop = self.arrays["document_row_offsets"][document : document + 2].tolist()
        return start, stop

    def tokens(self, document: int, index: int) -> np.ndarray:
        """Returns the (T,) int32 ids of a document, checked against its hash; ``index`` is its index in the store."""
        self._require_size()
        start, stop = self.arrays["document_token_offsets"][document : document + 2].tolist()
        ids = self.arrays["input_ids"][start:stop]
        place = {"file": self.entry.file, "document": index}
        if document_hash(ids) != self.arrays["document_hashes"][document].tobytes():
            raise DocumentDamagedError("its token ids are not those that were written", **place)
        if ids.min() < 0 or ids.max() >= self.settings.vocab_size:
            raise DocumentDamagedError(f"a token id lies outside [0, {self.settings.vocab_size})", **place)
        return ids

    def teacher(self, start: int, stop: int, index: int) -> SparseLogits:
        """Decodes rows [start, stop), which belong to document ``index`` of the store."""
        if (hidden := self.settings.hidden) is not None:
            # The op's kernels are loaded only here, as no other code of a store needs them.
            from slimkernels.ops.decode_logits import decode_logits

            return decode_logits(self.packed_hidden(hidden, start, stop, index))
        self._require_size()
        top_k = self.entry.top_k
        if top_k is None:
            top_k = int(np.diff(self.arrays["entry_offsets"][start : stop + 1]).max(initial=1))
        ids, logits = decode_rows(**self._rows(start, stop), width=top_k, file=self.entry.file, document=index)
        return SparseLogits(
            ids=torch.from_numpy(ids),
            logits=torch.from_numpy(logits),
            temperatures=self.settings.temperatures,
            **self._scalars(start, stop),
        )

    def check_rows(self, start: int, stop: int, index: int) -> None:
        """Checks every byte of rows [start, stop), which belong to document ``index`` of the store."""
        if (hidden := self.settings.hidden) is not None:
            self.packed_hidden(hidden, start, stop, index)
            return
        # A few rows at a time, so that the decoded values stay in the caches.
        for begin in range(start, stop, _CHECKED_ROWS):
            self.teacher(begin, min(begin + _CHECKED_ROWS, stop), index)

    def packed(self, start: int, stop: int, index: int) -> PackedLogits | PackedHidden:
        """Returns rows [start, stop) without decoding them; every byte of them is checked."""
        if (hidden := self.settings.hidden) is not None:
            return self.packed_hidden(hidden, start, stop, index)
        self.check_rows(start, stop, index)
        rows = packed_rows(**self._rows(start, stop))
        affine = self.arrays["affine"][start:stop].copy() if self.settings.codec in AFFINE_CODECS else None
        return PackedLogits(
            id_words=torch.from_numpy(rows.id_words.view(np.int32)),
            values=torch.from_numpy(rows.values).view(_VALUE_DTYPES[self.settings.codec]),
            affine=None if affine is None else torch.from_numpy(affine),
            counts=None if rows.counts is None else torch.from_numpy(rows.counts),
            vocab_size=self.settings.vocab_size,
            temperatures=self.settings.temperatures,
            **self._scalars(start, stop),
        )

    def packed_hidden(self, hidden: HiddenSettings, start: int, stop: int, index: int) -> PackedHidden:
        """Returns rows [start, stop) of a store of hidden states, after checking every byte of them."""
        settings, arrays = self.settings, self.arrays
        self._require_size()
        values, scale = decode_hidden(
            arrays["hidden"][start:stop],
            arrays["scale"][start:stop] if "scale" in arrays else np.empty(0, np.float32),
            arrays["row_checksums"][start:stop],
            first_row=start,
            file=self.entry.file,
            document=index,
        )
        document = int(np.searchsorted(arrays["document_row_offsets"], start, side="right")) - 1
        labels = self.tokens(document, index)[arrays["positions"][start:stop]] if start < stop else np.empty(0)
        return PackedHidden(
            values=values,
            scale=scale,
            target=torch.from_numpy(labels.astype(np.int64)),
            head=StoredHead.of(hidden, settings.vocab_size, self._path),
            vocab_size=settings.vocab_size,
            top_k=hidden.top_k,
            temperatures=settings.temperatures,
        )

    def _rows(self, start: int, stop: int) -> dict[str, Any]:
        return {
            "vocab_size": self.settings.vocab_size,
            "codec": self.settings.codec,
            "top_k": self.entry.top_k,
            "first_row": start,
            "num_rows": stop - start,
            "arrays": self.arrays,
        }

    def _scalars(self, start: int, stop: int) -> dict[str, Tensor]:
        names = ("lse", "rest_lse", "target_logit") if self.entry.rest_lse else ("lse", "target_logit")
        scalars = {name: torch.from_numpy(self.arrays[name][start:stop].copy()) for name in names}
        if self._has_rest_lse and not self.entry.rest_lse:
            scalars["rest_lse"] = torch.full_like(scalars["lse"], torch.nan)
        return scalars

    def _require_size(self) -> None:
        # Touching a page past the end of a file that shrank after it was mapped would kill the process.
        if self._map.size() != self.entry.bytes:
            raise ShardSizeError(f"holds {self._map.size()} bytes now, not {self.entry.bytes}", file=self.entry.file)


def open_shard(path: Path, entry: ShardEntry, layout: ShardLayout) -> BinaryIO:
    """Opens a shard for reading after checking its size and header against its manifest entry."""
    try:
        if not stat.S_ISREG(os.stat(path / entry.file).st_mode):
            raise MissingShardError("is not a regular file", file=entry.file)
        file = open(path / entry.file, "rb")  # noqa: SIM115 -- the caller closes it
    except OSError as error:
        raise MissingShardError(f"cannot be read ({error.strerror})", file=entry.file) from error
    try:
        size = os.fstat(file.fileno()).st_size
        if size != entry.bytes:
            raise ShardSizeError(f"holds {size} bytes, not {entry.bytes}", file=entry.file)
        if file.read(len(layout.header)) != layout.header:
            raise ShardHeaderError("its header is not the one its manifest entry implies", file=entry.file)
    except BaseException:
        file.close()
        raise
    return file
