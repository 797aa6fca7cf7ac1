"""The loss of a student's logits, and its statistics, in the stages that all backends share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.reference.arithmetic import (
    accumulate_dtype,
    as_constant,
    effective_logits,
    finite,
    linear,
    logsumexp,
    weighted,
)
from slimkernels.reference.divergences import (
    DIVERGENCES,
    WEIGHTS,
    adaptive_weight,
    blend,
    divergence_shares,
)
from slimkernels.reference.rows import RESTS, sparse_softmax
from slimkernels.sparse_logits import SparseLogits


class SlimLoss(NamedTuple):
    """A loss, scalar or (...), and its statistics per token (...), which are detached and 0 at ignored tokens.

    Those after ``lse`` are None unless they were asked for.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor
    weight: Tensor
    teacher_mass: Tensor
    student_mass: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    argmax_kept: Tensor | None = None
    argmax_correct: Tensor | None = None
    teacher_surer: Tensor | None = None
    overlap: Tensor | None = None


def slim_loss(
    logits: Tensor,
    target: Tensor,
    teacher: SparseLogits | None = None,
    *,
    temperature: float = 1.0,
    rest: str = "renorm",
    divergence: str = "forward_kl",
    token_weight: str | Tensor = "teacher_over_student",
    detach_weight: bool = True,
    beta: float | None = None,
    alpha: float | None = None,
    forward_weight: float = 1.0,
    entropy_threshold: float = 0.8,
    teacher_blend: float = 1.0,
    tail_weight: float = 1.0,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    statistics: bool | str = False,
) -> SlimLoss:
    """Computes ce_weight * CE + kd_weight * w * D * T^2 + z_loss_weight * lse^2 of every token, reduced.

    With z = softcap * tanh(logit_scale * logits / softcap), s = softmax(z), p = softmax(z / T), y the label and
    t_y the teacher's probability of it at T = 1:

    - CE = -(1 - eps) * log s_y - eps / V * sum log s, eps = ``label_smoothing``.
    - w = 1 - exp(-t_y / s_y) (``"teacher_over_student"``), 1 - exp(-s_y / t_y) (``"student_over_teacher"``),
      1 (``"none"``) or the given (...) tensor. The log of the ratio is limited to 30. A label outside the teacher's
      ids whose ``target_logit`` is not known has t_y = 0, so that w is 0 (first form) or 1 (second form).
    - D = divergence(Q, P), where Q is ``sparse_softmax(teacher)`` and P the student on the same outcomes: the kept
      ids, plus one bucket of mass 1 - sum_S p (``"ghost"``), or every id (``"zero_logit"``). P is renormalised
      on the kept ids with ``"renorm_both"`` only. With ``teacher_blend`` t below 1, softmax(t log Q + (1 - t) log P)
      over the outcomes, a constant to the gradient, takes the place of Q in D alone. ``tail_weight`` multiplies the
      bucket's share of D. ``divergence_shares`` has the divergences.

    ``logits`` are (..., V); ``target`` (...) int64 holds labels or ``ignore_index``; ``teacher`` has rows (..., K), or
    is None for CE and z-loss alone (kd, weight and masses are then 0). All fields of the result are float32 (float64
    for float64 logits); kd is D * T^2; teacher_mass is NaN where the teacher's lse at T is neither known nor needed.

    ``statistics`` "without_overlap" adds the entropy of s, the entropy of the teacher's outcomes, and as 0 or 1 whether
    the student's argmax is kept, whether it is the label, and whether t_y > s_y; True adds the overlap too.
    """
    alpha = {"ab": 0.2}.get(divergence, 0.1) if alpha is None else alpha
    beta = {"ab": 0.7}.get(divergence, 0.5) if beta is None else beta
    _check_options(temperature, rest, divergence, token_weight, beta, alpha, softcap, reduction, num_items)
    _check_divergence_options(rest, divergence, forward_weight, entropy_threshold, teacher_blend, tail_weight)
    if not (isinstance(statistics, bool) or statistics == "without_overlap"):
        raise ValueError(f"statistics must be False, 'without_overlap' or True, got {statistics!r}")
    leading_shape, vocab_size = tuple(target.shape), logits.shape[-1]
    if logits.shape[:-1] != leading_shape:
        raise ValueError(f"target must have shape {tuple(logits.shape[:-1])} like logits, got {leading_shape}")
    labels = target.reshape(-1)
    # Ignored rows are dropped before the computation instead of masked after it, so that their contents cannot leak.
    active = labels != ignore_index
    label = labels[active].unsqueeze(-1)
    if ((label < 0) | (label >= vocab_size)).any():
        raise ValueError(f"target must lie in [0, {vocab_size}) or be ignore_index={ignore_index}")
    raw = logits.reshape(-1, vocab_size)[active].detach()
    z = logits.reshape(-1, vocab_size)[active]
    z = effective_logits(z.to(accumulate_dtype(z)), softcap, logit_scale)

    lse = logsumexp(z)
    log_s = z - lse.unsqueeze(-1)
    log_s_y = log_s.gather(-1, label).squeeze(-1)
    ce = -log_s_y
    if label_smoothing:
        ce = (1 - label_smoothing) * ce - label_smoothing / vocab_size * log_s.sum(-1)
    # A term of weight 0 is dropped, so that an infinite one does not become NaN.
    loss = ce_weight * ce if ce_weight else torch.zeros_like(ce)
    if z_loss_weight:
        loss = loss + z_loss_weight * lse.square()

    kd = w = teacher_mass = student_mass = torch.zeros_like(ce)
    rows = log_t_y = None
    if teacher is not None:
        if teacher.leading_shape != leading_shape:
            raise ValueError(f"teacher must have rows {leading_shape} like target, got {teacher.leading_shape}")
        rows = as_constant(teacher.reshape(labels.numel())[active], z.dtype)
        student_sums = _sum_student(z / temperature, rows.ids, rest)
        teacher_sums = _sum_teacher(rows, label, temperature, rest, vocab_size)
        log_q, log_p = teacher_sums.log_q, student_sums.log_p
        if divergence == "gated":
            is_uncertain = _teacher_entropy(rows, temperature, vocab_size) > entropy_threshold
            gate = forward_weight * is_uncertain.to(z.dtype).unsqueeze(-1)
        else:
            gate = torch.zeros_like(ce).unsqueeze(-1)
        if teacher_blend != 1:
            log_q = blend(log_q, log_p.detach(), teacher_blend)
        shares = divergence_shares(
            log_q, log_p, divergence, beta, alpha, gate, is_proper=rest in ("ghost", "renorm_both")
        )
        if tail_weight != 1:
            # A weight of 0 drops the bucket, even where its share is infinite.
            tail = shares[:, -1:] * tail_weight if tail_weight else torch.zeros_like(shares[:, -1:])
            shares = torch.cat([shares[:, :-1], tail], dim=-1)
        kd = shares.sum(-1) * temperature**2
        if isinstance(token_weight, Tensor):
            w = token_weight.detach().reshape(-1)[active].to(z.dtype)
        else:
            w = adaptive_weight(token_weight, teacher_sums.log_t_y, log_s_y)
            w = w.detach() if detach_weight else w
        log_t_y = teacher_sums.log_t_y
        teacher_mass, student_mass = teacher_sums.mass, student_sums.log_mass.exp()
        if kd_weight:
            loss = loss + kd_weight * w * kd
    watched = _statistics(raw, log_s, lse, label, log_s_y, rows, log_t_y, temperature, statistics)

    def per_token(values: Tensor) -> Tensor:
        return values.new_zeros(labels.shape).index_put((active,), values).reshape(leading_shape)

    loss = per_token(loss)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (active.sum().clamp(min=1) if num_items is None else num_items)
    return SlimLoss(loss, *(per_token(x.detach()) for x in (ce, kd, w, teacher_mass, student_mass, lse, *watched)))


