"""``slim_loss(inplace_backward=True)``, and teachers that are kept in float8."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.helpers import assert_same_bits, largest_allocation, random_problem

import slimkernels as sk

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def head(dtype: torch.dtype, shape=(7, 203)):
    """Hidden states, a linear layer's weight, labels and a teacher."""
    _, target, teacher = random_problem(shape[0], shape[-1], dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(shape[0], 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1], 16, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, target, teacher


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("upstream", [1.0, 0.37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_backward_equals_the_other(dtype, upstream, reduction):
    hidden, weight, target, teacher = head(dtype)
    options = {"reduction": reduction, "rest": "ghost", "divergence": "jsd", "label_smoothing": 0.1, "statistics": True}
    expected = sk.slim_loss(hidden @ weight.T, target, teacher, **options)
    grads = torch.autograd.grad(expected.loss, (hidden, weight), torch.tensor(upstream, dtype=expected.loss.dtype))
    actual = sk.slim_loss(hidden @ weight.T, target, teacher, inplace_backward=True, **options)
    assert_same_bits(tuple(actual), tuple(expected))
    assert not any(field.requires_grad for field in actual[1:])
    (actual.loss * upstream).backward()
    assert_same_bits((hidden.grad, weight.grad), grads)


def test_inplace_backward_writes_over_the_logits_and_allocates_nothing_of_their_size():
    hidden, weight, target, teacher = head(torch.float32, (64, 5000))
    logits = hidden @ weight.T
    (expected,) = torch.autograd.grad(sk.slim_loss(logits, target, teacher).loss, logits)
    used = largest_allocation(lambda: sk.slim_loss(logits, target, teacher, inplace_backward=True))
    assert torch.equal(logits, expected)
    assert used < logits.nbytes / 4
    assert largest_allocation(lambda: sk.slim_loss(hidden @ weight.T, target, teacher)) >= logits.nbytes


def test_inplace_backward_of_shifted_rows_writes_over_their_copy():
    hidden, weight, target, teacher = head(torch.float32, (14, 203))
    before = (hidden @ weight.T).reshape(2, 7, 203)
    logits = before * 1.0
    losses = [
        sk.slim_loss(
            logits[:, :-1], target.reshape(2, 7)[:, 1:], teacher.reshape(2, 7)[:, 1:], inplace_backward=inplace
        )
        for inplace in (False, True)
    ]
    assert torch.equal(logits, before)
    first, second = (torch.autograd.grad(loss.loss, hidden, retain_graph=True)[0] for loss in losses)
    assert torch.equal(first, second)


def test_inplace_backward_leaves_logits_alone_where_no_gradient_is_needed():
    hidden, weight, target, teacher = head(torch.float32)
    with torch.no_grad():
        logits = hidden @ weight.T
        before = logits.clone()
        sk.slim_loss(logits, target, teacher, inplace_backward=True)
    assert torch.equal(logits, before)
    leaf = before.clone()
    sk.slim_loss(leaf, target, teacher, inplace_backward=True)
    assert torch.equal(leaf, before)


def test_inplace_backward_is_noticed_by_a_producer_that_needs_its_output():
    hidden, weight, target, teacher = head(torch.float32)
    logits = torch.tanh(hidden @ weight.T)
    loss = sk.slim_loss(logits, target, teacher, inplace_backward=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_backward_notices_that_its_gradient_was_overwritten():
    hidden, weight, target, teacher = head(torch.float32)
    logits = hidden @ weight.T
    loss = sk.slim_loss(logits, target, teacher, inplace_backward=True).loss
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("message", "dtype", "options"),
    [
        ("reduction='none'", torch.float32, {"reduction": "none"}),
        ("float16", torch.float16, {}),
    ],
)
def test_inplace_backward_refuses(message, dtype, options):
    hidden, weight, target, teacher = head(dtype)
    with pytest.raises(ValueError, match=f"inplace_backward=True is not possible with {message}"):
        sk.slim_loss(hidden @ weight.T, target, teacher, inplace_backward=True, **options)


def test_inplace_backward_refuses_a_leaf():
    logits, target, teacher = random_problem()
    before = logits.clone()
    with pytest.raises(ValueError, match="a leaf of the graph"):
        sk.slim_loss(logits.requires_grad_(), target, teacher, inplace_backward=True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("view", [lambda x: x[1:], lambda x: x.view(7, 203), lambda x: x[:, 3:]], ids=range(3))
def test_inplace_backward_refuses_a_view_of_a_leaf(view):
    logits, target, teacher = random_problem()
    before = logits.clone()
    rows = view(logits.requires_grad_())
    skipped = len(logits) - len(rows)
    with pytest.raises(ValueError, match="a view of one"):
        sk.slim_loss(rows, target[skipped:], teacher[skipped:], inplace_backward=True)
    assert torch.equal(logits, before)


def test_inplace_backward_of_rows_that_share_memory():
    hidden, weight, target, teacher = head(torch.float32)
    shared = (hidden[:1] @ weight.T).expand(7, 203)
    before = shared.clone()
    losses = [sk.slim_loss(shared, target, teacher, inplace_backward=inplace).loss for inplace in (False, True)]
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in losses)
    assert torch.equal(first, second)
    assert torch.equal(shared, before)


def test_inplace_backward_compiles_whole():
    hidden, weight, target, teacher = head(torch.float32)

    def step(hidden, weight):
        logits = (hidden @ weight.T).view(7, 1, 203).flatten(0, 1)
        return sk.slim_loss(logits, target, teacher, inplace_backward=True).loss

    expected = torch.autograd.grad(step(hidden, weight), (hidden, weight))
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert_same_bits(torch.autograd.grad(compiled(hidden, weight), (hidden, weight)), expected)


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_a_float8_teacher_equals_its_widened_self(dtype):
    logits, target, teacher = random_problem(dtype=torch.float32)
    logits.requires_grad_()
    narrow = dataclasses.replace(teacher, logits=teacher.logits.to(dtype))
    wide = dataclasses.replace(teacher, logits=narrow.logits.float())
    for rest in ("renorm", "ghost"):
        losses = [sk.slim_loss(logits, target, each, rest=rest) for each in (narrow, wide)]
        assert_same_bits(tuple(losses[0]), tuple(losses[1]))
        grads = [torch.autograd.grad(loss.loss, logits)[0] for loss in losses]
        assert_same_bits(grads[0], grads[1])
        probs = [sk.sparse_softmax(each, rest=rest) for each in (narrow, wide)]
        assert_same_bits(tuple(probs[0]), tuple(probs[1]))
    weight = torch.randn(203, 8)
    hidden = torch.randn(7, 8)
    heads = [sk.linear_slim_loss(hidden, weight, target, each) for each in (narrow, wide)]
    assert_same_bits(tuple(heads[0]), tuple(heads[1]))


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_bfloat16_holds_every_float8(dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert_same_bits(every.to(torch.bfloat16).float(), every.float())
