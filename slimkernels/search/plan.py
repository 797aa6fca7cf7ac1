"""``plan``: upper bounds of the tokens and bytes that a search takes, before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from slimkernels.search.config import PathFinderConfig
from slimkernels.search.engine import Engine


class Plan(NamedTuple):
    """Upper bounds, reached if every step has ``max_step_tokens`` tokens and every child needs all its attempts.

    Attributes:
        prompt_tokens: Tokens of all prompts.
        generated_tokens: Tokens generated for all questions.
        most_rows: Steps generated at the same time.
        cache_bytes: Bytes of keys and values at any time, those of the prompts included.
    """

    prompt_tokens: int
    generated_tokens: int
    most_rows: int
    cache_bytes: int


def plan(config: PathFinderConfig, prompt_lengths: Sequence[int], engine: Engine) -> Plan:
    """Returns the upper bounds of a search.

    Args:
        config: Settings of the search.
        prompt_lengths: Number of tokens of every question's prompt.
        engine: Language model, which knows how many bytes a number of tokens takes.
    """
    generated, most_rows, most_kept = 0, 0, 0
    for depth, (leaves, children) in enumerate(growth(config)):
        generated += children * config.max_step_tokens * config.max_attempts
        most_rows = max(most_rows, children)
        # The steps of each leaf, which it shares with no other leaf in the worst case, and one step of each child.
        most_kept = max(most_kept, (leaves * depth + children) * config.max_step_tokens)
    if config.max_tokens is not None:
        generated, most_kept = min(generated, config.max_tokens), min(most_kept, config.max_tokens)
        most_rows = min(most_rows, config.max_tokens // config.max_step_tokens)
    at_once = config.batch_questions
    batches = [prompt_lengths[first : first + at_once] for first in range(0, len(prompt_lengths), at_once)]
    return Plan(
        prompt_tokens=sum(prompt_lengths),
        generated_tokens=generated * len(prompt_lengths),
        most_rows=most_rows * max(map(len, batches), default=0),
        cache_bytes=max((engine.cache_bytes(sum(batch), most_kept * len(batch)) for batch in batches), default=0),
    )


def growth(config: PathFinderConfig, first_depth: int = 0, leaves: int = 1) -> Iterator[tuple[int, int]]:
    """Yields, for each depth, the most open leaves of one question and the most children that they get.

    Args:
        config: Settings of the search.
        first_depth: Depth to begin at.
        leaves: Number of open leaves at that depth.
    """
    for depth in range(first_depth, config.max_depth):
        children = leaves * config.branching_at(depth)
        yield leaves, children
        leaves = min(children, config.beam, config.buffer_size)
