"""A scorer of steps by a language model behind an OpenAI-compatible server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from slimkernels.search.step_prompts import DEFAULT_TEMPLATE, StepPrompt
from slimkernels.serving.client import ServerClient
from slimkernels.serving.errors import UnusableAnswerError

_TOP_LOGPROBS = 20  # the most that OpenAI's interface gives


class ServedStepVerifier:
    """A scorer of steps by a server's language model that is asked whether the last step of a branch is right.

    score = P(yes) / (P(yes) + P(no)), each the sum of the probabilities of those of the 20 likeliest first tokens of
    the answer that spell the word, with any case and spaces. All branches of a depth are requested at the same time. A
    server's probabilities may depend on its batches; those that a search has used are in its trace.

    Args:
        url: Base URL, such as ``http://localhost:8000/v1``.
        model: The server's name for the model.
        template: The user's message, with the placeholders ``{question}`` (the question's context), ``{steps}`` (those
            of the branch) and ``{step}`` (the last one).
        separator: Text between two steps.
        yes: Word for a right step.
        no: Word for a wrong step.
        **client: Options of ``ServerClient``: ``key_env``, ``concurrency``, ``max_retries``, ``timeout_s``, ...

    Raises:
        ImportError: The package httpx2 is not installed.
        ValueError: The URL is malformed, or the template has no place for a step.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        template: str = DEFAULT_TEMPLATE,
        separator: str = "\n",
        yes: str = "yes",
        no: str = "no",
        **client: Any,
    ) -> None:
        ServerClient(url, **client).close()  # fails now rather than at the first step
        self.prompt = StepPrompt.of(template, separator)
        self._url, self._client, self._model = url, client, model
        self._words = {_plain(yes): 0, _plain(no): 1}
        self.settings = self.prompt.settings | {"model": model, "yes": yes, "no": no}

    def __call__(self, texts: Sequence[Sequence[str]], context: Sequence[str]) -> list[float]:
        """Asks for the score of the last step of every branch, for equal ones once.

        Raises:
            ServerUnavailableError: The server did not answer.
            ServerRequestError: The server refused a request, or gave no probability for either word.
        """
        messages = [self.prompt.fill(steps, question) for steps, question in zip(texts, context, strict=True)]
        with ServerClient(self._url, **self._client) as client:

            def ask(message: str) -> float:
                payload = {
                    "model": self._model,
                    "messages": [{"role": "user", "content": message}],
                    "max_tokens": 1,
                    "temperature": 0.0,
                    "logprobs": True,
                    "top_logprobs": _TOP_LOGPROBS,
                }
                return client.post("/chat/completions", payload, self._read)

            scores = dict(client.map(ask, dict.fromkeys(messages)))
        return [scores[message] for message in messages]

    def _read(self, content: dict[str, Any]) -> float:
        mass = [0.0, 0.0]
        likeliest = content["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        for entry in likeliest:
            if (place := self._words.get(_plain(entry["token"]))) is not None:
                mass[place] += math.exp(entry["logprob"])
        if sum(mass) == 0:
            words, got = " and ".join(map(repr, self._words)), [entry["token"] for entry in likeliest[:5]]
            raise UnusableAnswerError(
                f"the answer must begin with one of {words}, but neither is among its {len(likeliest)} likeliest "
                f"tokens, which begin with {got}: give a template that asks for them"
            )
        return mass[0] / sum(mass)


def _plain(word: str) -> str:
    return word.strip().lower()
