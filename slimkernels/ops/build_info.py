"""``build_info``: how the native code of this installation was built, and which kernel serves which operator."""

from __future__ import annotations

import importlib
from typing import Any

import slimkernels.ops  # noqa: F401 -- registers the operators
from slimkernels.ops import _extension, _library


def build_info() -> dict[str, Any]:
    """Returns how the native code was built, and what serves CUDA tensors.

    Returns:
        A dictionary with the keys

        - "compiler", "torch", "stable_abi": compiler of the CPU extension, torch at its build, and the oldest torch
          that it works with. None where the extension is not built.
        - "cpu_isa": instruction set that the CPU kernels use; None where the extension is not built.
        - "cuda_kernels": for every operator with a GPU kernel, "CUDA C++" or "Triton". A CUDA C++ kernel calls the
          Triton kernel for what it does not compute, such as float64. The environment variable
          ``SLIMKERNELS_CUDA_KERNELS=triton``, set before the first use of an op, leaves all of them to Triton.

    Raises:
        ValueError: ``SLIMKERNELS_CPU_ISA`` names an instruction set that this machine does not have.

    >>> build_info()["cuda_kernels"]["slim_loss_rows"] in ("CUDA C++", "Triton")
    True
    """
    found: dict[str, Any] = dict.fromkeys(("compiler", "torch", "stable_abi", "cpu_isa"))
    if _extension.is_built():
        extension = importlib.import_module("slimkernels._C")
        found |= {**extension.build_info(), "cpu_isa": extension.cpu_isa()}
    return found | {"cuda_kernels": dict(sorted(_library.cuda_kernels.items()))}
