"""Encodes what a teacher says of one document into the rows that a store keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimkernels.sparse_logits import SparseLogits
from slimkernels.store.codec import FAR_NATS, EncodedRows, encode_rows
from slimkernels.store.format import StoreSettings
from slimkernels.store.hidden import HIDDEN_BITS, EncodedHidden, encode_hidden


def encode_teacher(
    settings: StoreSettings, ids: np.ndarray, positions: np.ndarray, teacher: Any, *, first_row: int, with_rest: bool
) -> EncodedRows | EncodedHidden:
    """Encodes the rows of one document for a store of some settings.

    Args:
        settings: Settings of the store.
        ids: (T,) int32 tokens of the document.
        positions: (R,) int32 of the labels.
        teacher: SparseLogits (R, K), or hidden states (R, D) in a store of them.
        first_row: Number of the first row, for errors.
        with_rest: Whether the store's version keeps ``rest_lse``.

    Raises:
        ValueError: ``teacher`` is not what the store keeps, has another number of rows, or a row is invalid.
    """
    if settings.hidden is not None:
        return _encode_hidden(settings.codec, settings.hidden.hidden_size, positions, teacher, first_row)
    return _encode_logits(settings, ids, positions, teacher, first_row, with_rest)


def _encode_hidden(codec: str, hidden_size: int, positions: np.ndarray, hidden: Any, first_row: int) -> EncodedHidden:
    if not isinstance(hidden, Tensor) or hidden.shape[:1] != (len(positions),):
        found = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(
            f"teacher must be the hidden states of {len(positions)} positions with codec={codec!r}, shape "
            f"({len(positions)}, {hidden_size}), got {found}"
        )
    return encode_hidden(hidden, hidden_size=hidden_size, codec=codec, first_row=first_row)


def _encode_logits(
    settings: StoreSettings, ids: np.ndarray, positions: np.ndarray, teacher: Any, first_row: int, with_rest: bool
) -> EncodedRows:
    if not isinstance(teacher, SparseLogits):
        raise ValueError(
            f"teacher must be SparseLogits with codec={settings.codec!r}, got {type(teacher).__name__}: "
            f"hidden states need one of the codecs {list(HIDDEN_BITS)}"
        )
    if teacher.temperatures != settings.temperatures:
        raise ValueError(
            f"teacher must have the store's temperatures={settings.temperatures}, got {teacher.temperatures}"
        )
    if teacher.leading_shape != (len(positions),):
        raise ValueError(
            f"teacher must have a row for each of {len(positions)} positions, shape ({len(positions)}, K), "
            f"got leading shape {teacher.leading_shape}"
        )
    kept, logits = _as_array(teacher.ids, torch.int32), _as_array(teacher.logits, torch.float32)
    if teacher.target_logit is None:
        is_label = kept == ids[positions][:, None]
        target_logit = np.where(is_label, logits, -np.inf).max(-1, initial=-np.inf).astype(np.float32)
    else:
        target_logit = _as_array(teacher.target_logit, torch.float32)
    rest_lse = None
    if teacher.rest_lse is not None and with_rest:
        rest_lse = _as_array(teacher.rest_lse, torch.float64)
    if settings.codec in FAR_NATS:
        kept, logits, rest_lse = _without_far_entries(
            kept,
            logits,
            rest_lse,
            span=FAR_NATS[settings.codec] * max(settings.temperatures),
            temperatures=settings.temperatures,
        )
    return encode_rows(
        kept,
        logits,
        # Copied, because the caller may use the memory for something else before the rows are written.
        _as_array(teacher.lse, torch.float32).copy(),
        target_logit.copy(),
        rest_lse=None if rest_lse is None else rest_lse.astype(np.float32),
        vocab_size=settings.vocab_size,
        codec=settings.codec,
        first_row=first_row,
    )


def _without_far_entries(
    ids: np.ndarray, logits: np.ndarray, rest_lse: np.ndarray | None, *, span: float, temperatures: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Drops the finite logits (R, K) that lie more than ``span`` below the maximum of their row.

    The probability of a dropped entry is at most exp(-span) of the largest one and counts with the entries that are
    not kept: it is added to ``rest_lse`` (R, M) float64. Rows without such an entry are returned as they are.
    """
    is_entry = ids != -1
    largest = np.where(is_entry, logits, -np.inf).max(-1, keepdims=True, initial=-np.inf)
    # An infinite logit, which no row may have, is left for the encoder to refuse.
    is_far = is_entry & np.isfinite(logits) & (logits < largest - np.float32(span)) & np.isfinite(largest)
    if not is_far.any():
        return ids, logits, rest_lse
    order = np.argsort(is_far, axis=-1, kind="stable")
    gone = np.take_along_axis(is_far, order, -1)
    if rest_lse is not None:
        rows = is_far.any(-1)
        far = np.where(is_far[rows], logits[rows].astype(np.float64), -np.inf)
        dropped = np.stack([np.logaddexp.reduce(far / temperature, -1) for temperature in temperatures], -1)
        # A rest of NaN, which is not known, stays NaN.
        with np.errstate(invalid="ignore"):
            together = np.logaddexp(rest_lse[rows], dropped)
        rest_lse = np.array(rest_lse)
        rest_lse[rows] = together
    return (
        np.where(gone, np.int32(-1), np.take_along_axis(ids, order, -1)),
        np.where(gone, np.float32(0), np.take_along_axis(logits, order, -1)),
        rest_lse,
    )


def _as_array(tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    return tensor.detach().to("cpu", dtype).contiguous().numpy()
