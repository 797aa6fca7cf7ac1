"""``topk_logits``: the K largest logits of every row and the log-sum-exp of the whole row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.ops._library import (
    accumulation_dtype,
    check_kernels,
    check_transforms,
    define,
    flat_rows,
    keep_for_backward,
    operand_of,
    register_autograd,
)
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

        values, ids = logits.topk(top_k, sorted=False)  # then ordered by id; ties go to the lowest id
        lse = torch.stack([torch.logsumexp(logits.float() / t, -1) for t in temperatures], -1)
        target_logit = logits.gather(-1, target[..., None])[..., 0].float()

    Every row is read once, by the Triton kernel of GPUs again where it is short, where much of it is kept or where a
    sample of it misleads, and nothing of size V is written. The result is exact for every input: ties, rows of
    ``-inf``, ``+inf``, NaN (the largest, as in ``torch.topk``), ``-0.0 == +0.0``.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, any stride.
        top_k: K, 1 to V. Give this or ``top_fraction``.
        top_fraction: K as a share of the vocabulary, ``ceil(top_fraction * V)``; SLIM keeps 0.05.
        target: (...) int64 labels whose raw logit is kept as well, or None. A negative label means no label (NaN).
        temperatures: Temperatures of the log-sum-exp; 1.0 is always the first, given or not.

    Returns:
        SparseLogits with ids (..., K) int32 ascending, logits (..., K) in the dtype of ``logits``, lse (..., M)
        and target_logit (...) float32 (float64 for float64 logits).

    Raises:
        ValueError: Neither or both of ``top_k`` and ``top_fraction`` are given, K is outside [1, V], a temperature is
            not positive, or the target has another shape. On CPU also a label at or above V; on CUDA raising would
            need a sync, so its ``target_logit`` is NaN.
        TypeError: A dtype is not supported.

    Supports: cpu and cuda x (float32, bfloat16, float16, float64) x backward x deterministic; the result of a row does
    not depend on the other rows.

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
    check_transforms("topk_logits", logits)
    rows = flat_rows(logits)
    operand = operand_of(temperatures, (1.0,) * len(temperatures))
    given = list(temperatures) if operand is None else [1.0] * len(temperatures)
    outputs = torch.ops.slimkernels.topk_logits(rows, top_k, target, given, operand)
    return sparse_logits_of(outputs, leading_shape, temperatures, has_target=target is not None)


def sparse_logits_of(
    outputs: Sequence[Tensor], leading_shape: Sequence[int], temperatures: tuple[float, ...], *, has_target: bool
) -> SparseLogits:
    """Returns the operator's outputs (values, ids, lse, target_logit) as SparseLogits of the given leading shape."""
    values, ids, lse, target_logit = outputs
    return SparseLogits(
        ids=ids.reshape(*leading_shape, ids.shape[-1]),
        logits=values.reshape(*leading_shape, values.shape[-1]),
        lse=lse.reshape(*leading_shape, len(temperatures)),
        temperatures=temperatures,
        target_logit=target_logit.reshape(leading_shape) if has_target else None,
    )


def empty_outputs(like: Tensor, top_k: int, target: Tensor | None, temperatures: Sequence[float], *_operand):
    """Allocates the operator's outputs for the rows of ``like`` (N, ...); target_logit is empty without a target."""
    num_rows = like.shape[0]
    accumulated = accumulation_dtype(like.dtype)
    return (
        like.new_empty(num_rows, top_k),
        like.new_empty(num_rows, top_k, dtype=torch.int32),
        like.new_empty(num_rows, len(temperatures), dtype=accumulated),
        like.new_empty(0 if target is None else num_rows, dtype=accumulated),
    )


def _topk_logits(
    logits: Tensor, top_k: int, target: Tensor | None, temperatures: Sequence[float], operand: Tensor | None
):
    temperatures = temperatures if operand is None else operand.tolist()
    values, ids, lse, target_logit = outputs = empty_outputs(logits, top_k, target, temperatures)
    wanted = None if target is None else target_logit
    fault = torch.ops.slimkernels.topk_logits_rows(logits, top_k, target, temperatures, values, ids, lse, wanted)
    _checks.raise_fault(fault, no_label=_checks.NEGATIVE_TARGET)
    return outputs


def _setup_context(ctx, inputs, output) -> None:
    logits, _, target, temperatures, operand = inputs
    _, ids, lse, _ = output
    ctx.mark_non_differentiable(ids)
    ctx.set_materialize_grads(False)
    keep_for_backward(ctx, logits, ids, lse, target, operand)
    ctx.temperatures = temperatures


def _backward(ctx, grad_values: Tensor | None, _grad_ids, grad_lse: Tensor | None, grad_target_logit: Tensor | None):
    logits, ids, lse, target, operand = ctx.saved_tensors
    temperatures = ctx.temperatures if operand is None else operand.unbind()
    accumulated = logits.to(lse.dtype)
    grad = torch.zeros_like(accumulated)
    if grad_lse is not None:
        for column, temperature in enumerate(temperatures):
            upstream = grad_lse[:, column, None]
            softmax = (accumulated / temperature - lse[:, column, None]).exp()
            # The softmax of a row with an infinite lse is NaN, also where nobody asked for the gradient of that lse.
            grad = grad + torch.where(upstream == 0, 0.0, softmax * (upstream / temperature))
    if grad_values is not None:
        grad = grad.scatter_add(1, ids.long(), grad_values.to(lse.dtype))
    if target is not None and grad_target_logit is not None:
        labelled = target >= 0
        grad = grad.scatter_add(1, target.clamp(min=0)[:, None], (grad_target_logit.to(lse.dtype) * labelled)[:, None])
    return grad.to(logits.dtype), None, None, None, None


define(
    "topk_logits_rows(Tensor logits, int top_k, Tensor? target, float[] temperatures, Tensor(a!) values,"
    " Tensor(b!) ids, Tensor(c!) lse, Tensor(d!)? target_logit) -> int",
    fake=lambda *_args: 0,
    triton_module="slimkernels.ops.triton.topk_logits",
)
define(
    "topk_logits(Tensor logits, SymInt top_k, Tensor? target, float[] temperatures, Tensor? operand)"
    " -> (Tensor values, Tensor ids, Tensor lse, Tensor target_logit)",
    fake=empty_outputs,
    implementation=_topk_logits,
)
register_autograd("topk_logits", _backward, _setup_context)
