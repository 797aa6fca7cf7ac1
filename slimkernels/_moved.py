"""Old import paths that keep working for one release, with a warning that names the new path."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved(old: str, new: Mapping[str, str]) -> Callable[[str], Any]:
    """Makes the ``__getattr__`` of a module whose public names have moved.

    Args:
        old: Name of the module.
        new: Names that the module had, with the modules that have them now.

    Returns:
        A function that warns (DeprecationWarning) and returns what the new module has under the name.
    """

    def attribute(name: str) -> Any:
        if name not in new:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        warnings.warn(
            f"{old}.{name} has moved to {new[name]}.{name}; the old path will be removed in the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(new[name]), name)

    return attribute
