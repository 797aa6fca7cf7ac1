from __future__ import annotations

import math

import pytest
import torch
from support.helpers import (
    DTYPES,
    LAYOUTS,
    assert_same_bits,
    explain,
    hostile_rows,
    loss_and_grads,
    num_drawn,
    opcheck_calls_of,
    sparse_fields,
)

import slimkernels as sk
from slimkernels import reference_sampling as reference
from slimkernels.ops.sample_targets import DRAW_VERSION

INF, NAN = math.inf, math.nan
IDS_OF_VERSION_2 = [[772, 2276, 2423, 2686, 2959], [103, 535, 1796, 2574, 2767]]


def assert_targets_match(logits, rounds, seed, **options) -> None:
    actual = sk.sample_targets(logits, rounds, seed, **options)
    expected = reference.sample_targets(logits, rounds, seed, **options)
    assert torch.equal(actual.ids, expected.ids)
    wide = logits.dtype == torch.float64
    tolerance = {"rtol": 1e-13 if wide else 1e-6, "atol": 1e-13 if wide else 1e-6, "equal_nan": True}
    kept = expected.ids >= 0
    torch.testing.assert_close(actual.logits[kept], expected.logits[kept], **tolerance)
    assert_same_bits(actual.lse, expected.lse)
    # The draws are the whole teacher; a row that keeps no id has no rest to know of.
    assert actual.rest_lse.dtype == actual.lse.dtype
    no_ids = (actual.ids < 0).all(-1, keepdim=True)
    assert torch.equal(actual.rest_lse.isnan(), no_ids)
    assert torch.equal(actual.rest_lse.isneginf(), ~no_ids)
    torch.testing.assert_close(actual.rest_lse, expected.rest_lse, equal_nan=True)
    assert actual.temperatures == expected.temperatures
    if expected.target_logit is None:
        assert actual.target_logit is None
    else:
        torch.testing.assert_close(actual.target_logit, expected.target_logit, **tolerance)
    actual.validate(logits.shape[-1])


def test_sample_targets_hand_worked():
    # Only id 1 can be drawn, then only ids 0 and 2, and equally often.
    logits = torch.tensor([[-INF, 3.0, -INF], [2.0, -INF, 2.0]])
    rounds = num_drawn(1000, 100)
    sparse = sk.sample_targets(logits, rounds, 0, position=torch.arange(2), target=torch.tensor([1, -1]))
    assert sparse.ids.tolist() == [[1, -1, -1], [0, 2, -1]]
    share = sparse.logits.exp()
    assert share[0, 0] == 1.0
    assert abs(share[1, 0] - 0.5) < 4 * math.sqrt(0.25 / rounds)
    assert share[1, :2].sum() == pytest.approx(1.0)
    torch.testing.assert_close(sparse.target_logit, torch.tensor([0.0, NAN]), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 3, 16, 65, 130, 1031])
