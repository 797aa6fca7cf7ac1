"""``LossLog``, which sums the terms of the loss on the device and reads them only when the trainer logs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from slimkernels.models.head_loss import TeacherRows
from slimkernels.ops.head_teacher import HeadTeacher
from slimkernels.ops.slim_result import SlimLoss

# The names in the log and the fields of SlimLoss, without a teacher and in addition with one. A name is TRL's where
# TRL has one.
_STUDENT_TERMS = {"ce": "ce", "entropy": "entropy", "mean_token_accuracy": "argmax_correct"}
_TEACHER_TERMS = {
    name: name
    for name in ("kd", "weight", "teacher_mass", "student_mass", "teacher_entropy", "teacher_surer", "argmax_kept")
}
_NEVER = torch.iinfo(torch.int64).max
# With a smaller share of the labels among the teacher's kept ids, its rows probably belong to other tokens.
_FEW_KEPT = 0.5

logger = logging.getLogger(__name__)


class LossLog:
    """Sums of the terms of a loss over steps, and the first step whose loss was not finite.

    Only ``means`` and ``first_bad_step`` wait for the device.

    Args:
        device: Device of the losses.
        with_teacher: True if there is a divergence to report.
        with_overlap: True if the overlap with the teacher's ids is computed and reported.
        keeps_labels: True if most labels are expected to be among the kept ids, so that few of them give a warning.
    """

    def __init__(
        self, device: torch.device, with_teacher: bool, with_overlap: bool = False, keeps_labels: bool = True
    ) -> None:
        self.with_teacher = with_teacher
        self._terms = _STUDENT_TERMS | (_TEACHER_TERMS if with_teacher else {})
        if with_teacher and with_overlap:
            self._terms["overlap"] = "overlap"
        self._sums = torch.zeros(len(self._terms) + 2, device=device)
        self._bad_step = torch.full((), _NEVER, device=device)
        self._since = time.perf_counter()
        self._warns = keeps_labels

    def add(self, result: SlimLoss, target: Tensor, teacher: TeacherRows | None, step: int) -> None:
        """Adds the rows of one micro-batch of optimizer step ``step``; ignored labels are negative."""
        is_label = target >= 0
        kept = torch.zeros((), device=target.device)
        if isinstance(teacher, HeadTeacher):
            # The ids that the loss kept are gone.
            kept = is_label.sum() if teacher.num_kept == teacher.weight.shape[0] else kept + torch.nan
        elif teacher is not None:
            kept = ((teacher.ids == target.unsqueeze(-1)).any(-1) & is_label).sum()
        terms = [getattr(result, field).sum() for field in self._terms.values()]
        self._sums += torch.stack([*terms, kept, is_label.sum()])
        bad_step = torch.where(result.loss.detach().isfinite(), _NEVER, step)
        self._bad_step = torch.minimum(self._bad_step, bad_step)

    def means(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Returns the means per label and the labels per second since the last call, and resets the sums.

        Args:
            over_processes: Function that sums a tensor over the processes that train together.

        Returns:
            ``ce``, ``entropy`` (of the student), ``mean_token_accuracy`` (share of labels that are the student's first
            choice) and ``labels_per_second``. With a teacher also ``kd`` (unweighted), ``weight`` (mean w),
            ``teacher_mass``, ``student_mass`` (mean probability of the kept ids), ``teacher_entropy`` (of the kept ids
            and of one outcome for all others), ``teacher_surer`` (share of labels that the teacher gives more
            probability), ``argmax_kept`` (share of labels at which the student's first choice is kept), ``label_kept``
            (share of labels among the kept ids) and, where it is computed, ``overlap``. A mean that is NaN is omitted,
            such as a mass that the teacher was not captured for, or ``label_kept`` where the loss made the teacher's
            rows.
        """
        *sums, num_labels = over_processes(self._sums).tolist()
        self._sums.zero_()
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        names = (*self._terms, "label_kept")
        means: dict[str, float] = {n: total / max(num_labels, 1.0) for n, total in zip(names, sums, strict=True)}
        if not self.with_teacher:
            del means["label_kept"]
        elif num_labels and means["label_kept"] < _FEW_KEPT and self._warns:
            self._warns = False
            logger.warning(
                "only %.1f %% of the labels are among the ids that the teacher's rows keep: unless they keep very few "
                "ids, the rows belong to other tokens or to another tokenizer",
                100 * means["label_kept"],
            )
        means["labels_per_second"] = num_labels / seconds
        return {name: mean for name, mean in means.items() if mean == mean}

    def first_bad_step(self) -> int | None:
        """Returns the first optimizer step whose loss was NaN or infinite on this process, or None."""
        step = int(self._bad_step)
        return None if step == _NEVER else step
