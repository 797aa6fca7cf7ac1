"""Tells whether two teachers, tokenizers or stores are the same by their content, and not by their names and places."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from slimkernels.store.format import ShardEntry, StoreSettings, new_digest


def teacher_identity(teacher: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a teacher's description that does not change when its folder is moved or renamed.

    A fingerprint of the weights, which covers their names, shapes and dtypes, says all of it. Without one, as for the
    model of a server, everything counts.
    """
    return {"weights": teacher["weights"]} if teacher.get("weights") else teacher


def is_same_tokenizer(one: str, other: str) -> bool:
    """Returns whether two fingerprints are of tokenizers in which every token id means the same.

    A fingerprint is one text, or several with a space between, one for every form of the tokenizer that encodes texts
    in the same way: ``models.fingerprints.tokenizer_fingerprint`` has two where a padding token was added. Tokenizers
    are the same if they have a form in common. This is the only comparison of tokenizers in the package.
    """
    return one == other or not set(one.split()).isdisjoint(other.split())


def changed_settings(stored: StoreSettings, asked: StoreSettings) -> list[str]:
    """Returns the names of the settings in which a store differs from those that a writer asks for."""
    names = [field.name for field in dataclasses.fields(StoreSettings)]
    differ = [name for name in names if getattr(stored, name) != getattr(asked, name)]
    if teacher_identity(stored.teacher) == teacher_identity(asked.teacher):
        differ = [name for name in differ if name != "teacher"]
    if is_same_tokenizer(stored.tokenizer_fingerprint, asked.tokenizer_fingerprint):
        differ = [name for name in differ if name != "tokenizer_fingerprint"]
    return differ


def rows_fingerprint(settings: StoreSettings, shards: Sequence[ShardEntry]) -> str:
    """Hashes the settings of a store and the checksums of its shards, which cover every byte of them.

    Checkpoints of version 0.1.0 hold this hash. The lengths of the prompts are not in the shards.

    Returns:
        32 hexadecimal digits.
    """
    content = settings.content() | {"teacher": teacher_identity(settings.teacher)}
    digest = new_digest()
    digest.update(json.dumps(content, sort_keys=True).encode())
    for shard in shards:
        digest.update(shard.checksum.encode())
    return digest.hexdigest()


def prompts_fingerprint(lengths: Iterable[np.ndarray]) -> str | None:
    """Hashes the lengths of the prompts of all documents.

    Args:
        lengths: (D,) int32 of each shard; 0 where a length is not known.

    Returns:
        32 hexadecimal digits, or None where no length is known.
    """
    digest, is_known = new_digest(), False
    for array in lengths:
        is_known |= bool(array.any())
        digest.update(array.astype("<i4").tobytes())
    return digest.hexdigest() if is_known else None


def joined_fingerprint(rows: Sequence[str], weights: Sequence[float] | None) -> str:
    """Hashes the ``rows_fingerprint`` of stores that are read together, and the weights with which they are mixed.

    Returns:
        32 hexadecimal digits.
    """
    digest = new_digest()
    digest.update(json.dumps([list(rows), weights]).encode())
    return digest.hexdigest()


def store_fingerprint(rows: str, prompts: str | None) -> str:
    """Joins ``rows_fingerprint`` and ``prompts_fingerprint``: all that a reader sees of a store.

    Returns:
        32 hexadecimal digits; ``rows`` itself for a store without prompts.
    """
    if prompts is None:
        return rows
    digest = new_digest()
    digest.update(f"{rows} {prompts}".encode())
    return digest.hexdigest()
