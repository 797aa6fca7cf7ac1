"""Quality checks of a new step against the steps before it, none of which knows a model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

# Texts -> their embeddings (n, d).
Embed = Callable[[Sequence[str]], np.ndarray]
# Pairs of premise and hypothesis -> the probability (n,) that they contradict each other.
Contradicts = Callable[[Sequence[tuple[str, str]]], Sequence[float] | np.ndarray]


@dataclasses.dataclass
class CheckedStep:
    """A step as checks see it. What a check computes of a step alone it keeps here: ``embedding`` is filled once."""

    text: str
    embedding: np.ndarray | None = None  # (d,)


class CheckedBranch(NamedTuple):
    """A new step with all that is above it."""

    context: str
    earlier: Sequence[CheckedStep]
    step: CheckedStep


class Check(Protocol):
    """A test that new steps must pass.

    A check may also have ``settings``, a dict of JSON values: a search does not go on from a trace whose check of that
    name had others.

    Attributes:
        name: The reason that a cut node is given.
        needs_embeddings: Whether the engine should give every step's ``embedding``.
    """

    name: str
    needs_embeddings: bool

    def __call__(self, branches: Sequence[CheckedBranch]) -> Sequence[bool]:
        """Whether each branch's new step fails; all branches of a generation come at once."""
        ...


class RepetitionCheck:
    """Fails a step that says again what an earlier step of its branch said.

    score = max over the earlier steps of (1 + cos(step, earlier)) / 2, fails at ``threshold`` and above.

    Args:
        threshold: In [0, 1]. The default is for what ``TransformersEngine`` embeds by, with SmolLM2-135M: it cut 2 of
            346 new steps of GSM8K's solutions, all of 27 verbatim repeats, 25 of 41 with words or punctuation changed,
            none of 13 paraphrases (``bench.repetition``). A sentence encoder finds more, at a threshold of its own:
            all-MiniLM-L6-v2 at 0.97 cut 8, 27, 40 and 2 of these.
        embed: Texts to embeddings (n, d), each step's computed once; None takes those of the engine, which are pooled
            from hidden states that the generation computed anyway.

    Raises:
        ValueError: A threshold outside [0, 1].

    References: ROSCOE, arXiv 2212.07919, "Repetition-Step"; PathFinder, arXiv 2312.05180.
    """

    name = "repetition"

    def __init__(self, threshold: float = 0.98, embed: Embed | None = None) -> None:
        _is_probability(threshold)
        self.threshold = threshold
        self.needs_embeddings = embed is None
        self.settings = {"threshold": threshold, "needs_embeddings": embed is None}
        self._embed = embed

    def __call__(self, branches: Sequence[CheckedBranch]) -> list[bool]:
        """Whether each branch's new step repeats an earlier one."""
        if self._embed is not None:
            self._fill([step for branch in branches if branch.earlier for step in (*branch.earlier, branch.step)])
        return [self.score(branch) >= self.threshold for branch in branches]

    def score(self, branch: CheckedBranch) -> float:
        """The largest scaled cosine to an earlier step; -1 where there is none."""
        new = branch.step.embedding
        scores = [
            _scaled_cosine(new, earlier.embedding)
            for earlier in branch.earlier
            if new is not None and earlier.embedding is not None
        ]
        return max(scores, default=-1.0)

    def _fill(self, steps: list[CheckedStep]) -> None:
        assert self._embed is not None  # noqa: S101 -- for the type checker; the caller asked
        missing = list({id(step): step for step in steps if step.embedding is None}.values())
        if not missing:
            return
        embeddings = np.asarray(self._embed([step.text for step in missing]))
        if embeddings.ndim != 2 or len(embeddings) != len(missing):
            raise ValueError(f"embed must return an array ({len(missing)}, d), a row per text, got {embeddings.shape}")
        for step, embedding in zip(missing, embeddings, strict=True):
            step.embedding = embedding


class ContradictionCheck:
    """Fails a step that contradicts the question or an earlier step of its branch.

    score = max over the context and the earlier steps of P(contradiction | premise, step), fails at ``threshold`` and
    above. Pairs without a content word in common are not asked about: what does not speak of the same thing rarely
    contradicts. All pairs of a generation are asked in one call, equal ones once, and remembered.

    Args:
        contradicts: Pairs (premise, hypothesis) to probabilities, such as an ``NLIModel``.
        threshold: In [0, 1].
        prefilter: False asks about all pairs.

    Raises:
        ValueError: A threshold outside [0, 1].

    References: ROSCOE, arXiv 2212.07919, "Self-Consistency" and "Source-Consistency"; PathFinder, arXiv 2312.05180.
    """

    name = "contradiction"
    needs_embeddings = False

    def __init__(self, contradicts: Contradicts, threshold: float = 0.5, *, prefilter: bool = True) -> None:
        _is_probability(threshold)
        self.threshold = threshold
        self.settings = {"threshold": threshold, "prefilter": prefilter}
        self._contradicts = contradicts
        self._prefilter = prefilter
        self._known: dict[tuple[str, str], float] = {}

    def __call__(self, branches: Sequence[CheckedBranch]) -> list[bool]:
        """Whether each branch's new step contradicts the context or an earlier one."""
        pairs = [self._pairs(branch) for branch in branches]
        self._ask(list(dict.fromkeys(pair for of_branch in pairs for pair in of_branch if pair not in self._known)))
        failed = [any(self._known[pair] >= self.threshold for pair in of_branch) for of_branch in pairs]
        if len(self._known) > _REMEMBERED_PAIRS:
            self._known.clear()
        return failed

    def _pairs(self, branch: CheckedBranch) -> list[tuple[str, str]]:
        step = branch.step.text.strip()
        premises = [text.strip() for text in (branch.context, *(earlier.text for earlier in branch.earlier))]
        words = content_words(step)
        return [
            (premise, step)
            for premise in premises
            if premise and (not self._prefilter or words & content_words(premise))
        ]

    def _ask(self, pairs: list[tuple[str, str]]) -> None:
        if not pairs:
            return
        probabilities = np.asarray(self._contradicts(pairs), np.float64)
        if probabilities.shape != (len(pairs),) or not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise ValueError(f"contradicts must return {len(pairs)} probabilities in [0, 1], one per pair")
        self._known.update(zip(pairs, probabilities.tolist(), strict=True))


_REMEMBERED_PAIRS = 1 << 17
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been but by can could did do does for from had has have he her his i if in is it its "
        "not of on or she so that the their them then there they this to was we were what when which who will with "
        "would you",
    )
)


def content_words(text: str) -> frozenset[str]:
    """Numbers and words of a text, in lower case, without function words."""
    return frozenset(re.findall(r"\w+", text.lower())) - _FUNCTION_WORDS


def _scaled_cosine(left: np.ndarray, right: np.ndarray) -> float:
    """(1 + cos) / 2; 0 where one of them has no direction."""
    norm = float(np.linalg.norm(left)) * float(np.linalg.norm(right))
    return 0.5 + 0.5 * float(np.dot(left, right)) / norm if norm > 0 else 0.0


def _is_probability(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
