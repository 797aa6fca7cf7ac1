"""Sends requests to a served model from several threads, with retries, a rate limit and a limit of concurrency."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from slimkernels.serving.base_client import BaseClient, Content, as_it_is
from slimkernels.serving.errors import BudgetSpentError, NotFoundError

# Requests per worker that may be in flight, or answered and waiting for an earlier one.
_WINDOW = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


class TokenBudget:
    """A limit on the tokens that requests may cost, for all threads and clients that share it.

    Args:
        limit: Largest number of tokens, read and generated, at least 1; None for no limit.

    Attributes:
        spent: Tokens of the requests that were sent and not refused.

    Raises:
        ValueError: ``limit`` is out of range.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(f"token_budget must be an int of at least 1, or None for no limit, got {limit!r}")
        self.limit, self.spent = limit, 0
        self._is_closed = False
        self._lock = threading.Lock()

    def spend(self, tokens: int) -> None:
        """Counts a request before it is sent; after one that the limit does not allow, none is allowed.

        Raises:
            BudgetSpentError: The limit does not allow the request.
        """
        with self._lock:
            if tokens and self.limit is not None:
                self._is_closed |= self.spent + tokens > self.limit
                if self._is_closed:
                    raise BudgetSpentError(
                        f"token_budget={self.limit} is spent: {self.spent} tokens were asked for, and the next request "
                        f"takes {tokens}; what was answered is stored, so a new call with a new budget asks for the "
                        "rest"
                    )
            self.spent += tokens

    def refund(self, tokens: int) -> None:
        """Takes back a request that the server refused."""
        with self._lock:
            self.spent -= tokens


