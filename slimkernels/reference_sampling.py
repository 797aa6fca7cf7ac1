"""Defines the sampling ops in plain torch: truncation, counter-based noise, and the draws made with it.

This module continues ``reference.py``. Scores and noise are computed in float64 for every dtype of the logits.

Noise of ``sample_logits`` and ``sample_distinct``: every token id of a row has one Gumbel variate, which is a function
of (seed, position, token id) only:

- Philox-4x32-10 (Salmon et al. 2011) with key ``(seed & 0xffffffff, seed >> 32)`` and counter
  ``(token_id // 4, 0, position & 0xffffffff, position >> 32)``, seed and position being the 64 bits of an int64;
  ``bits`` is word ``token_id % 4`` of the output. One call serves four neighbouring ids.
- u = (bits + 0.5) / 2^32, inside (0, 1).
- Gumbel = -log(-log(1 - u)). The largest variates, which win an argmax, are those near u = 0, where floats are densest.
  A kernel in float32 uses log1p(-u) if bits < 2^31 and log((0xffffffff - bits + 0.5) / 2^32) otherwise, so that 1 - u
  is never rounded.
- A seed given as one number is spread over the N rows of a call: row 0 takes it as it is, and row n the first two words
  of Philox with the key ``(seed & 0xffffffff, seed >> 32)`` and the counter ``(n, 0xffffffff, 0, 0)``, the first word
  being the lower half of an int64. Seeds given per row are used as they are.

Draws with replacement, of ``sample_targets`` (version 2; version 1 ran a Gumbel race per draw): the inverse of the
cumulative distribution, at one uniform number per draw. Weights, prefix sums and uniforms are integers, so every device
and every order of summation draws the same ids.

- An id's weight is 2^-t in fixed point, where t = (top - logit) / (T ln 2) and ``top`` is the largest logit of the row.
  Three operations are in floating point, none of which can be fused or reordered: the difference, its product with the
  constant ``2^25 / (T ln 2)``, and the conversion of that to an integer, which truncates. They are in float64 for
  float64 logits and in float32 for all others. The constant is divided in float64, limited to [2^-100, 2^124] and then
  rounded, so that no product is 0 * inf and a denormal difference counts as 0 whether it is flushed or not.
- t now has 25 bits of fraction and is at most 63. 2^-fraction is a polynomial of degree 6 in 32-bit integers
  (``POWER_OF_HALF``), scaled by 2^31; the integer part of t shifts it to the right. All weights are first shifted to
  the left by 31 minus the bits of V - 1, so that the sum of a row is at most 2^62.
- Draw r takes two words of Philox with the row's key and the counter
  ``(r // 2, 0xfffffffe, position & 0xffffffff, position >> 32)``: the first two if r is even, else the last two. Their
  upper 31 bits each, the first word being the lower half, are an integer u of 62 bits.
- With the sum s of the weights, the drawn id is the first whose prefix sum exceeds floor(u s / 2^62).

The probability of every id is within 2^-20 of softmax(logits / T), and half of the differences of all ids sum to less
than 2^-18. Nearly all of that is the rounding of t, which is three float32 roundings in float32 and 2^-25 in float64;
the polynomial is exact to 2^-27, and the uniform number to 2^-62. Ids whose probability is less than V 2^-62 times the
largest are never drawn.

Rows for which softmax is undefined: logits of +inf share the mass equally, which is the limit of ever larger ones. A
row with a NaN, or of -inf only, has no distribution: nothing is drawn (token -1) and its numbers are NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.sparse_logits import SparseLogits


class Sampled(NamedTuple):
    """Drawn tokens.

    Attributes:
        token: Drawn ids, int64; the other fields are float32 (float64 for float64 logits).
        logprob: Log-probability under softmax(logits).
        truncated_logprob: Log-probability under the distribution drawn from.
        entropy: Entropy of softmax(logits) in nats.
    """

    token: Tensor
    logprob: Tensor
    truncated_logprob: Tensor
    entropy: Tensor


def sample_logits(
    logits: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
) -> Sampled:
    """Draws the argmax of truncated log-probabilities plus Gumbel noise from every row; the lowest id on a tie.

    Each of the three truncations keeps either all or none of the ids that share a score.

    Args:
        logits: (..., V), any float dtype; -inf is never drawn.
        seed: int64, a number, which is spread over the rows, or (...).
        position: int64, a number or (...). Rows that share seed and position share their noise.
        temperature: Temperature of the scores; 0 takes the argmax, the lowest id on a tie.
        top_k: Number of ids to keep, with all that tie with the last of them; 0 (or V and more) keeps every id.
        top_p: Mass of the nucleus. After top-k and renormalisation, an id is kept if all strictly likelier ids sum to
            less than this; the likeliest is always kept. 1 keeps every id.
        min_p: Smallest ratio to the likeliest id's probability that is kept.

    Returns:
        Sampled, every field (...).
    """
    drawn = sample_distinct(
        logits,
        1,
        seed=seed,
        position=position,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    token, logprob, truncated_logprob = (field.squeeze(-1) for field in drawn[:3])
    return Sampled(token, logprob, truncated_logprob, drawn.entropy)


def sample_distinct(
    logits: Tensor,
    m: int,
    *,
    seed: int | Tensor,
    position: int | Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
) -> Sampled:
    """Draws m ids without replacement: those with the largest perturbed scores of ``sample_logits``, largest first.

    Returns:
        Sampled with token, logprob and truncated_logprob (..., m), entropy (...). A row with fewer than m ids left
        (temperature 0 leaves one) ends in tokens -1 with log-probabilities -inf.
    """
    if m < 1:
        raise ValueError(f"m must be at least 1, got {m}")
    rows, undefined = _limit_rows(logits)
    logprobs = torch.log_softmax(rows, dim=-1)
    truncated = _truncated_logprobs(
        rows,
        *(_per_row(option, rows).double() for option in (temperature, top_k, top_p, min_p)),
    )
    perturbed = truncated + gumbel_noise(spread_seed(seed, rows), _per_row(position, rows), rows.shape[-1])
    # A stable sort puts the lowest id first among equals.
    token = perturbed.sort(dim=-1, descending=True, stable=True).indices[..., :m]
    possible = (truncated.gather(-1, token) > -math.inf) & ~undefined
    logprob = logprobs.gather(-1, token).masked_fill(~possible, -math.inf)
    entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs == -math.inf, 0.0)).sum(-1)
    entropy = entropy.masked_fill(undefined.squeeze(-1), math.nan)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def widen(field: Tensor, padding: float) -> Tensor:
        return torch.nn.functional.pad(field, (0, m - field.shape[-1]), value=padding)

    return Sampled(
        widen(token.masked_fill(~possible, -1), -1),
        widen(logprob, -math.inf).masked_fill(undefined, math.nan).to(dtype),
        widen(truncated.gather(-1, token), -math.inf).masked_fill(undefined, math.nan).to(dtype),
        entropy.to(dtype),
    )


def sample_targets(
    logits: Tensor,
    rounds: int,
    seed: int | Tensor,
    *,
    position: int | Tensor,
    temperature: float = 1.0,
    target: Tensor | None = None,
) -> SparseLogits:
    """Draws ``rounds`` ids with replacement from softmax(logits / T) and returns them as an unbiased sparse target.

    The distinct ids of a row have logits log(count / rounds), with lse 0: a row is a complete distribution, to be used
    at temperature 1. The draws are those of the module docstring.

    Args:
        logits: (..., V), any float dtype.
        rounds: Number of draws.
        seed: int64, a number, which is spread over the rows, or (...).
        position: int64, a number or (...). Rows that share seed and position share their noise.
        temperature: T, positive.
        target: (...) int64. ``target_logit`` is then the label's exact log softmax(logits); NaN for a negative label.

    Returns:
        SparseLogits (..., K) with K = min(rounds, V), float32 (float64 for float64 logits).
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    rows, undefined = _limit_rows(logits)
    vocab_size = rows.shape[-1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    prefix_sums = draw_weights(rows.to(dtype), temperature).cumsum(-1)
    points = draw_points(spread_seed(seed, rows), _per_row(position, rows), rounds, prefix_sums[..., -1:])
    # The first id whose prefix sum exceeds the point.
    drawn_ids = torch.searchsorted(prefix_sums, points, right=True)
    counts = torch.zeros_like(rows).scatter_add_(-1, drawn_ids, torch.ones_like(points, dtype=rows.dtype))
    ids = torch.arange(vocab_size, device=rows.device).expand(rows.shape)
    ids = ids.masked_fill((counts == 0) | undefined, vocab_size).sort(-1).values[..., : min(rounds, vocab_size)]
    drawn = ids < vocab_size
    share = counts.gather(-1, ids.clamp(max=vocab_size - 1)) / rounds
    target_logit = None
    if target is not None:
        target_logit = torch.log_softmax(rows, -1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        target_logit = target_logit.masked_fill((target < 0) | undefined.squeeze(-1), math.nan).to(dtype)
    return SparseLogits(
        ids=ids.masked_fill(~drawn, -1).to(torch.int32),
        logits=share.masked_fill(~drawn, 1.0).log().to(dtype),
        lse=rows.new_zeros(*rows.shape[:-1], 1, dtype=dtype),
        rest_lse=torch.where(drawn[..., :1], -math.inf, math.nan).to(dtype),
        target_logit=target_logit,
    )


def mixed_targets(
    logits: Tensor,
    top_k: int,
    rounds: int,
    seed: int | Tensor,
    *,
    position: int | Tensor,
    temperature: float = 1.0,
    target: Tensor | None = None,
) -> SparseLogits:
    """Keeps the ``top_k`` likeliest ids with exact log-probabilities and spreads the rest of the mass over drawn ids.

    Args:
        logits: (..., V), any float dtype. Ties go to the lowest id.
        top_k: Number of ids that are always kept.
        rounds: Number of draws from the others, as by ``sample_targets`` on the row without the ``top_k``.
        seed: int64, a number, which is spread over the rows, or (...).
        position: int64, a number or (...).
        temperature: T, positive.
        target: (...) int64, as in ``sample_targets``.

    Returns:
        SparseLogits (..., top_k + min(rounds, V - top_k)), lse 0. Rows with NaN or +inf, or of -inf only, keep no id.
    """
    rows = logits.detach().double()
    vocab_size = rows.shape[-1]
    probs = torch.softmax(rows / temperature, -1)
    head = torch.sort(rows, dim=-1, descending=True, stable=True).indices[..., :top_k]
    others = logits.detach().scatter(-1, head, -math.inf)
    drawn = sample_targets(others, rounds, seed, position=position, temperature=temperature)
    mass = probs.scatter(-1, head, 0.0).sum(-1, keepdim=True)
    # The padding of the draws is scattered into an extra column, which is dropped.
    column = drawn.ids.long().masked_fill(drawn.ids < 0, vocab_size)
    shares = torch.zeros_like(rows[..., :1]).expand(*rows.shape[:-1], vocab_size + 1)
    shares = shares.scatter(-1, column, mass * drawn.logits.double().exp())[..., :vocab_size]
    shares = shares.scatter(-1, head, probs.gather(-1, head)).nan_to_num(0.0)
    ids = torch.arange(vocab_size, device=rows.device).expand(rows.shape)
    ids = ids.masked_fill(shares == 0, vocab_size).sort(-1).values[..., : top_k + min(rounds, vocab_size - top_k)]
    kept = ids < vocab_size
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    target_logit = None
    if target is not None:
        target_logit = torch.log_softmax(rows, -1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        target_logit = target_logit.masked_fill(target < 0, math.nan).to(dtype)
    return SparseLogits(
        ids=ids.masked_fill(~kept, -1).to(torch.int32),
        logits=shares.gather(-1, ids.clamp(max=vocab_size - 1)).masked_fill(~kept, 1.0).log().to(dtype),
        lse=rows.new_zeros(*rows.shape[:-1], 1, dtype=dtype),
        rest_lse=torch.where(kept[..., :1], -math.inf, math.nan).to(dtype),
        target_logit=target_logit,
    )


def spread_seed(seed: int | Tensor, rows: Tensor) -> Tensor:
    """Returns the int64 seeds (..., 1) of the rows (..., V), spread as the module docstring says if one is given."""
    given = _per_row(seed, rows)
    if isinstance(seed, Tensor) and seed.ndim > 0:
        return given
    number = torch.arange(given.numel(), device=rows.device).reshape(given.shape)
    counter = (number, torch.full_like(number, _WORD), torch.zeros_like(number), torch.zeros_like(number))
    low, high, _, _ = philox(counter, (given & _WORD, (given >> 32) & _WORD))
    return torch.where(number == 0, given, low | (high << 32))


def draw_weights(rows: Tensor, temperature: float) -> Tensor:
    """Computes the int64 weights (..., V) of the module docstring, of rows with a largest logit that is finite."""
    rate = min(max(2**_FRACTION_BITS * math.log2(math.e) / temperature, 2.0**-100), 2.0**124)
    fall = (rows.amax(-1, keepdim=True) - rows) * torch.tensor(rate, dtype=rows.dtype, device=rows.device)
    fixed = fall.clamp(max=63 * 2**_FRACTION_BITS).long()
    fraction = (fixed % 2**_FRACTION_BITS) << (32 - _FRACTION_BITS)
    power = torch.zeros_like(fraction)
    for coefficient in reversed(POWER_OF_HALF):
        power = coefficient - ((fraction * power) >> 32)
    return (power << (31 - (rows.shape[-1] - 1).bit_length())) >> (fixed >> _FRACTION_BITS)


def draw_points(seed: Tensor, position: Tensor, rounds: int, total: Tensor) -> Tensor:
    """Computes floor(u total / 2^62) of every draw, int64 (..., rounds), with the u of the module docstring.

    Args:
        seed: (..., 1) int64.
        position: (..., 1) int64.
        rounds: Number of draws.
        total: (..., 1) int64 in [1, 2^62], the sum of the weights.
    """
    pair = torch.arange((rounds + 1) // 2, device=seed.device)
    counter = (pair, torch.full_like(pair, _WORD - 1), position & _WORD, (position >> 32) & _WORD)
    words = torch.stack(philox(counter, (seed & _WORD, (seed >> 32) & _WORD)), -1) >> 1
    low, high = (words[..., half::2].flatten(-2)[..., :rounds] for half in (0, 1))
    # Both factors have a lower half of 31 bits, so that no int64 overflows.
    total_low, total_high = total & (2**31 - 1), total >> 31
    return high * total_high + ((high * total_low + low * total_high + ((low * total_low) >> 31)) >> 31)


_FRACTION_BITS = 25
# 2^31 times the coefficients of 2^-x = c0 - x (c1 - x (c2 - ...)) on [0, 1], to a relative error of 2^-27.
POWER_OF_HALF = (2147483648, 1488521986, 515877902, 119165493, 20571132, 2737501, 234126)


def gumbel_noise(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Computes the float64 noise (..., V) of the module docstring; ``seed`` and ``position`` are int64 (..., 1)."""
    token_id = torch.arange(vocab_size, device=seed.device)
    counter = (token_id // 4, torch.zeros_like(token_id), position & _WORD, (position >> 32) & _WORD)
    words = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    lane = (token_id % 4).expand(words[0].shape).unsqueeze(0)
    bits = torch.stack(words).gather(0, lane).squeeze(0)
    return -torch.log(-torch.log1p(-(bits.double() + 0.5) / 2**32))


_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes Philox-4x32-10 of a counter of four words and a key of two; words are 32 bits in int64 tensors."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter, *key)[:4]
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap around, so they hold all 64 bits of the unsigned product, one of them as the sign.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = (product0 >> 32) & _WORD, (product1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _WORD, high0 ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _limit_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns float64 rows (..., V) with a defined softmax, and a mask (..., 1) of rows without a distribution."""
    rows = logits.detach().double()
    undefined = rows.isnan().any(-1, keepdim=True) | (rows == -math.inf).all(-1, keepdim=True)
    infinite = rows == math.inf
    limit = torch.zeros_like(rows).masked_fill(~infinite, -math.inf)
    rows = torch.where(infinite.any(-1, keepdim=True), limit, rows)
    return rows.masked_fill(undefined, 0.0), undefined


def _truncated_logprobs(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Returns the log-probabilities (..., V) of the distribution drawn from; -inf for ids that are cut.

    Options are (..., 1).
    """
    vocab_size = logits.shape[-1]
    greedy = temperature == 0
    scores = logits / temperature.masked_fill(greedy, 1.0)

    top_k = top_k.long()
    top_k = top_k.masked_fill((top_k < 1) | (top_k > vocab_size), vocab_size)
    falling = scores.sort(-1, descending=True).values
    scores = scores.masked_fill(scores < falling.gather(-1, top_k - 1), -math.inf)

    falling = scores.sort(-1, descending=True).values
    first_equal = torch.searchsorted(-falling, -scores)
    likelier = torch.softmax(falling, -1).cumsum(-1).roll(1, -1)
    likelier[..., 0] = 0.0
    likelier = likelier.gather(-1, first_equal)
    scores = scores.masked_fill((likelier >= top_p) & (top_p < 1) & (first_equal > 0), -math.inf)

    peak = scores.amax(-1, keepdim=True)
    scores = scores.masked_fill((scores - peak).exp() < min_p, -math.inf)

    best = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, logits.argmax(-1, keepdim=True), True)
    return torch.log_softmax(scores.masked_fill(greedy & ~best, -math.inf), -1)


def _per_row(option: float | Tensor, rows: Tensor) -> Tensor:
    """Returns a number or a tensor (...) as a tensor (..., 1) that broadcasts with the rows (..., V)."""
    dtype = torch.float64 if isinstance(option, float) else None
    return torch.as_tensor(option, dtype=dtype, device=rows.device).expand(rows.shape[:-1]).unsqueeze(-1)