def _statistics(
    logits: Tensor,
    log_s: Tensor,
    lse: Tensor,
    label: Tensor,
    log_s_y: Tensor,
    rows: SparseLogits | None,
    log_t_y: Tensor | None,
    temperature: float,
    statistics: bool | str,
) -> list[Tensor]:
    """Computes the fields of ``SlimLoss`` after ``lse`` (N,), as many as ``statistics`` asks for.

    - entropy: -sum s log s, at temperature 1.
    - teacher_entropy: -sum q log q at T over the outcomes of ``"ghost"``, whatever ``rest`` is: a lower bound of the
      row's entropy; NaN where the teacher's lse at T is not known.
    - argmax_kept, argmax_correct: 1 where the first of the largest logits is at a kept id, or at the label.
    - teacher_surer: 1 where t_y > s_y.
    - overlap: the share of the kept ids that are among the K largest logits, K the number of kept ids of the row.

    Without a teacher only entropy and argmax_correct are not 0. All are NaN where the student's lse is.
    """
    if not statistics:
        return []
    none = torch.zeros_like(log_s_y)
    argmax = logits.argmax(-1, keepdim=True)
    entropy, correct = _entropy(log_s), (argmax == label).squeeze(-1).to(none.dtype)
    teacher_entropy = kept_argmax = surer = overlap = none
    if rows is not None and log_t_y is not None:
        teacher_entropy = torch.full_like(none, math.nan)
        if any(math.isclose(temperature, captured, rel_tol=1e-6) for captured in rows.temperatures):
            teacher_entropy = _teacher_entropy(rows, temperature, logits.shape[-1])
        kept_argmax = (rows.ids == argmax).any(-1).to(none.dtype)
        surer = (log_t_y > log_s_y).to(none.dtype)
        num_kept = (rows.ids >= 0).sum(-1, keepdim=True)
        rank = torch.sort(logits, dim=-1, descending=True, stable=True).indices.argsort(-1)
        is_shared = (rank.gather(-1, rows.ids.long().clamp(min=0)) < num_kept) & (rows.ids >= 0)
        overlap = is_shared.sum(-1) / num_kept.squeeze(-1).clamp(min=1).to(none.dtype)
    fields = [entropy, teacher_entropy, kept_argmax, correct, surer, overlap]
    return [field.masked_fill(lse.isnan(), math.nan) for field in fields[: None if statistics is True else -1]]


