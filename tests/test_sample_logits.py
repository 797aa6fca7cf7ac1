from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import (
    DTYPES,
    LAYOUTS,
    assert_same_bits,
    explain,
    hostile_rows,
    largest_allocation,
    num_drawn,
    opcheck_calls_of,
)

import slimkernels as sk
from slimkernels import reference_sampling as reference

INF, NAN = math.inf, math.nan
OPTIONS = ("temperature", "top_k", "top_p", "min_p")


def assert_fields_match(actual, expected, dtype) -> None:
    """Tokens exactly; log-probabilities and entropy within a few roundings of what they are stored in."""
    assert torch.equal(actual.token, expected.token)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for name in actual._fields[1:]:
        with explain(name):
            one, other = getattr(actual, name), getattr(expected, name)
            torch.testing.assert_close(
                one.double(), other.double(), rtol=tolerance, atol=tolerance, equal_nan=True, check_dtype=False
            )
            assert one.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def assert_drawn_matches(logits, m: int | None = None, **options) -> None:
    """Our draw of every row is the reference's.

    Where the strictly likelier ids sum to top_p within float32 rounding, an id may fall on either side: such a row, and
    there are few, must be the reference's with a top_p larger or smaller by that rounding.
    """
    draw = sk.sample_logits if m is None else sk.sample_distinct
    reference_draw = reference.sample_logits if m is None else reference.sample_distinct
    operands = (logits,) if m is None else (logits, m)
    actual, expected = draw(*operands, **options), reference_draw(*operands, **options)
    top_p = torch.as_tensor(options.get("top_p", 1.0), dtype=torch.float64).expand(logits.shape[:-1])
    if logits.dtype != torch.float64 and (top_p < 1).any():
        for factor in (1 - 3e-6, 1 + 3e-6):
            off = rows_that_differ(actual, expected) & (top_p < 1)
            assert off.double().mean() <= 0.25
            shifted = reference_draw(*operands, **{**options, "top_p": (top_p * factor).clamp(max=1 - 1e-12)})
            take = off & ~rows_that_differ(actual, shifted)
            pairs = zip(expected, shifted, strict=True)
            expected = sk.Sampled(
                *(torch.where(take.reshape(take.shape + (1,) * (e.ndim - take.ndim)), s, e) for e, s in pairs)
            )
    assert_fields_match(actual, expected, logits.dtype)


