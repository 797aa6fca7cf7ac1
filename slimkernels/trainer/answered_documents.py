"""``AnsweredDocuments``, what a server answered during a training: in a journal at once, and from there in a store."""

from __future__ import annotations

import contextlib
import threading
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimkernels.durable import FileInUseError
from slimkernels.served_rows.journal import AnswerJournal
from slimkernels.served_rows.rows import ServedDocument
from slimkernels.store import Document, Store, StoreWriter
from slimkernels.store.format import MANIFEST_NAME

# Seconds that a process may take to store what it found in the journal of another one.
_JOURNAL_WAIT_S = 60.0
_STORES, _JOURNAL = "rank-?????", ".journal"


class AnsweredDocuments:
    """The scored documents of a training, written by each process to a store of its own and read by all.

    ``add`` may be called from several threads. A document is in the journal of its process when ``add`` returns, and so
    survives a kill; the next run, with any number of processes, moves it to a store.

    Args:
        folder: Folder of the stores, ``rank-00000`` and so on, and of the journals beside them.
        rank: Number of this process.
        **settings: Arguments of ``StoreWriter`` but its path.

    Attributes:
        path: Directory of this process' store.

    Raises:
        SettingsMismatchError, ValueError: A store or a journal was made with other settings.
        StoreLockedError, FileInUseError: Another process writes this process' store or journal.
    """

    def __init__(self, folder: Path, rank: int, **settings: Any) -> None:
        self.path = folder / f"rank-{rank:05d}"
        self._folder, self._settings = folder, settings
        self._rows_of = {name: settings[name] for name in ("teacher", "selection", "tokenizer_fingerprint")}
        # Documents since the last write to the store.
        self._fresh: dict[bytes, Document] = {}
        self._stores: dict[Path, tuple[int, Store]] = {}
        self._files: _Files | None = None
        self._writing = threading.Lock()
        self.open()

    def open(self) -> None:
        """Locks the store and its journal, and stores what a killed run left in journals, unless that was done."""
        if self._files is not None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            writer = opened.enter_context(StoreWriter(self.path, **self._settings))
            journal = opened.enter_context(AnswerJournal(_journal_of(self.path), self._rows_of, _JOURNAL_WAIT_S))
            _store(journal, writer)
            for path in sorted(self._folder.glob(f"{_STORES}{_JOURNAL}")):
                # Another process that still runs stores its documents itself.
                with contextlib.suppress(FileInUseError):
                    if path != journal.path:
                        with AnswerJournal(path, self._rows_of) as left:
                            _store(left, writer)
            self._files = _Files(writer, journal, opened.pop_all())
        # Closes the files of a training that was never begun, or never stopped, with its trainer.
        weakref.finalize(self, self._files.opened.close).atexit = False

    def add(self, document: ServedDocument) -> None:
        """Adds a document, which is on the disk when this returns; does nothing once this is closed."""
        with self._writing:
            if self._files is None or document.input_ids in self._files.writer:
                return
            # The writer checks the document.
            self._files.writer.add(*document)
            self._files.journal.append(document)
            self._fresh[key_of(torch.tensor(document.input_ids))] = as_stored(document)

    def find(self, input_ids: Tensor) -> Document | None:
        """Returns a document that was just added, or one in the store of any process; None if there is none."""
        if (fresh := self._fresh.get(key_of(input_ids))) is not None:
            return fresh
        for path in sorted(self._folder.glob(_STORES)):
            store = self._store_at(path)
            if store is not None and (index := store.find(input_ids)) is not None:
                return store[index]
        return None

    def flush(self) -> None:
        """Writes the documents to the store, where other processes find them."""
        with self._writing:
            self._flush()

    def close(self) -> None:
        """Writes the documents to the store, and unlocks it and the journal."""
        with self._writing:
            if self._files is not None:
                with self._files.opened:
                    self._flush()
                self._files = None

    def _flush(self) -> None:
        if self._files is not None:
            self._files.writer.flush()
            self._files.journal.clear()
            self._fresh.clear()

    def _store_at(self, path: Path) -> Store | None:
        """Returns the store of a process as it is now, opened again only after it was written to."""
        try:
            written = (path / MANIFEST_NAME).stat().st_mtime_ns
        except FileNotFoundError:
            return None
        known = self._stores.get(path)
        if known is None or known[0] != written:
            known = self._stores[path] = written, Store(path)
        return known[1]


class _Files(NamedTuple):
    writer: StoreWriter
    journal: AnswerJournal
    opened: contextlib.ExitStack


def key_of(input_ids: Tensor) -> bytes:
    """Returns the key of a document in a dictionary."""
    return input_ids.to(torch.int64).numpy().tobytes()


def as_stored(document: ServedDocument) -> Document:
    """Returns a document in the form in which a store gives it."""
    return Document(torch.tensor(document.input_ids), torch.tensor(document.positions), document.teacher)


def _journal_of(store: Path) -> Path:
    return store.with_name(f"{store.name}{_JOURNAL}")


def _store(journal: AnswerJournal, writer: StoreWriter) -> None:
    """Moves the documents of a journal to a store."""
    for document in journal.found():
        if document.input_ids not in writer:
            writer.add(*document)
    writer.flush()
    journal.clear()
