from __future__ import annotations

import contextlib
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from support.helpers import (
    DTYPES,
    HAND_WORKED,
    RESTS_AND_DIVERGENCES,
    assert_same_bits,
    assert_slim_loss_matches,
    column_major,
    hand_worked_problem,
    largest_allocation,
    loss_and_grads,
    misaligned,
    opcheck_calls_of,
    random_problem,
    row_strided,
)

import slimkernels as sk
from slimkernels import SparseLogits, reference
from slimkernels.ops import _chunks, _head_gradients

F64 = torch.float64
DEPTH = 24


def random_head(num_rows=7, vocab_size=203, dtype=torch.float32, depth=DEPTH):
    """hidden (N, D), weight (V, D), bias (V,) whose product has a spread of about 3."""
    generator = torch.Generator().manual_seed(11)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    return (
        randn(num_rows, depth).to(dtype),
        (3.0 / math.sqrt(depth) * randn(vocab_size, depth)).to(dtype),
        randn(vocab_size).to(dtype),
    )


def with_operands(function, *, product=False):
    """``function`` as one of (hidden, weight[, bias], target, teacher); on torch's logits when ``product``."""

    def call(*arguments, **options):
        hidden, weight, *bias, target, teacher = arguments
        bias = bias[0] if bias else None
        if product:
            del options["chunk_rows"]
            return function(F.linear(hidden, weight, bias), target, teacher, **options)
        return function(hidden, weight, target, teacher, bias=bias, **options)

    return call


def assert_matches(operands, target, teacher, **options):
    """Against torch's product in the same dtype with the reference on it, both against the reference in float64."""
    assert_slim_loss_matches(
        with_operands(sk.linear_slim_loss),
        with_operands(reference.slim_loss, product=True),
        with_operands(reference.linear_slim_loss),
        operands,
        target,
        teacher,
        **{"chunk_rows": None, **options},
    )


def test_linear_slim_loss_has_the_options_of_slim_loss():
    ours, theirs = (inspect.signature(f).parameters for f in (sk.linear_slim_loss, sk.slim_loss))
    own = {"hidden", "weight", "bias", "chunk_rows"}
    # The logits of a chunk are always written over.
    assert set(ours) - own == set(theirs) - {"logits", "weight", "inplace_backward"}
    assert all(ours[name].default == theirs[name].default for name in set(ours) - own)


