"""The same client for an event loop, where a request that is cancelled ends its connection."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from slimkernels.serving.client import _Client, _NotFoundError


class AsyncServerClient(_Client):
    """Asks one server, from the tasks of one event loop; repeats and refuses as ``ServerClient`` does.

    Args:
        url: As for ``ServerClient``, like all others.
        key_env: Environment variable of the key.
        concurrency: Requests under way at the same time; others wait.
        max_retries: Repetitions of one request.
        requests_per_minute: Requests started in a minute at most, evenly; None: no limit.
        timeout_s: Silence after which a request is given up, in seconds.
        backoff_s: The first wait before a repetition, in seconds.

    Raises:
        ImportError, ValueError: As ``ServerClient``.
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
        """The JSON object at ``url + path``, or None where the server has none there."""
        try:
            # The first request: a URL with a slip in it should not take a minute to be found out.
            return await self._ask("GET", path, None, min(self._max_retries, 1))
        except _NotFoundError:
            return None

    async def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that answers a JSON object; path and errors as ``ServerClient.post``."""
        return await self._ask("POST", path, payload, self._max_retries)

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def _ask(self, method: str, path: str, payload: dict[str, Any] | None, max_retries: int) -> dict[str, Any]:
        url = self._url_of(path)
        for attempts in itertools.count(1):
            async with self._places:
                await self._turn()
                try:
                    response: Any = await self._http.request(method, url, json=payload)
                except self._request_errors as error:
                    response = error
            outcome = self._outcome(f"{method} {url}", response, attempts, max_retries)
            if isinstance(outcome, dict):
                return outcome
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
