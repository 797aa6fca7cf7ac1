"""``plan``: upper bounds of what a search takes, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from slimkernels.search.config import PathFinderConfig
from slimkernels.search.engine import Engine


class Plan(NamedTuple):
    """Upper bounds, were no step to end before ``max_step_tokens`` and every child to need all its attempts.

    Attributes:
        prompt_tokens: Read, of all questions.
        generated_tokens: Of all questions.
        most_rows: Steps generated at the same time.
        cache_bytes: Of keys and values at the same time, prompts included.
    """

    prompt_tokens: int
    generated_tokens: int
    most_rows: int
    cache_bytes: int


def plan(config: PathFinderConfig, prompt_lengths: Sequence[int], engine: Engine) -> Plan:
    """Bounds for questions whose prompts have these lengths, in tokens.

    Args:
        config: Of the search.
        prompt_lengths: Of every question.
        engine: Says how many bytes a number of tokens takes.
    """
    leaves, generated, most_rows, most_kept = 1, 0, 0, 0
    for depth in range(config.max_depth):
        children = leaves * config.branching_at(depth)
        generated += children * config.max_step_tokens * config.max_attempts
        most_rows = max(most_rows, children)
        # Leaves, each with at most its own copy of all its steps, and their children.
        most_kept = max(most_kept, (leaves * depth + children) * config.max_step_tokens)
        leaves = min(children, config.beam, config.buffer_size)
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
