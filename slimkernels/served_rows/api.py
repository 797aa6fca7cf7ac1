"""What is asked of each kind of server, and how its answers are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from slimkernels.served_rows.tokens import ServerToken
from slimkernels.serving.client import ServerClient, ServerRequestError

# What ``GET /models`` says of a server that has more to give than OpenAI's interface.
_KINDS = ("vllm", "llamacpp")


class Request(NamedTuple):
    """What is asked for one document.

    Attributes:
        prompt_ids: The tokens before the first one that is generated; the whole document where it is only scored.
        content: The user's message, for chat.
        seed: Of the draws.
        number: The document's, for errors.
    """

    prompt_ids: list[int]
    content: str = ""
    seed: int = 0
    number: int = 0


class Position(NamedTuple):
    """What the teacher says of one token: the token that is there, and the most probable ones."""

    chosen: ServerToken
    top: list[ServerToken]


class Answer(NamedTuple):
    """What a server answers for one document.

    Attributes:
        positions: One per generated token; one per token after the first where a document is scored.
        text: What it generated, as text.
        token_ids: The ids of what it generated, where the server gives them.
        prompt_ids: The ids it read, where it gives them.
        prompt_tokens: The number of tokens it read.
        generated_tokens: The number of tokens it generated.
    """

    positions: list[Position]
    text: str
    token_ids: list[int] | None
    prompt_ids: list[int] | None
    prompt_tokens: int | None
    generated_tokens: int | None


@dataclasses.dataclass(frozen=True)
class ServerApi:
    """One way to ask one server.

    Attributes:
        client: The server.
        model: Its name for the model.
        kind: "vllm", "llamacpp", or "openai" for any other.
        api: "completions", "chat" or "llama.cpp", by which documents are generated.
        top_logprobs: K, entries asked for per token.
        max_tokens: Longest continuation.
        temperature: Of the draws.
    """

    client: ServerClient
    model: str
    kind: str
    api: str
    top_logprobs: int
    max_tokens: int
    temperature: float

    def generate(self, request: Request) -> Answer:
        """Lets the server continue a prompt.

        Raises:
            ServerRequestError, ServerUnavailableError: As ``ServerClient.post``; also for an answer without logprobs.
        """
        path, payload, read = {
            "completions": ("/completions", self._completions, _choice),
            "chat": ("/chat/completions", self._chat, _choice),
            "llama.cpp": ("../completion", self._llama_cpp, _llama_cpp_choice),
        }[self.api]
        return _read(self.client.post(path, payload(request)), read)

    def score(self, request: Request) -> Answer:
        """Asks what the server thinks of every token of a document after the first.

        Raises:
            ServerRequestError: As ``ServerClient.post``; also for a server that cannot do this.
        """
        # One token is generated, and thrown away: not every server takes 0.
        payload = {"model": self.model, "prompt": request.prompt_ids, "max_tokens": 1, "temperature": 0.0}
        length = len(request.prompt_ids)
        if self.kind == "vllm":
            payload["prompt_logprobs"] = self.top_logprobs
        else:
            payload |= {"echo": True, "logprobs": self.top_logprobs}
        answer = _read(self.client.post("/completions", payload), _prompt_choice if self.kind == "vllm" else _choice)
        if len(answer.positions) < length:
            raise ServerRequestError(
                f"{self.client.url} gave logprobs for {len(answer.positions)} of the {length} tokens of a given text: "
                "it does not support echo with logprobs (llama.cpp does not); let it generate from prompts instead, or "
                "capture the model itself with capture()"
            )
        return answer._replace(positions=answer.positions[1:length])

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
        # The defaults of these servers, or of the model's generation_config.json, cut off the tail.
        if self.kind != "openai":
            options |= {"top_k": 0, "min_p": 0.0}
        if self.kind == "vllm":
            options |= {"repetition_penalty": 1.0, "return_token_ids": True, "return_tokens_as_token_ids": True}
        return options


def server_kind(client: ServerClient) -> str:
    """The server's kind by its list of models: "vllm", "llamacpp", or "openai" for any other.

    Raises:
        ServerUnavailableError, ServerRequestError: It cannot be reached, or wants a key.
    """
    models = client.get("/models") or {}
    owners = {model.get("owned_by") for model in models.get("data") or () if isinstance(model, dict)}
    return next((kind for kind in _KINDS if kind in owners), "openai")


def _read(
    content: dict[str, Any], choice_of: Callable[[dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]]
) -> Answer:
    """Reads an answer; ``choice_of`` gives its choice, in the form of a chat's or a completion's, and its usage."""
    try:
        choice, usage = choice_of(content)
        text = choice["message"].get("content") if "message" in choice else choice["text"]
        return Answer(
            positions=_positions(choice["logprobs"]),
            text=text or "",
            token_ids=choice.get("token_ids"),
            prompt_ids=choice.get("prompt_token_ids", content.get("prompt_token_ids")),
            prompt_tokens=usage.get("prompt_tokens"),
            generated_tokens=usage.get("completion_tokens"),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ServerRequestError(
            f"the server's answer must hold a choice with logprobs, but cannot be read ({type(error).__name__}: "
            f"{error}); it begins {str(content)[:200]!r}: does this server give logprobs?"
        ) from error


def _choice(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return content["choices"][0], content.get("usage") or {}


def _prompt_choice(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads ``prompt_logprobs`` of vLLM: one dict per token with ids as keys, the token that is there first."""
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
    """llama.cpp's own ``/completion``: what its OpenAI interface leaves out are the ids of all tokens."""
    choice = {
        "text": content["content"],
        "token_ids": content["tokens"],
        "logprobs": {"content": content.get("completion_probabilities", [])},
    }
    return choice, {"prompt_tokens": content["tokens_evaluated"], "completion_tokens": content["tokens_predicted"]}


def _positions(logprobs: dict[str, Any]) -> list[Position]:
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
