"""``softmax_gradient_rows``: the dense part of every loss's gradient, from numbers of the row that others agreed on.

The vocabulary-parallel losses call it. Elsewhere the same pass is part of the kernel that computes the loss.
"""

from __future__ import annotations

from slimkernels.ops._library import define

# gradient = (factor * exp((z - level) / T) + factor_one * exp(z - level_one) + constant) * dz / dlogits, where z is
# softcap * tanh(logit_scale * logits / softcap); the second term is left out at T = 1. `gradient` may be `logits`.
# `numbers` (5, N) are factor, level, factor_one, level_one, constant of every row, in the accumulation dtype. A row
# whose factors and constant are 0 has gradient 0, whatever its logits are.
define(
    "softmax_gradient_rows(Tensor logits, Tensor(a!) gradient, Tensor numbers, float temperature, float softcap,"
    " float logit_scale) -> ()",
    fake=lambda *_args: None,
    triton_module="slimkernels.ops.triton.softmax_gradient",
)
