"""The Triton kernel of gather_logits, without a GPU."""

from __future__ import annotations

import pytest
import torch
from support.helpers import DTYPES
from support.triton_checks import assert_compiles, assert_tests_pass_interpreted, on_architectures

import slimkernels as sk


@pytest.mark.interpret
def test_gather_logits_passes_its_tests_interpreted():
    assert_tests_pass_interpreted(
        "test_gather_logits.py::test_gather_logits_hand_worked",
        "test_gather_logits.py::test_gather_logits_of_hostile_rows[2100-dtype0]",
        "test_gather_logits.py::test_gather_logits_of_any_layout[row strided-dtype1]",
        "test_gather_logits.py::test_gather_logits_rest_lse_does_not_cancel",
        "test_gather_logits_triton.py::test_bad_rows_are_nan",
    )


@pytest.mark.slow
@pytest.mark.interpret
def test_gather_logits_passes_all_its_tests_interpreted():
    assert_tests_pass_interpreted("test_gather_logits.py")


@pytest.mark.parametrize(("architecture", "dtype"), on_architectures(DTYPES))
def test_gather_logits_compiles_for(architecture, dtype):
    from slimkernels.ops.triton.gather_logits import gather_logits_rows

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits, ids = torch.empty(4, 128256, dtype=dtype), torch.zeros(4, 6413, dtype=torch.int32)
    lse, rest_lse = torch.empty(2, 4, 2, dtype=wide)
    target, target_logit = torch.zeros(4, dtype=torch.int64), torch.empty(4, dtype=wide)
    out = torch.empty(4, 6413, dtype=dtype), lse, rest_lse, target_logit
    assert_compiles(lambda: gather_logits_rows(logits, ids, target, [1.0, 2.0], *out), architecture)


@pytest.mark.parametrize("bad", [[3, 1], [1, 1], [1, 9], [-2, 1], [-1, 1]])
def test_bad_rows_are_nan(bad, request):
    if request.config.getoption("--kernels") == "cpu":
        pytest.skip("the CPU kernel raises")
    sparse = sk.gather_logits(torch.zeros(3, 9), torch.tensor([bad, [1, 2], [0, -1]]), target=torch.tensor([1, 9, 2]))
    for field in (sparse.logits, sparse.lse, sparse.rest_lse):
        assert field[0].isnan().all()
        assert not field[1:].isnan().any()
    assert sparse.target_logit.isnan().tolist() == [False, True, False]
