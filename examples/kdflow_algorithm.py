"""A distillation algorithm for KDFlow, ``--kd_algorithm slim``, once this module is imported where its actors start."""

from __future__ import annotations

from typing import Any

from kdflow.algorithms import register_algorithm

import slimkernels as sk

TOP_FRACTION = 0.05
OPTIONS: dict[str, Any] = {"rest": "ghost"}
_FOR_THE_TRAINER = ("input_ids", "attn_mask", "loss_mask")


@register_algorithm("slim")
class Slim:
    """CE + w KL on the teacher's largest logits, made from the hidden states that KDFlow's teacher sends.

    The teacher's logits of the whole vocabulary are never made. ``kd_ratio`` weighs the two terms as in KDFlow's own
    algorithm, and ``kd_temperature`` is that of the divergence, times its square.
    """

    def __init__(self, strategy: Any, student_model: Any, teacher_lm_head: Any, **kwargs: Any) -> None:
        self.strategy, self.student, self.teacher_lm_head = strategy, student_model, teacher_lm_head
        if getattr(teacher_lm_head, "bias", None) is not None:
            raise ValueError("the teacher's head must have no bias")

    def training_step(self, micro_batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the losses of a micro-batch: "loss", which is trained on, "kd_loss" and "ce_loss"."""
        if micro_batch.get("teacher_hiddens") is None:
            raise ValueError("a micro-batch must have teacher_hiddens: train with a teacher")
        if not micro_batch["stu_input_ids"].equal(micro_batch["tea_input_ids"]):
            raise ValueError("teacher and student must read the same tokens: use an algorithm across tokenizers")
        kd, ids = self.strategy.args.kd, micro_batch["stu_input_ids"]
        images = {name[4:]: value for name, value in micro_batch.items() if name.startswith("stu_")}
        images = {name: value for name, value in images.items() if name not in _FOR_THE_TRAINER}
        output = self.student(
            ids,
            attention_mask=micro_batch["stu_attn_mask"],
            allgather_logits=True,
            ring_attn_group=self.strategy.ring_attn_group,
            **images,
        )
        is_label = micro_batch["stu_loss_mask"].bool()
        logits, target = output["logits"][is_label], ids.roll(shifts=-1, dims=1)[is_label]
        weight = self.teacher_lm_head.weight[: logits.shape[-1]]
        temperatures = tuple(dict.fromkeys((1.0, kd.kd_temperature)))
        teacher = sk.linear_topk_logits(
            micro_batch["teacher_hiddens"].to(weight),
            weight,
            top_fraction=TOP_FRACTION,
            target=target,
            temperatures=temperatures,
        )
        options = OPTIONS | {"ce_weight": 1 - kd.kd_ratio, "kd_weight": kd.kd_ratio, "temperature": kd.kd_temperature}
        num_items = micro_batch["avg_micro_batch_token_num"]
        result = sk.slim_loss(logits, target, teacher, num_items=num_items, **options)
        means = {name: getattr(result, name).sum() / num_items for name in ("kd", "ce")}
        return {"loss": result.loss, "kd_loss": means["kd"], "ce_loss": means["ce"]}
