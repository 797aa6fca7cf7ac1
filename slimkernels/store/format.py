"""Defines the settings of a store and the layout of a shard (FORMAT.md is the normative text).

Safetensors headers are built here and not by the safetensors package, because their bytes are part of the
format: a manifest entry determines its shard's header completely, so a reader compares and never interprets it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from typing import Any

from slimkernels import _checks
from slimkernels.packed_logits import row_words
from slimkernels.store.codec import (
    AFFINE_CODECS,
    HASH_BYTES,
    VALUE_BITS,
    ragged_value_offset,
    value_bytes,
)
from slimkernels.store.hidden import HIDDEN_BITS

FORMAT = "slimkernels-store"
# Versions of a new store of logits, and of hidden states. Stores of every version of VERSIONS are read and appended to;
# a store keeps its own.
VERSION, HIDDEN_VERSION = 2, 3
VERSIONS = (1, VERSION, HIDDEN_VERSION)
MANIFEST_NAME = "manifest.json"
HEAD_NAME = "head.safetensors"
LOCK_NAME = "writer.lock"
TEMPORARY_SUFFIX = ".tmp"
CHECKSUM_BYTES = 16
MAX_MANIFEST_BYTES = 1 << 28
MAX_TEMPERATURES = 64
MAX_PARTS = 1 << 16
# No count of a store reaches this; it keeps products of two counts far from anything a reader would allocate.
MAX_COUNT = 1 << 48

CHECKSUM_DIGITS = re.compile(f"[0-9a-f]{{{2 * CHECKSUM_BYTES}}}")
_ITEM_BYTES = {"U8": 1, "I8": 1, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8}
_VALUE_DTYPES = {"affine8": "U8", "affine6": "U8", "bfloat16": "BF16", "float32": "F32"}
# The tensors that head_checksum covers; they come first.
_HEAD_TENSORS = frozenset(
    {
        "document_row_offsets",
        "document_token_offsets",
        "entry_offsets",
        "id_word_offsets",
        "row_checksums",
        "document_hashes",
        "positions",
    }
)


def shard_name(index: int) -> str:
    """Returns the only valid name of the shard at this index in the manifest."""
    return f"shard-{index:06d}.safetensors"


def part_name(part: int) -> str:
    """Returns the name of the directory of a part inside a store of parts."""
    return f"part-{part:05d}"


def part_of(digest: bytes, num_parts: int) -> int:
    """Returns the part that holds the document with this hash."""
    return int.from_bytes(digest[:8], "little") % num_parts


def new_digest() -> hashlib.blake2b:
    """Starts the hash of every checksum in the manifest: BLAKE2b-128, written as 32 lower-case hexadecimal digits."""
    return hashlib.blake2b(digest_size=CHECKSUM_BYTES)


@dataclasses.dataclass(frozen=True)
class HiddenSettings:
    """Settings of a store that keeps hidden states in place of logits.

    Attributes:
        hidden_size: D, in [1, 2^31).
        top_k: K, in [1, V]. Number of logits of the rows that are made of the hidden states.
        head_bytes: Size of the file of the teacher's head.
        head_checksum: Checksum of this file.
    """

    hidden_size: int
    top_k: int
    head_bytes: int
    head_checksum: str

    @classmethod
    def parse(cls, content: Any, vocab_size: int) -> HiddenSettings:
        """Checks every field.

        Raises:
            ValueError: A field is missing, unknown, of the wrong type or out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(content, dict) or content.keys() != set(names):
            raise ValueError(f"hidden must be an object with the keys {names}, got {content!r}")
        for name, largest in (("hidden_size", (1 << 31) - 1), ("top_k", vocab_size), ("head_bytes", MAX_COUNT - 1)):
            if type(content[name]) is not int or not 1 <= content[name] <= largest:
                raise ValueError(f"hidden.{name} must be an int in [1, {largest}], got {content[name]!r}")
        if not isinstance(content["head_checksum"], str) or not CHECKSUM_DIGITS.fullmatch(content["head_checksum"]):
            raise ValueError(
                f"hidden.head_checksum must be {2 * CHECKSUM_BYTES} hexadecimal digits, got "
                f"{content['head_checksum']!r}"
            )
        return cls(**content)


