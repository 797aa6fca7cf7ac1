"""The Triton kernel of sparse_softmax, without a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from support.helpers import DTYPES
from support.triton_checks import assert_compiles, assert_tests_pass_interpreted, on_architectures

import slimkernels as sk


@pytest.mark.interpret
def test_sparse_softmax_passes_its_tests_interpreted():
    names = ("hand_worked", "matches_the_reference", "gradcheck[ghost]", "gradcheck[zero_logit]")
    assert_tests_pass_interpreted(
        *(f"test_sparse_softmax.py::test_sparse_softmax_{name}" for name in names),
        "test_sparse_softmax.py::test_sparse_softmax_of_a_row_without_mass",
        "test_sparse_softmax_triton.py::test_bad_ids_make_nan",
    )


@pytest.mark.slow
@pytest.mark.interpret
def test_sparse_softmax_passes_all_its_tests_interpreted():
    assert_tests_pass_interpreted("test_sparse_softmax.py")


@pytest.mark.parametrize(("architecture", "dtype", "rest"), on_architectures(DTYPES, ["renorm", "ghost", "zero_logit"]))
def test_sparse_softmax_compiles_for(architecture, dtype, rest):
    from slimkernels.ops.triton.sparse_softmax import sparse_softmax_rows

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ids = torch.zeros(2, 1600, dtype=torch.int32)
    lse = torch.zeros(2, dtype=wide) if rest == "ghost" else None
    out = torch.zeros(2, 1600, dtype=wide), torch.zeros(2, dtype=wide)
    logits = torch.zeros(2, 1600, dtype=dtype)
    assert_compiles(lambda: sparse_softmax_rows(ids, logits, lse, lse, 1.5, rest, 32000, *out), architecture)


@pytest.mark.parametrize("bad", [[3, 1, 2], [1, 1, 2], [1, 2, 9], [1, -1, 2], [-2, 1, 2]])
def test_bad_ids_make_nan(bad, request):
    if request.config.getoption("--kernels") == "cpu":
        pytest.skip("the CPU kernels raise")
    sparse = sk.SparseLogits(torch.tensor([bad, [1, 2, 3]], dtype=torch.int32), torch.zeros(2, 3), torch.ones(2, 1))
    probs = sk.sparse_softmax(sparse, vocab_size=9)
    assert probs.logprobs[0].isnan().all()
    torch.testing.assert_close(probs.logprobs[1], torch.full((3,), -math.log(3)))
