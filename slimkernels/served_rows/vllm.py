"""Asks vLLM to score text, and reads its answers.

The forms are those of release 0.32: ``prompt_logprobs``, one object per token, keyed by id, with the token of the text
first, as ``/completions`` (``CompletionResponseChoice``) and ``/inference/v1/generate`` (``GenerateResponse``) give
them. Only the latter takes ``detokenize=False``; otherwise vLLM spells every candidate of every position.
"""

from __future__ import annotations

import functools
from operator import itemgetter
from typing import Any

import numpy as np

from slimkernels.served_rows import arrays
from slimkernels.served_rows.answers import Answer, Call, Options, Position, Request, read_answer
from slimkernels.served_rows.openai import one_token_more, scored
from slimkernels.served_rows.tokens import NumberedTokens, ServerToken

_NOT_KNOWN = Position(ServerToken("", float("nan")), NumberedTokens(np.zeros(0, np.int64), np.zeros(0)))


def scores(options: Options, request: Request, url: str) -> Call:
    """Returns the call that scores a document through ``/completions``.

    Args:
        options: Options of the request.
        request: The document.
        url: Address of the server, for errors.
    """
    payload = one_token_more(options, request) | {"prompt_logprobs": options.top_logprobs}

    def read(content: dict[str, Any]) -> Answer:
        choice, usage = content["choices"][0], content.get("usage") or {}
        return scored(_answer(choice, choice["prompt_logprobs"], usage), len(request.prompt_ids), url)

    return Call("/completions", payload, functools.partial(read_answer, read=read))


def scores_without_text(options: Options, request: Request, url: str) -> Call:
    """Returns the call that scores a document through ``/inference/v1/generate``, which not every server has.

    Args:
        options: Options of the request.
        request: The document.
        url: Address of the server, for errors.
    """
    sampling = {
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": options.top_logprobs,
        "detokenize": False,
    }
    payload = {"model": options.model, "token_ids": request.prompt_ids, "sampling_params": sampling}

    def read(content: dict[str, Any]) -> Answer:
        answer = _answer(content["choices"][0], content["prompt_logprobs"], content.get("usage") or {})
        return scored(answer, len(request.prompt_ids), url)

    return Call("../inference/v1/generate", payload, functools.partial(read_answer, read=read))


def _answer(choice: dict[str, Any], prompt_logprobs: list[Any], usage: dict[str, Any]) -> Answer:
    return Answer(
        positions=list(map(_position, prompt_logprobs)),
        text=choice.get("text") or "",
        token_ids=None,
        prompt_ids=choice.get("prompt_token_ids"),
        prompt_tokens=usage.get("prompt_tokens"),
        generated_tokens=usage.get("completion_tokens"),
        finish_reason=choice.get("finish_reason"),
    )


def _position(entries: dict[str, Any] | None) -> Position:
    """Reads the tokens of one position, of which the first is the token of the text."""
    if not entries:
        return _NOT_KNOWN
    ids = arrays.named_ids(entries.keys(), prefix="")
    if ids is None:
        ids = arrays.named_ids(entries.keys())
    if ids is None:
        raise ValueError(f"tokens must be named by their ids, got {next(iter(entries))!r}")
    top = NumberedTokens(ids, arrays.floats(map(itemgetter("logprob"), entries.values())))
    token = int(ids[0])
    text = next(iter(entries.values())).get("decoded_token")
    return Position(ServerToken.numbered(token, float(top.logprobs[0]), text), top)