class ServerClient(BaseClient):
    """Client of one server for several threads.

    A request is repeated when the server cannot be reached, drops the connection, sends nothing for ``timeout_s``, or
    answers with status 408, 409, 425, 429 or 5xx, or with a good status and something that cannot be used: no JSON
    object, an error object, or what the reader of ``post`` does not accept. The client waits ``backoff_s``, then twice
    that, four times that, and so on up to a minute, each reduced by a random amount of up to a half so that clients do
    not return together. The ``Retry-After`` of a response adds to the wait and delays all other requests too.

    Args:
        url: Base URL, such as ``http://localhost:8000/v1``; a URL without a path gets ``/v1``. A user name and
            password in it are sent as HTTP basic authentication.
        key_env: Name of the environment variable that holds the key. None uses ``OPENAI_API_KEY`` if that is set. A
            URL with a user name gets no key.
        concurrency: Largest number of requests in flight.
        max_retries: Largest number of repetitions of one request.
        requests_per_minute: Limit on the requests started, repetitions included, at even intervals; None: no limit.
        timeout_s: Seconds without a response after which a request counts as failed.
        backoff_s: Seconds before the first repetition.
        budget: Limit on the tokens of the requests; None for no limit.

    Attributes:
        url: Base URL without user name and password.

    Raises:
        ImportError: The package httpx2 is not installed.
        ValueError: An argument is out of range, the URL is malformed, or the named variable is not set.
    """

    def __init__(
        self,
        url: str,
        *,
        key_env: str | None = None,
        concurrency: int = 8,
        max_retries: int = 6,
        requests_per_minute: float | None = None,
        timeout_s: float = 600.0,
        backoff_s: float = 1.0,
        budget: TokenBudget | None = None,
    ) -> None:
        limits = {"requests_per_minute": requests_per_minute, "timeout_s": timeout_s, "backoff_s": backoff_s}
        super().__init__(url, key_env, limits, {"concurrency": concurrency, "max_retries": max_retries})
        import httpx2

        self._concurrency = concurrency
        self._budget = budget or TokenBudget()
        self._http = httpx2.Client(**self._http_options)
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._turns = _Turns(0.0 if requests_per_minute is None else 60.0 / requests_per_minute, self._stop)

    def get(self, path: str) -> dict[str, Any] | None:
        """Returns the JSON object at ``url + path``, or None if the server has none there (404, 405)."""
        try:
            # One retry only: this is the first request, and a mistyped URL should fail fast.
            return self._ask("GET", path, None, min(self._max_retries, 1), as_it_is, 0)
        except NotFoundError:
            return None

    def post(
        self,
        path: str,
        payload: dict[str, Any],
        read: Callable[[dict[str, Any]], Result] = as_it_is,
        *,
        tokens: int = 0,
    ) -> Result:
        """Sends a JSON object and returns the JSON object in the answer, or what a function reads in it.

        Args:
            path: Path below the base URL; "../completion" replaces the last part of the base URL.
            payload: The object to send.
            read: Function that reads the answer. The server is asked again for an answer for which it raises
                ``UnusableAnswerError``, or KeyError, IndexError, TypeError, ValueError or AttributeError because the
                answer does not have the expected form.
            tokens: Tokens that the server reads and, at most, generates. Every repetition counts to the budget as well,
                unless the attempt before it was answered with an error status.

        Raises:
            BudgetSpentError: The budget does not allow the request.
            ServerRequestError: The server refused the request.
            UnusableAnswerError: The server answered every attempt with something that cannot be used.
            ServerUnavailableError: Every attempt failed.
        """
        return self._ask("POST", path, payload, self._max_retries, read, tokens)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Yields each item with its result, in order; ``concurrency`` of them are computed at the same time.

        After ``function`` raises, no further request starts. The results of earlier items are yielded before the
        exception is raised here.
        """

        def guarded(item: Item) -> Result:
            try:
                return function(item)
            except _StoppedError:
                raise
            except BaseException as error:
                self._failures.append(error)
                self._stop.set()
                raise

        with concurrent.futures.ThreadPoolExecutor(self._concurrency) as pool:
            waiting: collections.deque[tuple[Item, concurrent.futures.Future[Result]]] = collections.deque()
            try:
                for item in items:
                    waiting.append((item, pool.submit(guarded, item)))
                    while waiting and (waiting[0][1].done() or len(waiting) >= _WINDOW * self._concurrency):
                        yield waiting[0][0], waiting.popleft()[1].result()
                while waiting:
                    yield waiting[0][0], waiting.popleft()[1].result()
            except _StoppedError:
                raise self._failures[0] from None
            finally:
                # After an error: wake the threads that wait for a repetition. Requests in flight are not aborted.
                if waiting:
                    self._stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)

    def stop(self) -> None:
        """Ends all waits; requests that were sent are not aborted."""
        self._stop.set()

    def close(self) -> None:
        """Ends all waits and closes the connections."""
        self.stop()
        self._http.close()

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(
        self,
        method: str,
        path: str,
        payload: dict[str, Any] | None,
        max_retries: int,
        read: Callable[[dict[str, Any]], Any],
        tokens: int,
    ) -> Any:
        url = self._url_of(path)
        for attempts in itertools.count(1):
            self._turns.wait()
            self._budget.spend(tokens)
            try:
                response = self._http.request(method, url, json=payload)
            except self._request_errors as error:
                response = error
            if not isinstance(response, Exception) and not response.is_success:
                self._budget.refund(tokens)
            outcome = self._outcome(f"{method} {url}", response, attempts, max_retries, read)
            if isinstance(outcome, Content):
                return outcome.value
            if outcome.retry_after:
                self._turns.pause(outcome.retry_after)
            if self._stop.wait(sum(outcome)):
                break
        raise _StoppedError


class _StoppedError(Exception):
    """A request was abandoned because another one failed."""


class _Turns:
    """The start times of requests: at least ``interval_s`` apart, and none during a pause."""

    def __init__(self, interval_s: float, stop: threading.Event) -> None:
        self._interval_s, self._stop = interval_s, stop
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._interval_s
        if self._stop.wait(start - now):
            raise _StoppedError

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)
