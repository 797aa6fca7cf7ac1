"""``gather_logits`` and ``linear_gather_logits`` against the reference, and against ``topk_logits`` at its own ids."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from support.helpers import (
    DTYPES,
    LAYOUTS,
    assert_as_accurate,
    assert_rows_match,
    assert_same_bits,
    explain,
    hostile_rows,
    largest_allocation,
    opcheck_calls_of,
    recorded_ops,
    sparse_fields,
)

import slimkernels as sk
from slimkernels import SparseLogits, reference

INF, NAN = math.inf, math.nan


def random_ids(num_rows: int, vocab_size: int, top_k: int, seed: int = 0, ragged: bool = False) -> torch.Tensor:
    """Draws ascending ids (num_rows, top_k); ``ragged`` pads all rows but the first, the last one whole."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_rows, vocab_size, generator=generator).argsort(-1)[:, :top_k]
    if ragged:
        counts = torch.linspace(top_k, 0, num_rows).long()
        ids = ids.masked_fill(torch.arange(top_k) >= counts[:, None], vocab_size)
    ids = ids.sort(-1).values
    return ids.masked_fill(ids == vocab_size, -1).to(torch.int32)


def assert_gathered(actual: SparseLogits, logits: torch.Tensor, ids: torch.Tensor, **options) -> None:
    expected = reference.gather_logits(logits, ids, **options)
    assert_rows_match(actual, expected, reference.gather_logits(logits.double(), ids, **options), logits)


def test_gather_logits_hand_worked():
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)], [INF, 0.0, 0.0], [-INF] * 3], dtype=torch.float64)
    ids = torch.tensor([[0, 2], [1, 2], [1, -1]], dtype=torch.int32)
    sparse = sk.gather_logits(logits, ids, target=torch.tensor([1, -1, 2]), temperatures=(1.0, 0.5))
    assert_same_bits(sparse.logits, torch.tensor([[0.0, math.log(5.0)], [0.0, 0.0], [-INF, 0.0]], dtype=torch.float64))
    # exp(x / 0.5) squares the exponentials: 1 + 4 + 25, of which 4 is not gathered.
    expected = torch.tensor([[math.log(8.0), math.log(30.0)], [INF] * 2, [-INF] * 2], dtype=torch.float64)
    torch.testing.assert_close(sparse.lse, expected, rtol=1e-15, atol=0)
    expected = torch.tensor([[math.log(2.0), math.log(4.0)], [INF] * 2, [-INF] * 2], dtype=torch.float64)
    torch.testing.assert_close(sparse.rest_lse, expected, rtol=1e-15, atol=0)
    expected = torch.tensor([math.log(2.0), NAN, -INF], dtype=torch.float64)
    torch.testing.assert_close(sparse.target_logit, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [37, 1000, 2100])
