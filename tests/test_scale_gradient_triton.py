"""The Triton kernel behind the backward pass of the losses, without a GPU."""

from __future__ import annotations

import pytest
import torch
from support.helpers import DTYPES, assert_same_bits
from support.triton_checks import assert_compiles, assert_tests_pass_interpreted, on_architectures


@pytest.mark.interpret
def test_scale_gradient_passes_its_tests_interpreted():
    assert_tests_pass_interpreted("test_scale_gradient_triton.py::test_scale_in_place")


@pytest.mark.parametrize(("architecture", "dtype"), on_architectures(DTYPES))
def test_scale_gradient_compiles_for(architecture, dtype):
    from slimkernels.ops.triton.scale_gradient import scale_in_place

    factor = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    gradient = torch.empty(2**31 + 16, dtype=dtype)  # more than 32 bits can count, never touched
    assert_compiles(lambda: scale_in_place(gradient, factor), architecture)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 1000])
@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0, float("nan")])
def test_scale_in_place(dtype, numel, factor, request, monkeypatch):
    if request.config.getoption("--kernels") == "cpu":
        pytest.skip("CPU tensors are looked at instead")
    if request.config.getoption("--kernels") == "triton":
        from slimkernels.ops.triton import scale_gradient as scale_gradient_triton

        monkeypatch.setattr(scale_gradient_triton, "_MAX_PROGRAMS", 3)  # each takes several blocks
    upstream = torch.tensor(factor, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    gradient = torch.randn(numel).to(dtype)
    expected = (gradient.to(upstream.dtype) * upstream).to(dtype)
    torch.ops.slimkernels.scale_in_place(gradient, upstream)
    assert_same_bits(gradient, expected)
