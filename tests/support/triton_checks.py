"""Checks Triton kernels without a GPU: their ops' tests pass under the interpreter, and they compile."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from support import ptx

HERE = Path(__file__).parents[1]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def assert_tests_pass_interpreted(*tests: str, timeout: float = 10800) -> None:
    """Runs tests of tests/ (``file.py`` or ``file.py::test``) on the Triton kernels, interpreted on the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--kernels=triton"]
        + [str(HERE / test) for test in tests],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def on_architectures(*axes: Iterable[Any]) -> list[Any]:
    """Makes the parameters (architecture, *one of each axis) of a test: every combination, on all architectures.

    A compilation takes a second, so most are slow: those of a combination of which several values are not the first of
    their axis, and of the others all but one architecture, each in turn.
    """
    params = []
    for places in itertools.product(*(tuple(enumerate(axis)) for axis in axes)):
        numbers, values = zip(*places, strict=True)
        for index, architecture in enumerate(ARCHITECTURES):
            others = sum(number > 0 for number in numbers)
            by_default = others <= 1 and index == sum(numbers) % len(ARCHITECTURES)
            marks = () if by_default else pytest.mark.slow
            names = "-".join("-".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in values)
            params.append(pytest.param(architecture, *values, marks=marks, id=f"{names}-{architecture}"))
    return params


def assert_compiles(launch: Callable[[], object], architecture: str, *, may_spill: bool = False) -> None:
    """Compiles every kernel that ``launch()`` launches for a GPU.

    None may spill registers unless ``may_spill``, or multiply the index of a row in 32 bits, which more than 2 ** 31
    elements overflow.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    from support import ptx, triton_aot

    with triton_aot.compiling_for(architecture) as compiled:
        launch()
    assert compiled, "nothing was launched"
    spilling = [kernel for kernel in compiled if kernel.spilled_bytes]
    assert may_spill or not spilling, f"registers are spilled: {spilling}"
    if not architecture.startswith("gfx"):
        for kernel in compiled:
            narrow = ptx.Kernel(kernel).narrow_products()
            assert not narrow, f"{kernel.kernel} multiplies the index of a row in 32 bits: {narrow}"


def assert_scratch_is_ordered(launch: Callable[[], object], kernel: str) -> None:
    """Compiles a kernel for sm_90 and looks for accesses of memory that it reads and writes without a barrier between.

    The interpreter, which runs a program as one thread, cannot see these.
    """
    found = compile_for("sm_90", launch, kernel)
    assert found.scratch(), f"{kernel} reads nothing that it writes"
    for parameter in found.scratch():
        for first, second in (("ld", "st"), ("st", "ld")):
            unordered = found.unordered(first, second, parameter)
            assert not unordered, f"no barrier between {first} and {second} through pointer {parameter}: {unordered}"


def compile_for(architecture: str, launch: Callable[[], object], kernel: str) -> ptx.Kernel:
    """Compiles what ``launch()`` launches for an NVIDIA GPU and returns the PTX of one kernel."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from support import ptx, triton_aot

    with triton_aot.compiling_for(architecture) as compiled:
        launch()
    (found,) = (ptx.Kernel(one) for one in compiled if one.kernel == kernel)
    return found
