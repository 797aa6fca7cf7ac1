"""Divergences of a student from a teacher over their outcomes, and the weight of a token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimkernels.reference.arithmetic import finite, logsumexp, weighted

DIVERGENCES = ("forward_kl", "soft_ce", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "ab", "gated")
WEIGHTS = ("teacher_over_student", "student_over_teacher", "none")


def blend(log_q: Tensor, log_p: Tensor, t: float) -> Tensor:
    """Computes log softmax(t log q + (1 - t) log p) of every row (N, outcomes), t < 1; of no mass where all are -inf.

    An outcome that either excludes is excluded. TAID (arXiv 2501.16937) blends the logits of whole rows.
    """
    blended = t * log_q + (1 - t) * log_p
    norm = finite(logsumexp(blended)).unsqueeze(-1)
    return (blended - norm).masked_fill(blended == -math.inf, -math.inf)


def divergence_shares(
    log_q: Tensor, log_p: Tensor, divergence: str, beta: float, alpha: float, gate: Tensor, is_proper: bool
) -> Tensor:
    """Computes the shares (N, outcomes) of divergence(Q, P), part of stage 3; ``is_proper`` if both sum to 1.

    - ``"forward_kl"``: KL(Q || P); ``"soft_ce"``: the same without the teacher's entropy.
    - ``"reverse_kl"``: KL(P || Q), without the outcomes that the teacher excludes, which would make it infinite.
    - ``"jsd"``: beta KL(Q || M) + (1 - beta) KL(P || M) with M = beta Q + (1 - beta) P (arXiv 2306.13649).
    - ``"skew_kl"``: KL(Q || alpha Q + (1 - alpha) P); ``"skew_reverse_kl"``: KL(P || alpha P + (1 - alpha) Q)
      (arXiv 2402.03898). With alpha = 0 they are the forward and the reverse KL.
    - ``"tvd"``: the total variation distance, half the sum of |q - p|; the gradient of an outcome with q = p is 0.
    - ``"ab"``: the alpha-beta divergence (arXiv 2505.04560), -1 / (alpha beta) times the sum of
      q^alpha p^beta - alpha / (alpha + beta) q^(alpha + beta) - beta / (alpha + beta) p^(alpha + beta). Its limits
      (1, 0) and (0, 1) are the forward and the reverse KL.
    - ``"gated"``: KL(P || Q) + gate KL(Q || P), ``gate`` (N, 1) (arXiv 2603.07079).
    """
    if divergence == "ab":
        divergence = {(1.0, 0.0): "forward_kl", (0.0, 1.0): "reverse_kl"}.get((alpha, beta), divergence)
    if alpha == 0:
        divergence = {"skew_kl": "forward_kl", "skew_reverse_kl": "reverse_kl"}.get(divergence, divergence)
    if divergence == "soft_ce":
        return weighted(log_q, -log_p)
    if divergence == "forward_kl":
        return _kl_shares(log_q, log_p) if is_proper else weighted(log_q, log_q - log_p)
    if divergence in ("reverse_kl", "gated"):
        reverse = _kl_shares(log_p.masked_fill(log_q == -math.inf, -math.inf), log_q)
        # A gate of 0 drops the forward KL, even where it is infinite.
        return reverse + gate * _kl_shares(log_q.masked_fill(gate == 0, -math.inf), log_p)
    if divergence == "tvd":
        return 0.5 * (log_q.exp() - log_p.exp()).abs()
    if divergence == "ab":
        both = alpha + beta
        product = (alpha * log_q + beta * log_p).exp()
        powers = alpha / both * (both * log_q).exp() + beta / both * (both * log_p).exp()
        return (powers - product) / (alpha * beta)
    of_teacher = {"jsd": beta, "skew_kl": alpha, "skew_reverse_kl": 1 - alpha}[divergence]
    log_of_teacher, log_of_student = log_q.new_tensor([of_teacher, 1 - of_teacher]).log()
    log_m = logsumexp(torch.stack([log_q + log_of_teacher, log_p + log_of_student], dim=-1))
    if divergence == "skew_kl":
        return _kl_shares(log_q, log_m)
    of_p = _kl_shares(log_p.masked_fill(log_m == -math.inf, -math.inf), log_m)
    return of_p if divergence == "skew_reverse_kl" else beta * _kl_shares(log_q, log_m) + (1 - beta) * of_p


def _kl_shares(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Computes a log(a / b) - a + b, no less than 0: the shares of KL(A || B) of distributions that sum to 1."""
    a, b = log_a.exp(), log_b.exp()
    return a * (log_a - log_b).masked_fill(a == 0, 0.0) - a + b


def adaptive_weight(kind: str, log_t_y: Tensor, log_s_y: Tensor) -> Tensor:
    """Computes w (N,), part of stage 3."""
    if kind == "none":
        return torch.ones_like(log_s_y)
    sign = 1.0 if kind == "teacher_over_student" else -1.0
    # If the teacher's probability of the label is 0, the ratio ignores the student's, even at 0/0.
    log_ratio = torch.where(log_t_y == -math.inf, -sign * math.inf, sign * (log_t_y - log_s_y))
    return -torch.expm1(-torch.exp(log_ratio.clamp(max=30.0)))
