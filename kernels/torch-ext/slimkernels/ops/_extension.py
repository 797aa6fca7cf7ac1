"""The namespace of this build's operators, and whether it has CPU kernels."""

from __future__ import annotations

from .._ops import add_op_namespace_prefix  # importing it registers the CPU kernels, where the build has them

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")  # _slimkernels_<backend>_<id>
_BACKEND = NAMESPACE.split("_")[2]


def is_built() -> bool:
    """Returns whether the CPU kernels are there."""
    return _BACKEND == "cpu"


def check_built() -> None:
    """Checks that the CPU kernels are there.

    Raises:
        RuntimeError: This build is for another backend.
    """
    if not is_built():
        raise RuntimeError(
            f"this build of the kernels is for {_BACKEND} and has none for CPU tensors: move them to the GPU, or load "
            "the build for CPUs as well, with backend='cpu' in get_kernel or get_local_kernel"
        )
