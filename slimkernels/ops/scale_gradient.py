"""``scale_gradients``: multiplies gradients made in the forward pass by the loss's own gradient, which is mostly 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.ops._library import define


def scale_gradients(ctx, gradients: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """``[gradient * upstream for gradient in gradients]``, without the pass over them where ``upstream`` is 1.

    On a CPU the host reads ``upstream``. On CUDA, where that would need a synchronisation, a kernel reads it and scales
    in place. The gradients can then be returned only once, so a second backward pass over the same graph raises.

    Raises:
        RuntimeError: A second backward pass over the same graph on CUDA.
    """
    in_place = type(upstream) is Tensor and not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    if in_place and upstream.device.type == "cpu" and upstream.item() == 1:
        return list(gradients)
    if not in_place or upstream.device.type != "cuda":
        return [gradient * upstream.to(gradient.dtype) for gradient in gradients]
    if getattr(ctx, "handed_out", False):
        raise RuntimeError(
            "this loss was already differentiated: its gradient was made in the forward pass and scaled in place by "
            "the first backward pass; for another one call the loss with reduction='none' and reduce its result"
        )
    ctx.handed_out = True
    for gradient in gradients:
        torch.ops.slimkernels.scale_in_place(gradient, upstream)
    return list(gradients)


define(
    "scale_in_place(Tensor(a!) gradient, Tensor upstream) -> ()",
    fake=lambda *_args: None,
    triton_module="slimkernels.ops.triton.scale_gradient",
)
