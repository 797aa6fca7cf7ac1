"""Rows of kept logits as the operators return them, and their gradient, for every op that reads such rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.ops._library import accumulation_dtype, keep_for_backward
from slimkernels.sparse_logits import SparseLogits


def sparse_logits_of(
    ids: Tensor,
    outputs: Sequence[Tensor],
    leading_shape: Sequence[int],
    temperatures: tuple[float, ...],
    *,
    has_target: bool,
) -> SparseLogits:
    """Returns ids (N, K) and an operator's (values, lse, rest_lse, target_logit) as SparseLogits of a leading shape."""
    values, lse, rest_lse, target_logit = outputs
    return SparseLogits(
        ids=ids.reshape(*leading_shape, ids.shape[-1]),
        logits=values.reshape(*leading_shape, values.shape[-1]),
        lse=lse.reshape(*leading_shape, len(temperatures)),
        temperatures=temperatures,
        target_logit=target_logit.reshape(leading_shape) if has_target else None,
        rest_lse=rest_lse.reshape(*leading_shape, len(temperatures)),
    )


def empty_rows(like: Tensor, top_k: int, target: Tensor | None, num_temperatures: int) -> tuple[Tensor, ...]:
    """Allocates (values, lse, rest_lse, target_logit) for the rows of ``like`` (N, ...).

    ``target_logit`` is empty without a target.
    """
    num_rows, accumulated = like.shape[0], accumulation_dtype(like.dtype)
    return (
        like.new_empty(num_rows, top_k),
        like.new_empty(num_rows, num_temperatures, dtype=accumulated),
        like.new_empty(num_rows, num_temperatures, dtype=accumulated),
        like.new_empty(0 if target is None else num_rows, dtype=accumulated),
    )


def save_rows(
    ctx,
    logits: Tensor,
    ids: Tensor,
    lse: Tensor,
    rest_lse: Tensor,
    target: Tensor | None,
    temperatures: Sequence[float],
    operand: Tensor | None,
) -> None:
    """Saves what ``gradient_of_saved_rows`` reads, the inputs and outputs of an operator that keeps rows of logits."""
    ctx.set_materialize_grads(False)
    keep_for_backward(ctx, logits, ids, lse, rest_lse, target, operand)
    ctx.temperatures = temperatures


def gradient_of_saved_rows(ctx, *gradients: Tensor | None) -> Tensor:
    """Computes the gradient (N, V) of the logits from those of (values, lse, rest_lse, target_logit); None is 0."""
    logits, ids, lse, rest_lse, target, operand = ctx.saved_tensors
    temperatures = ctx.temperatures if operand is None else operand.unbind()
    return gradient_of_rows(logits, ids, lse, rest_lse, target, temperatures, *gradients).to(logits.dtype)


def gradient_of_rows(
    logits: Tensor,
    ids: Tensor,
    lse: Tensor,
    rest_lse: Tensor,
    target: Tensor | None,
    temperatures: Sequence,
    grad_values: Tensor | None,
    grad_lse: Tensor | None,
    grad_rest_lse: Tensor | None,
    grad_target_logit: Tensor | None,
) -> Tensor:
    """Computes the gradient (N, V) of logits in the dtype of ``lse``, from those of the outputs; None is 0.

    The gradient of a kept logit is scattered to its id; that of a log-sum-exp is multiplied by the softmax over the
    entries that it sums.
    """
    logits = logits.to(lse.dtype)
    kept, is_kept = ids.clamp(min=0).long(), ids >= 0
    grad = torch.zeros_like(logits)
    if grad_rest_lse is not None:
        grad = _gradient_of_lse(logits, rest_lse, temperatures, grad_rest_lse)
        # The gradient of rest_lse is 0 at the kept ids. Padding writes to the last kept id again; in a row that keeps
        # no id, to id 0 what is there already.
        last = ids.amax(1, keepdim=True).long()
        index = torch.where(is_kept, kept, last.clamp(min=0))
        grad = grad.scatter(1, index, torch.where(last >= 0, 0.0, grad.gather(1, index)))
    if grad_lse is not None:
        grad = grad + _gradient_of_lse(logits, lse, temperatures, grad_lse)
    if grad_values is not None:
        grad = grad.scatter_add(1, kept, torch.where(is_kept, grad_values.to(lse.dtype), 0.0))
    if target is not None and grad_target_logit is not None:
        labelled = target >= 0
        grad = grad.scatter_add(1, target.clamp(min=0)[:, None], (grad_target_logit.to(lse.dtype) * labelled)[:, None])
    return grad


def _gradient_of_lse(logits: Tensor, lse: Tensor, temperatures: Sequence, upstream: Tensor) -> Tensor:
    """Returns the gradient (N, V) of log-sum-exps (N, M) of the logits: softmaxes times their upstream gradients."""
    # A log-sum-exp of nothing is -inf and has the gradient 0.
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    grad = torch.zeros_like(logits)
    for column, temperature in enumerate(temperatures):
        given = upstream[:, column, None]
        softmax = (logits / temperature - lse[:, column, None]).exp()
        # The softmax of a row with an infinite lse is NaN, even if the upstream gradient of that lse is 0.
        grad = grad + torch.where(given == 0, 0.0, softmax * (given / temperature))
    return grad
