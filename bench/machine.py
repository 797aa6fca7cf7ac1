"""Describes the machine and the commit that a figure was measured on."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import slimkernels
from slimkernels import _C
from slimkernels.durable import lock_file

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Waits until no other benchmark of this user that asks for this runs on the machine, and holds up later ones."""
    path = Path(tempfile.gettempdir(), f"slimkernels-bench-{os.getuid()}.lock")
    with path.open("ab") as file:
        lock_file(file, path, wait_s=math.inf)
        yield


def machine() -> dict:
    """Returns the fields of a result row that name the machine, the versions, the commit and the date."""
    require_own_package()
    on_cuda = torch.get_default_device().type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_cuda else _cpu_name(),
        "isa": "sm_{}{}".format(*torch.cuda.get_device_capability()) if on_cuda else _C.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "python": platform.python_version(),
        "commit": commit(ROOT),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def require_own_package() -> None:
    """Exits if ``slimkernels`` is imported from another checkout, whose figures would get this one's commit."""
    package = Path(slimkernels.__file__).parents[1]
    if package != ROOT:
        sys.exit(f"slimkernels is imported from {package}, not from {ROOT}: run `python -m bench...` in {ROOT}")


def commit(root: Path) -> str:
    """Returns the commit checked out at ``root``, with ``-dirty`` appended if any file but a result differs from it."""
    git = ["git", "-C", str(root)]
    described = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if described.returncode != 0:
        return "unknown"
    results = (":(exclude)bench/results", ":(exclude)README.md", ":(exclude)docs")
    clean = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", *results], check=False).returncode == 0
    return described.stdout.strip() + ("" if clean else "-dirty")


def installed_version(package: str) -> str | None:
    """Returns the version of an installed package, or None for a missing one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    text = cpuinfo.read_text()
    found = (re.search(rf"^{key}\s*:\s*(.*)$", text, re.M) for key in ("model name", "cpu family", "model"))
    name, family, model = (match.group(1) if match else "?" for match in found)
    return f"{name} (family {family}, model {model})"
