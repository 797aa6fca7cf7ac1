"""Apple's Cut Cross-Entropy in its form for torch's compiler; Triton's interpreter does not run its kernels."""

from __future__ import annotations

import torch
from cut_cross_entropy import linear_cross_entropy
from torch import Tensor

from bench.losses.judge import Batch, Loss


def losses() -> list[Loss]:
    """Returns the loss of the package."""
    return [
        Loss(
            "linear_cross_entropy",
            "cross entropy from hidden states; mean over the labels that are not ignored",
            _linear,
            {"ce_weight": 1.0, "kd_weight": 0.0},
            options="impl=torch_compile, run eagerly",
            is_linear=True,
            takes_temperature=False,
        )
    ]


def _linear(batch: Batch) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        return linear_cross_entropy(batch.student, batch.head(), batch.target, impl="torch_compile")