def _teacher_entropy(rows: SparseLogits, temperature: float, vocab_size: int) -> Tensor:
    """Computes the entropy (N,) of the outcomes of ``"ghost"``."""
    ghost = sparse_softmax(rows, temperature=temperature, rest="ghost", vocab_size=vocab_size)
    return _entropy(torch.cat([ghost.logprobs, ghost.tail_logprob.unsqueeze(-1)], dim=-1))


def _entropy(logprobs: Tensor) -> Tensor:
    """Computes the entropy (N,) of outcomes with log-probabilities (N, K), which rounding cannot make negative."""
    return weighted(logprobs, -logprobs).sum(-1).clamp(min=0)


class _StudentSums(NamedTuple):
    """Stage 1: ``log_p`` (N, outcomes), and log P, the ``log_mass`` (N,) of the student on the kept ids."""

    log_p: Tensor
    log_mass: Tensor


class _TeacherSums(NamedTuple):
    """Stage 2: ``log_q`` (N, outcomes), the label's ``log_t_y`` (N,), and a, the ``mass`` (N,) on the kept ids."""

    log_q: Tensor
    log_t_y: Tensor
    mass: Tensor


def _sum_student(scaled: Tensor, ids: Tensor, rest: str) -> _StudentSums:
    """Computes stage 1 from z / T (N, V) and the teacher's ids (N, K)."""
    num_rows, vocab_size = scaled.shape
    kept, slots = _slots(ids, vocab_size)
    log_p = scaled - logsumexp(scaled).unsqueeze(-1)
    log_p_on = log_p.gather(1, slots.clamp(max=vocab_size - 1)).masked_fill(~kept, -math.inf)
    log_mass = logsumexp(log_p_on)
    if rest == "zero_logit":
        return _StudentSums(log_p, log_mass)
    if rest == "ghost":
        is_on = kept.new_zeros(num_rows, vocab_size + 1).scatter(1, slots, True)[:, :vocab_size]
        log_p_tail = logsumexp(log_p.masked_fill(is_on, -math.inf))
        return _StudentSums(torch.cat([log_p_on, log_p_tail.unsqueeze(-1)], dim=-1), log_mass)
    if rest == "renorm_both":
        log_p_on = log_p_on - finite(log_mass).unsqueeze(-1)
    return _StudentSums(log_p_on, log_mass)


def _sum_teacher(teacher: SparseLogits, label: Tensor, temperature: float, rest: str, vocab_size: int) -> _TeacherSums:
    """Computes stage 2 from the teacher's rows and the labels (N, 1)."""
    kept, slots = _slots(teacher.ids, vocab_size)
    q = sparse_softmax(teacher, temperature=temperature, rest=rest, vocab_size=vocab_size)
    log_q = q.logprobs
    if rest == "zero_logit":
        num_unkept = (vocab_size - kept.sum(-1)).clamp(min=1)
        log_q_unkept = (q.tail_logprob - num_unkept.to(q.tail_logprob.dtype).log()).unsqueeze(-1)
        log_q = log_q_unkept.expand(-1, vocab_size + 1).scatter(1, slots, q.logprobs)[:, :vocab_size]
    if rest == "ghost":
        log_q = torch.cat([q.logprobs, q.tail_logprob.unsqueeze(-1)], dim=-1)
    return _TeacherSums(log_q, _log_label_probability(teacher, label), _teacher_mass(teacher, temperature))


