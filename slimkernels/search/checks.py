"""Quality checks of a new step against the steps before it. Models are passed in as plain functions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

# Computes embeddings (n, d) of n texts.
Embed = Callable[[Sequence[str]], np.ndarray]
# Computes the probability (n,) that the hypothesis of each pair (premise, hypothesis) contradicts its premise.
Contradicts = Callable[[Sequence[tuple[str, str]]], Sequence[float] | np.ndarray]


@dataclasses.dataclass
class CheckedStep:
    """A step as checks see it.

    Attributes:
        text: Text of the step.
        embedding: (d,), from the engine or, if that gave none, cached here by the check that computes it.
    """

    text: str
    embedding: np.ndarray | None = None


class CheckedBranch(NamedTuple):
    """A new step and everything before it.

    Attributes:
        context: Context of the question.
        earlier: Earlier steps of the branch, in order.
        step: New step.
    """

    context: str
    earlier: Sequence[CheckedStep]
    step: CheckedStep


class Check(Protocol):
    """A test that new steps must pass: a function with a name, called once with all branches of a generation.

    Example::

        class Short:
            name = "long"

            def __call__(self, branches):
                return [len(branch.step.text) > 200 for branch in branches]

    A check may also have ``settings``, a dict of JSON values: a search resumes from a trace only if its checks had the
    same names and settings.

    Attributes:
        name: Reason recorded for a node that the check cuts.
        needs_embeddings: Whether the engine should compute every step's ``embedding``; without it, none is computed.
    """

    name: str

    def __call__(self, branches: Sequence[CheckedBranch]) -> Sequence[bool]:
        """Returns whether each branch's new step fails. Called once with all branches of a generation."""
        ...


class RepetitionCheck:
    """A check that fails steps which repeat an earlier step of their branch.

    score = max over the earlier steps of (1 + cos(step, earlier)) / 2; a step fails if score >= ``threshold``.

    Args:
        threshold: Lowest score that fails, in [0, 1]. The default suits the embeddings of ``TransformersEngine``: with
            SmolLM2-135M it cut 2 of 346 new steps of GSM8K's solutions, all of 27 verbatim repeats, 25 of 41 with words
            or punctuation changed, none of 13 paraphrases (``bench.repetition``). A sentence encoder finds more and
            needs its own threshold: all-MiniLM-L6-v2 at 0.97 cut 8, 27, 40 and 2 of these.
        embed: Function from n texts to embeddings (n, d), called once for each step. None uses the engine's embeddings,
            which it pools from hidden states that the generation computes anyway.

    Raises:
        ValueError: ``threshold`` is outside [0, 1].

    References: ROSCOE, arXiv 2212.07919, "Repetition-Step"; PathFinder, arXiv 2312.05180.
    """

    name = "repetition"

    def __init__(self, threshold: float = 0.98, embed: Embed | None = None) -> None:
        _check_threshold(threshold)
        self.threshold = threshold
        self.needs_embeddings = embed is None
        self.settings = {"threshold": threshold, "needs_embeddings": embed is None}
        self._embed = embed

    def __call__(self, branches: Sequence[CheckedBranch]) -> list[bool]:
        """Returns whether each branch's new step repeats an earlier one."""
        if self._embed is not None:
            self._fill_embeddings(
                [step for branch in branches if branch.earlier for step in (*branch.earlier, branch.step)]
            )
        return [self.score(branch) >= self.threshold for branch in branches]

    def score(self, branch: CheckedBranch) -> float:
        """Returns the largest scaled cosine similarity to an earlier step; -1 if there is none with an embedding."""
        new = branch.step.embedding
        scores = [
            scaled_cosine(new, earlier.embedding)
            for earlier in branch.earlier
            if new is not None and earlier.embedding is not None
        ]
        return max(scores, default=-1.0)

    def _fill_embeddings(self, steps: list[CheckedStep]) -> None:
        """Computes the embeddings of steps that have none, in one call."""
        assert self._embed is not None  # noqa: S101 -- for the type checker; the caller has tested it
        missing = list({id(step): step for step in steps if step.embedding is None}.values())
        if not missing:
            return
        embeddings = embed_texts(self._embed, [step.text for step in missing])
        for step, embedding in zip(missing, embeddings, strict=True):
            step.embedding = embedding


