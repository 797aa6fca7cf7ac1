"""Decoders by name: each is one configuration of the search, so that compared decoders differ in nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from slimkernels.evaluate.tasks import Task
from slimkernels.search import (
    DEFAULT_CHAINS,
    Engine,
    PathFinder,
    PathFinderConfig,
    consensus,
    greedy,
    majority_vote,
    self_consistency,
)

DECODERS = ("greedy", "self-consistency", "pathfinder")


@dataclasses.dataclass(frozen=True)
class DecoderSettings:
    """Settings that the decoders of a comparison share, and those of single decoders.

    Attributes:
        temperature: Sampling temperature, unused by greedy decoding.
        top_p: Probability mass that sampling keeps, unused by greedy decoding.
        max_steps: Maximum number of steps (lines) of an answer.
        max_step_tokens: Maximum number of tokens of a step.
        max_tokens: Maximum number of tokens generated for a question, over all chains and branches; None for no limit.
        num_chains: Number of chains of self-consistency.
        branching_factor: Number of children of a leaf, for PathFinder.
        beam: Number of leaves kept after each step, for PathFinder.
    """

    temperature: float = PathFinderConfig.temperature
    top_p: float = PathFinderConfig.top_p
    max_steps: int = PathFinderConfig.max_depth
    max_step_tokens: int = PathFinderConfig.max_step_tokens
    max_tokens: int | None = PathFinderConfig.max_tokens
    num_chains: int = DEFAULT_CHAINS
    branching_factor: int | Sequence[int] = PathFinderConfig.branching_factor
    beam: int = PathFinderConfig.beam

    def of(self, decoder: str, task: Task) -> dict[str, Any]:
        """Returns all settings that decide a decoder's outputs on a task, except for the seed.

        Raises:
            ValueError: ``decoder`` is unknown.
        """
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
        limits = {name: getattr(self, name) for name in ("max_steps", "max_step_tokens", "max_tokens")}
        draws = {"temperature": self.temperature, "top_p": self.top_p}
        own: dict[str, dict[str, Any]] = {
            "greedy": {},
            "self-consistency": draws | {"num_chains": self.num_chains},
            "pathfinder": draws | {"branching_factor": self.branching_factor, "beam": self.beam},
        }
        selector = {"greedy": "the only chain", "pathfinder": "trigram consensus"}.get(decoder)
        if selector is None:
            selector = "trigram consensus" if task.kind is None else "majority of the flexible answers"
        return limits | own[decoder] | {"selector": selector}

    def config(self, task: Task) -> PathFinderConfig:
        """Returns the configuration of the search on a task.

        Raises:
            ValueError: A setting is outside its range.
        """
        if self.num_chains < 1:
            raise ValueError(f"num_chains must be at least 1, got {self.num_chains}")
        return PathFinderConfig(
            branching_factor=self.branching_factor,
            beam=self.beam,
            max_depth=self.max_steps,
            max_step_tokens=self.max_step_tokens,
            max_tokens=self.max_tokens,
            # A free text, of no kind, may have any lines and announces no answer.
            answer_kind=task.kind,
            temperature=self.temperature,
            top_p=self.top_p,
        )


def is_random(decoder: str) -> bool:
    """Returns whether a decoder's answers depend on the seed."""
    return decoder != "greedy"


def make_search(
    decoder: str, engine: Engine, settings: DecoderSettings, task: Task, *, seed: int = 0, batch_questions: int = 8
) -> PathFinder:
    """Makes the search for a task's samples, given as ``Question(prompt, sample.question, sample.choices)``.

    Raises:
        ValueError: ``decoder`` is unknown, or a setting is outside its range.
    """
    settings.of(decoder, task)
    config = dataclasses.replace(settings.config(task), seed=seed, batch_questions=batch_questions)
    if decoder == "greedy":
        return greedy(engine, config)
    if decoder == "pathfinder":
        return PathFinder(engine, config)
    # The votes are the flexible answers. Free texts, which are never equal, are scored by consensus.
    selector = consensus() if task.kind is None else majority_vote
    return self_consistency(engine, settings.num_chains, config, selector=selector)
