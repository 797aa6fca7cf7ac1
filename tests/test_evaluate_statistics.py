"""Intervals and tests: values by hand and by brute force, and their coverage by simulation."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest

from slimkernels.evaluate.statistics import (
    Difference,
    bootstrap_interval,
    holm,
    paired_difference,
    sign_flip_p_value,
    wilson_interval,
)


def test_sign_flip_on_plus_minus_one_is_the_exact_binomial_test():
    # 1 against 7: 2 * (C(8, 0) + C(8, 1)) / 2^8
    assert sign_flip_p_value([1] * 7 + [-1] + [0] * 30) == 18 / 256
    assert sign_flip_p_value([0.5] * 4) == 2 / 16
    assert sign_flip_p_value([1, -1]) == 1.0
    assert sign_flip_p_value([0, 0]) == 1.0
    # Far beyond what can be enumerated: 2 * 2^-200
    assert sign_flip_p_value([1] * 200) == 2.0**-199


def test_sign_flip_enumerates_every_assignment():
    differences = [0.5, 1.0, -0.25, 1.5, 0.0]
    sums = [abs(np.dot(signs, differences[:4])) for signs in itertools.product((1, -1), repeat=4)]
    assert sign_flip_p_value(differences) == np.mean(np.array(sums) >= sum(differences))


def test_sign_flip_by_draws_is_near_the_normal_approximation():
    differences = np.random.default_rng(0).normal(0.15, 1.0, 400)
    z = abs(differences.sum()) / math.sqrt((differences**2).sum())
    assert sign_flip_p_value(differences, seed=1) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.01)


def test_wilson_by_hand():
    # 8 of 10 at 95 %, from Wilson's formula with z = 1.959964.
    value, low, high = wilson_interval(8, 10)
    assert (value, low, high) == pytest.approx((0.8, 0.490163, 0.943318), abs=1e-6)
    assert wilson_interval(0, 4).low == 0.0
    assert wilson_interval(0, 4).high == pytest.approx(1.959964**2 / (4 + 1.959964**2), abs=1e-6)
    assert wilson_interval(4, 4).high == pytest.approx(1.0)


def test_bootstrap_of_two_values_by_hand():
    # The mean of two draws from {0, 1} is 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4.
    assert bootstrap_interval([0, 1], confidence=0.95, num_resamples=1000) == (0.5, 0.0, 1.0)
    assert bootstrap_interval([0, 1], confidence=0.4, num_resamples=1000) == (0.5, 0.5, 0.5)


def test_bootstrap_of_many_values_is_near_the_normal_approximation():
    values = np.random.default_rng(1).normal(10, 2, 400)
    mean, low, high = bootstrap_interval(values)
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    assert bootstrap_interval([3.0, 3.0]) == (3.0, 3.0, 3.0)


def test_intervals_cover_the_truth_at_their_confidence():
    generator = np.random.default_rng(5)
    trials, covered, false_alarms, shown = 400, 0, 0, 0
    for trial in range(trials):
        both = generator.random(80)
        a = (both < 0.5).astype(float)
        flips = generator.random(80) < 0.3
        # On 30 % of the samples, "null" is right with probability 0.5, as a is, and "better" with probability 0.9: true
        # differences of 0 and 0.12.
        null = np.where(flips, generator.random(80) < 0.5, a)
        better = np.where(flips, generator.random(80) < 0.9, a)
        same = paired_difference(a, null, num_resamples=300, seed=trial)
        covered += same.low <= 0 <= same.high
        false_alarms += same.is_shown
        shown += paired_difference(a, better, num_resamples=300, seed=trial).is_shown
    assert 0.915 <= covered / trials <= 0.98
    assert false_alarms / trials <= 0.05
    assert shown / trials >= 0.5


def test_few_samples_show_nothing_however_clear_they_look():
    # All resamples of four equal differences have the same mean, so only the test accounts for the few samples.
    four = paired_difference([0] * 4, [1] * 4)
    assert (four.value, four.low, four.high, four.p_value) == (1.0, 1.0, 1.0, 0.125)
    assert not four.is_shown
    for a, b in ((0, 1), (1, 0)):
        eight = paired_difference([a] * 8, [b] * 8)
        assert eight.is_shown
        assert eight.value == b - a


def test_weights_by_hand():
    # Two draws of {0, 1} that count 1 and 3 are (0, 0), (0, 1) and (1, 1): 0, 3/4 and 1.
    assert bootstrap_interval([0, 1], weights=[1, 3], num_resamples=1000) == (0.75, 0.0, 1.0)
    assert bootstrap_interval([0, 1], weights=[1, 3], confidence=0.4, num_resamples=1000) == (0.75, 0.75, 0.75)
    a, b = np.random.default_rng(0).random((2, 30))
    assert paired_difference(a, b, weights=[2] * 30) == pytest.approx(paired_difference(a, b))
    # Of the sign assignments to 4, 4 and 1, +-(4, 4, -1) and +-(4, 4, 1) have an absolute sum of at least 7.
    assert paired_difference([0, 0, 0], [4, 1, -1], weights=[1, 4, 1]).p_value == 4 / 8
    for weights in ([1.0], [1, 0], [1, -1], [1, math.nan]):
        with pytest.raises(ValueError, match="weights must be positive, one for each of the 2 samples"):
            bootstrap_interval([0, 1], weights=weights)


def test_seeded():
    a, b = np.random.default_rng(0).random((2, 30))
    assert paired_difference(a, b, seed=3) == paired_difference(a, b, seed=3)
    assert paired_difference(a, b, seed=3) != paired_difference(a, b, seed=4)


def test_holm_by_hand():
    found = holm([Difference(0, 0, 0, p, 9) for p in (0.01, 0.04, 0.03, 0.005)])
    assert [difference.p_value for difference in found] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 0], [1], "a and b must be scores of the same samples, got (2,) and (1,)"),
        ([], [], "at least one sample"),
        ([1.0], [math.nan], "finite"),
    ],
)
def test_bad_scores(a, b, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        paired_difference(a, b)
