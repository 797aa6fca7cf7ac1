"""``sparse_softmax``: the log-probabilities of a sparse teacher at its kept ids and of all other ids together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.ops._library import (
    accumulation_dtype,
    check_kernels,
    check_transforms,
    define,
    operand_of,
    register_autograd,
    run_on_rows,
)
from slimkernels.packed_logits import check_sparse_logits
from slimkernels.sparse_logits import SparseLogits, widen_float8


class SparseProbs(NamedTuple):
    """Natural-log probabilities of a sparse teacher.

    Attributes:
        logprobs: (..., K) float32 (float64 for float64 logits); ``-inf`` at padding.
        tail_logprob: (...) of the same dtype, of all ids outside the kept ones together; ``-inf`` where their
            probability is 0.
    """

    logprobs: Tensor
    tail_logprob: Tensor


def sparse_softmax(
    sparse: SparseLogits, *, temperature: float = 1.0, rest: str = "renorm", vocab_size: int | None = None
) -> SparseProbs:
    """``logprobs = logits / T - log Z``, where ``rest`` chooses the meaning of the mass outside the kept ids S.

    ================ ========================= =======================================================
    rest             on S                      outside S (``tail_logprob``)
    ================ ========================= =======================================================
    "renorm"         q / a                     0
    "zero"           q                         0: the mass 1 - a is dropped
    "ghost"          q                         one bucket of mass 1 - a, ``exp(rest_lse - lse)``
    "zero_logit"     softmax of the row whose  (V - K) exp(0) / Z; not shift invariant: adding a constant
                     unkept logits are 0       to every logit changes the result
    "renorm_both"    q / a                     0; the student is renormalised on S too
    ================ ========================= =======================================================

    with q the teacher's exact probability ``exp(logits / T - lse_T)`` and ``a = sum_S q`` the kept mass. Under "ghost",
    rows with a known ``rest_lse`` take ``logaddexp(logsumexp(logits / T), rest_lse)`` in place of ``lse``, so that the
    probabilities sum to 1 also where the logits were quantised.

    Equivalent to, for "renorm"::

        logprobs = torch.log_softmax(sparse.logits.float() / temperature, -1)

    Args:
        sparse: Rows (..., K).
        temperature: T > 0. "zero" and "ghost" need the teacher's lse at T.
        rest: Name of a row of the table.
        vocab_size: V, needed for "zero_logit"; the ids are checked against it when it is given.

    Returns:
        SparseProbs(logprobs (..., K), tail_logprob (...)).

    Raises:
        TypeError: ``sparse`` is not a SparseLogits.
        ValueError: An unknown ``rest``, a temperature that is not positive or was not captured, a missing vocab_size,
            or ids that do not ascend inside [0, V).

    Supports: cpu and cuda x (float32, bfloat16, float16, float64) x backward (logits, lse, rest_lse) x deterministic.
    On CUDA raising would need a synchronisation, so a row with bad ids becomes NaN.

    Precision: the tail of a row with a known ``rest_lse`` has float32 accuracy, however small it is. In a row without
    one it is ``log(-expm1(log a))``, and a tail mass below about 1e-5 is not known, because the ``lse`` is rounded.

    >>> from slimkernels import topk_logits
    >>> probs = sparse_softmax(topk_logits(torch.zeros(1, 4), top_k=2), rest="ghost")
    >>> probs.logprobs.exp().tolist(), round(probs.tail_logprob.exp().item(), 6)
    ([[0.25, 0.25]], 0.5)
    """
    _checks.check_one_of(rest, "rest", _checks.RESTS)
    temperature = _checks.as_temperature(temperature)
    if rest == "zero_logit" and vocab_size is None:
        raise ValueError(
            "vocab_size must be given with rest='zero_logit', which counts the unkept logits: pass the teacher's V"
        )
    if vocab_size is not None:
        vocab_size = _checks.as_integer(vocab_size, "vocab_size")
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
    check_sparse_logits(sparse, "sparse")
    check_kernels(sparse.logits, "sparse.logits")
    check_transforms("sparse_softmax", sparse.logits, sparse.lse, sparse.rest_lse)
    flat = sparse.flatten()
    logits = widen_float8(flat.logits).contiguous()
    dtype = accumulation_dtype(logits.dtype)
    lse = flat.lse_at(temperature).to(dtype).contiguous() if rest in _checks.RESTS_WITH_LSE else None
    rest_lse = flat.rest_lse_at(temperature) if rest == "ghost" else None
    rest_lse = None if rest_lse is None else rest_lse.to(dtype).contiguous()
    operand = operand_of([temperature], [1.0])
    given = temperature if operand is None else 1.0
    logprobs, tail_logprob = run_on_rows(
        torch.ops.slimkernels.sparse_softmax,
        sparse.leading_shape,
        flat.ids.contiguous(),
        logits,
        lse,
        rest_lse,
        given,
        rest,
        vocab_size or 2**31 - 1,
        operand,
    )
    return SparseProbs(logprobs.reshape(sparse.ids.shape), tail_logprob.reshape(sparse.leading_shape))


def _sparse_softmax(
    ids: Tensor,
    logits: Tensor,
    lse: Tensor | None,
    rest_lse: Tensor | None,
    temperature: float,
    rest: str,
    vocab_size: int,
    operand: Tensor | None,
):
    if operand is not None:
        (temperature,) = operand.tolist()
    outputs = _fake(ids, logits)
    _checks.raise_fault(
        torch.ops.slimkernels.sparse_softmax_rows(ids, logits, lse, rest_lse, temperature, rest, vocab_size, *outputs)
    )
    return outputs


def _fake(ids: Tensor, logits: Tensor, *_options):
    dtype = accumulation_dtype(logits.dtype)
    return torch.empty_like(logits, dtype=dtype), logits.new_empty(logits.shape[0], dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    _, logits, lse, rest_lse, ctx.temperature, ctx.rest, _, operand = inputs
    ctx.save_for_backward(*output, rest_lse, operand)
    ctx.logits_dtype = logits.dtype
    ctx.has_lse = lse is not None


def _backward(ctx, grad_logprobs: Tensor, grad_tail: Tensor):
    logprobs, tail_logprob, rest_lse, operand = ctx.saved_tensors
    temperature = ctx.temperature if operand is None else operand[0]
    # A NaN of a row that nobody asked for the gradient of must not reach it as NaN * 0.
    used = (grad_logprobs != 0).any(-1) | (grad_tail != 0)
    has_tail = used & (tail_logprob > -torch.inf)
    probs = torch.where(used[:, None], logprobs.exp(), 0.0)
    grad_logprobs = grad_logprobs.masked_fill(logprobs == -torch.inf, 0.0)
    grad_tail = grad_tail.masked_fill(~has_tail, 0.0)
    # With x = logits / T, the logprobs and the tail are x and rest_lse less log Z, which has the derivative probs by x.
    sum_upstream = grad_logprobs.sum(-1) + grad_tail
    grad = grad_logprobs - probs * sum_upstream[:, None]
    grad_lse = grad_rest_lse = None
    if ctx.rest in _checks.RESTS_WITH_LSE:
        # Without rest_lse, log Z is lse and the tail log(1 - a), so d tail / d log q_k = -q_k / (1 - a).
        odds = torch.where(has_tail, grad_tail * (-tail_logprob).exp(), 0.0)
        grad_by_lse = grad_logprobs - probs * odds[:, None]
        grad_lse = odds * probs.sum(-1) - grad_logprobs.sum(-1)
        if rest_lse is None:
            grad = grad_by_lse
        else:
            is_known = ~rest_lse.isnan()
            grad = torch.where(is_known[:, None], grad, grad_by_lse)
            grad_lse = grad_lse.masked_fill(is_known, 0.0)
            tail = torch.where(has_tail, tail_logprob.exp(), 0.0)
            grad_rest_lse = (grad_tail - tail * sum_upstream).masked_fill(~is_known, 0.0)
    grad_logits = (grad / temperature).to(ctx.logits_dtype)
    return None, grad_logits, grad_lse if ctx.has_lse else None, grad_rest_lse, None, None, None, None


define(
    "sparse_softmax_rows(Tensor ids, Tensor logits, Tensor? lse, Tensor? rest_lse, float temperature, str rest,"
    " int vocab_size, Tensor(a!) logprobs, Tensor(b!) tail_logprob) -> int",
    fake=lambda *_args: 0,
    triton_module="slimkernels.ops.triton.sparse_softmax",
)
define(
    "sparse_softmax(Tensor ids, Tensor logits, Tensor? lse, Tensor? rest_lse, float temperature, str rest,"
    " int vocab_size, Tensor? operand) -> (Tensor logprobs, Tensor tail_logprob)",
    fake=_fake,
    implementation=_sparse_softmax,
)
register_autograd("sparse_softmax", _backward, _setup_context)
