"""The definition of every op in plain torch.

The functions take any float dtype (half types are computed in float32, float64 stays float64) and any device, are
differentiable by autograd, and use O(N * V) memory. In float64 they are the truth that the kernels are tested against.
So no mass is computed as one minus another that may be close to one, and an outcome of probability zero contributes an
exact zero to values and gradients. Tests and benchmarks import this module; the ops never do.

``...`` stands for any leading dimensions, N for their product, V for the vocabulary, K for the kept entries.
``ops/README.md`` lists the names of ``slim_loss`` and its four stages, of which autograd computes the last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.sparse_logits import SparseLogits

RESTS = ("renorm", "zero", "ghost", "zero_logit", "renorm_both")
DIVERGENCES = ("forward_kl", "soft_ce", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "ab", "gated")
WEIGHTS = ("teacher_over_student", "student_over_teacher", "none")


class SparseProbs(NamedTuple):
    """A teacher's distribution: ``logprobs`` (..., K) at its ids, ``tail_logprob`` (...) of all other ids together."""

    logprobs: Tensor
    tail_logprob: Tensor


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


def topk_logits(
    logits: Tensor,
    top_k: int | None = None,
    top_fraction: float | None = None,
    *,
    target: Tensor | None = None,
    temperatures: tuple[float, ...] = (1.0,),
) -> SparseLogits:
    """Keeps the K largest of every row, ordered by id, and the row's log-sum-exps at every temperature.

    ``lse`` is that of the whole row, ``rest_lse`` that of its entries that are not kept.

    NaN is larger than +inf, -0.0 equals +0.0, and among equal values the lowest index is kept.

    Args:
        logits: (..., V), any float dtype.
        top_k: K, 1 <= K <= V.
        top_fraction: Alternative to ``top_k``, with K = ceil(top_fraction * V).
        target: (...) int64 labels, whose logits become ``target_logit``; NaN where a label is negative.
        temperatures: Temperatures of the columns of ``lse`` and ``rest_lse``; 1.0 is always the first, given or not.

    Returns:
        ids and logits (..., K), logits in the dtype of the input; lse and rest_lse (..., M) and target_logit (...) in
        float32 (float64 for float64).
    """
    vocab_size = logits.shape[-1]
    top_k = _resolve_top_k(top_k, top_fraction, vocab_size)
    temperatures = (1.0, *(t for t in temperatures if t != 1.0))
    # A stable descending sort puts NaN first and keeps equal values in the order of their index.
    by_value = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices
    ids = by_value[..., :top_k].sort(dim=-1).values
    return gather_logits(logits, ids.to(torch.int32), target=target, temperatures=temperatures)


def gather_logits(
    logits: Tensor, ids: Tensor, *, target: Tensor | None = None, temperatures: tuple[float, ...] = (1.0,)
) -> SparseLogits:
    """Keeps the logits of every row at given ids, and the row's log-sum-exps at every temperature.

    Args:
        logits: (..., V), any float dtype.
        ids: (..., K) int32, ascending; -1 pads rows that have fewer than K.
        target: (...) int64 labels, or None; see ``topk_logits``.
        temperatures: Temperatures of the columns of ``lse`` and ``rest_lse``; 1.0 is always the first.

    Returns:
        The fields of ``topk_logits``, with ``rest_lse`` of the logits that are not at the ids; logits are 0 at padding.
    """
    vocab_size = logits.shape[-1]
    temperatures = (1.0, *(t for t in temperatures if t != 1.0))
    index, padding = ids.long().clamp(min=0), ids < 0
    wide = logits.to(_accumulate_dtype(logits))
    # One more column takes the marks of the padding.
    kept = torch.zeros(*wide.shape[:-1], vocab_size + 1, dtype=torch.bool, device=ids.device)
    kept = kept.scatter(-1, index.masked_fill(padding, vocab_size), True)[..., :vocab_size]
    off = wide.masked_fill(kept, -math.inf)
    target_logit = None
    if target is not None:
        if (target >= vocab_size).any():
            raise ValueError(f"target must be below the vocabulary size {vocab_size}, got {int(target.max())}")
        target_logit = wide.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(target < 0, math.nan)
    return SparseLogits(
        ids=ids,
        logits=logits.gather(-1, index).masked_fill(padding, 0.0),
        lse=torch.stack([_logsumexp(wide / temperature) for temperature in temperatures], dim=-1),
        temperatures=temperatures,
        target_logit=target_logit,
        rest_lse=torch.stack([_logsumexp(off / temperature) for temperature in temperatures], dim=-1),
    )


