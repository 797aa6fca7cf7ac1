"""Compares the CUDA C++ kernel of topk_logits with the reference on a GPU; run in its own process.

python cuda_check_topk_logits.py [--small]: the latter for the tools that slow a kernel down a hundred times. Nothing
else runs on the GPU; a wrong result is an exception.
"""

from __future__ import annotations

import math
import sys

import torch
from support.emulated_cuda import DTYPES
from support.helpers import LAYOUTS, assert_same_bits, explain, hostile_rows, sparse_fields
from support.kernel_override import on_cuda
from test_topk_logits import assert_topk_matches
from torch import Tensor

import slimkernels as sk
import slimkernels.ops  # registers the operators


def topk_logits(
    logits: Tensor, top_k: int, target: Tensor | None = None, temperatures: tuple[float, ...] = (1.0,)
) -> sk.SparseLogits:
    num_rows = len(logits)
    values = torch.empty(num_rows, top_k, dtype=logits.dtype)
    ids = torch.empty(num_rows, top_k, dtype=torch.int32)
    lse, rest_lse = torch.full((2, num_rows, len(temperatures)), math.nan)
    target_logit = None if target is None else torch.empty(num_rows)
    op = torch.ops.slimkernels.topk_logits_rows.default
    on_cuda(op, logits, top_k, target, list(temperatures), values, ids, lse, rest_lse, target_logit)
    return sk.SparseLogits(ids, values, lse, temperatures, target_logit, rest_lse)


def check_hostile_rows(vocab_size: int, copies: int = 1) -> None:
    """Checks every dtype and K, with valid and invalid labels, at two temperatures; the rows decide the launch."""
    for dtype in DTYPES:
        rows = torch.stack(list(hostile_rows(vocab_size, dtype).values())).repeat(copies, 1)
        target = torch.randint(vocab_size, (len(rows),))
        target[::5] = -100
        for top_k in sorted({1, math.ceil(0.05 * vocab_size), vocab_size}):
            with explain(f"{dtype}, N={len(rows)}, V={vocab_size}, K={top_k}"):
                actual = topk_logits(rows, top_k, target, (1.0, 2.5))
                assert_topk_matches(actual, rows, top_k, target=target, temperatures=(1.0, 2.5))


def check_layouts(vocab_size: int) -> None:
    for dtype in DTYPES:
        rows = torch.randn(5, vocab_size).to(dtype)
        expected = sparse_fields(topk_logits(rows, vocab_size // 20))
        for layout in ("row strided", "misaligned"):
            with explain(f"{layout}, {dtype}"):
                actual = topk_logits(LAYOUTS[layout](rows), vocab_size // 20)
                assert_same_bits(sparse_fields(actual), expected)


def check_labels(vocab_size: int) -> None:
    target = torch.tensor([0, vocab_size - 1, -1, vocab_size, 2**40])
    logits = torch.randn(5, vocab_size)
    actual = topk_logits(logits, 3, target).target_logit
    expected = torch.tensor([logits[0, 0], logits[1, -1], *[math.nan] * 3])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    small = "--small" in sys.argv
    check_hostile_rows(37)
    check_hostile_rows(4099)
    check_layouts(2111)
    check_labels(4099)
    if not small:
        check_hostile_rows(4099, copies=20)
        check_hostile_rows(32000)
        for dtype, shape in ((torch.bfloat16, (6, 262144)), (torch.float32, (3, 2**20))):
            logits = (4.0 * torch.randn(shape)).to(dtype)
            for k in (1000, math.ceil(shape[1] / 20), shape[1] // 2):
                assert_topk_matches(topk_logits(logits, k), logits, k)
