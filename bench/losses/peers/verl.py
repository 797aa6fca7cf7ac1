"""verl's forward KL on the teacher's largest log-probabilities, and its mean over tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
from verl.trainer.ppo.core_algos import agg_loss
from verl.workers.config import DistillationConfig, DistillationLossConfig

from bench.losses.judge import Batch, Loss


def losses() -> list[Loss]:
    """Returns verl's loss with its default limit of the log-probabilities, without it, and in chunks."""
    says = (
        "forward KL over the kept ids of the teacher's and the student's own probabilities, which sum to less than 1; "
        "the mass outside is dropped; mean over the mask"
    )
    ours = {"divergence": "forward_kl", "rest": "zero"}
    settings = {
        "log_prob_min_clamp=-10": {},
        "log_prob_min_clamp=None": {"log_prob_min_clamp": None},
        "log_prob_min_clamp=None, use_chunked_topk": {"log_prob_min_clamp": None, "use_chunked_topk": True},
    }
    return [
        Loss(
            "compute_forward_kl_topk",
            says,
            _forward_kl(options),
            ours,
            options=name,
            top_k=True,
            takes_temperature=False,
        )
        for name, options in settings.items()
    ]


def _forward_kl(options: dict) -> Callable[[Batch], Tensor]:
    config = DistillationConfig(
        distillation_loss=DistillationLossConfig(
            loss_mode="forward_kl_topk", use_policy_gradient=False, loss_max_clamp=None, **options
        )
    )

    def call(batch: Batch) -> Tensor:
        def nested(rows: Tensor) -> Tensor:
            return torch.nested.as_nested_tensor([rows], layout=torch.jagged)

        found = compute_forward_kl_topk(
            student_logits=batch.student[None],
            teacher_topk_log_probs=nested(batch.teacher_logprobs(renormalised=False)),
            teacher_topk_ids=nested(batch.ids),
            config=config,
            data_format="thd",
        )
        return agg_loss(found["distillation_losses"], batch.labelled()[None].float(), "token-mean")

    return call
