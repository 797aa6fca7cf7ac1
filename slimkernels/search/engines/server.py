"""``ServerEngine``: continues branches through an OpenAI-compatible server, with one concurrent request per step."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import weakref
import zlib
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np

from slimkernels.search.engine import Prompt, Step, StepEnd, StepRequest
from slimkernels.search.engines.server_steps import UNKNOWN_TOKEN, ServerDialect, StepPart, dialect_of
from slimkernels.serving.client_async import AsyncServerClient

_EMBEDDING_SIZE = 1024
T = TypeVar("T")


@dataclasses.dataclass
class _Branch:
    """The text that the server continues: token ids if it takes them, otherwise a string."""

    prompt: str | list[int]
    # Number of tokens, those of the prompt included if the server takes token ids.
    length: int

    def followed_by(self, text: str, token_ids: Sequence[int]) -> str | list[int]:
        """Returns the prompt extended by a part of a step."""
        return self.prompt + text if isinstance(self.prompt, str) else [*self.prompt, *token_ids]


class ServerEngine:
    """A language model behind an OpenAI-compatible server: vLLM, llama.cpp, or any other with ``/completions``.

    All steps of a depth are requested at the same time, and the server batches them. Its prefix cache makes it read the
    common prefix of sibling branches once. The engine keeps only the token ids of a branch, or its text for a server
    other than vLLM and llama.cpp.

    ``step_end`` decides where a step ends. vLLM and llama.cpp get the texts that may end a step, and stop there; any
    other server generates ``max_tokens``, and the tokens after the step are thrown away. Each request carries the seed
    of its child; whether the same seed draws the same tokens in another batch depends on the server.

    Steps are embedded by counts of their character trigrams, which recognise exact repeats and little more; give
    ``RepetitionCheck`` a sentence encoder for more. ``notes`` lists such limitations.

    Args:
        url: Base URL, such as ``http://localhost:8000/v1``.
        model: The server's name for the model.
        context_length: Number of tokens that the model can read; None asks the server, and sets no limit if it does not
            say.
        require_logprobs: Whether to refuse a server that gives no log-probabilities; if False, such a server is pruned
            at random.
        key_env: Environment variable that holds the key; None uses ``OPENAI_API_KEY`` if that is set.
        concurrency: Largest number of requests in flight.
        max_retries: Repetitions of a failed request.
        requests_per_minute: Limit on requests, repetitions included; None: no limit.
        timeout_s: Seconds without a response after which a request counts as failed.
        backoff_s: Seconds before the first repetition, doubled each time.

    Raises:
        ServerUnavailableError, ServerRequestError: The server does not answer, or refuses the key.
        ImportError: The package httpx2 is not installed.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        context_length: int | None = None,
        require_logprobs: bool = True,
        key_env: str | None = None,
        concurrency: int = 256,
        max_retries: int = 6,
        requests_per_minute: float | None = None,
        timeout_s: float = 600.0,
        backoff_s: float = 1.0,
    ) -> None:
        self._client = AsyncServerClient(
            url,
            key_env=key_env,
            concurrency=concurrency,
            max_retries=max_retries,
            requests_per_minute=requests_per_minute,
            timeout_s=timeout_s,
            backoff_s=backoff_s,
        )
        self._model = model
        self._require_logprobs = require_logprobs
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="slimkernels-server", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _shut, self._loop, thread, self._client)
        try:
            self._dialect: ServerDialect = self._run(dialect_of(self._client, model))
        except BaseException:
            self.close()
            raise
        self.context_length = context_length or self._dialect.context_length or 1 << 20
        self._notes = dict.fromkeys(self._dialect.notes)
        self._branches: dict[int, _Branch] = {}
        self._token_ids: dict[str, list[int]] = {}
        self._next = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """Limitations that a result of this server should mention."""
        return tuple(self._notes)

    def identity(self) -> dict[str, Any]:
        """Returns the server's name for the model and the kind of the server; its weights cannot be read."""
        return {"engine": "server", "model": self._model, "dialect": self._dialect.kind}

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt that has no tokens, fills the context, or is of an unsupported type."""
        if not self._dialect.takes_token_ids and not isinstance(prompt, str):
            raise ValueError(
                "prompts must be texts for this server, which is not known to take token ids, got token ids"
            )
        length = self.count_tokens(prompt)
        if not 0 < length < self.context_length:
            raise ValueError(
                f"the prompt must have tokens, fewer than the context of {self.context_length}, got {length}"
            )

    def count_tokens(self, prompt: Prompt) -> int:
        """Returns the server's count of the tokens of a prompt; without one, an upper bound: the bytes of the text."""
        if not self._dialect.takes_token_ids:
            return len(str(prompt).encode())
        return len(self._encode(prompt))

    def cache_bytes(self, prompt_tokens: int, generated_tokens: int) -> int:
        """Returns 0, because the keys and values are on the server."""
        return 0

    def start(self, prompts: Sequence[Prompt]) -> list[int]:
        """Returns a branch for each prompt; the server reads the prompt with the first step."""
        for prompt in prompts:
            self.check(prompt)
        by_ids = self._dialect.takes_token_ids
        return [
            self._add(
                _Branch(self._encode(prompt) if by_ids else str(prompt), self.count_tokens(prompt) if by_ids else 0)
            )
            for prompt in prompts
        ]

    def extend(self, requests: Sequence[StepRequest], step_end: StepEnd, *, embed: bool) -> list[Step]:
        """Requests all steps at the same time; each becomes a branch.

        If one fails, or on an interrupt, the others are cancelled and their connections closed.

        Args:
            requests: Any number of requests, of any branches.
            step_end: Function that is called with growing prefixes of a step's text.
            embed: Whether to embed steps, by counts of character trigrams.

        Raises:
            ServerUnavailableError: All attempts of a request failed.
            ServerRequestError: The server refused a request, or all of its answers to one cannot be read or lack
                log-probabilities although they are required.
        """
        for request in requests:
            if self._branches[request.branch].length >= self.context_length:
                raise ValueError(f"branch {request.branch} must be shorter than the context: it cannot be continued")
        answers = self._run(_all([self._answer(request, step_end) for request in requests]))
        return [self._step(*pair, embed) for pair in zip(requests, answers, strict=True)]

    def replay(self, steps: Sequence[Step], *, embed: bool) -> list[Step]:
        """Restores branches of steps that were drawn earlier; the server reads them with the next step."""
        replayed = []
        for step in steps:
            above = self._branches[step.branch]
            prompt = above.followed_by(step.text, step.token_ids)
            branch = self._add(_Branch(prompt, above.length + len(step.token_ids)))
            embedding = trigram_counts(step.text) if embed else None
            replayed.append(dataclasses.replace(step, branch=branch, embedding=embedding))
        return replayed

    def free(self, branch: int) -> None:
        """Forgets a branch."""
        del self._branches[branch]

    def close(self) -> None:
        """Closes the connections, which also happens when the engine is garbage collected."""
        self._end()

    async def _answer(self, request: StepRequest, step_end: StepEnd) -> StepPart:
        """Asks until the step ends; a stop text, such as a newline before any other text, need not end it."""
        branch = self._branches[request.branch]
        answer = StepPart("", [], [], "")
        room = min(request.max_tokens, self.context_length - branch.length)
        while True:
            left = dataclasses.replace(request, max_tokens=room - len(answer.token_ids))
            prompt = branch.followed_by(answer.text, answer.token_ids)
            more = await self._dialect.complete(
                prompt, left, len(answer.token_ids), require_logprobs=self._require_logprobs
            )
            answer = answer.followed_by(more).cut(step_end)
            if answer.end != "stop" or len(answer.token_ids) >= room:
                break
        end = answer.end
        if end in ("stop", "length"):
            end = "context" if branch.length + len(answer.token_ids) >= self.context_length else "length"
        return answer._replace(end=end)

    def _step(self, request: StepRequest, answer: StepPart, embed: bool) -> Step:
        above = self._branches[request.branch]
        prompt = above.followed_by(answer.text, answer.token_ids)
        tokens = answer.token_ids or [UNKNOWN_TOKEN]
        return Step(
            branch=self._add(_Branch(prompt, above.length + len(tokens))),
            token_ids=tokens,
            text=answer.text,
            sum_logprob=self._sum_logprob(request, answer),
            end=answer.end,  # type: ignore[arg-type]
            embedding=trigram_counts(answer.text) if embed else None,
        )

    def _sum_logprob(self, request: StepRequest, answer: StepPart) -> float:
        if answer.logprobs or not answer.text:
            return float(sum(answer.logprobs))
        self._notes["pruning was at random: the server gave no log-probabilities"] = None
        # Derived from the child's seed, so that it does not depend on the batch.
        return -len(answer.token_ids) * float(np.random.default_rng(request.seed % 2**63).random())

    def _add(self, branch: _Branch) -> int:
        self._next += 1
        self._branches[self._next] = branch
        return self._next

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if prompt not in self._token_ids:
            if len(self._token_ids) >= 4096:
                self._token_ids.clear()
            self._token_ids[prompt] = self._run(self._dialect.tokenize(prompt))
        return self._token_ids[prompt]

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the engine's thread, so that callers may have an event loop of their own, or a Ctrl-C."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _shut(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: AsyncServerClient) -> None:
    # True if the engine is garbage collected in its own thread, which cannot wait for itself.
    if threading.current_thread() is thread:
        loop.stop()
        return
    asyncio.run_coroutine_threadsafe(client.close(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def _all(awaitables: Sequence[Awaitable[T]]) -> list[T]:
    """Returns all results; if one fails or this call is cancelled, the others are cancelled and awaited."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def trigram_counts(text: str) -> np.ndarray:
    """Counts the character trigrams of a text, hashed into (1024,) float32."""
    letters = f" {' '.join(text.lower().split())} ".encode()
    places = [zlib.crc32(letters[first : first + 3]) % _EMBEDDING_SIZE for first in range(len(letters) - 2)]
    return np.bincount(places, minlength=_EMBEDDING_SIZE).astype(np.float32)
