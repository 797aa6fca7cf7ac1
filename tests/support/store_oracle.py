"""Reads a store independently of the package, following only slimkernels/store/FORMAT.md: slow, plain and strict."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

_DTYPES = {"U8": "<u1", "BF16": "<u2", "I32": "<i4", "U32": "<u4", "F32": "<f4", "I64": "<i8", "U64": "<u8"}
_M64 = (1 << 64) - 1
_P1, _P2, _P3, _P4, _P5 = (
    11400714785074694791,
    14029467366897019727,
    1609587929392839161,
    9650029242287828579,
    2870177450012600261,
)


def _rotate(x: int, r: int) -> int:
    x &= _M64
    return ((x << r) | (x >> (64 - r))) & _M64


def _round(acc: int, lane: int) -> int:
    return _rotate(acc + lane * _P2, 31) * _P1 & _M64


def xxh64(data: bytes, seed: int) -> int:
    """Computes XXH64 following its published specification."""
    size, at = len(data), 0
    if size >= 32:
        acc = [(seed + _P1 + _P2) & _M64, (seed + _P2) & _M64, seed, (seed - _P1) & _M64]
        while at + 32 <= size:
            acc = [_round(a, lane) for a, lane in zip(acc, struct.unpack_from("<4Q", data, at), strict=True)]
            at += 32
        h = sum(_rotate(a, r) for a, r in zip(acc, (1, 7, 12, 18), strict=True)) & _M64
        for a in acc:
            h = ((h ^ _round(0, a)) * _P1 + _P4) & _M64
    else:
        h = (seed + _P5) & _M64
    h = (h + size) & _M64
    while at + 8 <= size:
        h = (_rotate(h ^ _round(0, struct.unpack_from("<Q", data, at)[0]), 27) * _P1 + _P4) & _M64
        at += 8
    while at + 4 <= size:
        h = (_rotate(h ^ (struct.unpack_from("<I", data, at)[0] * _P1 & _M64), 23) * _P2 + _P3) & _M64
        at += 4
    for byte in data[at:]:
        h = _rotate(h ^ (byte * _P5 & _M64), 11) * _P1 & _M64
    for shift, prime in ((33, _P2), (29, _P3)):
        h = (h ^ (h >> shift)) * prime & _M64
    return h ^ (h >> 32)


def id_layout(vocab_size: int, top_k: int) -> tuple[int, int, int]:
    """Returns the low bits per id, the words of the low part, and the words of the high part."""
    low_bits = math.floor(math.log2(vocab_size // top_k))
    buckets = math.ceil(vocab_size / 2**low_bits)
    return low_bits, math.ceil(top_k * low_bits / 32), math.ceil((top_k + buckets) / 32)


def encode_ids(vocab_size: int, ids: list[int]) -> list[int]:
    low_bits, low_words, high_words = id_layout(vocab_size, len(ids))
    low = sum((i % 2**low_bits) << (j * low_bits) for j, i in enumerate(ids))
    high = sum(1 << ((i >> low_bits) + j) for j, i in enumerate(ids))
    return [(low >> (32 * w)) & 0xFFFFFFFF for w in range(low_words)] + [
        (high >> (32 * w)) & 0xFFFFFFFF for w in range(high_words)
    ]


def decode_ids(vocab_size: int, top_k: int, words: np.ndarray) -> np.ndarray:
    low_bits, low_words, high_words = id_layout(vocab_size, top_k)
    bits = np.unpackbits(np.ascontiguousarray(words, "<u4").view(np.uint8), bitorder="little")
    assert len(bits) == 32 * (low_words + high_words)
    low = bits[: top_k * low_bits].reshape(top_k, low_bits).astype(np.int64) @ (1 << np.arange(low_bits))
    ones = np.flatnonzero(bits[32 * low_words :])
    assert len(ones) == top_k
    ids = ((ones - np.arange(top_k)) << low_bits) + low
    assert encode_ids(vocab_size, ids.tolist()) == words.tolist()
    return ids


def row_bytes(codec: str, count: int) -> int:
    """Returns the bytes of the values of a row."""
    return math.ceil(count * {"affine8": 8, "affine6": 6, "bfloat16": 16, "float32": 32}[codec] / 8)


def value_start(codec: str, row: int, entry: int, *, ragged: bool) -> int:
    """Returns the offset of the values of a row that has ``entry`` entries before it."""
    if codec != "affine6":
        return entry * row_bytes(codec, 1)
    return math.floor(6 * entry / 8) + row if ragged else row * row_bytes(codec, entry // row) if row else 0


def decode_values(codec: str, raw: bytes, affine: np.ndarray | None, count: int) -> np.ndarray:
    if codec == "float32":
        return np.frombuffer(raw, "<f4")
    if codec == "bfloat16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    scale, zero = affine.astype(np.float64)
    values = np.frombuffer(raw, "u1")
    if codec == "affine6":
        bits = np.unpackbits(values, bitorder="little")
        assert not bits[6 * count :].any()
        values = bits[: 6 * count].reshape(count, 6) @ (1 << np.arange(6))
    # scale * value is exact in float32, and so it is here; the sum is rounded once to float32.
    return (zero + scale * values).astype(np.float32)


class OracleRow(NamedTuple):
    position: int
    ids: np.ndarray
    logits: np.ndarray
    lse: np.ndarray
    target_logit: np.float32
    rest_lse: np.ndarray | None


def read_shard(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the tensors (bfloat16 as uint16) and the metadata of a safetensors file."""
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    tensors, end = {}, 0
    for name, spec in header.items():
        start, stop = spec["data_offsets"]
        assert start == end
        end = stop
        tensors[name] = np.frombuffer(data[8 + size + start : 8 + size + stop], _DTYPES[spec["dtype"]]).reshape(
            spec["shape"]
        )
    assert 8 + size + end == len(data)
    return tensors, metadata


