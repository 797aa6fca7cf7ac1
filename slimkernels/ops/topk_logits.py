"""``topk_logits``: the K largest logits of every row, and the log-sum-exps of the whole row and of the other logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.ops._kept_logits import empty_rows, gradient_of_saved_rows, save_rows, sparse_logits_of
from slimkernels.ops._library import (
    check_kernels,
    check_transforms,
    define,
    flat_rows,
    operand_of,
    register_autograd,
    run_on_rows,
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
        rest = logits.float().scatter(-1, ids, -math.inf)
        rest_lse = torch.stack([torch.logsumexp(rest / t, -1) for t in temperatures], -1)
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
        SparseLogits with ids (..., K) int32 ascending, logits (..., K) in the dtype of ``logits``, and lse (..., M),
        rest_lse (..., M) and target_logit (...) float32 (float64 for float64 logits). ``rest_lse`` is the log-sum-exp
        of the logits that are not kept: ``-inf`` where there are none or all are ``-inf``.

    Raises:
        ValueError: Neither or both of ``top_k`` and ``top_fraction`` are given, K is outside [1, V], a temperature is
            not positive, or the target has another shape. On CPU also a label at or above V; on CUDA raising would
            need a sync, so its ``target_logit`` is NaN.
        TypeError: A dtype is not supported.

    Supports: cpu and cuda x (float32, bfloat16, float16, float64) x backward x deterministic; the result of a row does
    not depend on the other rows.

    Precision: ids and logits are exact; lse and rest_lse are accumulated in float64 over float32 blocks of 1024.
    rest_lse is summed over the logits that are not kept and never a difference, so it is exact to a few float32 units
    also where the kept logits have all of the row's probability.

    References: Raman et al. 2023, "For Distillation, Tokens Are Not All You Need" (the top 5 % of the logits).

    >>> sparse = topk_logits(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), top_k=2)
    >>> sparse.ids.tolist(), sparse.logits.tolist()
    ([[1, 3]], [[2.0, 2.0]])
    """
    _checks.check_vocabulary(logits, "logits", "(..., V)")
    vocab_size = logits.shape[-1]
    top_k = _checks.resolve_top_k(top_k, top_fraction, vocab_size)
    temperatures = _checks.resolve_temperatures(temperatures)
    leading_shape = logits.shape[:-1]
    if target is not None:
        _checks.check_target(target, leading_shape, logits, "logits")
        target = target.reshape(-1).contiguous()
    check_kernels(logits, "logits")
    check_transforms("topk_logits", logits)
    rows = flat_rows(logits)
    operand = operand_of(temperatures, (1.0,) * len(temperatures))
    given = list(temperatures) if operand is None else [1.0] * len(temperatures)
    values, ids, *sums = run_on_rows(
        torch.ops.slimkernels.topk_logits, leading_shape, rows, top_k, target, given, operand
    )
    return sparse_logits_of(ids, (values, *sums), leading_shape, temperatures, has_target=target is not None)


def empty_outputs(like: Tensor, top_k: int, target: Tensor | None, temperatures: Sequence[float], *_operand):
    """Allocates the operator's outputs for the rows of ``like`` (N, ...)."""
    values, *sums = empty_rows(like, top_k, target, len(temperatures))
    return values, like.new_empty(like.shape[0], top_k, dtype=torch.int32), *sums


def _topk_logits(
    logits: Tensor, top_k: int, target: Tensor | None, temperatures: Sequence[float], operand: Tensor | None
):
    temperatures = temperatures if operand is None else operand.tolist()
    values, ids, lse, rest_lse, target_logit = outputs = empty_outputs(logits, top_k, target, temperatures)
    wanted = None if target is None else target_logit
    fault = torch.ops.slimkernels.topk_logits_rows(
        logits, top_k, target, temperatures, values, ids, lse, rest_lse, wanted
    )
    _checks.raise_fault(fault, no_label=_checks.NEGATIVE_TARGET)
    return outputs


def _setup_context(ctx, inputs, output) -> None:
    logits, _, target, temperatures, operand = inputs
    _, ids, lse, rest_lse, _ = output
    ctx.mark_non_differentiable(ids)
    save_rows(ctx, logits, ids, lse, rest_lse, target, temperatures, operand)


def _backward(ctx, grad_values: Tensor | None, _grad_ids, *gradients: Tensor | None):
    return gradient_of_saved_rows(ctx, grad_values, *gradients), None, None, None, None


define(
    "topk_logits_rows(Tensor logits, int top_k, Tensor? target, float[] temperatures, Tensor(a!) values,"
    " Tensor(b!) ids, Tensor(c!) lse, Tensor(d!) rest_lse, Tensor(e!)? target_logit) -> int",
    fake=lambda *_args: 0,
    triton_module="slimkernels.ops.triton.topk_logits",
)
define(
    "topk_logits(Tensor logits, SymInt top_k, Tensor? target, float[] temperatures, Tensor? operand)"
    " -> (Tensor values, Tensor ids, Tensor lse, Tensor rest_lse, Tensor target_logit)",
    fake=empty_outputs,
    implementation=_topk_logits,
)
register_autograd("topk_logits", _backward, _setup_context)
