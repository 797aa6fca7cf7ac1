"""Reads the manifest of a store and those of its parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from slimkernels.store.errors import (
    ManifestSyntaxError,
    MissingPartError,
    NotAStoreError,
    PartSettingsError,
    StoreError,
)
from slimkernels.store.format import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    ShardEntry,
    StoreSettings,
    parse_manifest,
    parse_parts,
    part_name,
    unseal_manifest,
)


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
