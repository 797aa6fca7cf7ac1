"""``SparseLogits.mix``: several teachers on the union of their ids, against dense mixtures and the reference."""

from __future__ import annotations

import dataclasses
import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import assert_same_bits, sparse_fields

from slimkernels import PackedLogits, SparseLogits, gather_logits, reference, slim_loss, topk_logits
from slimkernels.reference.mixture import distinct

VOCAB_SIZE = 19


def rows_of(*rows: tuple[list[int], list[float]], lse=0.0, **fields) -> SparseLogits:
    """Makes rows of given ids and logits, whose lse is given."""
    width = max(len(ids) for ids, _ in rows)
    return SparseLogits(
        ids=torch.tensor([ids + [-1] * (width - len(ids)) for ids, _ in rows], dtype=torch.int32),
        logits=torch.tensor([values + [7.0] * (width - len(values)) for _, values in rows]),
        lse=torch.full((len(rows), 1), lse),
        **fields,
    )


def teachers(num_rows: int = 6, number: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(num_rows, VOCAB_SIZE, generator=generator, dtype=torch.float64) for _ in range(number)]


def dense_mixture(logits: list[torch.Tensor], weights) -> torch.Tensor:
    return sum(
        torch.as_tensor(weight, dtype=torch.float64).reshape(-1, 1) * row.softmax(-1)
        for weight, row in zip(weights, logits, strict=True)
    )


def on_vocabulary(mixed: SparseLogits) -> torch.Tensor:
    """Returns the probabilities of the ids as dense rows (N, V)."""
    ids = mixed.ids.long().masked_fill(mixed.ids < 0, VOCAB_SIZE)
    probabilities = mixed.logits.double().exp().masked_fill(mixed.ids < 0, 0.0)
    return torch.zeros(len(ids), VOCAB_SIZE + 1, dtype=torch.float64).scatter(1, ids, probabilities)[:, :VOCAB_SIZE]


def test_mix_by_hand():
    log = math.log
    one = rows_of(([2, 5], [log(0.5), log(0.25)]), rest_lse=torch.tensor([[log(0.25)]]))
    # Logits that are no log-probabilities: 0.6 and 0.4 of a row whose lse is 3.
    other = rows_of(([0, 5], [3 + log(0.6), 3 + log(0.4)]), lse=3.0, rest_lse=torch.tensor([[-math.inf]]))
    mixed = SparseLogits.mix([one, other], [0.8, 0.2])
    assert mixed.ids.tolist() == [[0, 2, 5, -1]]
    torch.testing.assert_close(mixed.logits.exp(), torch.tensor([[0.12, 0.4, 0.28, 1.0]]))
    torch.testing.assert_close(mixed.rest_lse.exp(), torch.tensor([[0.2]]))
    assert (mixed.lse.tolist(), mixed.temperatures, mixed.target_logit) == ([[0.0]], (1.0,), None)


def test_the_example_of_mix():
    finder = doctest.DocTestFinder(recurse=False)
    [example] = finder.find(SparseLogits.mix, globs={"SparseLogits": SparseLogits, "torch": torch})
    assert doctest.DocTestRunner().run(example) == (0, 3)


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), "rows"])
def test_mix_is_the_dense_mixture_where_every_input_holds_the_union(weights):
    logits = teachers()
    if weights == "rows":
        weights = list(torch.rand(3, 6, dtype=torch.float64).softmax(0))
    target = torch.arange(6)
    ids = distinct(torch.cat([topk_logits(rows, 4).ids for rows in logits], -1))
    mixed = SparseLogits.mix([gather_logits(rows, ids, target=target) for rows in logits], weights)
    expected = dense_mixture(logits, weights)
    assert torch.equal(mixed.ids[:, : ids.shape[1]], ids)
    is_kept = on_vocabulary(mixed) > 0
    torch.testing.assert_close(on_vocabulary(mixed)[is_kept], expected[is_kept], rtol=1e-13, atol=0)
    tail = expected.masked_fill(is_kept, 0.0).sum(-1)
    torch.testing.assert_close(mixed.rest_lse[:, 0].exp(), tail, rtol=1e-13, atol=0)
    torch.testing.assert_close(mixed.target_logit.exp(), expected[torch.arange(6), target], rtol=1e-13, atol=0)
    mixed.validate(VOCAB_SIZE)


