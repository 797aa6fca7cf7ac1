"""``slim_loss``: cross entropy plus the adaptively weighted divergence from a sparse teacher, on logits.

``ops/README.md`` lists the names and the four stages of a row that all backends share.
"""

from __future__ import annotations

import warnings

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
    register_autograd,
    run_on_rows,
)
from slimkernels.ops._slim_options import OPTIONS_SCHEMA, SlimOptions, resolve_options
from slimkernels.ops.scale_gradient import differentiable_once, scale_gradients
from slimkernels.ops.slim_result import NUM_STATS, SlimLoss, pack_result, reduction_scale, scale_in_forward
from slimkernels.ops.vocab_parallel.loss import GivenLogits, vocab_parallel_loss
from slimkernels.ops.vocab_parallel.slice import vocab_slice_of, whole
from slimkernels.sparse_logits import SparseLogits


def slim_loss(
    logits: Tensor,
    target: Tensor,
    teacher: SparseLogits | None = None,
    *,
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
    inplace_backward: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
    vocab_start: int = 0,
    weight: str | Tensor | None = None,
) -> SlimLoss:
    """``loss = ce_weight * CE + kd_weight * w * T^2 * D(teacher, student) + z_loss_weight * lse^2`` per token.

    With student logits z, s = softmax(z) and p = softmax(z / T), and with the probabilities t_y and s_y that the
    teacher and the student give to the label::

        CE = -log s_y
        w  = 1 - exp(-t_y / s_y)

    Equivalent to, for the defaults::

        logprobs = torch.log_softmax(logits.float(), -1)
        ce = -logprobs.gather(-1, target[..., None])[..., 0]
        q = torch.softmax(teacher.logits.float(), -1)
        kl = (q * (q.log() - logprobs.gather(-1, teacher.ids.long()))).sum(-1)
        t_y = (teacher.target_logit - teacher.lse[..., 0]).exp()
        w = 1 - torch.exp(-t_y / (-ce).exp())
        loss = (ce + w.detach() * kl).mean()

    Reads the logits once and, when they need a gradient, writes it once. On GPUs the CUDA C++ kernel keeps a row in
    shared memory, or reads it again from the L2 cache where it does not fit; the Triton kernel, which serves AMD GPUs,
    float64 and machines without nvcc, always reads it again. The CUDA C++ kernel has run on an emulated GPU only. Makes
    no float32 copy of (N, V), no softmax of it and nothing of size (K, K); each CPU thread has O(V + K) scratch memory.
    For "mean" and "sum" the gradient is made in the forward pass. For "none" it is recomputed exactly in the backward
    pass, and so it is for float16, whose gradient must be multiplied by the loss scale before it is rounded.
    ``teacher=None`` gives the cross entropy.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, any stride.
        target: (...) int64 labels in [0, V), or ``ignore_index``.
        teacher: Rows (..., K) from ``topk_logits`` or a store; gets no gradient.
        temperature: T > 0 of the divergence. CE and w use temperature 1.
        rest: Meaning of the teacher's mass outside its kept ids: "renorm", "zero", "ghost", "zero_logit" or
            "renorm_both" (see ``sparse_softmax``). Under "ghost", rows with a known ``rest_lse`` have the exact mass.
        divergence: "forward_kl", "soft_ce" (forward KL without the teacher's entropy) and, with rest "ghost" or
            "renorm_both", also

            - "reverse_kl": KL(p || q). It skips outcomes that the teacher excludes (log q = -inf), where it would be
              infinite, and no outcome whose probability is only tiny.
            - "jsd": beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p.
            - "skew_kl": KL(q || alpha q + (1 - alpha) p).
            - "skew_reverse_kl": KL(p || alpha p + (1 - alpha) q).
            - "tvd": the total variation distance, half the sum of |q - p|; the gradient at q = p is 0.
            - "ab": the alpha-beta divergence, -1 / (alpha beta) times the sum of q^alpha p^beta
              - alpha / (alpha + beta) q^(alpha + beta) - beta / (alpha + beta) p^(alpha + beta).
            - "gated": KL(p || q), plus ``forward_weight`` KL(q || p) where the entropy of the teacher's outcomes under
              "ghost" is above ``entropy_threshold``. The teacher's lse at the temperature must be known.
        token_weight: "teacher_over_student" for the w above, as the paper's text describes it: w -> 1 where the teacher
            is the more confident. "student_over_teacher" for the paper's printed equation, 1 - exp(-s_y / t_y). "none"
            for w = 1. A (...) tensor for given weights. A label that is not kept has t_y = 0 where its
            ``target_logit`` is absent, which warns, or NaN.
        detach_weight: Whether w is a constant to the gradient.
        beta: Share of the teacher in "jsd", in (0, 1), None for 0.5; or the student's exponent in "ab", None for 0.7.
        alpha: Share of its first argument in the mixture of "skew_kl" or "skew_reverse_kl", in [0, 1), None for 0.1,
            with 0 for the KL without a skew; or the teacher's exponent in "ab", None for 0.2. The exponents of "ab" are
            both at least 0.05, or (alpha, beta) = (1, 0), which is "forward_kl", or (0, 1), which is "reverse_kl".
        forward_weight: Factor of the forward KL in "gated", at least 0.
        entropy_threshold: Entropy in nats above which "gated" has the forward KL, at least 0.
        teacher_blend: Exponent t in (0, 1] of the teacher in softmax(t log q + (1 - t) log p) over the outcomes, which
            takes the place of q in the divergence and is a constant to the gradient; 1 for the teacher alone. Below 1
            it needs rest "ghost" or "renorm_both". Blending whole rows before the bucket is made gives other numbers.
            w, the masses and the statistics are those of the teacher alone.
        tail_weight: Factor of the bucket's share of the divergence, at least 0, for the divergences that are sums of
            KLs under "ghost".
        ce_weight: Factor of CE, at least 0.
        kd_weight: Factor of the weighted divergence, at least 0.
        label_smoothing: Label smoothing in [0, 1), as in ``torch.nn.functional.cross_entropy``; w uses the unsmoothed
            s_y.
        z_loss_weight: Factor of the squared log-sum-exp, at least 0.
        softcap: Bound of the student's logits, z = softcap * tanh(logit_scale * logits / softcap); None for no bound.
        logit_scale: Positive factor of the logits.
        ignore_index: Label of rows that are skipped, with gradient exactly 0.
        reduction: "mean" over the tokens not ignored, "sum" or "none".
        num_items: Number, or scalar tensor, that "mean" divides by instead of the number of tokens not ignored, for
            gradient accumulation.
        statistics: Fields of the result besides the first seven: False for none, "without_overlap" for those up to
            ``teacher_surer``, True for ``overlap`` too. The former cost further walks over the row, which is in the
            cache, and the overlap costs a selection, more than the loss itself.
        inplace_backward: Whether the forward pass writes the gradient over the logits instead of into a tensor of the
            same size. It writes over a copy where the rows had to be copied, and nothing where no gradient is needed.
            The logits are lost even if the op raises. Autograd raises if the op that made them needs them again, which
            a linear layer does not. Not possible for "none" and float16, whose gradients are made in the backward pass,
            nor for a leaf of the graph or a view of one.
        group: Process group of the ranks that share the vocabulary, as in tensor parallelism; None where ``logits``
            hold all of it. With a group, ``logits`` (..., V_local) are the columns [vocab_start, vocab_start + V_local)
            of (..., V), in slices of any sizes, and so is their gradient. ``target`` and ``teacher``, whose ids count
            in the whole vocabulary, must be the same on every rank, and so is the result. The op makes two small
            collectives, of 10 and 2 numbers per row, with ``statistics`` of 13 and 2, and one more, of 1 number, with a
            ``teacher_blend`` below 1. Logits that are a DTensor with placement Shard(-1) on a mesh of one dimension
            need neither group nor start, because their placement tells both.
        vocab_start: First id of this rank's slice.
        weight: Deprecated name of ``token_weight``.

    Returns:
        SlimLoss(loss, ce, kd, weight, teacher_mass, student_mass, lse, entropy, teacher_entropy, argmax_kept,
        argmax_correct, teacher_surer, overlap), of which those after ``lse`` are None unless ``statistics`` asks.

    Raises:
        ValueError: Shapes that do not match, a label or teacher id outside the vocabulary, an illegal combination of
            rest and divergence, a temperature that was not captured, an option out of its range, an
            ``inplace_backward`` that is not possible, ``statistics=True`` with a group, slices that do not make up the
            vocabulary, or ranks of ``group`` with different tokens.
        TypeError: A dtype that is not supported.

    Supports: cpu and cuda x (float32, bfloat16, float16, float64) x backward x deterministic. The result of a row does
    not depend on the other rows of the batch. On CUDA raising would need a synchronisation, so the results and the
    gradient of a row with a label or an id outside the vocabulary are NaN, and those of all rows where slices or tokens
    do not match. With ``group``, ``torch.compile`` runs the loss in eager mode. There is no second derivative, no
    forward mode and no ``torch.func.grad``: they raise.

    Precision: float32 exponentials summed per block of 1024 into float64; float64 throughout for float64 logits. The
    tail masses come from the log-sum-exp of the off-support logits, never from 1 - sum; the teacher's from its
    ``rest_lse``. In a row without one, a teacher's tail below about 1e-5 is not known under "ghost", because its
    ``lse`` is rounded, and divergences that need it are only as good. Under "ghost" and "renorm_both" every outcome's
    share of a KL divergence is q log(q / p) - q + p, so the divergence is never negative, whatever was rounded.

    References: Raman et al. 2023, "For Distillation, Tokens Are Not All You Need"; jsd as in arXiv 2306.13649;
    skew_kl and skew_reverse_kl as in arXiv 2402.03898; ab as in arXiv 2505.04560, whose defaults are those of its
    authors' code; gated as in arXiv 2603.07079; teacher_blend after arXiv 2501.16937.

    >>> from slimkernels import topk_logits
    >>> target = torch.tensor([1])
    >>> teacher = topk_logits(torch.tensor([[0.0, 3.0, 1.0, 0.0]]), top_k=2, target=target)
    >>> result = slim_loss(torch.zeros(1, 4), target, teacher)
    >>> round(result.ce.item(), 4), round(result.weight.item(), 4)
    (1.3863, 0.9608)
    """
    if weight is not None:
        warnings.warn("weight of slim_loss is now called token_weight", DeprecationWarning, stacklevel=2)
        token_weight = weight
    logits, vocab = vocab_slice_of(logits, "logits", -1, group, vocab_start)
    target = whole(target, "target")
    _checks.check_vocabulary(logits, "logits", "(..., V)")
    leading_shape = logits.shape[:-1]
    _checks.check_target(target, leading_shape, logits, "logits")
    options = resolve_options(
        logits, "logits", teacher,
        temperature, rest, divergence, token_weight, detach_weight, beta, alpha, forward_weight,
        entropy_threshold, teacher_blend, tail_weight, ce_weight, kd_weight, label_smoothing, z_loss_weight, softcap,
        logit_scale, ignore_index, statistics
    )  # fmt: skip
    check_kernels(logits, "logits")
    check_transforms("slim_loss", logits)
    target = target.reshape(-1).contiguous()
    row_scale = reduction_scale(target, ignore_index, reduction, num_items, accumulation_dtype(logits.dtype))
    rows = flat_rows(logits)
    needs_grad = logits.requires_grad and torch.is_grad_enabled()
    over_logits = needs_grad and inplace_backward
    if over_logits:
        _check_inplace(logits, reduction)
        # Rows that share memory, as expanded ones do, would overwrite each other.
        if rows.stride(0) < rows.shape[1]:
            rows = rows.contiguous()
    if vocab is not None:
        source = GivenLogits(rows, over_logits)
        return vocab_parallel_loss(source, target, row_scale, options, vocab, leading_shape)
    scale = scale_in_forward(row_scale, logits.dtype)
    operand = options.operand
    if operand is not None:
        options = options.constants
    if over_logits:
        gradient = rows.detach()
        loss, stats = run_on_rows(
            torch.ops.slimkernels.slim_loss_over_logits, leading_shape, gradient, target, scale, operand, *options
        )
        loss = torch.ops.slimkernels.with_gradient(rows, loss, gradient)
        return pack_result(loss, stats, row_scale, leading_shape)
    loss, stats, _ = run_on_rows(
        torch.ops.slimkernels.slim_loss_fwd, leading_shape, rows, target, scale, needs_grad, operand, *options
    )
    return pack_result(loss, stats, row_scale, leading_shape)


