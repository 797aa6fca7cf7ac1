"""Early stop of a search whose finished branches agree on an answer, and bounds on what it leaves out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from slimkernels.search.answers import canonical
from slimkernels.search.config import PathFinderConfig
from slimkernels.search.plan import growth


class Agreement(NamedTuple):
    """The answer that most finished branches give.

    Attributes:
        answer: The answer as its first branch gives it; None without answers.
        votes: Number of branches with this answer.
        others: Largest number of branches with any other answer.
    """

    answer: str | None
    votes: int
    others: int


class Remainder(NamedTuple):
    """Upper bounds of what a search may still generate.

    Attributes:
        branches: Branches that may still finish.
        tokens: Tokens, those of cut and pruned children and of further attempts included.
    """

    branches: int
    tokens: int


def agreement(answers: Sequence[str | None]) -> Agreement:
    """Counts the answers of finished branches; answers of equal value are one, as in ``majority_vote``."""
    shown: dict[object, str] = {}
    for answer in answers:
        if answer is not None:
            shown.setdefault(canonical(answer, "any"), answer)
    votes = Counter(canonical(answer, "any") for answer in answers if answer is not None).most_common(2)
    if not votes:
        return Agreement(None, 0, 0)
    return Agreement(shown[votes[0][0]], votes[0][1], votes[1][1] if len(votes) > 1 else 0)


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

    The second holds only if no branch with the answer can be pruned from the buffer.
    """
    if config.stop_when_agreed is None or found.answer is None:
        return False
    is_certain = found.votes > found.others + left.branches and num_hypotheses + left.branches <= config.buffer_size
    return found.votes >= config.stop_when_agreed or is_certain
