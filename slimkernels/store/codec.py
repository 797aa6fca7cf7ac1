"""Encodes rows of kept ids and logits as bytes, decodes them, and hashes documents; all in numpy arrays."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from typing import Any

import numpy as np
import torch  # also loads the libraries that _C is linked to

from slimkernels._checks import missing_extension
from slimkernels.packed_logits import EMPTY_ROW_LOGIT, clear_empty_rows, row_words
from slimkernels.store.errors import (
    ByteOrderError,
    RowChecksumError,
    RowDataError,
    ShardIndexError,
    StoreError,
)

try:
    from slimkernels import _C
except ImportError as error:
    raise ImportError(missing_extension(error)) from error

# Bits of one stored logit.
VALUE_BITS = {"affine8": 8, "affine6": 6, "bfloat16": 16, "float32": 32}
# Codecs with a scale and a zero per row.
AFFINE_CODECS = ("affine8", "affine6")
# Distance in nats below the maximum of a row beyond which a writer drops an entry. Only the affine codecs spread their
# values over the whole row: at most 40 nats, a step is at most 0.16 (affine8).
FAR_NATS = {"affine8": 40.0, "affine6": 30.0}
HASH_BYTES = 16

# Messages for the values of RowFault in csrc/store/elias_fano.h.
_FAULTS = {
    1: "its offsets lie outside the shard or disagree with its number of entries",
    2: "its bytes are not those that were written",
    3: "its bitmap does not hold one bit per entry, or a padding bit is set",
    4: "its ids are not strictly ascending",
    5: "it holds an id outside [0, {vocab_size})",
    6: "it holds an id after padding (-1)",
    7: "it keeps no entry",
    8: "it keeps a logit that is NaN or infinite",
    9: "its logits are too large for codec {codec!r}",
    10: "its scale or zero is not one that an encoder writes",
    11: "its lse is NaN or infinite",
    12: "its target_logit is +inf",
    13: "it keeps more probability than its lse allows (logsumexp(logits) > lse)",
    14: "a padding bit after its values is set",
    15: "its rest_lse is +inf",
    16: "its rest_lse is above its lse, but the rest is a part of the whole row",
}
_ADVICE = {
    8: ": leave such entries out, padding the row with id -1",
    9: ": use codec='float32'",
    13: ": lse must be that of the whole row at temperature 1",
    16: ": rest_lse must be that of the entries outside ids at the temperature of its column",
}
_OFFSETS_FAULT, _CHECKSUM_FAULT = 1, 2
_NO_REST = np.empty(0, np.float32)


def require_little_endian() -> None:
    """Raises on a host that cannot read the format in place.

    Raises:
        ByteOrderError: The host is big-endian.
    """
    if sys.byteorder != "little":
        raise ByteOrderError(
            "the store's files are little-endian and are read in place, but this host is big-endian: "
            "read the store on a little-endian host"
        )


def document_hash(input_ids: np.ndarray) -> bytes:
    """Returns the 16 bytes that identify a document: BLAKE2b-128 of its ids as little-endian int32."""
    return hashlib.blake2b(np.ascontiguousarray(input_ids, dtype="<i4").tobytes(), digest_size=HASH_BYTES).digest()


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedRows:
    """Encoded rows, in the form in which a shard holds them.

    Attributes:
        counts: (R,) int64, the number of entries of each row.
        id_words: (sum of words,) uint32.
        values: (sum of value bytes,) uint8, the rows one after the other without a gap.
        affine: (R, 2) float32, scale and zero; (0,) unless the codec is affine8 or affine6.
        lse: (R, M) float32.
        target_logit: (R,) float32.
        checksums: (R,) uint64, of the rows without ``rest_lse``.
        rest_lse: (R, M) float32, or None.
    """

    counts: np.ndarray
    id_words: np.ndarray
    values: np.ndarray
    affine: np.ndarray
    lse: np.ndarray
    target_logit: np.ndarray
    checksums: np.ndarray
    rest_lse: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def nbytes(self) -> int:
        """The bytes that the rows take in a shard, without their offsets."""
        arrays = (
            *(self.id_words, self.values, self.affine, self.lse, self.target_logit, self.checksums),
            *(() if self.rest_lse is None else (self.rest_lse,)),
        )
        return sum(array.nbytes for array in arrays)

    def rest_or_unknown(self) -> np.ndarray:
        """Returns ``rest_lse``, or NaN in its place where there is none."""
        return np.full_like(self.lse, np.nan) if self.rest_lse is None else self.rest_lse

    def checksums_with_rest(self) -> np.ndarray:
        """Returns the (R,) uint64 checksums of the rows in a shard that holds ``rest_lse``."""
        checksums = self.checksums.copy()
        _C.store_checksums_with_rest(checksums, self.rest_or_unknown())
        return checksums


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """Returns the (R + 1,) int64 offsets, starting with 0, of (R,) counts."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def words_of(vocab_size: int, counts: np.ndarray) -> np.ndarray:
    """Returns (R,) int64 words per row for (R,) entries per row."""
    distinct, inverse = np.unique(counts, return_inverse=True)
    words = np.array([row_words(vocab_size, int(count)) if count > 0 else 0 for count in distinct], np.int64)
    return words[inverse.reshape(-1)]


