from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    LAYOUTS,
    assert_as_accurate,
    assert_rows_match,
    assert_same_bits,
    explain,
    hostile_rows,
    opcheck_calls_of,
    sparse_fields,
)

import slimkernels as sk
from slimkernels import SparseLogits, reference

INF, NAN = math.inf, math.nan


def assert_topk_matches(actual: SparseLogits, logits: torch.Tensor, top_k: int, **options) -> None:
    expected = reference.topk_logits(logits, top_k, **options)
    assert_rows_match(actual, expected, reference.topk_logits(logits.double(), top_k, **options), logits)


@pytest.mark.parametrize(
    ("row", "top_k", "ids"),
    [
        ([3.0, 1.0, 2.0, 3.0], 2, [0, 3]),
        ([3.0, 1.0, 3.0, 3.0], 2, [0, 2]),
        ([0.0, -0.0, 0.0, -1.0], 2, [0, 1]),
        ([-0.0, 0.0, -0.0, 0.0], 3, [0, 1, 2]),
        ([1.0, NAN, INF, NAN], 3, [1, 2, 3]),
        ([NAN, NAN, INF, NAN], 2, [0, 1]),
        ([-INF, 0.0, -INF, -INF], 3, [0, 1, 2]),
        ([-INF, -INF, 1.0, -INF], 2, [0, 2]),
        ([7.0], 1, [0]),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_logits_hand_worked(dtype, row, top_k, ids):
    sparse = sk.topk_logits(torch.tensor([row], dtype=dtype), top_k)
    assert sparse.ids.tolist() == [ids]
    assert sparse.ids.dtype == torch.int32
    assert_same_bits(sparse.logits, torch.tensor([[row[i] for i in ids]], dtype=dtype))


def test_topk_logits_lse_and_target_hand_worked():
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)], [INF, 0.0, 0.0], [-INF] * 3], dtype=torch.float64)
    sparse = sk.topk_logits(logits, 1, target=torch.tensor([1, -1, 2]), temperatures=(1.0, 0.5))
    # exp(x / 0.5) squares the exponentials: 1 + 4 + 25.
    expected = torch.tensor([[math.log(8.0), math.log(30.0)], [INF] * 2, [-INF] * 2], dtype=torch.float64)
    torch.testing.assert_close(sparse.lse, expected, rtol=1e-15, atol=0)
    expected = torch.tensor([math.log(2.0), NAN, -INF], dtype=torch.float64)
    torch.testing.assert_close(sparse.target_logit, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [37, 1000, 8209])