def test_mix_bounds_the_dense_mixture_elsewhere():
    logits, weights = teachers(seed=1), (0.2, 0.5, 0.3)
    mixed = SparseLogits.mix([topk_logits(rows, k) for rows, k in zip(logits, (3, 5, 4), strict=True)], weights)
    expected, found = dense_mixture(logits, weights), on_vocabulary(mixed)
    tail = mixed.rest_lse[:, 0].exp()
    assert (found <= expected * (1 + 1e-12)).all()
    assert (found < 0.999 * expected)[found > 0].any()
    assert (tail >= expected.masked_fill(found > 0, 0.0).sum(-1)).all()
    torch.testing.assert_close(found.sum(-1) + tail, torch.ones_like(tail), rtol=1e-13, atol=0)


def test_a_mixture_trains_as_its_dense_rows_do():
    """The loss of a student on a mixture whose inputs hold all ids is the loss on the logits of the dense mixture."""
    logits, weights = teachers(), (0.25, 0.75, 0.0)
    every = torch.arange(VOCAB_SIZE, dtype=torch.int32).expand(6, -1)
    student, target = torch.randn(6, VOCAB_SIZE, dtype=torch.float64), torch.arange(6)
    dense = gather_logits(dense_mixture(logits, weights).log(), every, target=target)
    mixed = SparseLogits.mix([gather_logits(rows, every, target=target) for rows in logits], weights)
    for rest in ("ghost", "renorm"):
        losses = [slim_loss(student, target, rows, rest=rest).loss for rows in (mixed, dense)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


def test_a_weight_of_zero_drops_an_input():
    logits = teachers(number=2)
    kept, dropped = topk_logits(logits[0], 4, target=torch.arange(6)), topk_logits(logits[1], 4)
    dropped = dataclasses.replace(dropped, logits=dropped.logits * math.nan, lse=dropped.lse * math.nan)
    alone = SparseLogits.mix([kept], [1.0])
    assert_same_bits(sparse_fields(SparseLogits.mix([kept, dropped], [1.0, 0.0])), sparse_fields(alone))
    # In some rows only, the label is not known.
    share = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5, 0.5])
    mixed = SparseLogits.mix([kept, dropped], [share, 1 - share])
    assert mixed.target_logit is None
    for name in ("ids", "logits", "rest_lse", "lse"):
        field, expected = getattr(mixed, name)[:3], getattr(alone, name)[:3]
        assert torch.equal(field[:, : expected.shape[1]], expected), name
    assert (mixed.ids[:3, 4:] == -1).all()
    assert mixed.lse[3:].isnan().all()


def test_a_rest_that_is_not_known_stays_so():
    one = topk_logits(teachers()[0], 4)
    rest_lse = one.rest_lse.clone()
    rest_lse[:2] = math.nan
    unknown = dataclasses.replace(one, rest_lse=rest_lse)
    mixed = SparseLogits.mix([one, unknown], [0.5, 0.5])
    assert mixed.rest_lse.isnan().flatten().tolist() == [True, True, False, False, False, False]
    without = dataclasses.replace(one, rest_lse=None)
    assert SparseLogits.mix([one, without], [0.5, 0.5]).rest_lse.isnan().all()
    assert SparseLogits.mix([without, without], [0.5, 0.5]).rest_lse is None


def test_entries_that_were_rounded_sum_to_one():
    """Logits in 8 bits do not sum to their lse any more, and are normalised with their rest."""
    part = topk_logits(teachers()[0].float(), 5)
    rounded = dataclasses.replace(part, logits=part.logits.to(torch.float8_e4m3fn))
    mixed = SparseLogits.mix([rounded, part], [0.5, 0.5])
    assert mixed.logits.dtype == torch.float32
    torch.testing.assert_close(
        on_vocabulary(mixed).sum(-1) + mixed.rest_lse[:, 0].exp(), torch.ones(6).double(), rtol=2e-6, atol=0
    )


# Logits of kept entries, with ties, infinities and values whose exponentials vanish.
VALUES = st.sampled_from([0.0, -0.0, 1.5, -2.0, -200.0, 30.0, -math.inf])


