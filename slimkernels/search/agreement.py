"""Early stop of a search whose finished branches agree on an answer, and bounds on what it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from slimkernels.search.answers import canonical
from slimkernels.search.config import PathFinderConfig
from slimkernels.search.plan import growth


class Agreement(NamedTuple):
    """The answer that most finished branches give.

    Attributes:
        answer: The answer as its first branch gives it; None without answers.
        votes: Sum of the weights of the branches with this answer: their number, if no siblings were merged.
        others: Largest such sum of any other answer.
    """

    answer: str | None
    votes: float
    others: float


class Remainder(NamedTuple):
    """Upper bounds of what a search may still generate.

    Attributes:
        branches: Branches that may still finish.
        tokens: Tokens, those of cut and pruned children and of further attempts included.
    """

    branches: int
    tokens: int


def agreement(answers: Sequence[str | None], weights: Sequence[float]) -> Agreement:
    """Adds the weights of finished branches by answer; answers of equal value are one, as in ``majority_vote``."""
    shown: dict[object, str] = {}
    votes: dict[object, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            value = canonical(answer, "any")
            shown.setdefault(value, answer)
            votes[value] = votes.get(value, 0.0) + weight
    ranked = sorted(votes, key=votes.__getitem__, reverse=True)
    if not ranked:
        return Agreement(None, 0, 0)
    return Agreement(shown[ranked[0]], votes[ranked[0]], votes[ranked[1]] if len(ranked) > 1 else 0)


def remainder(config: PathFinderConfig, depth: int, num_leaves: int, steps_left: int | None) -> Remainder:
    """Bounds what a search generates from a depth on.

    Args:
        config: Settings of the search.
        depth: Number of depths that are complete, below ``max_depth``.
        num_leaves: Number of open leaves.
        steps_left: Number of whole steps that the token budget still allows; None if there is no budget.
    """
    leaves, children = map(sum, zip(*growth(config, depth, num_leaves), strict=True))
    # Every child finishes but those that are the leaves of the next depth.
    branches = children - (leaves - num_leaves)
    steps = children * config.max_attempts
    if steps_left is not None:
        branches, steps = min(branches, steps_left), min(steps, steps_left)
    return Remainder(branches, steps * config.max_step_tokens)


def is_settled(config: PathFinderConfig, found: Agreement, num_hypotheses: int, left: Remainder) -> bool:
    """Returns whether a search may stop early: ``stop_when_agreed`` branches agree, or no other answer can get as many.

    The second holds only if no branch with the answer can be pruned from the buffer. It is not tried where siblings are
    merged, since one branch may then have any number of votes.
    """
    if config.stop_when_agreed is None or found.answer is None:
        return False
    is_certain = found.votes > found.others + left.branches and num_hypotheses + left.branches <= config.buffer_size
    return found.votes >= config.stop_when_agreed or (is_certain and config.merge_siblings is None)
