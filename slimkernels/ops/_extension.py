"""The namespace of the operators and the extension with their CPU kernels.

``kernels/`` replaces this module in the package that it makes for the Hugging Face Hub.
"""

from __future__ import annotations

from slimkernels._checks import missing_extension

NAMESPACE = "slimkernels"

try:
    from slimkernels import _C  # noqa: F401 -- importing it registers the CPU kernels
except ImportError as error:
    _missing: ImportError | None = error
else:
    _missing = None


def is_built() -> bool:
    """Returns whether the CPU kernels are there."""
    return _missing is None


def check_built() -> None:
    """Checks that the CPU kernels are there.

    Raises:
        RuntimeError: The extension is not built, or does not load.
    """
    if _missing is not None:
        raise RuntimeError(missing_extension(_missing)) from _missing
