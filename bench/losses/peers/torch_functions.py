"""torch's own losses, as a training loop would use them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.losses.judge import Batch, Loss


def losses() -> list[Loss]:
    """Returns the losses of ``torch.nn.functional``."""
    return [
        Loss(
            "F.cross_entropy",
            "cross entropy; mean over the labels that are not ignored, NaN if there are none",
            lambda batch: F.cross_entropy(batch.student, batch.target),
            {"ce_weight": 1.0, "kd_weight": 0.0},
            takes_temperature=False,
        ),
        Loss(
            "F.cross_entropy",
            "the same of logits that were made float32 first",
            lambda batch: F.cross_entropy(batch.student.float(), batch.target),
            {"ce_weight": 1.0, "kd_weight": 0.0},
            options=".float()",
            takes_temperature=False,
        ),
        Loss(
            "F.kl_div",
            "forward KL over the vocabulary of log-probabilities that the caller makes, divides by the number of rows, "
            "and has no labels: the caller selects rows",
            _kl_div,
            {"divergence": "forward_kl"},
            options="batchmean, log_target",
        ),
    ]


def _kl_div(batch: Batch) -> Tensor:
    kept = batch.labelled()
    student, teacher = (
        torch.log_softmax(logits[kept] / batch.temperature, -1) for logits in (batch.student, batch.teacher)
    )
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)
