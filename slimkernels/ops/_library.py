"""Defines torch operators and loads the native code behind them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, is_gradtrackingtensor
from torch.autograd import forward_ad

from slimkernels._checks import RowError
from slimkernels.ops._extension import NAMESPACE, check_built

_library = torch.library.Library(NAMESPACE, "DEF")

# Loading the library registers the CUDA C++ kernels of CUDA tensors, and initialises no device. Triton serves the other
# operators, and all where the library is not built, on AMD GPUs and on machines without nvcc, or is not wanted.
_SWITCH = "SLIMKERNELS_CUDA_KERNELS"
_wanted = os.environ.get(_SWITCH, "")
if _wanted not in ("", "triton"):
    raise ValueError(f"{_SWITCH} must be 'triton', to leave out the CUDA C++ kernels, or unset, got {_wanted!r}")
_CUDA_LIBRARY = Path(__file__).parents[1] / "_C_cuda.so"
if torch.version.cuda is not None and _CUDA_LIBRARY.exists() and not _wanted:
    try:
        torch.ops.load_library(str(_CUDA_LIBRARY))
    except OSError as error:
        warnings.warn(
            f"{_CUDA_LIBRARY} does not load with this torch ({error}); install slimkernels again to rebuild it, "
            "or delete it, and Triton kernels are used instead",
            RuntimeWarning,
            stacklevel=2,
        )


# Operators with a Triton kernel, and the module with the launcher, a function named like the operator.
triton_launchers: dict[str, str] = {}

# "CUDA C++" or "Triton", which serves CUDA tensors, for each of those operators.
cuda_kernels: dict[str, str] = {}


def define(
    schema: str, *, fake: Callable, implementation: Callable | None = None, triton_module: str | None = None
) -> None:
    """Defines ``<namespace>::<schema>`` with its fake (shape-only) implementation.

    Args:
        schema: Schema of the operator. Schemas are written nowhere else.
        fake: Function that allocates outputs of the right shape and dtype from the same arguments.
        implementation: Python implementation for every device, of an operator that composes others. Operators with
            their own kernels register them per device instead: CPU in ``csrc/ops.cpp``, CUDA by ``triton_module``.
        triton_module: Module whose function with the operator's name serves CUDA tensors. It is imported on first use,
            so that importing the ops does not import triton. Where the library of CUDA C++ kernels has one for the
            operator, that serves them, and calls the Triton kernel as ``<operator>_triton`` for what it cannot compute.
    """
    name = schema[: schema.index("(")]
    _define(schema, fake)
    if implementation is not None:
        _library.impl(name, _without_autocast(implementation), "CompositeExplicitAutograd")
    if triton_module is not None:
        triton_launchers[name] = triton_module
        served = name
        cuda_kernels[name] = "Triton"
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CUDA"):
            served = f"{name}_triton"
            cuda_kernels[name] = "CUDA C++"
            _define(served + schema[len(name) :], fake)
        _library.impl(served, functools.partial(_launch, triton_module, name), "CUDA")


def _define(schema: str, fake: Callable) -> None:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{schema[: schema.index('(')]}", fake, lib=_library)


def _launch(module: str, name: str, *arguments):
    return getattr(importlib.import_module(module, __package__), name)(*arguments)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Registers the autograd formula of the operator ``name`` for the life of the process."""
    backward = _without_autocast(backward)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)


def _without_autocast(function: Callable) -> Callable:
    """Returns ``function`` with autocast disabled: the dtypes of an op are those of its operands, not of the region.

    Otherwise autocast to float16 would round the matrix products of bfloat16 operands, whose range it does not have.
    """

    @functools.wraps(function)
    def wrapped(*arguments):
        with torch._C._DisableAutocast():
            return function(*arguments)

    return wrapped


def check_transforms(op: str, *tensors: torch.Tensor | None) -> None:
    """Checks that no operand is differentiated by a transform in which the op would count as a constant.

    Raises:
        NotImplementedError: An operand has a forward-mode tangent, or one of ``torch.func``'s transforms uses it.
    """
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        while tensor is not None:
            if is_gradtrackingtensor(tensor):
                raise NotImplementedError(
                    f"{op} cannot be differentiated by torch.func: use torch.autograd.grad or Tensor.backward"
                )
            if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(
                    f"{op} has no forward-mode derivative: use torch.autograd.grad or Tensor.backward"
                )
            tensor = get_unwrapped(tensor) if is_functorch_wrapped_tensor(tensor) else None


def keep_for_backward(ctx, *tensors: torch.Tensor | None) -> None:
    """Saves tensors for the backward pass, and copies of those made under ``torch.inference_mode``.

    Autograd refuses to save inference tensors, although none of them needs a gradient here.
    """
    ctx.save_for_backward(*(t.clone() if t is not None and t.is_inference() else t for t in tensors))


def operand_of(numbers: Sequence[float], defaults: Sequence[float]) -> torch.Tensor | None:
    """Returns float options as a CPU float64 tensor (F,) for an operator in a compiled graph, else None.

    A compiled graph is specialised on the value of a float argument, so that every new value would compile another
    one. A tensor's values are read when the operator runs. None where the constants serve: without a compiler, and
    where every option has its default.
    """
    if not torch.compiler.is_compiling() or all(n == d for n, d in zip(numbers, defaults, strict=True)):
        return None
    # Only arithmetic of a tensor and a number makes the number an input of the graph.
    one = torch.ones((), dtype=torch.float64)
    return torch.stack([one * number for number in numbers])


def check_kernels(tensor: torch.Tensor, argument: str) -> None:
    """Checks that kernels for the device of ``tensor`` are available.

    Args:
        tensor: Operand of an op.
        argument: Its name, for the message.

    Raises:
        RuntimeError: The tensor is on the CPU and the extension is not built, or on CUDA and triton is not installed.
        NotImplementedError: There are no kernels for the device.
    """
    if tensor.device.type == "cpu":
        check_built()
    elif tensor.device.type == "cuda":
        if not _has_triton():
            raise RuntimeError(
                f"{argument} is on {tensor.device}, where the kernels need triton, which is not installed; "
                "install it with `pip install triton`"
            )
    elif tensor.device.type != "meta":
        raise NotImplementedError(
            f"{argument} is on {tensor.device}, but this op has kernels for cpu and cuda only; move it with .cpu()"
        )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def run_on_rows(operator: Callable, leading_shape: Sequence[int], *arguments):
    """Runs an operator on flat rows (N, ...) of a leading shape, in which a fault then names its row."""
    if torch.compiler.is_compiling():
        return operator(*arguments)
    try:
        return operator(*arguments)
    except RowError as error:
        raise error.in_shape(leading_shape) from None


def flat_rows(logits: torch.Tensor) -> torch.Tensor:
    """Returns logits (..., V) as rows (N, V) whose last dimension is dense, copying only if necessary."""
    rows = logits.reshape(-1, logits.shape[-1])
    # Not contiguous(), which leaves the strides of an empty tensor as they are.
    return rows if rows.stride(-1) == 1 else rows.clone(memory_format=torch.contiguous_format)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the accumulation and output dtype of the kernels for operands of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
