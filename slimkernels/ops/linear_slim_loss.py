"""``linear_slim_loss``: ``slim_loss`` of an lm_head's output, made and used in chunks of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.ops._chunks import checked_chunk_rows, resolve_chunk_rows, row_chunks
from slimkernels.ops._head_gradients import HeadGradients
from slimkernels.ops._library import (
    accumulation_dtype,
    check_kernels,
    check_transforms,
    define,
    keep_for_backward,
    register_autograd,
    run_on_rows,
)
from slimkernels.ops._slim_options import OPTIONS_SCHEMA, SlimOptions, resolve_options
from slimkernels.ops.head_teacher import HEAD_SCHEMA, ChunkedRows, HeadTeacher, TeacherHead, teacher_head
from slimkernels.ops.scale_gradient import differentiable_once, scale_gradients
from slimkernels.ops.slim_result import NUM_STATS, SlimLoss, pack_result, reduction_scale, scale_in_forward
from slimkernels.ops.vocab_parallel.loss import HeadLogits, vocab_parallel_loss
from slimkernels.ops.vocab_parallel.slice import vocab_slice_of, whole
from slimkernels.sparse_logits import SparseLogits

Parameters = ParamSpec("Parameters")


def _names_the_token_weight(function: Callable[Parameters, SlimLoss]) -> Callable[Parameters, SlimLoss]:
    """Explains a ``weight`` that is given twice: ``slim_loss`` used to call its token weight so."""

    @functools.wraps(function)
    def checked(*arguments: Parameters.args, **options: Parameters.kwargs) -> SlimLoss:
        if len(arguments) > 1 and "weight" in options:
            raise TypeError("weight is the lm_head's weight, the second argument: the token weight is token_weight=")
        return function(*arguments, **options)

    return checked


@_names_the_token_weight
def linear_slim_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    teacher: SparseLogits | HeadTeacher | None = None,
    *,
    bias: Tensor | None = None,
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
    chunk_rows: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    vocab_start: int = 0,
) -> SlimLoss:
    """``slim_loss(hidden @ weight.T + bias, target, teacher, ...)`` without the (N, V) logits.

    Equivalent to::

        logits = torch.nn.functional.linear(hidden, weight, bias)
        return slim_loss(logits, target, teacher, ...)

    For each chunk of rows, a matrix product fills one buffer with logits, ``slim_loss`` overwrites them with their
    gradient, and two more products make the gradients of ``hidden`` and ``weight``. Takes O(chunk_rows * V) extra
    memory, plus a float32 (V, D) accumulator when a half-precision ``weight`` needs a gradient over more than D rows.
    Gradients that nobody needs are not computed: a frozen ``weight`` skips its product.

    Args:
        hidden: (..., D) float32, bfloat16, float16 or float64, the last hidden states.
        weight: (V, D) of the same dtype, the lm_head weight.
        target: (...) int64 labels in [0, V), or ``ignore_index``.
        teacher: Rows (..., K), or a ``HeadTeacher`` whose rows are made for each chunk and dropped; gets no gradient.
            None for cross entropy.
        bias: (V,) of the same dtype, or None.
        temperature: See ``slim_loss``.
        token_weight: See ``slim_loss``.
        rest: See ``slim_loss``.
        divergence: See ``slim_loss``.
        detach_weight: See ``slim_loss``.
        beta: See ``slim_loss``.
        alpha: See ``slim_loss``.
        forward_weight: See ``slim_loss``.
        entropy_threshold: See ``slim_loss``.
        teacher_blend: See ``slim_loss``.
        tail_weight: See ``slim_loss``.
        ce_weight: See ``slim_loss``.
        kd_weight: See ``slim_loss``.
        label_smoothing: See ``slim_loss``.
        z_loss_weight: See ``slim_loss``.
        softcap: See ``slim_loss``; applied after the bias.
        logit_scale: See ``slim_loss``; multiplies ``hidden @ weight.T + bias``.
        ignore_index: See ``slim_loss``.
        reduction: See ``slim_loss``.
        num_items: See ``slim_loss``.
        statistics: See ``slim_loss``.
        chunk_rows: Number of rows whose logits are held at a time. The default on a CPU is what 32 MiB hold, at least
            128 (16 MiB and 256 in half precision). The default on CUDA is 4096, halved down to 256 until the logits
            take at most a quarter of the free memory.
        group: Process group of the ranks that share the vocabulary, as in tensor parallelism; None where ``weight``
            holds all of it. With a group, ``weight`` (V_local, D) and ``bias`` (V_local,) are the rows [vocab_start,
            vocab_start + V_local), in slices of any sizes, and so are their gradients. All other arguments must be the
            same on every rank, and so is the result. The gradient of ``hidden`` is whole on every rank: besides the two
            small collectives of ``slim_loss``, the backward pass sums it (N, D) over the ranks, so that no hook has to.
            With more than one chunk of rows, the product of hidden and weight is computed twice. A ``weight`` (and
            ``bias``) that is a DTensor with placement Shard(0) on a mesh of one dimension, as transformers' ``tp_plan``
            makes it, needs neither group nor start, because its placement tells both.
        vocab_start: First id of this rank's slice.

    Returns:
        SlimLoss, the result of ``slim_loss``; float32 (float64 for float64 ``hidden``).

    Raises:
        ValueError: The cases of ``slim_loss``, a ``weight``, ``bias`` or ``HeadTeacher`` that does not match
            ``hidden``, and a ``HeadTeacher`` with a group.
        TypeError: Dtypes that are not supported or differ.

    Supports: cpu and cuda x (float32, bfloat16, float16, float64) x backward (hidden, weight, bias) x deterministic. On
    CUDA the default ``chunk_rows``, and with it the rounding of the weight's gradient, depends on the free memory.
    A second derivative, forward mode and ``torch.func.grad`` raise.

    Precision: matrix products are torch's, in hidden's dtype. A half-precision weight gradient is one product over up
    to D rows, summed in float32 and rounded once; each further D rows add one such product in float32.

    References: as ``slim_loss``; chunking as in Liger Kernel (arXiv 2410.10989).

    >>> hidden = torch.eye(2, requires_grad=True)
    >>> result = linear_slim_loss(hidden, torch.zeros(4, 2), torch.tensor([1, 3]))
    >>> round(result.loss.item(), 4)
    1.3863
    """
    weight, vocab = vocab_slice_of(weight, "weight", 0, group, vocab_start)
    if bias is not None:
        bias, _ = vocab_slice_of(bias, "bias", 0, None, 0)
    hidden, target = whole(hidden, "hidden"), whole(target, "target")
    _checks.check_head(hidden, weight, bias)
    leading_shape = hidden.shape[:-1]
    _checks.check_target(target, leading_shape, hidden, "hidden")
    head = TeacherHead()
    if isinstance(teacher, HeadTeacher):
        if vocab is not None:
            raise ValueError(
                "teacher must hold rows where weight is a slice of the vocabulary (group=, or a DTensor), got a "
                "HeadTeacher: pass its rows, teacher.rows(target)"
            )
        head, teacher = teacher_head(teacher, hidden, weight), None
        if kd_weight == 0:
            head = TeacherHead()
    options = resolve_options(
        hidden, "hidden", teacher,
        temperature, rest, divergence, token_weight, detach_weight, beta, alpha, forward_weight,
        entropy_threshold, teacher_blend, tail_weight, ce_weight, kd_weight, label_smoothing, z_loss_weight, softcap,
        logit_scale, ignore_index, statistics
    )  # fmt: skip
    check_kernels(hidden, "hidden")
    check_transforms("linear_slim_loss", hidden, weight, bias)
    target = target.reshape(-1).contiguous()
    row_scale = reduction_scale(target, ignore_index, reduction, num_items, accumulation_dtype(hidden.dtype))
    rows = hidden.reshape(-1, hidden.shape[-1])
    if vocab is not None:
        source = HeadLogits(rows, weight, bias, checked_chunk_rows(chunk_rows))
        return vocab_parallel_loss(source, target, row_scale, options, vocab, leading_shape)
    operand = options.operand
    if operand is not None:
        options = options.constants
    grad_enabled = torch.is_grad_enabled()
    needs = [grad_enabled and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    loss, stats, *_ = run_on_rows(
        torch.ops.slimkernels.linear_slim_loss_fwd,
        leading_shape,
        rows,
        weight,
        bias,
        target,
        scale_in_forward(row_scale, hidden.dtype),
        *needs,
        checked_chunk_rows(chunk_rows),
        *head,
        operand,
        *options,
    )
    return pack_result(loss, stats, row_scale, leading_shape)


def _linear_slim_loss_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_scale: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    chunk_rows: int,
    *head_and_options,
):
    """Computes the loss, the statistics and the needed gradients; the others are empty, all without ``row_scale``."""
    inputs = hidden, weight, bias, target, row_scale, needs_hidden, needs_weight, needs_bias, chunk_rows
    outputs = _fake_fwd(*inputs, *head_and_options)
    loss, stats, *dinputs = outputs
    head, operand, options = _split(head_and_options)
    options = options.read(operand)
    chunk_rows = resolve_chunk_rows(chunk_rows, hidden, weight.shape[0])
    with_grad = row_scale is not None and (needs_hidden or needs_weight or needs_bias)
    ignored = target == options.ignore_index
    needed = (gradient if gradient.numel() else None for gradient in dinputs)
    sums = HeadGradients(*needed, hidden=hidden, weight=weight, ignored=ignored, chunk_rows=chunk_rows)
    chunks = ChunkedRows(head, options, target, stats.dtype, weight.shape[0], chunk_rows)
    for rows, logits in row_chunks(hidden, weight, bias, chunk_rows):
        chunk_stats = stats.new_empty(stats.shape[0], logits.shape[0])
        scale = None if row_scale is None else row_scale[rows]
        dlogits = logits if with_grad else None
        fault = torch.ops.slimkernels.slim_loss_rows(
            logits, dlogits, chunk_stats, target[rows], scale, *chunks.options_of(rows)
        )
        _checks.raise_fault(fault, first_row=rows.start)
        stats[:, rows] = chunk_stats
        sums.add(rows, logits)
    sums.finish()
    loss.copy_(stats[0] if row_scale is None else (stats[0] * row_scale).sum())
    return outputs


def _split(arguments: Sequence) -> tuple[TeacherHead, Tensor | None, SlimOptions]:
    """Returns the operator's arguments after ``chunk_rows`` by name."""
    size = len(TeacherHead._fields)
    return TeacherHead(*arguments[:size]), arguments[size], SlimOptions(*arguments[size + 1 :])


