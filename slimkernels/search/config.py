"""``PathFinderConfig``: how a tree of reasoning steps grows, and when it stops."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from slimkernels.search.engine import StepEnd


@dataclasses.dataclass(frozen=True)
class PathFinderConfig:
    r"""How a tree of reasoning steps grows, and when it stops.

    Attributes:
        branching_factor: Children of every open leaf; or one number for each depth, the last of which holds on.
        beam: Open leaves kept for each question after every depth, the best by score.
        buffer_size: Hypotheses kept for each question after every depth, finished ones included, the best by score.
        max_depth: Steps of a branch at most.
        max_step_tokens: Tokens of a step at most; a step that reaches it is one.
        max_tokens: Tokens generated for a question at most, those of cut and pruned children included. A step is only
            begun where a whole one still fits. None: no limit.
        time_limit_s: Seconds for each batch of questions, looked at before every generation. None: no limit.
        step_delimiter: What ends a step, once there is anything but white space in it.
        end_markers: A step that has one in its text ends there, and the branch is finished.
        answer_pattern: A regular expression; a branch is finished with the step that it is found in. What is found
            last, its first group if there is one, is the result's ``answer``.
        temperature: T_0; at depth d a token is drawn at T_0 * annealing^d. 0 takes the likeliest.
        annealing: gamma, above 0; 1 keeps the temperature.
        top_k: Tokens are drawn from the k likeliest; 0: from all.
        top_p: And from the smallest set with this much probability.
        length_penalty: lambda of the score, sum of log-probabilities / (number of tokens)^lambda.
        max_attempts: Generations of a child that fails its checks, until it is cut.
        seed: Of all noise.
        batch_questions: Questions searched at the same time. Changes speed and memory, not results.
        step_end: What ends a step, in place of ``step_delimiter``: called with the step's text after every token.

    Raises:
        ValueError: A value outside its range.
    """

    branching_factor: int | Sequence[int] = 8
    beam: int = 8
    buffer_size: int = 128
    max_depth: int = 12
    max_step_tokens: int = 64
    max_tokens: int | None = None
    time_limit_s: float | None = None
    step_delimiter: str = "\n"
    end_markers: Sequence[str] = ()
    answer_pattern: str | None = None
    temperature: float = 0.8
    annealing: float = 0.9
    top_k: int = 0
    top_p: float = 0.95
    length_penalty: float = 1.0
    max_attempts: int = 2
    seed: int = 0
    batch_questions: int = 8
    step_end: StepEnd | None = None

    def __post_init__(self) -> None:
        if isinstance(self.branching_factor, int):
            factors: Sequence[Any] = (self.branching_factor,)
        else:
            factors = tuple(self.branching_factor)
        if not factors or not all(isinstance(factor, int) and factor >= 1 for factor in factors):
            raise ValueError(f"branching_factor must be at least 1, at every depth, got {self.branching_factor}")
        for name in ("beam", "buffer_size", "max_depth", "max_step_tokens", "max_attempts", "batch_questions"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not isinstance(self.max_tokens, int | None):
            raise ValueError(f"max_tokens must be an integer or None, got {self.max_tokens!r}")
        if self.max_tokens is not None and self.max_tokens < self.max_step_tokens:
            raise ValueError(
                f"max_tokens must be at least max_step_tokens = {self.max_step_tokens}, as only whole steps are begun, "
                f"got {self.max_tokens}: lower max_step_tokens"
            )
        if self.time_limit_s is not None and not self.time_limit_s > 0:
            raise ValueError(f"time_limit_s must be positive, got {self.time_limit_s}")
        if not self.step_delimiter:
            raise ValueError("step_delimiter must not be empty: give the text that ends a step, or step_end")
        if isinstance(self.end_markers, str) or not all(self.end_markers):
            raise ValueError(f"end_markers must be a sequence of texts that are not empty, got {self.end_markers!r}")
        for name, low, high in (("temperature", 0, math.inf), ("top_p", 0, 1), ("length_penalty", 0, math.inf)):
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{name} must be finite and in [{low}, {high}], got {value}")
        if not (math.isfinite(self.annealing) and self.annealing > 0):
            raise ValueError(f"annealing must be finite and above 0, got {self.annealing}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be an integer of at least 0, got {self.top_k!r}")
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                raise ValueError(f"answer_pattern must be a regular expression, got {self.answer_pattern!r}") from error

    def branching_at(self, depth: int) -> int:
        """Children of a leaf of this depth; the root's is 0."""
        if isinstance(self.branching_factor, int):
            return self.branching_factor
        return self.branching_factor[min(depth, len(self.branching_factor) - 1)]

    def temperature_at(self, depth: int) -> float:
        """T_0 * gamma^d."""
        return self.temperature * self.annealing**depth

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that may end a step."""
        return (*(() if self.step_end is not None else (self.step_delimiter,)), *self.end_markers)

    def is_step(self, text: str) -> bool:
        """Whether a step is complete."""
        if any(marker in text for marker in self.end_markers):
            return True
        if self.step_end is not None:
            return self.step_end(text)
        return self.step_delimiter in text.lstrip()

    def is_final(self, text: str) -> bool:
        """Whether a branch that ends in this step is finished."""
        if any(marker in text for marker in self.end_markers):
            return True
        return self.answer_pattern is not None and re.search(self.answer_pattern, text) is not None

    def answer(self, text: str) -> str | None:
        """What ``answer_pattern`` finds last in a whole branch; None also where its first group took no part in it."""
        if self.answer_pattern is None:
            return None
        found = None
        for found in re.finditer(self.answer_pattern, text):  # noqa: B007 -- the last one is wanted
            pass
        if found is None:
            return None
        text = found[1] if found.re.groups else found[0]
        return None if text is None else text.strip()