def value_bytes(codec: str, count: Any) -> Any:
    """Returns the bytes of a row's values for its number of entries; an integer or an array of them."""
    return (count * VALUE_BITS[codec] + 7) // 8


def ragged_value_offset(codec: str, row: Any, entry_offset: Any) -> Any:
    """Returns the offset of the values of a row of a ragged shard from that of its entries; integers or arrays."""
    return 6 * entry_offset // 8 + row if codec == "affine6" else value_bytes(codec, entry_offset)


def ragged_values(codec: str, counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Moves the values of ragged rows, which follow each other without a gap, to their offsets in a shard."""
    if codec != "affine6":
        return values
    sizes = value_bytes(codec, counts)
    starts = offsets_of(sizes)
    places = ragged_value_offset(codec, np.arange(len(counts) + 1), offsets_of(counts))
    spread = np.zeros(places[-1], np.uint8)
    for start, size, place in zip(starts.tolist(), sizes.tolist(), places.tolist(), strict=False):
        spread[place : place + size] = values[start : start + size]
    return spread


def encode_rows(
    ids: np.ndarray,
    logits: np.ndarray,
    lse: np.ndarray,
    target_logit: np.ndarray,
    *,
    rest_lse: np.ndarray | None = None,
    vocab_size: int,
    codec: str,
    first_row: int,
) -> EncodedRows:
    """Encodes rows as rows ``first_row``, ``first_row + 1``, ... of a shard.

    Args:
        ids: (R, K) int32, C-contiguous, ascending, ``-1`` padding at the end. A row may consist of padding if its
            ``rest_lse`` is its ``lse``.
        logits: (R, K) float32, C-contiguous; the values at padding are not read.
        lse: (R, M) float32, C-contiguous.
        target_logit: (R,) float32.
        rest_lse: (R, M) float32, C-contiguous, or None.
        vocab_size: V.
        codec: A key of ``VALUE_BITS``.
        first_row: Index of the first row in its shard, which its checksum covers.

    Returns:
        The encoded rows.

    Raises:
        ValueError: A row cannot be stored; the message names the first one and the reason.
    """
    ids, logits = _with_entry_of_empty_rows(ids, logits, lse, rest_lse)
    counts = np.minimum((ids != -1).sum(-1, dtype=np.int64), vocab_size)
    entry_offsets, id_word_offsets = offsets_of(counts), offsets_of(words_of(vocab_size, counts))
    rows = len(counts)
    encoded = EncodedRows(
        counts=counts,
        id_words=np.empty(id_word_offsets[-1], np.uint32),
        values=np.empty(value_bytes(codec, counts).sum(), np.uint8),
        affine=np.empty((rows, 2) if codec in AFFINE_CODECS else 0, np.float32),
        lse=lse,
        target_logit=target_logit,
        checksums=np.empty(rows, np.uint64),
        rest_lse=rest_lse,
    )
    row, fault = _C.store_encode_rows(
        vocab_size=vocab_size,
        codec=codec,
        first=first_row,
        ids=ids,
        logits=logits,
        lse=lse,
        rest_lse=_NO_REST if rest_lse is None else rest_lse,
        target_logit=target_logit,
        entry_offsets=entry_offsets,
        id_word_offsets=id_word_offsets,
        id_words=encoded.id_words,
        values=encoded.values,
        affine=encoded.affine,
        checksums=encoded.checksums,
    )
    if row >= 0:
        reason = _FAULTS[fault].format(vocab_size=vocab_size, codec=codec) + _ADVICE.get(fault, "")
        raise ValueError(f"row {row} of the teacher's SparseLogits cannot be stored: {reason}")
    return encoded


def _with_entry_of_empty_rows(
    ids: np.ndarray, logits: np.ndarray, lse: np.ndarray, rest_lse: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Gives the rows that keep nothing, because all of their mass is in the rest, the entry that stands for that."""
    if rest_lse is None or not ids.shape[1]:
        return ids, logits
    is_empty = (ids[:, 0] == -1) & (rest_lse == lse).all(-1)
    if not is_empty.any():
        return ids, logits
    ids, logits = ids.copy(), logits.copy()
    ids[is_empty, 0], logits[is_empty, 0] = 0, EMPTY_ROW_LOGIT
    return ids, logits


def decode_rows(
    *,
    vocab_size: int,
    codec: str,
    top_k: int | None,
    first_row: int,
    num_rows: int,
    width: int,
    arrays: dict[str, np.ndarray],
    file: str,
    document: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes rows [first_row, first_row + num_rows) of a shard, checking every byte of them.

    Args:
        vocab_size: V.
        codec: A key of ``VALUE_BITS``.
        top_k: K of every row of the shard, or None if they differ.
        first_row: Index of the first row in the shard.
        num_rows: R, the number of rows to decode.
        width: K of the result, at least that of the largest row.
        arrays: All tensors of the shard by name, flat or in the shapes of the format; ``rest_lse`` only if it has one.
        file: Name of the shard, for errors.
        document: Index of the document in the store, for errors.

    Returns:
        ids (R, width) int32, padded with -1, and logits (R, width) float32, padded with 0. Rows that were encoded
        without entries consist of padding.

    Raises:
        RowChecksumError: The bytes of a row are not those that were written.
        RowDataError: A row is not one that an encoder writes.
        ShardIndexError: The offsets of a row lie outside the shard.
    """
    ids = np.empty((num_rows, width), np.int32)
    logits = np.empty((num_rows, width), np.float32)
    none = np.empty(0, np.int64)
    bad, fault = _C.store_decode_rows(
        vocab_size=vocab_size,
        codec=codec,
        top_k=top_k or 0,
        first=first_row,
        entry_offsets=arrays.get("entry_offsets", none),
        id_word_offsets=arrays.get("id_word_offsets", none),
        id_words=arrays["id_words"],
        values=arrays["values"],
        affine=arrays["affine"] if codec in AFFINE_CODECS else np.empty(0, np.float32),
        lse=arrays["lse"],
        rest_lse=arrays.get("rest_lse", _NO_REST),
        target_logit=arrays["target_logit"],
        checksums=arrays["row_checksums"],
        out_ids=ids,
        out_logits=logits,
    )
    if bad >= 0:
        kind: type[StoreError] = {_OFFSETS_FAULT: ShardIndexError, _CHECKSUM_FAULT: RowChecksumError}.get(
            fault, RowDataError
        )
        reason = _FAULTS[fault].format(vocab_size=vocab_size, codec=codec)
        raise kind(reason, file=file, document=document, row=first_row + bad)
    clear_empty_rows(torch.from_numpy(ids), torch.from_numpy(logits))
    return ids, logits


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
    """Encoded rows, each padded to the width of the widest.

    Attributes:
        id_words: (R, W) uint32.
        values: (R, K) unsigned integers, the bits of the values; those of 6 bits take a byte each.
        counts: (R,) int32, or None if every row keeps K entries.
    """

    id_words: np.ndarray
    values: np.ndarray
    counts: np.ndarray | None


def packed_rows(
    *, vocab_size: int, codec: str, top_k: int | None, first_row: int, num_rows: int, arrays: dict[str, np.ndarray]
) -> PackedRows:
    """Copies rows out of a shard; the arguments are those of ``decode_rows``, which must have checked the rows."""
    last_row = first_row + num_rows
    if top_k is not None:
        words = row_words(vocab_size, top_k)
        values = arrays["values"].reshape(-1, value_bytes(codec, top_k))
        return PackedRows(
            id_words=arrays["id_words"].reshape(-1, words)[first_row:last_row].copy(),
            values=_as_numbers(codec, values[first_row:last_row], top_k),
            counts=None,
        )
    entry_offsets = arrays["entry_offsets"][first_row : last_row + 1]
    counts = np.diff(entry_offsets)
    values = _padded(arrays["values"], ragged_value_offset(codec, np.arange(first_row, last_row + 1), entry_offsets))
    return PackedRows(
        id_words=_padded(arrays["id_words"], arrays["id_word_offsets"][first_row : last_row + 1]),
        values=_as_numbers(codec, values, int(counts.max(initial=1))),
        counts=counts.astype(np.int32),
    )


def _as_numbers(codec: str, values: np.ndarray, width: int) -> np.ndarray:
    """Copies (R, bytes) uint8, which may be one byte wider than the values need, to (R, width) unsigned integers."""
    if len(values) == 0:
        return np.zeros((0, width), f"<u{-(-VALUE_BITS[codec] // 8)}")
    if codec != "affine6":
        return values.view(f"<u{VALUE_BITS[codec] // 8}").copy()
    # Four values are three bytes.
    groups = -(-width // 4)
    values = np.pad(values, ((0, 0), (0, 2)))[:, : 3 * groups]
    first, second, third = (values[:, i::3] for i in range(3))
    numbers = np.empty((len(values), groups, 4), np.uint8)
    numbers[..., 0] = first & 63
    numbers[..., 1] = first >> 6 | (second & 15) << 2
    numbers[..., 2] = second >> 4 | (third & 3) << 4
    numbers[..., 3] = third >> 2
    return numbers.reshape(len(values), -1)[:, :width].copy()


def _padded(flat: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Copies ragged rows [offsets[r], offsets[r + 1]) of ``flat`` to (R, largest width, at least 1), padded with 0."""
    sizes = np.diff(offsets)
    rows = np.zeros((len(sizes), sizes.max(initial=1)), flat.dtype)
    rows[np.arange(rows.shape[1]) < sizes[:, None]] = flat[offsets[0] : offsets[-1]]
    return rows
