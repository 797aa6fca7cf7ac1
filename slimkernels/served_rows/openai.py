"""Asks through OpenAI's interface, which vLLM, llama.cpp and SGLang have too, and reads the answers.

The forms are those of OpenAI's API reference of 2026: ``logprobs.content`` of a chat, and ``logprobs.tokens``,
``token_logprobs`` and ``top_logprobs`` of a completion. vLLM 0.32 names tokens as "token_id:123" if it is asked to, and
llama.cpp adds the ``id`` of every token to both forms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter, methodcaller
from typing import Any

from slimkernels.served_rows import arrays
from slimkernels.served_rows.answers import Answer, Call, Options, Position, Request, read_answer
from slimkernels.served_rows.tokens import NumberedTokens, ServerToken
from slimkernels.serving.errors import ServerRequestError, UnusableAnswerError

_id_of: Callable[[Any], Any] = methodcaller("get", "id")
_bytes_of: Callable[[Any], Any] = methodcaller("get", "bytes")


def completion(options: Options, request: Request) -> Call:
    """Returns the call that lets a server continue a prompt through ``/completions``."""
    payload = {"prompt": request.prompt_ids, "logprobs": options.top_logprobs} | sampling(options, request)
    return Call("/completions", payload, functools.partial(read_answer, read=choice_answer))


def chat(options: Options, request: Request) -> Call:
    """Returns the call that lets a server answer a message through ``/chat/completions``."""
    messages = [{"role": "user", "content": request.content}]
    payload = {"messages": messages, "logprobs": True, "top_logprobs": options.top_logprobs}
    return Call(
        "/chat/completions", payload | sampling(options, request), functools.partial(read_answer, read=choice_answer)
    )


def one_token_more(options: Options, request: Request) -> dict[str, Any]:
    """Returns the part of a payload that scores a document through ``/completions``.

    One token is generated and thrown away, because not every server accepts ``max_tokens=0``.
    """
    return {"model": options.model, "prompt": request.prompt_ids, "max_tokens": 1, "temperature": 0.0}


def echo(options: Options, request: Request, url: str) -> Call:
    """Returns the call that scores a document through ``/completions`` with ``echo``.

    Args:
        options: Options of the request.
        request: The document.
        url: Address of the server, for errors.
    """
    payload = one_token_more(options, request) | {"echo": True, "logprobs": options.top_logprobs}
    length = len(request.prompt_ids)

    def read(content: dict[str, Any]) -> Answer:
        answer = read_answer(content, choice_answer)
        # A server without echo gives those of the one generated token.
        if len(answer.positions) <= 1 < length:
            raise ServerRequestError(
                f"{_given(url, answer, length)}: it does not support echo with logprobs (llama.cpp does not); let it "
                "generate from prompts instead, or capture the model itself with capture()"
            )
        return scored(answer, length, url)

    return Call("/completions", payload, read)


def scored(answer: Answer, length: int, url: str) -> Answer:
    """Returns the answer for a scored document without the positions of its first token and of the generated ones.

    Raises:
        UnusableAnswerError: There are fewer positions than tokens.
    """
    if len(answer.positions) < length:
        raise UnusableAnswerError(_given(url, answer, length))
    return answer._replace(positions=answer.positions[1:length])


def sampling(options: Options, request: Request) -> dict[str, Any]:
    """Returns the options that make a server draw from the whole distribution."""
    chosen: dict[str, Any] = {
        "model": options.model,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": 1.0,
        "seed": request.seed,
    }
    # The defaults of these servers, or of the model's generation_config.json, would truncate the distribution.
    if options.kind != "openai":
        chosen |= {"top_k": -1 if options.kind == "sglang" else 0, "min_p": 0.0}
    if options.kind == "vllm":
        chosen |= {"repetition_penalty": 1.0, "return_token_ids": True, "return_tokens_as_token_ids": True}
    return chosen


def choice_answer(content: dict[str, Any]) -> Answer:
    """Reads the first choice of a chat or a completion.

    Raises:
        ValueError: Its text has no log-probabilities.
    """
    choice, usage = content["choices"][0], content.get("usage") or {}
    return answer_of(choice, usage, choice.get("prompt_token_ids", content.get("prompt_token_ids")))


def answer_of(choice: dict[str, Any], usage: dict[str, Any], prompt_ids: list[int] | None = None) -> Answer:
    """Reads a choice in the form of a chat or a completion.

    Args:
        choice: The choice.
        usage: Numbers of tokens, ``prompt_tokens`` and ``completion_tokens``.
        prompt_ids: Ids of the tokens that the server read.

    Raises:
        ValueError: Its text has no log-probabilities.
    """
    text = choice["message"].get("content") if "message" in choice else choice["text"]
    positions = _positions(choice.get("logprobs") or {"content": None})
    if text and not positions:
        raise ValueError("it has a text without logprobs")
    return Answer(
        positions=positions,
        text=text or "",
        token_ids=choice.get("token_ids"),
        prompt_ids=prompt_ids,
        prompt_tokens=usage.get("prompt_tokens"),
        generated_tokens=usage.get("completion_tokens"),
        finish_reason=choice.get("finish_reason"),
    )


def _positions(logprobs: dict[str, Any]) -> list[Position]:
    """Reads log-probabilities in the form of a chat ("content") or of a completion ("token_logprobs" and others)."""
    if "content" in logprobs:
        return [Position(_token(entry), _listed(entry["top_logprobs"])) for entry in logprobs["content"] or ()]
    tokens, chosen, tops = logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]
    return [
        Position(ServerToken.named(text, logprob), _keyed(top or {}))
        for text, logprob, top in zip(tokens, chosen, tops, strict=True)
    ]


def _keyed(top: dict[str, Any]) -> Sequence[ServerToken] | NumberedTokens:
    """Reads the most probable tokens of a completion: log-probabilities by the name of the token."""
    ids = arrays.named_ids(top.keys())
    if ids is None:
        return [ServerToken.named(*entry) for entry in top.items()]
    return NumberedTokens(ids, arrays.floats(top.values()))


def _listed(top: list[dict[str, Any]]) -> Sequence[ServerToken] | NumberedTokens:
    """Reads the most probable tokens of a chat: one object per token."""
    ids = list(map(_id_of, top))
    if set(map(type, ids)) == {int}:
        spellings = list(map(_bytes_of, top))
        if set(map(type, spellings)) == {list}:
            logprobs = arrays.floats(map(itemgetter("logprob"), top))
            return NumberedTokens(arrays.integers(ids), logprobs, list(map(bytes, spellings)))
    names = arrays.named_ids(list(map(itemgetter("token"), top)))
    if names is None:
        return list(map(_token, top))
    return NumberedTokens(names, arrays.floats(map(itemgetter("logprob"), top)))


def _token(entry: dict[str, Any]) -> ServerToken:
    return ServerToken.named(entry["token"], entry["logprob"], entry.get("bytes"), entry.get("id"))


def _given(url: str, answer: Answer, length: int) -> str:
    return f"{url} gave logprobs for {len(answer.positions)} of the {length} tokens of a given text"
