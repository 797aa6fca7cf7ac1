"""The sampling oracle: published vectors of its generator, paper, and statistics of a fixed seed."""

from __future__ import annotations

import math

import pytest
import torch
from support.helpers import assert_same_bits, loss_and_grads

from slimkernels import reference
from slimkernels import reference_sampling as sampling

F64 = torch.float64
WORD = 0xFFFFFFFF
# Quantiles of the chi-square distribution at 99.9 %, by degrees of freedom.
CHI_SQUARE = {2: 13.82, 3: 16.27, 5: 20.52, 11: 31.26}


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 once more, in Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & WORD, (first >> 32) ^ c3 ^ k1, first & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # The known answers of Random123's kat_vectors.
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert philox_in_integers(counter, key) == words
    actual = sampling.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in actual] == words


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, -5])
@pytest.mark.parametrize("position", [0, 2**33 + 1, -1])
def test_gumbel_noise_is_the_documented_map(seed, position):
    noise = sampling.gumbel_noise(torch.tensor([[seed]]), torch.tensor([[position]]), 11)
    for token_id, actual in enumerate(noise[0].tolist()):
        counter = [token_id // 4, 0, position & WORD, (position >> 32) & WORD]
        bits = philox_in_integers(counter, [seed & WORD, (seed >> 32) & WORD])[token_id % 4]
        expected = -math.log(-math.log1p(-(bits + 0.5) / 2**32))
        assert math.isclose(actual, expected, rel_tol=1e-12, abs_tol=1e-12)


def test_gumbel_noise_has_the_moments_of_a_gumbel_variate():
    noise = sampling.gumbel_noise(torch.full((200, 1), 3), torch.arange(200)[:, None], 1000)
    # Mean is Euler's constant and the variance pi^2 / 6; five standard errors of 200,000 draws.
    assert abs(noise.mean() - 0.57721566) < 5 * math.sqrt(math.pi**2 / 6 / noise.numel())
    assert abs(noise.var() - math.pi**2 / 6) < 0.03
    for other in (noise[:, 1:], noise[:, 2:], noise[:, 4:]):
        first = noise[:, : other.shape[1]]
        assert abs(torch.corrcoef(torch.stack([first.reshape(-1), other.reshape(-1)]))[0, 1]) < 0.015
    assert abs(torch.corrcoef(torch.stack([noise[:-1].reshape(-1), noise[1:].reshape(-1)]))[0, 1]) < 0.015


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_sample_logits_draws_from_the_softmax(temperature):
    num_rows = 20000
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -0.5], dtype=F64)
    drawn = sampling.sample_logits(
        logits.expand(num_rows, 6), seed=11, position=torch.arange(num_rows), temperature=temperature
    )
    counts = torch.bincount(drawn.token, minlength=6).double()
    assert chi_square(counts, torch.softmax(logits / temperature, -1)) < CHI_SQUARE[5]
    logprobs = torch.log_softmax(logits, -1)
    torch.testing.assert_close(drawn.logprob, logprobs[drawn.token])
    torch.testing.assert_close(drawn.truncated_logprob, torch.log_softmax(logits / temperature, -1)[drawn.token])
    torch.testing.assert_close(drawn.entropy, -(logprobs.exp() * logprobs).sum().expand(num_rows))


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
        # T = 1/2 squares: (16, 9, 4, 1) / 30, ratios 1, 0.5625, 0.25, 0.0625.
        ({"temperature": 0.5, "min_p": 0.5}, [0, 1]),
        ({"temperature": 0.5, "top_p": 0.5}, [0]),
        ({"temperature": 0.0}, [0]),
        ({"temperature": 0.0, "top_k": 3, "min_p": 0.1}, [0]),
    ],
)
def test_sample_logits_truncation_hand_worked(options, kept):
    num_rows = 3000
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64)
    drawn = sampling.sample_logits(probs.log().expand(num_rows, 4), seed=5, position=torch.arange(num_rows), **options)
    temperature = options.get("temperature", 1.0) or 1.0
    truncated = torch.zeros(4, dtype=F64)
    truncated[kept] = probs[kept] ** (1.0 / temperature)
    truncated /= truncated.sum()
    counts = torch.bincount(drawn.token, minlength=4)
    assert counts.nonzero().flatten().tolist() == kept
    if len(kept) > 2:
        assert chi_square(counts[kept].double(), truncated[kept]) < CHI_SQUARE[len(kept) - 1]
    torch.testing.assert_close(drawn.truncated_logprob, truncated[drawn.token].log())
    torch.testing.assert_close(drawn.logprob, probs[drawn.token].log())