class ContradictionCheck:
    """A check that fails steps which contradict the question or an earlier step of their branch.

    score = max over the context and the earlier steps of P(contradiction | premise, step); a step fails if
    score >= ``threshold``. Pairs without a common content word are skipped, because sentences about different things
    rarely contradict each other. All pairs of a generation are judged in one call, without duplicates, and their
    probabilities are cached.

    Args:
        contradicts: Function from pairs (premise, hypothesis) to their probabilities, such as an ``NLIModel``.
        threshold: Lowest score that fails, in [0, 1].
        prefilter: Whether to skip pairs without a common content word.

    Raises:
        ValueError: ``threshold`` is outside [0, 1].

    References: ROSCOE, arXiv 2212.07919, "Self-Consistency" and "Source-Consistency"; PathFinder, arXiv 2312.05180.
    """

    name = "contradiction"
    needs_embeddings = False

    def __init__(self, contradicts: Contradicts, threshold: float = 0.5, *, prefilter: bool = True) -> None:
        _check_threshold(threshold)
        self.threshold = threshold
        self.settings = {"threshold": threshold, "prefilter": prefilter}
        self._contradicts = contradicts
        self._prefilter = prefilter
        self._known: dict[tuple[str, str], float] = {}

    def __call__(self, branches: Sequence[CheckedBranch]) -> list[bool]:
        """Returns whether each branch's new step contradicts the context or an earlier step."""
        pairs = [self._pairs(branch) for branch in branches]
        new_pairs = dict.fromkeys(pair for of_branch in pairs for pair in of_branch if pair not in self._known)
        self._judge(list(new_pairs))
        failed = [any(self._known[pair] >= self.threshold for pair in of_branch) for of_branch in pairs]
        if len(self._known) > _CACHED_PAIRS:
            self._known.clear()
        return failed

    def _pairs(self, branch: CheckedBranch) -> list[tuple[str, str]]:
        """Returns the pairs (premise, new step) to judge."""
        step = branch.step.text.strip()
        premises = [text.strip() for text in (branch.context, *(earlier.text for earlier in branch.earlier))]
        words = content_words(step)
        return [
            (premise, step)
            for premise in premises
            if premise and (not self._prefilter or words & content_words(premise))
        ]

    def _judge(self, pairs: list[tuple[str, str]]) -> None:
        if not pairs:
            return
        probabilities = np.asarray(self._contradicts(pairs), np.float64)
        if probabilities.shape != (len(pairs),) or not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise ValueError(f"contradicts must return one probability in [0, 1] for each of {len(pairs)} pairs")
        self._known.update(zip(pairs, probabilities.tolist(), strict=True))


_CACHED_PAIRS = 1 << 17
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been but by can could did do does for from had has have he her his i if in is it its "
        "not of on or she so that the their them then there they this to was we were what when which who will with "
        "would you",
    )
)


def content_words(text: str) -> frozenset[str]:
    """Returns the numbers and words of a text, in lower case, without function words."""
    return frozenset(re.findall(r"\w+", text.lower())) - _FUNCTION_WORDS


def embed_texts(embed: Embed, texts: Sequence[str]) -> np.ndarray:
    """Computes the embeddings (n, d) of n texts.

    Raises:
        ValueError: The function returned something else.
    """
    embeddings = np.asarray(embed(texts))
    if embeddings.ndim != 2 or len(embeddings) != len(texts):
        raise ValueError(f"embed must return an array ({len(texts)}, d), one row per text, got {embeddings.shape}")
    return embeddings


def scaled_cosine(left: np.ndarray, right: np.ndarray) -> float:
    """Returns (1 + cos) / 2 of two vectors; 0 if one of them is 0."""
    norm = float(np.linalg.norm(left)) * float(np.linalg.norm(right))
    return 0.5 + 0.5 * float(np.dot(left, right)) / norm if norm > 0 else 0.0


def _check_threshold(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
