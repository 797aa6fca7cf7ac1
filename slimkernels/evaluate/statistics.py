"""Statistics of scores: bootstrap and Wilson intervals, an exact sign-flip test, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

# All sign assignments are enumerated for up to _MAX_EXACT differing samples; for more, _NUM_FLIPS are drawn.
_MAX_EXACT = 16
_NUM_FLIPS = 20_000
# Random numbers drawn at a time, to bound the memory.
_CHUNK = 1_000_000


class Interval(NamedTuple):
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """The mean difference b - a of paired scores.

    Attributes:
        value: Mean of b - a.
        low: Lower end of the bootstrap interval.
        high: Upper end of the bootstrap interval.
        p_value: P-value of the two-sided sign-flip test, adjusted for multiple comparisons if ``holm`` returned it.
        num_samples: Number of pairs.
        confidence: Confidence level of the interval.
    """

    value: float
    low: float
    high: float
    p_value: float
    num_samples: int
    confidence: float = 0.95

    @property
    def is_shown(self) -> bool:
        """Whether the samples show a difference: the interval excludes zero, and the test rejects equality.

        The bootstrap interval alone is too narrow for a handful of samples; the test is valid for any number of them.
        """
        return not self.low <= 0 <= self.high and self.p_value < 1 - self.confidence


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Computes mean(b - a) over paired scores, its percentile bootstrap interval, and its p-value.

    Samples are resampled with replacement as pairs. Average the scores of several seeds per sample first, since the
    samples, not the seeds, are drawn from the population of interest.

    Args:
        a: (n,) scores.
        b: (n,) scores of the same samples.
        weights: (n,) positive weights of the samples in the mean, such as the numbers of labels of documents whose
            scores are means over labels. None weights all samples equally.
        confidence: Confidence level of the interval, in (0, 1).
        num_resamples: Number of bootstrap resamples.
        seed: Seed of the resampling, and of the sign flips where not all of them are enumerated.

    Raises:
        ValueError: There are no samples, the lengths differ, a score is not finite, a weight is not positive, or
            ``confidence`` is outside (0, 1).

    References: Efron & Tibshirani 1993, chapter 13; Koehn 2004 (paired bootstrap for comparisons of systems).
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a and b must be scores of the same samples, got {first.shape} and {second.shape}")
    differences = second - first
    value, low, high = bootstrap_interval(
        differences, weights=weights, confidence=confidence, num_resamples=num_resamples, seed=seed
    )
    # Flipping signs tests the sum of the differences, here the weighted ones.
    flipped = differences if weights is None else differences * np.asarray(weights, np.float64)
    return Difference(value, low, high, sign_flip_p_value(flipped, seed=seed), len(differences), confidence)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Computes the mean of (n,) values, with (n,) ``weights`` if given, and its percentile bootstrap interval.

    Raises:
        ValueError: There are no values, a value is not finite, a weight is not positive, or ``confidence`` is outside
            (0, 1).
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be (n,) scores of at least one sample, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("values must be finite scores, got NaN or infinity")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    parts = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    if parts.shape != values.shape or not (parts > 0).all():
        raise ValueError(f"weights must be positive, one for each of the {len(values)} samples, got {parts}")
    weighted = values * parts
    generator = np.random.default_rng(seed)
    at_once = max(1, _CHUNK // len(values))
    means = []
    for done in range(0, num_resamples, at_once):
        drawn = generator.integers(len(values), size=(min(at_once, num_resamples - done), len(values)))
        means.append(weighted[drawn].sum(1) / parts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(weighted.sum() / parts.sum()), float(low), float(high))


def wilson_interval(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Computes the share of successes and its Wilson interval, which has a positive width even at shares of 0 and 1.

    Raises:
        ValueError: There are no trials, or more successes than trials.

    References: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= successes <= trials or not trials:
        raise ValueError(f"successes must be between 0 and at least one trial, got {successes} of {trials}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = successes / trials, z * z / trials
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    # Rounding can move an end slightly outside [0, 1] when all or none succeeded.
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def sign_flip_p_value(differences: Sequence[float] | np.ndarray, *, seed: int = 0) -> float:
    """Computes the two-sided p-value of the mean of paired differences under random signs.

    The p-value is the share of sign assignments whose absolute sum is at least the observed one. All assignments are
    enumerated for at most 16 nonzero differences; for more, 20,000 are drawn, and the observed one is added to them. If
    all nonzero differences have the same absolute value, the test is the two-sided binomial test on the samples that
    differ (McNemar's exact test), which is computed exactly for any number of them.
    """
    differences = np.asarray(differences, np.float64)
    differences = differences[differences != 0]
    count = len(differences)
    if not count:
        return 1.0
    if (np.abs(differences) == np.abs(differences[0])).all():
        return _binomial_p_value(int((differences > 0).sum()), count)
    seen = abs(differences.sum()) * (1 - 1e-12)  # equal sums may differ in their last digit
    if count <= _MAX_EXACT:
        signs = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        return float((np.abs(signs @ differences) >= seen).mean())
    generator = np.random.default_rng(seed)
    hits, at_once = 0, max(1, _CHUNK // count)
    for done in range(0, _NUM_FLIPS, at_once):
        signs = 1 - 2 * generator.integers(2, size=(min(at_once, _NUM_FLIPS - done), count))
        hits += int((np.abs(signs @ differences) >= seen).sum())
    return (hits + 1) / (_NUM_FLIPS + 1)


def holm(differences: Sequence[Difference]) -> list[Difference]:
    """Returns the differences with p-values adjusted for multiple comparisons by Holm's method.

    References: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = sorted(range(len(differences)), key=lambda index: differences[index].p_value)
    adjusted, largest = list(differences), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * differences[index].p_value))
        adjusted[index] = differences[index]._replace(p_value=largest)
    return adjusted


def _binomial_p_value(successes: int, trials: int) -> float:
    """Computes the two-sided p-value of a binomial test at probability 1/2."""
    tail = min(successes, trials - successes)
    return min(1.0, 2 * sum(math.comb(trials, k) for k in range(tail + 1)) / 2**trials)
