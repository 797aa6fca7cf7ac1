"""Rows of a teacher in the store's encoding, decoded on demand: ``PackedLogits`` and ``PackedHidden``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.sparse_logits import SparseLogits, as_temperatures, check_normaliser, check_rest, join_rests

# uint8 values are quantised logits; the others are logits.
VALUE_DTYPES = (torch.uint8, torch.bfloat16, torch.float32)
# Logit of the one entry by which a row without entries is encoded. Every codec holds it exactly.
EMPTY_ROW_LOGIT = -(2.0**127)


def row_words(vocab_size: int, top_k: int) -> int:
    """Returns the number of 32-bit words that hold the ids of a row of ``top_k`` entries (store/FORMAT.md)."""
    low_bits = (vocab_size // top_k).bit_length() - 1
    buckets = ((vocab_size - 1) >> low_bits) + 1
    return (top_k * low_bits + 31) // 32 + (top_k + buckets + 31) // 32


def clear_empty_rows(ids: Tensor, logits: Tensor) -> None:
    """Gives decoded rows (N, K) that consist of the entry of an empty row the id -1 and the logit 0, in place."""
    is_empty = logits[:, :1] == EMPTY_ROW_LOGIT
    if ids.shape[1] > 1:
        is_empty &= ids[:, 1:2] == -1
    ids[:, :1].masked_fill_(is_empty, -1)
    logits[:, :1].masked_fill_(is_empty, 0.0)


_Rows = TypeVar("_Rows", bound="RowFields")


class RowFields:
    """The common part of records whose tensors have a row for each of N rows of a teacher."""

    values: Tensor

    def to(self: _Rows, device: torch.device | str | int, *, non_blocking: bool = False) -> _Rows:
        """Moves every field to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: _Rows, device: torch.device | str | None = None) -> _Rows:
        """Copies every field to pinned memory, from which a copy to a GPU can be asynchronous."""
        return self._map(lambda tensor: tensor.pin_memory(device))

    def __getitem__(self: _Rows, index) -> _Rows:
        """Selects rows by a slice, a mask, or a tensor or list of indices."""
        if isinstance(index, (int, tuple)) or index is None or index is Ellipsis:
            raise TypeError(f"rows are selected by a slice, a mask or a list of indices, got {index!r}")
        return self._map(lambda tensor: tensor[index])

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of every field."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """The bytes of all fields, which a copy to another device moves."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return {name: field for name, field in vars(self).items() if isinstance(field, Tensor)}

    def _map(self: _Rows, function) -> _Rows:
        return cast(Any, dataclasses.replace)(
            self, **{name: function(tensor) for name, tensor in self._tensors().items()}
        )


