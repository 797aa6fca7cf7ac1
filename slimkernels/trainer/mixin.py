"""``SlimLossMixin``, which distills without logits in any ``transformers.Trainer``."""

# The mixin uses attributes of transformers.Trainer, which it is always combined with.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.models.head import base_model
from slimkernels.models.head_loss import IGNORE_INDEX, HeadLoss, TeacherOfLabels, next_labels
from slimkernels.models.patch import check_loss, without_logits
from slimkernels.store import Store
from slimkernels.trainer.distillation import DistillationMixin, Step
from slimkernels.trainer.objective import SlimObjective, check_training_arguments
from slimkernels.trainer.teachers import StoredTeacher

# Entries of a batch that only the student is given.
_FOR_THE_STUDENT = ("labels", "shift_labels", "num_items_in_batch")

logger = logging.getLogger(__name__)


class SlimLossMixin(DistillationMixin):
    """A mixin that makes a ``transformers.Trainer``, or a subclass, train on a ``SlimObjective`` without logits.

    A script that trains with TRL needs three lines more::

        class Distiller(sk.SlimLossMixin, SFTTrainer): ...

        teacher = AutoModelForCausalLM.from_pretrained(...)
        trainer = Distiller(model=..., args=..., train_dataset=..., teacher_model=teacher)

    Equivalent to, for batches with ``input_ids`` and ``labels``::

        logits, target = model(input_ids).logits[labelled rows], labels[labelled rows + 1]
        loss = slim_loss(logits, target, teacher_rows, **objective.loss_options)

    Only the model's head and its loss function are replaced, during the forward pass; its wrappers stay in place.
    Packing by ``position_ids``, gradient checkpointing, mixed precision, auxiliary losses of experts, PEFT's adapters
    (also LoRA on the head), DDP and ``num_items_in_batch`` keep their meaning.

    Every logged loss comes with the means of ``LossLog.means``. A loss that is not finite is logged as a warning that
    names the step.

    Args:
        *args: Arguments of the trainer.
        objective: Training objective; None for method "slim" where there is a teacher, else "sft".
        teacher_model: A causal language model with the same vocabulary; set to evaluation mode.
        teacher_store: A ``Store`` of the data set's documents, tokenised as they are in the batches.
        **kwargs: Arguments of the trainer.

    Raises:
        ValueError: The objective needs a teacher and there is none, or two; the model's loss is not computed from its
            head; or an option of the trainer needs logits to train.
    """

    def __init__(
        self,
        *args,
        objective: SlimObjective | None = None,
        teacher_model: nn.Module | None = None,
        teacher_store: Store | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        num_teachers = (teacher_model is not None) + (teacher_store is not None)
        self._set_objective(objective or SlimObjective("slim" if num_teachers else "sft"), teacher_model)
        self.stored_teacher = None if teacher_store is None else StoredTeacher(teacher_store)
        if num_teachers != (1 if self.objective.needs_teacher else 0):
            raise ValueError(
                f"method {self.objective.method!r} needs "
                f"{'one of teacher_model and teacher_store' if self.objective.needs_teacher else 'no teacher'}, got "
                f"teacher_model={type(teacher_model).__name__}, teacher_store={type(teacher_store).__name__}"
            )
        if self.objective.method == "gkd":
            raise ValueError(
                "method 'gkd' trains on text that the student writes, as only SlimTrainer does: use it, or method 'jsd'"
            )
        check_training_arguments(self.args)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func must be None: SlimLossMixin computes the loss")
        check_loss(base_model(self.model))

    def _on_bad_step(self, step: int) -> None:
        logger.warning("the loss is not finite since optimizer step %d: lower the learning rate", step)

    def _step(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | None) -> Step:
        if "labels" not in inputs:
            raise ValueError(
                f"a batch must have labels, got {sorted(inputs)}: use a collator for causal language models"
            )
        inputs = dict(inputs) | {"use_cache": False}
        teacher = None
        if self.objective.needs_teacher:
            if "shift_labels" not in inputs:
                # Only a learned prompt puts a hidden state before the first token, and no teacher has such a prompt.
                inputs["labels"] = inputs["labels"].clone()
                inputs["labels"][:, 0] = IGNORE_INDEX
            teacher = self._teacher_of_labels(inputs)
        student = base_model(self.accelerator.unwrap_model(model))
        head = HeadLoss(teacher, num_items=num_items, **self.objective.loss_options)
        with head.inside(student):
            outputs = model(**inputs)
        if head.result is None or head.target is None:
            raise ValueError(f"{type(student).__name__} computed no loss from the labels of its batch")
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        if not model.training and self.compute_metrics is not None:
            with torch.no_grad():
                outputs = model(**inputs)
        else:
            outputs = without_logits(outputs)
        return Step(loss, head.result, head.target, head.rows, outputs)

    def _teacher_of_labels(self, inputs: dict[str, Any]) -> TeacherOfLabels:
        """Returns the function from a batch's labels to teacher rows, with the teacher's forward pass already done."""
        target = inputs.get("shift_labels")
        target = next_labels(inputs["labels"]) if target is None else target
        places = target.flatten().ne(IGNORE_INDEX).nonzero().squeeze(-1)
        if self.stored_teacher is not None:
            rows = self.stored_teacher.rows(inputs, places)
            return lambda target: rows.to(target.device)
        online = self.online_teacher
        hidden = online.hidden({name: value for name, value in inputs.items() if name not in _FOR_THE_STUDENT})
        hidden = hidden.flatten(0, -2).index_select(0, places.to(hidden.device))
        return lambda target: online.rows(hidden, target.to(hidden.device)).to(target.device)