@dataclasses.dataclass(frozen=True)
class StoreSettings:
    """Settings shared by all documents of a store; a writer that appends to it must be given the same.

    Attributes:
        vocab_size: V, in [1, 2^31).
        tokenizer_fingerprint: Text that identifies the tokenizer.
        teacher: JSON object that describes the teacher (name, revision, dtype, ...).
        selection: JSON object that describes how the kept ids were chosen.
        temperatures: Temperatures of the stored lse; the first is 1.0.
        codec: "affine8", "affine6", "bfloat16" or "float32"; "hidden8" or "hidden16" for hidden states.
        hidden: Settings of a store of hidden states; None for one of logits.
    """

    vocab_size: int
    tokenizer_fingerprint: str
    teacher: dict[str, Any]
    selection: dict[str, Any]
    temperatures: tuple[float, ...]
    codec: str
    hidden: HiddenSettings | None = None

    def content(self) -> dict[str, Any]:
        """Returns the settings as a JSON object; those of logits have no key ``hidden``."""
        content = dataclasses.asdict(self)
        if self.hidden is None:
            del content["hidden"]
        return content

    def __post_init__(self) -> None:
        if type(self.vocab_size) is not int or not 1 <= self.vocab_size < 1 << 31:
            raise ValueError(f"vocab_size must be an int in [1, 2^31), got {self.vocab_size!r}")
        if not isinstance(self.tokenizer_fingerprint, str):
            raise ValueError(f"tokenizer_fingerprint must be a str, got {self.tokenizer_fingerprint!r}")
        for name in ("teacher", "selection"):
            value = getattr(self, name)
            if not isinstance(value, dict):
                raise ValueError(f"{name} must be a dict that JSON can hold, got {value!r}")
            try:
                plain = json.loads(json.dumps(value, allow_nan=False))
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"{name} must be a dict that JSON can hold, got {value!r} ({error})") from error
            object.__setattr__(self, name, plain)
        try:
            temperatures = tuple(float(t) for t in self.temperatures)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"temperatures must be numbers, got {self.temperatures!r}") from error
        if not 1 <= len(temperatures) <= MAX_TEMPERATURES or temperatures[0] != 1.0:
            raise ValueError(
                f"temperatures must be 1 to {MAX_TEMPERATURES} numbers and start with 1.0, got {self.temperatures!r}"
            )
        for temperature in temperatures:
            _checks.as_temperature(temperature, "temperatures")
        object.__setattr__(self, "temperatures", temperatures)
        if not isinstance(self.codec, str) or self.codec not in VALUE_BITS.keys() | HIDDEN_BITS.keys():
            raise ValueError(f"codec must be one of {[*VALUE_BITS, *HIDDEN_BITS]}, got {self.codec!r}")
        if (self.hidden is not None) != (self.codec in HIDDEN_BITS):
            raise ValueError(f"hidden must be given with the codecs {list(HIDDEN_BITS)} alone, got {self.codec!r}")
        if self.hidden is not None:
            hidden = dataclasses.asdict(self.hidden) if isinstance(self.hidden, HiddenSettings) else self.hidden
            object.__setattr__(self, "hidden", HiddenSettings.parse(hidden, self.vocab_size))


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """The entry of one shard in the manifest.

    Attributes:
        file: Name of the shard inside the store.
        bytes: Size of the file.
        documents, tokens, rows, entries: Counts; tokens are those of the sequences.
        id_words: Number of 32-bit words of the ids of all rows.
        top_k: Number of entries of every row, or None if rows differ or there are none.
        rest_lse: Whether the shard holds the rows' ``rest_lse``; never in a store of version 1.
        head_checksum: Checksum of the bytes up to the end of the index.
        checksum: Checksum of all bytes.
    """

    file: str
    bytes: int
    documents: int
    tokens: int
    rows: int
    entries: int
    id_words: int
    top_k: int | None
    rest_lse: bool = False
    head_checksum: str = ""
    checksum: str = ""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor of a shard, and its bytes [start, stop) in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """The header and the tensors of a shard; ``head_bytes`` ends its index, ``total_bytes`` the file."""

    header: bytes
    tensors: tuple[TensorSpec, ...]
    head_bytes: int
    total_bytes: int


