"""Asks llama.cpp's own ``/completion``, which gives the ids of all tokens; its OpenAI interface does not."""

from __future__ import annotations

import functools
from typing import Any

from slimkernels.served_rows.answers import Answer, Call, Options, Request, read_answer
from slimkernels.served_rows.openai import answer_of, sampling

_FINISH_REASONS = {"limit": "length", "eos": "stop", "word": "stop"}


def completion(options: Options, request: Request) -> Call:
    """Returns the call that lets llama.cpp continue a prompt."""
    own = {"n_predict": options.max_tokens, "n_probs": options.top_logprobs, "return_tokens": True}
    payload = {"prompt": request.prompt_ids} | sampling(options, request) | own
    return Call("../completion", payload, functools.partial(read_answer, read=_answer))


def _answer(content: dict[str, Any]) -> Answer:
    choice = {
        "text": content["content"],
        "token_ids": content["tokens"],
        "logprobs": {"content": content.get("completion_probabilities", [])},
        "finish_reason": _FINISH_REASONS.get(str(content.get("stop_type"))),
    }
    usage = {"prompt_tokens": content["tokens_evaluated"], "completion_tokens": content["tokens_predicted"]}
    return answer_of(choice, usage)
