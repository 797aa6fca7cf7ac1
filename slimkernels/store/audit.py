"""Describes a store (``info``) and checks every byte of it (``verify``)."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimkernels.packed_logits import row_words
from slimkernels.store.codec import VALUE_BITS, document_hash
from slimkernels.store.contexts import NO_CONTEXT, contexts_name
from slimkernels.store.errors import (
    DuplicateDocumentError,
    MisplacedDocumentError,
    MissingDocumentError,
    ShardChecksumError,
    StoreError,
    UnexpectedFileError,
)
from slimkernels.store.format import (
    HEAD_NAME,
    LOCK_NAME,
    MANIFEST_NAME,
    TEMPORARY_SUFFIX,
    new_digest,
    part_name,
    part_of,
    shard_name,
)
from slimkernels.store.hidden import HIDDEN_BITS
from slimkernels.store.manifest import load_manifest
from slimkernels.store.prompts import prompts_name
from slimkernels.store.quantisation import quantisation_error
from slimkernels.store.reader import Store
from slimkernels.store.shard import tokens_as_int32

_READ_BYTES = 1 << 20


def verify(path: str | os.PathLike[str]) -> None:
    """Checks that every byte of a store is the one that was written, and that its content is consistent.

    Reads every file once and decodes every row. Files that a killed writer may leave are ignored, because none of
    their documents was reported written: the temporary files of the next shard and of the manifest, and, if there is a
    temporary manifest, the next shard itself. A writer may append during the check.

    Args:
        path: Directory of the store.

    Raises:
        StoreError: The first fault found; its ``file``, ``document`` and ``row`` say where.
    """
    directory = Path(path)
    store = Store(directory)
    num_parts = store.num_parts
    if store.head is not None:
        store.head.read()
    seen: dict[bytes, int] = {}
    if num_parts is None:
        _verify_shards(directory, seen)
        return
    parts = [part_name(part) for part in range(num_parts)]
    _check_names(directory, set(os.listdir(directory)), {MANIFEST_NAME, *_head_files(store), *parts}, set())
    for part, name in enumerate(parts):
        try:
            for digest, document in _verify_shards(directory / name, seen).items():
                if part_of(digest, num_parts) != part:
                    right = part_name(part_of(digest, num_parts))
                    raise MisplacedDocumentError(f"its hash belongs to {right}", document=document)
        except StoreError as error:
            raise error.within(name) from error


def verify_complete(path: str | os.PathLike[str], documents: Iterable[Sequence[int]]) -> int:
    """Checks that a store holds every document of a corpus that has a label.

    Args:
        path: Directory of the store.
        documents: Token id lists, as they were captured.

    Returns:
        The number of documents of at least 2 tokens, which must be in the store.

    Raises:
        MissingDocumentError: Documents are missing; the message says how many, and identifies the first.
        StoreError: The store cannot be opened, or its index is damaged.
        ValueError: A token id is outside the store's vocabulary, so this is not the corpus of the store.
    """
    store = Store(path)
    looked_for, missing, first = 0, 0, ""
    for number, document in enumerate(documents, 1):
        if len(document) < 2:
            continue
        looked_for += 1
        if document in store:
            continue
        missing += 1
        if missing == 1:
            digest = document_hash(tokens_as_int32(document, store.vocab_size)).hex()
            start = ", ".join(map(str, document[:8]))
            first = f"document {number} of the corpus (hash {digest}, {len(document)} tokens: {start}, ...)"
    if missing:
        raise MissingDocumentError(
            f"{missing} of {looked_for} documents are not in {path}, the first is {first}: run the same capture again"
        )
    return looked_for


def _verify_shards(directory: Path, seen: dict[bytes, int]) -> dict[bytes, int]:
    """Checks a directory of shards, adds its documents to ``seen``, and returns their indices by hash."""
    # A writer may append between reading the manifest and listing the files.
    while True:
        manifest = load_manifest(directory)[0]
        store = Store(directory)
        names = set(os.listdir(directory))
        if load_manifest(directory)[0] == manifest:
            break
    _check_files(store, names)
    found: dict[bytes, int] = {}
    index = len(seen)
    for number, entry in enumerate(store.shards):
        shard = store.shard(number)
        shard.context_hashes()
        for document, digest in enumerate(shard.hashes()):
            if digest in seen:
                raise DuplicateDocumentError(f"is document {seen[digest]} again", file=entry.file, document=index)
            seen[digest] = found[digest] = index
            shard.tokens(document, index)
            start, stop = shard.rows_of(document)
            shard.check_rows(start, stop, index)
            index += 1
        whole = new_digest()
        with open(directory / entry.file, "rb") as file:
            while data := file.read(_READ_BYTES):
                whole.update(data)
        if whole.hexdigest() != entry.checksum:
            raise ShardChecksumError("its bytes are not those that were written", file=entry.file)
    return found


def _check_files(store: Store, names: set[str]) -> None:
    next_shard = shard_name(len(store.shards))
    leftovers = {next_shard + TEMPORARY_SUFFIX, MANIFEST_NAME + TEMPORARY_SUFFIX}
    leftovers |= {prompts_name(next_shard), contexts_name(next_shard)}
    if MANIFEST_NAME + TEMPORARY_SUFFIX in names:
        leftovers.add(next_shard)
    shards = [entry.file for entry in store.shards]
    expected = {MANIFEST_NAME, *_head_files(store), *shards, *map(prompts_name, shards), *map(contexts_name, shards)}
    _check_names(store.path, names, expected, leftovers)


def _head_files(store: Store) -> list[str]:
    return [] if store.head is None else [HEAD_NAME]


def _check_names(directory: Path, names: set[str], expected: set[str], leftovers: set[str]) -> None:
    for name in sorted(names - expected - leftovers - {LOCK_NAME}):
        raise UnexpectedFileError("is not part of the store: move it elsewhere", file=name)
    for name in sorted(names & (leftovers | {LOCK_NAME})):
        try:
            status = os.lstat(directory / name)
        except FileNotFoundError:
            # A concurrent writer has given it its final name.
            continue
        if not stat.S_ISREG(status.st_mode) or (name == LOCK_NAME and status.st_size > 0):
            raise UnexpectedFileError("is not a file that a writer makes under this name", file=name)


def info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the counts, the size, the quantisation error and the settings of a store.

    Args:
        path: Directory of the store.

    Returns:
        A dict that JSON can hold. ``tokens`` counts the tokens of the sequences, ``rows`` those with a teacher row,
        ``rest_lse_rows`` the rows of shards that hold the log-sum-exp of what a row leaves out, and ``entries`` the
        kept (id, logit) pairs. ``documents_in_context`` counts the documents in whose place the teacher read another
        text that ends in them, such as one behind a prefix. ``bytes`` is the size of all files, manifests included;
        ``bits_per_entry`` and ``bytes_per_token`` divide it by entries and tokens (0 for an empty store).
        ``entropy_bound_bits_per_entry`` is a lower bound for any coder of the same rows if every set of K ids is
        equally likely and the stored values are incompressible: the mean over entries of log2(C(V, K)) / K
        for the ids, plus the bits of one stored value. It counts nothing else of a row.
        ``quantisation_kl_nats``, ``quantisation_gradient`` and ``quantisation_log_mass`` are the cost of rounding the
        kept logits; :func:`slimkernels.store.quantisation.quantisation_error` estimates it from some of the rows.
        The entries of a store of hidden states are those of the rows that are made of them, which have no such bound.
        ``bytes_per_token_affine8``, ``bytes_per_token_hidden8`` and ``bytes_per_token_hidden16`` are the sizes of the
        same documents and rows with these codecs, without ``head_bytes``, the teacher's head, which a store of hidden
        states holds once. ``smallest_codec`` is the smallest of them for these documents, head included. All of this
        only where the size of the teacher's hidden states is known.

    Raises:
        StoreError: The store cannot be opened, or a row that is read is damaged.
    """
    store = Store(path)
    settings, shards = store.settings, store.shards
    hidden = settings.hidden
    entries = sum(entry.entries for entry in shards) if hidden is None else store.num_rows * hidden.top_k
    tokens = sum(entry.tokens for entry in shards)
    folders = [store.path, *(store.path / part_name(part) for part in range(store.num_parts or 0))]
    beside = [store.path / name(entry.file) for entry in shards for name in (prompts_name, contexts_name)]
    files = [*(folder / MANIFEST_NAME for folder in folders), *(path for path in beside if path.exists())]
    total = sum(path.stat().st_size for path in files) + sum(entry.bytes for entry in shards)
    if hidden is not None:
        total += hidden.head_bytes
    found: dict[str, Any] = {
        "vocab_size": settings.vocab_size,
        "documents": len(store),
        "tokens": tokens,
        "rows": store.num_rows,
        "rest_lse_rows": sum(entry.rows for entry in shards if entry.rest_lse or hidden is not None),
        "entries": entries,
        "documents_in_context": _num_in_context(store),
        "shards": len(shards),
        "parts": store.num_parts or 1,
        "bytes": total,
        "bits_per_entry": 8 * total / entries if entries else 0.0,
        "bytes_per_token": total / tokens if tokens else 0.0,
        "entropy_bound_bits_per_entry": _entropy_bound(store, entries) if entries and hidden is None else 0.0,
        **quantisation_error(store),
        "codec": settings.codec,
        "temperatures": list(settings.temperatures),
        "teacher": settings.teacher,
        "selection": settings.selection,
        "tokenizer_fingerprint": settings.tokenizer_fingerprint,
    }
    found |= _sizes_by_codec(store, entries)
    return found


