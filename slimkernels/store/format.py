"""Defines the bytes of a store: the manifest and the layout of a shard (FORMAT.md is the normative text).

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
from slimkernels.store.errors import (
    ManifestChecksumError,
    ManifestFieldError,
    ManifestSyntaxError,
    ShardNameError,
    UnsupportedVersionError,
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
_MAX_COUNT = 1 << 48

_CHECKSUM_PREFIX = b'{\n "checksum": "'
_CHECKSUM_HOLE = b"0" * (2 * CHECKSUM_BYTES)
_HEX = re.compile(f"[0-9a-f]{{{2 * CHECKSUM_BYTES}}}")
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
        for name, largest in (("hidden_size", (1 << 31) - 1), ("top_k", vocab_size), ("head_bytes", _MAX_COUNT - 1)):
            if type(content[name]) is not int or not 1 <= content[name] <= largest:
                raise ValueError(f"hidden.{name} must be an int in [1, {largest}], got {content[name]!r}")
        if not isinstance(content["head_checksum"], str) or not _HEX.fullmatch(content["head_checksum"]):
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


def seal_manifest(content: dict[str, Any]) -> bytes:
    """Returns the bytes of a manifest with this content, preceded by its own checksum."""
    blank = {"checksum": _CHECKSUM_HOLE.decode()} | {k: v for k, v in content.items() if k != "checksum"}
    data = json.dumps(blank, indent=1, allow_nan=False).encode("ascii") + b"\n"
    digest = new_digest()
    digest.update(data)
    start = len(_CHECKSUM_PREFIX)
    return data[:start] + digest.hexdigest().encode() + data[start + len(_CHECKSUM_HOLE) :]


def unseal_manifest(data: bytes) -> dict[str, Any]:
    """Checks a manifest's own checksum, which covers every byte of it, and parses it.

    Raises:
        ManifestSyntaxError: The bytes do not have the form of a manifest.
        ManifestChecksumError: The bytes do not match the checksum.
    """
    start, stop = len(_CHECKSUM_PREFIX), len(_CHECKSUM_PREFIX) + len(_CHECKSUM_HOLE)
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestSyntaxError(f"holds more than {MAX_MANIFEST_BYTES} bytes", file=MANIFEST_NAME)
    if not data.startswith(_CHECKSUM_PREFIX) or len(data) < stop:
        raise ManifestSyntaxError("does not begin with its checksum", file=MANIFEST_NAME)
    digest = new_digest()
    digest.update(data[:start] + _CHECKSUM_HOLE + data[stop:])
    if data[start:stop] != digest.hexdigest().encode():
        raise ManifestChecksumError(
            f"its bytes have checksum {digest.hexdigest()}, but it says {data[start:stop].decode('latin-1')!r}",
            file=MANIFEST_NAME,
        )
    try:
        content = json.loads(data.decode("ascii"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ManifestSyntaxError(f"is not the JSON that the format requires: {error}", file=MANIFEST_NAME) from error
    if not isinstance(content, dict):
        raise ManifestSyntaxError("is not a JSON object", file=MANIFEST_NAME)
    return content


def version_of(settings: StoreSettings) -> int:
    """Returns the version of a new store with these settings."""
    return VERSION if settings.hidden is None else HIDDEN_VERSION


def manifest_content(
    settings: StoreSettings, shards: tuple[ShardEntry, ...], version: int | None = None
) -> dict[str, Any]:
    """Returns the manifest as a JSON object, without its checksum; of a new store where no version is given."""
    version = version_of(settings) if version is None else version
    return {
        "format": FORMAT,
        "version": version,
        **settings.content(),
        "shards": [{name: getattr(entry, name) for name in _entry_keys(version)} for entry in shards],
    }


def _entry_keys(version: int) -> list[str]:
    """Returns the keys of a shard's entry in a manifest of this version."""
    names = [field.name for field in dataclasses.fields(ShardEntry)]
    return [name for name in names if name != "rest_lse" or version > 1]


def parts_content(settings: StoreSettings, num_parts: int) -> dict[str, Any]:
    """Returns the manifest of a store of parts as a JSON object, without its checksum."""
    return {"format": FORMAT, "version": version_of(settings), **settings.content(), "parts": num_parts}


def parse_manifest(content: dict[str, Any]) -> tuple[StoreSettings, tuple[ShardEntry, ...]]:
    """Checks the type, the range and the consistency of every field of a manifest.

    Raises:
        UnsupportedVersionError: The version is another one.
        ManifestFieldError: A field is missing, unknown, of the wrong type or out of range, or contradicts another.
        ShardNameError: A shard does not have the name that its index requires.
    """
    settings = _parse_settings(content, "shards")
    if not isinstance(content["shards"], list):
        raise ManifestFieldError("shards must be a list", file=MANIFEST_NAME)
    keys = _entry_keys(content["version"])
    return settings, tuple(_parse_entry(settings, i, entry, keys) for i, entry in enumerate(content["shards"]))


def parse_parts(content: dict[str, Any]) -> tuple[StoreSettings, int]:
    """Checks every field of the manifest of a store of parts; returns its settings and the number of parts.

    Raises:
        UnsupportedVersionError: The version is another one.
        ManifestFieldError: A field is missing, unknown, of the wrong type or out of range.
    """
    settings, num_parts = _parse_settings(content, "parts"), content["parts"]
    if type(num_parts) is not int or not 1 <= num_parts <= MAX_PARTS:
        raise ManifestFieldError(f"parts must be an int in [1, {MAX_PARTS}], got {num_parts!r}", file=MANIFEST_NAME)
    return settings, num_parts


