"""``topk_logits``: the K largest logits of every row and the log-sum-exp of the whole row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.ops._library import accumulation_dtype, check_kernels, define, register_autograd
from slimkernels.sparse_logits import SparseLogits


def topk_logits(
    logits: Tensor,
    top_k: int | None = None,
    top_fraction: float | None = None,
    *,
    target: Tensor | None = None,
    temperatures: Sequence[float] = (1.0,),
) -> SparseLogits:
    """Keeps exactly the K largest logits of every row, with ``lse_T = log(sum_v(exp(logits_v / T)))``.

    Equivalent to::

        values, ids = logits.topk(top_k, sorted=False)  # but ordered by id, ties to the lowest id
        lse = torch.stack([torch.logsumexp(logits.float() / t, -1) for t in temperatures], -1)
        target_logit = logits.gather(-1, target[..., None])[..., 0].float()

    Every row is read once; nothing of size V is written. Exact for every input: ties, ``-inf`` rows, ``+inf``,
    NaN (the largest, as in ``torch.topk``), ``-0.0 == +0.0``.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, any stride.
        top_k: K, 1 to V. Give this or ``top_fraction``.
        top_fraction: K as a share of the vocabulary, ``ceil(top_fraction * V)``; SLIM keeps 0.05.
        target: (...) int64 labels whose raw logit is kept too; a negative one stands for no label (NaN).
        temperatures: At which the log-sum-exp is taken. 1.0 is always the first column, given or not.

    Returns:
        SparseLogits with ids (..., K) int32 ascending, logits (..., K) in the dtype of ``logits``, lse (..., M)
        and target_logit (...) float32 (float64 for float64 logits).

    Raises:
        ValueError: Neither or both of ``top_k`` and ``top_fraction``, K outside [1, V], a temperature that is not
            positive, a target of another shape or with an index at or past V.
        TypeError: A dtype that is not supported.

    Supports: cpu and cuda x (float32, bfloat16, float16, float64) x backward x deterministic; a row is the same
    whatever rows are beside it. On CUDA the host does not wait, so a label at or past V
    raises nothing there: its ``target_logit`` is NaN.

    Precision: ids and logits are exact; lse is accumulated in float64 over float32 blocks of 1024.

    References: Raman et al. 2023, "For Distillation, Tokens Are Not All You Need" (the top 5 % of the logits).

    >>> sparse = topk_logits(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), top_k=2)
    >>> sparse.ids.tolist(), sparse.logits.tolist()
    ([[1, 3]], [[2.0, 2.0]])
    """
    _checks.has_vocabulary(logits, "logits", "(..., V)")
    vocab_size = logits.shape[-1]
    top_k = _checks.resolve_top_k(top_k, top_fraction, vocab_size)
    temperatures = _checks.resolve_temperatures(temperatures)
    leading_shape = logits.shape[:-1]
    if target is not None:
        _checks.is_target(target, leading_shape, logits, "logits")
        target = target.reshape(-1).contiguous()
    check_kernels(logits, "logits")
    rows = logits.reshape(-1, vocab_size)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    values, ids, lse, target_logit = torch.ops.slimkernels.topk_logits(rows, top_k, target, list(temperatures))
    return SparseLogits(
        ids=ids.reshape(*leading_shape, top_k),
        logits=values.reshape(*leading_shape, top_k),
        lse=lse.reshape(*leading_shape, len(temperatures)),
        temperatures=temperatures,
        target_logit=None if target is None else target_logit.reshape(leading_shape),
    )


def _topk_logits(logits: Tensor, top_k: int, target: Tensor | None, temperatures: Sequence[float]):
    values, ids, lse, target_logit = outputs = _fake(logits, top_k, target, temperatures)
    wanted = None if target is None else target_logit
    fault = torch.ops.slimkernels.topk_logits_rows(logits, top_k, target, temperatures, values, ids, lse, wanted)
    _checks.raise_fault(fault)
    return outputs


def _fake(logits: Tensor, top_k: int, target: Tensor | None, temperatures: Sequence[float]):
    num_rows = logits.shape[0]
    accumulated = accumulation_dtype(logits.dtype)
    return (
        logits.new_empty(num_rows, top_k),
        logits.new_empty(num_rows, top_k, dtype=torch.int32),
        logits.new_empty(num_rows, len(temperatures), dtype=accumulated),
        logits.new_empty(0 if target is None else num_rows, dtype=accumulated),
    )


def _setup_context(ctx, inputs, output) -> None:
    logits, _, target, temperatures = inputs
    _, ids, lse, _ = output
    ctx.mark_non_differentiable(ids)
    ctx.save_for_backward(logits, ids, lse, *([] if target is None else [target]))
    ctx.temperatures = temperatures
    ctx.has_target = target is not None


def _backward(ctx, grad_values: Tensor, _grad_ids, grad_lse: Tensor, grad_target_logit: Tensor):
    logits, ids, lse, *target = ctx.saved_tensors
    accumulated = logits.to(lse.dtype)
    grad = torch.zeros_like(accumulated)
    for column, temperature in enumerate(ctx.temperatures):
        softmax = (accumulated / temperature - lse[:, column, None]).exp()
        grad += softmax * (grad_lse[:, column, None] / temperature)
    grad = grad.scatter_add(1, ids.long(), grad_values.to(lse.dtype))
    if ctx.has_target:
        labelled = target[0] >= 0
        grad = grad.scatter_add(
            1, target[0].clamp(min=0)[:, None], (grad_target_logit.to(lse.dtype) * labelled)[:, None]
        )
    return grad.to(logits.dtype), None, None, None


define(
    "topk_logits_rows(Tensor logits, int top_k, Tensor? target, float[] temperatures, Tensor(a!) values,"
    " Tensor(b!) ids, Tensor(c!) lse, Tensor(d!)? target_logit) -> int",
    fake=lambda *_args: 0,
    triton_module="slimkernels.ops.triton.topk_logits",
)
define(
    "topk_logits(Tensor logits, int top_k, Tensor? target, float[] temperatures)"
    " -> (Tensor values, Tensor ids, Tensor lse, Tensor target_logit)",
    fake=_fake,
    implementation=_topk_logits,
)
register_autograd("topk_logits", _backward, _setup_context)
