"""Launches Triton kernels with settings that are shipped per GPU architecture and vocabulary size."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

_RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])


class Settings(NamedTuple):
    """Launch settings of a kernel.

    Attributes:
        block: Number of elements of a row that a program processes at a time.
        num_warps: Number of warps of a program.
        max_registers: Limit of registers per thread on NVIDIA, or None to let the assembler choose. The assembler may
            spill a few registers to fit more programs on a multiprocessor; a limit of 255 prevents that.
    """

    block: int
    num_warps: int
    max_registers: int | None = None


def settings_of(op: str, logits: torch.Tensor) -> Settings:
    """Returns the shipped settings of ``op`` for rows like ``logits`` (N, V): those of the nearest case in the table.

    Kernels are never tuned at run time. The table is ``data/launch_settings.json``; its entries are measured or
    estimated, and ``python -m bench.tune`` measures them again on a GPU.
    """
    return _nearest(op, architecture_of(logits.device), logits.dtype.itemsize, logits.shape[-1])


def block_of(settings: Settings, size: int) -> int:
    """Returns the block size for rows of ``size`` elements: at most that of the settings, no larger than needed."""
    return min(settings.block, triton.next_power_of_2(max(size, 16)))


def run(kernel: Any, num_programs: int, settings: Settings, like: torch.Tensor, *arguments, **constants) -> None:
    """Runs ``num_programs`` programs of a kernel on the device of ``like``; does nothing if that number is 0."""
    if num_programs == 0:
        return
    # Triton launches on the current device.
    device = torch.cuda.device(like.device) if like.device.type == "cuda" else contextlib.nullcontext()
    # Set explicitly because Triton's default for FP fusion depends on its release.
    options = {"num_warps": settings.num_warps, "enable_fp_fusion": True}
    if settings.max_registers is not None and architecture_of(like.device).startswith("sm_"):
        options["maxnreg"] = settings.max_registers
    with device, _without_buffer_instructions(architecture_of(like.device)):
        kernel[(num_programs,)](*arguments, **constants, **options)


@contextlib.contextmanager
def _without_buffer_instructions(architecture: str) -> Iterator[None]:
    """Keeps the compiler of AMD GPUs before Triton 3.7 from aborting.

    Its conversion of loads and stores to buffer instructions fails an assertion where the pointer is chosen by a
    condition, as that of the candidates or the whole row is.
    """
    if architecture.startswith("gfx") and _RELEASE < (3, 7):
        with triton.knobs.amd.scope():
            triton.knobs.amd.use_buffer_ops = False
            yield
    else:
        yield


@functools.cache
def architecture_of(device: torch.device) -> str:
    """Returns the architecture of a device, such as ``sm_90`` or ``gfx942``; ``none`` for the interpreter."""
    if device.type != "cuda":
        return "none"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def num_processors(device: torch.device) -> int:
    """Returns the number of multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def accumulation_dtype(dtype: torch.dtype) -> tl.dtype:
    """Returns the accumulation and output dtype of a kernel for logits of ``dtype``, as a Triton dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@functools.cache
def _table() -> list[dict]:
    path = Path(__file__).parents[2] / "data" / "launch_settings.json"
    return json.loads(path.read_text())["settings"]


@functools.lru_cache(maxsize=4096)
def _nearest(op: str, architecture: str, itemsize: int, vocab_size: int) -> Settings:
    def distance(entry: dict) -> tuple:
        return (
            entry["architecture"] != architecture,
            _generation_distance(entry["architecture"], architecture),
            abs(math.log2(entry["itemsize"] / itemsize)),
            abs(math.log2(entry["vocab_size"] / max(vocab_size, 1))),
        )

    entry = min((entry for entry in _table() if entry["op"] == op), key=distance)
    return Settings(entry["block"], entry["num_warps"], entry.get("max_registers"))


def _generation_distance(one: str, other: str) -> float:
    """Returns how far apart two architectures are; infinity if their vendors differ."""
    if one[:2] != other[:2]:
        return math.inf
    if one[:2] != "sm":
        return one != other
    one_version, other_version = int(one.removeprefix("sm_")), int(other.removeprefix("sm_"))
    # The tens are the generation, so sm_86 is nearer to sm_80 than to sm_90.
    return abs(one_version // 10 - other_version // 10) + abs(one_version - other_version) / 1000
