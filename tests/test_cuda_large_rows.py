"""The CUDA C++ kernel of topk_logits on an emulated GPU, in rows that begin behind 2 ** 31 elements."""

from __future__ import annotations

import platform
import shutil

import pytest
import torch
from support.emulated_cuda import COMPILER, EmulatedKernel, compile_library
from support.helpers import assert_same_bits, sparse_fields

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which(COMPILER[0]) is None,
    reason="the emulated GPU needs Linux and a C++ compiler",
)


def test_cuda_topk_logits_of_a_row_behind_2_to_the_31_elements(tmp_path):
    # A file without pages between the two rows. A product in 32 bits would be negative.
    emulated, stride = EmulatedKernel(compile_library(tmp_path)), (1 << 31) + 8
    memory = torch.from_file(str(tmp_path / "rows"), shared=True, size=stride + 2048, dtype=torch.bfloat16)
    rows = memory.as_strided((2, 2048), (stride, 1))
    rows.copy_(torch.randn(2, 2048))
    expected = emulated.topk_logits(rows.clone(memory_format=torch.contiguous_format), 100)
    assert_same_bits(sparse_fields(emulated.topk_logits(rows, 100)), sparse_fields(expected))
