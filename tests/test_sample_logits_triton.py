"""The Triton kernels of sample_logits and sample_distinct, without a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from support.helpers import DTYPES, assert_same_bits, explain
from support.triton_checks import (
    ARCHITECTURES,
    assert_compiles,
    assert_scratch_is_ordered,
    assert_tests_pass_interpreted,
    on_architectures,
)
from test_sample_logits import assert_drawn_matches

import slimkernels as sk

INF, NAN = math.inf, math.nan


@pytest.mark.interpret
def test_sample_logits_passes_its_tests_interpreted():
    assert_tests_pass_interpreted(
        *(f"test_sample_logits.py::test_sample_logits_hand_worked[dtype0-options{i}-kept{i}]" for i in (11, 13, 16)),
        *(
            f"test_sample_logits.py::test_sample_logits_ties_and_infinities_hand_worked[dtype1-row{i}-options{i}-kept{i}]"
            for i in range(0, 13, 3)
        ),
        "test_sample_logits.py::test_sample_logits_at_extreme_temperatures[dtype0-1e-30]",
        "test_sample_logits.py::test_sample_logits_takes_strided_options",
        "test_sample_logits.py::test_sample_distinct_ends_in_padding_where_too_few_are_left",
        "test_sample_logits_triton.py::test_draws_among_candidates[torch.bfloat16]",
        "test_sample_logits_triton.py::test_hostile_rows_of_several_blocks",
        "test_sample_logits_triton.py::test_options_out_of_range_make_nan",
    )


@pytest.mark.slow
@pytest.mark.interpret
def test_sample_logits_passes_more_of_its_tests_interpreted():
    assert_tests_pass_interpreted(
        *(
            f"test_sample_logits.py::test_sample_logits_hand_worked[dtype0-options{i}-kept{i}]"
            for i in (1, 4, 6, 8, 12)
        ),
        "test_sample_logits.py::test_sample_logits_of_hostile_rows[37-dtype1]",
        "test_sample_logits.py::test_sample_logits_at_extreme_temperatures[dtype2-10000.0]",
        "test_sample_logits.py::test_sample_logits_keeps_leading_dimensions",
        *(
            f"test_sample_logits.py::test_sample_logits_ties_and_infinities_hand_worked[dtype1-row{i}-options{i}-kept{i}]"
            for i in range(13)
        ),
        "test_sample_logits.py::test_sample_logits_opcheck",
        "test_sample_logits_triton.py::test_more_draws_than_a_block",
        "test_sample_logits_triton.py::test_noise_of_any_seed_and_position",
        "test_sample_logits_triton.py::test_draws_among_candidates",
        "test_sample_logits_triton.py::test_draws_are_batch_invariant",
    )


VARIANTS = {
    "truncated": (1, {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01}),
    "whole": (1, {}),
    "of every row, distinct": (4, None),
}


@pytest.mark.parametrize(("architecture", "dtype", "variant"), on_architectures(DTYPES, VARIANTS))
def test_sample_logits_compiles_for(architecture, dtype, variant):
    from slimkernels.ops.triton.sample_logits import sample_logits_rows

    assert_compiles(lambda: launch_sampling(sample_logits_rows, 131072, dtype, *VARIANTS[variant]), architecture)


@pytest.mark.slow  # with every supported Triton: make test-triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sample_logits_compiles_for_an_odd_vocabulary(architecture):
    from slimkernels.ops.triton.sample_logits import sample_logits_rows

    variant = VARIANTS["of every row, distinct"]
    assert_compiles(lambda: launch_sampling(sample_logits_rows, 50257, torch.bfloat16, *variant), architecture)


# One warp has all of a row of 20, so its reductions need no barrier, which would order the accesses by chance.
@pytest.mark.parametrize("vocab_size", [20, pytest.param(50257, marks=pytest.mark.slow)])
def test_barriers_order_the_scratch_of_sampling(vocab_size):
    from slimkernels.ops.triton.sample_logits import sample_logits_rows

    arguments = (vocab_size, torch.bfloat16, *VARIANTS["of every row, distinct"])
    assert_scratch_is_ordered(lambda: launch_sampling(sample_logits_rows, *arguments), "sample_logits_kernel")


def launch_sampling(sample_logits_rows, vocab_size, dtype, m, options):
    logits = torch.empty(2, vocab_size, dtype=dtype)
    integers, doubles = torch.empty(2, dtype=torch.int64), torch.empty(2, dtype=torch.float64)
    if options is None:
        arguments = (0, integers, 0, integers, 0.0, doubles, 0, integers, 0.0, doubles, 0.0, doubles)
    else:
        given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
        arguments = (7, None, 0, integers, *(argument for value in given.values() for argument in (value, None)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outputs = (
        torch.empty(2, m, dtype=torch.int64),
        torch.empty(2, m, dtype=wide),
        torch.empty(2, m, dtype=wide),
        torch.empty(2, dtype=wide),
    )
    sample_logits_rows(logits, m, *arguments, *outputs)


@pytest.fixture
def block_of_256(monkeypatch):
    """Rows of a few thousand ids take several blocks, and not so many that the interpreter takes long."""
    launch = pytest.importorskip("slimkernels.ops.triton.launch")
    monkeypatch.setattr(launch, "settings_of", lambda *_args: launch.Settings(256, 4))


def rows_to_truncate(vocab_size: int) -> dict[str, torch.Tensor]:
    """Rows of which a sample of 16 runs and the largest of every lane say enough, too little, or something wrong."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(vocab_size, generator=generator)
    order = torch.randperm(vocab_size, generator=generator)
    return {
        "log-normal": 3 * noise,
        "power law": -1.5 * (1 + order).log(),  # the sample does not see the upper part of the tail
        "flat": 0.1 * noise,  # too many candidates
        "peaked": noise.index_fill(0, order[:2], 20.0),
        "all equal": torch.zeros(vocab_size),
        "large at the end": torch.where(torch.arange(vocab_size) >= vocab_size - 50, 10.0, 0.0) + noise,
        "few finite": noise.masked_fill(order >= 3, -INF),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_draws_among_candidates(dtype, block_of_256):
    rows = rows_to_truncate(4099)
    logits = torch.stack(list(rows.values())).to(dtype)
    for options in (
        {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "min_p": 0.01},
        {"temperature": 1.2, "top_p": 0.9},
        {"top_k": 300},
        {"min_p": 0.02, "top_p": 0.9999},
    ):
        with explain(str(options)):
            assert_drawn_matches(logits, seed=2, position=torch.arange(len(rows)), **options)
    assert_drawn_matches(logits, m=3, seed=2, position=torch.arange(len(rows)), top_k=5)


def test_hostile_rows_of_several_blocks(block_of_256):
    from support.helpers import hostile_rows

    logits = torch.stack(list(hostile_rows(1000, torch.float16).values()))
    position = torch.arange(len(logits))
    for options in ({}, {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "min_p": 0.01}, {"temperature": 0.0}):
        with explain(str(options)):
            assert_drawn_matches(logits, m=2, seed=3, position=position, **options)


def test_draws_are_batch_invariant(block_of_256):
    # More rows than programs, so that a program has several and its scratch is used again.
    logits = torch.cat([3 * torch.randn(9, 1200), torch.full((1, 1200), NAN), torch.full((1, 1200), INF)])
    options = {
        "seed": torch.arange(11) * 17,
        "position": torch.arange(11) - 3,
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0, 0.7, 1.0, 0.0, 0.8, 1.1, 1.0, 1.0]),
        "top_k": torch.tensor([0, 5, 40, 0, 0, 1199, 3, 1, 0, 4, 4]),
        "top_p": torch.tensor([1.0, 0.9, 1.0, 0.6, 1.0, 0.95, 0.5, 1.0, 0.2, 0.9, 0.9]),
        "min_p": torch.tensor([0.0, 0.0, 0.1, 0.0, 0.05, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
    }
    whole = sk.sample_distinct(logits, 3, **options)
    assert_same_bits(sk.sample_distinct(logits, 3, **options), whole)
    for row in (1, 3, 5, 8):
        alone = sk.sample_distinct(logits[row], 3, **{name: option[row] for name, option in options.items()})
        assert_same_bits(alone, [field[row] for field in whole])
    first = sk.sample_logits(logits, **options)
    assert_same_bits(first[:3], [field[:, 0] for field in whole[:3]])


def test_more_draws_than_a_block():
    logits = torch.randn(2, 90)
    for m in (70, 95):
        assert_drawn_matches(logits, m=m, seed=m, position=torch.arange(2))


def test_noise_of_any_seed_and_position():
    extremes = (0, 1, -1, 2**33 + 5, 2**63 - 1, -(2**63))
    logits = torch.zeros(len(extremes), 200)
    for number in extremes:
        assert_drawn_matches(logits, seed=number, position=torch.tensor(extremes))
        assert_drawn_matches(logits, seed=torch.tensor(extremes), position=number)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("temperature", [-1.0, NAN, INF]),
        ("temperature", [1e-40, 1e38, 2e38]),
        ("top_k", [-1, -(2**40), -5]),
        ("top_p", [1.5, -0.1, NAN]),
        ("min_p", [-1.0, 7.0, NAN]),
    ],
)
def test_options_out_of_range_make_nan(option, values, request, monkeypatch):
    if request.config.getoption("--kernels") == "cpu":
        pytest.skip("the CPU raises")
    from slimkernels.ops import _sample_options

    # As on a GPU, where nothing looks at them beforehand.
    monkeypatch.setattr(_sample_options, "check_values", lambda *_args: None)
    sound = {"temperature": 1.0, "top_k": 2, "top_p": 0.9, "min_p": 0.1}[option]
    options = {option: torch.tensor([*values, sound])}
    for drawn in (
        sk.sample_logits(torch.randn(4, 9), seed=0, position=0, **options),
        sk.sample_distinct(torch.randn(4, 9), 2, seed=0, position=0, **options),
    ):
        assert (drawn.token[:3] == -1).all()
        assert (drawn.token[3] >= 0).any()
        for field in drawn[1:]:
            assert field[:3].isnan().all()
            assert not field[3].isnan().any()
