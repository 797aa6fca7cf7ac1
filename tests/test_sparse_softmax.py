from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.helpers import (
    DTYPES,
    LAYOUTS,
    assert_as_accurate,
    assert_fields_and_grads_as_accurate,
    assert_same_bits,
    explain,
    hand_worked_problem,
    misaligned,
    opcheck_calls_of,
    random_problem,
    to_dtype,
)

import slimkernels as sk
from slimkernels import SparseLogits, reference

F64 = torch.float64
INF, NAN = math.inf, math.nan
CLOSE = {"rtol": 1e-13, "atol": 1e-14}
DIFFERENTIABLE = ("logits", "lse", "rest_lse")


def probs_and_grads(function, sparse: SparseLogits, **options):
    """The two outputs and the gradients of logits, lse and rest_lse under fixed random upstream gradients."""
    fields = {"logits": sparse.logits, "lse": sparse.lse}
    fields |= {} if sparse.rest_lse is None else {"rest_lse": sparse.rest_lse}
    leaves = {name: field.detach().clone().requires_grad_() for name, field in fields.items()}
    out = function(dataclasses.replace(sparse, **leaves), **options)
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(field.shape, generator=generator, dtype=F64).to(field) for field in out]
    # "renorm" and others have a constant tail, to torch.
    live = [index for index, field in enumerate(out) if field.requires_grad]
    grads = torch.autograd.grad(
        [out[i] for i in live],
        tuple(leaves.values()),
        [upstream[i] for i in live],
        allow_unused=True,
        materialize_grads=True,
    )
    return out, grads


def assert_matches(sparse: SparseLogits, **options) -> None:
    actual = probs_and_grads(sk.sparse_softmax, sparse, **options)
    theirs = probs_and_grads(reference.sparse_softmax, sparse, **options)
    truth = probs_and_grads(reference.sparse_softmax, to_dtype(sparse, F64), **options)
    assert_fields_and_grads_as_accurate(actual, theirs, truth)


