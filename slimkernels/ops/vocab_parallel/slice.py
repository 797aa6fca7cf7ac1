"""A rank's slice of the vocabulary: its ids, its exchange of numbers with the other ranks, and slices of DTensors."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from slimkernels import _checks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


@dataclasses.dataclass(frozen=True)
class VocabSlice:
    """The ids [start, start + size) of the vocabulary; the other ranks of ``group`` hold the other slices."""

    group: dist.ProcessGroup
    start: int
    size: int

    def columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the columns (int64) of ids in the slice, arbitrary for other ids, and which ids are in it."""
        local = ids.long() - self.start
        return local.clamp(0, self.size - 1), (local >= 0) & (local < self.size)

    def own_ids(self, ids: Tensor) -> Tensor:
        """Returns the slice's part of rows (N, K) of ids as columns of the slice, ascending and padded with -1."""
        _, owned = self.columns(ids)
        before = ((ids >= 0) & (ids < self.start)).sum(1, keepdim=True)
        k = torch.arange(ids.shape[1], device=ids.device)
        moved = ids.gather(1, (before + k).clamp(max=ids.shape[1] - 1)) - self.start
        return moved.masked_fill(k >= owned.sum(1, keepdim=True), -1)

    def gather(self, numbers: Tensor) -> Tensor:
        """Gathers numbers (C, N) from every rank into (ranks, C, N)."""
        gathered = numbers.new_empty(dist.get_world_size(self.group), *numbers.shape)
        if numbers.numel():
            dist.all_gather(list(gathered.unbind()), numbers, group=self.group)
        return gathered

    def add_up(self, numbers: Tensor) -> None:
        """Sums (C, N) numbers over the ranks, in place."""
        if numbers.numel():
            dist.all_reduce(numbers, group=self.group)

    def sound_rows(
        self,
        gathered: dict[str, Tensor],
        target: Tensor,
        active: Tensor,
        highest_id: Tensor | None,
        unsorted: Tensor | None,
    ) -> Tensor:
        """Returns which rows (N,) can be computed; on a CPU, which needs no synchronisation, the others raise instead.

        ``highest_id`` (N,) and ``unsorted`` (N,) describe the teacher's ids; both are None without a teacher. All ranks
        raise for the same row.

        Raises:
            ValueError: Slices that do not make up the vocabulary, different tokens on different ranks, or a label or an
                id outside the vocabulary.
        """
        start, order = gathered["start"].sort(0)
        size = gathered["size"].gather(0, order)
        tiles = (start == size.cumsum(0) - size).all(0)
        agree = (gathered["target"] == gathered["target"][:1]).all(0)
        vocab_size = gathered["size"].sum(0)
        bad_target = active & ((target < 0) | (target >= vocab_size))
        bad_ids = torch.zeros_like(active)
        if highest_id is not None and unsorted is not None:
            bad_ids = active & (unsorted | (highest_id >= vocab_size))
        if target.device.type == "cpu" and target.numel():
            if not tiles.all():
                starts, sizes = (gathered[name][:, 0].long().tolist() for name in ("start", "size"))
                held = ", ".join(f"[{a}, {a + n})" for a, n in zip(starts, sizes, strict=True))
                raise ValueError(
                    "the slices [vocab_start, vocab_start + V_local) of the ranks of group must make up the "
                    f"vocabulary, each id once, got {held}"
                )
            if not agree.all():
                row = int((~agree).nonzero()[0])
                raise _checks.RowError(
                    f"every rank of group must have the same tokens, got target[{_checks.RowError.INDEX}] = "
                    f"{gathered['target'][:, row].long().tolist()}: the ranks that share a vocabulary work on one "
                    "batch, unlike those of data parallelism or FSDP",
                    row,
                )
            for fault, bad in ((1, bad_target), (2, bad_ids)):
                if bad.any():
                    _checks.raise_fault(4 * int(bad.nonzero()[0]) + fault)
        return tiles & agree & ~bad_target & ~bad_ids


