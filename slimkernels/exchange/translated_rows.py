"""``translate_rows``: gives the rows of a teacher the ids of another vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from slimkernels.sparse_logits import SparseLogits, rest_of_logprobs


class TranslatedRows(NamedTuple):
    """Rows over other ids; the first five fields are those of ``SparseLogits``.

    Attributes:
        ids: (R, L) int32.
        logits: (R, L) float64; 0 at padding.
        lse: (R, M) float64.
        rest_lse: (R, M) float64.
        target_logit: (R,) float64.
        mass_kept: (R,) float64, the teacher's probability on the entries that have a new id.
        mass_before: (R,) float64, the same on all entries.
    """

    ids: np.ndarray
    logits: np.ndarray
    lse: np.ndarray
    rest_lse: np.ndarray
    target_logit: np.ndarray
    mass_kept: np.ndarray
    mass_before: np.ndarray


def translate_rows(
    teacher: SparseLogits,
    mapped: np.ndarray,
    label: np.ndarray,
    new_label: np.ndarray,
    *,
    is_injective: bool = False,
) -> TranslatedRows:
    """Gives rows the ids of another vocabulary; what has none goes into the rest, what becomes one id is added.

    With p_i the probability of the kept id i and u(i) its new id, the row keeps exp(logit_u) = sum of exp(logit_i) over
    u(i) = u, and its rest is the old rest plus the exp(logit_i) of all i without u(i). At another temperature T the
    exponents are logit / T, and lse changes by as much as adding the probabilities changes the sum over u.

    Args:
        teacher: Rows (R, K) with ``target_logit``. A ``rest_lse`` that is not known is what the kept entries leave of
            1, NaN below 1e-5.
        mapped: (R, K) integers, the new id of every entry; -1 where there is none, also for padding.
        label: (R,) integers, the old ids of the labels, which ``target_logit`` is of.
        new_label: (R,) integers, the new ids of the labels; -1 where the new label is another token, whose
            ``target_logit`` is NaN.
        is_injective: Whether no two entries of a row have one new id, which makes it faster.

    Returns:
        Rows that keep up to L entries, L at least 1. A row none of whose entries has a new id keeps nothing.
    """
    old_ids, lse = teacher.ids.numpy(), teacher.lse.double().numpy()
    is_mapped = mapped >= 0
    logits = np.where(old_ids >= 0, teacher.logits.double().numpy(), -np.inf)
    by_row, ids, sums = _added(mapped, logits, is_mapped, is_injective)
    counts = np.bincount(by_row, minlength=len(mapped))
    at = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (len(mapped), int(counts.max(initial=1)))
    new_ids, new_logits = np.full(shape, -1, np.int32), np.full(shape, -np.inf)
    new_ids[by_row, at], new_logits[by_row, at] = ids, sums
    new_lse, new_rest = np.empty_like(lse), np.empty_like(lse)
    old_rest = np.full_like(lse, np.nan) if teacher.rest_lse is None else teacher.rest_lse.double().numpy()
    masses: list[np.ndarray] = []
    for column, temperature in enumerate(teacher.temperatures):
        level, rest = lse[:, column], old_rest[:, column]
        kept, dropped, added = (
            np.exp(values / temperature - level[:, None]).sum(-1)
            for values in (
                np.where(is_mapped, logits, -np.inf),
                np.where(is_mapped, -np.inf, logits),
                new_logits,
            )
        )
        new_lse[:, column] = level + np.log1p(added - kept)
        unknown = np.isnan(rest)
        left = rest_of_logprobs(torch.from_numpy(new_logits / temperature - new_lse[:, column, None])).numpy()
        with np.errstate(divide="ignore"):
            known = level + np.log(np.exp(rest - level) + dropped)
            new_rest[:, column] = np.where(unknown, left + new_lse[:, column], known)
        if column == 0:
            whole = np.where(unknown, 1.0, kept + dropped + np.exp(rest - level))
            masses = [kept / whole, (kept + dropped) / whole]
    is_empty = counts == 0
    # All of such a row's mass is in the rest, whatever rounding the sums have.
    new_rest[is_empty] = new_lse[is_empty]
    return TranslatedRows(
        ids=new_ids,
        logits=np.where(new_ids >= 0, new_logits, 0.0),
        lse=new_lse,
        rest_lse=new_rest,
        target_logit=_target_logits(teacher, mapped, logits, label, new_label),
        mass_kept=masses[0],
        mass_before=masses[1],
    )


def _added(
    mapped: np.ndarray, logits: np.ndarray, is_mapped: np.ndarray, is_injective: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns rows, ids and logits of the mapped entries, by row and ascending in ids, with equal ids added."""
    by_row, _ = np.nonzero(is_mapped)
    ids, values = mapped[is_mapped].astype(np.int64), logits[is_mapped]
    order = np.argsort(by_row << 32 | ids, kind="stable")
    ids, values = ids[order], values[order]
    if is_injective or not len(ids):
        return by_row, ids, values
    is_first = np.ones(len(ids), bool)
    is_first[1:] = (np.diff(ids) != 0) | (np.diff(by_row) != 0)
    starts = np.flatnonzero(is_first)
    return by_row[starts], ids[starts], np.logaddexp.reduceat(values, starts)


def _target_logits(
    teacher: SparseLogits, mapped: np.ndarray, logits: np.ndarray, label: np.ndarray, new_label: np.ndarray
) -> np.ndarray:
    """Returns the (R,) logits of the labels, to which those of the other kept ids that become the label are added."""
    if teacher.target_logit is None:
        raise ValueError("teacher must have a target_logit, as rows of a store have, got None")
    is_other = (mapped == new_label[:, None]) & (mapped >= 0) & (teacher.ids.numpy() != label[:, None])
    others = np.logaddexp.reduce(np.where(is_other, logits, -np.inf), -1)
    return np.where(new_label >= 0, np.logaddexp(teacher.target_logit.double().numpy(), others), np.nan)
