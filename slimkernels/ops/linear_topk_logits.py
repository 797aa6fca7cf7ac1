"""``linear_topk_logits``: ``topk_logits`` of an lm_head's output, computed chunk by chunk."""

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
from slimkernels.ops._kept_logits import sparse_logits_of
from slimkernels.ops._library import (
    accumulation_dtype,
    check_kernels,
    define,
    run_on_rows,
)
from slimkernels.ops.topk_logits import empty_outputs
from slimkernels.sparse_logits import SparseLogits


def linear_topk_logits(
    hidden: Tensor,
    weight: Tensor,
    top_k: int | None = None,
    top_fraction: float | None = None,
    *,
    bias: Tensor | None = None,
    target: Tensor | None = None,
    temperatures: Sequence[float] = (1.0,),
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
) -> SparseLogits:
    """Computes ``topk_logits(softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), ...)``.

    Equivalent to::

        logits = torch.nn.functional.linear(hidden, weight, bias)
        if softcap is not None or logit_scale != 1:
            logits = logit_scale * logits.float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return topk_logits(logits, top_k, top_fraction, target=target, temperatures=temperatures)

    The (N, V) logits are never materialised; extra memory is O(chunk_rows * V). The op is for teachers, so the result
    carries no gradient.

    Args:
        hidden: (..., D) float32, bfloat16, float16 or float64, the last hidden states.
        weight: (V, D) of the same dtype, the lm_head weight.
        top_k: K, 1 to V. Give this or ``top_fraction``.
        top_fraction: K as a share of the vocabulary, ``ceil(top_fraction * V)``.
        bias: (V,) of the same dtype, or None.
        target: (...) int64 labels whose raw logit is kept as well; negative for no label.
        temperatures: Temperatures of the log-sum-exp; 1.0 is always the first, given or not.
        softcap: Positive limit of the logits, or None for no limit.
        logit_scale: Positive factor on the logits, applied before the softcap.
        chunk_rows: Number of rows whose logits are held at a time. The default on a CPU is as many as fit into 32 MiB,
            at least 128 (16 MiB and 256 in half precision). On CUDA it is 4096, halved down to 256 until the logits
            take at most a quarter of the free memory.

    Returns:
        SparseLogits (..., K), detached. Its logits have the dtype of ``hidden``; with a softcap or scale, they are
        float32 for half-precision ``hidden``.

    Raises:
        ValueError: Shapes do not match, or as in ``topk_logits``.
        TypeError: Dtypes are not supported or differ.

    Supports: cpu and cuda x (float32, bfloat16, float16, float64) x no backward x deterministic.

    Precision: the matrix product is torch's, in hidden's dtype; scale and softcap are float32 (float64 for float64),
    which takes a second buffer for the logits of a chunk in half precision. The selection and the log-sum-exps, also
    ``rest_lse``, are those of ``topk_logits``.

    >>> sparse = linear_topk_logits(torch.eye(2), torch.tensor([[1.0, 4.0], [2.0, 3.0], [3.0, 0.0]]), top_k=1)
    >>> sparse.ids.tolist(), sparse.logits.tolist()
    ([[2], [0]], [[3.0], [4.0]])
    """
    _checks.check_head(hidden, weight, bias)
    vocab_size = weight.shape[0]
    top_k = _checks.resolve_top_k(top_k, top_fraction, vocab_size)
    temperatures = _checks.resolve_temperatures(temperatures)
    numbers = head_numbers(temperatures, softcap, logit_scale)
    leading_shape = hidden.shape[:-1]
    if target is not None:
        _checks.check_target(target, leading_shape, hidden, "hidden")
        target = target.reshape(-1).contiguous()
    check_kernels(hidden, "hidden")
    rows = hidden.detach().reshape(-1, hidden.shape[-1])
    values, ids, *sums = run_on_rows(
        torch.ops.slimkernels.linear_topk_logits,
        leading_shape,
        rows,
        weight.detach(),
        None if bias is None else bias.detach(),
        top_k,
        target,
        *numbers[:-1],
        checked_chunk_rows(chunk_rows),
        numbers.operand,
    )
    return sparse_logits_of(ids, (values, *sums), leading_shape, temperatures, has_target=target is not None)


def _linear_topk_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k: int,
    target: Tensor | None,
    temperatures: Sequence[float],
    softcap: float,
    logit_scale: float,
    is_plain: bool,
    chunk_rows: int,
    operand: Tensor | None,
):
    temperatures, softcap, logit_scale = read_numbers(temperatures, softcap, logit_scale, operand)
    outputs = _fake(hidden, weight, bias, top_k, target, temperatures, softcap, logit_scale, is_plain)
    values, ids, lse, rest_lse, target_logit = outputs
    chunk_rows = resolve_chunk_rows(chunk_rows, hidden, weight.shape[0])
    for rows, product in row_chunks(hidden, weight, bias, chunk_rows):
        logits = product if is_plain else scaled_and_capped(product, logit_scale, softcap)
        fault = torch.ops.slimkernels.topk_logits_rows(
            logits,
            top_k,
            None if target is None else target[rows],
            temperatures,
            values[rows],
            ids[rows],
            lse[rows],
            rest_lse[rows],
            None if target is None else target_logit[rows],
        )
        _checks.raise_fault(fault, first_row=rows.start, no_label=_checks.NEGATIVE_TARGET)
    return outputs


def _fake(hidden, weight, bias, top_k, target, temperatures, softcap, logit_scale, is_plain, *_options):
    values, *others = empty_outputs(hidden, top_k, target, temperatures)
    # Rounding a scaled or capped logit to half precision once more would make it inconsistent with the lse.
    return values if is_plain else values.new_empty(values.shape, dtype=accumulation_dtype(hidden.dtype)), *others


define(
    "linear_topk_logits(Tensor hidden, Tensor weight, Tensor? bias, SymInt top_k, Tensor? target, float[] temperatures,"
    " float softcap, float logit_scale, bool is_plain, int chunk_rows, Tensor? operand)"
    " -> (Tensor values, Tensor ids, Tensor lse, Tensor rest_lse, Tensor target_logit)",
    fake=_fake,
    implementation=_linear_topk_logits,
)
