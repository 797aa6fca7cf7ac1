"""``SlimLossMixin``: distillation without logits in any ``transformers.Trainer``."""

# The mixin uses what transformers.Trainer, which it is always combined with, declares.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimkernels.models.head import LanguageModelHead
from slimkernels.models.head_loss import IGNORE_INDEX, HeadLoss, TeacherOfLabels, base_model, next_labels
from slimkernels.models.patch import check_loss, without_logits
from slimkernels.ops.slim_result import SlimLoss
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import Store
from slimkernels.trainer.log import LossLog
from slimkernels.trainer.objective import SlimObjective, check_training_arguments
from slimkernels.trainer.teachers import OnlineTeacher, StoredTeacher

# What a teacher is not given of a batch.
_OF_THE_STUDENT = ("labels", "shift_labels", "num_items_in_batch")

logger = logging.getLogger(__name__)


class Step(NamedTuple):
    """The loss of one micro-batch, and what it was made of.

    Attributes:
        loss: Scalar with a gradient.
        terms: The terms per row.
        target: (N,) their labels.
        teacher: The teacher's rows, or None.
        outputs: What ``compute_loss`` returns beside the loss.
    """

    loss: Tensor
    terms: SlimLoss
    target: Tensor
    teacher: SparseLogits | None
    outputs: Any


class SlimLossMixin:
    """Put before a ``transformers.Trainer`` or a subclass, it trains on a ``SlimObjective``, without logits.

    Three lines of a script that trains with TRL change::

        class Distiller(sk.SlimLossMixin, SFTTrainer): ...

        teacher = AutoModelForCausalLM.from_pretrained(...)
        trainer = Distiller(model=..., args=..., train_dataset=..., teacher_model=teacher)

    Equivalent to, for batches with ``input_ids`` and ``labels``::

        logits, target = model(input_ids).logits[labelled rows], labels[labelled rows + 1]
        loss = slim_loss(logits, target, teacher_rows, **objective.loss_options)

    The model runs as it is, wrappers and all; only its head and its loss function are stood in for during the forward
    pass. Packing by ``position_ids``, gradient checkpointing, mixed precision, experts' auxiliary losses, PEFT's
    adapters (LoRA on the head, too) and DDP keep their meaning, and so does ``num_items_in_batch``.

    With every logged loss come those of ``LossLog.means``. A loss that is not finite is a logged warning, by the step.

    Args:
        *args: Of the trainer.
        objective: What to train on; None: method "slim" where there is a teacher, else "sft".
        teacher_model: A causal language model over the same vocabulary, in evaluation mode.
        teacher_store: A ``Store`` of the documents of the dataset, tokenised as they are in the batches.
        **kwargs: Of the trainer.

    Raises:
        ValueError: No teacher where the objective needs one, or two; a model whose loss is not that of its head; an
            option of the trainer that needs logits to train.
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
        has_teacher = teacher_model is not None or teacher_store is not None
        self._set_objective(objective or SlimObjective("slim" if has_teacher else "sft"), teacher_model)
        self.stored_teacher = None if teacher_store is None else StoredTeacher(teacher_store)
        if self.objective.needs_teacher + 0 != (teacher_model is not None) + (teacher_store is not None):
            raise ValueError(
                f"method {self.objective.method!r} needs "
                f"{'one of teacher_model and teacher_store' if self.objective.needs_teacher else 'no teacher'}, got "
                f"teacher_model={type(teacher_model).__name__}, teacher_store={type(teacher_store).__name__}"
            )
        if self.objective.method == "gkd":
            raise ValueError("method 'gkd' lets the student write, which SlimTrainer does: use it, or method 'jsd'")
        check_training_arguments(self.args)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func must be None: SlimLossMixin computes the loss")
        check_loss(base_model(self.model))

    def _set_objective(self, objective: SlimObjective, teacher_model: nn.Module | None) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"the loss is computed by one process per device, got DataParallel on {self.args.n_gpu} devices: start "
                "with torchrun, or set CUDA_VISIBLE_DEVICES to one device"
            )
        self.objective = objective
        # compute_loss divides by num_items_in_batch itself, so Trainer must not divide by the accumulation steps.
        self.model_accepts_loss_kwargs = True
        self.online_teacher = None
        if teacher_model is not None:
            if getattr(teacher_model, "hf_device_map", None) is None:
                teacher_model = teacher_model.to(self.args.device)
            vocab_size = LanguageModelHead.of(base_model(self.model)).vocab_size
            self.online_teacher = OnlineTeacher(teacher_model, objective, vocab_size)
        self.loss_log = LossLog(self.args.device, objective.needs_teacher)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """The micro-batch's share of the loss, a scalar; with ``return_outputs`` also the model's outputs."""
        step = self._step(model, inputs, num_items_in_batch)
        loss = step.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP averages gradients over processes; num_items_in_batch counts the labels of all of them.
            loss = loss * self.accelerator.num_processes
        if model.training:
            self.loss_log.add(step.terms, step.target, step.teacher, self.state.global_step + 1)
        return (loss, step.outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the means per label since the last log to every training log."""
        if "loss" in logs:
            logs = logs | self.loss_log.means(lambda sums: self.accelerator.reduce(sums, "sum"))
            self._report_bad_step()
        super().log(logs, *args, **kwargs)

    def _report_bad_step(self) -> None:
        step = self.loss_log.first_bad_step()
        if step is not None:
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
                # The first token has a hidden state before it only behind a learned prompt, which no teacher has.
                inputs["labels"] = inputs["labels"].clone()
                inputs["labels"][:, 0] = IGNORE_INDEX
            teacher = self._teacher_of(inputs)
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

    def _teacher_of(self, inputs: dict[str, Any]) -> TeacherOfLabels:
        target = inputs.get("shift_labels")
        target = next_labels(inputs["labels"]) if target is None else target
        places = target.flatten().ne(IGNORE_INDEX).nonzero().squeeze(-1)
        if self.stored_teacher is not None:
            rows = self.stored_teacher.rows(inputs, places)
            return lambda target: rows.to(target.device)
        online = self.online_teacher
        hidden = online.hidden({name: value for name, value in inputs.items() if name not in _OF_THE_STUDENT})
        hidden = hidden.flatten(0, -2).index_select(0, places.to(hidden.device))
        return lambda target: online.rows(hidden, target.to(hidden.device)).to(target.device)
