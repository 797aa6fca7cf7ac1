"""Locks and flushes on file systems that do not have all of them, as network file systems often do not."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

import pytest
from support.store_cases import SETTINGS, random_case

from slimkernels.durable import FileInUseError, Journal, LocksUnsupportedError, write_atomically
from slimkernels.store import Store, StoreWriter, errors, verify


@pytest.fixture
def no_locks(monkeypatch):
    def make(code: int) -> None:
        def refuse(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", refuse)

    return make


UNSUPPORTED = [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS]


@pytest.mark.parametrize("code", UNSUPPORTED)
def test_a_file_system_without_locks_is_named_as_that(tmp_path, no_locks, code) -> None:
    no_locks(code)
    advice = "cannot be locked, as its file system does not support it .*: use a local folder, or set SLIMKERNELS_LOCKS"
    with pytest.raises(errors.StoreLockedError, match=f"store {advice}"):
        StoreWriter(tmp_path / "store", **SETTINGS)
    with pytest.raises(LocksUnsupportedError, match=f"journal {advice}"):
        Journal(tmp_path / "journal")


def test_locks_can_be_turned_off(tmp_path, no_locks, monkeypatch, generator) -> None:
    no_locks(errno.ENOLCK)
    monkeypatch.setenv("SLIMKERNELS_LOCKS", "0")
    with StoreWriter(tmp_path / "store", **SETTINGS) as writer:
        writer.add(*random_case(5, 2, generator))
    with Journal(tmp_path / "journal") as journal:
        journal.append(b"one\n")
    assert len(Store(tmp_path / "store")) == 1


def test_another_error_of_a_lock_stays_what_it_is(tmp_path, no_locks) -> None:
    no_locks(errno.EBADF)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Journal(tmp_path / "journal")


def test_a_lock_that_is_held_is_named_as_that(tmp_path) -> None:
    with (
        Journal(tmp_path / "journal"),
        pytest.raises(FileInUseError, match="is being written by another process: wait until it has ended"),
    ):
        Journal(tmp_path / "journal")


@pytest.fixture
def no_directory_flush(monkeypatch):
    fsync = os.fsync

    def make(code: int) -> None:
        def refuse(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(code, os.strerror(code))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", refuse)

    return make


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_directories_is_warned_about(
    tmp_path, no_directory_flush, generator, code
) -> None:
    no_directory_flush(code)
    with pytest.warns(RuntimeWarning, match="cannot flush directories .*: after a power cut, files that were just"):
        write_atomically(tmp_path / "a", "content")
    assert (tmp_path / "a").read_text() == "content"
    with pytest.warns(RuntimeWarning, match="cannot flush directories"), StoreWriter(tmp_path / "s", **SETTINGS) as w:
        w.add(*random_case(5, 2, generator))
    verify(tmp_path / "s")


def test_another_error_of_a_flush_stays_what_it_is(tmp_path, no_directory_flush) -> None:
    no_directory_flush(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(tmp_path / "a", "content")


@pytest.fixture
def generator():
    import torch

    return torch.Generator().manual_seed(1)