@st.composite
def hostile_parts(draw) -> tuple[list[SparseLogits], list]:
    number, num_rows = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    parts = []
    for _ in range(number):
        width = draw(st.integers(1, 5))
        ids = torch.full((num_rows, width), -1, dtype=torch.int32)
        logits = torch.full((num_rows, width), math.nan, dtype=dtype)
        for row in range(num_rows):
            chosen = sorted(draw(st.sets(st.integers(0, 8), max_size=width)))
            ids[row, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
            logits[row, : len(chosen)] = torch.tensor([draw(VALUES) for _ in chosen], dtype=dtype)
        rest = torch.tensor([[draw(VALUES)] for _ in range(num_rows)], dtype=dtype).reshape(num_rows, 1)
        lse = torch.logaddexp(logits.masked_fill(ids < 0, -math.inf).logsumexp(-1, keepdim=True), rest)
        hidden = torch.tensor([[draw(st.booleans())] for _ in range(num_rows)], dtype=torch.bool).reshape(num_rows, 1)
        lse = draw(
            st.sampled_from([lse, lse, lse, lse.masked_fill(hidden, math.nan), lse.masked_fill(hidden, math.inf)])
        )
        rest_lse = draw(st.sampled_from([None, rest, rest.masked_fill(hidden, math.nan)]))
        target = draw(st.sampled_from([None, torch.full((num_rows,), -1.0, dtype=dtype)]))
        parts.append(SparseLogits(ids, logits, lse, target_logit=target, rest_lse=rest_lse))
    weights = torch.tensor([[draw(st.sampled_from([0.0, 1.0, 3.0]))] * num_rows for _ in parts], dtype=dtype)
    weights = weights.reshape(number, num_rows)
    weights[0] = weights[0].masked_fill(weights.sum(0) == 0, 1.0)
    weights = weights / weights.sum(0)
    given = list(weights) if draw(st.booleans()) or not num_rows else [float(row[0]) for row in weights]
    return parts, given if num_rows else [1.0] + [0.0] * (number - 1)


@settings(max_examples=80, deadline=None)
@given(hostile_parts())
def test_mix_equals_the_reference_on_hostile_rows(problem):
    parts, weights = problem
    mixed, expected = SparseLogits.mix(parts, weights), reference.mix(parts, weights)
    assert torch.equal(mixed.ids, expected.ids)
    torch.testing.assert_close(mixed.lse, expected.lse, rtol=0, atol=0, equal_nan=True)
    is_row = ~mixed.lse[:, 0].isnan()
    rtol = 1e-12 if mixed.lse.dtype == torch.float64 else 1e-5
    for name in ("logits", "rest_lse", "target_logit"):
        found, truth = getattr(mixed, name), getattr(expected, name)
        assert (found is None) == (truth is None), name
        if found is not None:
            torch.testing.assert_close(found[is_row], truth[is_row], rtol=rtol, atol=rtol, equal_nan=True)


def test_mix_repeats_bit_for_bit_in_every_batch_and_shape():
    parts = [topk_logits(rows.float(), 5, target=torch.arange(6)) for rows in teachers()]
    whole = SparseLogits.mix(parts, (0.2, 0.3, 0.5))
    for row in range(6):
        alone = SparseLogits.mix([part[row : row + 1] for part in parts], (0.2, 0.3, 0.5))
        assert_same_bits(sparse_fields(alone), sparse_fields(whole[row : row + 1]))
    shaped = SparseLogits.mix([part.reshape(2, 3) for part in parts], (0.2, 0.3, 0.5))
    assert_same_bits(sparse_fields(shaped), sparse_fields(whole.reshape(2, 3)))


@pytest.mark.parametrize(
    ("parts", "weights", "error", "message"),
    [
        ([], [], ValueError, "parts must hold at least one SparseLogits"),
        ("packed", [1.0], TypeError, "parts must be SparseLogits, got PackedLogits: decode packed rows first"),
        ("shapes", [0.5, 0.5], ValueError, r"parts must share their leading shape, got \['\(2,\)', '\(6,\)'\]"),
        ("two", [1.0], ValueError, "weights must be as many as parts, 2, got 1"),
        ("two", [0.5, 0.6], ValueError, r"weights must sum to 1, got \[0.5, 0.6\]: divide them by their sum, 1.1"),
        ("two", [1.5, -0.5], ValueError, "weights must be finite and at least 0, got -0.5"),
        ("two", ["a", 0.5], TypeError, "weights must be a number"),
        ("two", [torch.ones(5), 0.0], ValueError, r"weights must be numbers or of shape \(6,\) like parts, got \(5,\)"),
        ("two", [torch.ones(6, dtype=torch.int64), 0.0], TypeError, "weights must be float32"),
        ("two", [torch.ones(6), 0.5], ValueError, r"sum to 1 in every row, got \[1.0, 0.5\] in row \[0\]"),
        ("two", [torch.full((6,), math.nan), 0.5], ValueError, r"got \[nan, 0.5\] in row \[0\]: divide them"),
        ("two", [torch.ones(6, requires_grad=True), 0.0], ValueError, "weights requires a gradient"),
    ],
)
def test_mix_refuses(parts, weights, error, message):
    rows = [topk_logits(one.float(), 3) for one in teachers()[:2]]
    if parts == "packed":
        words, values = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 1)
        parts = [PackedLogits(id_words=words, values=values, lse=torch.zeros(1, 1), vocab_size=8)]
    elif parts:
        parts = {"two": rows, "shapes": [rows[0], rows[1][:2]]}[parts]
    with pytest.raises(error, match=message):
        SparseLogits.mix(parts, weights)
