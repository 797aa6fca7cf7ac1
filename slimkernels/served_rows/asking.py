"""Asks a server for a document; shared by captures and by trainings with a served teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from slimkernels.served_rows.answers import Answer, Request
from slimkernels.served_rows.api import ServerApi
from slimkernels.serving.errors import ServerRequestError, UnusableAnswerError


def ask_by_name(ask: Callable[[Request], Answer], request: Request) -> Answer:
    """Asks for a document, and names it in the error, because it may be too long for the server.

    Args:
        ask: Function that asks the server, such as ``ServerApi.score``.
        request: The document.

    Raises:
        ServerRequestError, UnusableAnswerError, ServerUnavailableError: The same as in ``ask``.
    """
    try:
        return ask(request)
    except ServerRequestError as error:
        named = f"document {request.number}, {len(request.prompt_ids)} tokens of prompt: {error}"
        kind = UnusableAnswerError if isinstance(error, UnusableAnswerError) else ServerRequestError
        raise kind(named) from error


def selection_of(server: ServerApi) -> dict[str, Any]:
    """Returns the description of a server's rows, for a store."""
    return {"kind": "top_logprobs", "value": server.top_logprobs, "top_k": server.top_logprobs}


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the number of ids that a tokenizer can give; heads often have more rows, which pad them."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1
