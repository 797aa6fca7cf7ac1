"""The trainers of other projects that the tests in ``tests/integrations`` train with."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from types import ModuleType

import pytest

# The name of a line about a run among the ``user_properties`` of a test.
RUN = "integration"


def trainer_package(name: str) -> ModuleType:
    """Imports a trainer's package; without it the module's tests skip, but fail in ``make test-integrations``."""
    if "SLIMKERNELS_INTEGRATION" in os.environ:
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"needs {name}: run make test-integrations")


def line_of(package: str, trainer: str, did: str) -> str:
    """Returns the line that the summary of a test run has about a run of a trainer."""
    return f"{package} {importlib.metadata.version(package)}, {trainer}: {did}"
