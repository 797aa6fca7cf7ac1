"""Starts measuring processes with a given thread count and memory allocator."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.machine import ROOT

# glibc's settings. With KEEP_PAGES freed pages stay in the process, so times do not depend on whether an output gets
# fresh pages; with RETURN_PAGES they go back at once, so resident memory shows what a call needs.
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
RETURN_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}


def run_module(
    module: str, options: Sequence[str], *, threads: int, pages: dict[str, str], root: Path = ROOT, quiet: bool = False
) -> None:
    """Runs ``python -m module`` in a process of its own and waits for it.

    Args:
        module: Module of the checkout at ``root``.
        options: Command-line arguments.
        threads: Number of threads.
        pages: Allocator settings, ``KEEP_PAGES`` or ``RETURN_PAGES``.
        root: Checkout that is measured; also the working directory of the process.
        quiet: Whether to discard the output.

    Raises:
        subprocess.CalledProcessError: The process failed.
    """
    environment = os.environ | pages | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(root)}
    # Compiled code has the thread count baked in, but torch's cache of it does not look at the thread count.
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(ROOT / "build" / f"inductor-{threads}-threads")
    output = subprocess.DEVNULL if quiet else None
    subprocess.run([sys.executable, "-m", module, *options], cwd=root, env=environment, stdout=output, check=True)


def start_worker(root: Path, metric: str, threads: int, options: Sequence[str], quiet: bool = False) -> None:
    """Runs ``bench.ops.worker`` of the checkout at ``root`` for one metric ("time" or "memory") and thread count."""
    arguments = ["--metric", metric, "--threads", str(threads), *options]
    pages = KEEP_PAGES if metric == "time" else RETURN_PAGES
    run_module("bench.ops.worker", arguments, threads=threads, pages=pages, root=root, quiet=quiet)