def _parse_settings(content: dict[str, Any], last_key: str) -> StoreSettings:
    if content.get("format") != FORMAT:
        raise ManifestFieldError(f"format must be {FORMAT!r}, got {content.get('format')!r}", file=MANIFEST_NAME)
    version = content.get("version")
    # Checked before any other key, because a newer version may have others.
    if type(version) is int and version > VERSIONS[-1]:
        raise UnsupportedVersionError(
            f"version must be at most {VERSIONS[-1]}, got {version}: a newer release of slimkernels wrote the store, "
            "update slimkernels to read it",
            file=MANIFEST_NAME,
        )
    if type(version) is not int or version not in VERSIONS:
        raise UnsupportedVersionError(f"version must be one of {VERSIONS}, got {version!r}", file=MANIFEST_NAME)
    settings_names = [field.name for field in dataclasses.fields(StoreSettings)]
    if version != HIDDEN_VERSION:
        settings_names.remove("hidden")
    _require_keys(content, ["checksum", "format", "version", *settings_names, last_key], "the manifest")
    if "hidden" in settings_names and content["hidden"] is None:
        raise ManifestFieldError("hidden must be an object, got null", file=MANIFEST_NAME)
    temperatures = content["temperatures"]
    if not isinstance(temperatures, list) or any(type(t) not in (int, float) for t in temperatures):
        raise ManifestFieldError(f"temperatures must be a list of numbers, got {temperatures!r}", file=MANIFEST_NAME)
    try:
        return StoreSettings(**{name: content[name] for name in settings_names})
    except ValueError as error:
        raise ManifestFieldError(str(error), file=MANIFEST_NAME) from error


def _parse_entry(settings: StoreSettings, index: int, content: Any, keys: list[str]) -> ShardEntry:
    where = f"shards[{index}]"
    if not isinstance(content, dict):
        raise ManifestFieldError(f"{where} must be an object, got {content!r}", file=MANIFEST_NAME)
    _require_keys(content, keys, where)
    if content["file"] != shard_name(index):
        raise ShardNameError(f"{where}.file must be {shard_name(index)!r}, got {content['file']!r}", file=MANIFEST_NAME)
    counts = ["bytes", "documents", "tokens", "rows", "entries", "id_words"]
    for name in counts if content["top_k"] is None else [*counts, "top_k"]:
        if type(content[name]) is not int or not 0 <= content[name] < _MAX_COUNT:
            raise ManifestFieldError(
                f"{where}.{name} must be an int in [0, 2^48), got {content[name]!r}", file=MANIFEST_NAME
            )
    for name in ("head_checksum", "checksum"):
        if not isinstance(content[name], str) or not _HEX.fullmatch(content[name]):
            raise ManifestFieldError(
                f"{where}.{name} must be {2 * CHECKSUM_BYTES} hexadecimal digits, got {content[name]!r}",
                file=MANIFEST_NAME,
            )
    if type(content.get("rest_lse", False)) is not bool:
        raise ManifestFieldError(
            f"{where}.rest_lse must be true or false, got {content['rest_lse']!r}", file=MANIFEST_NAME
        )
    entry = ShardEntry(**content)
    if contradiction := _contradiction(settings, entry):
        raise ManifestFieldError(f"{where} contradicts itself: {contradiction}", file=MANIFEST_NAME)
    return entry


def _contradiction(settings: StoreSettings, entry: ShardEntry) -> str | None:
    if not 1 <= entry.documents <= entry.tokens - entry.rows:
        return "it must have a document, a token per document, and a token before the first row of each document"
    if settings.hidden is not None:
        if (entry.entries, entry.id_words, entry.top_k, entry.rest_lse) != (0, 0, None, False):
            return "a shard of hidden states has no entries, id_words, top_k and rest_lse"
    elif entry.top_k is None:
        if not entry.rows <= entry.entries <= entry.rows * settings.vocab_size:
            return f"{entry.rows} rows cannot hold {entry.entries} entries"
    elif not 1 <= entry.top_k <= settings.vocab_size or entry.rows == 0:
        return f"top_k={entry.top_k} needs rows and must lie in [1, {settings.vocab_size}]"
    elif entry.entries != entry.rows * entry.top_k:
        return f"{entry.rows} rows of {entry.top_k} entries are not {entry.entries}"
    elif entry.id_words != entry.rows * row_words(settings.vocab_size, entry.top_k):
        return f"id_words={entry.id_words} is not what {entry.rows} rows of {entry.top_k} ids take"
    expected = shard_layout(settings, entry).total_bytes
    return None if entry.bytes == expected else f"its counts make {expected} bytes, not {entry.bytes}"


def _require_keys(content: dict[str, Any], names: list[str], where: str) -> None:
    missing, unknown = set(names) - content.keys(), content.keys() - set(names)
    if missing or unknown:
        raise ManifestFieldError(
            f"{where} lacks {sorted(missing)} and has unknown {sorted(unknown)}", file=MANIFEST_NAME
        )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("an object repeats a key")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