def read_store(path: Path) -> list[tuple[np.ndarray, list[OracleRow]]]:
    """Reads the token ids and the rows of every document of a store, and checks all checksums."""
    text = (path / "manifest.json").read_bytes()
    manifest = json.loads(text)
    assert blake(text[:16] + b"0" * 32 + text[48:]) == manifest["checksum"]
    documents = []
    for entry in manifest["shards"]:
        data = (path / entry["file"]).read_bytes()
        assert blake(data) == entry["checksum"]
        assert len(data) == entry["bytes"]
        tensors, metadata = read_shard(data)
        assert ("rest_lse" in entry) == (manifest["version"] == 2)
        assert ("rest_lse" in tensors) == entry.get("rest_lse", False)
        assert metadata["version"] == ("2" if "rest_lse" in tensors else "1")
        documents += _read_documents(manifest, entry, tensors)
    return documents


def _read_documents(manifest: dict, entry: dict, tensors: dict[str, np.ndarray]):
    vocab_size, codec = manifest["vocab_size"], manifest["codec"]
    rows = range(entry["rows"])
    if entry["top_k"] is None:
        entries, words = tensors["entry_offsets"], tensors["id_word_offsets"]
    else:
        entries = [r * entry["top_k"] for r in range(len(rows) + 1)]
        words = [r * entry["id_words"] // max(1, len(rows)) for r in range(len(rows) + 1)]
    all_words, values = tensors["id_words"].reshape(-1), tensors["values"].tobytes()
    starts = [value_start(codec, r, int(entry_), ragged=entry["top_k"] is None) for r, entry_ in enumerate(entries)]
    assert starts[-1] == len(values)
    decoded = []
    for r in rows:
        count = int(entries[r + 1] - entries[r])
        row_words, stop = all_words[words[r] : words[r + 1]], starts[r] + row_bytes(codec, count)
        raw = values[starts[r] : stop]
        assert not any(values[stop : starts[r + 1]])
        affine = tensors["affine"][r] if "affine" in tensors else None
        rest_lse = tensors["rest_lse"][r] if "rest_lse" in tensors else None
        parts = [tensors["lse"][r], tensors["target_logit"][r], affine, row_words, raw, rest_lse]
        h = r
        for part in parts:
            if part is not None:
                h = xxh64(part if isinstance(part, bytes) else part.tobytes(), h)
        assert h == tensors["row_checksums"][r]
        decoded.append(
            OracleRow(
                int(tensors["positions"][r]),
                decode_ids(vocab_size, count, row_words),
                decode_values(codec, raw, affine, count),
                tensors["lse"][r],
                tensors["target_logit"][r],
                rest_lse,
            )
        )
    for d in range(entry["documents"]):
        start, stop = tensors["document_token_offsets"][d : d + 2]
        ids = tensors["input_ids"][start:stop]
        assert hashlib.blake2b(ids.tobytes(), digest_size=16).digest() == tensors["document_hashes"][d].tobytes()
        start, stop = tensors["document_row_offsets"][d : d + 2]
        yield ids, decoded[start:stop]


def blake(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
