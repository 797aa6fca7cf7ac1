"""What the Triton kernels share: integers that order like floats, exact doubles as arguments, launch settings."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from importlib import resources
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def order_keys(x):
    """Floats to signed integers in the same order, 16-bit ones to int32; -0.0 equals +0.0, a NaN is the largest."""
    if x.dtype.primitive_bitwidth == 64:
        bits = x.to(tl.int64, bitcast=True)
        keys = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        largest = 0x7FFFFFFFFFFFFFFF
    elif x.dtype.primitive_bitwidth == 32:
        bits = x.to(tl.int32, bitcast=True)
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        largest = 0x7FFFFFFF
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        keys = bits ^ ((bits >> 31) & 0x7FFF)
        largest = 0x7FFF
    wide = x.to(tl.float32) if x.dtype.primitive_bitwidth < 32 else x
    # Only -0.0 has the key -1. Compared as floats, denormals may count as zeros.
    return tl.where(wide != wide, largest, tl.where(keys == -1, 0, keys))


@triton.jit
def double(argument):
    """A float argument in all its digits; the kernel's signature must say ``tl.float64`` of it, or it comes rounded."""
    return tl.full((), argument, tl.float64)


@triton.jit
def log_add_exp(a, b):
    """log(exp(a) + exp(b)); -inf where both are."""
    high = tl.maximum(a, b)
    low = tl.minimum(a, b)
    return tl.where(high == float("-inf"), high, high + log1p(tl.exp(tl.where(high == float("inf"), 0.0, low - high))))


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1, without losing a small x (Kahan's correction; Triton has no log1p of its own)."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def expm1(x):
    """exp(x) - 1 without losing a small x, by the same correction."""
    u = tl.exp(x)
    middle = (u != 1) & (u - 1 != -1) & (u != float("inf"))
    safe = tl.where(middle, u, 2.0)
    return tl.where(middle, (safe - 1) * x / tl.log(safe), tl.where(u == 1, x, u - 1))


@triton.jit
def log1m_exp(x):
    """log(1 - exp(x)) without cancellation; -inf where x >= 0."""
    near = x > -0.6931471805599453
    small = log1p(-tl.exp(tl.where(near, -1.0, x)))
    large = tl.log(-expm1(tl.where(near & (x < 0), x, -1.0)))
    return tl.where(x >= 0, float("-inf"), tl.where(near, large, small))


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        block: Elements of a row that a program handles at a time.
        num_warps: Warps of a program.
        max_registers: Registers a thread may take, where NVIDIA's assembler is not to choose: to make room for more
            programs it may spill a few.
    """

    block: int
    num_warps: int
    max_registers: int | None = None


def launch_settings(op: str, logits: torch.Tensor) -> Launch:
    """The shipped settings of ``op`` for rows like ``logits`` (N, V): those of the nearest measured or estimated case.

    Nothing is tuned when a kernel runs. ``data/launch_settings.json`` holds the table; ``python -m bench.tune``
    measures it anew on a GPU.
    """
    return _nearest(op, _architecture(logits.device), logits.dtype.itemsize, logits.shape[-1])


def block_of(settings: Launch, size: int) -> int:
    """The block for rows of ``size`` elements: that of the settings, or a smaller one that holds a whole row."""
    return min(settings.block, triton.next_power_of_2(max(size, 16)))


def launch(kernel: Any, num_programs: int, settings: Launch, like: torch.Tensor, *arguments, **constants) -> None:
    """Launches ``num_programs`` of a kernel on the device of ``like``; none at all where that is 0."""
    if num_programs == 0:
        return
    # Triton launches on the current device.
    device = torch.cuda.device(like.device) if like.device.type == "cuda" else contextlib.nullcontext()
    # FP fusion is said explicitly, because Triton's default depends on its release.
    options = {"num_warps": settings.num_warps, "enable_fp_fusion": True}
    if settings.max_registers is not None and _architecture(like.device).startswith("sm_"):
        options["maxnreg"] = settings.max_registers
    with device:
        kernel[(num_programs,)](*arguments, **constants, **options)


def num_processors(device: torch.device) -> int:
    """The multiprocessors of a GPU; the interpreter stands for one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def row_scalar_dtype(dtype: torch.dtype) -> tl.dtype:
    """What a kernel sums and reports in, as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@functools.cache
def _table() -> list[dict]:
    text = resources.files("slimkernels").joinpath("data/launch_settings.json").read_text()
    return json.loads(text)["settings"]


@functools.lru_cache(maxsize=4096)
def _nearest(op: str, architecture: str, itemsize: int, vocab_size: int) -> Launch:
    def distance(entry: dict) -> tuple:
        return (
            entry["architecture"] != architecture,
            _generation_distance(entry["architecture"], architecture),
            abs(math.log2(entry["itemsize"] / itemsize)),
            abs(math.log2(entry["vocab_size"] / max(vocab_size, 1))),
        )

    entry = min((entry for entry in _table() if entry["op"] == op), key=distance)
    return Launch(entry["block"], entry["num_warps"], entry.get("max_registers"))


def _generation_distance(one: str, other: str) -> float:
    """How far apart two architectures are; infinitely where their makers differ."""
    if one[:2] != other[:2]:
        return math.inf
    if one[:2] != "sm":
        return one != other
    one_version, other_version = int(one.removeprefix("sm_")), int(other.removeprefix("sm_"))
    # sm_86 is nearer to sm_80 than to sm_90: the tens are the generation.
    return abs(one_version // 10 - other_version // 10) + abs(one_version - other_version) / 1000


@functools.cache
def _architecture(device: torch.device) -> str:
    """``sm_90``, ``gfx942``, ...; ``none`` for the interpreter."""
    if device.type != "cuda":
        return "none"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
