"""The file next to a shard that holds the lengths of its documents' prompts (FORMAT.md, "Prompts")."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from slimkernels.store.errors import PromptLengthsError
from slimkernels.store.format import FORMAT, ShardEntry, new_digest

_VERSION = 1
_LENGTH_BYTES = 4


def prompts_name(shard_file: str) -> str:
    """Returns the name of the file that belongs to a shard, in the same folder."""
    folder, _, name = shard_file.rpartition("/")
    return f"{folder}/{name}".removeprefix("/").replace("shard-", "prompts-")


def prompts_content(shard_checksum: str, lengths: np.ndarray) -> bytes:
    """Returns the bytes of the file, which these two arguments determine.

    Args:
        shard_checksum: Checksum of the shard in the manifest.
        lengths: (D,) number of tokens of each document's prompt; 0 where it is not known.
    """
    data = np.ascontiguousarray(lengths, dtype="<i4").tobytes()
    digest = new_digest()
    digest.update(data)
    metadata = {
        "format": f"{FORMAT}-prompts",
        "version": str(_VERSION),
        "shard": shard_checksum,
        "checksum": digest.hexdigest(),
    }
    tensor = {"dtype": "I32", "shape": [len(lengths)], "data_offsets": [0, len(data)]}
    text = json.dumps({"__metadata__": metadata, "prompt_lengths": tensor}, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def read_prompt_lengths(path: Path, entry: ShardEntry, token_counts: np.ndarray) -> np.ndarray:
    """Reads the (D,) prompt lengths of a shard's documents; all are 0 if the shard has no such file.

    Args:
        path: Directory of the store.
        entry: Entry of the shard in the manifest.
        token_counts: (D,) number of tokens of each document.

    Raises:
        PromptLengthsError: The bytes of the file are not those that were written for this shard.
    """
    name = prompts_name(entry.file)
    try:
        content = (path / name).read_bytes()
    except FileNotFoundError:
        return np.zeros(entry.documents, np.int32)
    except OSError as error:
        raise PromptLengthsError(f"cannot be read ({error.strerror})", file=name) from error
    size = entry.documents * _LENGTH_BYTES
    lengths = np.frombuffer(content[-size:], "<i4") if len(content) > size else np.zeros(0, np.int32)
    if content != prompts_content(entry.checksum, lengths):
        raise PromptLengthsError("its bytes are not those that were written for this shard: remove it", file=name)
    if (lengths < 0).any() or (lengths > token_counts).any():
        raise PromptLengthsError("a prompt is longer than its document", file=name)
    return lengths
