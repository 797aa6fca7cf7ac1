"""Returns gradients that a loss made in its forward pass: scaled, owned by the caller, and differentiated once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

from slimkernels.ops._library import accumulation_dtype, define, register_autograd


def scale_gradients(gradients: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """``[gradient * upstream for gradient in gradients]``, rounded once, in memory that the caller may overwrite.

    ``gradients`` are saved tensors. If the graph is freed after this backward pass, nothing else needs their memory, so
    it is handed out: unchanged where ``upstream`` is 1, the usual case, and on CUDA scaled in place by a kernel that
    reads ``upstream``, which would cost the host a synchronisation. If the graph is retained, the result is a copy.

    A compiled graph multiplies, even by 1. Its saved tensors are inputs of the backward graph, and Inductor copies an
    input before an operator that writes over it, so the kernel would move as many bytes there as the product does.
    Inductor may write the product over a saved tensor that nothing else needs, so it takes no more memory.
    """
    if torch.compiler.is_compiling() or type(upstream) is not Tensor or _is_batched(upstream):
        dtypes = [accumulation_dtype(gradient.dtype) for gradient in gradients]
        return [(g.to(dtype) * upstream).to(g.dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
    retained = _get_current_graph_task_keep_graph()
    if upstream.device.type == "cuda":
        owned = [gradient.clone() if retained else gradient.detach() for gradient in gradients]
        for gradient in owned:
            torch.ops.slimkernels.scale_in_place(gradient, upstream)
        return owned
    if upstream.device.type == "cpu" and upstream.item() == 1:
        return [gradient.clone() if retained else gradient.detach() for gradient in gradients]
    return [gradient * upstream for gradient in gradients]


def _is_batched(tensor: Tensor) -> bool:
    """Returns whether vmap, which ``is_grads_batched`` uses, holds several values in the tensor; none can be read."""
    return is_legacy_batchedtensor(tensor) or is_functorch_wrapped_tensor(tensor)


def differentiable_once(op: str, gradients: Sequence[Tensor], *sources: Tensor | None) -> list[Tensor]:
    """Returns gradients whose own derivative raises instead of counting as 0.

    Args:
        op: Name of the public function, for the message.
        gradients: Results of the backward pass of ``op``, computed without a graph.
        sources: Tensors that the gradients depend on, so that a derivative by an operand of the op passes through here.
            An output of the op that was saved for the backward pass depends on all operands and can replace them here.

    Raises:
        RuntimeError: In the backward pass of the result.
    """
    sources = tuple(source for source in sources if source is not None and source.requires_grad)
    if not torch.is_grad_enabled() or not sources:
        return list(gradients)
    return [torch.ops.slimkernels.first_derivative(gradient, sources, op) for gradient in gradients]


def _setup_context(ctx, inputs, output) -> None:
    ctx.op = inputs[2]


def _backward(ctx, _grad):
    raise RuntimeError(
        f"{ctx.op} has no second derivative, so a gradient penalty, a Hessian-vector product or a meta-gradient cannot "
        "pass through it: write the loss in plain torch there"
    )


define(
    "scale_in_place(Tensor(a!) gradient, Tensor upstream) -> ()",
    fake=lambda *_args: None,
    triton_module="slimkernels.ops.triton.scale_gradient",
)
define(
    "first_derivative(Tensor gradient, Tensor[] sources, str op) -> Tensor",
    fake=lambda gradient, _sources, _op: torch.empty_like(gradient),
    implementation=lambda gradient, _sources, _op: gradient.clone(),
)
register_autograd("first_derivative", _backward, _setup_context)
