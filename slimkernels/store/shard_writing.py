"""Writes the documents of one shard of a store into its file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimkernels.durable import write_durably
from slimkernels.store.codec import EncodedRows, offsets_of, ragged_values, words_of
from slimkernels.store.format import ShardEntry, StoreSettings, new_digest, shard_layout
from slimkernels.store.hidden import EncodedHidden


@dataclasses.dataclass(frozen=True, eq=False)
class PendingDocument:
    """A document that is encoded and not written: ``digest`` is its hash, ``context`` that of what the teacher read."""

    input_ids: np.ndarray
    digest: bytes
    positions: np.ndarray
    rows: EncodedRows | EncodedHidden
    prompt_length: int
    context: bytes


def write_shard(settings: StoreSettings, documents: Sequence[PendingDocument], path: Path, name: str) -> ShardEntry:
    """Writes a shard to ``path``, durably, and returns its entry in the manifest, under ``name``."""
    tensors: dict[str, list[np.ndarray]] = {
        "document_row_offsets": [offsets_of(np.array([len(document.rows) for document in documents]))],
        "document_token_offsets": [offsets_of(np.array([len(document.input_ids) for document in documents]))],
        "document_hashes": [np.frombuffer(document.digest, np.uint8) for document in documents],
        "positions": [document.positions for document in documents],
        "input_ids": [document.input_ids for document in documents],
    }
    rows: list[Any] = [document.rows for document in documents]
    row_tensors, counts = _logits_tensors(settings, rows) if settings.hidden is None else _hidden_tensors(rows)
    tensors |= row_tensors
    entry = ShardEntry(
        file=name,
        bytes=0,
        documents=len(documents),
        tokens=sum(len(document.input_ids) for document in documents),
        rows=sum(map(len, rows)),
        **counts,
    )
    layout = shard_layout(settings, entry)
    head, whole = new_digest(), new_digest()
    chunks: list[Any] = [layout.header]
    head.update(layout.header)
    for spec in layout.tensors:
        for array in tensors[spec.name]:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            if spec.stop <= layout.head_bytes:
                head.update(data)
            chunks.append(data)
    for chunk in chunks:
        whole.update(chunk)
    write_durably(path, chunks)
    return dataclasses.replace(
        entry, bytes=layout.total_bytes, head_checksum=head.hexdigest(), checksum=whole.hexdigest()
    )


def _logits_tensors(
    settings: StoreSettings, rows: list[EncodedRows]
) -> tuple[dict[str, list[np.ndarray]], dict[str, Any]]:
    """Returns the tensors of the rows of a shard of logits, and the counts of its entry."""
    counts = np.concatenate([document.counts for document in rows])
    top_k = int(counts[0]) if len(counts) and (counts == counts[0]).all() else None
    has_rest = any(document.rest_lse is not None and len(document) for document in rows)
    tensors = {
        "row_checksums": [document.checksums_with_rest() if has_rest else document.checksums for document in rows],
        "lse": [document.lse for document in rows],
        "target_logit": [document.target_logit for document in rows],
        "affine": [document.affine for document in rows],
        "id_words": [document.id_words for document in rows],
        "values": [document.values for document in rows],
    }
    if has_rest:
        tensors["rest_lse"] = [document.rest_or_unknown() for document in rows]
    if top_k is None:
        tensors["entry_offsets"] = [offsets_of(counts)]
        tensors["id_word_offsets"] = [offsets_of(words_of(settings.vocab_size, counts))]
        tensors["values"] = [ragged_values(settings.codec, counts, np.concatenate(tensors["values"]))]
    sizes = {
        "entries": int(counts.sum()),
        "id_words": sum(len(document.id_words) for document in rows),
        "top_k": top_k,
        "rest_lse": has_rest,
    }
    return tensors, sizes


def _hidden_tensors(rows: list[EncodedHidden]) -> tuple[dict[str, list[np.ndarray]], dict[str, Any]]:
    """Returns the tensors of the rows of a shard of hidden states, and the counts of its entry."""
    tensors = {
        "row_checksums": [document.checksums for document in rows],
        "scale": [document.scale for document in rows],
        "hidden": [document.values for document in rows],
    }
    return tensors, {"entries": 0, "id_words": 0, "top_k": None}
