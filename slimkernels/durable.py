"""Files that survive a kill or a power cut: locks, atomic writes, and journals that a restarted process resumes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

# Set to 0, it turns locks off.
LOCKS_VARIABLE = "SLIMKERNELS_LOCKS"
_POLL_S = 0.05
# Error codes with which a file system answers flock, or fsync of a directory, that it does not support.
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class DamagedLineError(ValueError):
    """A line of the file ends in a newline but is not a JSON object."""


class ForeignFileError(ValueError):
    """The file is of another kind; it is not changed."""


class FileInUseError(BlockingIOError):
    """Another process is writing the file."""


class LocksUnsupportedError(OSError):
    """The file system of the file has no locks, or has run out of them."""


def lock_file(file: int | IO[bytes], path: str | os.PathLike[str], wait_s: float = 0.0) -> None:
    """Takes the exclusive lock (flock) of an open file; closing the file, or the end of the process, releases it.

    Some network file systems have no locks. With the environment variable ``SLIMKERNELS_LOCKS=0`` none is taken, and
    the user must make sure that only one process writes.

    Args:
        file: The open file, or its descriptor.
        path: Path of the file, for the error.
        wait_s: Seconds to wait for another process to release the lock; ``math.inf`` waits without a limit.

    Raises:
        FileInUseError: Another process still holds the lock after ``wait_s`` seconds.
        LocksUnsupportedError: The file system has no locks.
    """
    if os.environ.get(LOCKS_VARIABLE) == "0":
        return None
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                raise LocksUnsupportedError(
                    f"{path} cannot be locked, as its file system does not support it ({error.strerror}): use a local "
                    f"folder, or set {LOCKS_VARIABLE}=0 if no other process writes there"
                ) from error
            if not isinstance(error, BlockingIOError):
                raise
            if time.monotonic() >= deadline:
                raise FileInUseError(f"{path} is being written by another process: wait until it has ended") from error
        time.sleep(_POLL_S)


def write_durably(path: str | os.PathLike[str], chunks: Iterable[Any]) -> None:
    """Writes a file from bytes-like chunks and flushes its content, but not its name, to the disk.

    The name of a new file survives a power cut only after ``sync_directory`` of its folder.
    """
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Flushes the names in a directory to the disk: files created or renamed there survive a power cut.

    A file system that cannot flush directories, as some network file systems cannot, is warned about once: its files
    survive a kill, but whether they survive a power cut depends on its server.
    """
    try:
        _sync(path, os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        warnings.warn(
            f"the file system of {path} cannot flush directories ({error.strerror}): after a power cut, files that "
            "were just written may be missing. Use a local folder if that matters",
            RuntimeWarning,
            stacklevel=2,
        )


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Creates or replaces a file (text as UTF-8), so that readers and a kill see the old content or the new."""
    with replaced_atomically(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes an indented JSON file with ``write_atomically``."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def replaced_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the path of a temporary file to write, which takes the place of ``path`` when the block ends.

    The temporary file is ``path`` with the suffix ".tmp". An exception in the block deletes it and leaves the file
    at ``path`` as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


def whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the lines of a file with their newlines, except a last line without one, which was never finished."""
    return (line for line in file if line.endswith(b"\n"))


class Journal:
    """An append-only file of lines, locked for as long as it is open.

    A process that is killed loses at most what it was appending: the next ``append`` overwrites an unfinished line.

    Args:
        path: Path of the file, which is created if it does not exist.
        wait_s: Seconds to wait for another process that has the file open; ``math.inf`` waits without a limit.

    Raises:
        FileInUseError: Another process has the file open.
    """

    def __init__(self, path: str | os.PathLike[str], wait_s: float = 0.0) -> None:
        self.path = Path(path)
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 -- closed by close
        try:
            lock_file(self._file, self.path, wait_s)
            with open(self.path, "rb") as file:
                self._num_bytes = sum(map(len, whole_lines(file)))
        except BaseException:
            self._file.close()
            raise

    def append(self, lines: bytes) -> None:
        """Appends whole lines, which are on the disk when this returns."""
        self._file.truncate(self._num_bytes)
        unwritten = memoryview(lines)
        while unwritten:
            unwritten = unwritten[self._file.write(unwritten) :]
        os.fsync(self._file.fileno())
        if self._num_bytes == 0:
            sync_directory(self.path.parent)
        self._num_bytes += len(lines)

    def truncate(self, num_bytes: int) -> None:
        """Cuts the file off after its first ``num_bytes`` bytes, which end a line."""
        self._file.truncate(num_bytes)
        self._num_bytes = num_bytes

    def close(self) -> None:
        """Releases the lock, so that other processes can open the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonLines:
    """A journal of JSON objects, one per line.

    Args:
        path: Path of the file, which is created if it does not exist.
        first_key: The first key of the first object, by which a file of this kind is recognised.
        wait_s: Seconds to wait for another process that has the file open; ``math.inf`` waits without a limit.

    Attributes:
        path: Path of the file.
        found: The objects that the file held when it was opened.

    Raises:
        FileInUseError: Another process has the file open.
        ForeignFileError: The file does not begin with ``first_key``.
        DamagedLineError: A line other than an unfinished last one is not a JSON object.
    """

    def __init__(self, path: str | os.PathLike[str], first_key: str, wait_s: float = 0.0) -> None:
        self.path = Path(path)
        self._journal = Journal(path, wait_s)
        try:
            self.found = _read_json_lines(path, first_key, "must be new, or begin with")
        except BaseException:
            self._journal.close()
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Appends one object, which is on the disk when this returns."""
        self._journal.append(json.dumps(record).encode() + b"\n")

    def clear(self) -> None:
        """Removes all objects, which are kept elsewhere by now."""
        self._journal.truncate(0)

    def close(self) -> None:
        """Releases the lock, so that other processes can open the file."""
        self._journal.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_json_lines(path: str | os.PathLike[str], first_key: str) -> list[dict[str, Any]]:
    """Reads the objects of a ``JsonLines`` file, also while another process appends to it.

    Args:
        path: Path of the file.
        first_key: The first key of the first object, by which a file of this kind is recognised.

    Returns:
        The objects, without one whose line was not finished.

    Raises:
        FileNotFoundError: The file does not exist.
        ForeignFileError: The file does not begin with ``first_key``.
        DamagedLineError: A line other than an unfinished last one is not a JSON object.
    """
    return _read_json_lines(path, first_key, "must begin with")


def _read_json_lines(path: str | os.PathLike[str], first_key: str, expected: str) -> list[dict[str, Any]]:
    prefix = f'{{"{first_key}": '.encode()
    records = []
    with open(path, "rb") as file:
        if not prefix.startswith(file.read(len(prefix))):
            raise ForeignFileError(f"{path} {expected} {prefix.decode()!r}: give another path")
        file.seek(0)
        for number, line in enumerate(whole_lines(file), 1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise DamagedLineError(f"line {number} of {path} must be a JSON object: restore the file, or remove it")
            records.append(record)
    return records


def _sync(path: str | os.PathLike[str], flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
