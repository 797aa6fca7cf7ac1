"""Compiles the kernels that Triton launchers launch ahead of time, for GPUs that are not present.

A launcher is called with CPU tensors. Its kernels are compiled for the target instead of run, with Triton's own binding
and specialisation of the arguments. This does not work in a process with TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from slimkernels.ops.triton import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel compiled for a target, with the resources that the assembler reports per thread and per program."""

    kernel: str
    architecture: str
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    assembly: str = dataclasses.field(repr=False)  # PTX or AMD assembly
    parameters: tuple[str, ...] = dataclasses.field(repr=False, default=())  # the assembly's, in order


class _AbsentDevice:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return hash(self._target)  # Triton caches compiled kernels by device

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(architecture: str) -> Iterator[list[Compiled]]:
    """Compiles instead of launching inside the context; yields the list of compiled kernels."""
    found: list[Compiled] = []
    run, architecture_of = JITFunction.run, launch.architecture_of

    def compile_instead(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(dataclasses.replace(_measure(kernel, architecture), parameters=_parameters(kernel)))

    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(_AbsentDevice(TARGETS[architecture]))
    JITFunction.run = compile_instead
    launch.architecture_of = lambda _device: architecture
    try:
        yield found
    finally:
        triton.runtime.driver._active = active
        JITFunction.run = run
        launch.architecture_of = architecture_of


def _parameters(kernel) -> tuple[str, ...]:
    """Returns the names of the arguments that are not constants of the compiled kernel."""
    constant = {path[0] for path in kernel.src.constants}
    return tuple(name for index, name in enumerate(kernel.src.fn.arg_names) if index not in constant)


def _measure(kernel, architecture: str) -> Compiled:
    metadata = kernel.metadata
    if architecture.startswith("gfx"):
        assembly = kernel.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{what}:\s*(\d+)", assembly)[1]) for what in ("vgpr_count", "vgpr_spill_count")
        )
        return Compiled(
            metadata.name, architecture, metadata.num_warps, registers, 4 * spilled, metadata.shared, assembly
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        target = re.search(r"^\.target\s+(\w+)", kernel.asm["ptx"], re.MULTILINE)[1]
        log = subprocess.run(
            [
                get_ptxas(TARGETS[architecture].arch).path,
                "-v",
                f"-arch={target}",
                str(source),
                "-o",
                str(Path(folder) / "kernel.cubin"),
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", log))
    registers = max(int(count) for count in re.findall(r"Used (\d+) registers", log))
    return Compiled(
        metadata.name, architecture, metadata.num_warps, registers, spilled, metadata.shared, kernel.asm["ptx"]
    )