def test_sample_logits_equal_scores_stand_or_fall_together():
    logits = torch.tensor([1.0, 0.0, 1.0, 1.0, -1.0])
    rows, positions = logits.expand(500, 5), torch.arange(500)
    for options in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 0.9}):
        drawn = sampling.sample_logits(rows, seed=1, position=positions, **options)
        assert drawn.token.unique().tolist() == [0, 2, 3]
    greedy = sampling.sample_logits(rows, seed=1, position=positions, temperature=0.0)
    assert greedy.token.unique().tolist() == [0]
    assert not greedy.truncated_logprob.any()


@pytest.mark.slow
def test_sample_logits_truncates_like_transformers():
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = 3.0 * torch.randn(40, 97, dtype=F64)
    expected = logits
    for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(30), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)):
        expected = warper(None, expected)
    options = (torch.full((40, 1), value, dtype=F64) for value in (0.8, 30, 0.9, 0.05))
    actual = sampling._truncated_logprobs(logits, *options)
    torch.testing.assert_close(actual, torch.log_softmax(expected, -1))


def test_sample_logits_of_a_row_depends_on_nothing_but_the_row():
    num_rows = 40
    logits, seed = torch.randn(num_rows, 33), torch.arange(num_rows) * 17
    position = torch.arange(num_rows) + 100
    options = {
        "temperature": torch.rand(num_rows) * 2,
        "top_k": torch.randint(0, 20, (num_rows,)),
        "top_p": torch.rand(num_rows) * 0.5 + 0.5,
        "min_p": torch.rand(num_rows) * 0.1,
    }
    options["temperature"][::7] = 0.0
    whole = sampling.sample_logits(logits, seed=seed, position=position, **options)
    order = torch.randperm(num_rows)[:13]
    some = sampling.sample_logits(
        logits[order], seed=seed[order], position=position[order], **{name: o[order] for name, o in options.items()}
    )
    assert_same_bits(some, [field[order] for field in whole])
    row = 9
    alone = sampling.sample_logits(
        logits[row],
        seed=int(seed[row]),
        position=int(position[row]),
        **{name: option[row].item() for name, option in options.items()},
    )
    assert alone.token == whole.token[row]
    assert len({int(t) for t in sampling.sample_logits(logits[:1].expand(40, 33), seed=seed, position=0).token}) > 5


def test_sample_logits_never_draws_what_is_impossible():
    logits = torch.full((200, 9), -math.inf)
    logits[:, 4], logits[:, 7] = 0.0, 1.0
    drawn = sampling.sample_logits(logits, seed=0, position=torch.arange(200))
    assert drawn.token.unique().tolist() == [4, 7]
    assert drawn.entropy.isfinite().all()
    assert drawn.logprob.isfinite().all()


@pytest.mark.parametrize(
    ("row", "options", "kept"),
    [
        ([math.inf, 0.0, -math.inf, math.inf], {}, [0, 3]),
        ([math.inf, 0.0, -math.inf, math.inf], {"top_k": 1, "top_p": 0.1}, [0, 3]),
        ([0.0, math.inf, math.inf, 1.0], {"temperature": 0.0}, [1]),
        ([-math.inf] * 3, {}, [-1]),
        ([0.0, math.nan, math.inf], {}, [-1]),
        ([0.0, math.nan, 1.0], {"temperature": 0.0}, [-1]),
    ],
)
def test_sampling_of_rows_that_softmax_has_no_answer_for(row, options, kept):
    rows, position = torch.tensor(row).expand(200, len(row)), torch.arange(200)
    drawn = sampling.sample_logits(rows, seed=1, position=position, **options)
    pairs = sampling.sample_distinct(rows, 2, seed=1, position=position, **options)
    targets = sampling.sample_targets(rows, 2, 1, position=position, target=torch.zeros(200, dtype=torch.int64))
    assert drawn.token.unique().tolist() == kept
    assert torch.equal(pairs.token[:, 0], drawn.token)
    if kept == [-1]:
        assert all(field.isnan().all() for field in (*drawn[1:], *pairs[1:], targets.target_logit))
        assert (targets.ids == -1).all()
        return
    infinite = row.count(math.inf)
    for name, share in (("truncated_logprob", len(kept)), ("logprob", infinite), ("entropy", 1 / infinite)):
        torch.testing.assert_close(getattr(drawn, name).exp(), torch.full((200,), 1 / share))
    assert targets.ids.unique().tolist() == [-1, *(v for v, z in enumerate(row) if z == math.inf)]
    torch.testing.assert_close(targets.target_logit.exp(), torch.full((200,), float(row[0] == math.inf) / infinite))


