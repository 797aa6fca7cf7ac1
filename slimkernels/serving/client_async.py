"""Sends requests to a served model from an event loop; cancelling a request closes its connection."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

from slimkernels.serving.base_client import BaseClient, Content, as_it_is
from slimkernels.serving.errors import NotFoundError

Result = TypeVar("Result")


class AsyncServerClient(BaseClient):
    """Client of one server for the tasks of one event loop, with the retries and errors of ``ServerClient``.

    Args:
        url: Base URL, such as ``http://localhost:8000/v1``.
        key_env: Name of the environment variable that holds the key; None uses ``OPENAI_API_KEY`` if that is set.
        concurrency: Largest number of requests in flight; others wait.
        max_retries: Largest number of repetitions of one request.
        requests_per_minute: Limit on the requests started, repetitions included, at even intervals; None: no limit.
        timeout_s: Seconds without a response after which a request counts as failed.
        backoff_s: Seconds before the first repetition.

    Raises:
        ImportError, ValueError: The same as in ``ServerClient``.
    """

    def __init__(
        self,
        url: str,
        *,
        key_env: str | None,
        concurrency: int,
        max_retries: int,
        requests_per_minute: float | None,
        timeout_s: float,
        backoff_s: float,
    ) -> None:
        limits = {"requests_per_minute": requests_per_minute, "timeout_s": timeout_s, "backoff_s": backoff_s}
        super().__init__(url, key_env, limits, {"concurrency": concurrency, "max_retries": max_retries})
        import httpx2

        self._http = httpx2.AsyncClient(**self._http_options)
        self._places = asyncio.Semaphore(concurrency)
        self._interval_s = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0

    async def get(self, path: str) -> dict[str, Any] | None:
        """Returns the JSON object at ``url + path``, or None if the server has none there (404, 405)."""
        try:
            # One retry only: this is the first request, and a mistyped URL should fail fast.
            return await self._ask("GET", path, None, min(self._max_retries, 1), as_it_is)
        except NotFoundError:
            return None

    async def post(
        self, path: str, payload: dict[str, Any], read: Callable[[dict[str, Any]], Result] = as_it_is
    ) -> Result:
        """Sends a JSON object and reads the one in the answer, as ``ServerClient.post`` does."""
        return await self._ask("POST", path, payload, self._max_retries, read)

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def _ask(
        self,
        method: str,
        path: str,
        payload: dict[str, Any] | None,
        max_retries: int,
        read: Callable[[dict[str, Any]], Any],
    ) -> Any:
        url = self._url_of(path)
        for attempts in itertools.count(1):
            async with self._places:
                await self._turn()
                try:
                    response: Any = await self._http.request(method, url, json=payload)
                except self._request_errors as error:
                    response = error
            outcome = self._outcome(f"{method} {url}", response, attempts, max_retries, read)
            if isinstance(outcome, Content):
                return outcome.value
            self._next = max(self._next, asyncio.get_running_loop().time() + outcome.retry_after)
            await asyncio.sleep(sum(outcome))
        raise AssertionError("unreachable")

    async def _turn(self) -> None:
        """Waits until the next request may start."""
        now = asyncio.get_running_loop().time()
        start = max(now, self._next)
        self._next = start + self._interval_s
        if start > now:
            await asyncio.sleep(start - now)
