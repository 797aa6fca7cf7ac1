"""A model behind an OpenAI-compatible server that rates outputs from 1 to 10.

Reference: Zheng et al. 2023, "Judging LLM-as-a-judge with MT-Bench and Chatbot Arena", arXiv 2306.05685: single
answers, graded against a reference, the rating in double brackets.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from slimkernels.evaluate.records import Record, content_key
from slimkernels.serving.client import ServerClient, ServerRequestError

# Outputs refused one after the other, without any rated: then it is not the outputs.
_MAX_REFUSED = 5
_MAX_TOKENS = 256
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_PROMPT = """\
Rate the response of an assistant to an instruction from 1 (useless) to 10 (as good as it can be) for helpfulness, \
relevance, accuracy and level of detail. A reference response is given. Say in one sentence why, and end with the \
rating in this form: [[5]]

[Instruction]
{instruction}

[Reference]
{reference}

[Response]
{response}
"""


class Answer(NamedTuple):
    """What is rated."""

    instruction: str
    reference: str
    response: str


class Rating(NamedTuple):
    """What the judge made of an answer.

    Attributes:
        value: From 1 to 10; None: there is none.
        said: All that the judge said.
        error: Why there is no rating; None where there is one.
    """

    value: float | None
    said: str
    error: str | None


class Judge:
    """Asks a server for ratings, several at a time, at temperature 0.

    Args:
        url: The base URL, as in ``http://localhost:8000/v1``.
        model: The server's name for the judge.
        **client: Of ``ServerClient``: ``key_env``, ``concurrency``, ...

    Raises:
        ImportError, ValueError: As ``ServerClient``.
    """

    def __init__(self, url: str, model: str, **client: Any) -> None:
        if not model:
            raise ValueError("model must be the server's name for the judge, got an empty one")
        self.model = model
        self._client = ServerClient(url, **client)
        self.url = self._client.url

    def check(self) -> None:
        """Asks the server what it serves, so that a wrong address is found out before anything else is done.

        Raises:
            ServerUnavailableError: It does not answer.
            ServerRequestError: It refuses, as without its key.
        """
        self._client.get("/models")

    def rate(self, answer: Answer) -> Rating:
        """Rates one answer; a request that the server refuses is a rating with an error.

        Raises:
            ServerUnavailableError: The server does not answer, however often it is asked.
        """
        messages = [{"role": "user", "content": _PROMPT.format(**answer._asdict())}]
        payload = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": _MAX_TOKENS}
        try:
            reply = self._client.post("/chat/completions", payload)
        except ServerRequestError as error:
            return Rating(None, "", str(error))
        try:
            said = reply["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            return Rating(None, "", "the server's reply has no choices[0].message.content")
        ratings = [float(rating) for rating in _RATING.findall(said)]
        if ratings and 1 <= ratings[-1] <= 10:
            return Rating(ratings[-1], said, None)
        return Rating(None, said, "the reply holds no rating from 1 to 10, as in [[5]]")

    def rate_all(self, answers: Iterable[Answer]) -> Iterator[Rating]:
        """The rating of each answer, in order.

        Raises:
            ServerUnavailableError: The server does not answer.
            ServerRequestError: It refuses the first five: it is not the answers.
        """
        refused, has_said = 0, False
        for _, rating in self._client.map(self.rate, answers):
            has_said = has_said or bool(rating.said)
            refused += rating.error is not None
            if refused == _MAX_REFUSED and not has_said:
                raise ServerRequestError(f"the judge refused the first {refused} outputs, at last: {rating.error}")
            yield rating

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has_rated(self, record: Record) -> bool:
        """Whether this judge said something about this very output; what a server refused is asked again."""
        entry = record.judged.get(self.model)
        return entry is not None and entry["key"] == _key(self.model, record) and bool(entry["said"])

    def judged(self, record: Record, rating: Rating) -> Record:
        """The record with a rating, for ``score`` to make a score of."""
        entry = {"key": _key(self.model, record), "url": self.url, **rating._asdict()}
        return dataclasses.replace(record, judged={**record.judged, self.model: entry})


def ratings_of(record: Record) -> dict[str, Rating]:
    """By judge: what each said of this very output."""
    return {
        judge: Rating(entry["value"], entry["said"], entry["error"])
        for judge, entry in record.judged.items()
        if entry["key"] == _key(judge, record)
    }


def answer_of(record: Record) -> Answer:
    """What a judge is shown of a record: choices are part of the question, their letters' texts of the reference."""
    reference = record.reference
    if record.choices and len(reference) == 1:
        reference = f"({reference}) {record.choices[ord(reference) - ord('A')]}"
    return Answer(record.question, reference, record.output)


def _key(judge: str, record: Record) -> str:
    return content_key(_PROMPT, judge, *answer_of(record))


def prompt_hash() -> str:
    """Changes with what a judge is asked."""
    return content_key(_PROMPT)
