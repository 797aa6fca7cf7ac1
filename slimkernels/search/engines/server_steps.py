"""What is asked of each kind of server for one step, and how its answer is read."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from slimkernels.search.engine import StepEnd, StepRequest
from slimkernels.serving.client import ServerRequestError
from slimkernels.serving.client_async import AsyncServerClient

# The id of a token of which a server says nothing but that it is there.
UNKNOWN_TOKEN = -1
Kind = Literal["vllm", "llamacpp", "openai"]
_EMBEDDINGS = (
    "repetition was judged by character trigrams where the check has no encoder: servers give no hidden states"
)
_LAST_LOGPROB = "llama.cpp gives no log-probability of the token that ends a step: pruning was by the others'"


class Answer(NamedTuple):
    """What a server generated.

    Attributes:
        text: With the text that ended it.
        token_ids: ``UNKNOWN_TOKEN`` where the server does not say.
        logprobs: Of the tokens that the server gives one for; none at all where it gives none.
        end: "step", "end_of_text", "length", or "stop": at a text that may end a step.
        pieces: The text of every token, where that is known.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    end: str
    pieces: list[str] | None = None

    def followed_by(self, more: Answer) -> Answer:
        """Both, one after the other."""
        pieces = (
            None if more.pieces is None or (self.pieces is None and self.text) else (self.pieces or []) + more.pieces
        )
        return Answer(
            self.text + more.text, self.token_ids + more.token_ids, self.logprobs + more.logprobs, more.end, pieces
        )

    def cut(self, step_end: StepEnd) -> Answer:
        """Up to the first token after which the step is complete; all of it where none is.

        Where nothing is known of the tokens but their number, or not even that, up to the first character, with a share
        of the tokens.
        Where ids are known but not their texts, all of it.
        """
        if self.pieces is None and set(self.token_ids) <= {UNKNOWN_TOKEN}:
            for length in range(1, len(self.text) + 1):
                if step_end(self.text[:length]):
                    count = max(1, len(self.token_ids) * length // len(self.text))
                    return Answer(self.text[:length], self.token_ids[:count], self.logprobs[:count], "step")
            return self
        text = ""
        for count, piece in enumerate(self.pieces or [], 1):
            text += piece
            if step_end(text):
                return Answer(text, self.token_ids[:count], self.logprobs[:count], "step", (self.pieces or [])[:count])
        if self.end != "end_of_text" and step_end(self.text):
            return self._replace(end="step")
        return self


@dataclasses.dataclass(frozen=True)
class ServerDialect:
    """How one server is asked.

    Attributes:
        client: The server.
        model: Its name of the model.
        kind: "vllm", "llamacpp", or "openai" for any other.
        context_length: As the server says it, or None.
        last_tokens: Texts of tokens in which llama.cpp stopped, by id.
    """

    client: AsyncServerClient
    model: str
    kind: Kind
    context_length: int | None

    last_tokens: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def takes_token_ids(self) -> bool:
        """Whether a branch is continued from token ids."""
        return self.kind != "openai"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a search's result should say."""
        return (_EMBEDDINGS, _LAST_LOGPROB) if self.kind == "llamacpp" else (_EMBEDDINGS,)

    async def tokenize(self, text: str) -> list[int]:
        """The server's token ids of a prompt."""
        if self.kind == "vllm":
            payload: dict[str, Any] = {"model": self.model, "prompt": text}
        else:
            payload = {"content": text, "add_special": True, "parse_special": True}
        content = await self.client.post("../tokenize", payload)
        tokens = content.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise ServerRequestError(f"the server's /tokenize must answer with tokens, got {str(content)[:200]!r}")
        return tokens

    async def complete(self, prompt: str | list[int], request: StepRequest, num_before: int) -> Answer:
        """The continuation of a branch, of which ``num_before`` tokens of the same step were asked for before."""
        # Servers take 31 bits; what goes on after a text that did not end the step draws anew.
        options: dict[str, Any] = {
            "prompt": prompt,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": (request.seed + num_before) % 2**31,
        }
        if self.kind == "openai":
            options |= {"model": self.model, "max_tokens": request.max_tokens, "logprobs": 1}
            return self._read(await self.client.post("/completions", options), _openai)
        options |= {"top_k": request.top_k, "min_p": 0.0, "stop": list(request.stop)}
        if self.kind == "vllm":
            options |= {"model": self.model, "max_tokens": request.max_tokens, "logprobs": 0, "return_token_ids": True}
            options |= {"include_stop_str_in_output": True, "repetition_penalty": 1.0}
            return self._read(await self.client.post("/completions", options), _vllm)
        options |= {"n_predict": request.max_tokens, "n_probs": 1, "return_tokens": True, "repeat_penalty": 1.0}
        content = await self.client.post("../completion", options)
        if content.get("stop_type") == "word" and content.get("tokens"):
            content["last_token"] = await self._text_of(content["tokens"][-1])
        return self._read(content, _llama_cpp)

    async def _text_of(self, token: int) -> str:
        """The text of one token of llama.cpp."""
        if token not in self.last_tokens:
            content = await self.client.post("../detokenize", {"tokens": [token]})
            self.last_tokens[token] = str(content.get("content", ""))
        return self.last_tokens[token]

    def _read(self, content: dict[str, Any], read: Any) -> Answer:
        try:
            return read(content)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ServerRequestError(
                f"the answer of {self.client.url} must be a completion, but cannot be read ({type(error).__name__}: "
                f"{error}); it begins {str(content)[:200]!r}"
            ) from error


async def dialect_of(client: AsyncServerClient, model: str) -> ServerDialect:
    """Asks a server what it is."""
    models = (await client.get("/models") or {}).get("data") or ()
    entries = [entry for entry in models if isinstance(entry, dict)]
    owners = {entry.get("owned_by") for entry in entries}
    own = next((entry for entry in entries if entry.get("id") == model), entries[0] if len(entries) == 1 else {})
    length = own.get("max_model_len") or (own.get("meta") or {}).get("n_ctx")
    kind: Kind = "vllm" if "vllm" in owners else "llamacpp" if "llamacpp" in owners else "openai"
    return ServerDialect(client, model, kind, length)


def _vllm(content: dict[str, Any]) -> Answer:
    choice = content["choices"][0]
    logprobs = choice.get("logprobs") or {}
    token_ids = choice["token_ids"]
    pieces: list[str] = list(logprobs.get("tokens") or ())
    stopped = choice["finish_reason"] == "stop"
    at_text = isinstance(choice.get("stop_reason"), str)
    text = choice["text"]
    if at_text and pieces:
        text = _with_rest_of_token(text, pieces[-1])
    if stopped and not at_text and "".join(pieces) != text:
        pieces[-1:] = [""]  # the end of text, which is not text
    end = ("stop" if at_text else "end_of_text") if stopped else "length"
    return Answer(text, token_ids, _numbers(logprobs.get("token_logprobs")), end, _if_whole(pieces, text, token_ids))


def _llama_cpp(content: dict[str, Any]) -> Answer:
    """llama.cpp leaves out the text that stopped it, and the log-probability of its token."""
    token_ids, entries = content["tokens"], content.get("completion_probabilities") or ()
    pieces = [entry["token"] for entry in entries]
    end = {"word": "stop", "eos": "end_of_text"}.get(content["stop_type"], "length")
    text = content["content"]
    if end == "stop":
        text = _with_rest_of_token(text + content["stopping_word"], content["last_token"])
        if len(pieces) == len(token_ids) - 1:
            pieces.append(content["last_token"])
    elif end == "end_of_text" and len(pieces) == len(token_ids):
        pieces[-1:] = [""]
    logprobs = _numbers(entry["logprob"] for entry in entries)
    return Answer(text, token_ids, logprobs, end, _if_whole(pieces, text, token_ids))


def _openai(content: dict[str, Any]) -> Answer:
    choice = content["choices"][0]
    logprobs = choice.get("logprobs") or {}
    if "content" in logprobs:  # the form of chats, which llama.cpp gives
        entries = logprobs["content"] or ()
        logprobs = {name + "s": [entry[name] for entry in entries] for name in ("token", "logprob")}
        logprobs["token_logprobs"] = logprobs["logprobs"]
    pieces: list[str] = list(logprobs.get("tokens") or ())
    count = len(pieces) or int((content.get("usage") or {}).get("completion_tokens") or 0)
    # No texts to stop at were given: what stopped it is the end of text.
    end = "end_of_text" if choice["finish_reason"] == "stop" else "length"
    text = choice["text"] or ""
    if pieces and "".join(pieces[:-1]) == text:
        pieces[-1] = ""
    token_ids = [UNKNOWN_TOKEN] * count
    return Answer(text, token_ids, _numbers(logprobs.get("token_logprobs")), end, _if_whole(pieces, text, token_ids))


def _with_rest_of_token(text: str, last: str) -> str:
    """The text of all tokens, where a server cut it in the last one."""
    kept = next((count for count in range(len(last), 0, -1) if text.endswith(last[:count])), len(last))
    return text + last[kept:]


def _if_whole(pieces: list[str], text: str, token_ids: list[int]) -> list[str] | None:
    """The pieces, where they are those of the tokens: a character of several tokens is in none of theirs."""
    return pieces if len(pieces) == len(token_ids) and "".join(pieces) == text else None


def _numbers(values: Any) -> list[float]:
    return [float(value) for value in values or () if value is not None]
