"""Scores of candidates worked out by hand, ties, and the incremental consensus compared with its definition."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimkernels.search import (
    Candidate,
    TrigramConsensus,
    consensus,
    log_probability,
    majority_vote,
    majority_vote_by,
    select,
)
from slimkernels.search.selection import SIMILARITIES, word_trigrams


def candidates(*texts, logprobs=None, answers=None):
    return [
        Candidate(index, text, answers[index] if answers else None, logprobs[index] if logprobs else -1.0, 1)
        for index, text in enumerate(texts)
    ]


def test_selection_trigrams():
    assert word_trigrams("One, two: THREE four.") == {("one", "two", "three"), ("two", "three", "four")}
    assert word_trigrams("a a a a") == {("a", "a", "a")}
    assert word_trigrams("one two") == {("one", "two")}
    assert word_trigrams(" .,") == set()


def test_selection_consensus_by_hand():
    # Trigrams: abc bcd | abc bcd cde | xyz | nothing. Shared: 2 between the first two, else 0.
    texts = ["a b c d", "a b c d e", "x y z", ""]
    for similarity, shared in (("jaccard", 2 / 3), ("count", 2.0), ("f1", 4 / 5)):
        assert consensus(similarity)(candidates(*texts)) == pytest.approx([shared, shared, 0.0, 0.0])


# The texts have plain words, punctuation within and around words, capitals whose lower case has two characters or
# depends on the position, and white space beyond ASCII.
@given(
    st.lists(st.text(alphabet="ab ", max_size=24) | st.text(alphabet="aB'.Σİ \n\u2003"), max_size=8),
    st.sampled_from(SIMILARITIES),
)
def test_selection_consensus_is_its_definition_after_every_text(texts, similarity):
    pool = TrigramConsensus(similarity)
    for count, text in enumerate(texts, 1):
        assert pool.add(text) == count - 1
        assert pool.scores() == pytest.approx(consensus_by_definition(texts[:count], similarity))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_selection_consensus_of_trigrams_that_few_or_many_texts_have(similarity):
    generator = np.random.default_rng(3)
    texts = [" ".join(f"w{word}" for word in generator.zipf(1.8, 30) % 40) for _ in range(60)]
    counts = Counter(trigram for text in texts for trigram in word_trigrams(text))
    assert {1, 2, 24, 25} <= set(counts.values())
    assert consensus(similarity)(candidates(*texts)) == pytest.approx(consensus_by_definition(texts, similarity))


def test_selection_consensus_of_more_words_than_fit_beside_a_text():
    # A trigram and its text need 3 * 19 bits (270,000 words) and 7 bits (64 texts), more than an integer has.
    texts = [" ".join(f"w{word}" for word in range(start, start + 4300)) for start in range(0, 64 * 4200, 4200)]
    assert consensus()(candidates(*texts)) == pytest.approx(consensus_by_definition(texts, "jaccard"), rel=1e-12)


def consensus_by_definition(texts, similarity):
    grams = [word_trigrams(text) for text in texts]
    scores = []
    for index, own in enumerate(grams):
        total = 0.0
        for other in grams[:index] + grams[index + 1 :]:
            if own.isdisjoint(other):
                continue
            shared = len(own & other)
            parts = {"jaccard": len(own | other), "count": 1, "f1": (len(own) + len(other)) / 2}
            total += shared / parts[similarity]
        scores.append(total)
    return scores


def test_selection_consensus_of_a_full_buffer_is_fast():
    # 512 chains of 100 words with many shared trigrams. The bound is ten times the usual time, for a busy machine.
    generator = np.random.default_rng(0)
    words = [" ".join(f"w{word}" for word in generator.integers(0, 6, 100)) for _ in range(512)]
    start = time.process_time()
    scores = consensus()(candidates(*words))
    assert time.process_time() - start < 1.0
    assert len(scores) == 512


def test_selection_majority_counts_equal_answers_only():
    answers = ["1", "2", None, "2", None, None]
    assert majority_vote(candidates(*"abcdef", answers=answers)) == [1, 2, 0, 2, 0, 0]
    by_last = majority_vote_by(lambda text: text[-1:] or None)
    assert by_last(candidates("x1", "y2", "z1", "")) == [2, 1, 2, 0]


def test_selection_log_probability():
    assert log_probability(candidates("a", "b", logprobs=[-3.0, -2.0])) == [-3.0, -2.0]


def test_selection_ties_go_to_the_higher_log_probability_then_to_the_lower_index():
    tied = candidates(*"abcd", logprobs=[-9.0, -2.0, -1.0, -1.0])
    assert select(tied, [5.0, 5.0, 5.0, 5.0]) == 2
    assert select(tied, [5.0, 5.0, 4.0, 4.0]) == 1
    assert select(tied, [5.0, 4.0, 4.0, 4.0]) == 0


@pytest.mark.parametrize(("scores", "message"), [([1.0], "one number for each of 2"), ([1.0, float("nan")], "NaN")])
def test_selection_refuses_scores(scores, message):
    with pytest.raises(ValueError, match=message):
        select(candidates("a", "b"), scores)


def test_selection_refuses_nothing_to_select_from_and_an_unknown_similarity():
    with pytest.raises(ValueError, match="0 candidates"):
        select([], [])
    with pytest.raises(ValueError, match="similarity must be one of 'jaccard'"):
        consensus("cosine")
