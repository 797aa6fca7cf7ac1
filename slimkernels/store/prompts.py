"""The file next to a shard that holds the lengths of its documents' prompts (FORMAT.md, "Prompts")."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slimkernels.store.beside import content_beside, file_beside, read_beside
from slimkernels.store.errors import PromptLengthsError
from slimkernels.store.format import ShardEntry

_KIND, _TENSOR, _DTYPE = "prompts", "prompt_lengths", "I32"


def prompts_name(shard_file: str) -> str:
    """Returns the name of the file that belongs to a shard, in the same folder."""
    return file_beside(_KIND, shard_file)


def prompts_content(shard_checksum: str, lengths: np.ndarray) -> bytes:
    """Returns the bytes of the file, which these two arguments determine.

    Args:
        shard_checksum: Checksum of the shard in the manifest.
        lengths: (D,) number of tokens of each document's prompt; 0 where it is not known.
    """
    return content_beside(_KIND, _TENSOR, _DTYPE, lengths, shard_checksum)


def read_prompt_lengths(path: Path, entry: ShardEntry, token_counts: np.ndarray) -> np.ndarray:
    """Reads the (D,) prompt lengths of a shard's documents; all are 0 if the shard has no such file.

    Args:
        path: Directory of the store.
        entry: Entry of the shard in the manifest.
        token_counts: (D,) number of tokens of each document.

    Raises:
        PromptLengthsError: The bytes of the file are not those that were written for this shard.
    """
    lengths = read_beside(path, entry, _KIND, _TENSOR, _DTYPE, (), PromptLengthsError)
    if lengths is None:
        return np.zeros(entry.documents, np.int32)
    if (lengths < 0).any() or (lengths > token_counts).any():
        raise PromptLengthsError("a prompt is longer than its document", file=prompts_name(entry.file))
    return lengths
