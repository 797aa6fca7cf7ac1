"""``gather_logits``: the logits of every row at given ids, and the log-sum-exps of the whole row and of the others."""

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


def gather_logits(
    logits: Tensor,
    ids: Tensor,
    *,
    target: Tensor | None = None,
    temperatures: Sequence[float] = (1.0,),
) -> SparseLogits:
    """Keeps the logits of every row at given ids, with ``lse_T = log(sum_v(exp(logits_v / T)))``.

    Where no row is padded, equivalent to::

        values = logits.gather(-1, ids)
        lse = torch.stack([torch.logsumexp(logits.float() / t, -1) for t in temperatures], -1)
        rest = logits.float().scatter(-1, ids, -math.inf)
        rest_lse = torch.stack([torch.logsumexp(rest / t, -1) for t in temperatures], -1)
        target_logit = logits.gather(-1, target[..., None])[..., 0].float()

    This is what a divergence on another model's ids needs: a teacher's logits at the student's own top K, or the other
    way round. A CPU reads every row once, a GPU once per temperature, and the forward pass writes nothing of size V.
    The backward pass is torch's, in float32 (N, V); ``linear_gather_logits`` takes it chunk by chunk.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, any stride.
        ids: (..., K) int32, or int64 as ``torch.topk(...).indices.sort(-1).values`` gives them, with K of at least 1.
            The ids of a row ascend strictly inside [0, V); -1 pads rows that have fewer than K.
        target: (...) int64 labels whose raw logit is kept as well, or None. A negative label means no label (NaN).
        temperatures: Temperatures of the log-sum-exp; 1.0 is always the first, given or not.

    Returns:
        SparseLogits with ``ids`` as int32, logits (..., K) in the dtype of ``logits`` (0 at padding), and lse (..., M),
        rest_lse (..., M) and target_logit (...) float32 (float64 for float64 logits). ``rest_lse`` is the log-sum-exp
        of the logits that are not at the ids, -inf where they are all.

    Raises:
        ValueError: A shape does not match, a temperature is not positive, or, on a CPU, the ids of a row are not as
            above or a label is at or above V. On CUDA raising would need a sync, so such a row is NaN.
        TypeError: A dtype is not supported.

    Supports: cpu and cuda x (float32, bfloat16, float16, float64) x backward x deterministic; the result of a row does
    not depend on the other rows.

    Precision: logits are exact; lse and rest_lse are accumulated in float64 over float32 blocks of 1024. rest_lse is
    summed over the other logits relative to the largest of them and never a difference.

    >>> sparse = gather_logits(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), torch.tensor([[0, 3]]))
    >>> sparse.logits.tolist(), [round(x, 4) for x in sparse.rest_lse[0].tolist()]
    ([[0.0, 2.0]], [2.3133])
    """
    _checks.check_vocabulary(logits, "logits", "(..., V)")
    vocab_size = logits.shape[-1]
    leading_shape = logits.shape[:-1]
    ids = as_kept_ids(ids, leading_shape, vocab_size, logits, "logits")
    temperatures = _checks.resolve_temperatures(temperatures)
    if target is not None:
        _checks.check_target(target, leading_shape, logits, "logits")
        target = target.reshape(-1).contiguous()
    check_kernels(logits, "logits")
    check_transforms("gather_logits", logits)
    operand = operand_of(temperatures, (1.0,) * len(temperatures))
    given = list(temperatures) if operand is None else [1.0] * len(temperatures)
    outputs = run_on_rows(
        torch.ops.slimkernels.gather_logits, leading_shape, flat_rows(logits), ids, target, given, operand
    )
    return sparse_logits_of(ids, outputs, leading_shape, temperatures, has_target=target is not None)


def as_kept_ids(ids: Tensor, leading_shape: Sequence[int], vocab_size: int, like: Tensor, like_name: str) -> Tensor:
    """Returns ids (..., K) as rows (N, K) int32; their values are left to the kernels.

    Raises:
        ValueError: The shape is not that of the rows of ``like``, or the device is another one.
        TypeError: The dtype is neither int32 nor int64.
    """
    _checks.check_tensor(ids, "ids")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must have dtype torch.int32 or torch.int64, got {ids.dtype}: call ids.to(torch.int32)")
    if ids.ndim < 1 or ids.shape[:-1] != torch.Size(leading_shape) or ids.shape[-1] < 1:
        expected = ", ".join(str(size) for size in (*leading_shape, "K"))
        raise ValueError(
            f"ids must have shape ({expected}), like {like_name}, with K of at least 1, got {tuple(ids.shape)}"
        )
    _checks.check_same_device(ids, "ids", like, like_name)
    # Clamped first, because an int64 that does not fit could become the id of another token.
    return ids.clamp(-2, vocab_size).to(torch.int32).reshape(-1, ids.shape[-1]).contiguous()


def _fake(logits: Tensor, ids: Tensor, target: Tensor | None, temperatures: Sequence[float], _operand: Tensor | None):
    return empty_rows(logits, ids.shape[1], target, len(temperatures))


def _gather_logits(
    logits: Tensor, ids: Tensor, target: Tensor | None, temperatures: Sequence[float], operand: Tensor | None
):
    temperatures = temperatures if operand is None else operand.tolist()
    values, lse, rest_lse, target_logit = outputs = empty_rows(logits, ids.shape[1], target, len(temperatures))
    wanted = None if target is None else target_logit
    fault = torch.ops.slimkernels.gather_logits_rows(logits, ids, target, temperatures, values, lse, rest_lse, wanted)
    _checks.raise_fault(fault, no_label=_checks.NEGATIVE_TARGET, ids="ids")
    return outputs


def _setup_context(ctx, inputs, output) -> None:
    logits, ids, target, temperatures, operand = inputs
    _, lse, rest_lse, _ = output
    save_rows(ctx, logits, ids, lse, rest_lse, target, temperatures, operand)


def _backward(ctx, *gradients: Tensor | None):
    return gradient_of_saved_rows(ctx, *gradients), None, None, None, None


define(
    "gather_logits_rows(Tensor logits, Tensor ids, Tensor? target, float[] temperatures, Tensor(a!) values,"
    " Tensor(b!) lse, Tensor(c!) rest_lse, Tensor(d!)? target_logit) -> int",
    fake=lambda *_args: 0,
    triton_module="slimkernels.ops.triton.gather_logits",
)
define(
    "gather_logits(Tensor logits, Tensor ids, Tensor? target, float[] temperatures, Tensor? operand)"
    " -> (Tensor values, Tensor lse, Tensor rest_lse, Tensor target_logit)",
    fake=_fake,
    implementation=_gather_logits,
)
register_autograd("gather_logits", _backward, _setup_context)
