"""Asks each kind of server for log-probabilities, and reads its answers into one form."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from slimkernels.served_rows.tokens import ServerToken
from slimkernels.serving.client import ServerClient, ServerRequestError, UnusableAnswerError, reading
from slimkernels.serving.kinds import Kind


class Request(NamedTuple):
    """The request for one document.

    Attributes:
        prompt_ids: Tokens that the server continues; the whole document if the server only scores it.
        content: Message of the user, for chat.
        seed: Seed of the draws.
        number: Number of the document, for errors.
        labels: Ascending positions of the tokens that a scored document has rows for; None for all but the first.
    """

    prompt_ids: list[int]
    content: str = ""
    seed: int = 0
    number: int = 0
    labels: Sequence[int] | None = None


class Position(NamedTuple):
    """The teacher's log-probabilities at one position: of the token in the text, and of the most probable tokens."""

    chosen: ServerToken
    top: list[ServerToken]


class Answer(NamedTuple):
    """A server's answer for one document, the same for every kind of server.

    Attributes:
        positions: One per generated token, or one per token after the first of a scored document.
        text: Generated text.
        token_ids: Ids of the generated tokens; None if the server does not give them.
        prompt_ids: Ids of the tokens that the server read; None if it does not give them.
        prompt_tokens: Number of tokens that the server read; None if it does not say.
        generated_tokens: Number of tokens that the server generated; None if it does not say.
        finish_reason: Reason for which the text ended, in the server's words; None if it does not say.
    """

    positions: list[Position]
    text: str
    token_ids: list[int] | None
    prompt_ids: list[int] | None
    prompt_tokens: int | None
    generated_tokens: int | None
    finish_reason: str | None = None


@dataclasses.dataclass(frozen=True)
class ServerApi:
    """A server, a model of it, and the options of every request.

    Attributes:
        client: Client of the server.
        model: The server's name for the model.
        kind: Kind of the server.
        api: Interface that generates documents: "completions", "chat" or "llama.cpp".
        top_logprobs: K, the number of entries to ask for per token.
        max_tokens: Longest continuation, in tokens.
        temperature: Sampling temperature.
    """

    client: ServerClient
    model: str
    kind: Kind
    api: str
    top_logprobs: int
    max_tokens: int
    temperature: float

    def generate(self, request: Request) -> Answer:
        """Lets the server continue a prompt.

        Raises:
            ServerRequestError, UnusableAnswerError, ServerUnavailableError: The same as in ``ServerClient.post``, which
                asks again for an answer that cannot be read or has a text without log-probabilities.
        """
        path, payload, read = {
            "completions": ("/completions", self._completions, _choice),
            "chat": ("/chat/completions", self._chat, _choice),
            "llama.cpp": ("../completion", self._llama_cpp, _llama_cpp_choice),
        }[self.api]
        return self.client.post(path, payload(request), functools.partial(_read, choice_of=read))

    def score(self, request: Request) -> Answer:
        """Asks for the log-probabilities of every token of a document after the first.

        Raises:
            ServerRequestError, UnusableAnswerError, ServerUnavailableError: The same as in ``ServerClient.post``, which
                asks again for an answer that cannot be read or lacks tokens; also for a server that cannot score text.
        """
        # Asks for one token, which is thrown away, because not every server accepts max_tokens=0.
        payload = {"model": self.model, "prompt": request.prompt_ids, "max_tokens": 1, "temperature": 0.0}
        length = len(request.prompt_ids)
        if self.kind == "vllm":
            payload["prompt_logprobs"] = self.top_logprobs
        else:
            payload |= {"echo": True, "logprobs": self.top_logprobs}

        def read(content: dict[str, Any]) -> Answer:
            answer = _read(content, _prompt_choice if self.kind == "vllm" else _choice)
            given = (
                f"{self.client.url} gave logprobs for {len(answer.positions)} of the {length} tokens of a given text"
            )
            # A server without echo gives those of the one generated token.
            if len(answer.positions) <= 1 < length:
                raise ServerRequestError(
                    f"{given}: it does not support echo with logprobs (llama.cpp does not); let it generate from "
                    "prompts instead, or capture the model itself with capture()"
                )
            if len(answer.positions) < length:
                raise UnusableAnswerError(given)
            return answer._replace(positions=answer.positions[1:length])

        return self.client.post("/completions", payload, read)

    def _completions(self, request: Request) -> dict[str, Any]:
        return {"prompt": request.prompt_ids, "logprobs": self.top_logprobs} | self._options(request)

    def _chat(self, request: Request) -> dict[str, Any]:
        messages = [{"role": "user", "content": request.content}]
        return {"messages": messages, "logprobs": True, "top_logprobs": self.top_logprobs} | self._options(request)

    def _llama_cpp(self, request: Request) -> dict[str, Any]:
        options = {"n_predict": self.max_tokens, "n_probs": self.top_logprobs, "return_tokens": True}
        return {"prompt": request.prompt_ids} | self._options(request) | options

    def _options(self, request: Request) -> dict[str, Any]:
        options = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": 1.0,
            "seed": request.seed,
        }
        # The defaults of these servers, or of the model's generation_config.json, would truncate the distribution.
        if self.kind != "openai":
            options |= {"top_k": 0, "min_p": 0.0}
        if self.kind == "vllm":
            options |= {"repetition_penalty": 1.0, "return_token_ids": True, "return_tokens_as_token_ids": True}
        return options