@dataclasses.dataclass(frozen=True, eq=False)
class PackedLogits(RowFields):
    """The content of ``SparseLogits`` for N flat rows, packed. :func:`slimkernels.decode_logits` unpacks it.

    Attributes:
        id_words: (N, W) int32, read as uint32. The Elias-Fano words of every row's ids. Their number depends on V and
            on the row's number of entries; the surplus words of a row that needs fewer than W are never read.
        values: (N, K) uint8, bfloat16 or float32. The logits; 6-bit codes take one byte each. The surplus values of a
            row that keeps fewer than K entries are never read.
        lse: (N, M) float32, as in SparseLogits.
        vocab_size: V, 1 to 2^31 - 1.
        affine: (N, 2) float32 with uint8 values, else None. Scale and zero of a row: logit = zero + scale * value.
        counts: (N,) int32, 1 to K. The number of entries of every row; None if all rows keep K.
        temperatures: The temperature of each column of ``lse``. The first is 1.0.
        target_logit: (N,) float32 or None, as in SparseLogits.
        rest_lse: (N, M) float32 or None, as in SparseLogits.

    Raises:
        TypeError: A field has another dtype.
        ValueError: Shapes or devices of the fields do not match, or K is not in [1, V].
    """

    id_words: Tensor
    values: Tensor
    lse: Tensor
    vocab_size: int
    affine: Tensor | None = None
    counts: Tensor | None = None
    temperatures: tuple[float, ...] = (1.0,)
    target_logit: Tensor | None = None
    rest_lse: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", as_temperatures(self.temperatures))
        for name in ("id_words", "values", "lse"):
            _checks.check_tensor(getattr(self, name), name)
        if self.values.dtype not in VALUE_DTYPES:
            raise TypeError(f"values must be uint8, bfloat16 or float32, got {self.values.dtype}")
        if self.values.ndim != 2 or not 1 <= self.values.shape[1] <= self.vocab_size < 2**31:
            raise ValueError(
                f"values must have shape (N, K) with 1 <= K <= vocab_size < 2^31, got {tuple(self.values.shape)} and "
                f"vocab_size={self.vocab_size}"
            )
        num_rows, top_k = self.values.shape
        # A row with fewer entries can need a word more than one with K, so W is only known if all rows keep K.
        words = row_words(self.vocab_size, top_k) if self.counts is None else (self.id_words.shape or (0,))[-1]
        _check(self.id_words, "id_words", torch.int32, (num_rows, words))
        if (self.affine is None) != (self.values.dtype != torch.uint8):
            raise ValueError("affine must be given if values are uint8, and only then")
        _check(self.affine, "affine", torch.float32, (num_rows, 2))
        _check(self.counts, "counts", torch.int32, (num_rows,))
        _check(self.target_logit, "target_logit", torch.float32, (num_rows,))
        _check(self.lse, "lse", torch.float32, (num_rows, len(self.temperatures)))
        check_normaliser(self.lse, self.temperatures, (num_rows,))
        check_rest(self.rest_lse, self.lse)
        for name, tensor in self._tensors().items():
            if tensor.device != self.values.device:
                raise ValueError(f"{name} must be on {self.values.device} like values, got {tensor.device}")

    @property
    def top_k(self) -> int:
        """K, the number of entries a row can keep."""
        return self.values.shape[1]

    @staticmethod
    def cat(parts: Sequence[PackedLogits]) -> PackedLogits:
        """Concatenates rows. The result has ``counts`` if the parts keep different numbers of entries.

        Raises:
            ValueError: There are no parts, their vocabularies, codecs or temperatures differ, or only some have a
                target_logit.
        """
        if not parts:
            raise ValueError("parts must hold at least one PackedLogits, got none")
        for name in ("vocab_size", "temperatures"):
            if len(found := {getattr(part, name) for part in parts}) > 1:
                raise ValueError(f"parts must share {name}, got {sorted(found)}")
        if len(dtypes := {part.values.dtype for part in parts}) > 1:
            raise ValueError(f"parts must share the dtype of their values, got {sorted(map(str, dtypes))}")
        if len({part.target_logit is None for part in parts}) > 1:
            raise ValueError("either all parts or no part must have a target_logit")
        uniform = all(part.counts is None and part.top_k == parts[0].top_k for part in parts)

        def join(field: str) -> Any:
            tensors = [getattr(part, field) for part in parts]
            if tensors[0] is None:
                return None
            width = max(tensor.shape[-1] for tensor in tensors)
            if tensors[0].ndim == 2:
                tensors = [torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]
            return torch.cat(tensors)

        def counts_of(part: PackedLogits) -> Tensor:
            if part.counts is not None:
                return part.counts
            return torch.full((len(part),), part.top_k, dtype=torch.int32, device=part.device)

        return PackedLogits(
            counts=None if uniform else torch.cat([counts_of(part) for part in parts]),
            vocab_size=parts[0].vocab_size,
            temperatures=parts[0].temperatures,
            rest_lse=join_rests(parts, torch.cat),
            **{field: join(field) for field in ("id_words", "values", "affine", "lse", "target_logit")},
        )


