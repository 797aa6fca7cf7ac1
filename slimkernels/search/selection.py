"""Which of a question's hypotheses is its answer: scorers of candidates, and ``select``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_WORD = re.compile(r"\w+")
SIMILARITIES = ("jaccard", "count", "f1")


class Candidate(NamedTuple):
    """A hypothesis that may be selected.

    Attributes:
        node: Of the tree.
        text: The whole branch, without the prompt.
        answer: What ``answer_pattern`` found in it, or None.
        sum_logprob: Of its tokens, in nats.
        num_tokens: Of the branch.
        context: What the question was.
    """

    node: int
    text: str
    answer: str | None
    sum_logprob: float
    num_tokens: int
    context: str = ""


# The candidates of one question, in the order of their nodes -> a score for each; the largest is selected.
Scorer = Callable[[Sequence[Candidate]], Sequence[float]]


def select(candidates: Sequence[Candidate], scores: Sequence[float]) -> int:
    """The index of the largest score; ties go to the higher log-probability, then to the lower index.

    Raises:
        ValueError: No candidates, another number of scores, or a score that is NaN.
    """
    values = np.asarray(scores, np.float64)
    if not candidates or values.shape != (len(candidates),):
        raise ValueError(f"scores must be one number for each of {len(candidates)} candidates, got {values.shape}")
    if np.isnan(values).any():
        raise ValueError(f"scores must be numbers, got NaN for candidate {int(np.isnan(values).argmax())}")
    return max(range(len(candidates)), key=lambda index: (values[index], candidates[index].sum_logprob, -index))


def log_probability(candidates: Sequence[Candidate]) -> list[float]:
    """The sum of a candidate's token log-probabilities."""
    return [candidate.sum_logprob for candidate in candidates]


def majority_vote(candidates: Sequence[Candidate]) -> list[float]:
    """The number of candidates with the same answer; those without an answer get and give no vote."""
    votes = Counter(candidate.answer for candidate in candidates if candidate.answer is not None)
    return [float(votes[candidate.answer]) if candidate.answer is not None else 0.0 for candidate in candidates]


def majority_vote_by(extract: Callable[[str], str | None]) -> Scorer:
    """``majority_vote`` on answers that ``extract`` finds in a candidate's text."""
    return lambda candidates: majority_vote([c._replace(answer=extract(c.text)) for c in candidates])


def consensus(similarity: str = "jaccard") -> Scorer:
    """score_c = sum_{c' != c} S(c, c'), S the overlap of their word trigrams (``TrigramConsensus``).

    Raises:
        ValueError: An unknown similarity.
    """
    TrigramConsensus(similarity)

    def score(candidates: Sequence[Candidate]) -> Sequence[float]:
        pool = TrigramConsensus(similarity)
        for candidate in candidates:
            pool.add(candidate.text)
        return pool.scores().tolist()

    return score


def word_trigrams(text: str) -> set[tuple[str, ...]]:
    """The distinct runs of three words, in lower case and without punctuation; of one or two words, the one run."""
    words = _WORD.findall(text.lower())
    if len(words) < 3:
        return {tuple(words)} if words else set()
    return set(zip(words, words[1:], words[2:], strict=False))


class TrigramConsensus:
    """How much each text has in common with all others; texts are added one at a time.

    Equivalent to::

        a, b = word_trigrams(text_a), word_trigrams(text_b)
        jaccard = len(a & b) / len(a | b)
        count = len(a & b)
        f1 = 2 * len(a & b) / (len(a) + len(b))
        score_a = sum(S(a, b) for every other text b)

    An ``add`` looks its trigrams up in an index of those seen, O(trigrams + shared trigrams); ``scores`` is O(n).
    Memory: the index, and O(n) numbers.

    Args:
        similarity: "jaccard" | "count" | "f1".

    Raises:
        ValueError: An unknown similarity.

    References: PathFinder, arXiv 2312.05180, section on candidate selection.
    """

    def __init__(self, similarity: str = "jaccard") -> None:
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity must be one of {', '.join(map(repr, SIMILARITIES))}, got {similarity!r}")
        self._similarity = similarity
        self._texts_with: dict[tuple[str, ...], list[int]] = {}
        self._sizes = np.zeros(16, np.int64)
        self._scores = np.zeros(16, np.float64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, text: str) -> int:
        """Adds a text; returns its index."""
        index = self._count
        if index == len(self._sizes):
            self._sizes = np.concatenate([self._sizes, np.zeros_like(self._sizes)])
            self._scores = np.concatenate([self._scores, np.zeros_like(self._scores)])
        trigrams = word_trigrams(text)
        shared_by: list[int] = []
        for trigram in trigrams:
            texts = self._texts_with.setdefault(trigram, [])
            shared_by += texts
            texts.append(index)
        overlap = np.bincount(np.asarray(shared_by, np.int64), minlength=index)
        similarity = self._similarities(overlap, len(trigrams), self._sizes[:index])
        self._scores[:index] += similarity
        self._scores[index] = similarity.sum()
        self._sizes[index] = len(trigrams)
        self._count += 1
        return index

    def scores(self) -> np.ndarray:
        """The score of every text (n,) float64."""
        return self._scores[: self._count].copy()

    def _similarities(self, overlap: np.ndarray, size: int, sizes: np.ndarray) -> np.ndarray:
        if self._similarity == "count":
            return overlap.astype(np.float64)
        if self._similarity == "f1":
            return 2 * overlap / np.maximum(size + sizes, 1)
        return overlap / np.maximum(size + sizes - overlap, 1)