def supported_logits(
    logits: Tensor,
    student_logits: Tensor,
    support: str,
    *,
    top_k: int,
    student_top_k: int,
    target: Tensor | None = None,
    temperatures: tuple[float, ...] = (1.0,),
) -> SparseLogits:
    """Keeps a teacher's logits at the ids on which a student is compared with it.

    With T the ids of the teacher's ``top_k`` largest logits and P those of the student's ``student_top_k``, each as
    ``topk_logits`` chooses them, the kept ids of a row are:

    - ``"teacher"``: T.
    - ``"student"``: P.
    - ``"union"``: the ids in T or P, each of them once.
    - ``"intersection"``: the ids in both, of which there may be none.

    The choice of ids has no gradient.

    Args:
        logits: (..., V) of the teacher.
        student_logits: (..., V) of the student.
        support: Name of the set.
        top_k: Size of T.
        student_top_k: Size of P.
        target: (...) int64 labels, or None; see ``topk_logits``.
        temperatures: Temperatures of the columns of ``lse`` and ``rest_lse``; 1.0 is always the first.

    Returns:
        The fields of ``gather_logits`` of ``logits`` at the kept ids, ascending and padded with -1 to ``top_k``,
        ``student_top_k``, min(``top_k`` + ``student_top_k``, V) or ``top_k`` entries. ``rest_lse`` is that of all other
        logits, also of those in T that are not kept.
    """
    vocab_size = logits.shape[-1]

    def largest(rows: Tensor, count: int) -> Tensor:
        ids = topk_logits(rows, count).ids.long()
        return torch.zeros(rows.shape, dtype=torch.bool, device=rows.device).scatter(-1, ids, True)

    of_teacher, of_student = largest(logits, top_k), largest(student_logits, student_top_k)
    kept, width = {
        "teacher": (of_teacher, top_k),
        "student": (of_student, student_top_k),
        "union": (of_teacher | of_student, min(top_k + student_top_k, vocab_size)),
        "intersection": (of_teacher & of_student, top_k),
    }[support]
    every = torch.arange(vocab_size, device=logits.device).expand(logits.shape)
    ids = every.masked_fill(~kept, vocab_size).sort(-1).values[..., :width]
    ids = ids.masked_fill(ids == vocab_size, -1).to(torch.int32)
    return gather_logits(logits, ids, target=target, temperatures=temperatures)


@torch.no_grad()
def linear_topk_logits(
    hidden: Tensor,
    weight: Tensor,
    top_k: int | None = None,
    top_fraction: float | None = None,
    *,
    bias: Tensor | None = None,
    target: Tensor | None = None,
    temperatures: tuple[float, ...] = (1.0,),
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
) -> SparseLogits:
    """``topk_logits`` of the effective logits of ``hidden`` (..., D) @ ``weight`` (V, D).T + ``bias`` (V,).

    The product is computed in float32 (float64); only the kept logits are rounded to the dtype of ``hidden``.
    ``chunk_rows``, which bounds the memory of the op, has no effect here. There is no gradient.
    """
    logits = _effective_logits(_linear(hidden, weight, bias), softcap, logit_scale)
    sparse = topk_logits(logits, top_k, top_fraction, target=target, temperatures=temperatures)
    return dataclasses.replace(sparse, logits=sparse.logits.to(hidden.dtype))


