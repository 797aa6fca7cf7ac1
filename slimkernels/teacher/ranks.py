"""Processes that capture together: the rank and device of each, and teachers that are split over several."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from slimkernels.teacher.tokenized_document import TokenizedDocument


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The place of this process among those that ``torchrun`` or ``accelerate launch`` started, or as the only one.

    ``tensor_parallel`` consecutive processes hold one teacher together and are one rank of the capture.

    Attributes:
        process: Index of this process over all machines, in [0, num_processes).
        num_processes: Number of processes over all machines, a multiple of ``tensor_parallel``.
        local_process: Index of this process on its machine, in [0, num_local_processes).
        num_local_processes: Number of processes on this machine.
        tensor_parallel: Number of processes that hold one teacher.
    """

    process: int = 0
    num_processes: int = 1
    local_process: int = 0
    num_local_processes: int = 1
    tensor_parallel: int = 1

    @classmethod
    def from_environment(cls, tensor_parallel: int = 1, environment: Mapping[str, str] = os.environ) -> Ranks:
        """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

        Raises:
            ValueError: Only some of them are set, one is not a number, or the number of processes is not a multiple of
                ``tensor_parallel``.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        values = [environment[name] for name in names if name in environment]
        if values and (len(values) < len(names) or not all(value.isdecimal() for value in values)):
            found = {name: environment.get(name) for name in names}
            raise ValueError(
                f"a launcher must set {', '.join(names)} to numbers, got {found}: start with torchrun or accelerate "
                "launch, or unset them"
            )
        ranks = cls(*map(int, values), tensor_parallel=tensor_parallel)
        if tensor_parallel < 1 or ranks.num_processes % tensor_parallel:
            raise ValueError(
                f"the number of processes must be a multiple of tensor_parallel={tensor_parallel}, got "
                f"{ranks.num_processes}: start with torchrun --nproc-per-node {max(tensor_parallel, 1)}"
            )
        return ranks

    @property
    def rank(self) -> int:
        """The rank of the capture that this process belongs to."""
        return self.process // self.tensor_parallel

    @property
    def num_ranks(self) -> int:
        """The number of ranks of the capture."""
        return self.num_processes // self.tensor_parallel

    @property
    def device(self) -> torch.device:
        """The GPU of this process, or the CPU if there is none."""
        return torch.device("cuda", self.local_process) if torch.cuda.is_available() else torch.device("cpu")

    def start(self, num_threads: int | None = None) -> None:
        """Sets the threads and the GPU of this process, and joins the processes that hold the same teacher.

        Args:
            num_threads: Number of CPU threads. None divides the processors among the processes of this machine, even if
                a launcher has set OMP_NUM_THREADS to 1; a single process keeps its setting.

        Raises:
            ValueError: The machine has fewer GPUs than processes.
        """
        if num_threads is None and self.num_local_processes > 1:
            num_threads = max(1, len(os.sched_getaffinity(0)) // self.num_local_processes)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        if self.device.type == "cuda":
            if self.local_process >= torch.cuda.device_count():
                raise ValueError(
                    f"every process needs a GPU of its own, got {torch.cuda.device_count()} GPUs for "
                    f"{self.num_local_processes} processes: start fewer with --nproc-per-node"
                )
            torch.cuda.set_device(self.device)
        if self.tensor_parallel > 1:
            # Every teacher has its own process group, so that a failure of one does not affect the others.
            store, _, _ = next(dist.rendezvous("env://"))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                store=dist.PrefixStore(f"teacher-{self.rank}", store),
                rank=self.process % self.tensor_parallel,
                world_size=self.tensor_parallel,
            )

    def finish(self) -> None:
        """Leaves the group of the processes that hold the same teacher; not called by a process that failed."""
        if self.tensor_parallel > 1:
            dist.destroy_process_group()


class TeacherProcesses:
    """The processes that hold one teacher, whose parameters are DTensors over them; usually a single process."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group

    @classmethod
    def of(cls, model: PreTrainedModel) -> TeacherProcesses:
        """Finds the processes from the parameters of a model."""
        meshes = [parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)]
        return cls(meshes[0].get_group() if meshes else None)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self._group is None or dist.get_rank(self._group) == 0

    def share(self, batch: list[TokenizedDocument] | None) -> list[TokenizedDocument] | None:
        """Sends the batch of the first process to the others, and returns it in each of them."""
        if self._group is None:
            return batch
        shared = [batch]
        dist.broadcast_object_list(shared, group_src=0, group=self._group)
        return shared[0]