def test_sample_targets_matches_the_reference(dtype, vocab_size):
    logits = (2.0 * torch.randn(3, vocab_size)).to(dtype)
    target = torch.tensor([0, -100, vocab_size - 1])
    seed = torch.tensor([3, -1, 2**40])
    for rounds, temperature in ((1, 1.0), (12, 0.7), (50, 3.0), (2 * vocab_size, 1.0)):
        with explain(f"{rounds} rounds at T={temperature}"):
            assert_targets_match(logits, rounds, seed, position=torch.arange(3), temperature=temperature, target=target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_targets_of_hostile_rows(dtype):
    rows = hostile_rows(1000, dtype)
    batch = torch.stack(list(rows.values()))
    target = torch.arange(len(rows))
    for temperature in (1.0, 0.3):
        assert_targets_match(batch, num_drawn(9, 2), 5, position=target, temperature=temperature, target=target)


def test_sample_targets_of_draw_version_2_are_these():
    """The draws of one version never change: captures are continued and repeated with them."""
    logits = (torch.arange(3000) * 37 % 101 / 20.0).expand(2, -1)
    sparse = sk.sample_targets(logits, 5, 7, position=torch.tensor([3, 2**40]), temperature=0.8)
    assert DRAW_VERSION == 2
    assert sparse.ids.tolist() == IDS_OF_VERSION_2


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_targets_follow_softmax(dtype):
    num_rows, rounds, temperature = 200, num_drawn(1000, 20), 0.7
    row = torch.tensor([0.0, -1.0, 2.0, 1.0, 0.5, -2.0, 1.5, 1.5, -0.5, 0.25, 3.0, -INF, 0.75]).to(dtype)
    sparse = sk.sample_targets(row.expand(num_rows, -1), rounds, 3, position=0, temperature=temperature)
    kept = sparse.ids >= 0
    counts = torch.zeros(len(row), dtype=torch.float64)
    counts.scatter_add_(0, sparse.ids[kept].long(), sparse.logits[kept].double().exp() * rounds)
    expected = num_rows * rounds * torch.softmax(row.double() / temperature, -1)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    # The 99.9 % quantile of the chi-square distribution of 11 degrees of freedom.
    assert ((counts - expected)[possible].square() / expected[possible]).sum() < 31.26


def test_sample_targets_of_a_row_are_independent_of_each_other():
    # Two draws of each of many rows: of one Philox call, and of neighbouring ones.
    num_rows = num_drawn(40_000, 1000)
    rows, position = torch.zeros(num_rows, 4), torch.arange(num_rows)
    for rounds in (2, 3):
        share = sk.sample_targets(rows, rounds, 5, position=position)
        distinct = torch.bincount((share.ids >= 0).sum(-1), minlength=rounds + 1)[1:].double()
        # How many distinct ids `rounds` uniform draws from four have.
        expected = torch.tensor({2: [1, 3], 3: [1, 9, 6]}[rounds]).double() / 4 ** (rounds - 1) * num_rows
        assert ((distinct - expected).square() / expected).sum() < 13.82


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [2e-38, 2.0**-95, 1e-6, 1e30, 8e37])
def test_sample_targets_at_extreme_temperatures(temperature, dtype):
    largest = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).tiny
    rows = torch.randn(5, 300, dtype=torch.float64).to(dtype)
    rows[1] *= tiny
    rows[2, ::2] = largest / 4
    rows[3, ::2], rows[3, 1::2] = largest, -largest
    rows[4, 7:] = -INF
    options = {"position": torch.arange(5), "temperature": temperature, "target": torch.arange(5)}
    assert_targets_match(rows, num_drawn(20, 4), 1, **options)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sample_targets_give_the_dense_gradient_on_average(temperature):
    num_rows, rounds, vocab_size = 40_000, 6, 7
    teacher = torch.tensor([1.0, -0.5, 2.0, 0.0, -2.0, 1.5, 0.5], dtype=torch.float64)
    student = torch.tensor([0.3, 0.1, -0.4, 1.0, 0.2, -1.0, 0.0], dtype=torch.float64)
    rows = teacher.expand(num_rows, vocab_size)
    sampled = sk.sample_targets(rows, rounds, 1, position=torch.arange(num_rows), temperature=temperature)
    largest = sk.topk_logits(rows / temperature, rounds - 1)
    q, p = torch.softmax(teacher / temperature, -1), torch.softmax(student, -1)
    standard_error = (q * (1 - q) / (rounds * num_rows)).sqrt()

    def distance(sparse, rest) -> torch.Tensor:
        """From the dense gradient, in standard errors of what is drawn."""
        # "mean" over rows that differ in nothing but the draw.
        _, (grad,) = loss_and_grads(
            sk.slim_loss,
            (student.expand(num_rows, vocab_size),),
            1.0,
            torch.zeros(num_rows, dtype=torch.int64),
            sparse,
            rest=rest,
            token_weight="none",
            ce_weight=0.0,
        )
        return ((grad.sum(0) - (p - q)).abs() / standard_error).max()

    for rest in ("renorm", "zero"):
        assert distance(sampled, rest) < 4
        # What every other sparse teacher of this size fails.
        assert distance(largest, rest) > 10


def test_sample_targets_is_batch_invariant_and_keeps_leading_dimensions():
    logits, position = torch.randn(2, 3, 500), torch.arange(6).reshape(2, 3)
    target = torch.randint(500, (2, 3))
    whole = sk.sample_targets(logits, 20, torch.full((2, 3), 7), position=position, target=target)
    assert (whole.leading_shape, whole.top_k) == ((2, 3), 20)
    alone = sk.sample_targets(logits[1, 2], 20, 7, position=5, target=target[1, 2])
    assert_same_bits(sparse_fields(alone), sparse_fields(whole[1, 2]))
    empty = sk.sample_targets(logits[:0], 20, 7, position=position[:0], target=target[:0])
    assert [field.shape for field in sparse_fields(empty)] == [(0, 3, 20), (0, 3, 20), (0, 3, 1), (0, 3), (0, 3, 1)]


