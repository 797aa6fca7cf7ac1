"""The manifest of a store and those of its parts: their content, its bytes with a checksum, and reading them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from slimkernels.packed_logits import row_words
from slimkernels.store.errors import (
    ManifestChecksumError,
    ManifestFieldError,
    ManifestSyntaxError,
    MissingPartError,
    NotAStoreError,
    PartSettingsError,
    ShardNameError,
    StoreError,
    UnsupportedVersionError,
)
from slimkernels.store.format import (
    CHECKSUM_BYTES,
    CHECKSUM_DIGITS,
    FORMAT,
    HIDDEN_VERSION,
    MANIFEST_NAME,
    MAX_COUNT,
    MAX_MANIFEST_BYTES,
    MAX_PARTS,
    VERSION,
    VERSIONS,
    ShardEntry,
    StoreSettings,
    new_digest,
    part_name,
    shard_layout,
    shard_name,
)

_CHECKSUM_PREFIX = b'{\n "checksum": "'
_CHECKSUM_HOLE = b"0" * (2 * CHECKSUM_BYTES)


def load_manifest(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Reads a manifest, checks its checksum and its syntax, and returns its bytes and its content."""
    # Checked before it is opened, because opening a pipe would block until it has a writer.
    if not (path / MANIFEST_NAME).is_file():
        raise NotAStoreError(f"{path} holds no {MANIFEST_NAME}: is it the directory of a store?")
    try:
        with open(path / MANIFEST_NAME, "rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ManifestSyntaxError(f"cannot be read: {error}", file=MANIFEST_NAME) from error
    return data, unseal_manifest(data)


def load_shards(path: Path, content: dict[str, Any]) -> tuple[StoreSettings, int | None, tuple[ShardEntry, ...]]:
    """Returns the settings, the number of parts (None for a store without parts) and all shards of a store.

    Files of a part are named relative to the store, such as ``part-00001/shard-000000.safetensors``.
    """
    if "parts" not in content:
        settings, shards = parse_manifest(content)
        return settings, None, shards
    settings, num_parts = parse_parts(content)
    entries: list[ShardEntry] = []
    for name in map(part_name, range(num_parts)):
        try:
            part = _part(path / name, settings)
        except StoreError as error:
            raise error.within(name) from error
        entries += [dataclasses.replace(entry, file=f"{name}/{entry.file}") for entry in part]
    return settings, num_parts, tuple(entries)


def _part(path: Path, settings: StoreSettings) -> tuple[ShardEntry, ...]:
    if not (path / MANIFEST_NAME).is_file():
        raise MissingPartError("this part is missing: put it back, or remove the store and capture again")
    part_settings, shards = parse_manifest(load_manifest(path)[1])
    if part_settings != settings:
        raise PartSettingsError("this part was made with other settings than the store", file=MANIFEST_NAME)
    return shards


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
        if type(content[name]) is not int or not 0 <= content[name] < MAX_COUNT:
            raise ManifestFieldError(
                f"{where}.{name} must be an int in [0, 2^48), got {content[name]!r}", file=MANIFEST_NAME
            )
    for name in ("head_checksum", "checksum"):
        if not isinstance(content[name], str) or not CHECKSUM_DIGITS.fullmatch(content[name]):
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
