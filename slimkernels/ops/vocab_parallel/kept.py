"""The kept ids S of the rows of a vocabulary-parallel loss, and this rank's share of their logits."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from slimkernels.ops._library import accumulation_dtype
from slimkernels.ops._slim_options import SlimOptions
from slimkernels.ops.vocab_parallel.divergences import blend, diverge
from slimkernels.ops.vocab_parallel.slice import VocabSlice
from slimkernels.ops.vocab_parallel.terms import StudentSums, TeacherSums, effective, finite_norm


class KeptEntries:
    """The ids (N, K) of S with the teacher's logits at all of them, and the student's at those in this rank's slice.

    ``owned`` (rows, K) says which entries of a chunk of rows are in the slice.
    """

    def __init__(self, options: SlimOptions, vocab: VocabSlice, dtype: torch.dtype) -> None:
        self.ids = cast(Tensor, options.ids)
        self.unsorted = torch.zeros(self.ids.shape[0], dtype=torch.bool, device=self.ids.device)
        self._teacher_logits = cast(Tensor, options.teacher_logits)
        self._logits = torch.empty_like(self.ids, dtype=dtype)
        self._options, self._vocab = options, vocab
        self._acc = accumulation_dtype(dtype)

    def read(self, rows: slice, logits: Tensor) -> None:
        """Keeps the student's logits at S, and notes which rows have ids that do not ascend."""
        columns, _ = self.columns(rows)
        self._logits[rows] = logits.gather(1, columns)
        self.unsorted[rows] = _unsorted(self.ids[rows])

    def columns(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Returns the columns of the entries (rows, K) in the slice, and which of them are owned."""
        return self._vocab.columns(self.ids[rows])

    def own_ids(self, rows: slice) -> Tensor:
        """Returns the ids of S in the slice as its columns, padded with -1; an unsorted row gets only padding."""
        return self._vocab.own_ids(self.ids[rows]).masked_fill(self.unsorted[rows].unsqueeze(1), -1)

    def highest_id(self) -> Tensor:
        """Returns the largest id of every row (N,)."""
        return self.ids.amax(1)

    def is_label(self, rows: slice, target: Tensor) -> Tensor:
        """Returns which entries (rows, K) are the row's label."""
        return self.ids[rows] == target[rows].unsqueeze(1)

    def z(self, rows: slice, owned: Tensor) -> Tensor:
        """Returns the student's effective logits (rows, K), -inf at entries of other slices."""
        return effective(self._logits[rows], self._options, self._acc).masked_fill(~owned, -math.inf)

    def teacher_z(self, rows: slice) -> Tensor:
        """Returns the teacher's logits / T (rows, K), -inf at padding."""
        scaled = self._teacher_logits[rows].to(self._acc) / self._options.temperature
        return scaled.masked_fill(self.ids[rows] < 0, -math.inf)

    def outcomes(
        self, rows: slice, owned: Tensor, student: StudentSums, teacher: TeacherSums
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns z, log p and the log q of D (rows, K); the first two are -inf at entries of other slices."""
        options = self._options
        p_norm = student.lse_on if options.rest == "renorm_both" else student.lse
        z = self.z(rows, owned)
        log_p = z / options.temperature - finite_norm(p_norm[rows]).to(self._acc).unsqueeze(1)
        log_p = log_p.masked_fill(~owned, -math.inf)
        log_q = self.teacher_z(rows) - teacher.q_norm[rows].to(self._acc).unsqueeze(1)
        if options.teacher_blend != 1:
            log_q = blend(log_q, log_p, options) - teacher.blend_norm[rows].to(self._acc).unsqueeze(1)
        return z, log_p, log_q

    def terms(self, rows: slice, owned: Tensor, student: StudentSums, teacher: TeacherSums) -> tuple[Tensor, ...]:
        """Returns z, p, the share of D and p * dD/dp (rows, K); the last three are 0 at entries of other slices."""
        options = self._options
        z, log_p, log_q = self.outcomes(rows, owned, student, teacher)
        share, slope = diverge(log_q, log_p, teacher.gate[rows].to(self._acc).unsqueeze(1), options)
        return z, log_p.exp(), share.masked_fill(~owned, 0.0), slope.masked_fill(~owned, 0.0)


def _unsorted(ids: Tensor) -> Tensor:
    """Returns which rows of ids (rows, K) do not ascend strictly and end in padding."""
    before, after = ids[:, :-1], ids[:, 1:]
    return ((after >= 0) & (after <= before)).any(1) | ((after >= 0) & (before < 0)).any(1) | (ids < -1).any(1)
