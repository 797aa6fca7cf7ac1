"""``ServerEngine``: branches that an OpenAI-compatible server continues, one request for each step, all at once."""

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
from slimkernels.search.engines.server_steps import UNKNOWN_TOKEN, Answer, ServerDialect, dialect_of
from slimkernels.serving.client import ServerRequestError
from slimkernels.serving.client_async import AsyncServerClient

_EMBEDDING_SIZE = 1024
T = TypeVar("T")


@dataclasses.dataclass
class _Branch:
    """What the server reads on from: token ids where it takes them, else the text."""

    prompt: str | list[int]
    length: int  # tokens; the prompt's too, where the server takes token ids

    def followed_by(self, text: str, token_ids: Sequence[int]) -> str | list[int]:
        """What the server reads on from after more of a step."""
        return self.prompt + text if isinstance(self.prompt, str) else [*self.prompt, *token_ids]


class ServerEngine:
    """A language model behind an OpenAI-compatible server: vLLM, llama.cpp, or any other with ``/completions``.

    The steps of a depth are requested all at the same time, and the server batches them; that it reads the prefix of
    sibling branches once is the work of its prefix cache. Nothing of a branch is kept here but its token ids (its text,
    for a server other than vLLM and llama.cpp, which reads on from exactly that text).

    A step ends where ``step_end`` says. vLLM and llama.cpp are told the texts that end one, and stop there; any other
    server generates ``max_tokens``, of which what follows the step is thrown away. The child's seed goes with its
    request: whether the same seed draws the same tokens in another batch is up to the server.

    Steps are embedded here by counts of their character trigrams, which tell an exact repeat and little more; give a
    ``RepetitionCheck`` a sentence encoder for more. ``notes`` says so, and what else a result should say.

    Args:
        url: The base URL, as in ``http://localhost:8000/v1``.
        model: The server's name of the model.
        context_length: Tokens that the model can read; None asks the server, and where it does not say, any number.
        require_logprobs: False also takes a server that gives no log-probabilities; pruning is then at random.
        key_env: The environment variable that holds the key; None: ``OPENAI_API_KEY``, if that is set.
        concurrency: Requests under way at the same time.
        max_retries: Repetitions of a request that failed.
        requests_per_minute: Requests started in a minute at most; None: no limit.
        timeout_s: Silence after which a request is given up, in seconds.
        backoff_s: The first wait before a repetition, in seconds; it doubles.

    Raises:
        ServerUnavailableError, ServerRequestError: The server does not answer, or wants a key.
        ImportError: The package httpx2 is not installed.
        ValueError: An argument out of range.
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
        """What a result of this server should say."""
        return tuple(self._notes)

    def identity(self) -> dict[str, Any]:
        """The server's model by its name, and how it is spoken to; its weights cannot be seen."""
        return {"engine": "server", "model": self._model, "dialect": self._dialect.kind}

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError for a prompt without tokens, that fills the context, or that the server cannot take."""
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
        """Tokens of a prompt, as the server counts them; of one that does not, the text's bytes, which are no fewer."""
        if not self._dialect.takes_token_ids:
            return len(str(prompt).encode())
        return len(self._encode(prompt))

    def cache_bytes(self, prompt_tokens: int, generated_tokens: int) -> int:
        """0: keys and values are the server's."""
        return 0

    def start(self, prompts: Sequence[Prompt]) -> list[int]:
        """Notes each prompt; returns the branch that is it. The server reads it with the first step."""
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

        When one fails, or on an interrupt, the others are cancelled and their connections closed.

        Args:
            requests: Any number, of any branches.
            step_end: Called with growing parts of a step's text.
            embed: Whether to embed steps, by counts of character trigrams.

        Raises:
            ServerUnavailableError: A request failed, however often it was repeated.
            ServerRequestError: The server refused, or gave no log-probabilities where they are required.
        """
        for request in requests:
            if self._branches[request.branch].length >= self.context_length:
                raise ValueError(f"branch {request.branch} must be shorter than the context: it cannot be continued")
        answers = self._run(_all([self._answer(request, step_end) for request in requests]))
        return [self._step(*pair, embed) for pair in zip(requests, answers, strict=True)]

    def replay(self, steps: Sequence[Step], *, embed: bool) -> list[Step]:
        """Notes steps that were drawn before; the server reads them with the next."""
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
        """Closes the connections; also done when the engine is no longer used."""
        self._end()

    async def _answer(self, request: StepRequest, step_end: StepEnd) -> Answer:
        """Asks until the step ends: a text that may end it, such as a newline before anything else, need not."""
        branch = self._branches[request.branch]
        answer = Answer("", [], [], "")
        room = min(request.max_tokens, self.context_length - branch.length)
        while True:
            left = dataclasses.replace(request, max_tokens=room - len(answer.token_ids))
            prompt = branch.followed_by(answer.text, answer.token_ids)
            more = await self._dialect.complete(prompt, left, len(answer.token_ids))
            answer = answer.followed_by(more).cut(step_end)
            if answer.end != "stop" or len(answer.token_ids) >= room:
                break
        end = answer.end
        if end in ("stop", "length"):
            end = "context" if branch.length + len(answer.token_ids) >= self.context_length else "length"
        return answer._replace(end=end)

    def _step(self, request: StepRequest, answer: Answer, embed: bool) -> Step:
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

    def _sum_logprob(self, request: StepRequest, answer: Answer) -> float:
        if answer.logprobs or not answer.text:
            return float(sum(answer.logprobs))
        if self._require_logprobs:
            raise ServerRequestError(
                f"{self._client.url} must give log-probabilities (logprobs), which pruning is by, but gave none: "
                "enable them in the server, or prune at random by require_logprobs=False"
            )
        self._notes["pruning was at random: the server gave no log-probabilities"] = None
        # Of the child's seed, so that it is the same whatever else is in the batch.
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
        """Its result; it runs in the engine's own thread, so that a caller may have an event loop, or a Ctrl-C."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _shut(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: AsyncServerClient) -> None:
    if threading.current_thread() is thread:  # the last to use the engine was a request
        loop.stop()
        return
    asyncio.run_coroutine_threadsafe(client.close(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def _all(awaitables: Sequence[Awaitable[T]]) -> list[T]:
    """All results; where one fails or this is cancelled, the others are cancelled, and awaited."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def trigram_counts(text: str) -> np.ndarray:
    """How often each of the text's character trigrams is in it, hashed into (1024,) float32."""
    letters = f" {' '.join(text.lower().split())} ".encode()
    places = [zlib.crc32(letters[first : first + 3]) % _EMBEDDING_SIZE for first in range(len(letters) - 2)]
    return np.bincount(places, minlength=_EMBEDDING_SIZE).astype(np.float32)
