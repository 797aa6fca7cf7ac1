"""Encodes a teacher's final hidden states as bytes, and decodes them, for the codecs that keep them (FORMAT.md)."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import torch
from torch import Tensor

from slimkernels.store.errors import RowChecksumError, RowDataError

# Bits of one number of a stored hidden state.
HIDDEN_BITS = {"hidden8": 8, "hidden16": 16}
# Values of 8 bits are -127 to 127.
_LAST_VALUE = 127
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedHidden:
    """Encoded hidden states, in the form in which a shard holds them.

    Attributes:
        values: (R, D) int8, or bfloat16 as uint16.
        scale: (R,) float32 with int8 values; else (0,).
        checksums: (R,) uint64.
    """

    values: np.ndarray
    scale: np.ndarray
    checksums: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        """The bytes that the rows take in a shard."""
        return self.values.nbytes + self.scale.nbytes + self.checksums.nbytes


def encode_hidden(hidden: Tensor, *, hidden_size: int, codec: str, first_row: int) -> EncodedHidden:
    """Encodes hidden states as rows ``first_row``, ``first_row + 1``, ... of a shard.

    Args:
        hidden: (R, D) of any floating-point dtype.
        hidden_size: D.
        codec: A key of ``HIDDEN_BITS``.
        first_row: Index of the first row in its shard, which its checksum covers.

    Returns:
        The encoded rows.

    Raises:
        ValueError: The shape is another one, or a hidden state is not finite.
    """
    if hidden.ndim != 2 or hidden.shape[1] != hidden_size or not hidden.is_floating_point():
        raise ValueError(
            f"teacher must be hidden states of shape (R, {hidden_size}) and a floating-point dtype with "
            f"codec={codec!r}, got {tuple(hidden.shape)} {hidden.dtype}"
        )
    hidden = hidden.detach().to("cpu", torch.float32)
    rounded = hidden if codec == "hidden8" else hidden.bfloat16()
    is_bad = ~torch.isfinite(rounded).all(-1)
    if is_bad.any():
        raise ValueError(f"row {int(is_bad.nonzero()[0])} of the teacher's hidden states is not finite")
    scale = np.empty(0, np.float32)
    if codec == "hidden8":
        # Divided first, because the reciprocal of a small scale can be infinite.
        steps = (hidden.abs().amax(-1) / _LAST_VALUE).clamp(min=_SMALLEST_SCALE)
        values = (hidden / steps[:, None]).round().clamp(-_LAST_VALUE, _LAST_VALUE).to(torch.int8).numpy()
        scale = steps.numpy()
    else:
        values = rounded.contiguous().view(torch.int16).numpy().view(np.uint16)
    return EncodedHidden(values, scale, _checksums(values, scale, first_row))


def decode_hidden(
    values: np.ndarray,
    scale: np.ndarray,
    checksums: np.ndarray,
    *,
    first_row: int,
    file: str,
    document: int,
) -> tuple[Tensor, Tensor | None]:
    """Copies rows out of a shard, and checks every byte of them.

    Args:
        values: (R, D) int8, or bfloat16 as uint16.
        scale: (R,) float32 with int8 values; else (0,).
        checksums: (R,) uint64.
        first_row: Index of the first row in its shard.
        file: Name of the shard, for errors.
        document: Index of the document in the store, for errors.

    Returns:
        The values (R, D), int8 or bfloat16, and the scale (R,) float32 or None.

    Raises:
        RowChecksumError: The bytes of a row are not those that were written.
        RowDataError: A row is not one that an encoder writes.
    """
    values, scale = values.copy(), scale.copy()
    bad = np.flatnonzero(_checksums(values, scale, first_row) != checksums)
    if len(bad):
        place = {"file": file, "document": document, "row": first_row + int(bad[0])}
        raise RowChecksumError("its bytes are not those that were written", **place)
    if values.dtype == np.int8:
        is_bad = (values == -_LAST_VALUE - 1).any(-1) | ~np.isfinite(scale) | (scale < _SMALLEST_SCALE)
        tensor = torch.from_numpy(values)
    else:
        tensor = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        is_bad = ~torch.isfinite(tensor).all(-1).numpy()
    if is_bad.any():
        place = {"file": file, "document": document, "row": first_row + int(np.flatnonzero(is_bad)[0])}
        raise RowDataError("its hidden state or scale is not one that an encoder writes", **place)
    return tensor, torch.from_numpy(scale) if values.dtype == np.int8 else None


def _checksums(values: np.ndarray, scale: np.ndarray, first_row: int) -> np.ndarray:
    """Returns the (R,) uint64 checksums: BLAKE2b-64 of the row's index, its scale if it has one, and its values."""
    found = np.empty(len(values), "<u8")
    for row in range(len(values)):
        digest = hashlib.blake2b(digest_size=8)
        digest.update((first_row + row).to_bytes(8, "little"))
        if len(scale):
            digest.update(scale[row].tobytes())
        digest.update(values[row].tobytes())
        found[row] = int.from_bytes(digest.digest(), "little")
    return found
