"""``softmax_gradient_rows``: the gradient of a loss off S, from numbers of each row that the ranks have exchanged.

Only the vocabulary-parallel losses call it. Elsewhere the same pass is part of the kernel that computes the loss.
"""

from __future__ import annotations

from slimkernels.ops._library import define

# gradient = (factor * exp((z - level) / T) + factor_one * exp(z - level_one) + constant) * dz / dlogits, where z is
# softcap * tanh(logit_scale * logits / softcap); there is no second term at T = 1. `gradient` may be `logits` itself.
# `numbers` (5, N) are factor, level, factor_one, level_one and constant of every row, in the accumulation dtype. A row
# whose factors and constant are 0 has gradient 0, even where its logits are NaN.
define(
    "softmax_gradient_rows(Tensor logits, Tensor(a!) gradient, Tensor numbers, float temperature, float softcap,"
    " float logit_scale) -> ()",
    fake=lambda *_args: None,
    triton_module="slimkernels.ops.triton.softmax_gradient",
)
