"""Finds out from a server's list of models which kind of server it is: vLLM, llama.cpp, or another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

# "openai" is any server of which nothing more is known than that it speaks OpenAI's interface.
Kind = Literal["vllm", "llamacpp", "openai"]


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
    """Returns what a server's list says of a model; llama.cpp nests a part of it under "meta"."""
    meta = entry.get("meta")
    return {**entry, **(meta if isinstance(meta, dict) else {})}


def server_kind(listing: Mapping[str, Any] | None) -> Kind:
    """Returns the kind of a server, which vLLM and llama.cpp give as the owner of their models.

    Args:
        listing: Answer to ``GET /models``; None for a server that has no list.
    """
    owners = {entry.get("owned_by") for entry in listed_models(listing)}
    if "vllm" in owners:
        return "vllm"
    return "llamacpp" if "llamacpp" in owners else "openai"
