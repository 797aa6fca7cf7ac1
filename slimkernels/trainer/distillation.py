"""``DistillationMixin``, the common base of ``SlimTrainer`` and ``SlimLossMixin``."""

# The mixin uses attributes of transformers.Trainer, which it is always combined with.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from slimkernels.models.head import LanguageModelHead, base_model
from slimkernels.models.head_loss import BatchTeacher, Student, TeacherRows
from slimkernels.models.load import load_model
from slimkernels.ops.head_teacher import HeadTeacher
from slimkernels.ops.slim_result import SlimLoss
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import Store
from slimkernels.trainer.checkpoint import StopsAtLength, model_identity
from slimkernels.trainer.log import LossLog
from slimkernels.trainer.objective import SlimObjective
from slimkernels.trainer.schedules import AdaptSchedules, Schedules
from slimkernels.trainer.served_teacher import Ahead, ServedTeacher
from slimkernels.trainer.stored_rows import check_stored_rows, longest_document
from slimkernels.trainer.support import StudentChoice, intersection
from slimkernels.trainer.teacher_server import TeacherServer
from slimkernels.trainer.teachers import OnlineTeacher

SERVED_METHODS = ("kd", "slim", "reverse_kl", "jsd", "gkd")
# A weight that changes no gradient in float32. At 0 the loss of a ``HeadTeacher`` would not know its divergence.
_NO_WEIGHT = 1e-20


class Step(NamedTuple):
    """The loss of one micro-batch, and what it was computed from.

    Attributes:
        loss: Scalar with a gradient.
        terms: Terms of the loss, per row.
        target: Labels (N,) of the rows.
        teacher: Teacher rows (N, K), the ``HeadTeacher`` that they are made of, or None.
        outputs: Model outputs that ``compute_loss`` returns with the loss.
    """

    loss: Tensor
    terms: SlimLoss
    target: Tensor
    teacher: TeacherRows | None
    outputs: Any


