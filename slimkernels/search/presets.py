"""Other decoders as settings of the same search, so that a comparison differs in nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

from slimkernels.search.config import PathFinderConfig
from slimkernels.search.engine import Engine
from slimkernels.search.pathfinder import PathFinder
from slimkernels.search.selection import Scorer, log_probability, majority_vote

DEFAULT_CHAINS = 5


def self_consistency(
    engine: Engine,
    num_chains: int = DEFAULT_CHAINS,
    config: PathFinderConfig | None = None,
    *,
    selector: Scorer = majority_vote,
    chat: bool = True,
) -> PathFinder:
    """Returns a search that draws ``num_chains`` independent chains of thought and selects the most frequent answer.

    It branches once, at the root, at a constant temperature, without pruning and checks.

    Args:
        engine: Language model.
        num_chains: Number of chains.
        config: Settings of the steps and limits; those that define this decoder are replaced.
        selector: Scorer of the chains; ``majority_vote`` counts answers of equal value.
        chat: Whether plain texts are asked in the model's chat template, as for ``PathFinder``.

    References: Wang et al. 2023, "Self-consistency improves chain of thought reasoning", arXiv 2203.11171.
    """
    return _chains(engine, num_chains, config, selector, chat, annealing=1.0)


def best_of_n(
    engine: Engine,
    num_chains: int = DEFAULT_CHAINS,
    config: PathFinderConfig | None = None,
    *,
    selector: Scorer = log_probability,
    chat: bool = True,
) -> PathFinder:
    """Returns a search that draws ``num_chains`` independent chains of thought and selects the one with the best score.

    Args:
        engine: Language model.
        num_chains: Number of chains.
        config: Settings of the steps and limits; those that define this decoder are replaced.
        selector: Scorer of the chains, such as a ``Verifier``; by default their log-probability.
        chat: Whether plain texts are asked in the model's chat template, as for ``PathFinder``.
    """
    return _chains(engine, num_chains, config, selector, chat, annealing=1.0)


def greedy(engine: Engine, config: PathFinderConfig | None = None, *, chat: bool = True) -> PathFinder:
    """Returns a search that follows one chain of thought, taking the likeliest token each time.

    Args:
        engine: Language model.
        config: Settings of the steps and limits; those that define this decoder are replaced.
        chat: Whether plain texts are asked in the model's chat template, as for ``PathFinder``.
    """
    return _chains(engine, 1, config, log_probability, chat, temperature=0.0, top_k=0, top_p=1.0)


def _chains(
    engine: Engine, num_chains: int, config: PathFinderConfig | None, selector: Scorer, chat: bool, **changes: Any
) -> PathFinder:
    if num_chains < 1:
        raise ValueError(f"num_chains must be at least 1, got {num_chains}")
    chains = dataclasses.replace(
        config or PathFinderConfig(),
        branching_factor=(num_chains, 1),
        branching_temperature=None,
        beam=num_chains,
        buffer_size=num_chains,
        max_attempts=1,
        merge_siblings=None,
        merge_embed=None,
        **changes,
    )
    return PathFinder(engine, chains, checks=(), selector=selector, chat=chat)
