"""The pieces of a row of the vocabulary-parallel losses, in torch on (N,) and (N, K) tensors."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from slimkernels.ops._slim_options import SlimOptions
from slimkernels.ops.slim_result import NUM_STATS


def effective(logits: Tensor, options: SlimOptions, dtype: torch.dtype) -> Tensor:
    """The z = softcap * tanh(logit_scale * logits / softcap) of logits, in the accumulation dtype."""
    z = logits.to(dtype) * options.logit_scale
    return z if options.softcap == 0 else torch.tanh(z / options.softcap) * options.softcap


def transform_slope(z: Tensor, options: SlimOptions) -> Tensor | float:
    """The derivative of z by the logits, from z."""
    if options.softcap == 0:
        return options.logit_scale
    return (1 - (z / options.softcap).square()) * options.logit_scale


def log_sum_exp(x: Tensor) -> Tensor:
    """Of every row (N, K), float64: exponentials in the dtype of ``x``, summed in float64."""
    peak = x.amax(-1, keepdim=True)
    shift = peak.masked_fill(peak == -math.inf, 0.0)
    return (x - shift).exp().sum(-1, dtype=torch.float64).log() + shift.squeeze(-1)


def log1m_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) without cancellation; -inf where x >= 0."""
    large = torch.log(-torch.expm1(x))
    return torch.where(x > -math.log(2.0), large, torch.log1p(-x.exp())).masked_fill(x >= 0, -math.inf)


def slice_log_sums(
    logits: Tensor, active: Tensor, own_ids: Tensor | None, options: SlimOptions, temperature: float
) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of z / T over a slice (N, V_local) of every row, and over what is outside ``own_ids``, float64.

    Both come from ``slim_loss``'s own kernel, which reads the slice once: z / T is the effective logit of another
    scale and softcap, and to a teacher that gives nothing to the kept ids the cross entropy under "ghost" is minus the
    log of the student's mass outside them.
    """
    ids = teacher_logits = no_lse = None
    num_rows = logits.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if own_ids is not None:
        ids = own_ids
        teacher_logits = torch.full_like(ids, -math.inf, dtype=torch.bfloat16)
        no_lse = logits.new_zeros(num_rows, dtype=dtype)
    nobody = SlimOptions(
        *(ids, teacher_logits, no_lse, None, None, None),
        temperature=1.0,
        rest="ghost",
        divergence="soft_ce",
        weighting="none",
        detach_weight=True,
        beta=0.5,
        alpha=0.0,
        ce_weight=0.0,
        kd_weight=0.0,
        label_smoothing=0.0,
        z_loss_weight=0.0,
        softcap=options.softcap / temperature,
        logit_scale=options.logit_scale / temperature,
        ignore_index=-1,
    )
    stats = logits.new_empty(NUM_STATS, num_rows, dtype=dtype)
    any_label = active.long() - 1
    torch.ops.slimkernels.slim_loss_rows(logits, None, stats, any_label, None, *nobody)
    lse, ghost_ce = stats[6].double(), stats[2].double()
    if own_ids is None:
        return lse, lse
    # The kernel knows that a whole row that is kept leaves nothing, and so says 0.
    all_kept = (own_ids >= 0).sum(1) == logits.shape[1]
    return lse, (lse - ghost_ce).masked_fill(all_kept, -math.inf)


def diverge(log_q: Tensor, log_p: Tensor, options: SlimOptions) -> tuple[Tensor, Tensor]:
    """Every outcome's share of D, and p * dD/dp."""
    q, p = log_q.exp(), log_p.exp()
    divergence = options.divergence
    if divergence == "forward_kl":
        return (q * (log_q - log_p)).masked_fill(q == 0, 0.0), -q
    if divergence == "soft_ce":
        return (-q * log_p).masked_fill(q == 0, 0.0), -q
    if divergence == "reverse_kl":
        # An outcome the teacher excludes would make D infinite, and a rounded-away tail with it: it is left out.
        excluded = log_q == -math.inf
        share = (p * (log_p - log_q)).masked_fill((p == 0) | excluded, 0.0)
        return share, (share + p).masked_fill(excluded, 0.0)
    part = options.beta if divergence == "jsd" else options.alpha
    log_part = math.log(part) if part else -math.inf
    log_m = torch.logaddexp(log_q + log_part, log_p + math.log1p(-part))
    from_q = (q * (log_q - log_m)).masked_fill(q == 0, 0.0)
    if divergence == "jsd":
        from_p = (p * (log_p - log_m)).masked_fill(p == 0, 0.0) * (1 - part)
        return part * from_q + from_p, from_p
    return from_q, ((log_p + log_q - log_m).exp() * (part - 1)).masked_fill((q == 0) | (p == 0), 0.0)


def weigh(log_student: Tensor, log_teacher: Tensor, given: Tensor | None, options: SlimOptions):
    """The token's weight w (N,), and dw / d log s_y, 0 where detached."""
    flat = torch.zeros_like(log_student)
    if options.weighting == "tensor":
        return cast(Tensor, given).to(log_student.dtype), flat
    if options.weighting == "none":
        return torch.ones_like(log_student), flat
    sign = 1.0 if options.weighting == "teacher_over_student" else -1.0
    # A label the teacher gives nothing decides alone, also where the student gives it nothing either.
    log_ratio = sign * torch.where(log_teacher == -math.inf, log_teacher, log_teacher - log_student)
    ratio = log_ratio.clamp(max=30.0).exp()
    slope = flat if options.detach_weight else (-sign * ratio * (-ratio).exp()).masked_fill(log_ratio > 30, 0.0)
    return -torch.expm1(-ratio), slope
