"""What differentiates a loss: once through backward, any number of times over a retained graph, never twice."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.helpers import assert_same_bits, random_problem
from torch import Tensor
from torch.autograd import forward_ad

import slimkernels as sk

LOSSES = ("slim_loss", "linear_slim_loss", "inplace")


def loss_of(name: str, dtype: torch.dtype = torch.float32, **options):
    """A leaf, and a function of it that returns the loss."""
    logits, target, teacher = random_problem(dtype=dtype)
    if name == "linear_slim_loss":
        generator = torch.Generator().manual_seed(0)
        leaf = torch.randn(logits.shape[0], 16, generator=generator).to(dtype)
        head = torch.randn(logits.shape[1], 16, generator=generator).to(dtype)
        return leaf, lambda hidden: sk.linear_slim_loss(hidden, head, target, teacher, **options).loss
    if name == "inplace":
        return logits, lambda x: sk.slim_loss(x * 1.0, target, teacher, inplace_backward=True, **options).loss
    return logits, lambda x: sk.slim_loss(x, target, teacher, **options).loss


CASES = [
    (name, reduction)
    for name, reduction in itertools.product(LOSSES, ("mean", "none"))
    if (name, reduction) != ("inplace", "none")
]


@pytest.mark.parametrize(("name", "reduction"), CASES)
@pytest.mark.parametrize("upstream", ["constant", "needs a gradient"])
def test_a_second_derivative_raises_and_names_the_op(name, reduction, upstream):
    values, loss = loss_of(name, reduction=reduction)
    leaf = values.clone().requires_grad_()
    out = loss(leaf)
    factor = torch.ones_like(out).requires_grad_(upstream != "constant")
    (gradient,) = torch.autograd.grad(out, leaf, factor, create_graph=True)
    (plain,) = torch.autograd.grad(loss(leaf), leaf, torch.ones_like(out))
    assert_same_bits(gradient.detach(), plain)
    named = "linear_slim_loss" if name == "linear_slim_loss" else "slim_loss"
    # A gradient penalty added to another term, so that autograd would find a path to the leaf without the loss.
    penalty = gradient.square().sum() + leaf.square().sum()
    with pytest.raises(RuntimeError, match=f"^{named} has no second derivative"):
        torch.autograd.grad(penalty, leaf)


@pytest.mark.parametrize("name", ["slim_loss", "linear_slim_loss"])
def test_a_hessian_raises_and_names_the_op(name):
    values, loss = loss_of(name)
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        torch.autograd.functional.hessian(loss, values)


def test_a_second_derivative_by_the_head_raises():
    _, target, teacher = random_problem()
    hidden, weight = torch.randn(7, 16), torch.randn(203, 16, requires_grad=True)
    loss = sk.linear_slim_loss(hidden, weight, target, teacher).loss
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        (weight - 0.1 * gradient).square().sum().backward()


def jvp(function, values: Tensor):
    return torch.func.jvp(function, (values,), (torch.ones_like(values),))


def dual(function, values: Tensor):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(values, torch.ones_like(values)))


# Torch's forward mode itself imports what torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["slim_loss", "linear_slim_loss", "topk_logits", "sparse_softmax"])
@pytest.mark.parametrize("transform", [jvp, dual, lambda function, values: torch.func.grad(function)(values)])
def test_forward_mode_and_torch_func_raise_and_name_the_op(name, transform):
    if name == "topk_logits":
        values, function = torch.randn(3, 11), lambda x: sk.topk_logits(x, 3).logits.sum()
    elif name == "sparse_softmax":
        values = torch.randn(3, 4)
        ids = torch.arange(4, dtype=torch.int32).expand(3, 4)
        lse = torch.full((3, 1), 9.0)
        function = lambda x: sk.sparse_softmax(sk.SparseLogits(ids, x, lse)).logprobs.sum()  # noqa: E731
    else:
        values, function = loss_of(name)
    with pytest.raises(NotImplementedError, match=f"^{name} "):
        transform(function, values)


def test_ops_written_in_torch_have_their_second_derivative():
    logits = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, 5, 9])

    def kept(x: Tensor):
        sparse = sk.topk_logits(x, 4, target=target, temperatures=(1.0, 2.0))
        return sparse.logits, sparse.lse, sparse.target_logit

    def probabilities(x: Tensor):
        return sk.sparse_softmax(sk.topk_logits(x, 4), rest="ghost")

    assert torch.autograd.gradgradcheck(kept, logits)
    assert torch.autograd.gradgradcheck(probabilities, logits)


@pytest.mark.parametrize(("name", "reduction"), CASES)
@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_caller_may_overwrite_the_gradient_of_a_retained_graph(name, reduction, factor, dtype):
    values, loss = loss_of(name, dtype, reduction=reduction)
    leaf = values.clone().requires_grad_()
    out = loss(leaf)
    upstream = torch.full_like(out, factor)
    (first,) = torch.autograd.grad(out, leaf, upstream, retain_graph=True)
    expected = first.clone()
    first.mul_(1e3)
    assert_same_bits(torch.autograd.grad(out, leaf, upstream, retain_graph=True)[0], expected)
    first.data.zero_()
    for _ in range(2):
        out.backward(upstream, retain_graph=True)
        assert_same_bits(leaf.grad, expected)
        leaf.grad.data.zero_()
    out.backward(upstream)
    assert_same_bits(leaf.grad, expected)


@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_a_caller_may_change_the_loss_in_place(name, reduction):
    values, loss = loss_of(name, reduction=reduction)
    halved, plain = values.clone().requires_grad_(), values.clone().requires_grad_()
    out = loss(halved)
    out /= 2
    out.sum().backward()
    (loss(plain) / 2).sum().backward()
    assert_same_bits(halved.grad, plain.grad)


@pytest.mark.parametrize(("name", "reduction"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_gradients_are_those_of_a_loop(name, reduction, dtype):
    values, loss = loss_of(name, dtype, reduction=reduction)
    leaf = values.clone().requires_grad_()
    out = loss(leaf)
    upstreams = torch.rand(3, *out.shape)
    (batched,) = torch.autograd.grad(out, leaf, upstreams, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, leaf, upstream, retain_graph=True)[0] for upstream in upstreams]
    torch.testing.assert_close(batched, torch.stack(one_by_one), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_scalar_factor_is_rounded_once(name, retain_graph):
    values, loss = loss_of(name, torch.bfloat16)
    scaled, plain = values.clone().requires_grad_(), values.clone().requires_grad_()
    (loss(scaled) / 3).backward(retain_graph=retain_graph)
    loss(plain).backward()
    third = torch.tensor(1.0) / 3
    assert_same_bits(scaled.grad, (plain.grad.float() * third).bfloat16())


@pytest.mark.parametrize("infinity", [-torch.inf, torch.inf])
def test_topk_logits_gives_no_gradient_to_a_row_that_was_not_used(infinity):
    logits = torch.randn(2, 40)
    logits[0] = infinity if infinity < 0 else logits[0]
    logits[0, 3] = infinity
    for use in (
        lambda sparse: sparse.logits[1].sum(),
        lambda sparse: sparse.lse[1].sum(),
        lambda sparse: sk.sparse_softmax(sparse).logprobs[1].sum(),
        lambda sparse: sk.sparse_softmax(sparse, rest="ghost").tail_logprob[1],
    ):
        leaf = logits.clone().requires_grad_()
        use(sk.topk_logits(leaf, 5)).backward()
        assert not leaf.grad[0].any()
        assert leaf.grad[1].isfinite().all()
        assert leaf.grad[1].any()