def sparse_softmax(
    sparse: SparseLogits, *, temperature: float = 1.0, rest: str = "renorm", vocab_size: int | None = None
) -> SparseProbs:
    """Computes the teacher's distribution at ``temperature``, where ``rest`` gives the mass outside its ids a meaning.

    With l = logits / T, q = exp(l - lse_T) and a = sum q:

    - ``"renorm"``, ``"renorm_both"``: q / a on the ids, 0 outside; ``lse`` is not needed.
    - ``"zero"``: q on the ids, 0 outside, so the row sums to a.
    - ``"ghost"``: q on the ids, and one bucket of mass 1 - a. With ``rest_lse`` r, log Z = log(sum exp(l) + exp(r))
      takes the place of lse_T, so that both sum to 1 whatever rounded the logits, and the bucket has exp(r) / Z. In a
      row without it, 1 - a = -expm1(log a), 0 when a >= 1 or every id is kept, and not known below about 1e-5.
    - ``"zero_logit"``: exp(l) / Z with Z = sum exp(l) + (V - kept), because the unkept logits are taken as 0.

    Padding, and every id of a row with no mass on its ids, has log-probability -inf and gradient 0. So has the bucket
    of a row without any mass, whose lse is -inf.
    """
    if rest not in RESTS:
        raise ValueError(f"rest must be one of {RESTS}, got {rest!r}")
    dtype = _accumulate_dtype(sparse.logits)
    kept = sparse.ids >= 0
    teacher_z = (sparse.logits.to(dtype) / temperature).masked_fill(~kept, -math.inf)
    lse_on = _logsumexp(teacher_z)
    q_norm, tail = _finite(lse_on), torch.full_like(lse_on, -math.inf)
    if rest == "zero_logit":
        if vocab_size is None:
            raise ValueError("vocab_size is needed with rest='zero_logit': pass the width V of the teacher's rows")
        log_unkept = (vocab_size - kept.sum(-1)).to(dtype).log()
        q_norm = _finite(_logsumexp(torch.stack([lse_on, log_unkept], dim=-1)))
        tail = (log_unkept - q_norm).masked_fill(log_unkept == -math.inf, -math.inf)
    if rest in ("zero", "ghost"):
        lse = sparse.lse_at(temperature).to(dtype)
        q_norm = lse.masked_fill(lse == -math.inf, 0.0)
    if rest == "ghost":
        is_whole = (kept.sum(-1) == (vocab_size or -1)) | (lse == -math.inf)
        tail = _log1mexp(lse_on - q_norm).masked_fill(is_whole, -math.inf)
        rest_lse = sparse.rest_lse_at(temperature)
        if rest_lse is not None:
            is_known = ~rest_lse.isnan()
            rest_lse = rest_lse.to(dtype).masked_fill(~is_known, 0.0)
            norm = _logsumexp(torch.stack([lse_on, rest_lse], dim=-1))
            norm = torch.where(norm == -math.inf, 0.0, norm)
            q_norm = torch.where(is_known, norm, q_norm)
            rest_tail = (rest_lse - norm).masked_fill(rest_lse == -math.inf, -math.inf)
            tail = torch.where(is_known, rest_tail, tail)
    logprobs = (teacher_z - q_norm.unsqueeze(-1)).masked_fill(teacher_z == -math.inf, -math.inf)
    return SparseProbs(logprobs, tail)


def mix(parts: Sequence[SparseLogits], weights: Sequence[float | Tensor]) -> SparseLogits:
    """Mixes the distributions of several teachers: p = sum of w_m q_m, q_m that of ``sparse_softmax`` with "ghost".

    The outcomes are the ids that any input keeps, and one bucket of all others. Where an input does not keep an id, its
    probability of that id is in its bucket and stays in the mixture's. So the log-probabilities are exact where every
    input keeps the union of ids; elsewhere those at the ids are lower bounds, and the bucket an upper one, of the
    mixture of the whole rows. All outcomes sum to 1.

    An input of weight 0 counts for nothing in its row, as if it were not given: neither its ids nor a NaN. Nor does a
    row without any mass, whose lse is -inf, add anything to the mixture.

    Args:
        parts: Rows of each teacher, of one leading shape (...); only temperature 1 is read.
        weights: Weight of each teacher, a number or (...); at least 0, and 1 in sum. A number 0 drops its teacher.

    Returns:
        Log-probabilities at temperature 1, lse 0. ids and logits (..., sum K_m), ids ascending and padded with -1.
        ``rest_lse`` is the log-probability of the bucket; NaN where that of one input is not known, None without any
        known one. ``target_logit`` is the log of the sum of w_m exp(target_logit_m - lse_m), None unless all have it. A
        row of which an input's lse is NaN or +inf has lse NaN.
    """
    used = [(part, weight) for part, weight in zip(parts, weights, strict=True) if isinstance(weight, Tensor) or weight]
    dtype = torch.float64 if any(part.lse.dtype == torch.float64 for part, _ in used) else torch.float32
    every, kept, tails, labels, bad = [], [], [], [], []
    for given, weight in used:
        part = _constant(given, dtype)
        share = torch.as_tensor(weight, dtype=dtype, device=part.device).expand(part.leading_shape)
        every.append(part.ids.masked_fill((share == 0).unsqueeze(-1), -1))
        lse = part.lse_at(1.0)
        counts = (share > 0) & (lse != -math.inf)
        bad.append(counts & ~(lse < math.inf))
        q = sparse_softmax(part, rest="ghost")
        rest_lse = part.rest_lse_at(1.0)
        unknown = torch.ones_like(counts) if rest_lse is None else rest_lse.isnan()
        kept.append((q.logprobs + share.log().unsqueeze(-1)).masked_fill(~counts.unsqueeze(-1), -math.inf))
        tails.append((q.tail_logprob + share.log()).masked_fill(unknown, math.nan).masked_fill(~counts, -math.inf))
        if part.target_logit is not None:
            labels.append((part.target_logit - lse + share.log()).masked_fill(~counts, -math.inf))

    ids = _distinct(torch.cat(every, dim=-1))
    logprobs = torch.full(ids.shape, -math.inf, dtype=dtype, device=ids.device)
    for own, values in zip(every, kept, strict=True):
        is_same = (ids.unsqueeze(-1) == own.unsqueeze(-2)) & (ids >= 0).unsqueeze(-1)
        logprobs = torch.logaddexp(logprobs, values.unsqueeze(-2).where(is_same, -math.inf).amax(-1))
    lse = torch.zeros_like(tails[0]).masked_fill(torch.stack(bad).any(0), math.nan)
    return SparseLogits(
        ids=ids,
        logits=logprobs.masked_fill(ids < 0, 0.0),
        lse=lse.unsqueeze(-1),
        target_logit=_logsumexp(torch.stack(labels, dim=-1)) if len(labels) == len(used) else None,
        rest_lse=None
        if all(part.rest_lse is None for part, _ in used)
        else _logsumexp(torch.stack(tails, dim=-1)).unsqueeze(-1),
    )


