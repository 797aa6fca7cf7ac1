"""Compiles csrc/cuda/*.cuh with the host's compiler for the GPU emulator of tests/support/cuda_emulator."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels import SparseLogits

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "g++").split()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # numbered as in the emulator


class Launch(NamedTuple):
    """Launch parameters of an emulated kernel, none of which may change its results."""

    blocks: int = 1
    staged: bool = True
    list_capacity: int | None = None  # None for as many candidates as there are elements; 0 for no list
    threads: int = 64
    seed: int = 0  # seed of the order in which threads run
    skipped_barrier: int = -1  # index of a barrier that no thread waits at; -1 for none


class Gpu(NamedTuple):
    """Properties of a device that a launch plan depends on."""

    has_clusters: bool
    block_bytes: int
    processor_bytes: int
    processors: int


class Plan(NamedTuple):
    """The parameters that the launcher chooses."""

    blocks: int
    staged: bool
    slice: int
    list_capacity: int
    bytes: int


class FaultError(Exception):
    """The emulated threads deadlocked or overran their memory."""


class EmulatedKernel:
    """The kernel and its launch plan, called in the compiled library."""

    def __init__(self, library: Path) -> None:
        self._native = ctypes.CDLL(str(library))
        self._native.topk_logits.restype = ctypes.c_char_p

    def topk_logits(
        self,
        logits: Tensor,  # (N, V), dense in V
        top_k: int,
        launch: Launch | None = None,
        target: Tensor | None = None,
        temperatures: tuple[float, ...] = (1.0,),
    ) -> SparseLogits:
        launch = launch or Launch()
        (num_rows, vocab_size), num_temperatures = logits.shape, len(temperatures)
        assert logits.stride(1) == 1
        values = logits.new_full((num_rows, top_k), math.nan)
        ids = torch.full((num_rows, top_k), -7, dtype=torch.int32)
        lse, rest_lse = torch.full((2, num_rows, num_temperatures), math.nan)
        target_logit = None if target is None else torch.full((num_rows,), -7.0)
        fault = self._native.topk_logits(
            DTYPES.index(logits.dtype),
            _pointer(logits),
            ctypes.c_int64(num_rows),
            ctypes.c_int64(logits.stride(0)),
            vocab_size,
            top_k,
            _pointer(target),
            (ctypes.c_double * num_temperatures)(*temperatures),
            num_temperatures,
            _pointer(values),
            _pointer(ids),
            _pointer(lse),
            _pointer(rest_lse),
            _pointer(target_logit),
            launch.blocks,
            launch.threads,
            int(launch.staged),
            vocab_size if launch.list_capacity is None else launch.list_capacity,
            launch.seed,
            launch.skipped_barrier,
        )
        if fault is not None:
            raise FaultError(fault.decode())
        return SparseLogits(ids, values, lse, temperatures, target_logit, rest_lse)

    def barriers_of_last_row(self) -> int:
        return self._native.barriers_of_last_row()

    def plan(self, dtype: torch.dtype, num_rows: int, vocab_size: int, top_k: int, gpu: Gpu) -> Plan:
        found = (ctypes.c_int64 * 5)()
        self._native.plan_topk_logits(
            DTYPES.index(dtype),
            ctypes.c_int64(num_rows),
            vocab_size,
            top_k,
            int(gpu.has_clusters),
            ctypes.c_int64(gpu.block_bytes),
            ctypes.c_int64(gpu.processor_bytes),
            gpu.processors,
            found,
        )
        return Plan(found[0], bool(found[1]), *found[2:])


def compile_library(folder: Path, **replaced: str) -> Path:
    """Compiles the kernel of topk_logits into ``folder``, see ``compile_emulated``."""
    return compile_emulated("topk_logits", folder, **replaced)


def compile_emulated(kernel: str, folder: Path, **replaced: str) -> Path:
    """Compiles a kernel into ``folder``, after replacing ``old`` by ``new`` in its source if they are given."""
    include = ROOT / "csrc"
    if replaced:
        include = folder
        for part in ("cuda", "slim_loss"):
            shutil.copytree(ROOT / "csrc" / part, folder / part)
        changed = folder / f"cuda/{kernel}.cuh"
        source = changed.read_text()
        assert source.count(replaced["old"]) == 1, f"{replaced['old']!r} must occur once in {changed.name}"
        changed.write_text(source.replace(replaced["old"], replaced["new"]))
    library = folder / f"{kernel}.so"
    # Fortified longjmp aborts on jumps between fibers.
    options = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", f"-I{include}"]
    source = ROOT / f"tests/support/cuda_emulator/{kernel}.cpp"
    subprocess.run([*COMPILER, *options, str(source), "-o", str(library)], check=True)
    return library


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())
