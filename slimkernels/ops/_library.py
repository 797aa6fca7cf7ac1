"""Where operators are defined, and how the native code behind them is found."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

_library = torch.library.Library("slimkernels", "DEF")

try:
    from slimkernels import _C  # noqa: F401 -- importing it registers the CPU kernels
except ImportError as error:
    _missing: ImportError | None = error
else:
    _missing = None

# The CUDA C++ kernels, in operators of their own beside those that Triton serves. Loading them initialises no device.
_CUDA_LIBRARY = Path(__file__).parents[1] / "_C_cuda.so"
if torch.version.cuda is not None and _CUDA_LIBRARY.exists():
    try:
        torch.ops.load_library(str(_CUDA_LIBRARY))
    except OSError as error:
        warnings.warn(
            f"{_CUDA_LIBRARY} does not load with this torch ({error}); install slimkernels again to rebuild it, "
            "or delete it: nothing but the benchmark uses it",
            RuntimeWarning,
            stacklevel=2,
        )


# The operators with a Triton kernel, and the module of its launcher, which has the operator's name.
triton_launchers: dict[str, str] = {}


def define(
    schema: str, *, fake: Callable, implementation: Callable | None = None, triton_module: str | None = None
) -> None:
    """Defines ``slimkernels::<schema>`` with its fake (shape-only) implementation.

    Args:
        schema: The operator's schema; the only place where it is written.
        fake: Allocates outputs of the right shape and dtype from the same arguments.
        implementation: For an operator that composes others on any device. Operators with kernels of their own
            register them per device instead: CPU in ``csrc/ops.cpp``, CUDA by ``triton_module``.
        triton_module: The module whose function of the operator's name serves CUDA tensors, imported on first use.
    """
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"slimkernels::{name}", fake, lib=_library)
    if implementation is not None:
        _library.impl(name, implementation, "CompositeExplicitAutograd")
    if triton_module is not None:
        triton_launchers[name] = triton_module
        _library.impl(name, functools.partial(_launch, triton_module, name), "CUDA")


def _launch(module: str, name: str, *arguments):
    return getattr(importlib.import_module(module), name)(*arguments)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Registers the autograd formula of ``slimkernels::<name>``, kept for the life of the process."""
    torch.library.register_autograd(f"slimkernels::{name}", backward, setup_context=setup_context, lib=_library)


def check_kernels(tensor: torch.Tensor, argument: str) -> None:
    """Raises where no kernel can work on ``tensor``'s device.

    Raises:
        RuntimeError: A CPU tensor and the extension is not built, or a CUDA tensor and Triton is not installed.
        NotImplementedError: A device without kernels.
    """
    if tensor.device.type == "cpu":
        if _missing is not None:
            raise RuntimeError(
                "the native extension slimkernels._C is not built for this Python and torch "
                f"({_missing}); install it with `pip install --no-build-isolation slimkernels`"
            ) from _missing
    elif tensor.device.type == "cuda":
        if not _has_triton():
            raise RuntimeError(
                f"{argument} is on {tensor.device}, where the kernels are Triton's, and triton is not installed; "
                "install it with `pip install triton`"
            )
    elif tensor.device.type != "meta":
        raise NotImplementedError(
            f"{argument} is on {tensor.device}, but this op has kernels for cpu and cuda only; move it with .cpu()"
        )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels sum and report in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