def _distinct(ids: Tensor) -> Tensor:
    """Returns the ids (..., L) of every row, each once, ascending and padded with -1."""
    none = torch.iinfo(torch.int32).max
    ids = ids.masked_fill(ids < 0, none).sort(-1).values
    is_repeated = torch.zeros_like(ids, dtype=torch.bool)
    is_repeated[..., 1:] = ids[..., 1:] == ids[..., :-1]
    ids = ids.masked_fill(is_repeated, none).sort(-1).values
    return ids.masked_fill(ids == none, -1)


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
      bucket's share of D. ``_shares`` has the divergences.

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
    z = _effective_logits(z.to(_accumulate_dtype(z)), softcap, logit_scale)

    lse = _logsumexp(z)
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
        rows = _constant(teacher.reshape(labels.numel())[active], z.dtype)
        student_sums = _sum_student(z / temperature, rows.ids, rest)
        teacher_sums = _sum_teacher(rows, label, temperature, rest, vocab_size)
        log_q, log_p = teacher_sums.log_q, student_sums.log_p
        if divergence == "gated":
            is_uncertain = _teacher_entropy(rows, temperature, vocab_size) > entropy_threshold
            gate = forward_weight * is_uncertain.to(z.dtype).unsqueeze(-1)
        else:
            gate = torch.zeros_like(ce).unsqueeze(-1)
        if teacher_blend != 1:
            log_q = _blend(log_q, log_p.detach(), teacher_blend)
        shares = _shares(log_q, log_p, divergence, beta, alpha, gate, is_proper=rest in ("ghost", "renorm_both"))
        if tail_weight != 1:
            # A weight of 0 drops the bucket, even where its share is infinite.
            tail = shares[:, -1:] * tail_weight if tail_weight else torch.zeros_like(shares[:, -1:])
            shares = torch.cat([shares[:, :-1], tail], dim=-1)
        kd = shares.sum(-1) * temperature**2
        if isinstance(token_weight, Tensor):
            w = token_weight.detach().reshape(-1)[active].to(z.dtype)
        else:
            w = _token_weight(token_weight, teacher_sums.log_t_y, log_s_y)
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
    return _weighted(logprobs, -logprobs).sum(-1).clamp(min=0)


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
    log_p = scaled - _logsumexp(scaled).unsqueeze(-1)
    log_p_on = log_p.gather(1, slots.clamp(max=vocab_size - 1)).masked_fill(~kept, -math.inf)
    log_mass = _logsumexp(log_p_on)
    if rest == "zero_logit":
        return _StudentSums(log_p, log_mass)
    if rest == "ghost":
        is_on = kept.new_zeros(num_rows, vocab_size + 1).scatter(1, slots, True)[:, :vocab_size]
        log_p_tail = _logsumexp(log_p.masked_fill(is_on, -math.inf))
        return _StudentSums(torch.cat([log_p_on, log_p_tail.unsqueeze(-1)], dim=-1), log_mass)
    if rest == "renorm_both":
        log_p_on = log_p_on - _finite(log_mass).unsqueeze(-1)
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


