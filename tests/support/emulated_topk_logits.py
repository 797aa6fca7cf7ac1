"""The CUDA C++ kernel of topk_logits on the emulated GPU."""

from __future__ import annotations

import ctypes
import math

import torch
from support.emulated_cuda import DTYPES, EmulatedKernel, Launch, pointer
from torch import Tensor

from slimkernels import SparseLogits

_MAX_TEMPERATURES = 32


class _Temperature(ctypes.Structure):
    _fields_ = (("inverse", ctypes.c_double), ("exponent_scale", ctypes.c_float))


class Arguments(ctypes.Structure):
    """``TopkLogitsArgs`` of csrc/cuda/topk_logits_memory.cuh; the launch sets what is not given."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("vocab_size", "top_k", "slice", "list_capacity")),
        *((name, ctypes.c_int32) for name in ("sample_stride", "sample_rank")),
        *((name, ctypes.c_void_p) for name in ("target", "ids", "values", "lse", "rest_lse", "target_logit")),
        ("num_temperatures", ctypes.c_int32),
        ("temperatures", _Temperature * _MAX_TEMPERATURES),
    )


class EmulatedTopkLogits(EmulatedKernel):
    """The kernel, called like the op."""

    op = "topk_logits"

    def topk_logits(
        self,
        logits: Tensor,  # (N, V), dense in V
        top_k: int,
        launch: Launch | None = None,
        target: Tensor | None = None,
        temperatures: tuple[float, ...] = (1.0,),
    ) -> SparseLogits:
        (num_rows, vocab_size), num_temperatures = logits.shape, len(temperatures)
        assert logits.stride(1) == 1
        values = logits.new_full((num_rows, top_k), math.nan)
        ids = torch.full((num_rows, top_k), -7, dtype=torch.int32)
        lse, rest_lse = torch.full((2, num_rows, num_temperatures), math.nan)
        target_logit = None if target is None else torch.full((num_rows,), -7.0)
        call = Arguments(
            logits=logits.data_ptr(),
            row_stride=logits.stride(0),
            vocab_size=vocab_size,
            top_k=top_k,
            target=pointer(target),
            ids=pointer(ids),
            values=pointer(values),
            lse=pointer(lse),
            rest_lse=pointer(rest_lse),
            target_logit=pointer(target_logit),
        )
        self.launches = iter([launch or Launch()])
        self.launch(
            vocab_size,
            DTYPES.index(logits.dtype),
            ctypes.c_int64(num_rows),
            ctypes.byref(call),
            (ctypes.c_double * num_temperatures)(*temperatures),
            num_temperatures,
        )
        return SparseLogits(ids, values, lse, temperatures, target_logit, rest_lse)
