"""The divergences of the vocabulary-parallel losses, an outcome at a time, in torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimkernels.ops._divergences import PROPER_RESTS
from slimkernels.ops._slim_options import SlimOptions


def blend(log_q: Tensor, log_p: Tensor, options: SlimOptions) -> Tensor:
    """Computes t log q + (1 - t) log p, which its log-sum-exp over the outcomes makes probabilities."""
    return options.teacher_blend * log_q + (1 - options.teacher_blend) * log_p


def diverge(log_q: Tensor, log_p: Tensor, gate: Tensor, options: SlimOptions) -> tuple[Tensor, Tensor]:
    """Computes every outcome's share of D and slope p * dD/dp.

    ``gate`` is the factor of the rows' forward KL in "gated". The slopes of forward KL and skew KL are those of the
    divergence without - q + p, see ``missing_slope``: where p sums to 1, this is the same gradient.
    """
    q, p = log_q.exp(), log_p.exp()
    divergence, alpha = options.divergence, options.alpha
    if divergence == "forward_kl":
        if options.rest in PROPER_RESTS:
            return kl_share(log_q - log_p, q, p), -q
        return (q * (log_q - log_p)).masked_fill(q == 0, 0.0), -q
    if divergence == "soft_ce":
        return (-q * log_p).masked_fill(q == 0, 0.0), -q
    if divergence in ("reverse_kl", "gated"):
        # An outcome with q = 0 is skipped: it would make D infinite. One whose q only underflows is not.
        excluded = log_q == -math.inf
        slope = (p * (log_p - log_q)).masked_fill((p == 0) | excluded, 0.0)
        share = kl_share(log_p - log_q, p, q).masked_fill(excluded, 0.0)
        if divergence == "gated":
            share = share + (kl_share(log_q - log_p, q, p) * gate).masked_fill(gate == 0, 0.0)
            slope = slope - q * gate
        return share, slope
    if divergence == "tvd":
        return (q - p).abs() * 0.5, p * (p - q).sign() * 0.5
    if divergence == "ab":
        return _diverge_alpha_beta(log_q, log_p, alpha, options.beta)
    if divergence == "skew_reverse_kl":
        log_m, m = _mixture(log_p, log_q, alpha), p * alpha + q * (1 - alpha)
        excluded = log_m == -math.inf
        by_mixture = (q - p) * (log_p - log_m).exp() * (alpha * (1 - alpha))
        slope = (p * (log_p - log_m) + by_mixture).masked_fill((p == 0) | excluded, 0.0)
        return kl_share(log_p - log_m, p, m).masked_fill(excluded, 0.0), slope
    part = options.beta if divergence == "jsd" else alpha
    log_m, m = _mixture(log_q, log_p, part), q * part + p * (1 - part)
    from_q = kl_share(log_q - log_m, q, m)
    if divergence == "jsd":
        slope = (p * (log_p - log_m)).masked_fill(p == 0, 0.0) * (1 - part)
        return part * from_q + (1 - part) * kl_share(log_p - log_m, p, m), slope
    return from_q, ((log_p + log_q - log_m).exp() * (part - 1)).masked_fill((q == 0) | (p == 0), 0.0)


def _mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Computes the log of share * a + (1 - share) * b."""
    return torch.logaddexp(log_a + (math.log(share) if share else -math.inf), log_b + math.log1p(-share))


def _diverge_alpha_beta(log_q: Tensor, log_p: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """Computes every outcome's share of the alpha-beta divergence and slope p * dD/dp.

    With x = log(q / p) and r = alpha + beta the share is p^r / (alpha beta) times
    alpha / r (exp(r x) - 1 - r x) - (exp(alpha x) - 1 - alpha x).
    """
    both, log_ratio = alpha + beta, log_q - log_p
    near = (log_ratio * both).abs() < 0.5
    p_power, product = (log_p * both).exp(), (log_q * alpha + log_p * beta).exp()
    remainder = _exp_remainder(log_ratio * alpha)
    near_share = p_power * (_exp_remainder(log_ratio * both) * (alpha / both) - remainder)
    far_share = (log_q * both).exp() * (alpha / both) + p_power * (beta / both) - product
    slope = torch.where(near, -p_power * (remainder + log_ratio * alpha), p_power - product) / alpha
    return torch.where(near, near_share, far_share) / (alpha * beta), slope


def missing_slope(gate: Tensor, options: SlimOptions) -> Tensor | float:
    """Returns the factor c of the slopes c * p that ``diverge`` leaves out."""
    if options.divergence in ("forward_kl", "soft_ce"):
        return 1.0
    return {"skew_kl": 1 - options.alpha, "gated": gate}.get(options.divergence, 0.0)


def kl_share(log_ratio: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Computes a log(a / b) - a + b, the share of an outcome of KL(a || b), from ``log_ratio`` = log(a / b).

    It is at least 0, and adds up to the usual KL where both sides sum to 1. Near a = b its terms would cancel.
    """
    near = a * _exp_remainder(-log_ratio)
    share = torch.where(log_ratio.abs() < 0.5, near, a * log_ratio - a + b)
    return torch.where(a == 0, b, share)


def _exp_remainder(x: Tensor) -> Tensor:
    """Computes exp(x) - 1 - x for |x| < 1/2, where its terms would cancel, by a series."""
    # x^2 / 2 * (1 + x / 3 * (1 + x / 4 * (1 + ...)))
    num_terms = 15 if x.dtype == torch.float64 else 8
    series = torch.ones_like(x)
    for i in range(num_terms, 2, -1):
        series = 1 + x / i * series
    return x.square() * 0.5 * series
