"""A teacher of an exact head and a drawn tail: what it keeps, and that its gradient is on average the dense one."""

from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch
from support.helpers import DTYPES, LAYOUTS, assert_same_bits, explain, sparse_fields

import slimkernels as sk
from slimkernels import reference_sampling as reference

INF, NAN = math.inf, math.nan
TEACHER = torch.tensor([1.0, -0.5, 2.0, 0.0, -2.0, 1.5, 0.5, -1.0, 0.2], dtype=torch.float64)
STUDENT = torch.tensor([0.3, 0.1, -0.4, 1.0, 0.2, -1.0, 0.0, 0.7, -0.3], dtype=torch.float64)


def mean_gradient(sparse: sk.SparseLogits, rest: str) -> torch.Tensor:
    """Of KL over rows that differ in nothing but the draw, by the student's logits."""
    student = STUDENT.expand(sparse.ids.shape[0], -1).clone().requires_grad_()
    target = torch.zeros(len(student), dtype=torch.int64)
    sk.slim_loss(student, target, sparse, rest=rest, token_weight="none", ce_weight=0.0).loss.backward()
    return student.grad.sum(0)


def dense_gradient(temperature: float) -> torch.Tensor:
    return torch.softmax(STUDENT, -1) - torch.softmax(TEACHER / temperature, -1)


def test_mixed_targets_example_runs():
    assert doctest.testmod(importlib.import_module("slimkernels.ops.mixed_targets")) == (0, 2)


