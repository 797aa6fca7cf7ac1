"""Tells whether two teachers, or two stores, are the same by their content, and not by their names and places."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from slimkernels.store.format import ShardEntry, StoreSettings, new_digest


def teacher_identity(teacher: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a teacher's description that does not change when its folder is moved or renamed.

    A fingerprint of the weights, which covers their names, shapes and dtypes, says all of it. Without one, as for the
    model of a server, everything counts.
    """
    return {"weights": teacher["weights"]} if teacher.get("weights") else teacher


def changed_settings(stored: StoreSettings, asked: StoreSettings) -> list[str]:
    """Returns the names of the settings in which a store differs from those that a writer asks for."""
    names = [field.name for field in dataclasses.fields(StoreSettings)]
    differ = [name for name in names if getattr(stored, name) != getattr(asked, name)]
    if teacher_identity(stored.teacher) == teacher_identity(asked.teacher):
        differ = [name for name in differ if name != "teacher"]
    return differ


def store_fingerprint(settings: StoreSettings, shards: Sequence[ShardEntry]) -> str:
    """Hashes the settings of a store and the checksums of its shards, which cover every byte of its documents.

    Returns:
        32 hexadecimal digits.
    """
    content = dataclasses.asdict(settings) | {"teacher": teacher_identity(settings.teacher)}
    digest = new_digest()
    digest.update(json.dumps(content, sort_keys=True).encode())
    for shard in shards:
        digest.update(shard.checksum.encode())
    return digest.hexdigest()
