"""Selection of a question's answer among its hypotheses: scorers of candidates, and ``select``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from slimkernels.search.answers import canonical

_WORD = re.compile(r"\w+")
SIMILARITIES = ("jaccard", "count", "f1")
_WORD_BITS = 21  # so that the ids of three words fit into an int64
_END = 0  # id that marks the end of a text, both among pieces and among words
_FREQUENT = 24  # a trigram that more texts than this share is counted by a matrix product


class Candidate(NamedTuple):
    """A hypothesis that may be selected.

    Attributes:
        node: Node of the tree.
        text: Text of the whole branch, without the prompt.
        answer: Answer that the text announces, or None.
        sum_logprob: Sum of the log-probabilities of the branch's tokens, in nats.
        num_tokens: Number of tokens of the branch.
        context: Context of the question.
        weight: Number of drawn branches that the candidate stands for, by ``merge_siblings``; 1 without it.
        step_score: Combined score of the branch's steps, by ``score_steps`` and ``score_reduction``; NaN without any.
    """

    node: int
    text: str
    answer: str | None
    sum_logprob: float
    num_tokens: int
    context: str = ""
    weight: float = 1.0
    step_score: float = math.nan


# Computes a score for each candidate of one question, given in the order of their nodes. The largest is selected:
#     def shortest(candidates: Sequence[Candidate]) -> Sequence[float]:
#         return [-candidate.num_tokens for candidate in candidates]
Scorer = Callable[[Sequence[Candidate]], Sequence[float]]


def select(candidates: Sequence[Candidate], scores: Sequence[float]) -> int:
    """Returns the index of the largest score; ties go to the higher log-probability, then to the lower index.

    Raises:
        ValueError: There are no candidates, another number of scores, or a score that is NaN.
    """
    values = np.asarray(scores, np.float64)
    if not candidates or values.shape != (len(candidates),):
        raise ValueError(f"scores must be one number for each of {len(candidates)} candidates, got {values.shape}")
    if np.isnan(values).any():
        raise ValueError(f"scores must be numbers, got NaN for candidate {int(np.isnan(values).argmax())}")
    return max(range(len(candidates)), key=lambda index: (values[index], candidates[index].sum_logprob, -index))


def log_probability(candidates: Sequence[Candidate]) -> list[float]:
    """Scores each candidate by the sum of its tokens' log-probabilities."""
    return [candidate.sum_logprob for candidate in candidates]


def step_score(candidates: Sequence[Candidate]) -> list[float]:
    """Scores each candidate by the combined score of its steps, for searches with ``score_steps``; -inf without one."""
    return [-math.inf if math.isnan(candidate.step_score) else candidate.step_score for candidate in candidates]


def majority_vote(candidates: Sequence[Candidate]) -> list[float]:
    """Scores each candidate by the weights of all candidates with its answer; 0 for candidates without an answer.

    Answers are the same if their values are: ``$18``, ``18 dollars`` and ``18.00`` vote for one answer.
    """
    values = [None if candidate.answer is None else canonical(candidate.answer, "any") for candidate in candidates]
    votes: dict[object, float] = {}
    for candidate, value in zip(candidates, values, strict=True):
        votes[value] = votes.get(value, 0.0) + candidate.weight
    return [votes[value] if value is not None else 0.0 for value in values]


def majority_vote_by(extract: Callable[[str], str | None]) -> Scorer:
    """Returns ``majority_vote`` with answers that ``extract`` finds in the candidates' texts."""
    return lambda candidates: majority_vote([c._replace(answer=extract(c.text)) for c in candidates])


def consensus(similarity: str = "jaccard") -> Scorer:
    """Returns the scorer score_c = sum_{c' != c} S(c, c'), S the overlap of word trigrams (``TrigramConsensus``).

    A candidate of weight w counts as w equal candidates.

    Args:
        similarity: "jaccard" | "count" | "f1".

    Raises:
        ValueError: ``similarity`` is unknown.
    """
    TrigramConsensus(similarity)

    def score(candidates: Sequence[Candidate]) -> Sequence[float]:
        pool = TrigramConsensus(similarity)
        for candidate in candidates:
            pool.add(candidate.text)
        return pool.scores([candidate.weight for candidate in candidates]).tolist()

    return score


def word_trigrams(text: str) -> set[tuple[str, ...]]:
    """Returns the distinct runs of three words, in lower case and without punctuation.

    A text of only one or two words counts as one run.
    """
    words = _WORD.findall(text.lower())
    if len(words) < 3:
        return {tuple(words)} if words else set()
    return set(zip(words, words[1:], words[2:], strict=False))


