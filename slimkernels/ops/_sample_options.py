"""What the sampling ops share: options that are a number for all rows or a tensor with one for each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimkernels import _checks


def resolve_integer(value: int | Tensor, name: str, logits: Tensor) -> tuple[int, Tensor | None]:
    """The schema's pair of a number and, in its place, a contiguous int64 tensor (N,)."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must have dtype torch.int64, got {value.dtype}: call {name}.long()")
        return 0, _per_row(value, name, logits)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer or an int64 tensor, got {type(value).__name__} {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits with a sign, got {value}: take it modulo 2**63")
    return value, None


def resolve_top_k(value: int | Tensor, logits: Tensor) -> tuple[int, Tensor | None]:
    """Like ``resolve_integer``; numbers are checked here and tensors where they are read."""
    number, per_row = resolve_integer(value, "top_k", logits)
    if number < 0:
        raise ValueError(f"top_k must be at least 0 (0 keeps everything), got {number}")
    return number, per_row


def resolve_float(value: float | Tensor, name: str, limits: str, logits: Tensor) -> tuple[float, Tensor | None]:
    """The schema's pair of a number and, in its place, a contiguous float64 tensor (N,).

    Numbers are checked here and tensors where they are read. ``limits`` is a key of ``LIMITS``.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}: call {name}.float()")
        return 0.0, _per_row(value, name, logits).double()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a floating-point tensor, got {type(value).__name__} {value!r}")
    if not 0 <= value <= LIMITS[limits]:
        raise ValueError(f"{name} must be {limits}, got {value}")
    return float(value), None


LIMITS = {"finite and at least 0": torch.finfo(torch.float64).max, "in [0, 1]": 1.0}


def check_values(per_row: Tensor | None, name: str, limits: str) -> None:
    """Checks every value of an option tensor (N,); inside an operator, where reading it breaks no graph."""
    if per_row is None:
        return
    wrong = ~((per_row >= 0) & (per_row <= LIMITS.get(limits, math.inf)))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"{name} must be {limits} in every row, got {per_row[row].item()} in row {row}")


def _per_row(value: Tensor, name: str, logits: Tensor) -> Tensor:
    leading_shape = logits.shape[:-1]
    if value.ndim > 0 and value.shape != leading_shape:
        raise ValueError(
            f"{name} must be a number or have shape {tuple(leading_shape)}, one value for each row of logits, "
            f"got {tuple(value.shape)}"
        )
    _checks.same_device(value, name, logits, "logits")
    return value.detach().expand(leading_shape).reshape(-1).contiguous()
