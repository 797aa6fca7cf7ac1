"""Makes packed rows for tests with the store's encoder, and decodes them independently."""

from __future__ import annotations

import numpy as np
import torch
from support import store_oracle as oracle
from torch import Tensor

from slimkernels import PackedLogits
from slimkernels.packed_logits import row_words
from slimkernels.store.codec import AFFINE_CODECS, encode_rows, offsets_of, packed_rows, ragged_values, words_of

VALUE_DTYPES = {"affine8": torch.uint8, "affine6": torch.uint8, "bfloat16": torch.bfloat16, "float32": torch.float32}


def random_ids(vocab_size: int, counts: list[int], seed: int = 0) -> list[list[int]]:
    """Draws ascending ids; those of some rows are crowded at one end of the vocabulary."""
    generator = np.random.default_rng(seed)
    rows = []
    for r, count in enumerate(counts):
        span = vocab_size if r % 3 else min(vocab_size, 2 * count)
        start = vocab_size - span if r % 2 else 0
        some = generator.choice(span, count, replace=False) if span < 10**6 else generator.integers(0, span, count)
        distinct = sorted({*some.tolist()})
        rows.append([start + i for i in distinct])
    return rows


def pack(ids: list[list[int]], vocab_size: int, codec: str, *, ragged: bool | None = None, seed: int = 0):
    """Returns PackedLogits of rows with these ids and random logits."""
    width = max(map(len, ids))
    padded = np.full((len(ids), width), -1, np.int32)
    for r, row in enumerate(ids):
        padded[r, : len(row)] = row
    logits = np.random.default_rng(seed).normal(size=padded.shape).astype(np.float32) * 5
    scalars = np.full((len(ids), 1), 1e6, np.float32), np.zeros(len(ids), np.float32)
    encoded = encode_rows(padded, logits, *scalars, vocab_size=vocab_size, codec=codec, first_row=0)
    if ragged is None:
        ragged = len({*map(len, ids)}) > 1
    rows = packed_rows(
        vocab_size=vocab_size,
        codec=codec,
        top_k=None if ragged else width,
        first_row=0,
        num_rows=len(ids),
        arrays={
            "entry_offsets": offsets_of(encoded.counts),
            "id_word_offsets": offsets_of(words_of(vocab_size, encoded.counts)),
            "id_words": encoded.id_words,
            "values": ragged_values(codec, encoded.counts, encoded.values) if ragged else encoded.values,
        },
    )
    return PackedLogits(
        id_words=torch.from_numpy(rows.id_words.view(np.int32)),
        values=torch.from_numpy(rows.values).view(VALUE_DTYPES[codec]),
        affine=torch.from_numpy(encoded.affine) if codec in AFFINE_CODECS else None,
        counts=None if rows.counts is None else torch.from_numpy(rows.counts),
        lse=torch.from_numpy(scalars[0]),
        target_logit=torch.from_numpy(scalars[1]),
        vocab_size=vocab_size,
    )


def oracle_row(packed: PackedLogits, row: int) -> tuple[Tensor, Tensor] | None:
    """Returns the padded row as tests/support/store_oracle.py decodes it; None if its ids are invalid."""
    count = packed.top_k if packed.counts is None else int(packed.counts[row])
    if not 1 <= count <= packed.top_k:
        return None
    num_words = row_words(packed.vocab_size, count)
    if num_words > packed.id_words.shape[1]:
        return None
    words = packed.id_words[row, :num_words].numpy().view(np.uint32)
    try:
        # The oracle encodes the decoded ids again and compares, so every bit is checked.
        ids = oracle.decode_ids(packed.vocab_size, count, words)
    except (AssertionError, IndexError):
        return None
    if (np.diff(ids) <= 0).any() or ids[0] < 0 or ids[-1] >= packed.vocab_size:
        return None
    codec = next(codec for codec, dtype in VALUE_DTYPES.items() if dtype == packed.values.dtype)
    raw = packed.values[row, :count].contiguous().view(torch.uint8).numpy().tobytes()
    affine = None if packed.affine is None else packed.affine[row].numpy()
    logits = oracle.decode_values(codec, raw, affine, count)
    padding = packed.top_k - count
    return (
        torch.from_numpy(np.pad(ids, (0, padding), constant_values=-1).astype(np.int32)),
        torch.from_numpy(np.pad(logits, (0, padding))),
    )
