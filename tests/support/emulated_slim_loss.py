"""The CUDA C++ kernel of slim_loss on the emulated GPU, as an implementation of ``torch.ops.slimkernels``."""

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

from slimkernels import _checks
from slimkernels.ops import _divergences, _slim_options
from slimkernels.ops.slim_result import NUM_STATS

_OPTIONS = (
    ("temperature", ctypes.c_double),
    ("rest", ctypes.c_int),
    ("divergence", ctypes.c_int),
    ("weighting", ctypes.c_int),
    ("detach_weight", ctypes.c_bool),
    *((name, ctypes.c_double) for name in ("beta", "alpha", "forward_weight", "entropy_threshold", "teacher_blend")),
    *((name, ctypes.c_double) for name in ("tail_weight", "ce_weight", "kd_weight", "label_smoothing")),
    *((name, ctypes.c_double) for name in ("z_loss_weight", "softcap", "logit_scale")),
    ("ignore_index", ctypes.c_int64),
    ("statistics", ctypes.c_int),
)
# The enumerators in the order of csrc/slim_loss/args.h, which tests/test_slim_options.py holds to these names.
_NAMES = {
    "rest": _checks.RESTS,
    "divergence": _divergences.DIVERGENCES,
    "weighting": (*_slim_options.WEIGHTS, "tensor"),
    "statistics": tuple(NUM_STATS),
}


class Arguments(ctypes.Structure):
    """``SlimLossArgs`` of csrc/slim_loss/args.h."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("logits_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int),
        ("vocab_size", ctypes.c_int64),
        ("dlogits", ctypes.c_void_p),
        ("dlogits_stride", ctypes.c_int64),
        ("stats", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("target", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("teacher_logits", ctypes.c_void_p),
        ("teacher_dtype", ctypes.c_int),
        ("top_k", ctypes.c_int64),
        ("teacher_lse", ctypes.c_void_p),
        ("teacher_lse_one", ctypes.c_void_p),
        ("teacher_rest_lse", ctypes.c_void_p),
        ("target_logit", ctypes.c_void_p),
        ("token_weight", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        *_OPTIONS,
        ("streams", ctypes.c_bool),
    )


class Launch(ctypes.Structure):
    """Launch parameters of the emulated kernel, none of which may change its results."""

    _fields_ = tuple(
        (name, ctypes.c_int) for name in ("blocks", "threads", "staged", "seed", "skipped_barrier", "first_row")
    )

    def __init__(self, blocks=1, staged=True, threads=64, seed=0, skipped_barrier=-1, first_row=0) -> None:
        super().__init__(blocks, threads, staged, seed, skipped_barrier, first_row)


# Small blocks, so that a short row has several tiles per warp, and of both kinds of schedules.
LAUNCHES = (
    Launch(),
    Launch(blocks=2, seed=1),
    Launch(staged=False, seed=2),
    Launch(blocks=4, seed=3),
    Launch(blocks=2, staged=False, seed=5),
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


class EmulatedSlimLoss:
    """The kernel and its launch plan, called in the compiled library; each call takes the next of ``launches``."""

    def __init__(self, library: Path, launches: Sequence[Launch] = ()) -> None:
        self._native = ctypes.CDLL(str(library))
        self._native.slim_loss.restype = ctypes.c_char_p
        self.launches = itertools.cycle(launches or (Launch(),))

    def slim_loss_rows(self, *arguments) -> int:
        schema = torch.ops.slimkernels.slim_loss_rows.default._schema
        given = dict(zip((each.name for each in schema.arguments), arguments, strict=True))
        logits = given["logits"]
        if logits.dtype == torch.float64:
            pytest.skip("float64 is computed by the Triton kernel")
        call = Arguments(
            logits_stride=logits.stride(0),
            dtype=DTYPES.index(logits.dtype),
            vocab_size=logits.shape[1],
            num_rows=logits.shape[0],
        )
        for name, value in given.items():
            if isinstance(value, Tensor):
                setattr(call, name, value.data_ptr())
                assert value.is_contiguous() or name in ("logits", "dlogits")
            elif value is not None:
                setattr(call, name, _NAMES[name].index(value) if name in _NAMES else value)
        if given["dlogits"] is not None:
            call.dlogits_stride = given["dlogits"].stride(0)
        if given["ids"] is not None:
            call.top_k = given["ids"].shape[1]
            call.teacher_dtype = (*DTYPES, torch.float64).index(given["teacher_logits"].dtype)
        fault = self._native.slim_loss(ctypes.byref(call), ctypes.byref(next(self.launches)))
        if fault is not None:
            raise FaultError(fault.decode())
        return 0

    def barriers_of_last_row(self) -> int:
        return self._native.barriers_of_last_row()

    def plan(
        self, dtype: torch.dtype, num_rows: int, vocab_size: int, top_k: int, gpu: Gpu, *, selects: bool = False
    ) -> Plan:
        found = (ctypes.c_int64 * 4)()
        self._native.plan_slim_loss(
            DTYPES.index(dtype),
            ctypes.c_int64(num_rows),
            ctypes.c_int64(vocab_size),
            ctypes.c_int64(top_k),
            int(selects),
            ctypes.byref(_Machine(*gpu)),
            found,
        )
        return Plan(found[0], bool(found[1]), *found[2:])


def compile_slim_loss(folder: Path, **replaced: str) -> Path:
    """Compiles the kernel into ``folder``, after replacing ``old`` by ``new`` in its source if they are given."""
    return compile_emulated("slim_loss", folder, **replaced)