def vocab_slice_of(
    tensor: Tensor, name: str, dim: int, group: dist.ProcessGroup | None, vocab_start: int
) -> tuple[Tensor, VocabSlice | None]:
    """Returns this rank's part of ``tensor``, and the slice that its dimension ``dim`` holds; None for all ids.

    The placement of a DTensor tells its slice; the gradient of a DTensor has the same placement.

    Raises:
        TypeError: ``tensor`` is none, ``group`` is not a process group, or ``vocab_start`` is not an integer.
        ValueError: ``vocab_start`` without ``group`` or negative, a rank outside ``group``, a group together with a
            DTensor, or a DTensor with an unsupported placement.
    """
    _checks.check_tensor(tensor, name)
    if _is_dtensor(tensor):
        if group is not None or vocab_start:
            raise ValueError(f"{name} is a DTensor, whose placement tells its slice: do not pass group and vocab_start")
        return _shard_of(tensor, name, dim)
    if group is None:
        if vocab_start:
            raise ValueError(
                f"vocab_start={vocab_start} means that {name} is a slice of the vocabulary: pass group as well, the "
                "ranks that hold the other slices"
            )
        return tensor, None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed ProcessGroup that this rank is in, got {type(group).__name__}: pass "
            "torch.distributed.group.WORLD for all ranks"
        )
    if isinstance(vocab_start, bool) or not isinstance(vocab_start, int):
        raise TypeError(f"vocab_start must be an integer, got {type(vocab_start).__name__}")
    if vocab_start < 0:
        raise ValueError(f"vocab_start must be at least 0, got {vocab_start}")
    return tensor, VocabSlice(group, vocab_start, tensor.shape[dim] if tensor.ndim else 0)


def whole(tensor: Tensor, name: str) -> Tensor:
    """Returns ``tensor``, which every rank must have whole; a replicated DTensor becomes a plain tensor."""
    if not _is_dtensor(tensor):
        return tensor
    if not all(placement.is_replicate() for placement in tensor.placements):
        raise ValueError(
            f"{name} must be whole on every rank, got a DTensor with placements {tensor.placements}: call "
            f"{name}.redistribute(placements=[Replicate()])"
        )
    return tensor.to_local()


def _is_dtensor(tensor: Tensor) -> TypeIs[DTensor]:
    # No tensor is a DTensor unless the module is loaded already, and importing it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _shard_of(tensor: DTensor, name: str, dim: int) -> tuple[Tensor, VocabSlice | None]:
    dim = dim % tensor.ndim
    placements, mesh, vocab_size = tensor.placements, tensor.device_mesh, tensor.shape[dim]
    if all(placement.is_replicate() for placement in placements):
        return tensor.to_local(), None
    # Imported late because it takes a second, and only callers with a DTensor, who have imported it, come here.
    from torch.distributed.tensor import Shard

    if mesh.ndim != 1 or type(placements[0]) is not Shard or placements[0].dim % tensor.ndim != dim:
        raise ValueError(
            f"{name} as a DTensor must be sharded on its vocabulary dimension, [Shard({dim})], on a mesh of one "
            f"dimension, or replicated, got placements {placements} on a mesh of shape {tuple(mesh.shape)}: call "
            f"{name}.redistribute(...) or {name}.full_tensor()"
        )
    # DTensor cuts like torch.chunk: all ranks hold the same number of ids, except for the last.
    most = math.ceil(vocab_size / mesh.size())
    start = most * mesh.get_local_rank()
    if most * (mesh.size() - 1) >= vocab_size:
        raise ValueError(
            f"every rank must hold some of the vocabulary, got {vocab_size} ids in slices of {most} over {mesh.size()} "
            "ranks: use fewer"
        )
    local = tensor.to_local()
    if local.shape[dim] != min(most, vocab_size - start):
        raise ValueError(
            f"{name}'s slice on this rank must have {min(most, vocab_size - start)} ids, as distribute_tensor cuts "
            f"{vocab_size} over {mesh.size()} ranks, got {local.shape[dim]}: pass its to_local(), group and vocab_start"
        )
    return local, VocabSlice(mesh.get_group(), start, local.shape[dim])
