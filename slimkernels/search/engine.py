"""The interface between the search and a language model: ``Engine``, ``StepRequest`` and ``Step``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

# Tells from the text of a step so far whether the step is complete.
StepEnd = Callable[[str], bool]
Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class StepRequest:
    """A request for one child of one branch.

    Attributes:
        branch: The engine's number of the branch to continue.
        path: Identity of the child: the ordinals of the nodes from the root's child down to it.
        attempt: Number of times that this child has been generated before.
        seed: int64; keys the noise together with the token's position, so that the child does not depend on its batch.
        temperature: Sampling temperature; 0 takes the likeliest token.
        top_k: Number of likeliest tokens to draw from; 0 for all.
        top_p: Probability of the smallest set of likeliest tokens to draw from, after ``top_k``.
        max_tokens: Largest number of tokens of the step, at least 1.
        stop: Texts that may end the step, for engines that can stop at a text. Whether the step has ended is for the
            ``step_end`` of ``Engine.extend`` to decide.
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
        branch: The engine's number of the branch that ends with this step, to be continued or freed.
        token_ids: Token ids of the step, between one and ``max_tokens``.
        text: Text that the step adds to that of the branch, without the end of text.
        sum_logprob: Sum of the log-probabilities of ``token_ids`` under the model's softmax, in nats.
        end: Reason why the step ended: "step" (complete), "end_of_text", "length" (``max_tokens``), or "context" (the
            model cannot read more tokens).
        sum_entropy: Sum of the entropies of the model's distributions at each token, in nats.
        embedding: (d,) float32, embedding of the step for the repetition check if ``embed`` requested it, else None.
        replaces: Number of characters at the end of the branch's text that ``text`` replaces: the marks U+FFFD for the
            first bytes of a character that the step completes.
    """

    branch: int
    token_ids: Sequence[int]
    text: str
    sum_logprob: float
    end: Literal["step", "end_of_text", "length", "context"]
    sum_entropy: float = 0.0
    embedding: np.ndarray | None = None
    replaces: int = 0


class Engine(Protocol):
    """A language model that keeps branches.

    An engine may also have ``notes``, a sequence of strings to add to the notes of every result, and a method
    ``chat_prompt`` that returns the token ids of a question in the model's chat template, or None without a template.
    """

    def identity(self) -> dict[str, Any]:
        """Returns everything that draws depend on, as JSON values. A search resumes only if they equal the trace's."""
        ...

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt that ``start`` could not take, such as one longer than the context."""

    def count_tokens(self, prompt: Prompt) -> int:
        """Returns the number of tokens of a prompt."""
        ...

    def cache_bytes(self, prompt_tokens: int, generated_tokens: int) -> int:
        """Returns the most bytes that so many tokens, each stored once, take in this process."""
        ...

    def start(self, prompts: Sequence[Prompt]) -> list[int]:
        """Encodes each prompt once. Returns the branch that ends with it."""
        ...

    def extend(self, requests: Sequence[StepRequest], step_end: StepEnd, *, embed: bool) -> list[Step]:
        """Generates all requests in one batch. Each becomes a branch; the branches that they continue remain."""
        ...

    def replay(self, steps: Sequence[Step], *, embed: bool) -> list[Step]:
        """Continues branches by steps that ``extend`` drew before, in one batch.

        Args:
            steps: Steps to append. ``branch`` is the branch to continue, ``token_ids`` and ``text`` are the step's;
                the other fields are ignored.
            embed: Whether to compute the embeddings that ``extend`` gave.

        Returns:
            The steps with their own branches and embeddings.
        """
        ...

    def free(self, branch: int) -> None:
        """Frees a branch; whatever other branches share with it remains."""