def test_gather_logits_of_hostile_rows(dtype, vocab_size):
    rows = hostile_rows(vocab_size, dtype)
    batch = torch.stack(list(rows.values()))
    for top_k in sorted({1, vocab_size // 20 + 1, vocab_size - 1, vocab_size}):
        ids = random_ids(len(batch), vocab_size, top_k, ragged=top_k == vocab_size // 20 + 1)
        with explain(f"K={top_k}"):
            assert_gathered(sk.gather_logits(batch, ids, temperatures=(1.0, 0.5)), batch, ids, temperatures=(1.0, 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_logits_of_every_small_size(dtype):
    for vocab_size in (*range(1, 36), 63, 64, 65, 255, 257):
        logits = torch.randn(2, vocab_size).to(dtype)
        for top_k in {1, vocab_size // 3 + 1, vocab_size}:
            ids = random_ids(2, vocab_size, top_k, seed=top_k)
            with explain(f"V={vocab_size}, K={top_k}"):
                assert_gathered(sk.gather_logits(logits, ids), logits, ids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_logits_at_the_ids_of_topk_logits_equals_it(dtype):
    logits = (4 * torch.randn(5, 9001)).to(dtype)
    options = {"target": torch.tensor([3, -1, 9000, 8, 0]), "temperatures": (1.0, 0.5, 3.0)}
    largest = sk.topk_logits(logits, 450, **options)
    gathered = sk.gather_logits(logits, largest.ids, **options)
    assert_same_bits([gathered.ids, gathered.logits], [largest.ids, largest.logits])
    assert_same_bits(gathered.target_logit, largest.target_logit)
    rounding = 1e-13 if dtype == torch.float64 else 2e-6
    for name in ("lse", "rest_lse"):
        torch.testing.assert_close(getattr(gathered, name), getattr(largest, name), rtol=0, atol=rounding)


@pytest.mark.parametrize("gap", [-200.0, -44.0, 0.0, 44.0, 200.0])
def test_gather_logits_rest_lse_does_not_cancel(gap):
    # Of a rest of exp(-gap) of the row float32 knows nothing beyond a gap of 16; a negative one is the rest's own.
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 5000, generator=generator, dtype=torch.float64)
    ids = random_ids(4, 5000, 100)
    logits = logits.scatter_add(1, ids.long(), torch.full((4, 100), gap, dtype=torch.float64)).float()
    sparse = sk.gather_logits(logits, ids, temperatures=(1.0, 0.5, 3.0))
    off = logits.double().scatter(-1, ids.long(), -INF)
    for column, temperature in enumerate(sparse.temperatures):
        for actual, entries in ((sparse.lse, logits.double()), (sparse.rest_lse, off)):
            expected = torch.logsumexp(entries / temperature, -1)
            torch.testing.assert_close(actual[:, column].double(), expected, rtol=2e-7, atol=2e-6)


@pytest.mark.parametrize("leading_shape", [(), (0,), (1,), (2, 3), (2, 0, 3)])
def test_gather_logits_keeps_leading_dimensions(leading_shape):
    logits, target = torch.randn(*leading_shape, 50), torch.randint(50, leading_shape)
    ids = random_ids(math.prod(leading_shape), 50, 7).reshape(*leading_shape, 7)
    sparse = sk.gather_logits(logits, ids, target=target, temperatures=(1.0, 2.0))
    assert sparse.ids.shape == (*leading_shape, 7)
    assert_gathered(sparse, logits, ids, target=target, temperatures=(1.0, 2.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_logits_of_any_layout(layout, dtype):
    logits, ids, target = torch.randn(5, 301).to(dtype), random_ids(5, 301, 16), torch.randint(301, (5,))
    actual = sk.gather_logits(LAYOUTS[layout](logits), ids.t().contiguous().t(), target=target)
    assert_same_bits(sparse_fields(actual), sparse_fields(sk.gather_logits(logits, ids.long(), target=target)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_logits_is_bitwise_repeatable_and_batch_invariant(dtype):
    logits = torch.stack(list(hostile_rows(4100, dtype).values()))
    ids = random_ids(len(logits), 4100, 205, ragged=True)
    whole = sparse_fields(sk.gather_logits(logits, ids, temperatures=(1.0, 1.5)))
    assert_same_bits(sparse_fields(sk.gather_logits(logits, ids, temperatures=(1.0, 1.5))), whole)
    for row in (0, 11, len(logits) - 1):
        one = slice(row, row + 1)
        alone = sparse_fields(sk.gather_logits(logits[one], ids[one], temperatures=(1.0, 1.5)))
        assert_same_bits(alone, [field[one] for field in whole])


def gradients(function, operands, ids, weights, **options) -> list[torch.Tensor]:
    leaves = [operand.clone().requires_grad_() for operand in operands]
    sparse = function(*leaves, ids, **options)
    fields = (sparse.logits, sparse.lse, sparse.rest_lse, sparse.target_logit.nan_to_num(0.0))
    total = sum((each * weight.to(each)).sum() for each, weight in zip(fields, weights, strict=True))
    return list(torch.autograd.grad(total, leaves))


def upstream(num_rows: int, top_k: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = (num_rows, top_k), (num_rows, 2), (num_rows, 2), (num_rows,)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_logits_gradient(dtype):
    logits, ids, target = torch.randn(4, 61).to(dtype), random_ids(4, 61, 9, ragged=True), torch.tensor([3, -1, 60, 3])
    weights, options = upstream(4, 9), {"target": target, "temperatures": (1.0, 2.0)}
    # The rows with padding have a rest; the row that gathers nothing has no kept logit.
    (ours,) = gradients(sk.gather_logits, [logits], ids, weights, **options)
    (theirs,) = gradients(reference.gather_logits, [logits], ids, weights, **options)
    (truth,) = gradients(reference.gather_logits, [logits.double()], ids, weights, **options)
    assert_as_accurate(ours, theirs, truth)


def test_gather_logits_gradient_is_zero_at_the_ids_of_a_far_rest():
    logits, ids = torch.randn(3, 213), random_ids(3, 213, 9)
    logits = logits.scatter_add(1, ids.long(), torch.full((3, 9), 200.0)).requires_grad_()
    (grad,) = torch.autograd.grad(sk.gather_logits(logits, ids).rest_lse.sum(), logits)
    off = logits.detach().double().scatter(-1, ids.long(), -INF)
    torch.testing.assert_close(grad, torch.softmax(off, -1).float(), rtol=4e-6, atol=0)


def test_gather_logits_gradcheck():
    logits = torch.randn(3, 13, dtype=torch.float64, requires_grad=True)
    ids, target = random_ids(3, 13, 4, ragged=True), torch.tensor([1, 5, 12])

    def fields(logits):
        sparse = sk.gather_logits(logits, ids, target=target, temperatures=(1.0, 0.7))
        return sparse.logits, sparse.lse, sparse.rest_lse, sparse.target_logit

    assert torch.autograd.gradcheck(fields, (logits,))


@pytest.mark.parametrize("target", [None, torch.tensor([1, 20, 4])])
def test_gather_logits_opcheck(target):
    logits, ids = torch.randn(3, 21, requires_grad=True), random_ids(3, 21, 4)
    names = opcheck_calls_of(sk.gather_logits, logits, ids, target=target, temperatures=(1.0, 2.0))
    assert names == ["slimkernels::gather_logits"]


@pytest.mark.parametrize(
    "make", [lambda x, ids, y: sk.gather_logits(x, ids, target=y), lambda x, ids, y: sk.topk_logits(x, 4, target=y)]
)
def test_rows_without_a_label_are_traced_like_others(make):
    # opcheck itself compares outputs with NaN != NaN, and a row without a label has the target_logit NaN.
    ids, target = random_ids(3, 21, 4), torch.tensor([1, -1, 4])

    def outputs_and_gradient(function):
        logits = torch.randn(3, 21, generator=torch.Generator().manual_seed(3)).requires_grad_()
        rows = function(logits, ids, target)
        loss = rows.logits.sum() + rows.lse.sum() + rows.target_logit.nansum()
        return *sparse_fields(rows), *torch.autograd.grad(loss, logits)

    with recorded_ops() as mode:
        expected = outputs_and_gradient(make)
    for op, args, options in mode.calls:
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(
            op, [a.detach() if isinstance(a, torch.Tensor) else a for a in args], options, test_utils=checks
        )
    compiled = torch.compile(make, fullgraph=True, dynamic=True, backend="aot_eager")
    for actual, wanted in zip(outputs_and_gradient(compiled), expected, strict=True):
        assert_same_bits(actual, wanted)
    assert expected[-1].isfinite().all()


def problem(dtype=torch.float32, num_rows=7, hidden_size=12, vocab_size=61, top_k=5):
    generator = torch.Generator().manual_seed(2)
    shapes = (num_rows, hidden_size), (vocab_size, hidden_size), (vocab_size,)
    operands = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return operands, random_ids(num_rows, vocab_size, top_k, ragged=True)


def plain(hidden, weight, bias, ids, softcap=None, logit_scale=1.0, **options):
    """Computes the logits whole, with the arithmetic that the op promises."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None or logit_scale != 1:
        logits = logit_scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return sk.gather_logits(logits, ids, **options)


OPTIONS = {
    "plain": {},
    "capped": {"softcap": 3.0, "logit_scale": 0.7},
    "scaled": {"logit_scale": 1.5},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_linear_gather_logits_equals_the_plain_computation(dtype, name, chunk_rows):
    (hidden, weight, bias), ids = problem(dtype)
    options = {"target": torch.tensor([3, -1, 60, 3, 0, 1, 2]), "temperatures": (1.0, 2.0)} | OPTIONS[name]
    actual = sk.linear_gather_logits(hidden, weight, ids, bias=bias, chunk_rows=chunk_rows, **options)
    expected = plain(hidden, weight, bias, ids, **options)
    # A product of fewer rows may sum in another order.
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 5e-2)
    for ours, theirs in zip(sparse_fields(actual), sparse_fields(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_linear_gather_logits_gradient(dtype, name):
    operands, ids = problem(dtype)
    options = {"target": torch.tensor([3, -1, 60, 3, 0, 1, 2]), "temperatures": (1.0, 2.0)} | OPTIONS[name]
    weights = upstream(7, 5)

    def op(hidden, weight, bias, ids, **options):
        return sk.linear_gather_logits(hidden, weight, ids, bias=bias, chunk_rows=3, **options)

    ours = gradients(op, operands, ids, weights, **options)
    theirs = gradients(plain, operands, ids, weights, **options)
    truth = gradients(plain, [operand.double() for operand in operands], ids, weights, **options)
    for one, other, exact in zip(ours, theirs, truth, strict=True):
        assert_as_accurate(one, other, exact)


def test_linear_gather_logits_gradcheck_and_unneeded_gradients():
    (hidden, weight, bias), ids = problem(torch.float64, vocab_size=13, top_k=4)
    leaves = [operand.requires_grad_() for operand in (hidden, weight, bias)]

    def fields(hidden, weight, bias):
        sparse = sk.linear_gather_logits(hidden, weight, ids, bias=bias, softcap=4.0, chunk_rows=3)
        return sparse.logits, sparse.lse, sparse.rest_lse

    assert torch.autograd.gradcheck(fields, leaves)
    sparse = sk.linear_gather_logits(hidden, weight.detach(), ids)
    (grad,) = torch.autograd.grad(sparse.lse.sum(), hidden)
    torch.testing.assert_close(grad, torch.softmax(hidden @ weight.T, -1) @ weight)
    lse = sk.linear_gather_logits(hidden, weight, ids).lse
    (first,) = torch.autograd.grad(lse.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_gather_logits has no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_linear_gather_logits_of_a_row_without_upstream_has_no_gradient(softcap):
    (hidden, weight, _), ids = problem()
    leaf = hidden.index_fill(0, torch.tensor(1), NAN).requires_grad_()
    sparse = sk.linear_gather_logits(leaf, weight, ids, softcap=softcap)
    (grad,) = torch.autograd.grad(sparse.lse[0].sum() + sparse.rest_lse[0].sum() + sparse.logits[0].sum(), leaf)
    assert not grad[1:].any()
    assert grad[0].isfinite().all()


def test_linear_gather_logits_opcheck():
    (hidden, weight, bias), ids = problem()
    leaves = [operand.requires_grad_() for operand in (hidden, weight, bias)]
    names = opcheck_calls_of(sk.linear_gather_logits, *leaves[:2], ids, bias=leaves[2], softcap=3.0, chunk_rows=3)
    assert names == ["slimkernels::linear_gather_logits"]


def test_linear_gather_logits_never_holds_all_logits():
    (hidden, weight, _), ids = problem(num_rows=1024, hidden_size=16, vocab_size=8192)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def use():
        sk.linear_gather_logits(*leaves, ids, chunk_rows=64).lse.sum().backward()

    # A chunk's logits in float32; the gradient's formula holds a few of that size, and all rows have 16 chunks.
    assert largest_allocation(use) <= 64 * 8192 * 4


@pytest.mark.parametrize("name", ["gather_logits", "linear_gather_logits"])
def test_they_compile_whole(name):
    (hidden, weight, _), ids = problem()
    target = torch.tensor([3, -1, 60, 3, 0, 1, 2])

    def loss(hidden):
        if name == "gather_logits":
            sparse = sk.gather_logits(torch.tanh(hidden @ weight.T), ids, target=target, temperatures=(1.0, 2.0))
        else:
            sparse = sk.linear_gather_logits(torch.tanh(hidden), weight, ids, target=target, temperatures=(1.0, 2.0))
        total = sparse.logits.sum() + sparse.lse.sum() + sparse.rest_lse.square().sum()
        return sparse.ids, sparse.logits, sparse.lse, sparse.rest_lse, total

    eager, compiled = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    expected = loss(eager)
    actual = torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled)
    assert_same_bits(actual, expected)
    expected[-1].backward()
    actual[-1].backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


BAD_IDS = {
    "unsorted": [3, 1],
    "repeated": [1, 1],
    "too large": [1, 5],
    "far too large": [1, 2**32 + 2],
    "negative": [-2, 1],
    "padding first": [-1, 1],
}


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("name", BAD_IDS)
@pytest.mark.parametrize("linear", [False, True])
def test_bad_ids_are_named(name, linear):
    function = functools.partial(sk.gather_logits, torch.zeros(2, 5))
    if linear:
        function = functools.partial(sk.linear_gather_logits, torch.zeros(2, 3), torch.zeros(5, 3), chunk_rows=1)
    with pytest.raises(ValueError, match=r"^ids\[1\] must ascend strictly inside \[0, V\), padding \(-1\) last"):
        function(ids=torch.tensor([[0, 1], BAD_IDS[name]]))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, r"ids must have dtype torch.int32 or torch.int64, got torch.float32", {"ids": torch.zeros(2, 2)}),
        (ValueError, r"ids must have shape \(2, K\), like logits, .*got \(3, 2\)", {"ids": torch.tensor([[0, 1]] * 3)}),
        (ValueError, r"ids must have shape \(2, K\).* got \(2, 0\)", {"ids": torch.zeros(2, 0, dtype=torch.int32)}),
        (ValueError, "ids", {"ids": torch.zeros(2, 1, dtype=torch.int32, device="meta")}),
        (ValueError, "temperatures", {"temperatures": (1.0, 0.0)}),
        (ValueError, "target", {"target": torch.tensor([1])}),
        pytest.param(ValueError, r"target\[1\]", {"target": torch.tensor([1, 5])}, marks=pytest.mark.cpu_kernels),
        (TypeError, "logits", {"logits": torch.zeros(2, 5, dtype=torch.int64)}),
    ],
)
def test_gather_logits_refuses(error, message, options):
    with pytest.raises(error, match=message):
        sk.gather_logits(**{"logits": torch.zeros(2, 5), "ids": torch.tensor([[0, 1]] * 2), **options})


def test_reverse_kl_on_the_students_own_ids():
    """The divergence that the op is for: the teacher at the student's ids, and one bucket for all others."""
    student = torch.randn(6, 40, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 40, dtype=torch.float64)
    ids = sk.topk_logits(student.detach(), 8).ids
    target = torch.randint(40, (6,))
    rows = sk.gather_logits(teacher, ids, target=target)
    loss = sk.slim_loss(
        student, target, rows, divergence="reverse_kl", rest="ghost", ce_weight=0.0, token_weight="none"
    ).loss
    outcomes = []
    for logits in (student, teacher):
        p = torch.softmax(logits, -1)
        on = p.gather(-1, ids.long())
        outcomes.append(torch.cat([on, 1 - on.sum(-1, keepdim=True)], -1))
    p, q = outcomes
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(-1).mean())
