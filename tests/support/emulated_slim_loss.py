"""The CUDA C++ kernel of slim_loss on the emulated GPU, as an implementation of ``torch.ops.slimkernels``."""

from __future__ import annotations

import ctypes

import pytest
import torch
from support.emulated_cuda import DTYPES, EmulatedKernel, Launch, arguments_of
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


# Small blocks, so that a short row has several tiles per warp, and of both kinds of schedules.
LAUNCHES = (
    Launch(),
    Launch(blocks=2, seed=1),
    Launch(staged=False, seed=2),
    Launch(blocks=4, seed=3),
    Launch(blocks=2, staged=False, seed=5),
)


class EmulatedSlimLoss(EmulatedKernel):
    """The kernel, called like the operator that it implements."""

    op = "slim_loss"

    def slim_loss_rows(self, *arguments) -> int:
        given = arguments_of("slim_loss_rows", arguments)
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
        self.launch(logits.shape[1], ctypes.byref(call))
        return 0