def test_mixed_targets_hand_worked():
    # q = (0.5, 0.25, 0.125, 0.125, 0): the head is id 0, and half of the rest is id 1.
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125, 0.0]], dtype=torch.float64).log()
    sparse = sk.mixed_targets(logits, 1, 4000, 0, position=0, target=torch.tensor([2]))
    assert sparse.ids.tolist() == [[0, 1, 2, 3, -1]]
    share = sparse.logits[0, :4].exp()
    assert share[0].item() == pytest.approx(0.5, abs=1e-15)
    assert share.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert abs(share[1].item() - 0.25) < 4 * 0.5 * math.sqrt(0.25 / 4000)
    assert sparse.target_logit.item() == pytest.approx(math.log(0.125))
    one = sk.mixed_targets(logits, 3, 1, 0, position=0)
    assert (one.ids.tolist(), one.logits[0].exp().sum().item()) == ([[0, 1, 2, 3]], pytest.approx(1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab_size", "top_k"), [(1, 1), (3, 3), (16, 1), (130, 40), (1031, 52)])
def test_mixed_targets_matches_the_reference(dtype, vocab_size, top_k):
    logits = (2.0 * torch.randn(4, vocab_size)).to(dtype)
    logits[3] = 0.5
    target, seed = torch.tensor([0, -100, vocab_size - 1, 0]), torch.tensor([3, -1, 2**40, 5])
    for rounds, temperature in ((1, 1.0), (12, 0.7), (50, 3.0)):
        with explain(f"{rounds} rounds at T={temperature}"):
            options = {"position": torch.arange(4), "temperature": temperature, "target": target}
            actual = sk.mixed_targets(logits, top_k, rounds, seed, **options)
            expected = reference.mixed_targets(logits, top_k, rounds, seed, **options)
            assert torch.equal(actual.ids, expected.ids)
            for name in ("logits", "lse", "target_logit"):
                one, other = getattr(actual, name), getattr(expected, name)
                torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6, equal_nan=True)
            actual.validate(vocab_size)
            torch.testing.assert_close(
                actual.logits.exp().masked_fill(actual.ids < 0, 0).sum(-1), torch.ones(4, dtype=actual.lse.dtype)
            )


def test_mixed_targets_of_hostile_rows():
    rows = torch.tensor([[NAN, 1.0, 2.0], [INF, 1.0, 2.0], [-INF] * 3, [1.0, -INF, -INF], [1.0, 2.0, -INF]])
    sparse = sk.mixed_targets(rows, 2, 5, 0, position=torch.arange(5))
    assert sparse.ids.tolist() == [[-1] * 3, [-1] * 3, [-1] * 3, [0, -1, -1], [0, 1, -1]]
    torch.testing.assert_close(sparse.logits[4, :2], torch.tensor([1.0, 2.0]).log_softmax(-1))


def test_mixed_targets_keeps_the_mass_of_a_tail_that_float32_cannot_subtract():
    logits = torch.full((1, 1000), -20.0)
    logits[0, 7] = 0.0
    sparse = sk.mixed_targets(logits, 1, 50, 0, position=0)
    tail = sparse.logits[0][(sparse.ids[0] >= 0) & (sparse.ids[0] != 7)]
    exact = math.log(999) - 20.0 - math.log1p(999 * math.exp(-20.0))
    assert tail.logsumexp(-1).item() == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mixed_targets_give_the_dense_gradient_on_average(temperature):
    rounds, top_k = 3, 2
    q = torch.softmax(TEACHER / temperature, -1)
    head = TEACHER.topk(top_k).indices
    tail = q.scatter(0, head, 0.0)
    mass = tail.sum()
    expected = dense_gradient(temperature)

    def drawn(num_rows: int, seed: int) -> sk.SparseLogits:
        options = {"position": torch.arange(num_rows), "temperature": temperature}
        return sk.mixed_targets(TEACHER.expand(num_rows, -1), top_k, rounds, seed, **options)

    # Of the mean over n rows; 0 where nothing is drawn.
    deviation = mass * ((tail / mass) * (1 - tail / mass) / rounds).sqrt()
    errors = []
    for num_rows in (400, 40_000):
        sparse = drawn(num_rows, seed=1)
        for rest in ("renorm", "zero"):
            error = (mean_gradient(sparse, rest) - expected).abs()
            assert (error <= 4 * deviation / math.sqrt(num_rows) + 1e-9).all(), rest
        # Over several seeds, as the error of a single mean is itself random.
        errors.append(
            math.sqrt(sum((mean_gradient(drawn(num_rows, s), "zero") - expected).square().sum() for s in range(8)) / 8)
        )
    # A hundred times the draws: a tenth of the error.
    assert 6 < errors[0] / errors[1] < 16

    sparse, limit = drawn(40_000, seed=1), 6 * deviation.max() / math.sqrt(40_000)
    is_head = torch.isin(sparse.ids, head.int()) | (sparse.ids < 0)
    biased = {
        "the head alone": sk.topk_logits(TEACHER.expand(40_000, -1) / temperature, top_k),
        "a tail of shares without its mass": sparse.logits - torch.where(is_head, 0.0, mass.log()),
        "a tail whose every draw weighs the same": torch.where(
            is_head, sparse.logits, mass.log() - (~is_head).sum(-1, keepdim=True).log()
        ),
    }
    for name, wrong in biased.items():
        if isinstance(wrong, torch.Tensor):
            wrong = sk.SparseLogits(sparse.ids, wrong, wrong.masked_fill(sparse.ids < 0, -INF).logsumexp(-1)[:, None])
        assert (mean_gradient(wrong, "renorm") - expected).abs().max() > limit, name


def test_mixed_targets_varies_less_than_draws_alone():
    num_rows, rounds = 4000, 6
    rows, position = TEACHER.expand(num_rows, -1), torch.arange(num_rows)

    def spread(sparse: sk.SparseLogits) -> float:
        shares = torch.zeros(num_rows, len(TEACHER) + 1, dtype=torch.float64)
        shares.scatter_(-1, sparse.ids.long() % (len(TEACHER) + 1), sparse.logits.exp())
        return shares[:, :-1].var(0).sum().item()

    mixed = sk.mixed_targets(rows, 3, rounds, 0, position=position)
    assert spread(mixed) < 0.3 * spread(sk.sample_targets(rows, rounds, 0, position=position))


def test_mixed_targets_is_batch_invariant_and_keeps_leading_dimensions():
    logits, position = torch.randn(2, 3, 500), torch.arange(6).reshape(2, 3)
    target = torch.randint(500, (2, 3))
    whole = sk.mixed_targets(logits, 5, 20, torch.full((2, 3), 7), position=position, target=target)
    assert (whole.leading_shape, whole.top_k) == ((2, 3), 25)
    alone = sk.mixed_targets(logits[1, 2], 5, 20, 7, position=5, target=target[1, 2])
    assert_same_bits(sparse_fields(alone), sparse_fields(whole[1, 2]))
    assert sk.mixed_targets(logits[:0], 5, 20, 7, position=position[:0]).ids.shape == (0, 3, 25)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_targets_of_any_layout(layout):
    logits, position = torch.randn(5, 301), torch.arange(5)
    actual = sk.mixed_targets(LAYOUTS[layout](logits), 7, 16, 2, position=position)
    assert_same_bits(sparse_fields(actual), sparse_fields(sk.mixed_targets(logits, 7, 16, 2, position=position)))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"top_k must be an integer in \[1, V = 5\], got 0", {"top_k": 0}),
        (ValueError, r"top_k must be an integer in \[1, V = 5\], got 6", {"top_k": 6}),
        (ValueError, "rounds must be at least 1 .* got 0", {"rounds": 0}),
        (ValueError, "temperature must be positive and finite, got 0", {"temperature": 0.0}),
        (TypeError, "seed must be an integer", {"seed": "7"}),
        (ValueError, "target must have shape", {"target": torch.tensor([0])}),
        (TypeError, "logits must be float32", {"logits": torch.zeros(2, 5, dtype=torch.int64)}),
    ],
)
def test_mixed_targets_refuses(error, message, options):
    options = {"logits": torch.zeros(2, 5), "top_k": 2, "rounds": 3, "seed": 0, "position": 0, **options}
    with pytest.raises(error, match=message):
        sk.mixed_targets(**options)