class HeadWeights(NamedTuple):
    """A teacher's head, as ``linear_topk_logits`` takes it.

    Attributes:
        weight: (V, D) float32, bfloat16 or float16.
        bias: (V,) of the same dtype, or None.
        softcap: Positive limit of the logits, or None.
        logit_scale: Positive factor on the logits, applied before the softcap.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


class HeadSource(Protocol):
    """A place that a teacher's head is read from, small enough to be sent with every batch; equal to itself alone."""

    def on(self, device: torch.device) -> HeadWeights:
        """Returns the head on a device, where it stays for the next call."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class PackedHidden(RowFields):
    """N hidden states of a teacher, and the head from which :func:`slimkernels.decode_logits` makes their rows.

    Attributes:
        values: (N, D) bfloat16, the hidden states; or int8, with hidden state = scale * value.
        target: (N,) int64. The label of every row, whose logit is kept.
        head: Source of the teacher's head, over V ids.
        vocab_size: V.
        top_k: K, 1 to V. Number of logits that are kept of a row.
        scale: (N,) float32 with int8 values, else None.
        temperatures: Temperatures of the log-sum-exp of a row. The first is 1.0.

    Raises:
        TypeError: A field has another dtype.
        ValueError: Shapes or devices of the fields do not match, or K is not in [1, V].
    """

    values: Tensor
    target: Tensor
    head: HeadSource
    vocab_size: int
    top_k: int
    scale: Tensor | None = None
    temperatures: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", as_temperatures(self.temperatures))
        if self.values.dtype not in (torch.int8, torch.bfloat16):
            raise TypeError(f"values must be int8 or bfloat16, got {self.values.dtype}")
        if self.values.ndim != 2 or not 1 <= self.top_k <= self.vocab_size < 2**31:
            raise ValueError(
                f"values must have shape (N, D), and 1 <= top_k <= vocab_size < 2^31, got {tuple(self.values.shape)}, "
                f"top_k={self.top_k} and vocab_size={self.vocab_size}"
            )
        if (self.scale is None) != (self.values.dtype != torch.int8):
            raise ValueError("scale must be given if values are int8, and only then")
        _check(self.scale, "scale", torch.float32, self.values.shape[:1])
        _check(self.target, "target", torch.int64, self.values.shape[:1])
        for name, tensor in self._tensors().items():
            if tensor.device != self.values.device:
                raise ValueError(f"{name} must be on {self.values.device} like values, got {tensor.device}")

    @staticmethod
    def cat(parts: Sequence[PackedHidden]) -> PackedHidden:
        """Concatenates rows.

        Raises:
            ValueError: There are no parts, or they have another head, codec, K or temperatures.
        """
        if not parts:
            raise ValueError("parts must hold at least one PackedHidden, got none")
        first = parts[0]
        for name in ("vocab_size", "top_k", "temperatures", "head"):
            if any(getattr(part, name) != getattr(first, name) for part in parts):
                raise ValueError(f"parts must share {name}, got {[getattr(part, name) for part in parts]}")
        if len(dtypes := {part.values.dtype for part in parts}) > 1:
            raise ValueError(f"parts must share the dtype of their values, got {sorted(map(str, dtypes))}")
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in first._tensors()}
        return dataclasses.replace(first, **tensors)

    def hidden(self, dtype: torch.dtype) -> Tensor:
        """Returns the hidden states (N, D) in a dtype; those of 8 bits are computed in float32."""
        if self.scale is None:
            return self.values.to(dtype)
        return (self.scale[:, None] * self.values.float()).to(dtype)


def check_sparse_logits(value: Any, name: str) -> None:
    """Raises TypeError unless ``value`` is a SparseLogits; packed rows are told how to become one."""
    if isinstance(value, PackedLogits | PackedHidden):
        raise TypeError(
            f"{name} must be a SparseLogits, got {type(value).__name__}: decode it with "
            f"slimkernels.decode_logits({name}), or open the data set with packed=False"
        )
    if not isinstance(value, SparseLogits):
        raise TypeError(
            f"{name} must be a SparseLogits, got {type(value).__name__}: make one with topk_logits (HeadTeacher is for "
            "linear_slim_loss alone)"
        )


def _check(tensor: Tensor | None, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor is None:
        return
    _checks.check_tensor(tensor, name)
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} to match values, got {tuple(tensor.shape)}")


# Files of torch.save hold a record by the name of its class, which torch.load reads only if it is told to.
torch.serialization.add_safe_globals([PackedLogits])
