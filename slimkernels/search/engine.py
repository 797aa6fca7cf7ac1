"""What the search asks of a language model: ``Engine``, ``StepRequest``, ``Step``. Nothing here knows a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

# A step of text so far -> whether the step is complete.
StepEnd = Callable[[str], bool]
Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class StepRequest:
    """One child of one branch, to be generated.

    Attributes:
        branch: The engine's number of the branch to continue.
        path: The child's name: which child of which child of the root it is.
        attempt: 0, or how often this child has been generated before.
        seed: int64; with the token's position it keys the noise, so that the child does not depend on its batch.
        temperature: Of the sampling; 0 takes the likeliest token.
        top_k: As in ``sample_logits``.
        top_p: As in ``sample_logits``.
        max_tokens: Tokens of the step at most, at least 1.
        stop: Texts that may end the step, for engines that can stop at them; whether it has ended, ``step_end`` says.
    """

    branch: int
    path: tuple[int, ...]
    attempt: int
    seed: int
    temperature: float
    top_k: int
    top_p: float
    max_tokens: int
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Step:
    """A generated step.

    Attributes:
        branch: The engine's number of the branch that ends in this step, to be continued or freed.
        token_ids: Of the step, between one and ``max_tokens``.
        text: Of the step, without the end of text.
        sum_logprob: Of ``token_ids`` under the model's softmax, in nats.
        end: "step" (complete), "end_of_text", "length" (``max_tokens``), or "context" (the model can read no more).
        sum_entropy: Of the model's distribution at each token, in nats.
        embedding: (d,) float32 of the step for the repetition check, where ``embed`` asked for it.
    """

    branch: int
    token_ids: Sequence[int]
    text: str
    sum_logprob: float
    end: Literal["step", "end_of_text", "length", "context"]
    sum_entropy: float = 0.0
    embedding: np.ndarray | None = None


class Engine(Protocol):
    """A language model that keeps branches; ``notes``, where it has them, are for every result to say."""

    def identity(self) -> dict[str, Any]:
        """What its draws depend on, as JSON values: those of the trace of a search must be equal for it to go on."""
        ...

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt that ``start`` could not take, such as one longer than the context."""

    def count_tokens(self, prompt: Prompt) -> int:
        """Tokens of a prompt."""
        ...

    def cache_bytes(self, prompt_tokens: int, generated_tokens: int) -> int:
        """The most bytes that so many tokens, each kept once, take in this process."""
        ...

    def start(self, prompts: Sequence[Prompt]) -> list[int]:
        """Encodes prompts, once; the branch that is each of them."""
        ...

    def extend(self, requests: Sequence[StepRequest], step_end: StepEnd, *, embed: bool) -> list[Step]:
        """Generates all requests in one batch; each becomes a branch of its own, and those they continue stay."""
        ...

    def replay(self, steps: Sequence[Step], *, embed: bool) -> list[Step]:
        """Continues the branch of each step by its tokens, as ``extend`` did when it drew them.

        Of a step, ``branch`` is the branch that it continues, and ``token_ids`` and ``text`` are what follows; the
        others are without meaning.

        Returns:
            The steps with their own branches, and with the embeddings that ``extend`` gave, in one batch.
        """
        ...

    def free(self, branch: int) -> None:
        """Forgets a branch; what others share with it stays theirs."""
