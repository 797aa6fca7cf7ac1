"""The Triton kernels of topk_logits, without a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from support.helpers import DTYPES, assert_same_bits, explain, hostile_rows, sparse_fields
from support.triton_checks import ARCHITECTURES, assert_compiles, assert_tests_pass_interpreted, on_architectures

import slimkernels as sk
from slimkernels import reference


@pytest.mark.interpret
def test_topk_logits_passes_its_tests_interpreted():
    assert_tests_pass_interpreted(
        "test_topk_logits.py::test_topk_logits_hand_worked",
        "test_topk_logits.py::test_topk_logits_of_hostile_rows[37-dtype0]",
        "test_topk_logits.py::test_topk_logits_of_any_layout[misaligned-dtype1]",
        "test_topk_logits.py::test_topk_logits_of_any_layout[row strided-dtype2]",
        "test_topk_logits_triton.py::test_topk_logits_whatever_the_sample_says[torch.bfloat16]",
        "test_topk_logits_triton.py::test_topk_logits_at_several_temperatures",
        "test_topk_logits_triton.py::test_rest_lse_of_hostile_rows[torch.float32]",
        "test_topk_logits_triton.py::test_rest_lse_of_a_gap_wider_than_float32",
        "test_topk_logits_triton.py::test_rest_lse_where_no_candidate_is_left",
        "test_topk_logits_triton.py::test_a_label_outside_makes_nan",
    )


@pytest.mark.slow
@pytest.mark.interpret
def test_topk_logits_passes_more_of_its_tests_interpreted():
    assert_tests_pass_interpreted(
        "test_topk_logits.py::test_topk_logits_lse_of_extremes",
        "test_topk_logits.py::test_topk_logits_of_any_layout",
        *(f"test_topk_logits.py::test_topk_logits_of_hostile_rows[37-dtype{index}]" for index in range(len(DTYPES))),
        "test_topk_logits.py::test_topk_logits_of_hostile_rows[1000-dtype1]",
        "test_topk_logits_triton.py::test_topk_logits_whatever_the_sample_says",
        "test_topk_logits_triton.py::test_rest_lse_of_hostile_rows",
    )


@pytest.mark.parametrize(("architecture", "dtype", "shape"), on_architectures(DTYPES, [(128256, 6413), (200, 10)]))
def test_topk_logits_compiles_for(architecture, dtype, shape):
    assert_compiles(lambda: launch_topk_logits(dtype, *shape), architecture)


@pytest.mark.slow  # with every supported Triton: make test-triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_topk_logits_compiles_for_an_odd_vocabulary(architecture):
    assert_compiles(lambda: launch_topk_logits(torch.bfloat16, 50257, 2513), architecture)


def launch_topk_logits(dtype, vocab_size, top_k):
    from slimkernels.ops.triton.topk_logits import topk_logits_rows

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.empty(4, vocab_size, dtype=dtype)
    values, ids = torch.empty(4, top_k, dtype=dtype), torch.empty(4, top_k, dtype=torch.int32)
    target, target_logit = torch.zeros(4, dtype=torch.int64), torch.empty(4, dtype=wide)
    temperatures = [1.0, 2.0, 3.0]
    lse, rest_lse = torch.empty(2, 4, 3, dtype=wide)
    out = values, ids, lse, rest_lse, target_logit
    topk_logits_rows(logits, top_k, target, temperatures, *out)


def sampled_rows(vocab_size: int, sample: int) -> dict[str, torch.Tensor]:
    """Rows on which a strided sample of runs of 16 sees the row as it is, sees too much, or sees too little."""
    noise = torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))
    index = torch.arange(vocab_size)
    seen = index % (vocab_size // (sample // 16)) < 16
    return {
        "random": noise,
        "rising": noise.sort().values,
        "large where the sample looks": torch.where(seen, 5.0, 0.0) + 0.1 * noise,
        "large where it does not": torch.where(seen, -5.0, 0.0) + 0.1 * noise,
        "all equal": torch.zeros(vocab_size),
        "two valued": (noise > 1).float(),
        "mostly -inf": noise.masked_fill(index % 50 != 0, -math.inf),
        "nan and inf": noise.masked_fill(index % 97 == 0, math.nan).masked_fill(index % 89 == 0, math.inf),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk_logits_whatever_the_sample_says(dtype):
    from slimkernels.ops.triton.topk_logits import sampling

    vocab_size, top_k = 2100, 60
    sample = sampling(vocab_size, top_k)
    assert sample is not None, "this test is about rows that are sampled"
    rows = torch.stack(list(sampled_rows(vocab_size, sample.size).values())).to(dtype)
    actual, expected = sk.topk_logits(rows, top_k), reference.topk_logits(rows.double(), top_k)
    assert torch.equal(actual.ids, expected.ids)
    assert_same_bits(actual.logits, rows.gather(-1, expected.ids.long()))
    assert_lse_close(actual, expected)


def assert_lse_close(actual: sk.SparseLogits, expected: sk.SparseLogits) -> None:
    for name in ("lse", "rest_lse"):
        with explain(name):
            ours, truth = getattr(actual, name).double(), getattr(expected, name)
            torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rest_lse_of_hostile_rows(dtype):
    rows = torch.stack(list(hostile_rows(37, dtype).values()))
    for top_k in (2, 36, 37):
        with explain(f"K={top_k}"):
            options = {"temperatures": (1.0, 0.25, 3.0)}
            actual = sk.topk_logits(rows, top_k, **options)
            assert_lse_close(actual, reference.topk_logits(rows.double(), top_k, **options))
            assert top_k < 37 or (actual.rest_lse == -math.inf).all()


@pytest.mark.parametrize("kept", [59, 60, 61, 75])
def test_rest_lse_of_a_gap_wider_than_float32(kept):
    # K = 60: relative to the kept logits, or to a threshold among them, exp of the others is 0 in float32.
    noise = torch.randn(2, 2100, generator=torch.Generator().manual_seed(2))
    order = torch.rand(2, 2100, generator=torch.Generator().manual_seed(3)).argsort(-1).argsort(-1)
    rows = torch.where(order < kept, 400 + noise, noise)
    options = {"temperatures": (1.0, 0.5, 1.5)}
    actual = sk.topk_logits(rows, 60, **options)
    assert_lse_close(actual, reference.topk_logits(rows.double(), 60, **options))
    assert_same_bits(sk.topk_logits(rows, 60, **options).rest_lse, actual.rest_lse)


def test_rest_lse_where_no_candidate_is_left():
    # A third of the K large logits lie where the sample looks, so that its threshold falls below exactly K.
    from slimkernels.ops.triton.topk_logits import sampling

    vocab_size, top_k = 2100, 60
    sample = sampling(vocab_size, top_k)
    assert sample is not None
    index = torch.arange(vocab_size)
    seen = index % (vocab_size // (sample.size // 16)) < 16
    large = torch.cat([index[seen][:: sample.size // sample.rank][: sample.rank], index[~seen][::30]])[:top_k]
    assert len(large) == top_k
    rows = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(4)).index_fill(1, large, 50.0)
    actual = sk.topk_logits(rows, top_k)
    assert actual.ids[0].tolist() == sorted(large.tolist())
    assert_lse_close(actual, reference.topk_logits(rows.double(), top_k))


def test_topk_logits_at_several_temperatures():
    logits = 3 * torch.randn(3, 2100, generator=torch.Generator().manual_seed(1))
    temperatures = (1.0, 0.5, 2.0, 8.0)
    actual = sk.topk_logits(logits, 60, temperatures=temperatures)
    expected = reference.topk_logits(logits.double(), 60, temperatures=temperatures)
    assert_lse_close(actual, expected)
    assert_same_bits(sparse_fields(sk.topk_logits(logits, 60, temperatures=temperatures)), sparse_fields(actual))


def test_a_label_outside_makes_nan(request):
    if request.config.getoption("--kernels") == "cpu":
        pytest.skip("the CPU kernel raises")
    result = sk.topk_logits(torch.arange(10.0).expand(3, 10), 2, target=torch.tensor([4, -1, 10]))
    assert result.target_logit[0] == 4
    assert result.target_logit[1:].isnan().all()
    assert result.ids.tolist() == [[8, 9]] * 3