def _slim_loss_fwd(
    logits: Tensor, target: Tensor, row_scale: Tensor | None, needs_grad: bool, operand: Tensor | None, *options
):
    """Computes the loss reduced by ``row_scale`` (per row without it), the statistics, and the gradient of the loss."""
    options = SlimOptions(*options).read(operand)
    dtype = accumulation_dtype(logits.dtype)
    stats = logits.new_empty(NUM_STATS[options.statistics], logits.shape[0], dtype=dtype)
    with_grad = needs_grad and row_scale is not None
    dlogits = logits.new_empty(logits.shape) if with_grad else None
    _checks.raise_fault(torch.ops.slimkernels.slim_loss_rows(logits, dlogits, stats, target, row_scale, *options))
    loss = stats[0].clone() if row_scale is None else (stats[0] * row_scale).sum()
    return loss, stats, logits.new_empty(0) if dlogits is None else dlogits


def _fake_fwd(
    logits: Tensor, target: Tensor, row_scale: Tensor | None, needs_grad: bool, _operand: Tensor | None, *options
):
    dtype = accumulation_dtype(logits.dtype)
    num_rows = logits.shape[0]
    return (
        logits.new_empty(num_rows if row_scale is None else (), dtype=dtype),
        logits.new_empty(NUM_STATS[SlimOptions(*options).statistics], num_rows, dtype=dtype),
        logits.new_empty(logits.shape if needs_grad and row_scale is not None else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    logits, target, row_scale, _, operand, *options = inputs
    loss, stats, dlogits = output
    ctx.mark_non_differentiable(stats, dlogits)
    ctx.set_materialize_grads(False)
    ctx.reduced = row_scale is not None
    if ctx.reduced:
        ctx.save_for_backward(loss, dlogits)
    else:
        options = SlimOptions(*options)._replace(statistics="none")
        keep_for_backward(ctx, logits, target, operand, *options.tensors)
        ctx.settings = options.settings


def _backward(ctx, grad_loss: Tensor | None, _grad_stats, _grad_dlogits):
    absent = (None,) * (4 + len(SlimOptions._fields))
    if grad_loss is None:
        return None, *absent
    with torch.no_grad():
        if ctx.reduced:
            source, *gradients = ctx.saved_tensors
            gradients = scale_gradients(gradients, grad_loss)
        else:
            source, target, operand, *tensors = ctx.saved_tensors
            *_, gradient = torch.ops.slimkernels.slim_loss_fwd(
                source, target, grad_loss.contiguous(), True, operand, *tensors, *ctx.settings
            )
            gradients = [gradient]
    return *differentiable_once("slim_loss", gradients, source, grad_loss), *absent


def _check_inplace(logits: Tensor, reduction: str) -> None:
    problem = None
    if reduction == "none":
        problem = "reduction='none', whose gradient is made in the backward pass: use 'sum' or 'mean'"
    elif logits.dtype == torch.float16:
        problem = "float16 logits, whose gradient is made in the backward pass: use bfloat16 or float32"
    elif logits.is_leaf or (logits._base is not None and logits._base.is_leaf):
        problem = "logits that are a leaf of the graph or a view of one, which would be overwritten: pass a copy"
    if problem is not None:
        raise ValueError(f"inplace_backward=True is not possible with {problem}, or pass inplace_backward=False")


def _slim_loss_over_logits(
    logits: Tensor, target: Tensor, row_scale: Tensor, operand: Tensor | None, *options
) -> tuple[Tensor, Tensor]:
    """Computes the reduced loss and the statistics, and writes the gradient of the loss over the logits."""
    options = SlimOptions(*options).read(operand)
    num_stats = NUM_STATS[options.statistics]
    stats = logits.new_empty(num_stats, logits.shape[0], dtype=accumulation_dtype(logits.dtype))
    _checks.raise_fault(torch.ops.slimkernels.slim_loss_rows(logits, logits, stats, target, row_scale, *options))
    # A higher version makes autograd raise if another op saved the logits for its backward pass.
    torch.autograd.graph.increment_version(logits)
    return (stats[0] * row_scale).sum(), stats


def _setup_given_gradient(ctx, inputs, output) -> None:
    _, _, gradient = inputs
    ctx.save_for_backward(output, gradient)


def _backward_given_gradient(ctx, grad_loss: Tensor):
    loss, gradient = ctx.saved_tensors
    with torch.no_grad():
        gradients = scale_gradients([gradient], grad_loss)
    return *differentiable_once("slim_loss", gradients, loss, grad_loss), None, None


define(
    "slim_loss_rows(Tensor logits, Tensor(a!)? dlogits, Tensor(b!) stats, Tensor target, Tensor? row_scale,"
    f" {OPTIONS_SCHEMA}) -> int",
    fake=lambda *_args: 0,
    triton_module="slimkernels.ops.triton.slim_loss",
)
define(
    f"slim_loss_fwd(Tensor logits, Tensor target, Tensor? row_scale, bool needs_grad, Tensor? operand,"
    f" {OPTIONS_SCHEMA})"
    " -> (Tensor loss, Tensor stats, Tensor dlogits)",
    fake=_fake_fwd,
    implementation=_slim_loss_fwd,
)
register_autograd("slim_loss_fwd", _backward, _setup_context)
define(
    f"slim_loss_over_logits(Tensor(a!) logits, Tensor target, Tensor row_scale, Tensor? operand, {OPTIONS_SCHEMA})"
    " -> (Tensor loss, Tensor stats)",
    fake=lambda logits, target, row_scale, *options: _fake_fwd(logits, target, row_scale, False, *options)[:2],
    implementation=_slim_loss_over_logits,
)
define(
    "with_gradient(Tensor logits, Tensor loss, Tensor gradient) -> Tensor",
    fake=lambda _logits, loss, _gradient: torch.empty_like(loss),
    implementation=lambda _logits, loss, _gradient: loss.clone(),
)
register_autograd("with_gradient", _backward_given_gradient, _setup_given_gradient)