def test_topk_logits_of_hostile_rows(dtype, vocab_size):
    rows = hostile_rows(vocab_size, dtype)
    batch = torch.stack(list(rows.values()))
    for top_k in sorted({1, math.ceil(0.05 * vocab_size), vocab_size // 2, vocab_size - 1, vocab_size}):
        sparse = sk.topk_logits(batch, top_k)
        wrong = (sparse.ids != reference.topk_logits(batch, top_k).ids).any(-1)
        assert [name for name, bad in zip(rows, wrong.tolist(), strict=True) if bad] == [], f"K={top_k}"
        with explain(f"K={top_k}"):
            assert_topk_matches(sparse, batch, top_k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_logits_of_every_small_size(dtype):
    # Vectors have 2 to 64 lanes; every remainder and every K around them.
    for vocab_size in (*range(1, 36), 63, 64, 65, 127, 128, 129, 255, 257):
        logits = torch.randn(2, vocab_size).to(dtype)
        for top_k in {1, vocab_size // 3 + 1, vocab_size}:
            with explain(f"V={vocab_size}, K={top_k}"):
                assert_topk_matches(sk.topk_logits(logits, top_k), logits, top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [32000, 128256])
def test_topk_logits_of_a_real_vocabulary(dtype, vocab_size):
    logits = (4.0 * torch.randn(3, vocab_size)).to(dtype)
    logits[1] = torch.linspace(-1.0, 1.0, vocab_size).to(dtype)
    target = torch.tensor([vocab_size - 1, -100, 5])
    top_k = math.ceil(0.05 * vocab_size)
    sparse = sk.topk_logits(logits, top_fraction=0.05, target=target, temperatures=(1.0, 2.0, 0.25))
    assert_topk_matches(sparse, logits, top_k, target=target, temperatures=(1.0, 2.0, 0.25))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), vocab_size=st.integers(1, 90), dtype=st.sampled_from(DTYPES))
def test_topk_logits_of_few_distinct_values(data, vocab_size, dtype):
    values = st.sampled_from([0.0, -0.0, 1.0, 1.0078125, -1.0, -2.5, INF, -INF, NAN, 3e-7, -3e-7])
    row = torch.tensor(data.draw(st.lists(values, min_size=vocab_size, max_size=vocab_size)), dtype=dtype)
    top_k = data.draw(st.integers(1, vocab_size))
    sparse, expected = sk.topk_logits(row, top_k), reference.topk_logits(row, top_k)
    assert sparse.ids.tolist() == expected.ids.tolist()
    assert_same_bits(sparse.logits, expected.logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_logits_lse_of_extremes(dtype):
    # Far apart, all small, all large, and one that dominates: no overflow, no loss.
    limit = 6e4 if dtype == torch.float16 else 1e30
    logits = torch.full((5, 300), -limit)
    logits[0, 17] = limit
    logits[1] = limit
    logits[2] = -limit
    logits[3, :150] = -INF
    logits[4] = torch.linspace(-40, 40, 300)
    logits = logits.to(dtype)
    assert_topk_matches(sk.topk_logits(logits, 4, temperatures=(1.0, 3.0)), logits, 4, temperatures=(1.0, 3.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 40, 900])
def test_topk_logits_of_masked_and_tied_rows(dtype, top_k):
    # Far more than K logits tie at the threshold that a sample of the row suggests.
    vocab_size = 30011
    generator = torch.Generator().manual_seed(top_k)
    at_random = torch.rand(vocab_size, generator=generator)
    rows = 3 * torch.randn(14, vocab_size, generator=generator)
    for row, share in enumerate((0.5, 0.9, 0.99, 0.999)):
        rows[row, at_random < share] = -INF
    rows[4, : vocab_size - 30] = -INF
    rows[5, 30:] = -INF
    rows[6] = -INF
    rows[6, 20077] = 2.0
    rows[7, at_random < 0.999] = -6e4
    rows[8] = 0.5
    rows[9] = (rows[9] > 0).float()
    rows[10] = torch.linspace(-30, 30, vocab_size)
    rows[11] = torch.where(at_random < 0.5, 0.0, -0.0)
    rows[12] = -INF
    rows[12, 29000:29500:7] = INF
    rows[13] = torch.where(at_random < 0.01, rows[13], -300.0)
    rows[13, 30000:] = 80.0
    rows = rows.to(dtype)
    assert_topk_matches(sk.topk_logits(rows, top_k), rows, top_k, temperatures=(1.0,))
    with_nan = rows.index_fill(1, torch.tensor([9, 28000, 30010]), NAN)
    assert torch.equal(sk.topk_logits(with_nan, top_k).ids, reference.topk_logits(with_nan, top_k).ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab_size", "top_k"), [(37, 5), (2000, 100), (50021, 1), (50021, 2500), (50021, 30000)])
@pytest.mark.parametrize("gap", [0.0, 10.0, 44.0, 60.0, 200.0])
def test_topk_logits_rest_lse_does_not_cancel(gap, vocab_size, top_k, dtype):
    # The rest is exp(-gap) of the row, of which float32 knows nothing beyond a gap of 16.
    generator = torch.Generator().manual_seed(vocab_size + top_k)
    logits = torch.randn(4, vocab_size, generator=generator, dtype=torch.float64)
    logits[:, torch.randperm(vocab_size, generator=generator)[:top_k]] += gap
    logits = logits.to(dtype)
    sparse = sk.topk_logits(logits, top_k, temperatures=(1.0, 0.5, 3.0))
    off = logits.double().scatter(-1, sparse.ids.long(), -INF)
    expected = torch.stack([torch.logsumexp(off / temperature, -1) for temperature in sparse.temperatures], -1)
    tolerance = 1e-13 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(sparse.rest_lse.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["equal", "two values", "lattice", "random"])
def test_topk_logits_rest_lse_far_below_the_row_is_exact_to_a_few_bits(kind):
    # Elements that share a value share the rounding of their exponents, which then does not average out.
    vocab_size, draw = 150_000, torch.rand(2, 150_000, generator=torch.Generator().manual_seed(1))
    rows = {
        "equal": torch.full((2, vocab_size), -0.123456),
        "two values": torch.where(draw < 0.5, -0.3, -0.7),
        "lattice": -(64 * draw).floor() / 64,
        "random": -draw,
    }[kind]
    ids = draw.argsort(-1)
    for distance in (18.0, 26.0, 30.0, 36.0, 40.0, 44.0, 46.0):
        for highest in (17.3, 31.7, 101.3):
            for top_k in (64, 7500):
                logits = rows + (highest - distance)
                logits.scatter_(1, ids[:, :top_k], highest - 0.5 * draw[:, :top_k])
                sparse = sk.topk_logits(logits, top_k, temperatures=(1.0, 0.7, 1.5, 2.0))
                off = logits.double().scatter(1, sparse.ids.long(), -INF)
                expected = torch.stack([torch.logsumexp(off / t, -1) for t in sparse.temperatures], -1)
                allowed = (1e-6 * expected.abs()).clamp(min=2e-6)
                error = (sparse.rest_lse.double() - expected).abs()
                assert (error <= allowed).all(), (distance, highest, top_k, error)


def test_topk_logits_one_is_always_the_first_temperature():
    logits = torch.randn(2, 9)
    sparse = sk.topk_logits(logits, 2, temperatures=(2.0,))
    assert sparse.temperatures == (1.0, 2.0)
    torch.testing.assert_close(sparse.lse_at(2.0), torch.logsumexp(logits / 2.0, -1))


@pytest.mark.parametrize("leading_shape", [(), (0,), (1,), (2, 3), (2, 0, 3), (2, 1, 2)])
def test_topk_logits_keeps_leading_dimensions(leading_shape):
    logits = torch.randn(*leading_shape, 50)
    target = torch.randint(50, leading_shape)
    sparse = sk.topk_logits(logits, 7, target=target, temperatures=(1.0, 2.0))
    assert sparse.ids.shape == (*leading_shape, 7)
    assert_topk_matches(sparse, logits, 7, target=target, temperatures=(1.0, 2.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_topk_logits_of_any_layout(layout, dtype):
    logits = torch.randn(5, 301).to(dtype)
    target = torch.randint(301, (5,))
    before = LAYOUTS[layout](logits)
    actual = sk.topk_logits(before, 16, target=target)
    assert_same_bits(sparse_fields(actual), sparse_fields(sk.topk_logits(logits, 16, target=target)))
    assert_same_bits(before, logits)


def test_topk_logits_takes_a_strided_target():
    logits, target = torch.randn(5, 31), torch.randint(31, (5, 2))
    expected = sk.topk_logits(logits, 4, target=target[:, 0].contiguous())
    assert_same_bits(sparse_fields(sk.topk_logits(logits, 4, target=target[:, 0])), sparse_fields(expected))


def test_topk_logits_of_expanded_rows():
    logits = torch.randn(1, 77)
    actual = sk.topk_logits(logits.expand(4, 77), 5)
    assert_same_bits(sparse_fields(actual), sparse_fields(sk.topk_logits(logits.repeat(4, 1), 5)))


def test_topk_logits_addresses_past_two_to_the_31():
    # Only the touched pages of the buffer exist.
    vocab_size, stride = 1000, 2**30 + 7
    buffer = torch.empty(2 * stride + vocab_size, dtype=torch.bfloat16)
    far = buffer.as_strided((3, vocab_size), (stride, 1))
    logits = torch.randn(3, vocab_size).bfloat16()
    far.copy_(logits)
    assert_same_bits(sparse_fields(sk.topk_logits(far, 50)), sparse_fields(sk.topk_logits(logits, 50)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_logits_is_bitwise_repeatable_and_batch_invariant(dtype):
    logits = torch.cat([torch.stack(list(hostile_rows(4100, dtype).values())), torch.randn(6, 4100).to(dtype)])
    whole = sparse_fields(sk.topk_logits(logits, 205, temperatures=(1.0, 1.5)))
    assert_same_bits(sparse_fields(sk.topk_logits(logits, 205, temperatures=(1.0, 1.5))), whole)
    for row in (0, 11, len(logits) - 1):
        alone = sparse_fields(sk.topk_logits(logits[row : row + 1], 205, temperatures=(1.0, 1.5)))
        assert_same_bits(alone, [field[row : row + 1] for field in whole])


def test_topk_logits_does_not_depend_on_the_number_of_threads(set_threads):
    logits, target = torch.randn(67, 2051), torch.randint(2051, (67,))
    expected = sparse_fields(sk.topk_logits(logits, 103, target=target))
    for count in (2, 5):
        set_threads(count)
        assert_same_bits(sparse_fields(sk.topk_logits(logits, 103, target=target)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_logits_gradient(dtype):
    logits, target = torch.randn(4, 61).to(dtype), torch.tensor([3, -1, 60, 3])
    weights = [torch.randn(4, 9), torch.randn(4, 2), torch.randn(4, 2), torch.randn(4)]
    weights[3][1] = 0.0

    def gradient(function, logits):
        leaf = logits.clone().requires_grad_()
        sparse = function(leaf, 9, target=target, temperatures=(1.0, 2.0))
        fields = (sparse.logits, sparse.lse, sparse.rest_lse, sparse.target_logit.nan_to_num(0.0))
        terms = zip(fields, weights, strict=True)
        return torch.autograd.grad(sum((each * weight.to(each)).sum() for each, weight in terms), leaf)[0]

    assert_as_accurate(
        gradient(sk.topk_logits, logits),
        gradient(reference.topk_logits, logits),
        gradient(reference.topk_logits, logits.double()),
    )


def test_topk_logits_gradcheck():
    logits = torch.randn(3, 13, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, 5, 12])

    def fields(logits):
        sparse = sk.topk_logits(logits, 4, target=target, temperatures=(1.0, 0.7))
        return sparse.logits, sparse.lse, sparse.rest_lse, sparse.target_logit

    assert torch.autograd.gradcheck(fields, (logits,))


def test_topk_logits_gradient_of_one_output_alone():
    logits = torch.randn(3, 13, requires_grad=True)
    sparse = sk.topk_logits(logits, 4)
    (grad,) = torch.autograd.grad(sparse.lse.sum(), logits)
    torch.testing.assert_close(grad, torch.softmax(logits, -1))
    assert not sparse.ids.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_logits_gradient_of_the_rest_is_a_softmax_off_the_kept_ids(dtype):
    # The kept logits are so far above the others that their own exponentials, relative to the rest, overflow.
    logits = torch.randn(3, 213, dtype=torch.float64)
    logits[:, 5:14] += 200.0
    logits = logits.to(dtype).requires_grad_()
    sparse = sk.topk_logits(logits, 9, temperatures=(1.0, 2.0))
    (grad,) = torch.autograd.grad(sparse.rest_lse.sum(), logits)
    off = logits.detach().double().scatter(-1, sparse.ids.long(), -INF)
    expected = torch.softmax(off, -1) + torch.softmax(off / 2.0, -1) / 2.0
    rounding = max(torch.finfo(dtype).eps, 1e-12 if dtype == torch.float64 else 4e-6)
    torch.testing.assert_close(grad, expected.to(dtype), rtol=rounding, atol=0)
    assert not grad.gather(1, sparse.ids.long()).any()


def test_topk_logits_rest_of_a_whole_row_has_no_gradient():
    logits = torch.randn(3, 13, requires_grad=True)
    sparse = sk.topk_logits(logits, 13, temperatures=(1.0, 2.0))
    assert (sparse.rest_lse == -INF).all()
    (grad,) = torch.autograd.grad(sparse.rest_lse.sum(), logits)
    assert not grad.any()


@pytest.mark.parametrize("target", [None, torch.tensor([1, 20, 4])])
def test_topk_logits_opcheck(target):
    logits = torch.randn(3, 21, requires_grad=True)
    names = opcheck_calls_of(sk.topk_logits, logits, 4, target=target, temperatures=(1.0, 2.0))
    assert names == ["slimkernels::topk_logits"]


def test_topk_logits_compiles_whole():
    logits, target = torch.randn(3, 21), torch.tensor([1, -1, 4])

    def loss(logits):
        sparse = sk.topk_logits(torch.tanh(logits), 4, target=target, temperatures=(1.0, 2.0))
        total = sparse.logits.sum() + sparse.lse.sum() + sparse.rest_lse.square().sum()
        return sparse.ids, sparse.logits, sparse.lse, sparse.rest_lse, total

    eager, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = loss(eager)
    actual = torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled)
    assert_same_bits(actual, expected)
    expected[-1].backward()
    actual[-1].backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_topk_logits_fake_has_the_shapes_and_dtypes_of_the_real():
    for dtype in DTYPES:
        target = torch.zeros(2, 3, dtype=torch.int64)
        real = sk.topk_logits(torch.zeros(2, 3, 9, dtype=dtype), 4, target=target)
        fake = sk.topk_logits(torch.zeros(2, 3, 9, dtype=dtype, device="meta"), 4, target=target.to("meta"))
        for one, other in zip(sparse_fields(fake), sparse_fields(real), strict=True):
            assert (one.shape, one.dtype, one.device.type) == (other.shape, other.dtype, "meta")


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "top_k", {}),
        (ValueError, "top_k", {"top_k": 2, "top_fraction": 0.5}),
        (ValueError, "top_k", {"top_k": 0}),
        (ValueError, "top_k", {"top_k": 6}),
        (ValueError, "top_fraction", {"top_fraction": 0.0}),
        (ValueError, "top_fraction", {"top_fraction": 1.5}),
        (ValueError, "temperatures", {"top_k": 2, "temperatures": (1.0, 0.0)}),
        (ValueError, "temperatures", {"top_k": 2, "temperatures": (1.0, NAN)}),
        pytest.param(ValueError, "target", {"top_k": 2, "target": torch.tensor([1, 5])}, marks=pytest.mark.cpu_kernels),
        (ValueError, "target", {"top_k": 2, "target": torch.tensor([1])}),
        (ValueError, "target", {"top_k": 2, "target": torch.tensor([1, 2], device="meta")}),
        (TypeError, "target", {"top_k": 2, "target": torch.tensor([1, 2], dtype=torch.int32)}),
        (TypeError, "logits", {"logits": torch.zeros(2, 5, dtype=torch.int64), "top_k": 2}),
        (ValueError, "logits", {"logits": torch.tensor(1.0), "top_k": 1}),
        (ValueError, "logits", {"logits": torch.zeros(2, 0), "top_k": 1}),
    ],
)
def test_topk_logits_refuses(error, message, options):
    with pytest.raises(error, match=message):
        sk.topk_logits(**{"logits": torch.zeros(2, 5), **options})
