"""The CUDA C++ kernel of sample_logits on the emulated GPU, as an implementation of ``torch.ops.slimkernels``."""

from __future__ import annotations

import ctypes

import pytest
import torch
from support.emulated_cuda import DTYPES, EmulatedKernel, Launch, arguments_of, pointer

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


class EmulatedSampleLogits(EmulatedKernel):
    """The kernel, called like the operator that it implements."""

    op = "sample_logits"

    def sample_logits_rows(self, *arguments) -> int:
        given = arguments_of("sample_logits_rows", arguments)
        logits, seeds = given["logits"], given["seeds"]
        if logits.dtype == torch.float64:
            pytest.skip("float64 is computed by the Triton kernel")
        call = Arguments(
            logits=logits.data_ptr(),
            row_stride=logits.stride(0),
            vocab_size=logits.shape[1],
            num_distinct=given["m"],
            seeds=pointer(seeds),
            seed=given["seed"],
            seed_per_row=seeds is not None and seeds.ndim > 0,
        )
        for name, (per_row, option) in _OPTIONS.items():
            setattr(call, name, option(pointer(given[per_row]), given[name]))
        for name in _OUTPUTS:
            given[name].fill_(-7)
            setattr(call, name, pointer(given[name]))
        self.launch(logits.shape[1], DTYPES.index(logits.dtype), ctypes.c_int64(len(logits)), ctypes.byref(call))
        return 0
