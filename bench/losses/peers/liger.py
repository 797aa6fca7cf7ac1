"""Liger's fused distillation loss and its Triton kernels for JSD and cross entropy, interpreted.

Those for KL and total variation do not run in Triton's interpreter, which hands them Python's floats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
from liger_kernel.ops.jsd import LigerJSDFunction
from torch import Tensor

from bench.losses.cases import IGNORED
from bench.losses.judge import Batch, Loss

# Liger's beta, and ours: its 0 and 1 are the two KLs.
BETAS = {
    0.0: {"divergence": "forward_kl"},
    1.0: {"divergence": "reverse_kl", "rest": "renorm_both"},
    0.3: {"divergence": "jsd", "beta": 0.3, "rest": "renorm_both"},
}


def losses() -> list[Loss]:
    """Returns Liger's losses."""
    found = [
        Loss(
            "LigerFusedLinearJSDLoss",
            "over the vocabulary, from hidden states, in the dtype of the logits; mean over the labels that are not "
            "ignored",
            _fused_jsd(beta),
            ours,
            options=f"beta={beta:g}, weight_hard_loss=0, compiled=False",
            is_linear=True,
        )
        for beta, ours in BETAS.items()
    ]
    found += [
        Loss(
            "LigerJSDFunction",
            "over the vocabulary, of log-probabilities that the caller makes; mean over the labels that are not "
            "ignored",
            _jsd(beta),
            ours,
            options=f"beta={beta:g}",
        )
        for beta, ours in BETAS.items()
    ]
    found += [
        Loss(
            "LigerCrossEntropyFunction",
            "cross entropy; mean over the labels that are not ignored",
            lambda batch: LigerCrossEntropyFunction.apply(batch.student, batch.target, None)[0],
            {"ce_weight": 1.0, "kd_weight": 0.0},
            takes_temperature=False,
        ),
    ]
    return found


def _fused_jsd(beta: float) -> Callable[[Batch], Tensor]:
    def call(batch: Batch) -> Tensor:
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=beta,
            ignore_index=IGNORED,
            temperature=batch.temperature,
            compiled=False,
        )
        head = batch.head()
        return loss(batch.student, head, batch.teacher, head, batch.target)

    return call


def _logprobs(batch: Batch) -> tuple[Tensor, Tensor]:
    student, teacher = (torch.log_softmax(logits / batch.temperature, -1) for logits in (batch.student, batch.teacher))
    return student, teacher


def _jsd(beta: float) -> Callable[[Batch], Tensor]:
    return lambda batch: LigerJSDFunction.apply(*_logprobs(batch), batch.target, beta, IGNORED)
