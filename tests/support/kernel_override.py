"""Runs the tests of the ops on other kernels than the CPU's: ``pytest --kernels=triton``, ``cuda`` or ``emulated``.

The CPU implementation of every row operator is replaced, so the public functions, their autograd and the tests use the
other kernels unchanged. ``triton`` calls the Triton launchers under the interpreter (TRITON_INTERPRET=1). ``cuda``
moves the operands to the GPU, calls the CUDA implementation, and moves the results back. ``emulated`` runs the CUDA
C++ kernels of slim_loss and sample_logits on an emulated GPU, launched in another way at each call; the other ops stay
on the CPU. They are compiled first, unless the environment variables EMULATED_SLIM_LOSS or EMULATED_SAMPLE_LOGITS name
libraries; then the ops that they do not name stay on the CPU.
"""

from __future__ import annotations

import functools
import importlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import slimkernels.ops  # noqa: F401 -- registers the operators
from slimkernels.ops import _library

# Small, so that a short row has several blocks, and not a divisor of the tests' shapes.
INTERPRETED_BLOCK = 64


def override(name: str, function: Callable) -> None:
    """Replaces the CPU implementation of an operator for the life of the process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overriding the kernel is intended
        _library._library.impl(name, function, "CPU")


def install(kernels: str) -> None:
    """Replaces the CPU kernels for the life of the process."""
    if kernels == "emulated":
        install_emulated()
        return
    if kernels == "triton":
        from slimkernels.ops.triton import launch

        np.seterr(all="ignore")  # the interpreter computes with numpy, where log(0) warns
        convert_bfloat16_like_a_gpu()
        launch.settings_of = lambda *_args: launch.Settings(INTERPRETED_BLOCK, 4)
    for name, module in _library.triton_launchers.items():
        if kernels == "triton":
            function = getattr(importlib.import_module(module), name)
        else:
            function = functools.partial(on_cuda, getattr(torch.ops.slimkernels, name).default)
        override(name, function)


def install_emulated() -> None:
    """Replaces the CPU kernels of the ops whose emulated libraries are named, or of all such ops if none is."""
    from support import emulated_sample_logits, emulated_slim_loss
    from support.emulated_cuda import compile_emulated

    named = {op: os.environ.get(f"EMULATED_{op.upper()}") for op in ("slim_loss", "sample_logits")}
    with tempfile.TemporaryDirectory() as folder:
        for op, library in named.items():
            if library is None and any(named.values()):
                continue
            found = Path(library) if library else compile_emulated(op, Path(folder))
            if op == "slim_loss":
                kernel = emulated_slim_loss.EmulatedSlimLoss(found, emulated_slim_loss.LAUNCHES)
                override("slim_loss_rows", kernel.slim_loss_rows)
            else:
                kernel = emulated_sample_logits.EmulatedSampleLogits(found, emulated_sample_logits.LAUNCHES)
                override("sample_logits_rows", kernel.sample_logits_rows)


def convert_bfloat16_like_a_gpu() -> None:
    """Makes the interpreter round float32 to the nearest bfloat16 instead of truncating, and keep subnormal numbers."""
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converting(values, from_dtype, to_dtype, mode):
        bits = np.array(values, copy=True, ndmin=1)
        if (from_dtype, to_dtype) == (float32, bfloat16):
            narrow = torch.from_numpy(bits.view(np.float32)).to(torch.bfloat16)
            return narrow.view(torch.int16).numpy().view(np.uint16).reshape(np.shape(values))
        if (from_dtype, to_dtype) == (bfloat16, float32):
            return (bits.view(np.uint16).astype(np.uint32) << 16).reshape(np.shape(values))
        return convert(values, from_dtype, to_dtype, mode)

    interpreter._convert_float = converting


def on_cuda(op: torch._ops.OpOverload, *arguments):
    """Calls ``op`` on CUDA copies of the arguments with the same layout, and copies the outputs back."""
    moved = [to_cuda(a) if isinstance(a, Tensor) else a for a in arguments]
    result = op(*moved)
    for before, after, argument in zip(arguments, moved, op._schema.arguments, strict=True):
        if argument.alias_info is not None and argument.alias_info.is_write and before is not None:
            before.copy_(after)
    return result


def to_cuda(tensor: Tensor) -> Tensor:
    """Copies the whole storage and returns the same view of it, so that strides and misalignment are kept."""
    storage = tensor.untyped_storage().cuda()
    view = torch.empty(0, dtype=tensor.dtype, device="cuda")
    return view.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
