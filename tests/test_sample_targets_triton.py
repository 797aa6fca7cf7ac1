"""The Triton kernels of sample_targets, without a GPU."""

from __future__ import annotations

import pytest
import torch
from support.helpers import DTYPES
from support.triton_checks import assert_compiles, assert_tests_pass_interpreted, on_architectures

import slimkernels as sk


@pytest.mark.interpret
def test_sample_targets_passes_its_tests_interpreted():
    assert_tests_pass_interpreted(
        "test_sample_targets.py::test_sample_targets_hand_worked",
        "test_sample_targets.py::test_sample_targets_matches_the_reference[16-dtype0]",
        "test_sample_targets.py::test_sample_targets_of_draw_version_2_are_these",
        "test_sample_targets.py::test_sample_targets_of_any_layout[misaligned-dtype1]",
        "test_sample_targets_triton.py::test_a_label_outside_makes_nan",
        "test_sample_targets_triton.py::test_of_infinite_logits_only_those_are_drawn",
    )


@pytest.mark.slow
@pytest.mark.interpret
def test_sample_targets_passes_more_of_its_tests_interpreted():
    names = (
        "matches_the_reference[3-dtype3]",
        "matches_the_reference[65-dtype1]",
        "of_hostile_rows[dtype2]",
        "at_extreme_temperatures",
        "is_batch_invariant_and_keeps_leading_dimensions",
        "opcheck_and_compile",
    )
    assert_tests_pass_interpreted(*(f"test_sample_targets.py::test_sample_targets_{name}" for name in names))


@pytest.mark.parametrize(("architecture", "dtype"), on_architectures(DTYPES))
def test_sample_targets_compiles_for(architecture, dtype):
    from slimkernels.ops.triton.sample_targets import sample_targets_rows

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits, target = torch.empty(2, 131072, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    outputs = torch.empty(2, 50, dtype=torch.int32), torch.empty(2, 50, dtype=wide), torch.empty(2, dtype=wide)
    assert_compiles(
        lambda: sample_targets_rows(logits, 50, 3, None, 0, target, 0.8, target, *outputs),
        architecture,
    )


def test_of_infinite_logits_only_those_are_drawn():
    logits = torch.randn(1, 40).index_fill(1, torch.tensor([7, 33]), torch.inf)
    sparse = sk.sample_targets(logits, 12, 0, position=0)
    assert set(sparse.ids[0].tolist()) == {7, 33, -1}


def test_a_label_outside_makes_nan(request):
    if request.config.getoption("--kernels") == "cpu":
        pytest.skip("the CPU kernel raises")
    target = torch.tensor([3, 9, -1, 2**40])
    sparse = sk.sample_targets(torch.randn(4, 9), 5, 0, position=0, target=target)
    sound = sk.sample_targets(torch.randn(4, 9), 5, 0, position=0)
    for row in (1, 3):
        assert (sparse.ids[row] == -1).all()
        assert sparse.logits[row].isnan().all()
    assert sparse.target_logit.isnan().tolist() == [False, True, True, True]
    assert (sparse.ids[[0, 2]] >= 0).any(-1).all()
    assert not sparse.logits[[0, 2]].isnan().any()
    assert sound.target_logit is None