@pytest.mark.parametrize(
    ("rest", "probs", "tail"),
    [
        ("renorm", [2 / 3, 1 / 3], 0.0),
        ("renorm_both", [2 / 3, 1 / 3], 0.0),
        ("zero", [1 / 2, 1 / 4], 0.0),
        ("ghost", [1 / 2, 1 / 4], 1 / 4),
        ("zero_logit", [8 / 14, 4 / 14], 2 / 14),
    ],
)
def test_sparse_softmax_hand_worked(rest, probs, tail):
    actual = sk.sparse_softmax(hand_worked_problem().teacher, rest=rest, vocab_size=4)
    torch.testing.assert_close(actual.logprobs.exp(), torch.tensor([probs], dtype=F64), **CLOSE)
    torch.testing.assert_close(actual.tail_logprob.exp(), torch.tensor([tail], dtype=F64), **CLOSE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rest", reference.RESTS)
def test_sparse_softmax_matches_the_reference(rest, dtype):
    for num_rows, vocab_size, top_k in ((1, 19, 1), (3, 7, 4), (5, 203, 17), (3, 301, 129), (2, 9001, 1601)):
        for temperature in (1.0, 1.7):
            sparse = random_problem(num_rows, vocab_size, top_k, dtype=dtype, temperature=temperature).teacher
            with explain(f"V={vocab_size}, K={top_k}, T={temperature}"):
                assert_matches(sparse, rest=rest, temperature=temperature, vocab_size=vocab_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_softmax_of_the_whole_vocabulary(dtype):
    sparse = random_problem(5, 31, 31, dtype=dtype).teacher
    expected = torch.log_softmax(sparse.logits.double(), -1)
    for rest in reference.RESTS:
        out = sk.sparse_softmax(sparse, rest=rest, vocab_size=31)
        assert_as_accurate(out.logprobs, expected.to(out.logprobs.dtype), expected)
        assert (out.tail_logprob == -INF).all()


@pytest.mark.parametrize("rest", reference.RESTS)
def test_sparse_softmax_never_reads_padding(rest):
    # The records of random_problem(ragged=True) hold NaN at padding.
    sparse = random_problem(9, 53, 12, ragged=True).teacher
    assert (sparse.ids < 0).any()
    assert_matches(sparse, rest=rest, vocab_size=53)
    out, (grad, *_) = probs_and_grads(sk.sparse_softmax, sparse, rest=rest, vocab_size=53)
    assert (out.logprobs[sparse.ids < 0] == -INF).all()
    assert not grad[sparse.ids < 0].any()


@pytest.mark.parametrize("rest", reference.RESTS)
def test_sparse_softmax_edges(rest):
    sparse = random_problem(3, 53, 6).teacher
    sparse.logits[0, 2] = -INF
    sparse.ids[1] = -1
    sparse.lse[2] = torch.logsumexp(sparse.logits[2], -1) - 1e-6
    old = dataclasses.replace(sparse, rest_lse=None)
    partly = dataclasses.replace(sparse, rest_lse=sparse.rest_lse.clone())
    partly.rest_lse[2] = NAN
    for record in (sparse, old, partly):
        assert_matches(record, rest=rest, vocab_size=53)
    if rest == "ghost":
        for record in (old, partly):
            assert sk.sparse_softmax(record, rest=rest).tail_logprob[1:].tolist() == [0.0, -INF]


@pytest.mark.parametrize("rest", reference.RESTS)
def test_sparse_softmax_of_ids_without_mass(rest):
    sparse = random_problem(3, 53, 6).teacher
    sparse.logits[1] = -INF
    assert_matches(sparse, rest=rest, vocab_size=53)
    assert (sk.sparse_softmax(sparse, rest=rest, vocab_size=53).logprobs[1] == -INF).all()


@pytest.mark.parametrize("rest", reference.RESTS)
@pytest.mark.parametrize("top_k", [6, 53])
def test_sparse_softmax_of_a_row_without_mass(top_k, rest):
    sparse = random_problem(4, 53, top_k).teacher
    for values in (sparse.logits, sparse.lse, sparse.rest_lse):
        values[[0, 2]] = -INF
    sparse.rest_lse[2:] = NAN
    for record in (sparse, dataclasses.replace(sparse, rest_lse=None)):
        assert_matches(record, rest=rest, vocab_size=53)
        out = sk.sparse_softmax(record, rest=rest, vocab_size=53)
        assert (out.logprobs[[0, 2]] == -INF).all()
        # Under "zero_logit" the unkept ids have the logit 0, whatever the teacher says.
        expected = 0.0 if rest == "zero_logit" and top_k < 53 else -INF
        assert out.tail_logprob[[0, 2]].tolist() == [expected, expected]


@pytest.mark.parametrize("rest", reference.RESTS)
def test_sparse_softmax_of_no_rows(rest):
    out, grads = probs_and_grads(sk.sparse_softmax, random_problem(0, 9, 2).teacher, rest=rest, vocab_size=9)
    assert [tuple(tensor.shape) for tensor in (*out, *grads)] == [(0, 2), (0,), (0, 2), (0, 1), (0, 1)]


@pytest.mark.parametrize("tail_mass", [1e-14, 1e-3, 0.3, 0.9, 1 - 1e-9])
def test_sparse_softmax_tail_does_not_cancel(tail_mass):
    lse = torch.tensor([[-math.log1p(-tail_mass)]], dtype=F64)
    sparse = SparseLogits(torch.tensor([[3]], dtype=torch.int32), torch.zeros(1, 1, dtype=F64), lse)
    expected = reference.sparse_softmax(sparse, rest="ghost").tail_logprob
    torch.testing.assert_close(sk.sparse_softmax(sparse, rest="ghost").tail_logprob, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_tail", [-0.1, -2.0, -12.6, -30.0, -69.1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sparse_softmax_tail_of_a_known_rest_is_exact(log_tail, temperature, dtype):
    logits = torch.randn(4, 2000, generator=torch.Generator().manual_seed(3), dtype=F64) / 4
    # The 100 kept logits lie so far above the 1900 others that those have about the wanted share.
    logits[:, :100] += max(-log_tail * temperature + math.log(1900 / 100), 3.0)
    logits = logits.to(dtype)
    sparse = sk.topk_logits(logits, 100, temperatures=(1.0, temperature))
    out = sk.sparse_softmax(sparse, temperature=temperature, rest="ghost")
    log_q = torch.log_softmax(logits.double() / temperature, -1)
    tail = torch.logsumexp(log_q.scatter(-1, sparse.ids.long(), -INF), -1)
    tolerance = 1e-12 if dtype == F64 else 1e-5
    torch.testing.assert_close(out.tail_logprob.double(), tail, rtol=0, atol=tolerance)
    torch.testing.assert_close(out.logprobs.double(), log_q.gather(-1, sparse.ids.long()), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_softmax_of_quantised_logits_sums_to_one(dtype):
    sparse = random_problem(9, 203, 17, dtype=dtype).teacher
    rounded = dataclasses.replace(sparse, logits=(sparse.logits * 4).round() / 4)
    out = sk.sparse_softmax(rounded, rest="ghost")
    total = out.logprobs.double().exp().sum(-1) + out.tail_logprob.double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12 if dtype == F64 else 1e-6)


def test_sparse_softmax_of_a_rest_that_is_not_known_is_that_of_a_record_without_it():
    sparse = random_problem(6, 53, 6).teacher
    partly = dataclasses.replace(sparse, rest_lse=sparse.rest_lse.clone())
    partly.rest_lse[::2] = NAN
    known, unknown = (
        probs_and_grads(sk.sparse_softmax, each, rest="ghost")
        for each in (sparse, dataclasses.replace(sparse, rest_lse=None))
    )
    out, grads = probs_and_grads(sk.sparse_softmax, partly, rest="ghost")
    for field, with_rest, without in zip(
        (*out, *grads[:2]), (*known[0], *known[1][:2]), (*unknown[0], *unknown[1]), strict=True
    ):
        assert_same_bits(field[::2], without[::2])
        assert_same_bits(field[1::2], with_rest[1::2])
    assert not grads[2][::2].any()
    assert not grads[1][1::2].any()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_sparse_softmax_of_hostile_rests(dtype):
    sparse = random_problem(5, 53, 6, dtype=dtype).teacher
    sparse.rest_lse[:3] = torch.tensor([[-INF], [INF], [80.0]])
    sparse.logits[3:] = -INF
    sparse.rest_lse[4] = -INF
    out, grads = probs_and_grads(sk.sparse_softmax, sparse, rest="ghost")
    assert out.tail_logprob[[0, 4]].tolist() == [-INF, -INF]
    assert out.tail_logprob[3] == 0.0
    assert (out.logprobs[3:] == -INF).all()
    assert out.logprobs[0].exp().sum().item() == pytest.approx(1.0)
    for grad in grads:
        assert grad[[0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("rest", reference.RESTS)
def test_sparse_softmax_gradcheck(rest):
    teacher = to_dtype(random_problem(3, 19, 5, ragged=True, temperature=1.7).teacher, F64)

    def probs(logits, lse, rest_lse=None):
        sparse = SparseLogits(teacher.ids, logits, lse, teacher.temperatures, rest_lse=rest_lse)
        out = sk.sparse_softmax(sparse, temperature=1.7, rest=rest, vocab_size=19)
        return out.logprobs[teacher.ids >= 0], out.tail_logprob.masked_fill(out.tail_logprob == -INF, 0.0)

    logits = teacher.logits.nan_to_num(0.0).requires_grad_()
    lse, rest_lse = (field.clone().requires_grad_() for field in (teacher.lse, teacher.rest_lse))
    assert torch.autograd.gradcheck(probs, (logits, lse))
    assert torch.autograd.gradcheck(probs, (logits, lse, rest_lse))


@pytest.mark.parametrize("leading_shape", [(), (0,), (2, 3), (2, 0, 3)])
def test_sparse_softmax_keeps_leading_dimensions(leading_shape):
    flat = random_problem(math.prod(leading_shape), 31, 4).teacher
    expected = sk.sparse_softmax(flat, rest="ghost")
    out = sk.sparse_softmax(flat.reshape(*leading_shape), rest="ghost")
    assert out.logprobs.shape == (*leading_shape, 4)
    assert out.tail_logprob.shape == leading_shape
    assert_same_bits(out.logprobs.reshape(-1, 4), expected.logprobs)
    assert_same_bits(out.tail_logprob.reshape(-1), expected.tail_logprob)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_softmax_of_any_layout(dtype, layout):
    sparse = random_problem(5, 203, 17, dtype=dtype).teacher
    logits = LAYOUTS[layout](sparse.logits)
    ids = misaligned(sparse.ids) if layout == "misaligned" else sparse.ids.t().contiguous().t()
    lse, rest_lse = (torch.cat([field, field], -1)[:, :1] for field in (sparse.lse, sparse.rest_lse))
    strange = SparseLogits(ids, logits, lse, rest_lse=rest_lse)
    assert_same_bits(sk.sparse_softmax(strange, rest="ghost"), sk.sparse_softmax(sparse, rest="ghost"))


@pytest.mark.parametrize("rest", reference.RESTS)
def test_sparse_softmax_is_bitwise_repeatable_and_batch_invariant(rest):
    sparse = random_problem(9, 2051, 103).teacher
    whole = sk.sparse_softmax(sparse, rest=rest, vocab_size=2051)
    assert_same_bits(sk.sparse_softmax(sparse, rest=rest, vocab_size=2051), whole)
    for row in (0, 8):
        one = slice(row, row + 1)
        alone = sk.sparse_softmax(sparse[one], rest=rest, vocab_size=2051)
        assert_same_bits(alone, [field[one] for field in whole])


def test_sparse_softmax_opcheck():
    for rest in ("ghost", "zero_logit"):
        sparse = random_problem(3, 21, 4).teacher
        sparse.logits.requires_grad_()
        sparse.rest_lse.requires_grad_()
        names = opcheck_calls_of(sk.sparse_softmax, sparse, rest=rest, vocab_size=21)
        assert names == ["slimkernels::sparse_softmax"]


def test_sparse_softmax_compiles_whole():
    teacher = random_problem(3, 21, 4).teacher

    def tail(logits):
        sparse = SparseLogits(teacher.ids, logits * 0.5, teacher.lse, rest_lse=teacher.rest_lse)
        out = sk.sparse_softmax(sparse, rest="ghost")
        return out.logprobs, out.tail_logprob

    eager, compiled = teacher.logits.clone().requires_grad_(), teacher.logits.clone().requires_grad_()
    expected, actual = tail(eager), torch.compile(tail, fullgraph=True, backend="aot_eager")(compiled)
    assert_same_bits(actual, expected)
    sum(field.sum() for field in expected).backward()
    sum(field.sum() for field in actual).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("rest", {"rest": "other"}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": NAN}),
        ("temperature", {"temperature": 2.0, "rest": "ghost"}),
        ("temperature", {"temperature": 2.0, "rest": "zero"}),
        ("vocab_size", {"rest": "zero_logit"}),
        ("vocab_size", {"rest": "zero_logit", "vocab_size": 0}),
        pytest.param("ids", {"rest": "zero_logit", "vocab_size": 20}, marks=pytest.mark.cpu_kernels),
    ],
)
def test_sparse_softmax_refuses(message, options):
    sparse = random_problem().teacher
    with pytest.raises(ValueError, match=message):
        sk.sparse_softmax(sparse, **options)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("bad", [[3, 3], [5, 2], [-1, 4], [-2, 4]])
def test_sparse_softmax_refuses_bad_ids(bad):
    sparse = random_problem(top_k=2).teacher
    sparse.ids[4] = torch.tensor(bad, dtype=torch.int32)
    with pytest.raises(ValueError, match="ids"):
        sk.sparse_softmax(sparse)
