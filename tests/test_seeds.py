"""One seed for all rows of a sampling call is spread over them; seeds given per row are used as they are."""

from __future__ import annotations

import pytest
import torch
from support.helpers import LAYOUTS, assert_same_bits, sparse_fields
from test_reference_sampling import WORD, philox_in_integers
from test_sample_logits import assert_drawn_matches, assert_follows

import slimkernels as sk
from slimkernels import reference_sampling as reference

SEEDS = (0, 7, -5, 2**40 + 3, 2**63 - 1, -(2**63))

# Every op that draws, as a function of logits and seed.
OPS = {
    "sample_logits": lambda logits, seed: sk.sample_logits(logits, seed=seed, position=3),
    "sample_distinct": lambda logits, seed: sk.sample_distinct(logits, 3, seed=seed, position=3, temperature=0.8),
    "sample_targets": lambda logits, seed: sparse_fields(sk.sample_targets(logits, 9, seed, position=3)),
    "mixed_targets": lambda logits, seed: sparse_fields(sk.mixed_targets(logits, 2, 9, seed, position=3)),
}


def seed_of_row(seed: int, row: int) -> int:
    """Computes the seed of a row in Python's integers."""
    if row == 0:
        return seed
    low, high, _, _ = philox_in_integers([row, WORD, 0, 0], [seed & WORD, (seed >> 32) & WORD])
    return int.from_bytes(((high << 32) | low).to_bytes(8, "little"), "little", signed=True)


def test_six_copies_of_a_prompt_draw_six_tokens():
    logits = torch.randn(1000).expand(6, -1)
    tokens = [sk.sample_logits(logits, seed=0, position=step).token.tolist() for step in range(3)]
    assert all(len(set(drawn)) > 3 for drawn in tokens)
    assert len({tuple(drawn) for drawn in tokens}) == 3
    targets = sk.sample_targets(logits, 4, 0, position=0).ids
    assert len({tuple(row) for row in targets.tolist()}) == 6


@pytest.mark.parametrize("seed", SEEDS)
def test_reference_spreads_a_seed_as_documented(seed):
    spread = reference.spread_seed(seed, torch.zeros(2, 3, 5))
    assert spread.shape == (2, 3, 1)
    assert spread.flatten().tolist() == [seed_of_row(seed, row) for row in range(6)]
    assert torch.equal(reference.spread_seed(torch.tensor(seed), torch.zeros(2, 3, 5)), spread)
    given = torch.tensor([seed])
    assert reference.spread_seed(given, torch.zeros(1, 5)).tolist() == [[seed]]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("seed", SEEDS)
def test_row_of_one_seed_is_a_call_with_its_spread_seed(op, seed):
    logits = torch.randn(2, 3, 700)
    spread = torch.tensor([seed_of_row(seed, row) for row in range(6)]).reshape(2, 3)
    whole = OPS[op](logits, seed)
    assert_same_bits(whole, OPS[op](logits, spread))
    assert_same_bits(whole, OPS[op](logits, torch.tensor(seed)))
    alone = OPS[op](logits[1, 1], seed_of_row(seed, 4))
    assert_same_bits([field[1, 1] for field in whole], alone)
    assert_same_bits(OPS[op](logits[0, 0], seed), [field[0, 0] for field in whole])


@pytest.mark.parametrize("op", OPS)
def test_seeds_per_row_are_independent_of_the_batch(op):
    logits, seeds = torch.randn(9, 400), torch.arange(9) * 977 - 4
    whole, order = OPS[op](logits, seeds), torch.tensor([7, 2, 5])
    assert_same_bits(OPS[op](logits[order], seeds[order]), [field[order] for field in whole])
    assert_same_bits(OPS[op](logits[3:4], seeds[3:4]), [field[3:4] for field in whole])
    assert_same_bits(OPS[op](logits[3], int(seeds[3])), [field[3] for field in whole])


@pytest.mark.parametrize("op", OPS)
def test_equal_seeds_per_row_give_equal_rows_equal_noise(op):
    logits = torch.randn(400).expand(5, -1)
    for seeds in (torch.full((5,), 3), torch.tensor(3).expand(5)):
        drawn = OPS[op](logits, seeds)
        assert_same_bits([field[1:] for field in drawn], [field[:1].expand_as(field[1:]) for field in drawn])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_seed_does_not_depend_on_the_layout(layout):
    logits = torch.randn(5, 301)
    for op in OPS.values():
        assert_same_bits(op(LAYOUTS[layout](logits), 11), op(logits, 11))


def test_draws_of_one_seed_are_those_of_the_reference():
    logits = 2.0 * torch.randn(6, 260)
    assert_drawn_matches(logits, seed=torch.tensor(-9), position=0, temperature=0.7, top_k=30)
    assert_drawn_matches(logits, m=4, seed=12, position=torch.arange(6))
    actual = sk.sample_targets(logits, 12, 5, position=0)
    assert torch.equal(actual.ids, reference.sample_targets(logits, 12, 5, position=0).ids)


@pytest.mark.cpu_kernels
def test_draws_of_one_seed_do_not_depend_on_the_number_of_threads(set_threads):
    logits = torch.randn(67, 500)
    expected = sk.sample_logits(logits, seed=6, position=1)
    for count in (2, 5):
        set_threads(count)
        assert_same_bits(sk.sample_logits(logits, seed=6, position=1), expected)


@pytest.mark.cpu_kernels
def test_rows_of_one_seed_are_independent_of_each_other_and_of_the_next_step():
    num_rows = 50_000
    rows = torch.zeros(num_rows, 4)
    first, later = (sk.sample_logits(rows, seed=1, position=step).token for step in (0, 1))
    neighbouring_seed = sk.sample_logits(rows, seed=2, position=0).token
    assert_follows(torch.bincount(first, minlength=4).double(), torch.full((4,), 1 / 4).double())
    # The last two: the row before, whose seed is drawn with a neighbouring counter, and one half a batch away.
    for other in (later, neighbouring_seed, first.roll(1), first.roll(num_rows // 2)):
        assert_follows(torch.bincount(first * 4 + other, minlength=16).double(), torch.full((16,), 1 / 16).double())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("seed", [5, torch.tensor(5)])
def test_one_seed_is_spread_in_a_compiled_graph_of_symbolic_shapes(op, seed):
    compiled = torch.compile(OPS[op], fullgraph=True, dynamic=True, backend="aot_eager")
    for num_rows in (2, 5, 9):
        logits = torch.randn(num_rows, 40)
        for number in range(3):
            assert_same_bits(compiled(logits, seed + number), OPS[op](logits, seed + number))


@pytest.mark.parametrize("op", OPS)
def test_one_seed_in_a_tensor_may_be_on_the_meta_device(op):
    real = OPS[op](torch.zeros(2, 3, 40), torch.tensor(5))
    fake = OPS[op](torch.zeros(2, 3, 40, device="meta"), torch.tensor(5, device="meta"))
    assert [field.shape for field in fake] == [field.shape for field in real]
