"""Sends requests to a served model, with retries, a rate limit, concurrency, and a key that no error shows."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
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
# Error codes that some servers send with status 429 although waiting does not help.
_PERMANENT_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
_PAYMENT_REQUIRED = 402
_SHOWN_CHARACTERS = 300
# Requests per worker that may be in flight, or answered and waiting for an earlier one.
_WINDOW = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


class ServerRequestError(ValueError):
    """The server refused a request or sent an unusable answer; repeating the request would not help."""


class UnusableAnswerError(ServerRequestError):
    """An answer with a good status that cannot be used; every repetition of the request got such an answer too."""


class ServerUnavailableError(OSError):
    """The server did not answer any of the attempts."""


@contextlib.contextmanager
def reading(
    content: dict[str, Any], expected: str, failure: type[ServerRequestError], *, advice: str = ""
) -> Iterator[None]:
    """Turns the errors of code that reads an answer of another form into one that shows how the answer begins.

    Args:
        content: The answer.
        expected: Beginning of the error: what the answer must be.
        failure: Class of the error.
        advice: End of the error.

    Raises:
        ServerRequestError: A part of the answer is missing, of another type or out of range, or the code raised
            ValueError. An error of this class that the code raised itself is left as it is.
    """
    try:
        yield
    except ServerRequestError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        problem = f"{type(error).__name__}: {error}"
        begins = f"it begins {str(content)[:200]!r}" + (f": {advice}" if advice else "")
        raise failure(f"{expected}, but cannot be read ({problem}); {begins}") from error


def as_it_is(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of an answer."""
    return content


class _Client:
    """The base of both clients: URL, key, limits, and the meaning of a response."""

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
        """Returns the URL of a path below the base URL; "../" starts from its parent."""
        return self.url.rpartition("/")[0] + path[2:] if path.startswith("../") else self.url + path

    def _outcome(
        self, name: str, response: Any, attempts: int, max_retries: int, read: Callable[[dict[str, Any]], Any]
    ) -> _Wait | _Content:
        """Returns the content of a response, or the time to wait before the next attempt, or raises.

        Args:
            name: Method and URL of the request, for errors.
            response: The response, or the exception that the request raised.
            attempts: Number of attempts so far.
            max_retries: Repetitions allowed.
            read: Function that reads the content; an answer for which it raises ``UnusableAnswerError``, or which lacks
                what it looks for, is waited for again.
        """
        retry_after = unusable = None
        if isinstance(response, Exception):
            problem = f"{type(response).__name__}: {response}" if str(response) else type(response).__name__
        else:
            status = _status(response)
            problem = f"status {status}: {self._said(response)}"
            if not 200 <= status < 300 and not _is_temporary(response, status):
                kind = _NotFoundError if status in (404, 405) else ServerRequestError
                raise kind(f"the server refused {name} with {self._clean(problem)}{_advice(status)}")
            if response.is_success:
                try:
                    return _Content(read(self._content(response, name)))
                except UnusableAnswerError as error:
                    problem, unusable = str(error), error
                except ServerRequestError:
                    raise
                except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                    problem, unusable = self._unreadable(response, error), error
            retry_after = _retry_after_s(response.headers.get("Retry-After"))
        if attempts > max_retries or (retry_after or 0.0) > _MAX_RETRY_AFTER_S:
            waits = "" if retry_after is None else f"; it asks to wait {retry_after:.0f} s"
            if unusable is not None:
                raise UnusableAnswerError(
                    f"{name} was answered {attempts} times, but no answer can be used: {self._clean(problem)}"
                ) from unusable
            raise ServerUnavailableError(
                f"{name} failed {attempts} times, at last with {self._clean(problem)}{waits}: start again when the "
                "server answers"
            )
        backoff = min(self._backoff_s * 2.0 ** (attempts - 1), _MAX_BACKOFF_S) * random.uniform(0.5, 1.0)  # noqa: S311
        return _Wait(backoff, retry_after or 0.0)

    def _content(self, response: Any, name: str) -> dict[str, Any]:
        content = _json(response)
        if isinstance(content, dict) and not content.get("error"):
            return content
        if isinstance(content, dict):
            raise UnusableAnswerError(f"the server reports an error: {self._said(response)}")
        raise UnusableAnswerError(
            f"{name.partition(' ')[2]} must answer with a JSON object, got "
            f"{response.headers.get('Content-Type', 'no content type')} {self._said(response)!r}: is "
            "this the base URL of an OpenAI-compatible server?"
        )

    def _unreadable(self, response: Any, error: Exception) -> str:
        """Describes an answer in which the reader did not find what it looks for."""
        begin = " ".join(response.text.split())[:_SHOWN_CHARACTERS]
        return f"its answer cannot be read ({type(error).__name__}: {error}); it begins {begin!r}"

    def _said(self, response: Any) -> str:
        """Returns the message in the body of an error, shortened and without the secrets."""
        try:
            error = _json(response)["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, TypeError):
            text = response.text
        # Shortening first could leave a part of a key, which would no longer be recognised.
        return self._clean(" ".join(text.split()))[:_SHOWN_CHARACTERS]

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class _Content(NamedTuple):
    """The content of a response, as it was read."""

    value: Any


class _Wait(NamedTuple):
    """Seconds to wait before a repetition: the client's own backoff, plus the time that the server asks for."""

    backoff: float
    retry_after: float


class ServerClient(_Client):
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
        """Returns the JSON object at ``url + path``, or None if the server has none there (404, 405)."""
        try:
            # One retry only: this is the first request, and a mistyped URL should fail fast.
            return self._ask("GET", path, None, min(self._max_retries, 1), as_it_is)
        except _NotFoundError:
            return None

    def post(self, path: str, payload: dict[str, Any], read: Callable[[dict[str, Any]], Result] = as_it_is) -> Result:
        """Sends a JSON object and returns the JSON object in the answer, or what a function reads in it.

        Args:
            path: Path below the base URL; "../completion" replaces the last part of the base URL.
            payload: The object to send.
            read: Function that reads the answer. The server is asked again for an answer for which it raises
                ``UnusableAnswerError``, or KeyError, IndexError, TypeError, ValueError or AttributeError because the
                answer does not have the expected form.

        Raises:
            ServerRequestError: The server refused the request.
            UnusableAnswerError: The server answered every attempt with something that cannot be used.
            ServerUnavailableError: Every attempt failed.
        """
        return self._ask("POST", path, payload, self._max_retries, read)

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

    def close(self) -> None:
        """Ends all waits and closes the connections."""
        self._stop.set()
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
    ) -> Any:
        url = self._url_of(path)
        for attempts in itertools.count(1):
            self._turns.wait()
            try:
                response = self._http.request(method, url, json=payload)
            except self._request_errors as error:
                response = error
            outcome = self._outcome(f"{method} {url}", response, attempts, max_retries, read)
            if isinstance(outcome, _Content):
                return outcome.value
            if outcome.retry_after:
                self._turns.pause(outcome.retry_after)
            if self._stop.wait(sum(outcome)):
                break
        raise _StoppedError