def test_sample_logits_takes_options_in_float64():
    # 0.7 and its float32 neighbour give other probabilities from the eighth digit on.
    drawn = sampling.sample_logits(torch.tensor([[0.0, 1.0]], dtype=F64), seed=0, position=0, temperature=0.7)
    expected = torch.log_softmax(torch.tensor([0.0, 1.0], dtype=F64) / 0.7, -1)[drawn.token]
    torch.testing.assert_close(drawn.truncated_logprob, expected, rtol=1e-14, atol=0)


def test_sample_distinct_draws_without_replacement():
    num_rows = 20000
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64)
    rows, position = probs.log().expand(num_rows, 4), torch.arange(num_rows)
    pairs = sampling.sample_distinct(rows, 2, seed=3, position=position).token
    # P(i, then j) = p_i p_j / (1 - p_i), twelve ordered pairs.
    expected = probs[:, None] * probs[None, :] / (1 - probs)[:, None]
    distinct = ~torch.eye(4, dtype=torch.bool)
    counts = torch.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16).reshape(4, 4)
    assert not counts[~distinct].any()
    assert chi_square(counts[distinct].double(), expected[distinct]) < CHI_SQUARE[11]
    assert torch.equal(pairs[:, 0], sampling.sample_logits(rows, seed=3, position=position).token)


def test_sample_distinct_ends_in_padding_where_too_few_are_left():
    logits = torch.randn(5, 6)
    drawn = sampling.sample_distinct(logits, 8, seed=0, position=torch.arange(5), top_k=3)
    assert drawn.token.shape == (5, 8)
    assert (drawn.token[:, 3:] == -1).all()
    assert [sorted(row[:3].tolist()) for row in drawn.token] == [sorted(row.topk(3).indices.tolist()) for row in logits]
    assert (drawn.logprob[:, 3:] == -math.inf).all()
    assert (drawn.truncated_logprob[:, 3:] == -math.inf).all()
    greedy = sampling.sample_distinct(logits, 2, seed=0, position=0, temperature=0.0)
    assert torch.equal(greedy.token[:, 0], logits.argmax(-1))
    assert (greedy.token[:, 1] == -1).all()


