"""Files next to a shard that hold one tensor about its documents, such as the lengths of their prompts (FORMAT.md)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from slimkernels.store.errors import StoreError
from slimkernels.store.format import FORMAT, ShardEntry, new_digest

_VERSION = 1
_DTYPES = {"I32": np.dtype("<i4"), "U8": np.dtype("u1")}


def file_beside(kind: str, shard_file: str) -> str:
    """Returns the name of the file of a kind, such as "prompts", that belongs to a shard, in the same folder."""
    folder, _, name = shard_file.rpartition("/")
    return f"{folder}/{name}".removeprefix("/").replace("shard-", f"{kind}-")


def content_beside(kind: str, tensor: str, dtype: str, array: np.ndarray, shard_checksum: str) -> bytes:
    """Returns the bytes of a file, which the arguments determine.

    Args:
        kind: Kind of the file.
        tensor: Name of its tensor.
        dtype: The tensor's dtype in safetensors, "I32" or "U8".
        array: The tensor, (D, ...).
        shard_checksum: Checksum of the shard in the manifest.
    """
    data = np.ascontiguousarray(array, dtype=_DTYPES[dtype]).tobytes()
    digest = new_digest()
    digest.update(data)
    metadata = {
        "format": f"{FORMAT}-{kind}",
        "version": str(_VERSION),
        "shard": shard_checksum,
        "checksum": digest.hexdigest(),
    }
    described = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [0, len(data)]}
    text = json.dumps({"__metadata__": metadata, tensor: described}, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def read_beside(
    path: Path,
    entry: ShardEntry,
    kind: str,
    tensor: str,
    dtype: str,
    row_shape: tuple[int, ...],
    damaged: type[StoreError],
) -> np.ndarray | None:
    """Reads the tensor (D, *row_shape) of the file next to a shard; None if the shard has no such file.

    Args:
        path: Directory of the store.
        entry: Entry of the shard in the manifest.
        kind: Kind of the file.
        tensor: Name of its tensor.
        dtype: The tensor's dtype in safetensors.
        row_shape: Shape of the tensor's part for one document.
        damaged: Error of a file whose bytes are not those that were written for this shard.
    """
    name = file_beside(kind, entry.file)
    try:
        content = (path / name).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise damaged(f"cannot be read ({error.strerror})", file=name) from error
    shape = (entry.documents, *row_shape)
    size = int(np.prod(shape)) * _DTYPES[dtype].itemsize
    array = np.zeros((0, *row_shape), _DTYPES[dtype])
    if len(content) > size:
        array = np.frombuffer(content[-size:], _DTYPES[dtype]).reshape(shape)
    if content != content_beside(kind, tensor, dtype, array, entry.checksum):
        raise damaged("its bytes are not those that were written for this shard: remove it", file=name)
    return array
