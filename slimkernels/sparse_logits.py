"""``SparseLogits``, the type that carries a teacher's rows to the student: the kept logits and the exact normaliser."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

from slimkernels import _checks
from slimkernels.mixture.fields import mixed_fields

# Smallest share of a row that 1 minus the printed probabilities of the others resolves.
_LEAST_REST = 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class SparseLogits:
    """The K kept logits of every row, with the log-sum-exp of the WHOLE row.

    The teacher's exact probability of a kept id is ``exp(logits / T - lse_at(T))``. The kept mass of a row is the sum
    of these, at most 1. In the shapes, ``...`` stands for any leading dimensions, the same in every field.

    Attributes:
        ids: (..., K) int32. Kept vocabulary ids, ascending; rows that keep fewer than K end in ``-1``.
        logits: (..., K) float32, bfloat16, float16, float64, float8_e4m3fn or float8_e5m2. Raw logits at ``ids``, or
            log-probabilities (then ``lse`` is 0). The values at padding are never read. The ops convert float8 to
            bfloat16, which holds all of its values.
        lse: (..., M) float32 (float64 with float64 logits). Log-sum-exp of the whole row divided by each of
            the M temperatures.
        temperatures: The temperature of each column of ``lse``. The first is 1.0.
        target_logit: (...) float32 or None. The raw logit of the label token, whether or not the label is among
            ``ids``; NaN if it is unknown or the row has no label.
        rest_lse: (..., M) in the dtype of ``lse``, or None. Log-sum-exp of the entries that are NOT in ``ids``, divided
            by each temperature: -inf where nothing is left out, NaN for a row whose rest is unknown. Subtracting
            the kept entries from ``lse`` would lose a small rest to rounding. None if it is unknown for all rows.
    """

    ids: Tensor
    logits: Tensor
    lse: Tensor
    temperatures: tuple[float, ...] = (1.0,)
    target_logit: Tensor | None = None
    rest_lse: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", as_temperatures(self.temperatures))
        for name in ("ids", "logits", "lse"):
            _checks.check_tensor(getattr(self, name), name)
        if self.target_logit is not None:
            _checks.check_tensor(self.target_logit, "target_logit")
        if self.ids.dtype != torch.int32:
            raise TypeError(f"ids must have dtype torch.int32, got {self.ids.dtype}: call ids.to(torch.int32)")
        if not self.logits.is_floating_point():
            raise TypeError(f"logits must have a floating-point dtype, got {self.logits.dtype}")
        if self.ids.ndim < 1 or self.ids.shape != self.logits.shape:
            raise ValueError(
                f"ids and logits must have the same shape (..., K), got {_shape(self.ids)} and {_shape(self.logits)}"
            )
        check_normaliser(self.lse, self.temperatures, self.leading_shape)
        check_rest(self.rest_lse, self.lse)
        if self.target_logit is not None and self.target_logit.shape != self.leading_shape:
            raise ValueError(f"target_logit must have shape {self.leading_shape}, got {_shape(self.target_logit)}")

    @property
    def leading_shape(self) -> tuple[int, ...]:
        """The shape without K: (N,) for flat rows."""
        return tuple(self.ids.shape[:-1])

    @property
    def top_k(self) -> int:
        """K, the number of entries a row can keep."""
        return self.ids.shape[-1]

    @property
    def device(self) -> torch.device:
        """The device of every field."""
        return self.ids.device

    def column_of(self, temperature: float) -> int | None:
        """Returns the column of ``lse`` that holds a temperature, None if the teacher was not captured at it."""
        for column, captured in enumerate(self.temperatures):
            # This is math.isclose, which a compiler does not trace.
            if abs(captured - temperature) <= 1e-6 * max(captured, temperature):
                return column
        return None

    def lse_at(self, temperature: float) -> Tensor:
        """Returns the whole row's log-sum-exp at one temperature, shape (...).

        Raises:
            ValueError: The teacher was not captured at this temperature.
        """
        column = self.column_of(temperature)
        if column is not None:
            return self.lse[..., column]
        raise ValueError(
            f"temperature={temperature} is not among the teacher's temperatures={self.temperatures}; capture the "
            f"teacher with temperatures=(1.0, {temperature}), or use a rest that does not need its lse "
            "('renorm', 'renorm_both', 'zero_logit')"
        )

    def rest_lse_at(self, temperature: float) -> Tensor | None:
        """Returns the log-sum-exp of the entries outside ``ids`` at one temperature, shape (...), None if not known."""
        column = self.column_of(temperature)
        return None if self.rest_lse is None or column is None else self.rest_lse[..., column]

    def flatten(self) -> SparseLogits:
        """Returns the same rows with one leading dimension N."""
        return self._map(lambda t: t.reshape(-1, t.shape[-1]), lambda t: t.reshape(-1))

    def reshape(self, *leading_shape: int) -> SparseLogits:
        """Returns the same rows with another leading shape."""
        return self._map(lambda t: t.reshape(*leading_shape, t.shape[-1]), lambda t: t.reshape(leading_shape))

    def to(self, *args, **kwargs) -> SparseLogits:
        """Moves every field to a device, like ``Tensor.to``.

        Raises:
            TypeError: A dtype is given.
        """
        if any(isinstance(argument, (torch.dtype, Tensor)) for argument in (*args, *kwargs.values())):
            raise TypeError(
                "SparseLogits.to moves to a device and converts no dtype, because ids and lse must keep theirs: use "
                "dataclasses.replace(sparse, logits=sparse.logits.to(dtype))"
            )
        return self._map(lambda t: t.to(*args, **kwargs), lambda t: t.to(*args, **kwargs))

    def pin_memory(self, device: torch.device | str | None = None) -> SparseLogits:
        """Copies every field to pinned memory, as a ``DataLoader`` with ``pin_memory=True`` asks for."""
        return self._map(lambda t: t.pin_memory(device), lambda t: t.pin_memory(device))

    def __getitem__(self, index) -> SparseLogits:
        """Selects rows along the leading dimensions; an integer drops its dimension.

        Raises:
            IndexError: The index reaches the dimension of the kept entries.
        """
        parts = index if isinstance(index, tuple) else (index,)
        if any(part is Ellipsis for part in parts) or sum(map(_num_dimensions, parts)) > len(self.leading_shape):
            raise IndexError(
                f"an index selects rows along the leading dimensions {self.leading_shape}, never some of the K kept "
                f"entries, got {index!r}: keep fewer with topk_logits(top_k=...)"
            )
        return self._map(lambda t: t[index], lambda t: t[index])

    def __eq__(self, other: object) -> bool:
        """Returns whether both are the same object.

        Raises:
            TypeError: The other is another SparseLogits.
        """
        if self is not other and isinstance(other, SparseLogits):
            raise TypeError("SparseLogits have no ==: compare their fields, for example with torch.equal")
        return self is other

    __hash__ = object.__hash__

    def __len__(self) -> int:
        return self.ids.shape[0]

    @staticmethod
    def cat(parts: Sequence[SparseLogits]) -> SparseLogits:
        """Concatenates flat rows (N_i, K_i) to (sum N_i, max K_i), padding with ``-1``.

        Raises:
            ValueError: There are no parts, their temperatures differ, or only some have a target_logit.
            TypeError: Some are in float8 and others in another dtype.
        """
        return _join(parts, torch.cat)

    @staticmethod
    def stack(parts: Sequence[SparseLogits]) -> SparseLogits:
        """Stacks B records (..., K_i) of one leading shape to (B, ..., max K_i), padding with ``-1``.

        ``torch.utils.data.default_collate`` makes batches of samples in this way.

        Raises:
            ValueError: There are no parts, their temperatures or leading shapes differ, or only some have a
                target_logit.
        """
        shapes = {part.leading_shape for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"parts must share their leading shape, got {sorted(shapes)}: pad them, or use cat")
        return _join(parts, torch.stack)

    @staticmethod
    def mix(parts: Sequence[SparseLogits], weights: Sequence[float | Tensor]) -> SparseLogits:
        """Mixes the distributions of several teachers, p = sum of w_m q_m, on the union of the ids that they keep.

        Equivalent to, for teachers of M whole rows of logits and ids that all of them keep::

            p = sum(weight * torch.softmax(logits, -1) for weight, logits in zip(weights, logits_of_teachers))
            SparseLogits(ids, p.gather(-1, ids).log(), lse=zeros, rest_lse=(p outside the ids).sum(-1).log())

        Where an input does not keep an id, its probability of that id is unknown and stays in the bucket of all other
        ids, ``rest_lse``. So the log-probabilities are exact where every input keeps the union of ids, as rows of
        ``gather_logits`` do; elsewhere those at the ids are lower bounds, and the bucket an upper one. All outcomes sum
        to 1. An input is normalised as ``sparse_softmax`` does with rest "ghost".

        The memory is O(N * sum K_i); nothing of size (N, V) is made, and the device is not waited for.

        Args:
            parts: Rows (..., K_i) of each teacher, all of one leading shape and on one device. Only temperature 1 is
                read.
            weights: Weight of each teacher, a number or a tensor (...); at least 0, and 1 in sum to within 1e-4. An
                input counts for nothing in rows of weight 0, neither its ids nor a NaN; a number 0 drops it entirely.

        Returns:
            Log-probabilities (..., sum K_i), float32 (float64 if a part has a float64 ``lse``), ids padded with ``-1``;
            temperatures (1.0,), ``lse`` 0. ``rest_lse`` is NaN in rows where that of an input is not known, and None if
            it is known for no input. ``target_logit`` is the label's log-probability, None unless all inputs have it. A
            row without any mass, whose lse is -inf, adds nothing. ``lse`` is NaN in rows where that of an input is NaN
            or +inf, and where the weights on another device than the CPU are out of range. There is no gradient.

        Raises:
            ValueError: There are no parts, their leading shapes or devices differ, or the weights are not as many as
                the parts, of another shape, or out of range.
            TypeError: A part is not a SparseLogits, or a weight neither a number nor a floating-point tensor.

        >>> rows = [SparseLogits(torch.tensor([[i]]).int(), torch.zeros(1, 1), torch.zeros(1, 1)) for i in (3, 1)]
        >>> mixed = SparseLogits.mix(rows, [0.75, 0.25])
        >>> mixed.ids.tolist(), mixed.logits.exp().tolist()
        ([[1, 3]], [[0.25, 0.75]])
        """
        for part in parts:
            if not isinstance(part, SparseLogits):
                raise TypeError(f"parts must be SparseLogits, got {type(part).__name__}: decode packed rows first")
        return SparseLogits(**mixed_fields(parts, weights))

    def validate(self, vocab_size: int | None = None) -> None:
        """Checks every row for what the kernels rely on.

        Raises:
            ValueError: An id is outside [0, vocab_size), ids do not ascend strictly (or one is duplicated), an entry
                follows padding, or the kept mass is above 1. The message names the first such row.
        """
        ids = self.ids
        kept = ids >= 0
        bad = (ids < -1).any(-1)
        if vocab_size is not None:
            bad |= (ids >= vocab_size).any(-1)
        _raise_at(bad, f"holds an id outside [0, {vocab_size if vocab_size is not None else '2^31'})")
        if self.top_k > 1:
            _raise_at((kept[..., 1:] & ~kept[..., :-1]).any(-1), "holds an id after padding (-1)")
            _raise_at((kept[..., 1:] & (ids[..., 1:] <= ids[..., :-1])).any(-1), "is not strictly ascending in ids")
        log_mass = torch.logsumexp(self.logits.double().masked_fill(~kept, -math.inf), -1) - self.lse[..., 0].double()
        _raise_at(log_mass > 1e-3, "keeps more probability than its lse allows (logsumexp(logits) > lse)")

    def _map(self, per_row, per_token) -> SparseLogits:
        return SparseLogits(
            ids=per_row(self.ids),
            logits=per_row(self.logits),
            lse=per_row(self.lse),
            temperatures=self.temperatures,
            target_logit=None if self.target_logit is None else per_token(self.target_logit),
            rest_lse=None if self.rest_lse is None else per_row(self.rest_lse),
        )


def _join(parts: Sequence[SparseLogits], join: Callable[[list[Tensor]], Tensor]) -> SparseLogits:
    """Joins records along their first dimension, after padding each to as many entries as the widest keeps."""
    if not parts:
        raise ValueError("parts must hold at least one SparseLogits, got none")
    first = parts[0]
    if any(part.temperatures != first.temperatures for part in parts):
        raise ValueError(f"parts must share temperatures, got {sorted({p.temperatures for p in parts})}")
    dtypes = {part.logits.dtype for part in parts}
    if len(dtypes) > 1 and any(dtype.itemsize == 1 for dtype in dtypes):
        raise TypeError(f"parts must share a dtype where one is float8, got {sorted(map(str, dtypes))}: convert them")
    targets = [part.target_logit for part in parts if part.target_logit is not None]
    if targets and len(targets) != len(parts):
        raise ValueError("either all parts or no part must have a target_logit")
    top_k = max(part.top_k for part in parts)

    def pad(tensor: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, top_k - tensor.shape[-1]), value=value)

    return SparseLogits(
        ids=join([pad(part.ids, -1) for part in parts]),
        logits=join([pad(part.logits, 0.0) for part in parts]),
        lse=join([part.lse for part in parts]),
        temperatures=first.temperatures,
        target_logit=join(targets) if targets else None,
        rest_lse=join_rests(parts, join),
    )


def join_rests(parts: Sequence[Any], join: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
    """Joins the ``rest_lse`` of parts; parts that lack it join as NaN, and None is returned if all do."""
    if all(part.rest_lse is None for part in parts):
        return None
    return join([torch.full_like(p.lse, math.nan) if p.rest_lse is None else p.rest_lse for p in parts])


def rest_of_logprobs(logprobs: Tensor) -> Tensor:
    """Returns the ``rest_lse`` (...) of rows that are known by the log-probabilities of the kept entries alone.

    It is log(1 - sum exp(logprobs)), and NaN where the rest is below 1e-5, because the difference then consists of the
    rounding of the log-probabilities.

    Args:
        logprobs: (..., K) float64, -inf where a row keeps fewer entries.
    """
    mass = logprobs.exp().sum(-1)
    return torch.log1p(-mass).masked_fill(1.0 - mass < _LEAST_REST, math.nan)


def _num_dimensions(index) -> int:
    """Returns how many dimensions one part of an index consumes."""
    if index is None:
        return 0
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        return index.ndim
    return 1


def _collate(batch: Sequence[SparseLogits], *, collate_fn_map=None) -> SparseLogits:
    return SparseLogits.stack(batch)


default_collate_fn_map[SparseLogits] = _collate
# Files of torch.save hold a record by the name of its class, which torch.load reads only if it is told to.
torch.serialization.add_safe_globals([SparseLogits])


def as_temperatures(temperatures: Sequence[float]) -> tuple[float, ...]:
    """Returns temperatures as a tuple of floats."""
    if isinstance(temperatures, (int, float)):
        raise TypeError(f"temperatures must be a sequence of numbers, got {temperatures}: write ({temperatures},)")
    return tuple(float(t) for t in temperatures)


def widen_float8(logits: Tensor) -> Tensor:
    """Converts float8 logits to bfloat16, exactly; returns other dtypes, which the kernels can read, unchanged."""
    return logits.to(torch.bfloat16) if logits.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else logits


def check_normaliser(lse: Tensor, temperatures: tuple[float, ...], leading_shape: tuple[int, ...]) -> None:
    """Checks the temperatures, and that ``lse`` has a column for each of them."""
    lse_shape = (*leading_shape, len(temperatures))
    if lse.shape != lse_shape:
        raise ValueError(
            f"lse must have shape {lse_shape}, a column for each of temperatures={temperatures}, got {_shape(lse)}"
        )
    if not temperatures or temperatures[0] != 1.0:
        raise ValueError(f"temperatures must start with 1.0, got {temperatures}")
    for temperature in temperatures:
        _checks.as_temperature(temperature, "temperatures")


def check_rest(rest_lse: Tensor | None, lse: Tensor) -> None:
    """Checks that ``rest_lse`` looks like ``lse``."""
    if rest_lse is None:
        return
    _checks.check_tensor(rest_lse, "rest_lse")
    if rest_lse.dtype != lse.dtype:
        raise TypeError(f"rest_lse must have dtype {lse.dtype} like lse, got {rest_lse.dtype}")
    if rest_lse.shape != lse.shape:
        raise ValueError(f"rest_lse must have shape {_shape(lse)} like lse, got {_shape(rest_lse)}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _raise_at(bad: Tensor, what: str) -> None:
    if bad.any():
        raise ValueError(f"row {bad.nonzero()[0].tolist()} of the SparseLogits {what}")
