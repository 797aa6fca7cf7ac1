"""Errors of requests to a served model."""

from __future__ import annotations


class ServerRequestError(ValueError):
    """The server refused a request or sent an unusable answer; repeating the request would not help."""


class UnusableAnswerError(ServerRequestError):
    """An answer with a good status that cannot be used; every repetition of the request got such an answer too."""


class BudgetSpentError(ValueError):
    """The next request would cost more tokens than the budget allows."""


class ServerUnavailableError(OSError):
    """The server did not answer any of the attempts."""


class NotFoundError(ServerRequestError):
    """The server has nothing at this path (404, 405)."""
