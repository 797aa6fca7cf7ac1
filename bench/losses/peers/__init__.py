"""The peers, one file each, with what their losses compute; ``make parity`` installs those that tests do not need."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

from bench.losses.judge import Peer
from bench.machine import installed_version

# Modules of this package with the distribution that each one needs.
DISTRIBUTIONS = {
    "torch_functions": "torch",
    "trl": "trl",
    "liger": "liger-kernel",
    "axolotl": "axolotl",
    "torchtune": "torchtune",
    "verl": "verl",
    "cut_cross_entropy": "cut-cross-entropy",
}


def load_peer(module: str) -> Peer:
    """Returns a peer with its losses, or without any if it is not installed."""
    distribution = DISTRIBUTIONS[module]
    version = installed_version(distribution)
    if version is None:
        return Peer(distribution, None)
    return Peer(distribution, version, importlib.import_module(f"bench.losses.peers.{module}").losses())


def import_without_parents(module: str, root: Path):
    """Imports one module of a package without running the ``__init__`` of the packages that it lies in.

    Those import a whole trainer, with the libraries of its GPUs. ``root`` is the folder that holds the package.
    """
    parts = module.split(".")
    for end in range(1, len(parts)):
        name = ".".join(parts[:end])
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(root.joinpath(*parts[:end]))]
            sys.modules[name] = package
    return importlib.import_module(module)