def shard_layout(settings: StoreSettings, entry: ShardEntry) -> ShardLayout:
    """Lays out a shard from the counts of its manifest entry alone."""
    documents, rows, top_k = entry.documents, entry.rows, entry.top_k
    tensors: list[tuple[str, str, tuple[int, ...]]] = [
        ("document_row_offsets", "I64", (documents + 1,)),
        ("document_token_offsets", "I64", (documents + 1,)),
    ]
    if top_k is None and settings.hidden is None:
        tensors += [("entry_offsets", "I64", (rows + 1,)), ("id_word_offsets", "I64", (rows + 1,))]
    tensors += [
        ("row_checksums", "U64", (rows,)),
        ("document_hashes", "U8", (documents, HASH_BYTES)),
        ("positions", "I32", (rows,)),
        ("input_ids", "I32", (entry.tokens,)),
    ]
    if settings.hidden is None:
        tensors += _logits_tensors(settings, entry)
    else:
        tensors += _hidden_tensors(settings.codec, rows, settings.hidden.hidden_size)

    metadata = {
        "format": FORMAT,
        "version": _shard_version(settings, entry),
        "vocab_size": str(settings.vocab_size),
        "codec": settings.codec,
        **({} if settings.hidden else {"top_k": "ragged" if top_k is None else str(top_k)}),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    ends, offset = [], 0
    for name, dtype, shape in tensors:
        start, offset = offset, offset + math.prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, offset]}
        ends.append((start, offset))
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    specs = tuple(
        TensorSpec(name, dtype, shape, base + start, base + stop)
        for (name, dtype, shape), (start, stop) in zip(tensors, ends, strict=True)
    )
    return ShardLayout(
        header=len(text).to_bytes(8, "little") + text,
        tensors=specs,
        head_bytes=max(spec.stop for spec in specs if spec.name in _HEAD_TENSORS),
        total_bytes=base + offset,
    )


def _shard_version(settings: StoreSettings, entry: ShardEntry) -> str:
    if settings.hidden is not None:
        return str(HIDDEN_VERSION)
    # A shard without rest_lse is one of version 1, byte for byte.
    return "2" if entry.rest_lse else "1"


def _logits_tensors(settings: StoreSettings, entry: ShardEntry) -> list[tuple[str, str, tuple[int, ...]]]:
    """Returns the tensors of the rows of a store of logits."""
    rows, top_k = entry.rows, entry.top_k
    tensors: list[tuple[str, str, tuple[int, ...]]] = [("lse", "F32", (rows, len(settings.temperatures)))]
    if entry.rest_lse:
        tensors += [("rest_lse", "F32", (rows, len(settings.temperatures)))]
    tensors += [("target_logit", "F32", (rows,))]
    if settings.codec in AFFINE_CODECS:
        tensors += [("affine", "F32", (rows, 2))]
    id_shape = (entry.id_words,) if top_k is None else (rows, row_words(settings.vocab_size, top_k))
    # The shape counts elements of the dtype; those of affine6 are bytes.
    item_bytes = _ITEM_BYTES[value_dtype := _VALUE_DTYPES[settings.codec]]
    if top_k is None:
        value_shape = (ragged_value_offset(settings.codec, rows, entry.entries) // item_bytes,)
    else:
        value_shape = (rows, value_bytes(settings.codec, top_k) // item_bytes)
    tensors += [("id_words", "U32", id_shape), ("values", value_dtype, value_shape)]
    return tensors


def _hidden_tensors(codec: str, rows: int, hidden_size: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Returns the tensors of the rows of a store of hidden states."""
    shape = (rows, hidden_size)
    if codec == "hidden16":
        return [("hidden", "BF16", shape)]
    return [("scale", "F32", (rows,)), ("hidden", "I8", shape)]
