"""What writers do to files: a directory made, locked and synced, a file written so that it survives a power cut."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slimkernels.store.errors import NotAStoreError, StoreLockedError
from slimkernels.store.format import LOCK_NAME, MANIFEST_NAME, TEMPORARY_SUFFIX

_POLL_S = 0.05


def make_directory(path: Path, beside: Iterable[str] = ()) -> None:
    """Makes a store's directory; one without a manifest may hold a killed writer's files and ``beside``, no others."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = set(os.listdir(path))
    except (FileExistsError, NotADirectoryError) as error:
        raise NotAStoreError(f"{path} is not a directory: choose another path for the store") from error
    foreign = names - {LOCK_NAME, MANIFEST_NAME + TEMPORARY_SUFFIX, *beside}
    if MANIFEST_NAME not in names and foreign:
        raise NotAStoreError(
            f"{path} holds {sorted(foreign)[:3]} but no {MANIFEST_NAME}: choose an empty or new directory"
        )
    for folder in made:
        sync_directory(folder.parent)


def lock(path: Path, wait_s: float = 0.0) -> int:
    """Locks a store for writing; the descriptor holds the lock until it is closed or the process ends.

    Raises:
        StoreLockedError: Another writer still holds it after ``wait_s`` seconds.
    """
    descriptor = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError as error:
            if not isinstance(error, BlockingIOError) or time.monotonic() >= deadline:
                os.close(descriptor)
                raise StoreLockedError(
                    f"{path} is held by another writer ({error.strerror}): wait until it is closed"
                ) from error
        time.sleep(_POLL_S)


def write_durably(path: Path, chunks: list[Any]) -> None:
    """Writes a file whose content is on the disk when this returns; its name is only after ``sync_directory``."""
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Puts the names in a directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
