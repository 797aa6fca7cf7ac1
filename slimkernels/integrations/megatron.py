"""A loss function for Megatron's ``forward_step``, on logits whose vocabulary is split over the tensor-parallel ranks.

::

    def forward_step(data_iterator, model):
        batch = next(data_iterator)
        logits = model(batch["tokens"], batch["position_ids"], batch["attention_mask"])  # without labels=
        return logits, slim_loss_func(**{name: batch[name] for name in BATCH}, rest="ghost")
"""

# Megatron is not installed where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from slimkernels.integrations.rows import loss_of_logprobs

# Arguments of ``slim_loss_func`` that are entries of a batch.
BATCH = ("labels", "loss_mask", "teacher_ids", "teacher_logprobs")
_IGNORED = -100


def slim_loss_func(
    labels: Tensor, loss_mask: Tensor, teacher_ids: Tensor, teacher_logprobs: Tensor, **options: Any
) -> Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Makes the ``loss_func`` of a micro-batch, ``slim_loss`` with ``group=`` the tensor-parallel group.

    Args:
        labels: (B, T) int64, the next token of every place.
        loss_mask: (B, T), 0 where there is no label.
        teacher_ids: (B, T, K) ids of the teacher's distribution over the label, the same on every rank of the group.
        teacher_logprobs: (B, T, K) log-probabilities at these, normalised over the vocabulary.
        **options: Options of ``slim_loss``.

    Returns:
        Function of the logits (B, T, V_local) that returns Megatron's three results: the sum over the labels, their
        number and the two for the log under "lm loss".

    Raises:
        ValueError: Sequences are split over ranks (context parallelism).
    """
    if parallel_state.get_context_parallel_world_size() > 1:
        raise ValueError("context_parallel_size must be 1, so that a rank has the teacher's rows of all its labels")
    target = labels.masked_fill(loss_mask == 0, _IGNORED)

    def loss_func(output_tensor: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        split: dict[str, Any] = {}
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            split["group"] = parallel_state.get_tensor_model_parallel_group()
            split["vocab_start"] = parallel_state.get_tensor_model_parallel_rank() * output_tensor.shape[-1]
        loss = loss_of_logprobs(
            target, teacher_ids, teacher_logprobs, logits=output_tensor, reduction="sum", **split, **options
        ).loss
        num_tokens = target.ne(_IGNORED).sum().int()
        return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}

    return loss_func
