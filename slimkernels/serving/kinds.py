"""Finds out which kind of server answers: vLLM, llama.cpp, SGLang, or another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from slimkernels.serving.client import ServerClient
from slimkernels.serving.errors import ServerRequestError, ServerUnavailableError

# "openai" is any other server with an OpenAI-compatible interface.
Kind = Literal["vllm", "llamacpp", "sglang", "openai"]

# SGLang answers these. Release 0.5.23 has all four; those with "get" are deprecated there, and earlier releases have no
# others.
INFO_PATHS = ("../model_info", "../get_model_info", "../server_info", "../get_server_info")
_SGLANG_KEYS = frozenset({"is_generation", "internal_states"})
_KINDS: tuple[Kind, ...] = ("vllm", "llamacpp", "sglang")
_OPENAI_OWNERS = ("openai", "system")


def listed_models(listing: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the entries of a list of models that have an id.

    Args:
        listing: Answer to ``GET /models``; None for a server that has no list.
    """
    entries = (listing or {}).get("data")
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def model_facts(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a model in a server's list, including those that llama.cpp nests under "meta"."""
    meta = entry.get("meta")
    return {**entry, **(meta if isinstance(meta, dict) else {})}


def server_kind(listing: Mapping[str, Any] | None, info: Mapping[str, Any] | None = None) -> Kind:
    """Returns the kind of a server, which vLLM, llama.cpp and SGLang give as the owner of their models.

    Args:
        listing: Answer to ``GET /models``; None for a server that has no list.
        info: Answer to one of ``INFO_PATHS``; None for a server that has none.
    """
    owners = {entry.get("owned_by") for entry in listed_models(listing) if isinstance(entry.get("owned_by"), str)}
    for kind in _KINDS:
        if kind in owners:
            return kind
    return "sglang" if info and isinstance(info.get("model_path"), str) and _SGLANG_KEYS & info.keys() else "openai"


def identify(client: ServerClient) -> tuple[Kind, dict[str, Any] | None]:
    """Asks a server which kind it is, and returns the kind and the list of its models.

    A list that names no known owner may come from a router in front of SGLang, which answers one of ``INFO_PATHS``.

    Raises:
        ServerRequestError, ServerUnavailableError: The same as in ``ServerClient.get``, for the list.
    """
    listing = client.get("/models")
    kind = server_kind(listing)
    owners = {str(entry.get("owned_by")) for entry in listed_models(listing)}
    if kind != "openai" or any(owner.startswith(_OPENAI_OWNERS) for owner in owners):
        return kind, listing
    for path in INFO_PATHS:
        try:
            info = client.get(path)
        except (ServerRequestError, ServerUnavailableError):
            # A server may refuse paths that it does not know in any way.
            continue
        if (kind := server_kind(listing, info)) != "openai":
            break
    return kind, listing