def _num_in_context(store: Store) -> int:
    hashes = (store.shard(number).context_hashes() for number in range(len(store.shards)))
    return sum(digest != NO_CONTEXT for of_shard in hashes for digest in of_shard)


def _entropy_bound(store: Store, entries: int) -> float:
    """Returns the least number of bits that any coder needs for an entry of a store of logits."""
    settings = store.settings
    bits = 0.0
    for number, entry in enumerate(store.shards):
        if entry.top_k is not None:
            bits += entry.rows * _log2_choose(settings.vocab_size, entry.top_k)
        else:
            counts = np.diff(store.shard(number).arrays["entry_offsets"])
            for count, rows in zip(*np.unique(counts, return_counts=True), strict=True):
                bits += int(rows) * _log2_choose(settings.vocab_size, int(count))
    return bits / entries + VALUE_BITS[settings.codec]


def _sizes_by_codec(store: Store, entries: int) -> dict[str, Any]:
    """Returns what these documents and rows take as logits and as hidden states, without manifests and headers.

    The size of a teacher's hidden states is not known of every store of logits; without it, or without rows, nothing is
    returned.
    """
    settings, rows = store.settings, store.num_rows
    size = settings.teacher.get("hidden_size") if settings.hidden is None else settings.hidden.hidden_size
    if type(size) is not int or size < 1 or not rows:
        return {}
    if settings.hidden is None:
        head = settings.vocab_size * size * (4 if settings.teacher.get("dtype") == "float32" else 2)
    else:
        head = settings.hidden.head_bytes
    tokens = sum(entry.tokens for entry in store.shards)
    top_k = max(1, entries // rows)
    # Every row has a checksum and a position; one of affine8 also scale, zero, label's logit, two sums per temperature.
    logits = top_k + 4 * row_words(settings.vocab_size, top_k) + 12 + 8 * len(settings.temperatures)
    row_bytes = {"affine8": logits, "hidden8": size + 4, "hidden16": 2 * size}
    sizes = {codec: 4 * tokens + rows * (12 + count) for codec, count in row_bytes.items()}
    whole = {codec: size + (head if codec in HIDDEN_BITS else 0) for codec, size in sizes.items()}
    per_token = {f"bytes_per_token_{codec}": size / tokens for codec, size in sizes.items()}
    return per_token | {"head_bytes": head, "smallest_codec": min(whole, key=lambda codec: whole[codec])}


def _log2_choose(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