@pytest.mark.cpu_kernels
def test_sample_targets_does_not_depend_on_the_number_of_threads(set_threads):
    logits = torch.randn(67, 300)
    expected = sparse_fields(sk.sample_targets(logits, 8, 1, position=torch.arange(67)))
    set_threads(2)
    assert_same_bits(sparse_fields(sk.sample_targets(logits, 8, 1, position=torch.arange(67))), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sample_targets_of_any_layout(layout, dtype):
    logits, position = torch.randn(5, 301).to(dtype), torch.arange(5)
    actual = sk.sample_targets(LAYOUTS[layout](logits), 16, 2, position=position)
    assert_same_bits(sparse_fields(actual), sparse_fields(sk.sample_targets(logits, 16, 2, position=position)))


@pytest.mark.parametrize(
    "options",
    [{"position": 3}, {"position": torch.arange(3), "target": torch.tensor([1, 0, 20]), "temperature": 0.5}],
)
def test_sample_targets_opcheck_and_compile(options):
    logits = torch.randn(3, 21)
    assert opcheck_calls_of(sk.sample_targets, logits, 4, 9, **options) == ["slimkernels::sample_targets"]

    def draw(logits, position):
        return sparse_fields(sk.sample_targets(torch.tanh(logits), 4, 9, **{**options, "position": position}))

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for position in (options["position"], options["position"] + 5):
        assert_same_bits(compiled(logits, position), draw(logits, position))


def test_sample_targets_fake_has_the_shapes_and_dtypes_of_the_real():
    for dtype in DTYPES:
        target = torch.zeros(2, 3, dtype=torch.int64)
        real = sk.sample_targets(torch.zeros(2, 3, 9, dtype=dtype), 4, 0, position=0, target=target)
        logits = torch.zeros(2, 3, 9, dtype=dtype, device="meta")
        fake = sk.sample_targets(logits, 4, 0, position=0, target=target.to("meta"))
        for one, other in zip(sparse_fields(fake), sparse_fields(real), strict=True):
            assert (one.shape, one.dtype, one.device.type) == (other.shape, other.dtype, "meta")


def test_sample_targets_has_no_gradient():
    logits = torch.randn(3, 21, requires_grad=True)
    sparse = sk.sample_targets(logits, 4, 0, position=0, target=torch.zeros(3, dtype=torch.int64))
    assert not any(field.requires_grad for field in sparse_fields(sparse))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "rounds must be at least 1 .* got 0", {"rounds": 0}),
        (ValueError, "rounds must be .* below", {"rounds": 2**31}),
        (TypeError, "rounds must be an integer, got float", {"rounds": 2.0}),
        (ValueError, "temperature must be positive and finite, got 0", {"temperature": 0.0}),
        (ValueError, "temperature must be positive and finite, got nan", {"temperature": NAN}),
        (TypeError, "seed must be an integer", {"seed": "7"}),
        (ValueError, "seed must fit into a signed 64-bit integer", {"seed": -(2**63) - 1}),
        (TypeError, "seed must have dtype torch.int64", {"seed": torch.zeros(2)}),
        (ValueError, r"position must .* shape \(2,\)", {"position": torch.arange(3)}),
        pytest.param(
            ValueError,
            r"target\[1\] must be a label in \[0, V\)",
            {"target": torch.tensor([0, 5])},
            marks=pytest.mark.cpu_kernels,
        ),
        (ValueError, "target must have shape", {"target": torch.tensor([0])}),
        (TypeError, "target must have dtype", {"target": torch.zeros(2)}),
        (TypeError, "logits must be float32", {"logits": torch.zeros(2, 5, dtype=torch.int64)}),
        (ValueError, "logits must have shape", {"logits": torch.zeros(2, 0)}),
    ],
)
def test_sample_targets_refuses(error, message, options):
    options = {"logits": torch.zeros(2, 5), "rounds": 3, "seed": 0, "position": 0, **options}
    with pytest.raises(error, match=message):
        sk.sample_targets(**options)
