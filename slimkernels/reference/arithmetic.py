"""Sums of exponentials that neither overflow nor cancel, and the other arithmetic of the definitions."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from slimkernels.sparse_logits import SparseLogits


def as_constant(teacher: SparseLogits, dtype: torch.dtype) -> SparseLogits:
    """Returns rows in a dtype, without a gradient."""
    floating = {name: getattr(teacher, name) for name in ("logits", "lse", "target_logit", "rest_lse")}
    floating = {name: None if field is None else field.detach().to(dtype) for name, field in floating.items()}
    return dataclasses.replace(teacher, **floating)


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes ``hidden`` @ ``weight``.T + ``bias`` in the dtype of accumulation."""
    dtype = accumulate_dtype(hidden)
    product = hidden.to(dtype) @ weight.to(dtype).T
    return product if bias is None else product + bias.to(dtype)


def effective_logits(logits: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """Computes softcap * tanh(logit_scale * logits / softcap)."""
    z = logit_scale * logits
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def weighted(log_weight: Tensor, value: Tensor) -> Tensor:
    """Computes exp(log_weight) * value; an outcome of weight 0 contributes 0 whatever its value."""
    weight = log_weight.exp()
    return weight * value.masked_fill(weight == 0, 0.0)


def logsumexp(x: Tensor) -> Tensor:
    """Computes the log-sum-exp over the last dimension; -inf, with gradient 0, where everything is -inf."""
    peak = finite(x.detach().amax(-1, keepdim=True))
    total = (x - peak).exp().sum(-1)
    empty = total == 0
    return (total.masked_fill(empty, 1.0).log() + peak.squeeze(-1)).masked_fill(empty, -math.inf)


def log1mexp(x: Tensor) -> Tensor:
    """Computes log(1 - exp(x)) without cancellation; -inf, with gradient 0, where x >= 0."""
    full = x >= 0
    near = x > -math.log(2.0)
    small = torch.log1p(-x.masked_fill(near, -1.0).exp())
    large = torch.log(-torch.expm1(x.masked_fill(full | ~near, -0.5)))
    return torch.where(near, large, small).masked_fill(full, -math.inf)


def finite(x: Tensor) -> Tensor:
    """Replaces values that are not finite by 0, which makes a shift that cannot turn inf - inf into NaN."""
    return x.masked_fill(~x.isfinite(), 0.0)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Returns float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
