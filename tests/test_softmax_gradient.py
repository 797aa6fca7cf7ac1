"""The dense part of the vocabulary-parallel gradient, on the CPU and by its Triton kernel without a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from support.helpers import DTYPES, assert_as_accurate, row_strided
from support.triton_checks import assert_compiles, assert_tests_pass_interpreted, on_architectures

import slimkernels.ops  # noqa: F401 -- registers the operators


def in_torch(logits, numbers, temperature, softcap, logit_scale):
    x = logits.to(numbers.dtype).requires_grad_()
    z = logit_scale * x if softcap == 0 else softcap * torch.tanh(logit_scale * x / softcap)
    (slope,) = torch.autograd.grad(z.sum(), x)
    factor, level, factor_one, level_one, constant = numbers.unsqueeze(-1)
    dz = factor * ((z - level) / temperature).exp() + constant
    if temperature != 1:
        dz = dz + factor_one * (z - level_one).exp()
    return (dz * slope).detach()


def make_rows(dtype, vocab_size=203):
    """Row 1 is to be written as zeros whatever it holds; the levels of row 2 are far below its logits, and apart."""
    generator = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(5, vocab_size, generator=generator)).to(dtype)
    numbers = torch.randn(5, 5, generator=generator).to(torch.float64 if dtype == torch.float64 else torch.float32)
    numbers[1::2] = 5 + numbers[1::2].abs()
    numbers[0::2, 1] = 0
    logits[1, 3], logits[3, 5] = math.nan, -math.inf
    numbers[1, 2], numbers[3, 2] = -12.0, 4.0
    numbers[0, 2] *= math.exp(-20.0)
    return logits, numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("temperature", "softcap", "scale"), [(1.0, 0.0, 1.0), (2.5, 0.0, 0.7), (3.0, 4.0, 1.5)])
def test_softmax_gradient(dtype, temperature, softcap, scale):
    logits, numbers = make_rows(dtype)
    logits = row_strided(logits)
    gradient = row_strided(torch.full_like(logits, math.nan))
    options = (temperature, softcap, scale)
    torch.ops.slimkernels.softmax_gradient_rows(logits, gradient, numbers, *options)
    assert not gradient[1].any()
    rows = [0, 2, 3, 4]
    logits, numbers = logits[rows], numbers[:, rows].contiguous()
    for row in range(4):
        number = numbers[:, row : row + 1]
        same_dtype = in_torch(logits[row : row + 1], number, *options).to(dtype)
        truth = in_torch(logits[row : row + 1].double(), number.double(), *options)
        assert_as_accurate(gradient[rows][row : row + 1], same_dtype, truth)
    torch.ops.slimkernels.softmax_gradient_rows(logits, logits, numbers, *options)
    assert torch.equal(logits, gradient[rows]), "over the logits it differs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_softmax_gradient_below_the_smallest_normal_number_is_zero(dtype, temperature):
    info = torch.finfo(dtype)
    logits = torch.linspace(1.1 * math.log(info.tiny), 0.0, 3001, dtype=torch.float64).to(dtype)[None]
    numbers = torch.tensor([-0.25, 0.0, 0.25, 0.0, 0.0]).to(torch.promote_types(dtype, torch.float32))[:, None]
    gradient = torch.full_like(logits, math.nan)
    torch.ops.slimkernels.softmax_gradient_rows(logits, gradient, numbers, temperature, 0.0, 1.0)
    exact = in_torch(logits.double(), numbers.double(), temperature, 0.0, 1.0)
    below = exact.abs() < (1 - 1e-4) * info.tiny
    assert below.sum() > 100
    assert not gradient[below].any()
    above = exact.abs() > (1 + 1e-2) * info.tiny
    torch.testing.assert_close(gradient[above].double(), exact[above], rtol=max(3e-5, 2 * info.eps), atol=0)


@pytest.mark.interpret
def test_softmax_gradient_passes_its_tests_interpreted():
    assert_tests_pass_interpreted("test_softmax_gradient.py::test_softmax_gradient")


@pytest.mark.parametrize(("architecture", "dtype"), on_architectures([torch.bfloat16, torch.float64]))
def test_softmax_gradient_compiles_for(architecture, dtype):
    from slimkernels.ops.triton.softmax_gradient import softmax_gradient_rows

    logits, numbers = make_rows(dtype, vocab_size=32000)
    assert_compiles(lambda: softmax_gradient_rows(logits, logits, numbers, 2.0, 30.0, 1.0), architecture)
