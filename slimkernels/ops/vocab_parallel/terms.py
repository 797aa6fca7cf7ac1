"""The terms of a row of the vocabulary-parallel losses, in torch on (N,) and (N, K) tensors."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from slimkernels.ops._library import accumulation_dtype
from slimkernels.ops._slim_options import SlimOptions
from slimkernels.ops.slim_result import NUM_STATS


class StudentSums(NamedTuple):
    """Sums over the student's whole rows (N,), float64: stage 1.

    Attributes:
        lse_one: Log-sum-exp of z.
        lse: Log-sum-exp of z / T.
        lse_on: Log-sum-exp of z / T on S.
        lse_off: Log-sum-exp of z / T off S, for "ghost" only.
        log_s_y: Log-probability of the label at temperature 1.
        entropy: Entropy at temperature 1, only with statistics.
        argmax: First id of the largest logit, only with statistics.
        sum_z: Sum of z, where it is needed.
        sum_z_off: Sum of z off S, where it is needed.
    """

    lse_one: Tensor
    lse: Tensor
    lse_on: Tensor
    lse_off: Tensor
    log_s_y: Tensor
    entropy: Tensor
    argmax: Tensor
    sum_z: Tensor
    sum_z_off: Tensor


class TeacherSums(NamedTuple):
    """Sums over the teacher's rows (N,), float64: stage 2.

    Attributes:
        lse_on: Log-sum-exp of logit / T on S.
        lse: The given log-sum-exp of the whole row at T, NaN where it is unknown.
        q_norm: log q = logit / T - q_norm on S.
        log_q_tail: log(1 - a), the teacher's mass off S.
        log_t_y: Log-probability of the label at temperature 1.
        entropy: Entropy of the outcomes of "ghost", only with statistics or divergence "gated".
        num_unkept: Number of ids off S.
        gate: Factor of the forward KL in "gated".
        blend_norm: Norm of t log q + (1 - t) log p, where the teacher is blended.
    """

    lse_on: Tensor
    lse: Tensor
    q_norm: Tensor
    log_q_tail: Tensor
    log_t_y: Tensor
    entropy: Tensor
    num_unkept: Tensor
    gate: Tensor
    blend_norm: Tensor


class Measures(NamedTuple):
    """Loss of the rows (N,) and its terms, float64: stage 3.

    Attributes:
        loss: Loss of the row.
        ce: Cross entropy.
        kd: D * T^2.
        w: Token weight.
        w_slope: dw / d log s_y.
        teacher_mass: a, the teacher's mass on S.
        student_mass: P, the student's mass on S.
        mean_slope: Sum of p * dD/dp over all outcomes.
        off_factor: dD/d(z / T) off S is off_factor * exp(z / T - off_level) + off_constant.
        off_constant: See ``off_factor``.
        off_level: See ``off_factor``.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    w: Tensor
    w_slope: Tensor
    teacher_mass: Tensor
    student_mass: Tensor
    mean_slope: Tensor
    off_factor: Tensor
    off_constant: Tensor
    off_level: Tensor


def effective(logits: Tensor, options: SlimOptions, dtype: torch.dtype) -> Tensor:
    """Computes z = softcap * tanh(logit_scale * logits / softcap) in the accumulation dtype."""
    z = logits.to(dtype) * options.logit_scale
    return z if options.softcap == 0 else torch.tanh(z / options.softcap) * options.softcap


def transform_slope(z: Tensor, options: SlimOptions) -> Tensor | float:
    """Computes the derivative of z by the logits, from z."""
    if options.softcap == 0:
        return options.logit_scale
    return (1 - (z / options.softcap).square()) * options.logit_scale


def log_sum_exp(x: Tensor) -> Tensor:
    """Computes the log-sum-exp of every row (N, K): exponentials in the dtype of ``x``, summed in float64."""
    peak = x.amax(-1, keepdim=True)
    shift = peak.masked_fill(peak == -math.inf, 0.0)
    return (x - shift).exp().sum(-1, dtype=torch.float64).log() + shift.squeeze(-1)


def finite_norm(norm: Tensor) -> Tensor:
    """Replaces -inf, the normaliser of a row without mass, by 0, so that -inf - (-inf) never occurs."""
    return norm.masked_fill(norm == -math.inf, 0.0)


def log1m_exp(x: Tensor) -> Tensor:
    """Computes log(1 - exp(x)) without cancellation; -inf where x >= 0."""
    large = torch.log(-torch.expm1(x))
    return torch.where(x > -math.log(2.0), large, torch.log1p(-x.exp())).masked_fill(x >= 0, -math.inf)


