"""A model behind an OpenAI-compatible server that rates outputs from 1 to 10.

Each output is graded by itself against a reference answer, and the judge writes its rating in double brackets.

References: Zheng et al. 2023, "Judging LLM-as-a-judge with MT-Bench and Chatbot Arena", arXiv 2306.05685.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from slimkernels.evaluate.records import Record, content_key
from slimkernels.serving.client import ServerClient
from slimkernels.serving.errors import ServerRequestError

# If the server refuses this many outputs before it has rated any, the fault is not in the outputs.
_MAX_REFUSED = 5
_MAX_TOKENS = 256
_QUOTES = ('"', "'", "`", "\u201c", "\u2018", "\u00ab")
# "[[8]]", "[[8/10]]" or "[[Rating: 8]]".
_RATING = re.compile(r"\[\[\s*(?:rating\s*[:=]?\s*)?(\d+(?:\.\d+)?)\s*(?:/\s*10(?:\.0+)?)?\s*\]\]", re.IGNORECASE)
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


class RatedResponse(NamedTuple):
    """A response that a judge rates, with its instruction and a reference response."""

    instruction: str
    reference: str
    response: str


class Rating(NamedTuple):
    """A judge's rating of a response.

    Attributes:
        value: Rating from 1 to 10; None without a rating.
        said: Full reply of the judge.
        error: Reason why there is no rating; None with a rating.
    """

    value: float | None
    said: str
    error: str | None


class Judge:
    """A judge behind a server, asked for several ratings at a time at temperature 0.

    Args:
        url: Base URL of the server, such as ``http://localhost:8000/v1``.
        model: Name of the judge on the server.
        **client: Options of ``ServerClient``, such as ``key_env`` and ``concurrency``.

    Raises:
        ImportError, ValueError: ``ServerClient`` raises them.
    """

    def __init__(self, url: str, model: str, **client: Any) -> None:
        if not model:
            raise ValueError("model must be the name of the judge on the server, got an empty one")
        self.model = model
        self._client = ServerClient(url, **client)
        self.url = self._client.url

    def check(self) -> None:
        """Lists the server's models, to fail early on a wrong address or key.

        Raises:
            ServerUnavailableError: The server does not answer.
            ServerRequestError: The server refuses the request, for example without its key.
        """
        self._client.get("/models")

    def rate(self, response: RatedResponse) -> Rating:
        """Rates one response; if the server refuses the request, or no reply can be read, the rating holds the error.

        Raises:
            ServerUnavailableError: The server does not answer after all retries.
        """
        messages = [{"role": "user", "content": _PROMPT.format(**response._asdict())}]
        payload = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": _MAX_TOKENS}
        try:
            said = self._client.post("/chat/completions", payload, _said)
        except ServerRequestError as error:
            return Rating(None, "", str(error))
        value = read_rating(said)
        return Rating(
            value, said, None if value is not None else "the reply has no rating from 1 to 10 in the form [[5]]"
        )

    def rate_all(self, responses: Iterable[RatedResponse]) -> Iterator[Rating]:
        """Rates responses and yields the ratings in order.

        Raises:
            ServerUnavailableError: The server does not answer after all retries.
            ServerRequestError: The server refuses the first five responses, so the fault is not in the responses.
        """
        refused, has_said = 0, False
        for _, rating in self._client.map(self.rate, responses):
            has_said = has_said or bool(rating.said)
            refused += rating.error is not None
            if refused == _MAX_REFUSED and not has_said:
                raise ServerRequestError(
                    f"the judge refused the first {refused} outputs; the last error: {rating.error}"
                )
            yield rating

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has_rated(self, record: Record) -> bool:
        """Returns whether this judge replied to the record's present output; refused requests do not count."""
        entry = record.judged.get(self.model)
        return entry is not None and entry["key"] == _key(self.model, record) and bool(entry["said"])

    def judged(self, record: Record, rating: Rating) -> Record:
        """Returns the record with a rating, which ``score`` turns into a score."""
        entry = {"key": _key(self.model, record), "url": self.url, **rating._asdict()}
        return dataclasses.replace(record, judged={**record.judged, self.model: entry})


def _said(reply: dict[str, Any]) -> str:
    """Reads what a judge says; nothing for a reply without text, as after a content filter."""
    said = reply["choices"][0]["message"]["content"] or ""
    if not isinstance(said, str):
        raise TypeError("choices[0].message.content must be a text")
    return said


def read_rating(said: str) -> float | None:
    """Returns the last rating from 1 to 10 in a judge's reply; one in quotation marks counts only without any other."""
    found = [(float(match[1]), said[: match.start()][-1:] in _QUOTES) for match in _RATING.finditer(said)]
    ratings = [(value, quoted) for value, quoted in found if 1 <= value <= 10]
    own = [value for value, quoted in ratings if not quoted] or [value for value, _ in ratings]
    return own[-1] if own else None


def ratings_of(record: Record) -> dict[str, Rating]:
    """Returns the ratings of the record's present output by the names of the judges."""
    return {
        judge: Rating(entry["value"], entry["said"], entry["error"])
        for judge, entry in record.judged.items()
        if entry["key"] == _key(judge, record)
    }


def rated_response(record: Record) -> RatedResponse:
    """Returns what a judge is shown of a record; a letter as reference is shown with the text of its choice."""
    reference = record.reference
    if record.choices and len(reference) == 1:
        reference = f"({reference}) {record.choices[ord(reference) - ord('A')]}"
    return RatedResponse(record.question, reference, record.output)


def _key(judge: str, record: Record) -> str:
    return content_key(_PROMPT, judge, *rated_response(record))


def prompt_hash() -> str:
    """Returns a hash of the judge's prompt."""
    return content_key(_PROMPT)
