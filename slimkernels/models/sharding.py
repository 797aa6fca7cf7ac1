"""Weights that are split over processes: the DTensors of FSDP2 and tensor parallelism, the partitions of ZeRO-3."""

from __future__ import annotations

from torch import Tensor, nn


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns a DTensor's full tensor, which all its processes must ask for together; other tensors as they are."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def is_partitioned(model: nn.Module) -> bool:
    """Returns whether DeepSpeed ZeRO-3 has partitioned the weights, each of which then has shape (0,)."""
    return any(hasattr(parameter, "ds_shape") and not parameter.numel() for parameter in model.parameters())


def uses_fsdp(model: nn.Module) -> bool:
    """Returns whether ``fully_shard`` was applied to the model or to a part of it."""
    # The import takes a second, and few models are sharded.
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
