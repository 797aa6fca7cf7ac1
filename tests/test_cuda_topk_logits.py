"""The CUDA C++ kernel of topk_logits: compiled for GPUs that are not there, and run on an emulated one."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import explain, hostile_rows
from test_topk_logits import assert_topk_matches

from slimkernels import SparseLogits

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the emulator's order
NOT_LISTED = 0


class Launch(NamedTuple):
    """How an emulated kernel is launched; what it computes depends on none of it."""

    blocks: int = 1
    staged: bool = True
    list_capacity: int | None = None  # as many candidates as there are elements
    threads: int = 64
    seed: int = 0
    skipped_barrier: int = -1


class DeadlockError(Exception):
    """The emulated threads wait for each other forever, or overran their memory."""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """``topk_logits(logits, top_k, launch, **options)`` on the emulated GPU, and its library."""
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "topk_logits.so"
    source = ROOT / "tests/cuda_emulator/topk_logits.cpp"
    subprocess.run(
        [*compiler, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)],
        check=True,
    )
    native = ctypes.CDLL(str(library))
    native.topk_logits.restype = ctypes.c_char_p

    def topk_logits(logits, top_k, launch=None, target=None, temperatures=(1.0,)):
        launch = launch or Launch()
        (num_rows, vocab_size), num_temperatures = logits.shape, len(temperatures)
        assert logits.stride(1) == 1
        capacity = vocab_size if launch.list_capacity is None else launch.list_capacity
        values = logits.new_full((num_rows, top_k), math.nan)
        ids = torch.full((num_rows, top_k), -7, dtype=torch.int32)
        lse = torch.full((num_rows, num_temperatures), math.nan)
        target_logit = None if target is None else torch.full((num_rows,), -7.0)
        pointer = [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (logits, target, values, ids, lse)]
        fault = native.topk_logits(
            DTYPES.index(logits.dtype),
            pointer[0],
            ctypes.c_int64(num_rows),
            ctypes.c_int64(logits.stride(0)),
            vocab_size,
            top_k,
            pointer[1],
            (ctypes.c_double * num_temperatures)(*temperatures),
            num_temperatures,
            *pointer[2:],
            None if target is None else ctypes.c_void_p(target_logit.data_ptr()),
            launch.blocks,
            launch.threads,
            int(launch.staged),
            capacity,
            launch.seed,
            launch.skipped_barrier,
        )
        if fault is not None:
            raise DeadlockError(fault.decode())
        return SparseLogits(ids, values, lse, temperatures, target_logit)

    topk_logits.native = native
    return topk_logits


LAUNCHES = {
    "one block": Launch(),
    "cluster of 2": Launch(blocks=2, seed=1),
    "cluster of 4, through L2": Launch(blocks=4, staged=False, seed=2),
    "one block, through L2, no list": Launch(staged=False, list_capacity=NOT_LISTED, seed=3),
    "cluster of 8, short list": Launch(blocks=8, list_capacity=40, seed=4),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_hostile_rows(emulated, launch, dtype):
    for vocab_size in (37, 4099) if launch.blocks < 8 else (8209,):
        rows = hostile_rows(vocab_size, dtype)
        batch = torch.stack(list(rows.values()))
        for top_k in (1, math.ceil(0.05 * vocab_size), vocab_size):
            with explain(f"V={vocab_size}, K={top_k}"):
                assert_topk_matches(emulated(batch, top_k, launch), batch, top_k)
