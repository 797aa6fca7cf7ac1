"""Finds a model on an OpenAI-compatible server, and what the server says about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from slimkernels.serving.client import ServerClient
from slimkernels.serving.kinds import listed_models, model_facts

if TYPE_CHECKING:
    from slimkernels.search import ServerEngine

# The prompt format for a server whose chat template is not known.
PLAIN = "plain text"
# Facts in the model lists of vLLM and llama.cpp that do not change from one request to the next.
_SAID = ("owned_by", "root", "max_model_len", "n_ctx", "n_vocab", "n_embd", "n_params", "size", "ftype")


@dataclasses.dataclass(frozen=True)
class Server:
    """A model on a server.

    Attributes:
        url: Base URL of the server, without user name and password.
        model: The server's name for the model.
        said: Facts that the server gives: who serves the model, from which files, its sizes. None about its weights.
        engine: Engine that asks the server.
    """

    url: str
    model: str
    said: Mapping[str, Any]
    engine: ServerEngine

    @property
    def parts(self) -> tuple[str, str]:
        """Host and name, which distinguish the model from others; labels prefer the last part."""
        return urlsplit(self.url).netloc, self.model


def is_server(name: str) -> bool:
    """Returns whether the name of a model is the URL of a server."""
    return name.startswith(("http://", "https://"))


def find_server(address: str, **client: Any) -> Server:
    """Asks a server for a model.

    Args:
        address: URL#MODEL, such as ``http://localhost:8000/v1#NAME``; the URL is enough if the server lists one model.
        **client: Options of ``ServerClient``: ``key_env``, ``max_retries``, ``timeout_s``, ...

    Raises:
        ServerUnavailableError, ServerRequestError: The server does not answer, or refuses the key.
        ImportError: The package httpx2 is not installed.
        ValueError: The URL is malformed, the server does not have the model, or lists several and none is named.
    """
    from slimkernels.search import ServerEngine

    url, _, model = address.partition("#")
    with ServerClient(url, **client) as asked:
        listed = {entry["id"]: entry for entry in listed_models(asked.get("/models"))}
        url_shown = asked.url
    names = ", ".join(listed) or "none"
    if not model and len(listed) != 1:
        raise ValueError(f"a server must list one model, or be given as {url_shown}#NAME; it lists {names}")
    if model and listed and model not in listed:
        raise ValueError(f"the server {url_shown} must have the model {model!r}, but lists {names}")
    model = model or next(iter(listed))
    return Server(url_shown, model, _said(listed.get(model, {})), ServerEngine(url, model, **client))


def _said(entry: Mapping[str, Any]) -> dict[str, Any]:
    facts = model_facts(entry)
    return {name: facts[name] for name in _SAID if facts.get(name) is not None}
