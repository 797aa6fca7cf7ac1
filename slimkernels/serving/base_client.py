"""The part of a client of a served model that does not wait: its options, and what a response means."""

from __future__ import annotations

import contextlib
import email.utils
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from slimkernels.serving.errors import (
    NotFoundError,
    ServerRequestError,
    ServerUnavailableError,
    UnusableAnswerError,
)

DEFAULT_KEY_ENV = "OPENAI_API_KEY"

_MAX_BACKOFF_S = 60.0
# A server that asks for more than this has a daily quota, or is closed.
_MAX_RETRY_AFTER_S = 900.0
_RETRIED = frozenset({408, 409, 425, 429})
# Error codes that some servers send with status 429 although waiting does not help.
_PERMANENT_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
_PAYMENT_REQUIRED = 402
_SHOWN_CHARACTERS = 300


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


class BaseClient:
    """The base of the blocking and of the asynchronous client: URL, key, limits, and what a response means."""

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
    ) -> Wait | Content:
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
                kind = NotFoundError if status in (404, 405) else ServerRequestError
                raise kind(f"the server refused {name} with {self._clean(problem)}{_advice(status)}")
            if response.is_success:
                try:
                    return Content(read(self._content(response, name)))
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
        return Wait(backoff, retry_after or 0.0)

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


class Content(NamedTuple):
    """The content of a response, as it was read."""

    value: Any


class Wait(NamedTuple):
    """Seconds to wait before a repetition: the client's own backoff, plus the time that the server asks for."""

    backoff: float
    retry_after: float


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
    """Returns the status of a response, or of the error in its body, which proxies send with a good status."""
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