class _StoppedError(Exception):
    """A request was abandoned because another one failed."""


class _NotFoundError(ServerRequestError):
    """The server has nothing at this path (404, 405)."""


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


def _split_url(url: str) -> tuple[str, tuple[str, str] | None]:
    """Splits a URL into the base URL and (user name, password), or None without them."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    # The error does not show the URL, which may hold a password.
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


def _json(response: Any) -> Any:
    """Returns the JSON in the body of a response, or None if there is none, or one that is nested too deeply."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def _status(response: Any) -> int:
    """Returns the status of a response; that of the error in its body where the body has one, as proxies send."""
    try:
        code = _json(response)["error"]["code"]
        if response.is_success and str(code).isdecimal() and 400 <= int(code) < 600:
            return int(code)
        if response.is_success and code in _PERMANENT_CODES:
            return _PAYMENT_REQUIRED
    except (ValueError, KeyError, TypeError):
        pass
    return response.status_code


def _is_temporary(response: Any, status: int) -> bool:
    if status not in _RETRIED and status < 500:
        return False
    # 501 Not Implemented is permanent.
    if status == 501:
        return False
    try:
        return _json(response)["error"]["code"] not in _PERMANENT_CODES
    except (ValueError, KeyError, TypeError):
        return True


def _advice(status: int) -> str:
    if status in (401, 403):
        return f"; keys are read from the environment: {DEFAULT_KEY_ENV}, or the variable named by key_env (--key-env)"
    return ""


def _retry_after_s(value: str | None) -> float | None:
    """Reads a ``Retry-After`` header, a number of seconds or a date; None if it is neither."""
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