class TrigramConsensus:
    """A pool of texts that scores each by its similarity to all others; texts are added one at a time.

    Equivalent to::

        a, b = word_trigrams(text_a), word_trigrams(text_b)
        jaccard = len(a & b) / len(a | b)
        count = len(a & b)
        f1 = 2 * len(a & b) / (len(a) + len(b))
        score_a = sum(S(a, b) for every other text b)

    ``add`` splits a text at white space and assigns an id to each piece, O(words). ``scores`` packs each trigram and
    its text into an integer, sorts these over all n texts, and counts how many trigrams each pair of texts shares: rare
    trigrams pair by pair, frequent ones by a matrix product. Memory: the ids, and O(n^2) more while scoring.

    Args:
        similarity: "jaccard" | "count" | "f1".

    Raises:
        ValueError: ``similarity`` is unknown, or the texts have more than two million different words.

    References: PathFinder, arXiv 2312.05180, section on candidate selection.
    """

    def __init__(self, similarity: str = "jaccard") -> None:
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity must be one of {', '.join(map(repr, SIMILARITIES))}, got {similarity!r}")
        self._similarity = similarity
        self._pieces = _Pieces()
        self._texts: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> int:
        """Adds a text. Returns its index."""
        # No word contains white space, so the words of each distinct piece need to be found only once.
        pieces = list(map(self._pieces.__getitem__, text.lower().split()))
        if len(self._pieces.words) >= 1 << _WORD_BITS:
            raise ValueError(f"the texts must have fewer than {1 << _WORD_BITS} different words, got more")
        self._texts.append(np.array([*pieces, _END, _END], np.int64))
        return len(self._texts) - 1

    def scores(self, weights: Sequence[float] | None = None) -> np.ndarray:
        """Returns the score of every text (n,) float64; one of weight w counts as w equal texts, by default as one."""
        trigrams, text = self._entries()
        sizes = np.bincount(text, minlength=len(self))
        shared = _count_shared(trigrams, text, len(self))
        if self._similarity == "count":
            similarity = shared
        elif self._similarity == "f1":
            similarity = 2 * shared / np.maximum(sizes[:, None] + sizes, 1)
        else:
            similarity = shared / np.maximum(sizes[:, None] + sizes - shared, 1)
        if weights is None or all(weight == 1 for weight in weights):
            return similarity.sum(1)
        own = sizes if self._similarity == "count" else sizes > 0
        return similarity @ np.asarray(weights, np.float64) + (np.asarray(weights) - 1) * own

    def _entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns each distinct trigram of each text as an integer (m,), ascending, and the text's index (m,)."""
        if not self._texts:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        words, counts = self._pieces.words_of(np.concatenate(self._texts))
        text = np.repeat(np.repeat(np.arange(len(self)), [len(pieces) for pieces in self._texts]), counts)
        first, second, third = words[:-2], words[1:-1], words[2:]
        text, begins = text[:-2], np.diff(text[:-2], prepend=-1) > 0
        # Whole trigrams, and the single run of a text of one or two words.
        kept = (first != _END) & ((third != _END) | begins)
        bits, text_bits = len(self._pieces.words).bit_length(), len(self).bit_length()
        trigrams = ((first << 2 * bits) | (second << bits) | third)[kept]
        if 3 * bits + text_bits > 63:
            trigrams = np.unique(trigrams, return_inverse=True)[1]
        entries = np.sort((trigrams << text_bits) | text[kept])
        entries = entries[np.diff(entries, prepend=-1) > 0]
        return entries >> text_bits, entries & ((1 << text_bits) - 1)


class _Pieces(dict[str, int]):
    """The ids of pieces, assigned from 1 in the order of their first use, and of the words in them.

    Attributes:
        words: Ids of all words so far.
    """

    def __init__(self) -> None:
        self.words: dict[str, int] = {}
        self._words = [_END]  # word ids of all pieces, concatenated
        self._counts = [1]  # number of words of each piece

    def __missing__(self, piece: str) -> int:
        words = [self.words.setdefault(word, len(self.words) + 1) for word in _WORD.findall(piece)]
        self._words += words
        self._counts.append(len(words))
        self[piece] = piece_id = len(self) + 1
        return piece_id

    def words_of(self, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the concatenated word ids of pieces (n,), and the number of words of each piece (n,)."""
        counts = np.array(self._counts)
        starts = np.cumsum(counts) - counts
        starts, counts = starts[pieces], counts[pieces]
        indices = np.repeat(starts - np.cumsum(counts) + counts, counts)
        indices += np.arange(len(indices))
        return np.array(self._words)[indices], counts


def _count_shared(trigrams: np.ndarray, text: np.ndarray, count: int) -> np.ndarray:
    """Returns how many trigrams each pair of texts shares (count, count) float64, with a diagonal of 0."""
    if not len(trigrams):
        return np.zeros((count, count))
    starts = np.flatnonzero(np.diff(trigrams, prepend=-1))
    lengths = np.diff(np.append(starts, len(trigrams)))  # number of texts with each trigram
    frequent = lengths > _FREQUENT
    entries = np.repeat(frequent, lengths)
    has = np.zeros((count, np.count_nonzero(frequent)), np.float32)
    has[text[entries], np.repeat(np.arange(has.shape[1]), lengths[frequent])] = 1
    shared = (has @ has.T).astype(np.float64)
    np.fill_diagonal(shared, 0)
    return shared + _count_shared_pairwise(trigrams[~entries], text[~entries], count)


def _count_shared_pairwise(trigrams: np.ndarray, text: np.ndarray, count: int) -> np.ndarray:
    """Returns how many of the sorted trigrams each pair of texts shares (count, count), for trigrams of few texts."""
    found = []
    for distance in range(1, _FREQUENT):
        same = np.flatnonzero(trigrams[distance:] == trigrams[:-distance])
        if not len(same):
            break
        found.append(text[same] * count + text[same + distance])
    pairs = np.concatenate(found) if found else np.zeros(0, np.int64)
    below = np.bincount(pairs, minlength=count * count).reshape(count, count)
    return below + below.T
