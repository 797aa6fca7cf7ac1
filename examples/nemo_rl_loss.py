"""A loss for NeMo-RL's distillation: pass ``SlimLossFn(...)`` to the student's ``policy.train`` in place of its own."""

from __future__ import annotations

from typing import Any

from nemo_rl.algorithms.loss.interfaces import LossFunction, LossInputType, LossType
from torch import Tensor
from torch.distributed.tensor import DTensor

from slimkernels.integrations.rows import check_rest, loss_of_logprobs


class SlimLossFn(LossFunction):
    """``slim_loss`` on the teacher's largest logits, which ``nemo_rl.algorithms.distillation`` puts into a batch.

    Equals NeMo-RL's loss with ``zero_outside_topk=False``, whose divergence is that on the kept ids, for
    ``rest="renorm_both"``. The teacher's logits come without their log-sum-exp, so that no other ``rest`` but "renorm"
    is possible.

    Args:
        **options: Options of ``slim_loss``.
    """

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.LOGIT

    def __init__(self, **options: Any) -> None:
        self.options = {"rest": "renorm_both", "ce_weight": 0.0, "token_weight": "none"} | options
        check_rest(self.options["rest"])

    def __call__(
        self, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Computes the loss of ``logits`` (B, T, V), whose row t predicts token t + 1, divided by all labels."""
        logits = kwargs["logits"][:, :-1]
        ids, teacher = data["teacher_topk_indices"][:, :-1], data["teacher_topk_logits"][:, :-1]
        if not isinstance(logits, DTensor) and int(ids.max()) >= logits.shape[-1]:
            raise ValueError("tensor_model_parallel_size must be 1 with Megatron, which passes a slice of the logits")
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        target = data["input_ids"][:, 1:].masked_fill(mask == 0, -100)
        result = loss_of_logprobs(
            target, ids, teacher, logits=logits, has_whole_mass=False, num_items=global_valid_toks, **self.options
        )
        return result.loss, {"loss": result.loss.item(), "num_valid_samples": int(data["sample_mask"].sum())}
