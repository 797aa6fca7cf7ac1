"""CUDA C++ kernels, compiled with the host's compiler for the GPU emulator of tests/support/cuda_emulator.

This is what the kernels share; emulated_topk_logits.py, emulated_sample_logits.py and emulated_slim_loss.py call one.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "g++").split()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # numbered as in the emulator

needs_emulator = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which(COMPILER[0]) is None,
    reason="the emulated GPU needs Linux and a C++ compiler",
)


class Launch(NamedTuple):
    """Launch parameters of an emulated kernel, none of which may change its results."""

    blocks: int = 1
    staged: bool = True
    list_capacity: int | None = None  # None for as many candidates as there are elements; 0 for no list
    threads: int = 64
    seed: int = 0  # seed of the order in which threads run
    skipped_barrier: int = -1  # index of a barrier that no thread waits at; -1 for none
    first_row: int = 0  # the rows before it are not computed


class Gpu(NamedTuple):
    """Properties of a device that a launch plan depends on."""

    has_clusters: bool
    block_bytes: int
    processor_bytes: int
    processors: int


A100 = Gpu(has_clusters=False, block_bytes=163 << 10, processor_bytes=164 << 10, processors=108)
H100 = Gpu(has_clusters=True, block_bytes=227 << 10, processor_bytes=228 << 10, processors=132)
RTX_4090 = Gpu(has_clusters=False, block_bytes=99 << 10, processor_bytes=100 << 10, processors=128)
RTX_5090 = Gpu(has_clusters=True, block_bytes=99 << 10, processor_bytes=100 << 10, processors=170)
GPUS = {"A100": A100, "H100": H100, "RTX 4090": RTX_4090, "RTX 5090": RTX_5090}


class Plan(NamedTuple):
    """The parameters that a launcher chooses."""

    blocks: int
    staged: bool
    slice: int
    bytes: int
    list_capacity: int


class FaultError(Exception):
    """The emulated threads deadlocked or overran their memory."""


class _Launch(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in Launch._fields)


class _Machine(ctypes.Structure):
    _fields_ = (
        ("has_clusters", ctypes.c_bool),
        ("block_bytes", ctypes.c_int64),
        ("processor_bytes", ctypes.c_int64),
        ("processors", ctypes.c_int),
    )


class _Plan(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in Plan._fields)


class EmulatedKernel:
    """A kernel and its launch plan, called in the compiled library; each call takes the next of ``launches``."""

    op: str

    def __init__(self, library: Path, launches: Sequence[Launch] = (Launch(),)) -> None:
        self._native = ctypes.CDLL(str(library))
        self._run = self._native[self.op]
        self._run.restype = ctypes.c_char_p
        self._plan = self._native[f"plan_{self.op}"]
        self.launches = itertools.cycle(launches)

    def launch(self, vocab_size: int, *arguments: object) -> None:
        """Runs the kernel with the arguments of its C function, to which the next launch is added."""
        launch = next(self.launches)
        if launch.list_capacity is None:
            launch = launch._replace(list_capacity=vocab_size)
        fault = self._run(*arguments, ctypes.byref(_Launch(*launch)))
        if fault is not None:
            raise FaultError(fault.decode())

    def barriers_of_last_row(self) -> int:
        return self._native.barriers_of_last_row()

    def plan(self, dtype: torch.dtype, num_rows: int, vocab_size: int, gpu: Gpu, *numbers: int) -> Plan:
        """Returns the plan of a launch; ``numbers`` are what the plan of this kernel also depends on."""
        found = _Plan()
        sizes = (ctypes.c_int64(number) for number in (num_rows, vocab_size, *numbers))
        self._plan(DTYPES.index(dtype), *sizes, ctypes.byref(_Machine(*gpu)), ctypes.byref(found))
        return Plan(found.blocks, bool(found.staged), found.slice, found.bytes, found.list_capacity)


def arguments_of(op: str, arguments: Sequence[object]) -> dict[str, Any]:
    """Names the arguments of a call of an operator of this package by its schema."""
    schema = getattr(torch.ops.slimkernels, op).default._schema
    return dict(zip((each.name for each in schema.arguments), arguments, strict=True))


def compile_emulated(op: str, folder: Path, **replaced: str) -> Path:
    """Compiles a kernel into ``folder``, after replacing ``old`` by ``new`` in its source if they are given."""
    include = ROOT / "csrc"
    if replaced:
        include = folder
        for part in ("cuda", "slim_loss"):
            shutil.copytree(ROOT / "csrc" / part, folder / part)
        sources = {path: path.read_text() for path in folder.glob(f"cuda/{op}*.cuh")}
        (changed,) = (path for path, source in sources.items() if replaced["old"] in source)
        assert sources[changed].count(replaced["old"]) == 1, f"{replaced['old']!r} must occur once in {changed.name}"
        changed.write_text(sources[changed].replace(replaced["old"], replaced["new"]))
    library = folder / f"{op}.so"
    # Fortified longjmp aborts on jumps between fibers.
    options = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", f"-I{include}"]
    source = ROOT / f"tests/support/cuda_emulator/{op}.cpp"
    subprocess.run([*COMPILER, *options, str(source), "-o", str(library)], check=True)
    return library


def assert_tests_pass_emulated(op: str, library: Path, *tests: str, deselected: Sequence[str] = ()) -> None:
    """Runs tests of tests/ with an emulated kernel in the place of the CPU's; float64 is not for these kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--kernels=emulated"]
        + [str(ROOT / "tests" / test) for test in tests]
        + ["-k", " and ".join(f"not {name}" for name in ("float64", *deselected))],
        env=os.environ | {f"EMULATED_{op.upper()}": str(library)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=10800,  # for hangs: some take minutes of processor time
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def removed_barriers(op: str, library: Path, *cases: int) -> list[tuple[int, list[int]]]:
    """Returns the barriers of each case of tests/scripts/cuda_removed_barriers.py, and those removed unnoticed."""
    script = ROOT / "tests/scripts/cuda_removed_barriers.py"
    done = subprocess.run(
        [sys.executable, str(script), op, str(library), *map(str, cases)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        check=True,
        timeout=10800,  # for hangs: some take minutes of processor time
    )
    return json.loads(done.stdout)


def pointer(tensor: Tensor | None) -> int | None:
    """Returns the address of a contiguous tensor; None for None."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()
