"""``SlimPlugin``, with which axolotl trains on its own distillation files, on a store or with a teacher model.

plugins:
  - slimkernels.integrations.axolotl.SlimPlugin
slim_objective: {method: kd, rest: ghost}    # fields of slimkernels.SlimObjective
slim_store: runs/store                       # or slim_teacher: ./teacher; neither for axolotl's own files
"""

# The classes use attributes of transformers.Trainer, and axolotl is not installed where types are checked.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from axolotl.integrations.kd.collator import DataCollatorForKD, KDBatchSamplerDataCollatorForSeq2Seq
from pydantic import BaseModel
from torch import Tensor, nn

from slimkernels._checks import check_one_of
from slimkernels.integrations.rows import check_rest, rows_of_logprobs
from slimkernels.models.head import base_model
from slimkernels.models.head_loss import IGNORE_INDEX, BatchTeacher, HeadLoss, next_labels
from slimkernels.trainer.mixin import SlimLossMixin
from slimkernels.trainer.objective import SlimObjective, check_training_arguments

_COLUMNS = ("target_token_ids", "target_logprobs", "target_mask")
# Options of axolotl and of its plugins that compute another loss.
_OTHER_LOSSES = ("kd_trainer", "orpo_alpha", "use_eaft", "cut_cross_entropy", "chunked_cross_entropy")
_OTHER_LOSSES += ("liger_cross_entropy", "liger_fused_linear_cross_entropy")
# Options that choose another trainer.
_OTHER_TRAINERS = ("rl", "reward_model", "process_reward_model", "trainer_cls")


class SlimArgs(BaseModel):
    """The keys of axolotl's configuration that the plugin reads.

    Attributes:
        slim_objective: Fields of ``SlimObjective``; None for method "kd".
        slim_store: Path of a store of the data set's documents.
        slim_teacher: Folder or name of a teacher model.
        slim_alignment: Meaning of row j of axolotl's prepared columns: "next" for the distribution over token j + 1, as
            axolotl's own loss reads it, or "same" for that over token j, as the loader of its 0.19 places a vLLM
            server's answers.
    """

    slim_objective: dict[str, Any] | None = None
    slim_store: str | None = None
    slim_teacher: str | None = None
    slim_alignment: str = "next"


class SlimPlugin(BasePlugin):
    """A plugin that trains on a ``SlimObjective``, without logits.

    Without a store and a teacher, the data set's ``type`` is axolotl's ``axolotl.integrations.kd.chat_template``, whose
    values are normalised on the kept ids, at ``kd_temperature`` 1: only rest "renorm" and "renorm_both" are possible.
    """

    def get_input_args(self) -> str:
        """Returns the name of ``SlimArgs``."""
        return f"{__name__}.{SlimArgs.__name__}"

    def pre_model_load(self, cfg: Any) -> None:
        """Checks the configuration, also where axolotl asks no plugin for a trainer class, as with ``rl``.

        Raises:
            ValueError: As ``get_trainer_cls``.
        """
        _check(cfg)

    def get_trainer_cls(self, cfg: Any) -> type:
        """Returns the trainer class of a configuration.

        Raises:
            ValueError: The configuration has an option that this loss would not honour.
        """
        _check(cfg)
        objective = SlimObjective(**(cfg.slim_objective or {}))
        if not objective.needs_teacher or cfg.slim_store or cfg.slim_teacher:
            teacher = {"teacher_store": cfg.slim_store or None, "teacher_model": cfg.slim_teacher or None}

            class SlimTrainer(SlimLossMixin, AxolotlTrainer):
                def __init__(self, *args: Any, **kwargs: Any) -> None:
                    super().__init__(*args, objective=objective, **teacher, **kwargs)

            return SlimTrainer
        check_rest(objective.loss_options["rest"])
        alignment = cfg.slim_alignment

        class SlimColumnsTrainer(_ColumnsTrainer):
            options, shift = objective.loss_options, int(alignment == "same")

        return SlimColumnsTrainer

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Switches off axolotl's count of tokens, which is a part of its own loss."""
        return {"include_tkps": False}

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False):
        """Returns the collator of axolotl's own plugin where its columns are read, else None."""
        if cfg.slim_store or cfg.slim_teacher or not SlimObjective(**(cfg.slim_objective or {})).needs_teacher:
            return None
        is_packed = cfg.eval_sample_packing if is_eval else cfg.sample_packing
        return (KDBatchSamplerDataCollatorForSeq2Seq if is_packed else DataCollatorForKD), {}


class _ColumnsTrainer(AxolotlTrainer):
    """A trainer whose teacher's rows are axolotl's columns of the batch."""

    options: dict[str, Any]
    shift: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_training_arguments(self.args)
        # compute_loss divides by num_items_in_batch itself, so Trainer must not divide by the accumulation steps.
        self.model_accepts_loss_kwargs = True

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in _COLUMNS if name not in self._signature_columns]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """Computes the micro-batch's share of the loss, a scalar; with ``return_outputs`` also the model's outputs."""
        missing = [name for name in (*_COLUMNS, "labels") if name not in inputs]
        if missing:
            raise ValueError(
                f"a batch must have axolotl's columns, but lacks {missing}: set the type of the data set to "
                "axolotl.integrations.kd.chat_template, or set slim_store or slim_teacher"
            )
        inputs = dict(inputs) | {"use_cache": False}
        ids, logprobs, mask = (inputs.pop(name)[:, self.shift :] for name in _COLUMNS)
        target = next_labels(inputs["labels"])
        is_label = target.ne(IGNORE_INDEX)[:, : ids.shape[1]]
        target = target[:, : ids.shape[1]]
        rows = rows_of_logprobs(
            ids[is_label], logprobs[is_label], target[is_label], mask=mask[is_label], has_whole_mass=False
        )
        head = HeadLoss(BatchTeacher(lambda *_: rows), num_items=num_items_in_batch, **self.options)
        with head.inside(base_model(self.accelerator.unwrap_model(model))):
            outputs = model(**inputs)
        loss = outputs["loss"]
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def _check(cfg: Any) -> None:
    if cfg.slim_store and cfg.slim_teacher:
        raise ValueError(f"slim_store and slim_teacher must not both be set, got {cfg.slim_store}, {cfg.slim_teacher}")
    check_one_of(cfg.slim_alignment or "next", "slim_alignment", ("next", "same"))
    for name in _OTHER_LOSSES:
        if cfg[name]:
            raise ValueError(f"{name} must not be set with SlimPlugin, which computes the loss, got {cfg[name]!r}")
    for name in _OTHER_TRAINERS:
        if cfg[name]:
            raise ValueError(f"{name} must not be set with SlimPlugin, which brings its own trainer, got {cfg[name]!r}")
    if (cfg.kd_temperature or 1) != 1:
        raise ValueError(
            f"kd_temperature must be 1, so that the data set keeps the teacher's own log-probabilities, got "
            f"{cfg.kd_temperature}: set the temperature of slim_objective"
        )
    if (cfg.context_parallel_size or 1) > 1:
        raise ValueError(
            f"context_parallel_size must be 1, so that a process holds whole documents, got {cfg.context_parallel_size}"
        )
