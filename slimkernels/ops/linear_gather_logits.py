"""``linear_gather_logits``: ``gather_logits`` of an lm_head's output, computed chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.ops._chunks import (
    checked_chunk_rows,
    head_numbers,
    read_numbers,
    resolve_chunk_rows,
    row_chunks,
    scaled_and_capped,
)
from slimkernels.ops._head_gradients import HeadGradients
from slimkernels.ops._kept_logits import empty_rows, gradient_of_rows, sparse_logits_of
from slimkernels.ops._library import (
    accumulation_dtype,
    check_kernels,
    check_transforms,
    define,
    keep_for_backward,
    register_autograd,
    run_on_rows,
)
from slimkernels.ops.gather_logits import as_kept_ids
from slimkernels.ops.scale_gradient import differentiable_once
from slimkernels.sparse_logits import SparseLogits


def linear_gather_logits(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    target: Tensor | None = None,
    temperatures: Sequence[float] = (1.0,),
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
) -> SparseLogits:
    """Computes ``gather_logits(softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), ids, ...)``.

    Equivalent to::

        logits = torch.nn.functional.linear(hidden, weight, bias)
        if softcap is not None or logit_scale != 1:
            logits = logit_scale * logits.float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return gather_logits(logits, ids, target=target, temperatures=temperatures)

    The (N, V) logits are never materialised, nor is their gradient, for which the logits are computed again; extra
    memory is O(chunk_rows * V).

    Args:
        hidden: (..., D) float32, bfloat16, float16 or float64, the last hidden states.
        weight: (V, D) of the same dtype, the lm_head weight.
        ids: (..., K) int32 or int64, ascending, padded with -1, as in ``gather_logits``.
        target: (...) int64 labels whose raw logit is kept as well; negative for no label.
        temperatures: Temperatures of the log-sum-exp; 1.0 is always the first, given or not.
        bias: (V,) of the same dtype, or None.
        softcap: Positive limit of the logits, or None for no limit.
        logit_scale: Positive factor on the logits, applied before the softcap.
        chunk_rows: Number of rows whose logits are held at a time; the default is that of ``linear_topk_logits``.

    Returns:
        SparseLogits (..., K). Its logits have the dtype of ``hidden``; with a softcap or scale, they are float32 for
        half-precision ``hidden``.

    Raises:
        ValueError: Shapes do not match, or as in ``gather_logits``.
        TypeError: Dtypes are not supported or differ.

    Supports: cpu and cuda x (float32, bfloat16, float16, float64) x backward (hidden, weight, bias) x deterministic. A
    second derivative, forward mode and ``torch.func.grad`` raise.

    Precision: matrix products are torch's, in hidden's dtype; scale and softcap are float32 (float64 for float64). The
    gradient of the logits is rounded to hidden's dtype before its products.

    >>> sparse = linear_gather_logits(torch.eye(2), torch.tensor([[1.0, 4.0], [2.0, 3.0], [3.0, 0.0]]),
    ...                               torch.tensor([[0, 2], [1, 2]]))
    >>> sparse.logits.tolist()
    [[1.0, 3.0], [3.0, 0.0]]
    """
    _checks.check_head(hidden, weight, bias)
    leading_shape = hidden.shape[:-1]
    ids = as_kept_ids(ids, leading_shape, weight.shape[0], hidden, "hidden")
    temperatures = _checks.resolve_temperatures(temperatures)
    numbers = head_numbers(temperatures, softcap, logit_scale)
    if target is not None:
        _checks.check_target(target, leading_shape, hidden, "hidden")
        target = target.reshape(-1).contiguous()
    check_kernels(hidden, "hidden")
    check_transforms("linear_gather_logits", hidden, weight, bias)
    outputs = run_on_rows(
        torch.ops.slimkernels.linear_gather_logits,
        leading_shape,
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        ids,
        target,
        *numbers[:-1],
        checked_chunk_rows(chunk_rows),
        numbers.operand,
    )
    return sparse_logits_of(ids, outputs, leading_shape, temperatures, has_target=target is not None)


def _linear_gather_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    target: Tensor | None,
    temperatures: Sequence[float],
    softcap: float,
    logit_scale: float,
    is_plain: bool,
    chunk_rows: int,
    operand: Tensor | None,
):
    outputs = _fake(hidden, weight, bias, ids, target, temperatures, softcap, logit_scale, is_plain)
    values, lse, rest_lse, target_logit = outputs
    temperatures, softcap, logit_scale = read_numbers(temperatures, softcap, logit_scale, operand)
    chunk_rows = resolve_chunk_rows(chunk_rows, hidden, weight.shape[0])
    for rows, product in row_chunks(hidden, weight, bias, chunk_rows):
        fault = torch.ops.slimkernels.gather_logits_rows(
            product if is_plain else scaled_and_capped(product, logit_scale, softcap),
            ids[rows],
            None if target is None else target[rows],
            temperatures,
            values[rows],
            lse[rows],
            rest_lse[rows],
            None if target is None else target_logit[rows],
        )
        _checks.raise_fault(fault, first_row=rows.start, no_label=_checks.NEGATIVE_TARGET, ids="ids")
    return outputs


def _fake(hidden, weight, bias, ids, target, temperatures, softcap, logit_scale, is_plain, *_options):
    values, *sums = empty_rows(hidden, ids.shape[1], target, len(temperatures))
    # Rounding a scaled or capped logit to half precision once more would make it inconsistent with the lse.
    return values if is_plain else values.new_empty(values.shape, dtype=accumulation_dtype(hidden.dtype)), *sums


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, ids, target, temperatures, softcap, logit_scale, _, chunk_rows, operand = inputs
    _, lse, rest_lse, _ = output
    ctx.set_materialize_grads(False)
    keep_for_backward(ctx, hidden, weight, bias, ids, lse, rest_lse, target, operand)
    ctx.settings = (temperatures, softcap, logit_scale, chunk_rows)
    ctx.needs = ctx.needs_input_grad[:3]


def _backward(ctx, *upstream: Tensor | None):
    absent = (None,) * 8
    if all(gradient is None for gradient in upstream):
        return None, None, None, *absent
    hidden, weight, bias, ids, lse, rest_lse, target, operand = ctx.saved_tensors
    temperatures, softcap, logit_scale, chunk_rows = ctx.settings
    with torch.no_grad():
        gradients = torch.ops.slimkernels.linear_gather_logits_bwd(
            hidden,
            weight,
            bias,
            ids,
            lse,
            rest_lse,
            target,
            *upstream,
            *ctx.needs,
            temperatures,
            softcap,
            logit_scale,
            chunk_rows,
            operand,
        )
    sources = [tensor for tensor in (hidden, weight, bias, *upstream) if tensor is not None]
    gradients = differentiable_once("linear_gather_logits", gradients, *sources)
    return *(g if needed else None for g, needed in zip(gradients, ctx.needs, strict=True)), *absent


def _linear_gather_logits_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    lse: Tensor,
    rest_lse: Tensor,
    target: Tensor | None,
    grad_values: Tensor | None,
    grad_lse: Tensor | None,
    grad_rest_lse: Tensor | None,
    grad_target_logit: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    temperatures: Sequence[float],
    softcap: float,
    logit_scale: float,
    chunk_rows: int,
    operand: Tensor | None,
):
    """Computes the needed gradients of hidden, weight and bias; the others are empty."""
    gradients = _empty_gradients(hidden, weight, needs_hidden, needs_weight, needs_bias)
    temperatures, softcap, logit_scale = read_numbers(temperatures, softcap, logit_scale, operand)
    chunk_rows = resolve_chunk_rows(chunk_rows, hidden, weight.shape[0])
    needed = tuple(gradient if gradient.numel() else None for gradient in gradients)
    sums = HeadGradients(
        *needed,
        hidden=hidden,
        weight=weight,
        ignored=torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device),
        chunk_rows=chunk_rows,
    )
    upstream = grad_values, grad_lse, grad_rest_lse, grad_target_logit
    for rows, product in row_chunks(hidden, weight, bias, chunk_rows):
        logits = scaled_and_capped(product, logit_scale, softcap)
        dlogits = gradient_of_rows(
            logits,
            ids[rows],
            lse[rows],
            rest_lse[rows],
            None if target is None else target[rows],
            temperatures,
            *(None if given is None else given[rows] for given in upstream),
        )
        if softcap:
            # A row of NaN from which nobody asks anything has the gradient 0, as without a softcap.
            dlogits = torch.where(dlogits == 0, 0.0, dlogits * (1 - (logits / softcap).square()))
        sums.add(rows, (dlogits * logit_scale).to(hidden.dtype))
    sums.finish()
    return gradients


def _empty_gradients(hidden: Tensor, weight: Tensor, needs_hidden: bool, needs_weight: bool, needs_bias: bool):
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        weight.new_empty(weight.shape[0] if needs_bias else 0),
    )


def _fake_bwd(hidden, weight, *others):
    return _empty_gradients(hidden, weight, *others[9:12])


define(
    "linear_gather_logits(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor? target, float[] temperatures,"
    " float softcap, float logit_scale, bool is_plain, int chunk_rows, Tensor? operand)"
    " -> (Tensor values, Tensor lse, Tensor rest_lse, Tensor target_logit)",
    fake=_fake,
    implementation=_linear_gather_logits,
)
define(
    "linear_gather_logits_bwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor lse, Tensor rest_lse,"
    " Tensor? target, Tensor? grad_values, Tensor? grad_lse, Tensor? grad_rest_lse, Tensor? grad_target_logit,"
    " bool needs_hidden, bool needs_weight, bool needs_bias, float[] temperatures, float softcap, float logit_scale,"
    " int chunk_rows, Tensor? operand) -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    fake=_fake_bwd,
    implementation=_linear_gather_logits_bwd,
)
register_autograd("linear_gather_logits", _backward, _setup_context)
