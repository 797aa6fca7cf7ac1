"""The ids on which a student is compared with its teacher: the teacher's largest logits, the student's, or both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.mixture.unions import union_of_ids
from slimkernels.models.head_loss import Student
from slimkernels.ops.linear_topk_logits import linear_topk_logits
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import Store

# Sorts behind every id.
_NO_ID = torch.iinfo(torch.int32).max


class StudentChoice:
    """The ids that a student chooses where its teacher's rows are stored or served.

    Args:
        stores: The stores of the rows.
        student_top_k: Number of the student's largest logits; None for as many as the stores keep.
        vocab_size: Number of rows of the student's head.

    Raises:
        ValueError: The number is not given, and the stores do not keep one number of logits; or it is larger than the
            vocabulary.
    """

    def __init__(self, stores: Sequence[Store], student_top_k: int | None, vocab_size: int) -> None:
        kept = {store.settings.selection.get("top_k") or 0 for store in stores}
        if student_top_k is None and (len(kept) != 1 or 0 in kept):
            raise ValueError(
                "student_top_k must be given where the teacher's rows do not say how many of its largest logits they "
                f"keep, or differ in that, got None and {sorted(kept)}"
            )
        self._top_k = next(iter(kept)) if student_top_k is None else student_top_k
        self._vocab_size = min([vocab_size, *(store.vocab_size for store in stores)])
        if student_top_k is not None:
            check_student_top_k(student_top_k, self._vocab_size)

    def ids(self, student: Student) -> Tensor:
        """Returns ``student_ids``."""
        return student_ids(student, self._top_k, self._vocab_size)


def check_student_top_k(top_k: int, vocab_size: int) -> None:
    """Checks that a student has as many logits as it is to choose.

    Raises:
        ValueError: It has not.
    """
    if top_k > vocab_size:
        raise ValueError(f"student_top_k must be at most the vocabulary's {vocab_size}, got {top_k}")


def student_ids(student: Student, top_k: int, vocab_size: int) -> Tensor:
    """Returns the ids (N, K) of a student's largest logits, K = min(``top_k``, ``vocab_size``), ascending.

    Args:
        student: The student.
        top_k: Number of logits.
        vocab_size: V, the ids that the teacher has too; the student's head may be padded to more.

    Raises:
        ValueError: The head is split over processes.
    """
    head = student()
    if hasattr(head["weight"], "full_tensor"):
        raise ValueError(
            "support must be 'teacher' with a student whose head is split over processes (tensor parallelism), whose "
            "largest logits no process knows: use 'teacher', or leave the head out of tp_plan"
        )
    bias = None if head["bias"] is None else head["bias"][:vocab_size]
    head = head | {"weight": head["weight"][:vocab_size], "bias": bias}
    return linear_topk_logits(top_k=min(top_k, vocab_size), **head).ids


def union(ids: Tensor, others: Tensor, vocab_size: int) -> Tensor:
    """Returns the ids of both (N, K) and (N, L), each once, ascending and padded with -1 to min(K + L, V)."""
    return union_of_ids([ids, others])[:, :vocab_size]


def intersection(rows: SparseLogits, others: Tensor) -> SparseLogits:
    """Returns a teacher's rows (N, K) without the ids that are not among ``others`` (N, L).

    The dropped entries become a part of ``rest_lse``, where that is known. The others are ascending and padded with -1,
    as the remaining ids are.
    """
    sorted_others = others.masked_fill(others < 0, _NO_ID).contiguous()
    places = torch.searchsorted(sorted_others, rows.ids.contiguous()).clamp(max=others.shape[-1] - 1)
    is_kept = (rows.ids >= 0) & (sorted_others.gather(-1, places) == rows.ids)
    ids, order = rows.ids.masked_fill(~is_kept, _NO_ID).sort(-1)
    is_padding = ids == _NO_ID
    rest_lse = rows.rest_lse
    if rest_lse is not None:
        is_dropped = (rows.ids >= 0) & ~is_kept
        dropped = rows.logits.double().masked_fill(~is_dropped, -torch.inf)
        sums = torch.stack([torch.logsumexp(dropped / temperature, -1) for temperature in rows.temperatures], -1)
        rest_lse = torch.logaddexp(rest_lse.double(), sums).to(rest_lse.dtype)
    return SparseLogits(
        ids=ids.masked_fill(is_padding, -1),
        logits=rows.logits.gather(-1, order).masked_fill(is_padding, 0.0),
        lse=rows.lse,
        temperatures=rows.temperatures,
        target_logit=rows.target_logit,
        rest_lse=rest_lse,
    )
