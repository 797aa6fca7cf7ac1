"""A top-k distillation loss in verl's registry, for ``distillation.distillation_loss.loss_mode: slim_topk``."""

# verl is not installed where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import verl.trainer.distillation.fsdp.losses as fsdp_losses
from torch import Tensor
from verl.trainer.distillation.losses import (
    DistillationLossSettings,
    compute_forward_kl_topk,
    register_distillation_loss,
)
from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size

from slimkernels.integrations.rows import loss_of_logprobs


def register(name: str = "slim_topk", **options: Any) -> None:
    """Registers ``slim_loss`` on the teacher's top-k log-probabilities as a loss mode of verl's FSDP engines.

    verl sums and clamps the losses of the tokens as those of its own "forward_kl_topk", which is
    ``rest="zero", divergence="forward_kl"``; the default here is "ghost", whose divergences are never negative.

    verl calls one function for every top-k mode, which this replaces by one that looks at the mode. Call it where the
    workers import their modules, for example in ``VERL_USE_EXTERNAL_MODULES``.

    Args:
        name: Name of the loss mode.
        **options: Options of ``slim_loss``. The engine passes no labels here, so ``ce_weight`` and a ``token_weight``
            that reads them are refused: verl adds a policy loss of its own.

    Raises:
        ValueError: An option needs the labels, or the name is taken.
    """
    options = {"rest": "ghost", "ce_weight": 0.0, "token_weight": "none"} | options
    if options["ce_weight"] != 0 or options["token_weight"] != "none":
        raise ValueError(
            f'ce_weight must be 0 and token_weight "none", as verl passes no labels to a top-k loss, got '
            f"{options['ce_weight']} and {options['token_weight']!r}"
        )
    register_distillation_loss(DistillationLossSettings(names=[name], use_topk=True))(_checked(name))
    fsdp_losses.compute_forward_kl_topk = _by_mode(name, fsdp_losses.compute_forward_kl_topk, options)


def _checked(name: str) -> Callable[..., Any]:
    """Returns verl's function that sums a mode's losses, which refuses engines that compute verl's own losses."""

    def checked(config: Any, distillation_config: Any, model_output: dict[str, Any], data: Any) -> Any:
        if config.strategy == "megatron" or config.use_fused_kernels:
            raise ValueError(
                f"strategy must be another than 'megatron', and use_fused_kernels False, with {name}, as these compute "
                f"verl's own loss, got {config.strategy!r} and {config.use_fused_kernels}"
            )
        return compute_forward_kl_topk(config, distillation_config, model_output, data)

    return checked


def _by_mode(name: str, others: Callable[..., Any], options: dict[str, Any]) -> Callable[..., dict[str, Tensor]]:
    def compute(
        student_logits: Tensor, teacher_topk_log_probs: Tensor, teacher_topk_ids: Tensor, config: Any, data_format: str
    ) -> dict[str, Tensor]:
        settings = config.distillation_loss
        if settings.loss_mode != name:
            return others(student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format)
        if settings.log_prob_min_clamp is not None or settings.use_chunked_topk:
            raise ValueError(
                f"log_prob_min_clamp must be null and use_chunked_topk False with {name}, which neither clamps nor "
                f"makes log-probabilities of the vocabulary, got {settings.log_prob_min_clamp} and "
                f"{settings.use_chunked_topk}"
            )
        if get_ulysses_sequence_parallel_world_size() > 1:
            raise ValueError("ulysses_sequence_parallel_size must be 1, with which rows are whole")
        # Both are nested, and packed as the logits are: (1, sum of lengths, K).
        ids, logprobs = teacher_topk_ids.values()[None], teacher_topk_log_probs.values()[None]
        labels = torch.zeros(student_logits.shape[:2], dtype=torch.int64, device=student_logits.device)
        # verl has no answer for a sequence's last token, nor for sequences that fill up a batch: it repeats one id.
        mask = None if ids.shape[-1] == 1 else (ids != ids[..., :1]).any(-1, keepdim=True).expand_as(ids)
        result = loss_of_logprobs(labels, ids, logprobs, logits=student_logits, mask=mask, reduction="none", **options)
        return {
            "distillation_losses": result.loss,
            "student_mass": result.student_mass,
            "teacher_mass": result.teacher_mass,
        }

    return compute
