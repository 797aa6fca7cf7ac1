"""``SlimLossMixin``, which distills without logits in any ``transformers.Trainer``."""

# The mixin uses attributes of transformers.Trainer, which it is always combined with.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.models.head import base_model
from slimkernels.models.head_loss import IGNORE_INDEX, BatchTeacher, HeadLoss, next_labels
from slimkernels.models.patch import check_loss, without_logits
from slimkernels.store import MixedStores, Store, StoreDataset
from slimkernels.trainer.checkpoint import SlimRun, checkpoint_to_resume, run_identity
from slimkernels.trainer.distillation import DistillationMixin, Step
from slimkernels.trainer.log import LossLog
from slimkernels.trainer.objective import SlimObjective, check_training_arguments
from slimkernels.trainer.stored_rows import check_stored_rows, stores_of
from slimkernels.trainer.teacher_server import TeacherServer
from slimkernels.trainer.teachers import StoredTeacher
from slimkernels.trainer.trl_log import TrlLog

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
    names the step. ``evaluate`` reports the same means with the prefix ``eval_``, in addition to ``eval_loss``. TRL's
    ``SFTTrainer`` logs its own ``entropy``, ``mean_token_accuracy`` and ``num_tokens`` as without the mixin.

    Args:
        *args: Arguments of the trainer.
        objective: Training objective, or the name of its method; None for "kd" where there is a teacher, else "sft",
            which is then logged as a warning.
        teacher_model: A causal language model with the same vocabulary, or its folder or name; set to evaluation mode.
        teacher_store: A ``Store`` of the data set's documents, tokenised as they are in the batches, its path, or a
            ``MixedStores`` of several, without shares.
        teacher_server: ``TeacherServer`` that scores the documents, with the tokenizer of ``processing_class``.
        **kwargs: Arguments of the trainer.

    Raises:
        ValueError: The objective needs a teacher and there is none, or two; the model's loss is not computed from its
            head; an option of the trainer needs logits to train; Liger's fused loss is on; or a process holds a part of
            each sequence (context or Ulysses sequence parallelism).
    """

    _evaluation_log: LossLog | None = None

    def __init__(
        self,
        *args,
        objective: SlimObjective | str | None = None,
        teacher_model: nn.Module | str | os.PathLike[str] | None = None,
        teacher_store: Store | StoreDataset | MixedStores | str | os.PathLike[str] | None = None,
        teacher_server: TeacherServer | None = None,
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._trl_log = TrlLog()
        if isinstance(objective, str):
            objective = SlimObjective(objective)
        if not isinstance(objective, SlimObjective | None):
            raise TypeError(f"objective must be a SlimObjective or the name of a method, got {objective!r}")
        if not isinstance(teacher_model, nn.Module | str | os.PathLike | None):
            raise TypeError(f"teacher_model must be a model or its folder, got {type(teacher_model).__name__}")
        num_teachers = sum(teacher is not None for teacher in (teacher_model, teacher_store, teacher_server))
        if objective is None and not num_teachers:
            logger.warning(
                "SlimLossMixin trains on the labels alone (method 'sft'), as it has no teacher: pass teacher_model or "
                "teacher_store, or objective='sft' if that is meant"
            )
        self._set_objective(objective or SlimObjective("kd" if num_teachers else "sft"), teacher_model, teacher_server)
        self.stored_teacher = (
            self.served_teacher if teacher_store is None else StoredTeacher(opened_rows(teacher_store))
        )
        if num_teachers != (1 if self.objective.needs_teacher else 0):
            one = "one of teacher_model, teacher_store and teacher_server"
            raise ValueError(
                f"method {self.objective.method!r} needs {one if self.objective.needs_teacher else 'no teacher'}, got "
                f"teacher_model={type(teacher_model).__name__}, teacher_store={type(teacher_store).__name__}, "
                f"teacher_server={type(teacher_server).__name__}"
            )
        if self.objective.method == "gkd":
            raise ValueError(
                "method 'gkd' trains on text that the student writes, as only SlimTrainer does: use it, or method 'jsd'"
            )
        check_training_arguments(self.args)
        # The objective of TRL's trainers; the other ones weight every token by the student's logits.
        loss_type = getattr(self.args, "loss_type", None)
        if loss_type not in (None, "nll", "chunked_nll"):
            raise ValueError(
                f"loss_type must be 'nll' with SlimLossMixin, which computes the loss, got {loss_type!r}: train with "
                "TRL's trainer alone, or choose an objective of slimkernels"
            )
        # TRL sets a text with a transformers before 5.19.
        if callable(self.compute_loss_func):
            raise ValueError("compute_loss_func must be None: SlimLossMixin computes the loss")
        if self.args.use_liger_kernel and (self.args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
            raise ValueError(
                "use_liger_kernel must leave the loss to SlimLossMixin, but replaces the model's forward with one that "
                'computes its own: set liger_kernel_config={"fused_linear_cross_entropy": False}'
            )
        check_loss(base_model(self.model))
        if self.stored_teacher is not None:
            tokenizer = getattr(self, "processing_class", None)
            check_stored_rows(
                self.stored_teacher.store,
                self.objective,
                vocab_size=self._vocab_size,
                tokenizer=tokenizer if hasattr(tokenizer, "get_vocab") else None,
            )
            self._set_support(stores_of(self.stored_teacher.store))
        self.add_callback(SlimRun(self._settings, lambda: None))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Trains as the trainer does, after checking that a checkpoint is one of the same run.

        Raises:
            ValueError: The checkpoint is of a run with another objective, teacher, data set, optimizer or schedule; the
                message names what differs.
        """
        output_dir = str(self.args.output_dir)
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, output_dir, self._settings())
        with self._teacher_stopped_after():
            return super().train(checkpoint or resume_from_checkpoint, *args, **kwargs)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """Evaluates as the trainer does, and adds the means of ``LossLog.means`` to the metrics."""
        self._evaluation_log = self._new_log()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._evaluation_log.means(lambda sums: self.accelerator.reduce(sums, "sum"))
        means.pop("labels_per_second")
        added = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        return output._replace(metrics=(output.metrics or {}) | added)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the means per label since the last log to every training log, and TRL's metrics in its trainers."""
        if TrlLog.is_for(self):
            self._trl_log.flush(self, lambda sums: self.accelerator.reduce(sums, "sum"))
        super().log(logs, *args, **kwargs)

    def _settings(self) -> dict[str, Any]:
        # A server's store grows during the run; the server itself is part of the method.
        served = self.served_teacher is not None
        store = None if served or self.stored_teacher is None else self.stored_teacher.store.rows_fingerprint
        return run_identity(self.args, self._method() | {"teacher_store": store}, self.train_dataset)

    def _on_bad_step(self, step: int) -> None:
        logger.warning("the loss is not finite since optimizer step %d: lower the learning rate", step)

    def _compute_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | None, options: dict[str, Any]
    ) -> Step:
        if "labels" not in inputs:
            raise ValueError(
                f"a batch must have labels, got {sorted(inputs)}: use a collator for causal language models"
            )
        inputs = dict(inputs) | {"use_cache": False}
        teacher: BatchTeacher | None = None
        if self.objective.needs_teacher:
            if "shift_labels" not in inputs:
                # Only a learned prompt puts a hidden state before the first token, and no teacher has such a prompt.
                inputs["labels"] = inputs["labels"].clone()
                inputs["labels"][:, 0] = IGNORE_INDEX
            teacher = self._teacher_of_labels(inputs)
        student = base_model(self.accelerator.unwrap_model(model))
        statistics = self.objective.statistics
        head = HeadLoss(teacher, num_items=num_items, statistics=statistics, **options)
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
        rows = None if teacher is None else teacher.rows
        if not model.training and self._evaluation_log is not None:
            self._evaluation_log.add(head.result, head.target, rows, self.state.global_step)
        if TrlLog.is_for(self):
            self._trl_log.add("train" if model.training else "eval", head.result, head.target, inputs)
        return Step(loss, head.result, head.target, rows, outputs)

    def _teacher_of_labels(self, inputs: dict[str, Any]) -> BatchTeacher:
        """Returns the teacher of a batch's labels, with its forward pass already done."""
        target = inputs.get("shift_labels")
        target = next_labels(inputs["labels"]) if target is None else target
        places = target.flatten().ne(IGNORE_INDEX).nonzero().squeeze(-1)
        if self.stored_teacher is not None:
            rows = None if self._scores_ids else self.stored_teacher.rows(inputs, places)
            return self._on_support(inputs, places, rows)
        given = {name: value for name, value in inputs.items() if name not in _FOR_THE_STUDENT}
        return self._scored(self.online_teacher.hidden(given, places))


def opened_rows(store: Store | StoreDataset | MixedStores | str | os.PathLike[str]) -> Store | MixedStores:
    """Returns the store or the mixture that a ``teacher_store`` is.

    Raises:
        TypeError: It is neither, nor the path of a store.
        ValueError: A mixture has shares.
    """
    if isinstance(store, str | os.PathLike):
        return Store(store)
    if isinstance(store, StoreDataset):
        return store.store
    if isinstance(store, MixedStores) and store.shares is not None:
        raise ValueError(
            "teacher_store must have no shares, as the trainer's own data set decides which documents are read, got "
            f"shares={store.shares}: omit them"
        )
    if not isinstance(store, Store | MixedStores):
        raise TypeError(f"teacher_store must be a Store or the path of one, got {type(store).__name__}")
    return store