def _fake_fwd(
    hidden, weight, bias, target, row_scale, needs_hidden, needs_weight, needs_bias, _chunk_rows, *head_and_options
):
    dtype = accumulation_dtype(hidden.dtype)
    *_, options = _split(head_and_options)
    num_rows = hidden.shape[0]
    reduced = row_scale is not None
    return (
        hidden.new_empty(() if reduced else num_rows, dtype=dtype),
        hidden.new_empty(NUM_STATS[options.statistics], num_rows, dtype=dtype),
        hidden.new_empty(hidden.shape if reduced and needs_hidden else 0),
        weight.new_empty(weight.shape if reduced and needs_weight else 0),
        weight.new_empty(weight.shape[0] if reduced and needs_bias else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, target, row_scale, *needs, chunk_rows = inputs[:9]
    loss, stats, *gradients = output
    ctx.mark_non_differentiable(stats, *gradients)
    ctx.set_materialize_grads(False)
    ctx.reduced = row_scale is not None
    ctx.needs = needs
    if ctx.reduced:
        ctx.save_for_backward(loss, *gradients)
        return
    head, operand, options = _split(inputs[9:])
    options = options._replace(statistics="none")
    keep_for_backward(ctx, hidden, weight, bias, target, *head.tensors, operand, *options.tensors)
    ctx.chunk_rows = chunk_rows
    ctx.head_settings = head.settings
    ctx.settings = options.settings


def _backward(ctx, grad_loss: Tensor | None, *_unused):
    absent = (None,) * (7 + len(TeacherHead._fields) + len(SlimOptions._fields))
    if grad_loss is None:
        return None, None, None, *absent
    with torch.no_grad():
        if ctx.reduced:
            loss, *gradients = ctx.saved_tensors
            sources = [loss]
            gradients = scale_gradients(gradients, grad_loss)
        else:
            hidden, weight, bias, target, *tensors = ctx.saved_tensors
            num_fields = len(TeacherHead().tensors)
            head_tensors, operand, tensors = tensors[:num_fields], tensors[num_fields], tensors[num_fields + 1 :]
            sources = [hidden, weight, bias]
            scale = grad_loss.contiguous()
            _, _, *gradients = torch.ops.slimkernels.linear_slim_loss_fwd(
                hidden, weight, bias, target, scale, *ctx.needs, ctx.chunk_rows, *head_tensors, *ctx.head_settings,
                operand, *tensors, *ctx.settings
            )  # fmt: skip
    gradients = differentiable_once("linear_slim_loss", gradients, *sources, grad_loss)
    return *(g if needed else None for g, needed in zip(gradients, ctx.needs, strict=True)), *absent


define(
    "linear_slim_loss_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? row_scale,"
    f" bool needs_hidden, bool needs_weight, bool needs_bias, int chunk_rows, {HEAD_SCHEMA},"
    f" Tensor? operand, {OPTIONS_SCHEMA})"
    " -> (Tensor loss, Tensor stats, Tensor dhidden, Tensor dweight, Tensor dbias)",
    fake=_fake_fwd,
    implementation=_linear_slim_loss_fwd,
)
register_autograd("linear_slim_loss_fwd", _backward, _setup_context)
