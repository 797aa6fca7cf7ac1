"""The arithmetic of ``SparseLogits.mix``: several teachers' distribution on the union of the ids that they keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.mixture.unions import log_sums

# Distance of the sum of the weights from 1 that is taken for rounding.
_WEIGHT_ERROR = 1e-4


# ``SparseLogits``, whose module imports this one.
Rows: TypeAlias = Any


def mixed_fields(parts: Sequence[Rows], weights: Sequence[float | Tensor]) -> dict[str, Any]:
    """Returns the fields of the ``SparseLogits`` that ``SparseLogits.mix`` makes of its arguments."""
    _check_parts(parts, weights)
    # A number 0 drops its input; whether a tensor is 0 everywhere is not known without waiting for its device.
    used = [(part, one) for part, one in zip(parts, weights, strict=True) if isinstance(one, Tensor) or one]
    parts = [part for part, _ in used]
    shares, is_bad = _shares(parts, [weight for _, weight in used])
    with torch.no_grad():
        outcomes = [_outcomes(part, share) for part, share in zip(parts, shares, strict=True)]
    ids, logprobs = log_sums([one.ids for one in outcomes], [one.logprobs for one in outcomes])
    rest, label = _log_sum([one.rest for one in outcomes]), _log_sum([one.label for one in outcomes])
    is_bad = torch.stack([is_bad, *(one.is_bad for one in outcomes)]).any(0)
    return {
        "ids": ids,
        "logits": logprobs.masked_fill(ids < 0, 0.0),
        "lse": torch.zeros_like(rest).masked_fill(is_bad, math.nan).unsqueeze(-1),
        "target_logit": None if any(part.target_logit is None for part in parts) else label,
        "rest_lse": None if all(part.rest_lse is None for part in parts) else rest.unsqueeze(-1),
    }


class _Outcomes(NamedTuple):
    """The weighted log-probabilities of one input of a mixture, and the rows (...) that are not numbers."""

    ids: Tensor
    logprobs: Tensor
    rest: Tensor
    label: Tensor
    is_bad: Tensor


def _outcomes(part: Rows, share: Tensor) -> _Outcomes:
    """Returns log(weight * probability) of the outcomes of one input (..., K), whose weights (...) are in one dtype."""
    lse = part.lse[..., 0].to(share.dtype)
    counts = (share > 0) & (lse != -math.inf)
    kept = (part.ids >= 0) & counts.unsqueeze(-1)
    logits = part.logits.to(share.dtype).masked_fill(~kept, -math.inf)
    rest = torch.full_like(lse, math.nan) if part.rest_lse is None else part.rest_lse[..., 0].to(share.dtype)
    label = torch.full_like(lse, math.nan) if part.target_logit is None else part.target_logit.to(share.dtype)
    # The entries as they were stored and the rest sum to 1, where the rest is known.
    whole = torch.where(rest.isnan(), lse, torch.logaddexp(torch.logsumexp(logits, -1), rest))
    # A row without any mass has nothing to divide.
    shift = share.log() - whole.masked_fill(whole == -math.inf, 0.0)
    return _Outcomes(
        ids=part.ids.masked_fill((share == 0).unsqueeze(-1), -1),
        logprobs=(logits + shift.unsqueeze(-1)).masked_fill(~kept, -math.inf),
        rest=(rest + shift).masked_fill(~counts, -math.inf),
        label=(label - lse + share.log()).masked_fill(~counts, -math.inf),
        is_bad=counts & ~(lse < math.inf),
    )


def _log_sum(terms: list[Tensor]) -> Tensor:
    return torch.logsumexp(torch.stack(terms, -1), -1)


def _check_parts(parts: Sequence[Rows], weights: Sequence[float | Tensor]) -> None:
    if not parts:
        raise ValueError("parts must hold at least one SparseLogits, got none")
    for name in ("leading_shape", "device"):
        if len(found := {getattr(part, name) for part in parts}) > 1:
            raise ValueError(f"parts must share their {name.replace('_', ' ')}, got {sorted(map(str, found))}")
    if len(weights) != len(parts):
        raise ValueError(f"weights must be as many as parts, {len(parts)}, got {len(weights)}")
    numbers = [_checks.as_at_least_zero(weight, "weights") for weight in weights if not isinstance(weight, Tensor)]
    if len(numbers) == len(weights) and abs(math.fsum(numbers) - 1) > _WEIGHT_ERROR:
        raise ValueError(f"weights must sum to 1, got {numbers}: divide them by their sum, {math.fsum(numbers):g}")


def _shares(parts: Sequence[Rows], weights: Sequence[float | Tensor]) -> tuple[list[Tensor], Tensor]:
    """Returns each weight as a tensor (...) of the mixture's dtype, and the rows (...) in which they are not legal."""
    shape, device = parts[0].leading_shape, parts[0].device
    dtype = torch.float64 if any(part.lse.dtype == torch.float64 for part in parts) else torch.float32
    shares = []
    for weight in weights:
        if isinstance(weight, Tensor):
            _checks.check_floating(weight, "weights")
            _checks.check_no_gradient(weight, "weights")
            _checks.check_same_device(weight, "weights", parts[0].ids, "parts")
            if tuple(weight.shape) != shape:
                raise ValueError(f"weights must be numbers or of shape {shape} like parts, got {tuple(weight.shape)}")
        shares.append(torch.as_tensor(weight, dtype=dtype, device=device).expand(shape))
    every = torch.stack(shares)
    is_bad = ~(every >= 0).all(0) | ~((every.sum(0) - 1).abs() <= _WEIGHT_ERROR)
    # Raising would need a sync on another device, so bad rows become NaN there.
    if device.type == "cpu" and bool(is_bad.any()):
        row = is_bad.nonzero()[0].tolist()
        raise ValueError(
            f"weights must be at least 0 and sum to 1 in every row, got {every[(slice(None), *row)].tolist()} in row "
            f"{row}: divide them by their sum"
        )
    return shares, is_bad
