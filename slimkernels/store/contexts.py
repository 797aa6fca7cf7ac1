"""The file next to a shard that tells what the teacher read in place of its documents (FORMAT.md, "Contexts")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slimkernels.store.beside import content_beside, file_beside, read_beside
from slimkernels.store.codec import HASH_BYTES, document_hash
from slimkernels.store.errors import TeacherContextError
from slimkernels.store.format import ShardEntry

_KIND, _TENSOR, _DTYPE = "contexts", "context_hashes", "U8"
# Stands for the document itself.
NO_CONTEXT = bytes(HASH_BYTES)


def contexts_name(shard_file: str) -> str:
    """Returns the name of the file that belongs to a shard, in the same folder."""
    return file_beside(_KIND, shard_file)


def contexts_content(shard_checksum: str, hashes: Sequence[bytes]) -> bytes:
    """Returns the bytes of the file, from the checksum of the shard and the hash of each document's context."""
    array = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BYTES)
    return content_beside(_KIND, _TENSOR, _DTYPE, array, shard_checksum)


def context_hash(teacher_ids: Sequence[int] | None) -> bytes:
    """Returns the hash of the token ids that the teacher reads, or ``NO_CONTEXT`` for None, the document itself."""
    return NO_CONTEXT if teacher_ids is None else document_hash(np.asarray(teacher_ids, dtype=np.int32))


def read_context_hashes(path: Path, entry: ShardEntry) -> list[bytes]:
    """Reads the hash of each document's context; all are ``NO_CONTEXT`` if the shard has no such file.

    Raises:
        TeacherContextError: The bytes of the file are not those that were written for this shard.
    """
    hashes = read_beside(path, entry, _KIND, _TENSOR, _DTYPE, (HASH_BYTES,), TeacherContextError)
    return [NO_CONTEXT] * entry.documents if hashes is None else [row.tobytes() for row in hashes]
