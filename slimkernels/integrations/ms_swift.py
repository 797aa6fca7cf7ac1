"""ms-swift's ``GKDTrainer`` with the losses of this package: any divergence, rest and token weight, any K.

A file of one line is the plugin, for ``swift rlhf --rlhf_type gkd --external_plugins FILE``::

    import slimkernels.integrations.ms_swift as slim; slim.register(rest="ghost")
"""

# ms-swift is not installed where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
from swift.rlhf_trainers import GKDTrainer
from swift.trainers import TrainerFactory
from torch import Tensor

from slimkernels.integrations.rows import loss_of_logprobs
from slimkernels.ops.slim_loss import slim_loss
from slimkernels.ops.topk_logits import topk_logits
from slimkernels.trainer.stored_rows import LARGEST_PADDING

_IGNORED = -100


class SlimGKDTrainer(GKDTrainer):
    """ms-swift's ``GKDTrainer``, whose divergence on the student's logits is ``slim_loss``.

    Equivalent to ms-swift's own loss with K = V, or with its ``gkd_logits_topk`` and ``rest="renorm_both"``: its
    ``beta`` is the forward KL divergence at 0, the reverse at 1, else the Jensen-Shannon divergence, at its
    ``temperature``, without the square of it as a factor. The mean is over the labels of a micro-batch.

    Attributes:
        options: Options of ``slim_loss`` in place of those that ms-swift's arguments mean; see ``register``.

    Raises:
        ValueError: An option of ms-swift would not be honoured.
    """

    options: dict[str, Any] = {}  # noqa: RUF012 -- set once for the class, by register

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.use_liger_gkd_loss:
            raise ValueError("use_liger_kernel must be False, because Liger's loss would be used instead")
        if self.template.sequence_parallel_size > 1:
            raise ValueError(
                f"sequence_parallel_size must be 1, so that a process holds whole documents, got "
                f"{self.template.sequence_parallel_size}"
            )

    def _compute_jsd_loss(self, student_logits: Tensor, teacher_output: Any, labels: Tensor) -> Tensor:
        target = torch.roll(labels, shifts=-1, dims=1)
        is_label, is_taught = target != _IGNORED, torch.roll(teacher_output.labels, shifts=-1, dims=1) != _IGNORED
        logits, target = student_logits[is_label], target[is_label]
        teacher = teacher_output.select(is_taught)
        options = _options_of(self.beta, self.temperature, self.options)
        if teacher.is_topk_mode:
            # The server has no answer for these places.
            target = target.masked_fill(torch.isneginf(teacher.topk_logprobs).all(-1), _IGNORED)
            return loss_of_logprobs(target, teacher.topk_indices, teacher.topk_logprobs, logits=logits, **options).loss
        full = teacher.full_logits[..., : logits.shape[-1]]
        if abs(logits.shape[-1] - teacher.full_logits.shape[-1]) > LARGEST_PADDING:
            raise ValueError(
                "teacher_model must have the student's vocabulary, got logits of "
                f"{teacher.full_logits.shape[-1]} and {logits.shape[-1]} ids: choose a teacher with its tokenizer"
            )
        top_k = min(self.gkd_logits_topk or full.shape[-1], full.shape[-1])
        rows = topk_logits(full, top_k, target=target, temperatures=tuple(dict.fromkeys((1.0, options["temperature"]))))
        return slim_loss(logits, target, rows, **options).loss


def register(**options: Any) -> None:
    """Makes ``swift rlhf --rlhf_type gkd`` train with ``SlimGKDTrainer``.

    Args:
        **options: Options of ``slim_loss``, such as ``rest``, ``token_weight`` and ``ce_weight``; without them the
            trainer's ``beta`` and ``temperature`` say the loss, and rest is "ghost", without a cross entropy.

    Raises:
        ValueError: The divergence and the rest do not go together.
    """
    slim_loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), **options)
    SlimGKDTrainer.options = options
    TrainerFactory.TRAINER_MAPPING["gkd"] = f"{__name__}.{SlimGKDTrainer.__name__}"


def _options_of(beta: float, temperature: float, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that ms-swift's arguments mean, with those that are given in place of them."""
    options: dict[str, Any] = {"rest": "ghost", "token_weight": "none", "ce_weight": 0.0}
    options |= {"temperature": temperature, "kd_weight": temperature**-2}
    if "divergence" not in given:
        # beta of another divergence means something else.
        options |= {"divergence": {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")}
        options |= {"beta": beta} if options["divergence"] == "jsd" else {}
    return options | given
