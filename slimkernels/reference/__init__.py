"""The definition of every op in plain torch.

The functions take any float dtype (half types are computed in float32, float64 stays float64) and any device, are
differentiable by autograd, and use O(N * V) memory. In float64 they are the truth that the kernels are tested against.
So no mass is computed as one minus another that may be close to one, and an outcome of probability zero contributes an
exact zero to values and gradients. Tests and benchmarks import this package; the ops never do.

``...`` stands for any leading dimensions, N for their product, V for the vocabulary, K for the kept entries.
``ops/README.md`` lists the names of ``slim_loss`` and its four stages, of which autograd computes the last.
"""

from slimkernels.reference.divergences import DIVERGENCES, WEIGHTS
from slimkernels.reference.loss import SlimLoss, linear_slim_loss, slim_loss
from slimkernels.reference.mixture import mix
from slimkernels.reference.rows import (
    RESTS,
    SparseProbs,
    gather_logits,
    linear_topk_logits,
    sparse_softmax,
    supported_logits,
    topk_logits,
)

__all__ = [
    "DIVERGENCES",
    "RESTS",
    "WEIGHTS",
    "SlimLoss",
    "SparseProbs",
    "gather_logits",
    "linear_slim_loss",
    "linear_topk_logits",
    "mix",
    "slim_loss",
    "sparse_softmax",
    "supported_logits",
    "topk_logits",
]