def _blend(log_q: Tensor, log_p: Tensor, t: float) -> Tensor:
    """Computes log softmax(t log q + (1 - t) log p) of every row (N, outcomes), t < 1; of no mass where all are -inf.

    An outcome that either excludes is excluded. TAID (arXiv 2501.16937) blends the logits of whole rows.
    """
    blended = t * log_q + (1 - t) * log_p
    norm = _finite(_logsumexp(blended)).unsqueeze(-1)
    return (blended - norm).masked_fill(blended == -math.inf, -math.inf)


def _shares(
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
        return _weighted(log_q, -log_p)
    if divergence == "forward_kl":
        return _kl_shares(log_q, log_p) if is_proper else _weighted(log_q, log_q - log_p)
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
    log_m = _logsumexp(torch.stack([log_q + log_of_teacher, log_p + log_of_student], dim=-1))
    if divergence == "skew_kl":
        return _kl_shares(log_q, log_m)
    of_p = _kl_shares(log_p.masked_fill(log_m == -math.inf, -math.inf), log_m)
    return of_p if divergence == "skew_reverse_kl" else beta * _kl_shares(log_q, log_m) + (1 - beta) * of_p


def _kl_shares(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Computes a log(a / b) - a + b, no less than 0: the shares of KL(A || B) of distributions that sum to 1."""
    a, b = log_a.exp(), log_b.exp()
    return a * (log_a - log_b).masked_fill(a == 0, 0.0) - a + b


def _token_weight(kind: str, log_t_y: Tensor, log_s_y: Tensor) -> Tensor:
    """Computes w (N,), part of stage 3."""
    if kind == "none":
        return torch.ones_like(log_s_y)
    sign = 1.0 if kind == "teacher_over_student" else -1.0
    # If the teacher's probability of the label is 0, the ratio ignores the student's, even at 0/0.
    log_ratio = torch.where(log_t_y == -math.inf, -sign * math.inf, sign * (log_t_y - log_s_y))
    return -torch.expm1(-torch.exp(log_ratio.clamp(max=30.0)))


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
    return slim_loss(_linear(hidden, weight, bias), target, teacher, token_weight=token_weight, **options)


def _constant(teacher: SparseLogits, dtype: torch.dtype) -> SparseLogits:
    floating = {name: getattr(teacher, name) for name in ("logits", "lse", "target_logit", "rest_lse")}
    floating = {name: None if field is None else field.detach().to(dtype) for name, field in floating.items()}
    return dataclasses.replace(teacher, **floating)


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = _accumulate_dtype(hidden)
    product = hidden.to(dtype) @ weight.to(dtype).T
    return product if bias is None else product + bias.to(dtype)


def _effective_logits(logits: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    z = logit_scale * logits
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _weighted(log_weight: Tensor, value: Tensor) -> Tensor:
    """Computes exp(log_weight) * value; an outcome of weight 0 contributes 0 whatever its value."""
    weight = log_weight.exp()
    return weight * value.masked_fill(weight == 0, 0.0)


def _logsumexp(x: Tensor) -> Tensor:
    """Computes the log-sum-exp over the last dimension; -inf, with gradient 0, where everything is -inf."""
    peak = _finite(x.detach().amax(-1, keepdim=True))
    total = (x - peak).exp().sum(-1)
    empty = total == 0
    return (total.masked_fill(empty, 1.0).log() + peak.squeeze(-1)).masked_fill(empty, -math.inf)


def _log1mexp(x: Tensor) -> Tensor:
    """Computes log(1 - exp(x)) without cancellation; -inf, with gradient 0, where x >= 0."""
    full = x >= 0
    near = x > -math.log(2.0)
    small = torch.log1p(-x.masked_fill(near, -1.0).exp())
    large = torch.log(-torch.expm1(x.masked_fill(full | ~near, -0.5)))
    return torch.where(near, large, small).masked_fill(full, -math.inf)


def _finite(x: Tensor) -> Tensor:
    """Replaces values that are not finite by 0, which makes a shift that cannot turn inf - inf into NaN."""
    return x.masked_fill(~x.isfinite(), 0.0)


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _resolve_top_k(top_k: int | None, top_fraction: float | None, vocab_size: int) -> int:
    if (top_k is None) == (top_fraction is None):
        raise ValueError(f"exactly one of top_k and top_fraction must be given, got {top_k} and {top_fraction}")
    if top_fraction is not None:
        top_k = math.ceil(top_fraction * vocab_size) if 0 < top_fraction <= 1 else None
    if top_k is None or not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k must lie in [1, {vocab_size}], got {top_k} from top_fraction={top_fraction}")
    return top_k


def _require(legal: bool, name: str, expected: str, got) -> None:
    if not legal:
        raise ValueError(f"{name} must be {expected}, got {got!r}")


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
