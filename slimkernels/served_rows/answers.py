"""The form into which the answers of every kind of server are read, and the options of what they are asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from slimkernels.served_rows.tokens import NumberedTokens, ServerToken
from slimkernels.serving.base_client import reading
from slimkernels.serving.errors import UnusableAnswerError
from slimkernels.serving.kinds import Kind


class Request(NamedTuple):
    """The request for one document.

    Attributes:
        prompt_ids: Tokens that the server continues; the whole document if the server only scores it.
        content: Message of the user, for chat.
        seed: Seed of the draws.
        number: Number of the document, for errors.
        labels: Ascending positions of the tokens that a scored document has rows for; None for all but the first.
        token_ids: Ids whose log-probabilities are wanted at every position of a scored document, whether or not they
            are among the most probable. Only SGLang gives them.
        spelled: Whether the text of the tokens of a scored document is wanted, which takes the server time.
    """

    prompt_ids: list[int]
    content: str = ""
    seed: int = 0
    number: int = 0
    labels: Sequence[int] | None = None
    token_ids: Sequence[int] = ()
    spelled: bool = False


class Position(NamedTuple):
    """The teacher's log-probabilities at one position.

    Attributes:
        chosen: The token in the text.
        top: The most probable tokens; arrays if the server names them by id. It may hold ``chosen`` as one more than
            was asked for.
        given: The tokens of ``Request.token_ids``; None unless they were asked for.
    """

    chosen: ServerToken
    top: Sequence[ServerToken] | NumberedTokens
    given: NumberedTokens | None = None


class Answer(NamedTuple):
    """A server's answer for one document, the same for every kind of server.

    Attributes:
        positions: One per generated token, or one per token of a scored document from the token at ``start`` on.
        text: Generated text.
        token_ids: Ids of the generated tokens; None if the server does not give them.
        prompt_ids: Ids of the tokens that the server read; None if it does not give them.
        prompt_tokens: Number of tokens that the server read; None if it does not say.
        generated_tokens: Number of tokens that the server generated; None if it does not say.
        finish_reason: Reason for which the text ended, in the server's words; None if it does not say.
        start: Place in a scored document of the token of the first position, at least 1 because the first token of a
            document has no log-probability.
    """

    positions: list[Position]
    text: str
    token_ids: list[int] | None
    prompt_ids: list[int] | None
    prompt_tokens: int | None
    generated_tokens: int | None
    finish_reason: str | None = None
    start: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of every request to one server.

    Attributes:
        model: The server's name for the model.
        kind: Kind of the server.
        top_logprobs: K, the number of entries to ask for per token.
        max_tokens: Longest continuation, in tokens.
        temperature: Sampling temperature.
        adapter: Name of the adapter, for servers that take it apart from the model; None for the model itself.
    """

    model: str
    kind: Kind
    top_logprobs: int
    max_tokens: int
    temperature: float
    adapter: str | None = None


class Call(NamedTuple):
    """One request in the form of a kind of server, and the function that reads the answer.

    Attributes:
        path: Path below the base URL; "../generate" replaces the last part of the base URL.
        payload: The JSON object to send.
        read: Function that reads the content of the answer, and raises ``UnusableAnswerError`` if it has another form.
    """

    path: str
    payload: dict[str, Any]
    read: Callable[[dict[str, Any]], Answer]


def read_answer(content: dict[str, Any], read: Callable[[dict[str, Any]], Answer]) -> Answer:
    """Reads an answer, and judges whether it has the form of one.

    An answer without text and log-probabilities is one: the model said nothing, called a tool, or was cut off by a
    filter.

    Args:
        content: The JSON object of the server.
        read: Function that reads it. Its errors mean that parts of the answer are missing or of another type.

    Raises:
        UnusableAnswerError: ``read`` failed.
    """
    expected = "the server's answer must hold a choice with logprobs"
    with reading(content, expected, UnusableAnswerError, advice="does this server give logprobs?"):
        return _checked(read(content))


def _checked(answer: Answer) -> Answer:
    """Returns an answer whose ids, counts and texts are of their types."""
    for ids in (answer.token_ids, answer.prompt_ids):
        if ids is not None and not (isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)):
            raise TypeError(f"token ids must be a list of integers of at least 0, got {str(ids)[:100]}")
    for count in (answer.prompt_tokens, answer.generated_tokens):
        if count is not None and type(count) is not int:
            raise TypeError(f"a number of tokens must be an integer, got {count!r}")
    if not isinstance(answer.text, str) or not isinstance(answer.finish_reason, str | None):
        raise TypeError(f"a text and a finish reason must be strings, got {answer.text!r}, {answer.finish_reason!r}")
    return answer
