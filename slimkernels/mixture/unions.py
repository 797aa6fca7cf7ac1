"""Joins the ids that several sources keep of the same rows: each id once, ascending, with what they say of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Sorts behind every id.
_NO_ID = torch.iinfo(torch.int32).max


def union_of_ids(parts: Sequence[Tensor]) -> Tensor:
    """Returns the ids of all parts (..., K_i), each once, ascending and padded with -1 to sum K_i."""
    ids, _, is_kept = _sorted_entries(parts)
    return _moved_to_front(is_kept, ids)[0]


def first_values(parts: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the union of the ids, and for each the value of the first part that has it; -inf at padding.

    Args:
        parts: Ids (..., K_i) int32, -1 at padding.
        values: Their values (..., K_i), of one dtype.
    """
    ids, order, is_kept = _sorted_entries(parts)
    union, kept = _moved_to_front(is_kept, ids, torch.cat(list(values), -1).gather(-1, order))
    return union, kept


def log_sums(parts: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the union of the ids, and for each the log of the sum of exp(value) over all parts; -inf at padding.

    Args:
        parts: Ids (..., K_i) int32, -1 at padding; each id once in a row of a part.
        values: Their values (..., K_i), of one dtype, -inf at padding.
    """
    ids, order, is_kept = _sorted_entries(parts)
    values_by_id = torch.cat(list(values), -1).gather(-1, order)
    total = values_by_id
    # Entries of one id are neighbours, at most one of each part, so a fixed order of additions reaches all of them.
    for distance in range(1, min(len(parts), ids.shape[-1])):
        later = values_by_id[..., distance:].masked_fill(ids[..., distance:] != ids[..., :-distance], -torch.inf)
        total = torch.cat([torch.logaddexp(total[..., :-distance], later), total[..., -distance:]], -1)
    union, sums = _moved_to_front(is_kept, ids, total)
    return union, sums


def _sorted_entries(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the joined ids in ascending order, where they were, and which are the first of their id; all (..., L)."""
    ids = torch.cat(list(parts), -1)
    # Stable, so that the entries of one id stay in the order of the parts.
    ids, order = ids.masked_fill(ids < 0, _NO_ID).sort(dim=-1, stable=True)
    is_kept = ids != _NO_ID
    is_kept[..., 1:] &= ids[..., 1:] != ids[..., :-1]
    return ids, order, is_kept


def _moved_to_front(is_kept: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Moves the kept entries (..., L) of each tensor to the front of their rows, padded with -1, or -inf for floats."""
    size = is_kept.shape[-1]
    # Entries that are dropped are written to one more column, which is cut off.
    place = torch.where(is_kept, is_kept.cumsum(-1) - 1, size)
    moved = []
    for tensor in tensors:
        padded = tensor.new_full((*tensor.shape[:-1], size + 1), -torch.inf if tensor.is_floating_point() else -1)
        moved.append(padded.scatter(-1, place, tensor)[..., :size])
    return moved
