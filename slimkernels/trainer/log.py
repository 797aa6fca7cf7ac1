"""What a distillation's log says of its loss, summed on the device and read only when the trainer logs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from slimkernels.ops.slim_result import SlimLoss
from slimkernels.sparse_logits import SparseLogits

_TERMS = ("ce", "kd", "weight", "teacher_mass", "student_mass")
_NEVER = torch.iinfo(torch.int64).max
# Below this share of labels among the teacher's kept ids, its rows are probably not about these labels.
_FEW_KEPT = 0.5

logger = logging.getLogger(__name__)


class LossLog:
    """Sums a loss's terms over steps, and names the first step whose loss was not finite.

    Nothing here waits for the device but ``means`` and ``first_bad_step``.

    Args:
        device: Where the losses are.
        with_teacher: Whether there is a divergence to report.
    """

    def __init__(self, device: torch.device, with_teacher: bool) -> None:
        self.with_teacher = with_teacher
        self._sums = torch.zeros(len(_TERMS) + 2, device=device)
        self._bad_step = torch.full((), _NEVER, device=device)
        self._since = time.perf_counter()
        self._has_warned = False

    def add(self, result: SlimLoss, target: Tensor, teacher: SparseLogits | None, step: int) -> None:
        """Adds the rows of one micro-batch of optimizer step ``step``; ignored labels are negative."""
        is_label = target >= 0
        kept = torch.zeros((), device=target.device)
        if teacher is not None:
            kept = ((teacher.ids == target.unsqueeze(-1)).any(-1) & is_label).sum()
        terms = [getattr(result, name).sum() for name in _TERMS]
        self._sums += torch.stack([*terms, kept, is_label.sum()])
        bad_step = torch.where(result.loss.detach().isfinite(), _NEVER, step)
        self._bad_step = torch.minimum(self._bad_step, bad_step)

    def means(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means per label since the last call, and the labels per second; starts anew.

        Args:
            over_processes: Sums a tensor over the processes that train together.

        Returns:
            ``ce``, ``kd`` (unweighted), ``weight`` (mean w), ``teacher_mass``, ``student_mass`` (mean probability of
            the kept ids), ``label_kept`` (share of labels among the kept ids), ``labels_per_second``. Without a teacher
            ``ce`` and ``labels_per_second`` alone. A mass that the teacher was not captured for is left out.
        """
        *sums, num_labels = over_processes(self._sums).tolist()
        self._sums.zero_()
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        names = (*_TERMS, "label_kept")
        means: dict[str, float] = {n: total / max(num_labels, 1.0) for n, total in zip(names, sums, strict=True)}
        if not self.with_teacher:
            means = {"ce": means["ce"]}
        elif num_labels and means["label_kept"] < _FEW_KEPT and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "only %.1f %% of the labels are among the ids that the teacher's rows keep: unless so few are kept, "
                "the rows are of other tokens, or of another tokenizer",
                100 * means["label_kept"],
            )
        means["labels_per_second"] = num_labels / seconds
        return {name: mean for name, mean in means.items() if mean == mean}

    def first_bad_step(self) -> int | None:
        """The first optimizer step whose loss was NaN or infinite on this process, or None."""
        step = int(self._bad_step)
        return None if step == _NEVER else step
