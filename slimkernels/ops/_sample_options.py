"""Options of the sampling ops: each is one number for all rows or a tensor with one value per row.

A schema holds every option as a pair: the number, and a tensor (N,) that replaces it if given. The tensor of seeds may
also be (): one seed, which the kernels spread over the rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimkernels import _checks


def resolve_integer(value: int | Tensor, name: str, logits: Tensor) -> tuple[int, Tensor | None]:
    """Checks an integer option and returns the pair for the schema; the tensor is contiguous and int64."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must have dtype torch.int64, got {value.dtype}: call {name}.long()")
        return 0, _per_row(value, name, logits)
    number = _checks.as_integer(value, name)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must fit into a signed 64-bit integer, got {number}: take it modulo 2**63")
    return number, None


def resolve_seed(value: int | Tensor, logits: Tensor) -> tuple[int, Tensor | None]:
    """Checks ``seed`` and returns the pair for the schema; a tensor () stays one seed, to be spread over the rows."""
    number, per_row = resolve_integer(value, "seed", logits)
    if isinstance(value, Tensor) and value.ndim == 0:
        per_row = value.detach()
    return number, per_row


def resolve_top_k(value: int | Tensor, logits: Tensor) -> tuple[int, Tensor | None]:
    """Checks ``top_k`` and returns the pair for the schema; the range of a tensor is checked where it is read."""
    number, per_row = resolve_integer(value, "top_k", logits)
    if number < 0:
        raise ValueError(f"top_k must be at least 0 (0 keeps everything), got {number}")
    return number, per_row


def resolve_float(value: float | Tensor, name: str, logits: Tensor) -> tuple[float, Tensor | None]:
    """Checks a float option and returns the pair for the schema; the tensor is contiguous and float64.

    The range of a number is checked here, that of a tensor where its values are read.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}: call {name}.float()")
        _checks.check_no_gradient(value, name)
        return 0.0, _per_row(value, name, logits).double()
    if name == "temperature":
        number = _checks.as_temperature(value, or_zero=True)
    else:
        number = _checks.as_float(value, name)
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if torch.compiler.is_compiling() and number not in (0.0, 1.0):
        # A compiled graph is specialised on a number, but not on the values of a tensor (see operand_of).
        one = torch.ones((), dtype=torch.float64, device=logits.device)
        return 0.0, _per_row(one * number, name, logits)
    return number, None


# The values of each option in a tensor: the smallest besides 0, and the largest.
_LIMITS = {
    "temperature": (_checks.LOWEST_TEMPERATURE, _checks.HIGHEST_TEMPERATURE),
    "top_k": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
}


def check_values(per_row: Tensor | None, name: str) -> None:
    """Checks every value of an option tensor (N,). Called inside an operator, where reading values breaks no graph."""
    if per_row is None:
        return
    low, high = _LIMITS[name]
    wrong = ~((per_row == 0) | (per_row >= low) & (per_row <= high))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        limits = f"{'0 or ' if low else ''}in [{low:.2g}, {high:.2g}]"
        raise _checks.RowError(
            f"{name} must be {limits} in every row, got {per_row[row].item()} in row [{_checks.RowError.INDEX}]", row
        )


def _per_row(value: Tensor, name: str, logits: Tensor) -> Tensor:
    leading_shape = logits.shape[:-1]
    if value.ndim > 0 and value.shape != leading_shape:
        raise ValueError(
            f"{name} must be a number or have shape {tuple(leading_shape)}, one value per row of logits, "
            f"got {tuple(value.shape)}"
        )
    _checks.check_same_device(value, name, logits, "logits")
    return value.detach().expand(leading_shape).reshape(-1).contiguous()