class DistillationMixin(StopsAtLength):
    """A base class, placed before a ``transformers.Trainer``, for trainers on a ``SlimObjective``.

    It holds the objective, its online teacher and the log of the loss, and turns the loss of a micro-batch into what
    the ``Trainer`` expects. A subclass calls ``_set_objective`` after ``Trainer.__init__``, computes the loss in
    ``_compute_step``, and decides in ``_on_bad_step`` what a loss that is not finite leads to.

    Attributes:
        objective: Objective of the training.
        online_teacher: Teacher model that scores every batch, or None.
        served_teacher: Teacher behind a server, or None.
        schedules: Options of the loss that change during the training.
        loss_log: Sums of the terms of the loss since the last log.
    """

    objective: SlimObjective
    online_teacher: OnlineTeacher | None
    served_teacher: ServedTeacher | None
    schedules: Schedules
    loss_log: LossLog

    def _set_objective(
        self,
        objective: SlimObjective,
        teacher_model: nn.Module | str | os.PathLike[str] | None,
        teacher_server: TeacherServer | None = None,
    ) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"the loss needs one process per device, got DataParallel on {self.args.n_gpu} devices: start with "
                "torchrun, or set CUDA_VISIBLE_DEVICES to one device"
            )
        _check_sequences_are_whole(getattr(self.accelerator, "parallelism_config", None))
        check_can_be_saved(self.model)
        self.objective = objective
        self._options = objective.loss_options
        self.schedules = Schedules(objective.parsed_schedules)
        self._adapt: AdaptSchedules | None = None
        if self.schedules.adapt:
            self._adapt = AdaptSchedules(self.schedules, self.args.device, self._over_processes)
            self.add_callback(self._adapt)
        if teacher_model is None:
            _check_selects_nothing(objective, teacher_server)
        # compute_loss divides by num_items_in_batch itself, so Trainer must not divide by the accumulation steps.
        self.model_accepts_loss_kwargs = True
        self.online_teacher = None
        self._teacher_weights = None
        if teacher_model is not None:
            if isinstance(teacher_model, str | os.PathLike):
                tokenizer = getattr(self, "processing_class", None)
                tokenizer = tokenizer if hasattr(tokenizer, "get_vocab") else None
                teacher_model = load_model(teacher_model, tokenizer=tokenizer)
            if getattr(teacher_model, "hf_device_map", None) is None:
                teacher_model = teacher_model.to(self.args.device)
            self.online_teacher = OnlineTeacher(teacher_model, objective, self._vocab_size)
            self._teacher_weights = model_identity(teacher_model)
        self.served_teacher = None
        if not isinstance(teacher_server, TeacherServer | None):
            raise TypeError(
                f"teacher_server must be one TeacherServer, got {type(teacher_server).__name__}: documents have no "
                "field that chooses among several; capture from each server into a store of its own, and train on "
                "MixedStores of them"
            )
        if teacher_server is not None:
            self.served_teacher = self._served(objective, teacher_server)
        self._student_choice: StudentChoice | None = None
        self._ahead: Ahead | None = None
        self.loss_log = self._new_log()

    def _served(self, objective: SlimObjective, server: TeacherServer) -> ServedTeacher:
        if objective.method not in SERVED_METHODS:
            raise ValueError(f"teacher_server needs a method of {SERVED_METHODS}, got {objective.method!r}")
        tokenizer = getattr(self, "processing_class", None)
        teacher = ServedTeacher(server, tokenizer, self._vocab_size, self.args.process_index)
        try:
            check_stored_rows(teacher.store, objective, vocab_size=self._vocab_size)
            teacher.check_length(longest_document(self.train_dataset))
        except BaseException:
            teacher.stop()
            raise
        self.add_callback(_FlushEachEpoch(teacher, self.accelerator.wait_for_everyone))
        return teacher

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Returns the micro-batches of an optimizer step as the trainer does; a served teacher is asked ahead."""
        if self.served_teacher is not None and not self._scores_ids:
            if self._ahead is None or self._ahead.batches is not epoch_iterator:
                first, per_step = self.state.global_step, self.args.gradient_accumulation_steps

                def is_known(number: int) -> bool:
                    return not self._student_writes(first + number // per_step, number % per_step)

                self._ahead = Ahead(epoch_iterator, self.served_teacher, self.served_teacher.settings.ahead, is_known)
            epoch_iterator = self._ahead
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _set_support(self, stores: Sequence[Store]) -> None:
        """Prepares the objective's support for rows of the stores, or of a served teacher.

        Raises:
            ValueError: The rows cannot be on that support.
        """
        objective = self.objective
        if objective.support == "teacher" or self.online_teacher is not None:
            return
        if self._scores_ids:
            self.served_teacher.check_scores_ids(objective.support)
        elif objective.support != "intersection":
            raise ValueError(
                "support must be 'teacher' or 'intersection' with a store, which holds the teacher's logits at its own "
                f"ids only, got {objective.support!r}: pass a teacher_model, which scores other ids too"
            )
        self._student_choice = StudentChoice(stores, objective.student_top_k, self._vocab_size)

    def _on_support(self, inputs: dict[str, Any], places: Tensor, rows: SparseLogits | None) -> BatchTeacher:
        """Returns the teacher of a batch whose rows were stored or served.

        Args:
            inputs: The batch.
            places: Flat indices (N,) of the hidden states that predict the labels.
            rows: The rows on the teacher's own ids; None where the server is asked for the student's ids.
        """

        def rows_of(target: Tensor, student: Student) -> TeacherRows:
            if rows is None:
                ids = self._student_choice.ids(student)
                return self.served_teacher.scores(inputs, places, ids, self.objective.support).to(target.device)
            given = rows.to(target.device)
            return given if self._student_choice is None else intersection(given, self._student_choice.ids(student))

        return BatchTeacher(rows_of)

    @property
    def _scores_ids(self) -> bool:
        """Whether a server scores the student's own ids, which are not known before the step."""
        return self.served_teacher is not None and self.objective.support in ("student", "union")

    def _scored(self, hidden: Tensor) -> BatchTeacher:
        """Returns the online teacher of a batch, of which it has the hidden states."""
        online, needs_student = self.online_teacher, self.objective.support != "teacher"

        def rows_of(target: Tensor, student: Student) -> TeacherRows:
            rows = online.rows(hidden, target.to(hidden.device), *((student,) if needs_student else ()))
            return rows if isinstance(rows, HeadTeacher) else rows.to(target.device)

        return BatchTeacher(rows_of)

    def _student_writes(self, step: int, number: int) -> bool:
        """Returns whether the student writes micro-batch ``number`` of a step, so that only then its text is known."""
        return False

    @contextlib.contextmanager
    def _teacher_stopped_after(self) -> Iterator[None]:
        """Ends the requests to a served teacher after a training; after an error without waiting for them."""
        try:
            yield
        except BaseException:
            if self.served_teacher is not None:
                self.served_teacher.stop(wait=False)
            raise
        if self.served_teacher is not None:
            self.served_teacher.stop()

    def _over_processes(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, "sum")

    def _loss_options(self, scheduled: dict[str, float]) -> dict[str, Any]:
        """Returns the keyword arguments of ``linear_slim_loss``, with the scheduled ones of the current step."""
        options = self._options | scheduled
        if scheduled.get("kd_weight") == 0:
            options["kd_weight"] = _NO_WEIGHT
        if self.online_teacher is not None:
            self.online_teacher.temperature = options["temperature"]
        return options

    def _new_log(self) -> LossLog:
        objective = self.objective
        # A student that is not trained yet keeps few of the labels, whatever teacher it has.
        keeps_labels = objective.support in ("teacher", "union")
        return LossLog(self.args.device, objective.needs_teacher, objective.log_overlap, keeps_labels)

    @property
    def _vocab_size(self) -> int:
        return LanguageModelHead.of(base_model(self.model)).vocab_size

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """Computes the micro-batch's share of the loss, a scalar; with ``return_outputs`` also the model's outputs."""
        if isinstance(num_items_in_batch, Tensor):
            # The loss of a step without any label is 0, and not 0 / 0.
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        scheduled = self.schedules.values(self.state.global_step, self.state.max_steps)
        step = self._compute_step(model, inputs, num_items_in_batch, self._loss_options(scheduled))
        loss = step.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP averages gradients over processes; num_items_in_batch counts the labels of all of them.
            loss = loss * self.accelerator.num_processes
        if model.training:
            self.loss_log.add(step.terms, step.target, step.teacher, self.state.global_step + 1)
            self.schedules.last = scheduled
            if self._adapt is not None:
                self._adapt.add(step.terms.kd, step.target)
        return (loss, step.outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the means per label since the last log, and the scheduled options of its last step, to training logs."""
        if "loss" in logs:
            logs = logs | self.loss_log.means(self._over_processes) | self.schedules.last
            if self.served_teacher is not None:
                logs["teacher_wait_seconds"] = self.served_teacher.wait_seconds
                self.served_teacher.wait_seconds = 0.0
            self._report_bad_step()
        super().log(logs, *args, **kwargs)

    def _method(self) -> dict[str, Any]:
        """Returns the options of the method and the fingerprint of its online teacher, for ``run_identity``."""
        online = None
        if self.online_teacher is not None:
            names = ("method", "teacher_top_k", "teacher_top_fraction", "teacher_rounds", "on_policy_fraction")
            names += ("max_new_tokens", "sampling_temperature")
            online = {name: getattr(self.objective, name) for name in names}
        method = self.objective.loss_options | {"online_teacher": online, "teacher_weights": self._teacher_weights}
        if self.served_teacher is not None:
            settings = self.served_teacher.settings
            method["teacher_server"] = {"model": settings.model, "top_logprobs": settings.top_logprobs}
        schedules = self.objective.parsed_schedules
        method["schedules"] = {name: list(dataclasses.astuple(schedule)) for name, schedule in schedules.items()}
        if any(schedule.start != schedule.end for schedule in schedules.values()):
            # They depend on the length of the run, which no other number of steps may change.
            method |= {"max_steps": self.args.max_steps, "num_train_epochs": self.args.num_train_epochs}
        return method | {"support": [self.objective.support, self.objective.student_top_k]}

    def _report_bad_step(self) -> None:
        step = self.loss_log.first_bad_step()
        if step is not None:
            self._on_bad_step(step)

    def _compute_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | None, options: dict[str, Any]
    ) -> Step:
        """Computes the loss of a micro-batch with these options, normalised by ``num_items`` labels."""
        raise NotImplementedError

    def _on_bad_step(self, step: int) -> None:
        """Handles the first optimizer step whose loss was not finite; called at every log from then on."""
        raise NotImplementedError


class _FlushEachEpoch(TrainerCallback):
    """A callback that stores the rows of an epoch before any process reads those of another one."""

    def __init__(self, teacher: ServedTeacher, wait_for_everyone: Callable[[], None]) -> None:
        self._teacher, self._wait_for_everyone = teacher, wait_for_everyone

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """Writes the rows, and waits until every process has."""
        self._teacher.flush()
        self._wait_for_everyone()


def _check_selects_nothing(objective: SlimObjective, teacher_server: TeacherServer | None) -> None:
    """Refuses the options that select logits of a teacher model where there is none."""
    names = ("teacher_top_k", "teacher_top_fraction", "teacher_rounds", "teacher_in_chunks")
    given = {name: value for name in names if (value := getattr(objective, name)) not in (None, False)}
    if given:
        instead = (
            "the logits of a store were selected when it was captured"
            if teacher_server is None
            else "set top_logprobs of the teacher_server"
        )
        raise ValueError(f"{', '.join(names)} select logits of a teacher_model, got {given} without one: {instead}")


def _check_sequences_are_whole(config: Any) -> None:
    """Refuses a ``ParallelismConfig`` of accelerate with which a process holds a part of each sequence."""
    sizes = {name: getattr(config, name, None) or 1 for name in ("cp_size", "sp_size")}
    if any(size > 1 for size in sizes.values()):
        raise ValueError(
            "parallelism_config must leave sequences whole, as the labels of a document and its teacher's rows are "
            f"found by all of its tokens, got {sizes} (context and Ulysses sequence parallelism): set both to 1, and "
            "shorten what a device holds by gradient checkpointing, FSDP2 or tensor parallelism"
        )


def check_can_be_saved(model: nn.Module) -> None:
    """Saves the settings of a model's generation once, as every checkpoint does.

    Raises:
        ValueError: transformers refuses to save them, as it would at the end of the training.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.generation_config.save_pretrained(folder)
        except ValueError as error:
            raise ValueError(
                f"the student's generation_config must be one that can be saved, or no checkpoint could be written: "
                f"{error}"
            ) from error