def test_sample_targets_is_a_legal_record_of_counts():
    logits, target = torch.randn(3, 5, 40), torch.randint(40, (3, 5))
    target[0, 0] = -100
    rounds, position = 12, torch.arange(15).reshape(3, 5)
    sparse = sampling.sample_targets(logits, rounds, 7, position=position, target=target)
    sparse.validate(40)
    assert (sparse.leading_shape, sparse.top_k) == ((3, 5), rounds)
    counts = (sparse.logits.exp() * rounds).masked_fill(sparse.ids < 0, 0.0)
    torch.testing.assert_close(counts, counts.round(), atol=1e-5, rtol=0)
    torch.testing.assert_close(counts.sum(-1), torch.full((3, 5), float(rounds)))
    expected = torch.log_softmax(logits, -1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(sparse.target_logit, expected.masked_fill(target < 0, math.nan), equal_nan=True)


def drawn_in_integers(row: list[float], rate: float, rounds: int, seed: int, position: int) -> list[int]:
    """The draws of a row of float64 logits once more, in Python's floats and integers, one id after the other."""
    shift, top, sums = 31 - (len(row) - 1).bit_length(), max(row), []
    for z in row:
        fixed = int(min((top - z) * rate, 63 * 2.0**25))
        fraction, power = (fixed & 0x1FFFFFF) << 7, 0
        for coefficient in sampling.POWER_OF_HALF[::-1]:
            power = coefficient - (fraction * power >> 32)
        sums.append((sums[-1] if sums else 0) + (power << shift >> (fixed >> 25)))
    drawn = []
    for draw in range(rounds):
        counter = [draw // 2, 0xFFFFFFFE, position & WORD, (position >> 32) & WORD]
        low, high = philox_in_integers(counter, [seed & WORD, (seed >> 32) & WORD])[2 * (draw % 2) :][:2]
        point = ((high >> 1 << 31 | low >> 1) * sums[-1]) >> 62
        drawn.append(next(i for i, total in enumerate(sums) if total > point))
    return drawn


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (-5, 2**33 + 1), (2**40 + 3, -1)])
@pytest.mark.parametrize("vocab_size", [1, 2, 9, 200])
def test_sample_targets_are_the_documented_draws(vocab_size, seed, position):
    row = 3.0 * torch.randn(vocab_size, dtype=F64)
    row[vocab_size // 2 + 1 :: 7] = -math.inf
    for temperature, rounds in ((1.0, 7), (0.3, 40)):
        rate = 2**25 / math.log(2) / temperature
        drawn = drawn_in_integers(row.tolist(), rate, rounds, seed, position)
        sparse = sampling.sample_targets(row, rounds, seed, position=position, temperature=temperature)
        ids = sorted(set(drawn))
        assert sparse.ids[: len(ids)].tolist() == ids
        expected = torch.tensor([drawn.count(i) / rounds for i in ids], dtype=F64).log()
        torch.testing.assert_close(sparse.logits[: len(ids)], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draw_weights_are_those_of_softmax(temperature, dtype, monkeypatch):
    peaked = torch.full((4096,), -8.0).index_fill(0, torch.tensor(9), 0.0)
    rows = torch.stack([0.1 * torch.randn(4096), 2.0 * torch.randn(4096), 9.0 * torch.randn(4096), peaked]).to(dtype)

    def differences() -> torch.Tensor:
        weights = sampling.draw_weights(rows, temperature)
        total = weights.sum(-1, keepdim=True)
        assert (total <= 2**62).all()
        return (weights.double() / total.double() - torch.softmax(rows.double() / temperature, -1)).abs()

    assert differences().max() < 2**-24
    assert differences().sum(-1).max() / 2 < 2**-22
    # The bounds notice a polynomial of a lower degree.
    monkeypatch.setattr(sampling, "POWER_OF_HALF", sampling.POWER_OF_HALF[:-1])
    assert differences().max() > 2**-24
    assert differences().sum(-1).max() / 2 > 2**-22


def test_draw_weights_of_the_largest_vocabulary_fit_into_64_bits():
    # As if the row had 2^31 - 1 equal logits: no shift is left, and every weight is 2^31.
    assert 31 - (2**31 - 2).bit_length() == 0
    assert (2**31 - 1) * sampling.POWER_OF_HALF[0] < 2**62
    for vocab_size in (1, 2, 3, 2**10, 2**10 + 1):
        assert 2**60 < int(sampling.draw_weights(torch.zeros(vocab_size), 1.0).sum()) <= 2**62


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sample_targets_give_the_dense_gradient_on_average(temperature):
    num_rows, rounds, vocab_size = 8000, 6, 5
    teacher = torch.tensor([1.0, -0.5, 2.0, 0.0, -2.0], dtype=F64)
    student = torch.tensor([0.3, 0.1, -0.4, 1.0, 0.2], dtype=F64)
    sparse = sampling.sample_targets(
        teacher.expand(num_rows, vocab_size), rounds, 1, position=torch.arange(num_rows), temperature=temperature
    )
    options = {"token_weight": "none", "ce_weight": 0.0}
    target = torch.zeros(num_rows, dtype=torch.int64)
    for rest in ("renorm", "zero"):
        # "mean" over rows that differ in nothing but the draw.
        _, (grad,) = loss_and_grads(
            reference.slim_loss, (student.expand(num_rows, vocab_size),), 1.0, target, sparse, rest=rest, **options
        )
        q, p = torch.softmax(teacher / temperature, -1), torch.softmax(student, -1)
        standard_error = (q * (1 - q) / (rounds * num_rows)).sqrt()
        assert ((grad.sum(0) - (p - q)).abs() < 4 * standard_error).all()


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("rounds", lambda: sampling.sample_targets(torch.zeros(2, 3), 0, 1, position=0)),
        ("temperature", lambda: sampling.sample_targets(torch.zeros(2, 3), 2, 1, position=0, temperature=0.0)),
        ("m must", lambda: sampling.sample_distinct(torch.zeros(2, 3), 0, seed=1, position=0)),
    ],
)
def test_sampling_refuses(message, call):
    with pytest.raises(ValueError, match=message):
        call()
