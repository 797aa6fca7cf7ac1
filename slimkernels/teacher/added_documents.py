"""Adds captured documents to a store, skips those that it has, and counts both."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import RankWriter, StoreWriter
from slimkernels.teacher.corpus import TokenizedDocument


class CaptureReport(NamedTuple):
    """The result of one call of ``capture``.

    Attributes:
        documents: Documents added to the store.
        tokens: Tokens in them.
        skipped: Documents that were in the store already, or have no label (counted by rank 0).
    """

    documents: int
    tokens: int
    skipped: int


class AddedDocuments:
    """The documents that a capture adds to a store or skips.

    Args:
        writer: Writer of the store.
        progress: Called as progress(documents, tokens) with the totals so far, skipped documents included; or None.
    """

    def __init__(self, writer: StoreWriter | RankWriter, progress: Callable[[int, int], None] | None) -> None:
        self._writer, self._progress = writer, progress
        self._added = self._tokens = self._skipped = self._done_tokens = 0

    def add(self, ids: TokenizedDocument, rows: SparseLogits | Tensor | None) -> None:
        """Adds a document with the rows of its labels, which may be None if the store has it.

        A document that occurs twice is skipped the second time.
        """
        self._done_tokens += len(ids)
        if rows is None or self._writer.has(ids, ids.teacher_ids):
            self._skipped += 1
            return
        self._writer.add(ids, ids.labels, rows, prompt_length=ids.prompt_length, teacher_ids=ids.teacher_ids)
        self._added += 1
        self._tokens += len(ids)

    def show_progress(self) -> None:
        """Reports the totals so far."""
        if self._progress is not None:
            self._progress(self._added + self._skipped, self._done_tokens)

    def report(self, *, without_label: int = 0) -> CaptureReport:
        """Returns the counts; documents without a label, which were not added, count as skipped."""
        return CaptureReport(self._added, self._tokens, self._skipped + without_label)