@pytest.mark.parametrize(("rest", "divergence", "options", "expected"), HAND_WORKED)
def test_linear_slim_loss_divergence_hand_worked(rest, divergence, options, expected):
    # The logits are the product of their halves with 2 times the unit matrix.
    logits, target, teacher = hand_worked_problem()
    out = sk.linear_slim_loss(
        logits / 2, 2 * torch.eye(4, dtype=F64), target, teacher, rest=rest, divergence=divergence, **options
    )
    torch.testing.assert_close(out.kd, torch.tensor([expected], dtype=F64), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("rest", "divergence"), RESTS_AND_DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_slim_loss_matches_the_reference(dtype, rest, divergence):
    _, target, teacher = random_problem(dtype=dtype, temperature=1.7, ragged=True)
    options = {"rest": rest, "divergence": divergence, "temperature": 1.7, "upstream": 1.5}
    assert_matches(random_head(dtype=dtype), target, teacher, chunk_rows=3, **options)


OPTIONS = {
    "no teacher": {"teacher": None},
    "student over teacher": {"token_weight": "student_over_teacher"},
    "no weight": {"token_weight": "none"},
    "tensor weight": {"token_weight": torch.linspace(0.0, 2.0, 7)},
    "through the weight": {"detach_weight": False},
    "weights": {"ce_weight": 0.3, "kd_weight": 2.5},
    "ce alone": {"kd_weight": 0.0},
    "label smoothing, z-loss": {"label_smoothing": 0.1, "z_loss_weight": 1e-2},
    "softcap and scale": {"softcap": 7.0, "logit_scale": 1.5},
    "beta": {"divergence": "jsd", "beta": 0.9},
    "alpha": {"divergence": "skew_kl", "alpha": 0.6},
    "teacher_blend": {"divergence": "gated", "teacher_blend": 0.4, "tail_weight": 2.0},
    "ignore_index": {"ignore_index": 5},
    "num_items": {"num_items": 20},
    "num_items tensor": {"num_items": torch.tensor(20.0)},
    "sum": {"reduction": "sum", "upstream": -2.5},
    "none": {"reduction": "none", "upstream": torch.linspace(-1.0, 2.0, 7)},
    "none, one chunk": {"reduction": "none", "upstream": torch.linspace(-1.0, 2.0, 7), "chunk_rows": 100},
    "one chunk": {"chunk_rows": 7},
    "row by row": {"chunk_rows": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_linear_slim_loss_options(dtype, with_bias, name):
    options = {"rest": "ghost", "chunk_rows": 3, **OPTIONS[name]}
    _, target, teacher = random_problem(dtype=dtype)
    if "ignore_index" in options:
        target[target == -100] = 5
        target[3] = 5
    operands = random_head(dtype=dtype)[: 3 if with_bias else 2]
    assert_matches(operands, target, options.pop("teacher", teacher), **options)


@pytest.mark.parametrize(
    ("num_rows", "depth", "vocab_size", "top_k"),
    [(1, 1, 1, 1), (1, 3, 2, 2), (3, 8, 7, 7), (9, 65, 1025, 51), (2, 16, 9001, 450)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_slim_loss_shapes(dtype, num_rows, depth, vocab_size, top_k):
    _, target, teacher = random_problem(num_rows, vocab_size, top_k, dtype=dtype, ignored=())
    for rest, divergence in (("renorm", "forward_kl"), ("ghost", "jsd")):
        operands = random_head(num_rows, vocab_size, dtype, depth)
        assert_matches(operands, target, teacher, rest=rest, divergence=divergence)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_slim_loss_without_teacher_is_cross_entropy(reduction):
    operands = random_head(dtype=F64)
    _, target, _ = random_problem()
    leaves = [operand.clone().requires_grad_() for operand in operands]
    expected = F.cross_entropy(F.linear(*leaves), target, reduction=reduction, label_smoothing=0.1)
    upstream = torch.randn(expected.shape, dtype=F64)
    options = {"reduction": reduction, "label_smoothing": 0.1, "chunk_rows": 2}
    out, grads = loss_and_grads(with_operands(sk.linear_slim_loss), operands, upstream, target, None, **options)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-13)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_slim_loss_does_not_depend_on_the_chunks(chunk_rows, reduction):
    # Small integers make exact products, so the per-token fields agree bit for bit.
    operands = tuple(torch.randint(-3, 4, shape).float() for shape in ((7, DEPTH), (203, DEPTH), (203,)))
    _, target, teacher = random_problem()
    options = {"rest": "ghost", "logit_scale": 0.25, "reduction": reduction}
    call = with_operands(sk.linear_slim_loss)
    expected = sk.slim_loss(F.linear(*operands), target, teacher, **options)
    whole, whole_grads = loss_and_grads(call, operands, 1.0, target, teacher, chunk_rows=7, **options)
    out, grads = loss_and_grads(call, operands, 1.0, target, teacher, chunk_rows=chunk_rows, **options)
    assert_same_bits(out, expected)
    assert_same_bits(whole, expected)
    for grad, wanted in zip(grads, whole_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_slim_loss_with_frozen_operands(needed, reduction):
    operands = random_head()
    _, target, teacher = random_problem()
    call = with_operands(sk.linear_slim_loss)
    expected = loss_and_grads(call, operands, 1.0, target, teacher, reduction=reduction)[1]
    leaves = [operand.clone().requires_grad_(need) for operand, need in zip(operands, needed, strict=True)]
    loss = call(*leaves, target, teacher, reduction=reduction).loss
    loss.sum().backward()
    for leaf, wanted, need in zip(leaves, expected, needed, strict=True):
        if need:
            assert_same_bits(leaf.grad, wanted)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("leading_shape", [(), (1,), (2, 3)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_slim_loss_keeps_leading_dimensions(leading_shape, reduction):
    num_rows = math.prod(leading_shape)
    hidden, weight, _ = random_head(num_rows)
    _, target, teacher = random_problem(num_rows)
    options = {"token_weight": torch.rand(num_rows), "reduction": reduction, "chunk_rows": 2, "statistics": True}
    flat, flat_grads = loss_and_grads(sk.linear_slim_loss, (hidden, weight), 1.0, target, teacher, **options)
    options["token_weight"] = options["token_weight"].reshape(leading_shape)
    out, grads = loss_and_grads(
        sk.linear_slim_loss,
        (hidden.reshape(*leading_shape, DEPTH), weight),
        1.0,
        target.reshape(leading_shape),
        teacher.reshape(*leading_shape),
        **options,
    )
    assert grads[0].shape == (*leading_shape, DEPTH)
    assert_same_bits([grads[0].reshape(num_rows, DEPTH), grads[1]], flat_grads)
    for name, field, wanted in zip(out._fields, out, flat, strict=True):
        assert field.shape == (() if name == "loss" and reduction == "mean" else leading_shape)
        assert_same_bits(field.reshape(-1), wanted.reshape(-1))


@pytest.mark.parametrize("layout", [row_strided, misaligned, column_major])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_slim_loss_of_any_layout(layout, dtype, reduction):
    hidden, weight, bias = random_head(dtype=dtype)
    _, target, teacher = random_problem(dtype=dtype)
    call = with_operands(sk.linear_slim_loss)
    expected = loss_and_grads(call, (hidden, weight, bias), 1.0, target, teacher, reduction=reduction)
    leaves = [layout(hidden), layout(weight), misaligned(bias)]
    out = call(*(leaf.requires_grad_() for leaf in leaves), target, teacher, reduction=reduction)
    grads = torch.autograd.grad(out.loss.sum(), leaves)
    # The product itself may be summed in another order; nothing else may differ.
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for actual, wanted in zip((*out, *grads), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(actual, wanted, **tolerance)


@pytest.mark.parametrize("num_rows", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_slim_loss_without_a_label_is_zero(num_rows, reduction):
    operands = random_head(num_rows, 17)
    _, target, teacher = random_problem(num_rows, 17, 3, ignored=(0, 1, 2))
    call = with_operands(sk.linear_slim_loss)
    out, grads = loss_and_grads(call, operands, 1.0, target, teacher, reduction=reduction, statistics=True)
    assert [grad.shape for grad in grads] == [operand.shape for operand in operands]
    assert not any(tensor.any() for tensor in (*out, *grads))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_slim_loss_second_backward(reduction):
    operands = random_head()
    _, target, teacher = random_problem()
    leaves = [operand.clone().requires_grad_() for operand in operands]
    loss = with_operands(sk.linear_slim_loss)(*leaves, target, teacher, reduction=reduction).loss
    upstream = torch.ones_like(loss)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad, wanted in zip(torch.autograd.grad(loss, leaves, 3.0 * upstream, retain_graph=True), kept, strict=True):
        torch.testing.assert_close(grad, 3.0 * wanted, rtol=1e-5, atol=1e-5)
    assert_same_bits(torch.autograd.grad(loss, leaves, upstream, retain_graph=True), kept)
    # Autograd may refuse once the caller has changed a gradient that the graph keeps; it may not be wrong.
    for grad in first:
        grad.mul_(1e3)
    with contextlib.suppress(RuntimeError):
        assert_same_bits(torch.autograd.grad(loss, leaves, upstream), kept)


def test_linear_slim_loss_detaches_all_but_the_loss():
    hidden, weight, bias = (operand.requires_grad_() for operand in random_head())
    _, target, teacher = random_problem()
    teacher.logits.requires_grad_()
    options = {"bias": bias, "statistics": True}
    out = sk.linear_slim_loss(hidden, weight, target, teacher, **options)
    assert [field.requires_grad for field in out] == [True] + [False] * 12
    out.loss.backward()
    assert teacher.logits.grad is None
    with torch.no_grad():
        assert_same_bits(sk.linear_slim_loss(hidden, weight, target, teacher, **options), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_slim_loss_is_bitwise_repeatable(dtype):
    operands = random_head(dtype=dtype)
    _, target, teacher = random_problem(dtype=dtype)
    call = with_operands(sk.linear_slim_loss)
    runs = [loss_and_grads(call, operands, 1.0, target, teacher, rest="ghost", chunk_rows=3) for _ in range(2)]
    assert_same_bits([*runs[0][0], *runs[0][1]], [*runs[1][0], *runs[1][1]])


def test_linear_slim_loss_weight_gradient_sums_chunks_in_float32():
    # 64 chunks of one row each add 2^-9 of the first to the same entry: bfloat16 would lose every one of them.
    hidden = torch.full((65, 1), 2.0**-6, dtype=torch.bfloat16)
    hidden[0] = 8.0
    target = torch.zeros(65, dtype=torch.int64)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16)
    options = {"reduction": "sum", "chunk_rows": 1}
    _, (_, grad) = loss_and_grads(sk.linear_slim_loss, (hidden, weight), 1.0, target, None, **options)
    # dlogits = (-1/2, 1/2) in every row: 4 + 64 / 128.
    assert grad.tolist() == [[-4.5], [4.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "chunk_rows"),
    # One chunk; a round of several; rounds with a short last one, of one chunk and of several; chunks of more than D.
    [(16, 16), (24, 7), (30, 24), (61, 8), (61, 7), (61, 30)],
)
def test_linear_slim_loss_weight_gradient_in_rounds(dtype, num_rows, chunk_rows):
    problem = random_problem(num_rows, 2500, 30, dtype=dtype)  # three panels of the vocabulary
    operands = random_head(num_rows, 2500, dtype)[:2]
    assert_slim_loss_matches(
        with_operands(sk.linear_slim_loss),
        with_operands(reference.slim_loss, product=True),
        with_operands(reference.slim_loss, product=True),
        operands,
        problem.target,
        problem.teacher,
        chunk_rows=chunk_rows,
        reduction="sum",
    )


@pytest.fixture
def products(monkeypatch):
    """The shape and the row stride of the result of every matrix product, in order."""
    found, multiply = [], torch.mm

    def recorded(*arguments, out):
        found.append((tuple(out.shape), out.stride(0)))
        return multiply(*arguments, out=out)

    monkeypatch.setattr(torch, "mm", recorded)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [3, 7])
def test_linear_slim_loss_of_an_odd_vocabulary_in_aligned_rows(dtype, chunk_rows, monkeypatch, products):
    # The layout of CUDA, on a CPU: it changes where the logits are, and not one bit of the results.
    operands = random_head(7, 203, dtype)[:2]
    _, target, teacher = random_problem(7, 203, 9, dtype=dtype)
    call = with_operands(sk.linear_slim_loss)
    options = {"chunk_rows": chunk_rows, "rest": "ghost"}
    expected = loss_and_grads(call, operands, 1.0, target, teacher, **options)
    monkeypatch.setitem(_chunks._ROW_ALIGNMENT, "cpu", _chunks._ROW_ALIGNMENT["cuda"])
    products.clear()
    actual = loss_and_grads(call, operands, 1.0, target, teacher, **options)
    strides = {stride for shape, stride in products if shape[1] == 203}
    assert strides == {256}
    assert_same_bits(actual[1], expected[1])
    assert_same_bits(actual[0], expected[0])


def test_linear_slim_loss_of_one_chunk_makes_the_weight_gradient_in_one_product(monkeypatch, products):
    hidden, weight = random_head(16, 2500, torch.bfloat16)[:2]  # three panels of the vocabulary
    _, target, teacher = random_problem(16, 2500, 30, dtype=torch.bfloat16)
    call = with_operands(sk.linear_slim_loss)
    expected = loss_and_grads(call, (hidden, weight), 1.0, target, teacher, chunk_rows=16)
    monkeypatch.setitem(_head_gradients._WHOLE_ROUNDS, "cpu", _head_gradients._WHOLE_ROUNDS["cuda"])
    products.clear()
    actual = loss_and_grads(call, (hidden, weight), 1.0, target, teacher, chunk_rows=16)
    assert [shape for shape, _ in products] == [(16, 2500), (16, DEPTH), (2500, DEPTH)]
    for ours, panels in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(ours, panels)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_slim_loss_never_holds_all_logits(reduction):
    hidden, weight, bias = (operand.requires_grad_() for operand in random_head(256, 1000, depth=8))
    _, target, teacher = random_problem(256, 1000, 5)

    def step():
        loss = sk.linear_slim_loss(hidden, weight, target, teacher, bias=bias, reduction=reduction, chunk_rows=8).loss
        loss.sum().backward()

    assert largest_allocation(step) <= 256 * 1000 * 4 / 16


@pytest.mark.parametrize(
    ("rest", "divergence"), [("ghost", "jsd"), ("renorm", "forward_kl"), ("renorm_both", "skew_kl")]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_slim_loss_gradcheck(rest, divergence, reduction):
    operands = random_head(3, 9, F64, depth=4)
    _, target, teacher = random_problem(3, 9, 4, dtype=F64, ignored=(1,))
    options = {"softcap": 9.0, "logit_scale": 0.8, "label_smoothing": 0.1, "z_loss_weight": 1e-2, "chunk_rows": 2}

    def loss(*operands):
        call = with_operands(sk.linear_slim_loss)
        options_here = {"rest": rest, "divergence": divergence, "detach_weight": False, "reduction": reduction}
        return call(*operands, target, teacher, **options_here, **options).loss

    assert torch.autograd.gradcheck(loss, tuple(operand.requires_grad_() for operand in operands))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_slim_loss_opcheck(reduction):
    operands = (operand.requires_grad_() for operand in random_head(4, 21, depth=8))
    _, target, teacher = random_problem(4, 21, 5)
    call = with_operands(sk.linear_slim_loss)
    names = opcheck_calls_of(call, *operands, target, teacher, rest="ghost", reduction=reduction, chunk_rows=3)
    assert "slimkernels::linear_slim_loss_fwd" in names


# Inductor itself imports what torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_linear_slim_loss_compiles_whole(backend):
    operands = random_head(4, 21, depth=8)
    _, target, teacher = random_problem(4, 21, 5)

    def loss(hidden, weight, bias, target, ids, values, lse, target_logit):
        record = SparseLogits(ids, values, lse, target_logit=target_logit)
        return sk.linear_slim_loss(hidden * 1.5, weight, target, record, bias=bias, rest="ghost", chunk_rows=3).loss

    fields = (target, teacher.ids, teacher.logits, teacher.lse, teacher.target_logit)
    eager, compiled = ([operand.clone().requires_grad_() for operand in operands] for _ in range(2))
    expected = loss(*eager, *fields)
    actual = torch.compile(loss, fullgraph=True, backend=backend)(*compiled, *fields)
    torch.testing.assert_close(actual, expected)
    expected.backward()
    actual.backward()
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "weight", {"weight": torch.zeros(203, DEPTH - 1)}),
        (ValueError, "weight", {"weight": torch.zeros(DEPTH)}),
        (TypeError, "weight", {"weight": torch.zeros(203, DEPTH, dtype=torch.bfloat16)}),
        (ValueError, "weight", {"weight": torch.zeros(203, DEPTH, device="meta")}),
        (TypeError, "hidden", {"hidden": torch.zeros(7, DEPTH, dtype=torch.int64)}),
        (ValueError, "bias", {"bias": torch.zeros(DEPTH)}),
        (ValueError, "token_weight", {"token_weight": "other"}),
        (ValueError, "token_weight", {"token_weight": torch.ones(3)}),
        (ValueError, "chunk_rows", {"chunk_rows": 0}),
        (ValueError, "rest", {"rest": "renorm", "divergence": "jsd"}),
        (ValueError, "temperature", {"temperature": -1.0}),
        (ValueError, "num_items", {"num_items": 3, "reduction": "sum"}),
        (ValueError, "target", {"target": torch.zeros(6, dtype=torch.int64)}),
        pytest.param(ValueError, "target", {"target": torch.full((7,), 203)}, marks=pytest.mark.cpu_kernels),
        (ValueError, "teacher", {"teacher": random_problem(6).teacher}),
        pytest.param(
            ValueError, "ids", {"teacher": random_problem(7, 500, 400).teacher}, marks=pytest.mark.cpu_kernels
        ),
    ],
)
def test_linear_slim_loss_refuses(error, message, options):
    hidden, weight, _ = random_head()
    _, target, teacher = random_problem()
    arguments = {"hidden": hidden, "weight": weight, "target": target, "teacher": teacher, **options}
    with pytest.raises(error, match=message):
        sk.linear_slim_loss(**arguments)
