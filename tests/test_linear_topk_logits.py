from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.helpers import (
    DTYPES,
    assert_as_accurate,
    assert_same_bits,
    column_major,
    explain,
    largest_allocation,
    misaligned,
    opcheck_calls_of,
    row_strided,
    sparse_fields,
)

import slimkernels as sk
from slimkernels import reference

# Values of a product are sums of 24 products: rounding may order close ones differently than float64 does.
ORDER_SLACK = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}


def random_head(num_rows=5, depth=24, vocab_size=203, dtype=torch.float32, seed=0):
    """hidden (N, D), weight (V, D), bias (V,) whose product has a spread of about 3."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (
        randn(num_rows, depth).to(dtype),
        (3.0 / math.sqrt(depth) * randn(vocab_size, depth)).to(dtype),
        randn(vocab_size).to(dtype),
    )


def effective_logits(hidden, weight, bias=None, softcap=None, logit_scale=1.0):
    logits = F.linear(hidden, weight, bias)
    if softcap is not None or logit_scale != 1:
        logits = logit_scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def assert_topk_of_product(actual, hidden, weight, top_k, *, bias=None, target=None, temperatures=(1.0,), **options):
    """The kept ids are the K largest but for what rounding orders otherwise, and carry their logits."""
    truth = effective_logits(hidden.double(), weight.double(), None if bias is None else bias.double(), **options)
    torch_logits = effective_logits(hidden, weight, bias, **options)
    kept = truth.gather(-1, actual.ids.long())
    assert (actual.ids.diff(dim=-1) > 0).all()
    if truth.numel():
        slack = ORDER_SLACK[hidden.dtype] * truth.abs().max()
        threshold = truth.topk(top_k, -1).values[..., -1:]
        assert (kept >= threshold - slack).all()
        assert (truth > threshold + slack).sum() == (kept > threshold + slack).sum()
    with explain("logits"):
        assert_as_accurate(actual.logits, torch_logits.gather(-1, actual.ids.long()), kept)
    torch_sparse = reference.topk_logits(torch_logits, top_k, target=target, temperatures=temperatures)
    true_sparse = reference.topk_logits(truth, top_k, target=target, temperatures=temperatures)
    with explain("lse"):
        assert_as_accurate(actual.lse, torch_sparse.lse, true_sparse.lse)
    with explain("rest_lse"):
        assert_as_accurate(actual.rest_lse, torch_sparse.rest_lse, true_sparse.rest_lse)
    assert actual.temperatures == temperatures
    if target is not None:
        with explain("target_logit"):
            assert_as_accurate(actual.target_logit, torch_sparse.target_logit, true_sparse.target_logit)


def test_linear_topk_logits_hand_worked():
    hidden = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    # Products (1, 2, 3, -1) and (3, -1, 2, -3), with the bias (1, 2, 3, 9) and (3, -1, 2, 7), halved.
    bias = torch.tensor([0.0, 0.0, 0.0, 10.0])
    sparse = sk.linear_topk_logits(hidden, weight, 2, bias=bias, logit_scale=0.5, target=torch.tensor([0, -1]))
    assert sparse.ids.tolist() == [[2, 3], [0, 3]]
    assert sparse.logits.tolist() == [[1.5, 4.5], [1.5, 3.5]]
    lse = [math.log(sum(map(math.exp, row))) for row in ((0.5, 1.0, 1.5, 4.5), (1.5, -0.5, 1.0, 3.5))]
    torch.testing.assert_close(sparse.lse[:, 0], torch.tensor(lse))
    torch.testing.assert_close(sparse.target_logit, torch.tensor([0.5, math.nan]), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"softcap": 5.0},
        {"softcap": 5.0, "logit_scale": 0.3, "bias": True},
        {"logit_scale": 2.0, "temperatures": (1.0, 2.5)},
    ],
)
def test_linear_topk_logits_matches_the_definition(options, dtype):
    hidden, weight, bias = random_head(dtype=dtype)
    options = {**options, "bias": bias if options.get("bias") else None, "target": torch.tensor([0, 202, -100, 7, 8])}
    for top_k in (1, 11, 203):
        actual = sk.linear_topk_logits(hidden, weight, top_k, **options)
        is_plain = not {"softcap", "logit_scale"} & options.keys()
        kept_dtype = dtype if is_plain or dtype == torch.float64 else torch.float32
        assert (actual.ids.dtype, actual.logits.dtype) == (torch.int32, kept_dtype)
        assert_topk_of_product(actual, hidden, weight, top_k, **options)


@pytest.mark.parametrize(
    ("num_rows", "depth", "vocab_size"), [(0, 3, 9), (1, 1, 1), (3, 1, 7), (2, 65, 1025), (17, 8, 129)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_topk_logits_shapes(num_rows, depth, vocab_size, dtype):
    hidden, weight, _ = random_head(num_rows, depth, vocab_size, dtype)
    top_k = math.ceil(vocab_size / 20)
    actual = sk.linear_topk_logits(hidden, weight, top_fraction=0.05)
    assert actual.ids.shape == (num_rows, top_k)
    assert_topk_of_product(actual, hidden, weight, top_k)


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 5, 100])
def test_linear_topk_logits_does_not_depend_on_the_chunks(chunk_rows):
    # Small integers: every product is exact, whatever the order of its sum.
    hidden, weight = torch.randint(-3, 4, (5, 24)).float(), torch.randint(-3, 4, (203, 24)).float()
    target = torch.randint(203, (5,))
    expected = sk.topk_logits(hidden @ weight.T, 11, target=target, temperatures=(1.0, 4.0))
    actual = sk.linear_topk_logits(hidden, weight, 11, target=target, temperatures=(1.0, 4.0), chunk_rows=chunk_rows)
    assert_same_bits(sparse_fields(actual), sparse_fields(expected))


@pytest.mark.parametrize("leading_shape", [(), (0,), (2, 3), (2, 0, 3)])
def test_linear_topk_logits_keeps_leading_dimensions(leading_shape):
    hidden, weight, _ = random_head(math.prod(leading_shape))
    target = torch.randint(203, leading_shape)
    actual = sk.linear_topk_logits(hidden.reshape(*leading_shape, 24), weight, 7, target=target)
    assert actual.leading_shape == leading_shape
    assert_topk_of_product(actual, hidden.reshape(*leading_shape, 24), weight, 7, target=target)


@pytest.mark.parametrize("layout", [row_strided, misaligned, column_major])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_topk_logits_of_any_layout(layout, dtype):
    hidden, weight, bias = random_head(dtype=dtype)
    target = torch.randint(203, (5, 2))[:, 0]
    actual = sk.linear_topk_logits(layout(hidden), layout(weight), 9, bias=misaligned(bias), target=target)
    assert_topk_of_product(actual, hidden, weight, 9, bias=bias, target=target)


def test_linear_topk_logits_is_bitwise_repeatable():
    hidden, weight, bias = random_head(dtype=torch.bfloat16)
    first = sk.linear_topk_logits(hidden, weight, 9, bias=bias, chunk_rows=2)
    assert_same_bits(
        sparse_fields(sk.linear_topk_logits(hidden, weight, 9, bias=bias, chunk_rows=2)), sparse_fields(first)
    )


def test_linear_topk_logits_carries_no_gradient():
    hidden, weight, bias = (operand.requires_grad_() for operand in random_head())
    assert not any(field.requires_grad for field in sparse_fields(sk.linear_topk_logits(hidden, weight, 9, bias=bias)))


def test_linear_topk_logits_never_holds_all_logits():
    hidden, weight, _ = random_head(64, 8, 1000)
    assert largest_allocation(sk.linear_topk_logits, hidden, weight, 5, chunk_rows=4) <= 64 * 1000 * 4 / 8


def test_linear_topk_logits_opcheck():
    hidden, weight, bias = random_head(4, 8, 37)
    names = opcheck_calls_of(
        sk.linear_topk_logits, hidden, weight, 5, bias=bias, target=torch.arange(4), softcap=3.0, chunk_rows=3
    )
    assert "slimkernels::linear_topk_logits" in names


def test_linear_topk_logits_compiles_whole():
    hidden, weight, _ = random_head(4, 8, 37)

    def kept(hidden):
        sparse = sk.linear_topk_logits(hidden * 2.0, weight, 5, chunk_rows=3)
        return sparse.ids, sparse.logits, sparse.lse, sparse.rest_lse

    assert_same_bits(torch.compile(kept, fullgraph=True, backend="aot_eager")(hidden), kept(hidden))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "top_k", {"top_k": 204}),
        (ValueError, "top_k", {"top_k": None}),
        (ValueError, "weight", {"weight": torch.zeros(203, 23)}),
        (ValueError, "weight", {"weight": torch.zeros(24)}),
        (TypeError, "weight", {"weight": torch.zeros(203, 24, dtype=torch.bfloat16)}),
        (ValueError, "weight", {"weight": torch.zeros(203, 24, device="meta")}),
        (TypeError, "hidden", {"hidden": torch.zeros(5, 24, dtype=torch.int64)}),
        (ValueError, "bias", {"bias": torch.zeros(24)}),
        (TypeError, "bias", {"bias": torch.zeros(203, dtype=torch.float64)}),
        (ValueError, "softcap", {"softcap": 0.0}),
        (ValueError, "logit_scale", {"logit_scale": math.nan}),
        (ValueError, "temperatures", {"temperatures": (1.0, -1.0)}),
        (ValueError, "chunk_rows", {"chunk_rows": 0}),
        (ValueError, "target", {"target": torch.zeros(4, dtype=torch.int64)}),
        pytest.param(ValueError, "target", {"target": torch.full((5,), 203)}, marks=pytest.mark.cpu_kernels),
        (TypeError, "target", {"target": torch.zeros(5)}),
    ],
)
def test_linear_topk_logits_refuses(error, message, options):
    hidden, weight, _ = random_head()
    with pytest.raises(error, match=message):
        sk.linear_topk_logits(**{"hidden": hidden, "weight": weight, "top_k": 5, **options})


def test_linear_topk_logits_rounds_nothing_after_the_product():
    hidden, weight, _ = random_head(16, 64, 4000, torch.bfloat16)
    weight = weight * 8  # most logits are near the cap
    actual = sk.linear_topk_logits(hidden, weight, 20, softcap=30.0, logit_scale=0.7)
    product = (hidden @ weight.T).double()
    truth = reference.topk_logits(30.0 * torch.tanh(0.7 * product / 30.0), 20)
    torch.testing.assert_close(actual.lse, truth.lse.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(actual.rest_lse, truth.rest_lse.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(actual.ids, truth.ids)
    torch.testing.assert_close(actual.logits, truth.logits.float(), rtol=1e-6, atol=1e-6)
    actual.validate(4000)