def _read(
    content: dict[str, Any], choice_of: Callable[[dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]]
) -> Answer:
    """Reads an answer, and judges whether it has the form of one.

    An answer without text and log-probabilities is one: the model said nothing, called a tool, or was cut off by a
    filter.

    Args:
        content: The JSON object of the server.
        choice_of: Function that returns its choice, in the form of a chat or a completion, and its usage.

    Raises:
        UnusableAnswerError: There is no choice, its text has no log-probabilities, or parts of them are missing.
    """
    expected = "the server's answer must hold a choice with logprobs"
    with reading(content, expected, UnusableAnswerError, advice="does this server give logprobs?"):
        choice, usage = choice_of(content)
        text = choice["message"].get("content") if "message" in choice else choice["text"]
        positions = _positions(choice.get("logprobs") or {"content": None})
        if text and not positions:
            raise ValueError("it has a text without logprobs")
        return Answer(
            positions=positions,
            text=text or "",
            token_ids=choice.get("token_ids"),
            prompt_ids=choice.get("prompt_token_ids", content.get("prompt_token_ids")),
            prompt_tokens=usage.get("prompt_tokens"),
            generated_tokens=usage.get("completion_tokens"),
            finish_reason=choice.get("finish_reason"),
        )


def _choice(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return content["choices"][0], content.get("usage") or {}


def _prompt_choice(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads ``prompt_logprobs`` of vLLM: one dict per token, keyed by id, with the token of the text first."""
    choice, usage = _choice(content)
    positions = [
        [(f"token_id:{token}", entry["logprob"]) for token, entry in position.items()] if position else []
        for position in choice["prompt_logprobs"]
    ]
    logprobs = {
        "tokens": [position[0][0] if position else "" for position in positions],
        "token_logprobs": [position[0][1] if position else None for position in positions],
        "top_logprobs": [dict(position) for position in positions],
    }
    return choice | {"logprobs": logprobs}, usage


def _llama_cpp_choice(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads llama.cpp's own ``/completion``, which gives the ids of all tokens; its OpenAI interface does not."""
    choice = {
        "text": content["content"],
        "token_ids": content["tokens"],
        "logprobs": {"content": content.get("completion_probabilities", [])},
        "finish_reason": {"limit": "length", "eos": "stop", "word": "stop"}.get(str(content.get("stop_type"))),
    }
    return choice, {"prompt_tokens": content["tokens_evaluated"], "completion_tokens": content["tokens_predicted"]}


def _positions(logprobs: dict[str, Any]) -> list[Position]:
    """Reads log-probabilities in the form of a chat ("content") or of a completion ("token_logprobs" and others)."""
    if "content" in logprobs:
        entries = logprobs["content"] or ()
        return [Position(_entry(entry), [_entry(top) for top in entry["top_logprobs"]]) for entry in entries]
    tokens, chosen, tops = logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]
    return [
        Position(ServerToken.named(text, logprob), [ServerToken.named(*entry) for entry in (top or {}).items()])
        for text, logprob, top in zip(tokens, chosen, tops, strict=True)
    ]


def _entry(entry: dict[str, Any]) -> ServerToken:
    return ServerToken.named(entry["token"], entry["logprob"], entry.get("bytes"), entry.get("id"))
