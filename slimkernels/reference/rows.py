"""A teacher's rows: what is kept of whole ones, and the distributions that they stand for."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.reference.arithmetic import accumulate_dtype, effective_logits, finite, linear, log1mexp, logsumexp
from slimkernels.sparse_logits import SparseLogits

RESTS = ("renorm", "zero", "ghost", "zero_logit", "renorm_both")


class SparseProbs(NamedTuple):
    """A teacher's distribution: ``logprobs`` (..., K) at its ids, ``tail_logprob`` (...) of all other ids together."""

    logprobs: Tensor
    tail_logprob: Tensor


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
    wide = logits.to(accumulate_dtype(logits))
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
        lse=torch.stack([logsumexp(wide / temperature) for temperature in temperatures], dim=-1),
        temperatures=temperatures,
        target_logit=target_logit,
        rest_lse=torch.stack([logsumexp(off / temperature) for temperature in temperatures], dim=-1),
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
    logits = effective_logits(linear(hidden, weight, bias), softcap, logit_scale)
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
    dtype = accumulate_dtype(sparse.logits)
    kept = sparse.ids >= 0
    teacher_z = (sparse.logits.to(dtype) / temperature).masked_fill(~kept, -math.inf)
    lse_on = logsumexp(teacher_z)
    q_norm, tail = finite(lse_on), torch.full_like(lse_on, -math.inf)
    if rest == "zero_logit":
        if vocab_size is None:
            raise ValueError("vocab_size is needed with rest='zero_logit': pass the width V of the teacher's rows")
        log_unkept = (vocab_size - kept.sum(-1)).to(dtype).log()
        q_norm = finite(logsumexp(torch.stack([lse_on, log_unkept], dim=-1)))
        tail = (log_unkept - q_norm).masked_fill(log_unkept == -math.inf, -math.inf)
    if rest in ("zero", "ghost"):
        lse = sparse.lse_at(temperature).to(dtype)
        q_norm = lse.masked_fill(lse == -math.inf, 0.0)
    if rest == "ghost":
        is_whole = (kept.sum(-1) == (vocab_size or -1)) | (lse == -math.inf)
        tail = log1mexp(lse_on - q_norm).masked_fill(is_whole, -math.inf)
        rest_lse = sparse.rest_lse_at(temperature)
        if rest_lse is not None:
            is_known = ~rest_lse.isnan()
            rest_lse = rest_lse.to(dtype).masked_fill(~is_known, 0.0)
            norm = logsumexp(torch.stack([lse_on, rest_lse], dim=-1))
            norm = torch.where(norm == -math.inf, 0.0, norm)
            q_norm = torch.where(is_known, norm, q_norm)
            rest_tail = (rest_lse - norm).masked_fill(rest_lse == -math.inf, -math.inf)
            tail = torch.where(is_known, rest_tail, tail)
    logprobs = (teacher_z - q_norm.unsqueeze(-1)).masked_fill(teacher_z == -math.inf, -math.inf)
    return SparseProbs(logprobs, tail)


def _resolve_top_k(top_k: int | None, top_fraction: float | None, vocab_size: int) -> int:
    if (top_k is None) == (top_fraction is None):
        raise ValueError(f"exactly one of top_k and top_fraction must be given, got {top_k} and {top_fraction}")
    if top_fraction is not None:
        top_k = math.ceil(top_fraction * vocab_size) if 0 < top_fraction <= 1 else None
    if top_k is None or not 1 <= top_k <= vocab_size:
        raise ValueError(f"top_k must lie in [1, {vocab_size}], got {top_k} from top_fraction={top_fraction}")
    return top_k