def rows_that_differ(actual, expected) -> torch.Tensor:
    """Rows whose draws come from other distributions; their probabilities say so also where the tokens are the same."""
    one, other = actual.truncated_logprob.double(), expected.truncated_logprob.double()
    differs = ~torch.isclose(one, other, rtol=1e-6, atol=1e-6, equal_nan=True) | (actual.token != expected.token)
    return differs if differs.ndim == actual.entropy.ndim else differs.any(-1)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        # In front of id 1 lies 0.4, in front of id 2 0.7, in front of id 3 0.9.
        ({"top_p": 0.65}, [0, 1]),
        ({"top_p": 0.75}, [0, 1, 2]),
        ({"top_p": 0.0}, [0]),
        # After top-k the rest is (4, 3, 2) / 9: in front of id 2 lies 7 / 9.
        ({"top_k": 3, "top_p": 0.75}, [0, 1]),
        ({"top_k": 3, "top_p": 0.8}, [0, 1, 2]),
        # The ratios to the likeliest are 1, 0.75, 0.5, 0.25.
        ({"min_p": 0.6}, [0, 1]),
        ({"min_p": 0.4}, [0, 1, 2]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.8, "min_p": 0.6}, [0, 1]),
        # T = 1/2 squares: (16, 9, 4, 1) / 30, ratios 1, 0.5625, 0.25, 0.0625.
        ({"temperature": 0.5, "min_p": 0.5}, [0, 1]),
        ({"temperature": 0.5, "top_p": 0.5}, [0]),
        ({"temperature": 0.0}, [0]),
        ({"temperature": 0.0, "top_k": 3, "min_p": 0.1}, [0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_logits_hand_worked(dtype, options, kept):
    num_rows = num_drawn(2000, 50)
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    # Shuffled, so that the order of the ids says nothing.
    order = torch.tensor([2, 0, 3, 1])
    logits = probs.log()[order].to(dtype).expand(num_rows, 4)
    drawn = sk.sample_logits(logits, seed=5, position=torch.arange(num_rows), **options)
    temperature = options.get("temperature", 1.0) or 1.0
    truncated = torch.zeros(4, dtype=torch.float64)
    truncated[kept] = probs[kept] ** (1.0 / temperature)
    truncated /= truncated.sum()
    token = order[drawn.token]
    assert token.unique().tolist() == kept
    close = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(drawn.truncated_logprob, truncated[token].log(), **close)
    torch.testing.assert_close(drawn.logprob, probs[token].log(), **close)
    torch.testing.assert_close(drawn.entropy, -(probs * probs.log()).sum().expand(num_rows), **close)


GRID = [
    dict(zip(OPTIONS, values, strict=True))
    for values in itertools.product((1.0, 0.7, 2.5, 0.0), (0, 1, 40), (1.0, 0.9, 0.3, 0.0), (0.0, 0.02))
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [203, 3001])
def test_sample_logits_options(dtype, vocab_size):
    logits = (3.0 * torch.randn(6, vocab_size)).to(dtype)
    for seed, options in enumerate(GRID):
        with explain(str(options)):
            assert_drawn_matches(logits, seed=seed, position=torch.arange(6), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_logits_options_of_every_row(dtype):
    logits = (3.0 * torch.randn(len(GRID), 1500)).to(dtype)
    columns = {name: torch.tensor([options[name] for options in GRID]) for name in OPTIONS}
    seed, position = torch.arange(len(GRID)) * 977, torch.arange(len(GRID)) - 40
    assert_drawn_matches(logits, seed=seed, position=position, **columns)
    whole = sk.sample_logits(logits, seed=seed, position=position, **columns)
    for row in (0, 17, 50):
        options = {name: column[row].double().item() for name, column in columns.items()}
        options["top_k"] = int(options["top_k"])
        alone = sk.sample_logits(logits[row], seed=int(seed[row]), position=int(position[row]), **options)
        assert_same_bits(alone, [field[row] for field in whole])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_logits_of_every_small_size(dtype):
    # Vectors have 2 to 64 lanes and the noise comes 64 ids at a time; every remainder of both.
    for vocab_size in (*range(1, 36), 63, 64, 65, 127, 128, 129, 255, 257, 1023, 1024, 1025):
        logits = torch.randn(3, vocab_size).to(dtype)
        for options in ({}, {"top_k": vocab_size // 3 + 1, "temperature": 0.8}, {"top_p": 0.7, "min_p": 0.1}):
            with explain(f"V={vocab_size}, {options}"):
                assert_drawn_matches(logits, seed=vocab_size, position=torch.arange(3), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [37, 1000, 8209])
def test_sample_logits_of_hostile_rows(dtype, vocab_size):
    rows = hostile_rows(vocab_size, dtype)
    batch = torch.stack(list(rows.values()))
    position = torch.arange(len(batch))
    for options in (
        {},
        {"temperature": 0.0},
        {"temperature": 0.5, "top_k": 20},
        {"temperature": 1.5, "top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 0.9, "top_k": vocab_size // 2, "top_p": 0.95, "min_p": 0.01},
    ):
        with explain(str(options)):
            assert_drawn_matches(batch, seed=3, position=position, **options)
            assert_drawn_matches(batch, m=5, seed=3, position=position, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_logits_of_masked_rows(dtype):
    vocab_size = 9001
    generator = torch.Generator().manual_seed(4)
    at_random = torch.rand(vocab_size, generator=generator)
    rows = 3 * torch.randn(5, vocab_size, generator=generator)
    for row, share in enumerate((0.5, 0.99, 0.999)):
        rows[row, at_random < share] = -math.inf
    rows[3, :8990] = -math.inf
    rows[4, at_random < 0.99] = -120.0
    rows = rows.to(dtype)
    position = torch.arange(5)
    for options in ({}, {"temperature": 0.5}, {"temperature": 2.0, "top_p": 0.9}, {"top_k": 40}, {"min_p": 1e-3}):
        with explain(str(options)):
            assert_drawn_matches(rows, seed=3, position=position, **options)
            assert_drawn_matches(rows, m=4, seed=3, position=position, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [32000, 128256])
def test_sample_logits_of_a_real_vocabulary(dtype, vocab_size):
    logits = 3.0 * torch.randn(4, vocab_size)
    logits[1, 777] = 30.0  # peaked, where a sample of the row does not see it
    logits[2] = torch.linspace(-1.0, 1.0, vocab_size)
    logits = logits.to(dtype)
    for options in (
        {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
        {"temperature": 0.8, "top_p": 0.95},
        {"top_k": vocab_size // 2},
        {"min_p": 1e-3},
        {"temperature": 1.2},
        {"temperature": 0.0},
    ):
        with explain(str(options)):
            assert_drawn_matches(logits, seed=1, position=torch.arange(4), **options)


@pytest.mark.parametrize("temperature", [1e-30, 1e-4, 1e4, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_logits_at_extreme_temperatures(dtype, temperature):
    logits = torch.stack([torch.randn(300), torch.full((300,), 2.0), torch.linspace(-9, 9, 300)])
    logits[0, ::3] = -INF
    logits[2, 7:11] = 9.0
    for options in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.3}, {"min_p": 1.0}):
        with explain(str(options)):
            assert_drawn_matches(logits.to(dtype), seed=8, position=torch.arange(3), temperature=temperature, **options)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), vocab_size=st.integers(1, 90), dtype=st.sampled_from(DTYPES))
def test_sample_logits_of_few_distinct_values(data, vocab_size, dtype):
    values = st.sampled_from([0.0, -0.0, 1.0, 1.0078125, -1.0, -2.5, INF, -INF, NAN, 3e-7, -3e-7])
    row = torch.tensor(data.draw(st.lists(values, min_size=vocab_size, max_size=vocab_size)), dtype=dtype)
    options = {
        "temperature": data.draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
        "top_k": data.draw(st.integers(0, vocab_size + 1)),
        # Sums of equal probabilities are fractions; none of them is one of these.
        "top_p": data.draw(st.sampled_from([0.0, 0.1234567, 0.777777, 1.0])),
        "min_p": data.draw(st.sampled_from([0.0, 0.2, 1.0])),
    }
    assert_drawn_matches(row, seed=vocab_size, position=0, **options)
    assert_drawn_matches(row, m=3, seed=vocab_size, position=0, **options)


@pytest.mark.parametrize(
    ("row", "options", "kept"),
    [
        ([1.0, 0.0, 1.0, 1.0, -1.0], {"top_k": 1}, [0, 2, 3]),
        ([1.0, 0.0, 1.0, 1.0, -1.0], {"top_p": 0.1}, [0, 2, 3]),
        ([1.0, 0.0, 1.0, 1.0, -1.0], {"min_p": 0.9}, [0, 2, 3]),
        # The ratio of their probabilities rounds to 1.
        ([-1.0, 0.0, -1e-30], {"min_p": 1.0}, [1, 2]),
        ([1.0, 0.0, 1.0, 1.0, -1.0], {"temperature": 0.0}, [0]),
        ([-1.0, -0.0, 0.0, -0.0], {"temperature": 0.0}, [1]),
        ([-1.0, -0.0, 0.0, -0.0], {"top_k": 1}, [1, 2, 3]),
        ([-INF, 0.0, -INF, 0.0], {}, [1, 3]),
        ([INF, 0.0, -INF, INF], {}, [0, 3]),
        ([0.0, INF, INF, 1.0], {"temperature": 0.0}, [1]),
        ([0.0, INF, INF, 1.0], {"top_k": 1, "top_p": 0.1}, [1, 2]),
        ([-INF, -INF, -INF], {}, [-1]),
        ([0.0, NAN, INF], {}, [-1]),
        ([0.0, NAN, 1.0], {"temperature": 0.0}, [-1]),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_logits_ties_and_infinities_hand_worked(dtype, row, options, kept):
    num_rows = num_drawn(300, 30)
    rows = torch.tensor(row, dtype=dtype).expand(num_rows, len(row))
    drawn = sk.sample_logits(rows, seed=1, position=torch.arange(num_rows), **options)
    assert drawn.token.unique().tolist() == kept
    if kept == [-1]:
        assert all(field.isnan().all() for field in drawn[1:])
        return
    torch.testing.assert_close(drawn.truncated_logprob.exp(), torch.full_like(drawn.logprob, 1 / len(kept)))
    infinite = row.count(INF)
    if infinite:
        torch.testing.assert_close(drawn.entropy, torch.full_like(drawn.entropy, math.log(infinite)))
        torch.testing.assert_close(drawn.logprob.exp(), torch.full_like(drawn.logprob, 1 / infinite))


@pytest.mark.parametrize("seed", [0, -5, 2**40 + 3, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("position", [0, -1, 2**33 + 1, -(2**63)])
def test_sample_logits_takes_all_64_bits_of_seed_and_position(seed, position):
    logits = torch.zeros(2, 3000)
    assert_drawn_matches(logits, seed=seed, position=torch.tensor([position, position + 1]))
    assert_drawn_matches(logits, seed=torch.tensor([seed, seed // 2]), position=position)


def chi_square_limit(degrees: int) -> float:
    """The 99.9 % quantile by Wilson and Hilferty, good to 1 % from two degrees of freedom on."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.09 * math.sqrt(spread)) ** 3


def assert_follows(counts: torch.Tensor, probs: torch.Tensor) -> None:
    """Chi-square of draws against a distribution; what is expected fewer than ten times is one cell."""
    assert not counts[probs == 0].any()
    expected = probs * counts.sum()
    rare = expected < 10
    cells = [(counts[~rare], expected[~rare])]
    if expected[rare].sum() >= 10:
        cells.append((counts[rare].sum()[None], expected[rare].sum()[None]))
    counts, expected = (torch.cat(parts) for parts in zip(*cells, strict=True))
    if len(counts) > 1:
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert statistic < chi_square_limit(len(counts) - 1)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 12])
@pytest.mark.parametrize("top_p", [1.0, 0.85])
@pytest.mark.parametrize("min_p", [0.0, 0.08])
def test_sample_logits_follows_the_warpers_of_transformers(temperature, top_k, top_p, min_p):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    num_draws, vocab_size = 100_000, 61
    logits = 2.0 * torch.randn(1, vocab_size)
    scores = logits.double()
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for warper in warpers:
        scores = warper(None, scores)
    truncated = torch.log_softmax(scores[0], -1)
    drawn = sk.sample_logits(
        logits.expand(num_draws, vocab_size),
        seed=2024,
        position=torch.arange(num_draws),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    torch.testing.assert_close(drawn.truncated_logprob.double(), truncated[drawn.token], rtol=1e-6, atol=1e-6)
    assert_follows(torch.bincount(drawn.token, minlength=vocab_size).double(), truncated.exp())


def test_a_wrong_law_fails_the_chi_square():
    probs = torch.softmax(torch.randn(61, dtype=torch.float64), -1)
    drawn = sk.sample_logits(probs.log().expand(100_000, 61), seed=1, position=torch.arange(100_000), temperature=1.05)
    with pytest.raises(AssertionError):
        assert_follows(torch.bincount(drawn.token, minlength=61).double(), probs)


def test_sample_logits_of_neighbouring_seeds_and_positions_are_independent():
    num_rows = 50_000
    rows = torch.zeros(num_rows, 4)
    first = sk.sample_logits(rows, seed=1, position=torch.arange(num_rows)).token
    for options in (
        {"seed": 1, "position": torch.arange(num_rows) + 1},
        {"seed": 2, "position": torch.arange(num_rows)},
    ):
        other = sk.sample_logits(rows, **options).token
        assert_follows(torch.bincount(first * 4 + other, minlength=16).double(), torch.full((16,), 1 / 16).double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_logits_is_bitwise_repeatable_and_batch_invariant(dtype):
    logits = torch.cat([torch.stack(list(hostile_rows(4100, dtype).values())), torch.randn(6, 4100).to(dtype)])
    num_rows = len(logits)
    columns = {
        "seed": torch.arange(num_rows) * 17,
        "position": torch.arange(num_rows) + 100,
        "temperature": torch.rand(num_rows) * 2,
        "top_k": torch.randint(0, 60, (num_rows,)),
        "top_p": torch.rand(num_rows) * 0.5 + 0.5,
        "min_p": torch.rand(num_rows) * 0.1,
    }
    columns["temperature"][::7] = 0.0
    columns["top_k"][::2] = 0
    columns["top_p"][::3] = 1.0
    whole = sk.sample_distinct(logits, 3, **columns)
    assert_same_bits(sk.sample_distinct(logits, 3, **columns), whole)
    order = torch.randperm(num_rows)[:23]
    some = sk.sample_distinct(logits[order], 3, **{name: column[order] for name, column in columns.items()})
    assert_same_bits(some, [field[order] for field in whole])
    first = sk.sample_logits(logits, **columns)
    assert_same_bits(first[:3], [field[:, 0] for field in whole[:3]])
    for row in (0, 11, num_rows - 1):
        alone = sk.sample_logits(logits[row], **{name: column[row] for name, column in columns.items()})
        assert_same_bits(alone, [field[row] for field in first])


@pytest.mark.cpu_kernels
def test_sample_logits_does_not_depend_on_the_number_of_threads(set_threads):
    logits = torch.randn(67, 2051)
    options = {"seed": 1, "position": torch.arange(67), "top_p": 0.9}
    expected = sk.sample_logits(logits, **options)
    for count in (2, 5):
        set_threads(count)
        assert_same_bits(sk.sample_logits(logits, **options), expected)


@pytest.mark.parametrize("leading_shape", [(), (0,), (1,), (2, 3), (2, 0, 3), (2, 1, 2)])
def test_sample_logits_keeps_leading_dimensions(leading_shape):
    logits = torch.randn(*leading_shape, 50)
    position = torch.arange(math.prod(leading_shape)).reshape(leading_shape)
    options = {"position": position, "top_p": torch.full(leading_shape, 0.8), "temperature": torch.tensor(0.7)}
    drawn = sk.sample_logits(logits, seed=4, **options)
    assert [field.shape for field in drawn] == [leading_shape] * 4
    assert [field.shape for field in sk.sample_distinct(logits, 2, seed=4, **options)] == [
        (*leading_shape, 2),
        (*leading_shape, 2),
        (*leading_shape, 2),
        leading_shape,
    ]
    if logits.numel():
        assert_drawn_matches(logits, seed=4, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sample_logits_of_any_layout(layout, dtype):
    logits = torch.randn(5, 301).to(dtype)
    before = LAYOUTS[layout](logits)
    for options in ({}, {"top_k": 9, "temperature": 0.5}, {"top_p": 0.9}):
        options = {"seed": 6, "position": torch.arange(5), **options}
        assert_same_bits(sk.sample_logits(before, **options), sk.sample_logits(logits, **options))
    assert_same_bits(before, logits)


def test_sample_logits_takes_strided_options():
    logits, wide = torch.randn(5, 31), torch.rand(5, 2)
    expected = sk.sample_logits(logits, seed=0, position=torch.arange(5), top_p=wide[:, 0].contiguous())
    strided = sk.sample_logits(logits, seed=0, position=torch.arange(10)[::2] // 2, top_p=wide[:, 0])
    assert_same_bits(strided, expected)


def test_sample_logits_addresses_past_two_to_the_31():
    # Only the touched pages of the buffer exist.
    vocab_size, stride = 1000, 2**30 + 7
    buffer = torch.empty(2 * stride + vocab_size, dtype=torch.bfloat16)
    far = buffer.as_strided((3, vocab_size), (stride, 1))
    logits = torch.randn(3, vocab_size).bfloat16()
    far.copy_(logits)
    options = {"seed": 1, "position": torch.arange(3), "top_p": 0.9}
    assert_same_bits(sk.sample_logits(far, **options), sk.sample_logits(logits, **options))


@pytest.mark.cpu_kernels
def test_sample_logits_allocates_nothing_of_the_size_of_the_logits():
    logits = torch.randn(64, 5000)
    options = {"seed": 1, "position": torch.arange(64), "temperature": 0.8, "top_k": 40, "top_p": 0.9}
    assert largest_allocation(sk.sample_logits, logits, **options) <= 64 * 8


def test_sample_distinct_draws_without_replacement():
    num_rows = 100_000
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    rows, position = probs.log().expand(num_rows, 4), torch.arange(num_rows)
    drawn = sk.sample_distinct(rows, 2, seed=3, position=position)
    # P(i, then j) = p_i p_j / (1 - p_i), twelve ordered pairs.
    pairs = probs[:, None] * probs[None, :] / (1 - probs)[:, None] * (1 - torch.eye(4, dtype=torch.float64))
    counts = torch.bincount(drawn.token[:, 0] * 4 + drawn.token[:, 1], minlength=16).double()
    assert_follows(counts, pairs.flatten())
    assert_follows(torch.bincount(drawn.token[:, 0], minlength=4).double(), probs)
    torch.testing.assert_close(drawn.logprob, probs.log()[drawn.token])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 7, 299, 300, 305])
def test_sample_distinct_matches_the_reference(dtype, m):
    logits = (2.0 * torch.randn(4, 300)).to(dtype)
    for options in ({}, {"temperature": 0.6, "top_k": 30}, {"temperature": 0.0}, {"top_p": 0.9}):
        with explain(str(options)):
            assert_drawn_matches(logits, m=m, seed=m, position=torch.arange(4), **options)


def test_sample_distinct_of_a_whole_vocabulary_is_a_permutation():
    token = sk.sample_distinct(torch.zeros(2, 5003), 5003, seed=0, position=torch.arange(2)).token
    assert torch.equal(token.sort(-1).values, torch.arange(5003).expand(2, -1))
    assert not torch.equal(token[0], token[1])


def test_sample_distinct_ends_in_padding_where_too_few_are_left():
    logits = torch.randn(5, 6)
    drawn = sk.sample_distinct(logits, 8, seed=0, position=torch.arange(5), top_k=3)
    assert [sorted(row[:3].tolist()) for row in drawn.token] == [sorted(row.topk(3).indices.tolist()) for row in logits]
    assert (drawn.token[:, 3:] == -1).all()
    assert (drawn.logprob[:, 3:] == -INF).all()
    assert (drawn.truncated_logprob[:, 3:] == -INF).all()
    undefined = sk.sample_distinct(torch.tensor([[NAN, 1.0]]), 3, seed=0, position=0)
    assert undefined.token.tolist() == [[-1] * 3]
    assert undefined.logprob.isnan().all()


PER_ROW = {
    "seed": torch.tensor([1, 2, 3]),
    "position": torch.tensor([4, 5, 6]),
    "temperature": torch.tensor([0.0, 0.5, 2.0]),
    "top_k": torch.tensor([0, 5, 30]),
    "top_p": torch.tensor([1.0, 0.5, 0.9]),
    "min_p": torch.tensor([0.0, 0.1, 0.0]),
}


@pytest.mark.parametrize("options", [{"seed": 1, "position": 2, "top_k": 3}, PER_ROW])
def test_sample_logits_opcheck(options):
    logits = torch.randn(3, 21)
    assert opcheck_calls_of(sk.sample_logits, logits, **options) == ["slimkernels::sample_logits"]
    assert opcheck_calls_of(sk.sample_distinct, logits, 3, **options) == ["slimkernels::sample_logits"]


@pytest.mark.parametrize("options", [{"seed": 1, "position": 2, "top_k": 3, "temperature": 0.5}, PER_ROW])
def test_sample_logits_compiles_whole(options):
    logits = torch.randn(3, 21)

    def draw(logits, options):
        drawn = sk.sample_logits(torch.tanh(logits), **options)
        return (*drawn, *sk.sample_distinct(logits, 2, **options), drawn.token + 1)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(logits, options), draw(logits, options))
    other = {**options, "position": options["position"] + 7}
    assert_same_bits(compiled(logits, other), draw(logits, other))


def test_sample_logits_has_no_gradient():
    logits = torch.randn(3, 21, requires_grad=True)
    assert not any(field.requires_grad for field in sk.sample_logits(logits * 2, **PER_ROW))


def test_sample_logits_fake_has_the_shapes_and_dtypes_of_the_real():
    for dtype in DTYPES:
        for function in (sk.sample_logits, lambda logits, **o: sk.sample_distinct(logits, 4, **o)):
            real = function(torch.zeros(2, 3, 9, dtype=dtype), seed=0, position=0)
            fake = function(torch.zeros(2, 3, 9, dtype=dtype, device="meta"), seed=0, position=0)
            for one, other in zip(fake, real, strict=True):
                assert (one.shape, one.dtype, one.device.type) == (other.shape, other.dtype, "meta")


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "temperature must be finite and at least 0, got -1", {"temperature": -1}),
        (ValueError, "temperature must be finite and at least 0, got nan", {"temperature": NAN}),
        (ValueError, "temperature must be finite and at least 0, got inf", {"temperature": INF}),
        (ValueError, r"temperature .* every row, got -1.0 in row \[1\]", {"temperature": torch.tensor([1.0, -1.0])}),
        (ValueError, r"temperature .* every row, got nan in row \[0\]", {"temperature": torch.tensor([NAN, 1.0])}),
        (ValueError, r"temperature .* every row, got inf in row \[0\]", {"temperature": torch.tensor([INF, 1.0])}),
        (ValueError, r"temperature must .* shape \(2,\), .* got \(3,\)", {"temperature": torch.ones(3)}),
        (ValueError, r"temperature must be on cpu", {"temperature": torch.ones(2, device="meta")}),
        (TypeError, r"temperature .* floating-point .* temperature\.float\(\)", {"temperature": torch.tensor([1, 2])}),
        (TypeError, "temperature must be a number", {"temperature": "hot"}),
        (TypeError, "temperature must be a number", {"temperature": True}),
        (ValueError, r"top_k must be at least 0", {"top_k": -1}),
        (ValueError, r"top_k .* every row, got -3 in row \[1\]", {"top_k": torch.tensor([0, -3])}),
        (TypeError, "top_k must be an integer", {"top_k": 2.0}),
        (TypeError, r"top_k must have dtype torch.int64, .* top_k\.long\(\)", {"top_k": torch.tensor([1.0, 2.0])}),
        (ValueError, r"top_k must .* shape \(2,\)", {"top_k": torch.ones(2, 1, dtype=torch.int64)}),
        (ValueError, r"top_p must be in \[0, 1\], got 1.5", {"top_p": 1.5}),
        (ValueError, r"top_p must be in \[0, 1\], got -0.1", {"top_p": -0.1}),
        (
            ValueError,
            r"top_p must be in \[0, 1\] in every row, got 2.0 in row \[1\]",
            {"top_p": torch.tensor([1.0, 2.0])},
        ),
        (ValueError, r"min_p must be in \[0, 1\], got 7", {"min_p": 7}),
        (
            ValueError,
            r"min_p must be in \[0, 1\] in every row, got -1.0 in row \[0\]",
            {"min_p": torch.tensor([-1.0, 0])},
        ),
        (ValueError, "seed must fit into a signed 64-bit integer", {"seed": 2**63}),
        (TypeError, "seed must be an integer", {"seed": 1.5}),
        (TypeError, r"seed must have dtype torch.int64, .* seed\.long\(\)", {"seed": torch.zeros(2)}),
        (ValueError, r"position must .* shape \(2,\), .* got \(5,\)", {"position": torch.arange(5)}),
        (ValueError, "position must be on cpu", {"position": torch.zeros(2, dtype=torch.int64, device="meta")}),
        (TypeError, "position must have dtype", {"position": torch.zeros(2, dtype=torch.int32)}),
        (TypeError, "logits must be float32", {"logits": torch.zeros(2, 5, dtype=torch.int64)}),
        (ValueError, "logits must have shape", {"logits": torch.tensor(1.0)}),
        (ValueError, "logits must have shape", {"logits": torch.zeros(2, 0)}),
    ],
)
def test_sample_logits_refuses(error, message, options):
    options = {"logits": torch.zeros(2, 5), "seed": 0, "position": 0, **options}
    with pytest.raises(error, match=message):
        sk.sample_logits(**options)
    with pytest.raises(error, match=message):
        sk.sample_distinct(m=2, **options)


@pytest.mark.parametrize(
    ("error", "message", "m"),
    [(ValueError, "m must be at least 1, got 0", 0), (TypeError, "m must be an integer, got float 2.0", 2.0)],
)
def test_sample_distinct_refuses(error, message, m):
    with pytest.raises(error, match=message):
        sk.sample_distinct(torch.zeros(2, 5), m, seed=0, position=0)


def test_sample_logits_needs_seed_and_position():
    with pytest.raises(TypeError, match="seed"):
        sk.sample_logits(torch.zeros(2, 5), position=0)
    with pytest.raises(TypeError, match="position"):
        sk.sample_logits(torch.zeros(2, 5), seed=0)
