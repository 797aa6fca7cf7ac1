"""The HTTP side of a served model: retries, a rate limit, requests side by side, and a key that stays here."""

from __future__ import annotations

import collections
import concurrent.futures
import email.utils
import itertools
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

DEFAULT_KEY_ENV = "OPENAI_API_KEY"

_MAX_BACKOFF_S = 60.0
# A server that asks for more than this has a daily quota, or is closed.
_MAX_RETRY_AFTER_S = 900.0
_RETRIED = frozenset({408, 409, 425, 429})
# How some servers say 429 when waiting does not help.
_PERMANENT_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
_SHOWN_CHARACTERS = 300
# So many requests per worker are under way or answered, waiting for an earlier one.
_WINDOW = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


class ServerRequestError(ValueError):
    """The server refused a request, or gave an answer that cannot be used; it would do so again."""


class ServerUnavailableError(OSError):
    """The server did not answer, however often it was asked."""


class _Client:
    """What the clients with threads and with an event loop share: who asks whom, and what an answer means."""

    def __init__(self, url: str, key_env: str | None, limits: dict[str, float | None], counts: dict[str, int]) -> None:
        for name, value in counts.items():
            if type(value) is not int or value < (name == "concurrency"):
                raise ValueError(f"{name} must be an int of at least {int(name == 'concurrency')}, got {value!r}")
        for name, value in limits.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        try:
            import httpx2
        except ImportError as error:
            raise ImportError("a served model needs the package httpx2: pip install 'slimkernels[server]'") from error
        self.url, login = _split_url(url)
        key = None if login else _key(key_env)
        self._secrets = [secret for secret in (key, login and login[1]) if secret]
        self._max_retries, self._backoff_s = counts["max_retries"], limits["backoff_s"] or 0.0
        self._request_errors = httpx2.RequestError
        timeout_s = limits["timeout_s"] or 0.0
        self._http_options: dict[str, Any] = {
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "auth": login,
            "timeout": httpx2.Timeout(timeout_s, connect=min(timeout_s, 30.0), pool=None),
            "limits": httpx2.Limits(max_connections=counts["concurrency"]),
        }

    def _url_of(self, path: str) -> str:
        """Of a path beside or below the base URL."""
        return self.url.rpartition("/")[0] + path[2:] if path.startswith("../") else self.url + path

    def _outcome(self, name: str, response: Any, attempts: int, max_retries: int) -> _Wait | dict[str, Any]:
        """What a response, or the error that came in its place, means after so many attempts.

        ``name`` is the request's, for errors: its method and URL.
        """
        retry_after = None
        if isinstance(response, Exception):
            problem = f"{type(response).__name__}: {response}" if str(response) else type(response).__name__
        else:
            if response.is_success:
                return self._content(response, name)
            problem = f"status {response.status_code}: {self._said(response)}"
            if not _is_temporary(response):
                kind = _NotFoundError if response.status_code in (404, 405) else ServerRequestError
                raise kind(f"the server refused {name} with {self._clean(problem)}{_advice(response)}")
            retry_after = _retry_after_s(response.headers.get("Retry-After"))
        if attempts > max_retries or (retry_after or 0.0) > _MAX_RETRY_AFTER_S:
            waits = "" if retry_after is None else f"; it asks to wait {retry_after:.0f} s"
            raise ServerUnavailableError(
                f"{name} failed {attempts} times, at last with {self._clean(problem)}{waits}: start again when the "
                "server answers"
            )
        backoff = min(self._backoff_s * 2.0 ** (attempts - 1), _MAX_BACKOFF_S) * random.uniform(0.5, 1.0)  # noqa: S311
        return _Wait(backoff, retry_after or 0.0)

    def _content(self, response: Any, name: str) -> dict[str, Any]:
        try:
            content = response.json()
        except ValueError:
            content = None
        if isinstance(content, dict):
            return content
        raise ServerRequestError(
            f"{name.partition(' ')[2]} must answer with a JSON object, got "
            f"{response.headers.get('Content-Type', 'no content type')} {self._said(response)!r}: is "
            "this the base URL of an OpenAI-compatible server?"
        )

    def _said(self, response: Any) -> str:
        """What an error's body says, without the key should the server repeat it."""
        try:
            error = response.json()["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, TypeError):
            text = response.text
        # First the key, then the cut: half a key is one too much.
        return self._clean(" ".join(text.split()))[:_SHOWN_CHARACTERS]

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class _Wait(NamedTuple):
    """Seconds before a repetition: the client's own, and what the server asks for beside it."""

    backoff: float
    retry_after: float


class ServerClient(_Client):
    """Asks one server, from several threads.

    A request is repeated when the server cannot be reached, drops the connection, is silent for ``timeout_s``, or
    answers 408, 409, 425, 429 or 5xx: after ``backoff_s``, twice that, four times that, ... up to a minute, each
    shortened by up to half at random so that clients do not return together; and never before the server's
    ``Retry-After``, which holds back all other requests too.

    Args:
        url: The base URL, as in ``http://localhost:8000/v1``; without a path, ``/v1`` is meant. A user name and
            password in it are sent as HTTP basic authentication.
        key_env: The environment variable that holds the key. None means ``OPENAI_API_KEY``, if that is set. A URL
            with a user name gets no key.
        concurrency: Requests under way at the same time.
        max_retries: Repetitions of one request.
        requests_per_minute: Requests are started at least 60 s / this apart, repetitions included; None: no limit.
        timeout_s: Silence after which a request is given up, in seconds.
        backoff_s: The first wait before a repetition, in seconds.

    Attributes:
        url: The base URL without user name and password.

    Raises:
        ImportError: The package httpx2 is not installed.
        ValueError: An argument out of range, a URL that is not one, or a named variable that is not set.
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
    ) -> None:
        limits = {"requests_per_minute": requests_per_minute, "timeout_s": timeout_s, "backoff_s": backoff_s}
        super().__init__(url, key_env, limits, {"concurrency": concurrency, "max_retries": max_retries})
        import httpx2

        self._concurrency = concurrency
        self._http = httpx2.Client(**self._http_options)
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._turns = _Turns(0.0 if requests_per_minute is None else 60.0 / requests_per_minute, self._stop)

    def get(self, path: str) -> dict[str, Any] | None:
        """The JSON object at ``url + path``, or None where the server has none there."""
        try:
            # The first request: a URL with a slip in it should not take a minute to be found out.
            return self._ask("GET", path, None, min(self._max_retries, 1))
        except _NotFoundError:
            return None

    def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that answers a JSON object.

        Args:
            path: Appended to the base URL; "../completion" is beside its last part.
            payload: The object.

        Raises:
            ServerRequestError: The server refused.
            ServerUnavailableError: Every attempt failed.
        """
        return self._ask("POST", path, payload, self._max_retries)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Each item with its result, in order; ``concurrency`` of them are computed at the same time.

        An exception of ``function`` comes out, and no request is started after it; results of items before it that
        are under way still come first.
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
                # After an error: wakes those that wait for a repetition; requests under way end by themselves.
                if waiting:
                    self._stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Ends every wait and closes the connections."""
        self._stop.set()
        self._http.close()

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, method: str, path: str, payload: dict[str, Any] | None, max_retries: int) -> dict[str, Any]:
        url = self._url_of(path)
        for attempts in itertools.count(1):
            self._turns.wait()
            try:
                response = self._http.request(method, url, json=payload)
            except self._request_errors as error:
                response = error
            outcome = self._outcome(f"{method} {url}", response, attempts, max_retries)
            if isinstance(outcome, dict):
                return outcome
            if outcome.retry_after:
                self._turns.pause(outcome.retry_after)
            if self._stop.wait(sum(outcome)):
                break
        raise _StoppedError


class _StoppedError(Exception):
    """A request was given up because another one failed."""


class _NotFoundError(ServerRequestError):
    pass


class _Turns:
    """When the next request may start: ``interval_s`` after the one before, and not in a pause."""

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


def _split_url(url: str) -> tuple[str, tuple[str, str] | None]:
    """The base URL without its user name and password, and the two."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    # The URL itself is not shown: it may hold a password.
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ValueError(
            "url must be the base URL of a server, like http://localhost:8000/v1 or https://api.example.com/v1, "
            f"without ? and #; got one with scheme {parts.scheme!r} and host {host!r}"
        )
    host = f"[{host}]" if ":" in host else host
    netloc = host if port is None else f"{host}:{port}"
    login = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
    return f"{parts.scheme}://{netloc}{parts.path.rstrip('/') or '/v1'}", login


def _key(key_env: str | None) -> str | None:
    key = os.environ.get(key_env or DEFAULT_KEY_ENV, "").strip()
    if key_env is not None and not key:
        raise ValueError(f"the environment variable {key_env} must hold the server's key, but is not set")
    if not key.isascii() or any(character.isspace() for character in key):
        raise ValueError(f"the key in {key_env or DEFAULT_KEY_ENV} must be ASCII without spaces")
    return key or None


def _is_temporary(response: Any) -> bool:
    if response.status_code not in _RETRIED and response.status_code < 500:
        return False
    # The server will not learn what it does not know.
    if response.status_code == 501:
        return False
    try:
        return response.json()["error"]["code"] not in _PERMANENT_CODES
    except (ValueError, KeyError, TypeError):
        return True


def _advice(response: Any) -> str:
    if response.status_code in (401, 403):
        return f"; keys are read from the environment: {DEFAULT_KEY_ENV}, or the variable named by key_env (--key-env)"
    return ""


def _retry_after_s(value: str | None) -> float | None:
    """Seconds, from a number of them or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
