"""The CUDA C++ kernel of sample_logits on the emulated GPU, as an implementation of ``torch.ops.slimkernels``."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.emulated_cuda import DTYPES, FaultError, Gpu, compile_emulated
from torch import Tensor

_OUTPUTS = ("token", "logprob", "truncated_logprob", "entropy")


def _option(kind: type[ctypes._SimpleCData]) -> type[ctypes.Structure]:
    """Returns ``RowOption`` of csrc/cuda/sample_logits_memory.cuh for a type of numbers."""

    class Option(ctypes.Structure):
        _fields_ = (("per_row", ctypes.c_void_p), ("number", kind))

    return Option


# The options, and the names of the tensors of one number per row.
_OPTIONS = {
    "position": ("positions", _option(ctypes.c_int64)),
    "temperature": ("temperatures", _option(ctypes.c_double)),
    "top_k": ("top_ks", _option(ctypes.c_int64)),
    "top_p": ("top_ps", _option(ctypes.c_double)),
    "min_p": ("min_ps", _option(ctypes.c_double)),
}


class Arguments(ctypes.Structure):
    """``SampleArgs`` of csrc/cuda/sample_logits_memory.cuh; the launch sets slice and list_capacity."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("vocab_size", "num_distinct", "slice", "list_capacity")),
        ("seeds", ctypes.c_void_p),
        ("seed", ctypes.c_int64),
        ("seed_per_row", ctypes.c_bool),
        *((name, option) for name, (_, option) in _OPTIONS.items()),
        *((name, ctypes.c_void_p) for name in _OUTPUTS),
    )


class Launch(ctypes.Structure):
    """Launch parameters of the emulated kernel, none of which may change its results."""

    _fields_ = tuple(
        (name, ctypes.c_int) for name in ("blocks", "threads", "staged", "list_capacity", "seed", "skipped_barrier")
    )

    def __init__(self, blocks=1, staged=True, list_capacity=512, threads=64, seed=0, skipped_barrier=-1) -> None:
        super().__init__(blocks, threads, staged, list_capacity, seed, skipped_barrier)


# Small blocks, so that a short row has several tiles per warp, of both kinds of schedules. Lists that have room for the
# candidates, for few of them, and none.
LAUNCHES = (
    Launch(),
    Launch(blocks=2, seed=1),
    Launch(staged=False, list_capacity=30, seed=2),
    Launch(blocks=4, list_capacity=0, seed=3),
    Launch(blocks=2, staged=False, seed=5),
    Launch(blocks=2, list_capacity=30, seed=6),
)


class Plan(NamedTuple):
    """The parameters that the launcher chooses."""

    blocks: int
    staged: bool
    slice: int
    bytes: int


class _Machine(ctypes.Structure):
    _fields_ = (
        ("has_clusters", ctypes.c_bool),
        ("block_bytes", ctypes.c_int64),
        ("processor_bytes", ctypes.c_int64),
        ("processors", ctypes.c_int),
    )


class EmulatedSampleLogits:
    """The kernel and its launch plan, called in the compiled library; each call takes the next of ``launches``."""

    def __init__(self, library: Path, launches: Sequence[Launch] = ()) -> None:
        self._native = ctypes.CDLL(str(library))
        self._native.sample_logits.restype = ctypes.c_char_p
        self.launches = itertools.cycle(launches or (Launch(),))

    def sample_logits_rows(self, *arguments) -> int:
        schema = torch.ops.slimkernels.sample_logits_rows.default._schema
        given = dict(zip((each.name for each in schema.arguments), arguments, strict=True))
        logits, seeds = given["logits"], given["seeds"]
        if logits.dtype == torch.float64:
            pytest.skip("float64 is computed by the Triton kernel")
        call = Arguments(
            logits=logits.data_ptr(),
            row_stride=logits.stride(0),
            vocab_size=logits.shape[1],
            num_distinct=given["m"],
            seeds=_pointer(seeds),
            seed=given["seed"],
            seed_per_row=seeds is not None and seeds.ndim > 0,
        )
        for name, (per_row, option) in _OPTIONS.items():
            setattr(call, name, option(_pointer(given[per_row]), given[name]))
        for name in _OUTPUTS:
            given[name].fill_(-7)
            setattr(call, name, _pointer(given[name]))
        fault = self._native.sample_logits(
            DTYPES.index(logits.dtype),
            ctypes.c_int64(len(logits)),
            ctypes.byref(call),
            ctypes.byref(next(self.launches)),
        )
        if fault is not None:
            raise FaultError(fault.decode())
        return 0

    def barriers_of_last_row(self) -> int:
        return self._native.barriers_of_last_row()

    def plan(self, dtype: torch.dtype, num_rows: int, vocab_size: int, gpu: Gpu) -> Plan:
        found = (ctypes.c_int64 * 4)()
        self._native.plan_sample_logits(
            DTYPES.index(dtype),
            ctypes.c_int64(num_rows),
            ctypes.c_int64(vocab_size),
            ctypes.byref(_Machine(*gpu)),
            found,
        )
        return Plan(found[0], bool(found[1]), *found[2:])


def compile_sample_logits(folder: Path, **replaced: str) -> Path:
    """Compiles the kernel into ``folder``, after replacing ``old`` by ``new`` in its source if they are given."""
    return compile_emulated("sample_logits", folder, **replaced)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())
