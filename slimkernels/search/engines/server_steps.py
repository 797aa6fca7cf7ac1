"""Asks each kind of server for one step of a search, and reads its answer into one form."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

from slimkernels.search.engine import StepEnd, StepRequest
from slimkernels.serving.client_async import AsyncServerClient
from slimkernels.serving.errors import UnusableAnswerError
from slimkernels.serving.kinds import Kind, listed_models, model_facts, server_kind

# The id of a token that the server counts but does not name.
UNKNOWN_TOKEN = -1
_EMBEDDINGS = (
    "repetition was judged by character trigrams unless the check has an encoder: servers give no hidden states"
)
_LAST_LOGPROB = "llama.cpp gives no log-probability of the token that ends a step: pruning used those of the others"


class StepPart(NamedTuple):
    """A part of a step that a server generated.

    Attributes:
        text: Generated text, including the text that ended it.
        token_ids: Ids of the tokens; ``UNKNOWN_TOKEN`` for those that the server does not name.
        logprobs: Natural-log probabilities of the tokens for which the server gives one; may be empty.
        end: Reason of the end: "step", "end_of_text", "length", or "stop" (a text that may end a step).
        pieces: Text of every token; None if it is not known.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    end: str
    pieces: list[str] | None = None

    def followed_by(self, more: StepPart) -> StepPart:
        """Returns the concatenation of this answer and the next one."""
        pieces = (
            None if more.pieces is None or (self.pieces is None and self.text) else (self.pieces or []) + more.pieces
        )
        return StepPart(
            self.text + more.text, self.token_ids + more.token_ids, self.logprobs + more.logprobs, more.end, pieces
        )

    def cut(self, step_end: StepEnd) -> StepPart:
        """Cuts the answer after the first token that completes the step; without one it stays whole.

        If at most the number of the tokens is known, the cut is after the first character that completes the step,
        and keeps a proportional share of the tokens. If ids are known but not their texts, the answer stays whole.
        """
        if self.pieces is None and set(self.token_ids) <= {UNKNOWN_TOKEN}:
            for length in range(1, len(self.text) + 1):
                if step_end(self.text[:length]):
                    count = max(1, len(self.token_ids) * length // len(self.text))
                    return StepPart(self.text[:length], self.token_ids[:count], self.logprobs[:count], "step")
            return self
        text = ""
        for count, piece in enumerate(self.pieces or [], 1):
            text += piece
            if step_end(text):
                return StepPart(
                    text, self.token_ids[:count], self.logprobs[:count], "step", (self.pieces or [])[:count]
                )
        if self.end != "end_of_text" and step_end(self.text):
            return self._replace(end="step")
        return self


@dataclasses.dataclass(frozen=True)
class ServerDialect:
    """The requests and answers of one kind of server.

    Attributes:
        client: Client of the server.
        model: The server's name for the model.
        kind: Kind of the server.
        context_length: Context length that the server reports, in tokens, or None.
        last_tokens: Cached texts of the tokens in which llama.cpp stopped, by id.
    """

    client: AsyncServerClient
    model: str
    kind: Kind
    context_length: int | None
    last_tokens: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def takes_token_ids(self) -> bool:
        """Whether the server continues a branch from token ids instead of text."""
        return self.kind != "openai"

    @property
    def notes(self) -> tuple[str, ...]:
        """Limitations that the result of a search should mention."""
        return (_EMBEDDINGS, _LAST_LOGPROB) if self.kind == "llamacpp" else (_EMBEDDINGS,)

    async def tokenize(self, text: str) -> list[int]:
        """Returns the server's token ids of a prompt."""
        if self.kind == "vllm":
            payload: dict[str, Any] = {"model": self.model, "prompt": text}
        else:
            payload = {"content": text, "add_special": True, "parse_special": True}
        return await self.client.post("../tokenize", payload, _tokens)

    async def complete(
        self, prompt: str | list[int], request: StepRequest, num_before: int, *, require_logprobs: bool = False
    ) -> StepPart:
        """Asks for the continuation of a branch.

        Args:
            prompt: Token ids or text of the branch, including earlier parts of the step.
            request: The step to draw.
            num_before: Number of tokens of the same step that earlier requests drew.
            require_logprobs: Whether to ask again for an answer with a text but no log-probabilities.

        Raises:
            UnusableAnswerError: The server answered every attempt with something that cannot be read.
        """
        read = functools.partial(_whole, require_logprobs=require_logprobs)
        # Seeds of servers have 31 bits. A second request for the same step must not repeat the draws of the first.
        options: dict[str, Any] = {
            "prompt": prompt,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": (request.seed + num_before) % 2**31,
        }
        if self.kind == "openai":
            options |= {"model": self.model, "max_tokens": request.max_tokens, "logprobs": 1}
            return await self.client.post("/completions", options, lambda content: read(_openai(content)))
        options |= {"top_k": request.top_k, "min_p": 0.0, "stop": list(request.stop)}
        if self.kind == "vllm":
            options |= {"model": self.model, "max_tokens": request.max_tokens, "logprobs": 0, "return_token_ids": True}
            options |= {"include_stop_str_in_output": True, "repetition_penalty": 1.0}
            return await self.client.post("/completions", options, lambda content: read(_vllm(content)))
        options |= {"n_predict": request.max_tokens, "n_probs": 1, "return_tokens": True, "repeat_penalty": 1.0}

        def readable(content: dict[str, Any]) -> dict[str, Any]:
            read(_llama_cpp(content, last_token=""))
            return content

        content = await self.client.post("../completion", options, readable)
        stopped = content["stop_type"] == "word" and content["tokens"]
        return _llama_cpp(content, await self._text_of(content["tokens"][-1]) if stopped else "")

    async def _text_of(self, token: int) -> str:
        """Returns the text of one token of llama.cpp."""
        if token not in self.last_tokens:
            self.last_tokens[token] = await self.client.post("../detokenize", {"tokens": [token]}, _text)
        return self.last_tokens[token]


async def dialect_of(client: AsyncServerClient, model: str) -> ServerDialect:
    """Asks a server for its models, which tell its kind and the context length."""
    listing = await client.get("/models")
    entries = listed_models(listing)
    own = next((entry for entry in entries if entry["id"] == model), entries[0] if len(entries) == 1 else {})
    facts = model_facts(own)
    length = facts.get("max_model_len") or facts.get("n_ctx")
    kind = server_kind(listing)
    # Steps are drawn from SGLang through OpenAI's interface.
    return ServerDialect(client, model, "openai" if kind == "sglang" else kind, length)


def _tokens(content: dict[str, Any]) -> list[int]:
    """Reads the answer to ``/tokenize``."""
    tokens = content["tokens"]
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise TypeError("its tokens must be a list of ids")
    return tokens


def _text(content: dict[str, Any]) -> str:
    """Reads the answer to ``/detokenize``."""
    if not isinstance(content["content"], str):
        raise TypeError("its content must be a text")
    return content["content"]


def _whole(answer: StepPart, *, require_logprobs: bool) -> StepPart:
    """Returns an answer that has all that a search needs of it.

    Raises:
        TypeError: Its text or its token ids are of another type.
        UnusableAnswerError: It has no log-probabilities although they are required.
    """
    if not isinstance(answer.text, str) or not all(isinstance(token, int) for token in answer.token_ids):
        raise TypeError("a completion must have a text and token ids")
    if require_logprobs and answer.text and not answer.logprobs:
        raise UnusableAnswerError(
            "the server must give log-probabilities (logprobs) for pruning, but gave none: enable them in the server, "
            "or prune at random with require_logprobs=False"
        )
    return answer


def _vllm(content: dict[str, Any]) -> StepPart:
    choice = content["choices"][0]
    logprobs = choice.get("logprobs") or {}
    token_ids = choice["token_ids"]
    pieces: list[str] = list(logprobs.get("tokens") or ())
    stopped = choice["finish_reason"] == "stop"
    at_text = isinstance(choice.get("stop_reason"), str)
    text = choice["text"]
    values = _numbers(logprobs.get("token_logprobs"))
    if at_text or not stopped:
        pieces, token_ids, values = _up_to(text, pieces, token_ids, values)
    if at_text and pieces:
        text = _with_rest_of_token(text, pieces[-1])
    if stopped and not at_text and "".join(pieces) != text:
        # The last token is the end of text, which the text does not show.
        pieces[-1:] = [""]
    end = ("stop" if at_text else "end_of_text") if stopped else "length"
    return StepPart(text, token_ids, _counted(values, token_ids), end, _if_whole(pieces, text, token_ids))


def _llama_cpp(content: dict[str, Any], last_token: str) -> StepPart:
    """Reads an answer of llama.cpp, which lacks the text that stopped it and the log-probability of that token.

    Args:
        content: The JSON object of the server.
        last_token: Text of the last token, needed where the server stopped at a text.
    """
    token_ids, entries = content["tokens"], content.get("completion_probabilities") or ()
    pieces = [entry["token"] for entry in entries]
    end = {"word": "stop", "eos": "end_of_text"}.get(content["stop_type"], "length")
    text = content["content"]
    logprobs = _numbers(entry["logprob"] for entry in entries)
    if end == "stop":
        pieces, token_ids, logprobs = _up_to(text + content["stopping_word"], pieces, token_ids, logprobs)
        text = _with_rest_of_token(text + content["stopping_word"], last_token)
        if len(pieces) == len(token_ids) - 1:
            pieces.append(last_token)
    elif end == "end_of_text" and len(pieces) == len(token_ids):
        pieces[-1:] = [""]
    return StepPart(text, token_ids, _counted(logprobs, token_ids), end, _if_whole(pieces, text, token_ids))


def _openai(content: dict[str, Any]) -> StepPart:
    choice = content["choices"][0]
    logprobs = choice.get("logprobs") or {}
    # llama.cpp gives log-probabilities in the form of chats here.
    if "content" in logprobs:
        entries = logprobs["content"] or ()
        logprobs = {name + "s": [entry[name] for entry in entries] for name in ("token", "logprob")}
        logprobs["token_logprobs"] = logprobs["logprobs"]
    pieces: list[str] = list(logprobs.get("tokens") or ())
    count = len(pieces) or int((content.get("usage") or {}).get("completion_tokens") or 0)
    # The request had no stop texts, so only the end of text can have stopped it.
    end = "end_of_text" if choice["finish_reason"] == "stop" else "length"
    text = choice["text"] or ""
    if pieces and "".join(pieces[:-1]) == text:
        pieces[-1] = ""
    token_ids = [UNKNOWN_TOKEN] * count
    values = _counted(_numbers(logprobs.get("token_logprobs")), token_ids)
    return StepPart(text, token_ids, values, end, _if_whole(pieces, text, token_ids))


def _with_rest_of_token(text: str, last: str) -> str:
    """Completes a text that the server cut inside its last token."""
    kept = next((count for count in range(len(last), 0, -1) if text.endswith(last[:count])), len(last))
    return text + last[kept:]


def _if_whole(pieces: list[str], text: str, token_ids: list[int]) -> list[str] | None:
    """Returns the pieces if they are the texts of the tokens, else None, as for a character split over tokens."""
    return pieces if len(pieces) == len(token_ids) and "".join(pieces) == text else None


def _up_to(
    text: str, pieces: list[str], token_ids: list[int], logprobs: list[float]
) -> tuple[list[str], list[int], list[float]]:
    """Cuts tokens after the one in which a text ends: a server that draws several at a time may name more of them."""
    if not text or len(pieces) > len(token_ids) or not "".join(pieces).startswith(text):
        return pieces, token_ids, logprobs
    length, count = 0, 0
    while length < len(text):
        length += len(pieces[count])
        count += 1
    return pieces[:count], token_ids[:count], logprobs[:count]


def _counted(logprobs: list[float], token_ids: list[int]) -> list[float]:
    """Returns the log-probabilities.

    Raises:
        ValueError: There are more of them than tokens, so that nothing tells whose they are.
    """
    if len(logprobs) > len(token_ids):
        raise ValueError(f"it has {len(logprobs)} log-probabilities of {len(token_ids)} tokens")
    return logprobs


def _numbers(values: Any) -> list[float]:
    return [float(value) for value in values or () if value is not None]