def entropy_of_parts(log_masses: Tensor, inside: Tensor | float) -> Tensor:
    """Computes the entropy (N,) of a distribution in parts (parts, N) from their masses and their own entropies."""
    masses = log_masses.exp()
    return (masses * (inside - log_masses)).masked_fill(masses == 0, 0.0).sum(0).clamp(min=0)


def slice_log_sums(
    logits: Tensor, active: Tensor, own_ids: Tensor | None, options: SlimOptions, temperature: float
) -> tuple[Tensor, Tensor]:
    """Computes the log-sum-exps of z / T over a slice (N, V_local), of every row and of its ids off ``own_ids``.

    Both are float64 and come from one call of the kernel of ``slim_loss``, which reads the slice once. z / T is the
    effective logit of another scale and softcap. Under "ghost", a teacher with probability 0 at the kept ids has a
    cross entropy of minus the log of the student's mass off them.
    """
    stats = _slice_stats(logits, active, own_ids, options, temperature, "none")
    lse, ghost_ce = stats[6].double(), stats[2].double()
    if own_ids is None:
        return lse, lse
    # If every id is kept, the kernel has no ghost outcome and reports 0, but the log-sum-exp of no ids is -inf.
    all_kept = (own_ids >= 0).sum(1) == logits.shape[1]
    return lse, (lse - ghost_ce).masked_fill(all_kept, -math.inf)


def slice_log_sum_and_entropy(logits: Tensor, active: Tensor, options: SlimOptions) -> tuple[Tensor, Tensor]:
    """Computes the log-sum-exp of z over a slice (N, V_local), and the entropy of its softmax, in float64."""
    stats = _slice_stats(logits, active, None, options, 1.0, "without_overlap")
    return stats[6].double(), stats[7].double()


def _slice_stats(
    logits: Tensor, active: Tensor, own_ids: Tensor | None, options: SlimOptions, temperature: float, statistics: str
) -> Tensor:
    """Computes the statistics (M, N) of ``slim_loss`` on a slice, with the teacher of ``slice_log_sums``."""
    ids = teacher_logits = no_lse = None
    num_rows = logits.shape[0]
    dtype = accumulation_dtype(logits.dtype)
    if own_ids is not None:
        ids = own_ids
        teacher_logits = torch.full_like(ids, -math.inf, dtype=torch.bfloat16)
        no_lse = logits.new_zeros(num_rows, dtype=dtype)
    empty_teacher = SlimOptions(
        *(ids, teacher_logits, no_lse, None, None, None, None),
        temperature=1.0,
        rest="ghost",
        divergence="soft_ce",
        weighting="none",
        detach_weight=True,
        beta=0.5,
        alpha=0.0,
        forward_weight=0.0,
        entropy_threshold=0.0,
        teacher_blend=1.0,
        tail_weight=1.0,
        ce_weight=0.0,
        kd_weight=0.0,
        label_smoothing=0.0,
        z_loss_weight=0.0,
        softcap=options.softcap / temperature,
        logit_scale=options.logit_scale / temperature,
        ignore_index=-1,
        statistics=statistics,
    )
    stats = logits.new_empty(NUM_STATS[statistics], num_rows, dtype=dtype)
    any_label = active.long() - 1
    torch.ops.slimkernels.slim_loss_rows(logits, None, stats, any_label, None, *empty_teacher)
    return stats


def weigh(log_s_y: Tensor, log_t_y: Tensor, given: Tensor | None, options: SlimOptions) -> tuple[Tensor, Tensor]:
    """Computes the token weight w (N,), and dw / d log s_y, which is 0 where detached."""
    flat = torch.zeros_like(log_s_y)
    if options.weighting == "tensor":
        return cast(Tensor, given).to(log_s_y.dtype), flat
    if options.weighting == "none":
        return torch.ones_like(log_s_y), flat
    sign = 1.0 if options.weighting == "teacher_over_student" else -1.0
    # If the teacher's probability of the label is 0, the ratio ignores the student's, even at 0/0.
    log_ratio = sign * torch.where(log_t_y == -math.inf, log_t_y, log_t_y - log_s_y)
    ratio = log_ratio.clamp(max=30.0).exp()
    slope = flat if options.detach_weight else (-sign * ratio * (-ratio).exp()).masked_fill(log_ratio > 30, 0.0)
    return -torch.expm1(-ratio), slope
