"""Models of OpenAI-compatible servers: which of a server's is meant, and what is known of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from slimkernels.serving.client import ServerClient

if TYPE_CHECKING:
    from slimkernels.search import ServerEngine

# How a server is asked whose chat template is not known.
PLAIN = "plain text"
# What vLLM's and llama.cpp's lists say of a model that stays the same from one request to the next.
_SAID = ("owned_by", "root", "max_model_len", "n_ctx", "n_vocab", "n_embd", "n_params", "size", "ftype")


@dataclasses.dataclass(frozen=True)
class Server:
    """A model that a server has.

    Attributes:
        url: The server's base URL, without user name and password.
        model: Its name there.
        said: What the server says of it: by whom it is served, from which files, its sizes. Nothing of its weights.
        engine: Asks it.
    """

    url: str
    model: str
    said: Mapping[str, Any]
    engine: ServerEngine

    @property
    def parts(self) -> tuple[str, str]:
        """What tells it from others, the last part first: its host and its name."""
        return urlsplit(self.url).netloc, self.model


def is_server(name: str) -> bool:
    """Whether a model's name is a server's URL."""
    return name.startswith(("http://", "https://"))


def find_server(address: str, **client: Any) -> Server:
    """Asks a server what it has.

    Args:
        address: URL#MODEL, as in ``http://localhost:8000/v1#NAME``; the URL alone where the server lists one model.
        **client: Of ``ServerClient``: ``key_env``, ``max_retries``, ``timeout_s``, ...

    Raises:
        ServerUnavailableError, ServerRequestError: The server does not answer, or wants a key.
        ImportError: The package httpx2 is not installed.
        ValueError: The URL is none, or the server has not this model, or several and none is named.
    """
    from slimkernels.search import ServerEngine

    url, _, model = address.partition("#")
    with ServerClient(url, **client) as asked:
        listed = {entry["id"]: entry for entry in _entries(asked.get("/models"))}
        url_shown = asked.url
    names = ", ".join(listed) or "none"
    if not model and len(listed) != 1:
        raise ValueError(f"a server must list one model, or be given as {url_shown}#NAME; it lists {names}")
    if model and listed and model not in listed:
        raise ValueError(f"the server {url_shown} must have the model {model!r}, but lists {names}")
    model = model or next(iter(listed))
    return Server(url_shown, model, _said(listed.get(model, {})), ServerEngine(url, model, **client))


def _entries(listing: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Of a server's list of models; none where it has no list."""
    entries = (listing or {}).get("data")
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def _said(entry: Mapping[str, Any]) -> dict[str, Any]:
    meta = entry.get("meta")
    facts = {**entry, **(meta if isinstance(meta, dict) else {})}
    return {name: facts[name] for name in _SAID if facts.get(name) is not None}
