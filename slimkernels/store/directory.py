"""Makes the directory of a store, and locks it for writing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from slimkernels.durable import FileInUseError, lock_file, sync_directory
from slimkernels.store.errors import NotAStoreError, StoreLockedError
from slimkernels.store.format import HEAD_NAME, LOCK_NAME, MANIFEST_NAME, TEMPORARY_SUFFIX


def make_directory(path: Path, parts: Iterable[str] = ()) -> None:
    """Makes the directory of a store.

    Args:
        path: The directory; without a manifest it may hold only what a killed writer leaves there.
        parts: Names of the folders of its parts, which a killed writer leaves as well.

    Raises:
        NotAStoreError: The path is a file, or the directory holds other files.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = set(os.listdir(path))
    except (FileExistsError, NotADirectoryError) as error:
        raise NotAStoreError(f"{path} is not a directory: choose another path for the store") from error
    own = {LOCK_NAME, MANIFEST_NAME + TEMPORARY_SUFFIX, HEAD_NAME, HEAD_NAME + TEMPORARY_SUFFIX}
    foreign = names - {*own, *parts}
    if MANIFEST_NAME not in names and foreign:
        raise NotAStoreError(
            f"{path} holds {sorted(foreign)[:3]} but no {MANIFEST_NAME}: choose an empty or new directory"
        )
    for folder in made:
        sync_directory(folder.parent)


def lock_directory(path: Path, wait_s: float = 0.0) -> int:
    """Locks a store for writing; the returned descriptor holds the lock until it is closed or the process ends.

    Raises:
        StoreLockedError: Another writer still holds the lock after ``wait_s`` seconds, or the file system has no locks;
            the message says which.
    """
    descriptor = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        lock_file(descriptor, path, wait_s)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, FileInUseError):
            raise StoreLockedError(f"{path} is held by another writer: wait until it is closed") from error
        raise StoreLockedError(str(error)) from error
    return descriptor
