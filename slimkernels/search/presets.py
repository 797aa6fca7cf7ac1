"""Other decoders as settings of the same search, so that comparisons differ in nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

from slimkernels.search.config import PathFinderConfig
from slimkernels.search.engine import Engine
from slimkernels.search.pathfinder import PathFinder
from slimkernels.search.selection import Scorer, log_probability, majority_vote


def self_consistency(
    engine: Engine, num_chains: int, config: PathFinderConfig | None = None, *, selector: Scorer = majority_vote
) -> PathFinder:
    """``num_chains`` independent chains of thought, of which the most frequent answer wins.

    PathFinder that branches once, at the root, at one temperature, with nothing pruned and no checks.

    Args:
        engine: The language model.
        num_chains: n.
        config: Of the steps and limits; what makes the preset is replaced.
        selector: What to select by; ``majority_vote`` needs an ``answer_pattern``.

    References: Wang et al. 2023, "Self-consistency improves chain of thought reasoning", arXiv 2203.11171.
    """
    return _chains(engine, num_chains, config, selector, annealing=1.0)


def best_of_n(
    engine: Engine, num_chains: int, config: PathFinderConfig | None = None, *, selector: Scorer = log_probability
) -> PathFinder:
    """``num_chains`` independent chains of thought, of which a scorer chooses: a verifier, or their log-probability.

    Args:
        engine: The language model.
        num_chains: n.
        config: Of the steps and limits; what makes the preset is replaced.
        selector: What to select by.
    """
    return _chains(engine, num_chains, config, selector, annealing=1.0)


def greedy(engine: Engine, config: PathFinderConfig | None = None) -> PathFinder:
    """One chain of thought of the likeliest tokens.

    Args:
        engine: The language model.
        config: Of the steps and limits; what makes the preset is replaced.
    """
    return _chains(engine, 1, config, log_probability, temperature=0.0, top_k=0, top_p=1.0)


def _chains(
    engine: Engine, num_chains: int, config: PathFinderConfig | None, selector: Scorer, **changes: Any
) -> PathFinder:
    if num_chains < 1:
        raise ValueError(f"num_chains must be at least 1, got {num_chains}")
    chains = dataclasses.replace(
        config or PathFinderConfig(),
        branching_factor=(num_chains, 1),
        beam=num_chains,
        buffer_size=num_chains,
        max_attempts=1,
        **changes,
    )
    return PathFinder(engine, chains, checks=(), selector=selector)