def _slots(ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Returns which ids are kept, and their columns; padding points at a column V, which callers cut off again."""
    kept = ids >= 0
    return kept, ids.long().masked_fill(~kept, vocab_size)


def _log_label_probability(teacher: SparseLogits, label: Tensor) -> Tensor:
    """Computes log t_y (N,); -inf where the label (N, 1) is outside ids and its target_logit is not known."""
    label_logit = teacher.logits.masked_fill(teacher.ids != label, -math.inf).amax(-1)
    if teacher.target_logit is not None:
        label_logit = torch.where(teacher.target_logit.isnan(), label_logit, teacher.target_logit)
    lse = teacher.lse_at(1.0)
    return label_logit - lse.masked_fill(lse == -math.inf, 0.0)


def _teacher_mass(teacher: SparseLogits, temperature: float) -> Tensor:
    if not any(math.isclose(temperature, captured, rel_tol=1e-6) for captured in teacher.temperatures):
        return torch.full_like(teacher.lse[:, 0], math.nan)
    lse = teacher.lse_at(temperature)
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    return (teacher.logits / temperature - lse.unsqueeze(-1)).exp().masked_fill(teacher.ids < 0, 0.0).sum(-1)


def linear_slim_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    teacher: SparseLogits | None = None,
    *,
    bias: Tensor | None = None,
    token_weight: str | Tensor = "teacher_over_student",
    chunk_rows: int | None = None,
    **options,
) -> SlimLoss:
    """``slim_loss`` of ``hidden`` (..., D) @ ``weight`` (V, D).T + ``bias`` (V,), with the same ``options``.

    The product is computed in float32 (float64). ``chunk_rows``, which bounds the memory of the op, has no effect here.
    """
    return slim_loss(linear(hidden, weight, bias), target, teacher, token_weight=token_weight, **options)


def _check_options(temperature, rest, divergence, token_weight, beta, alpha, softcap, reduction, num_items) -> None:
    _require(temperature > 0 and math.isfinite(temperature), "temperature", "positive and finite", temperature)
    _require(rest in RESTS, "rest", f"one of {RESTS}", rest)
    _require(divergence in DIVERGENCES, "divergence", f"one of {DIVERGENCES}", divergence)
    if divergence not in ("forward_kl", "soft_ce"):
        # These divergences weigh with the student, so it must sum to 1 over the outcomes as well.
        _require(rest in ("ghost", "renorm_both"), "rest", f"'ghost' or 'renorm_both' with {divergence!r}", rest)
    is_known = isinstance(token_weight, Tensor) or token_weight in WEIGHTS
    _require(is_known, "token_weight", f"one of {WEIGHTS} or a tensor", token_weight)
    if divergence == "ab":
        is_legal = (alpha, beta) in ((1, 0), (0, 1)) or (alpha >= 0.05 and beta >= 0.05)
        _require(is_legal, "(alpha, beta)", "(1, 0), (0, 1) or both at least 0.05 with 'ab'", (alpha, beta))
    else:
        _require(0 < beta < 1, "beta", "in (0, 1)", beta)
        _require(0 <= alpha < 1, "alpha", "in [0, 1)", alpha)
    _require(softcap is None or softcap > 0, "softcap", "positive or None", softcap)
    _require(reduction in ("mean", "sum", "none"), "reduction", "'mean', 'sum' or 'none'", reduction)
    _require(num_items is None or reduction == "mean", "num_items", "None unless reduction='mean'", num_items)


def _require(legal: bool, name: str, expected: str, got) -> None:
    if not legal:
        raise ValueError(f"{name} must be {expected}, got {got!r}")


def _check_divergence_options(rest, divergence, forward_weight, entropy_threshold, teacher_blend, tail_weight) -> None:
    _require(forward_weight >= 0, "forward_weight", "at least 0", forward_weight)
    _require(entropy_threshold >= 0, "entropy_threshold", "at least 0", entropy_threshold)
    _require(0 < teacher_blend <= 1, "teacher_blend", "in (0, 1]", teacher_blend)
    is_proper = rest in ("ghost", "renorm_both")
    _require(teacher_blend == 1 or is_proper, "rest", "'ghost' or 'renorm_both' with a teacher_blend below 1", rest)
    _require(tail_weight >= 0, "tail_weight", "at least 0", tail_weight)
    is_kl = divergence not in ("soft_ce", "jsd", "tvd", "ab")
    _require(tail_weight == 1 or rest == "ghost", "rest", "'ghost' with a tail_weight other than 1", rest)
    _require(tail_weight == 1 or is_kl, "divergence", "a KL with a tail_weight other than 1", divergence)
