"""Collates store documents into batches and checks their lengths and ids against the student."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from slimkernels.ops.decode_logits import decode_logits
from slimkernels.packed_logits import PackedHidden, PackedLogits
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import Document, PackedDocument, collate_documents


@dataclasses.dataclass(frozen=True)
class SlimCollator:
    """A collator that makes one right-padded batch of store documents and checks it against the student.

    Attributes:
        pad_token_id: Id that fills ``input_ids`` after the end of each document; never a label, never attended to.
        vocab_size: Vocabulary size V of the student, which all ids must be below; None for no check.
        max_length: Number of tokens that the student can read; None for no check.
        with_teacher: False to make batches without teacher rows, which supervised training does not need.
    """

    pad_token_id: int = 0
    vocab_size: int | None = None
    max_length: int | None = None
    with_teacher: bool = True

    def __call__(self, documents: Sequence[Document | PackedDocument]) -> dict[str, Any]:
        """Collates as ``slimkernels.store.collate_documents`` does, and checks lengths and ids.

        Raises:
            ValueError: A document longer than ``max_length``, a position outside [1, T), or an id outside
                [0, ``vocab_size``).
        """
        length = max((len(document.input_ids) for document in documents), default=0)
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"documents must have at most max_length={self.max_length} tokens for this student, got one of "
                f"{length}; capture shorter documents or give the student more positions"
            )
        batch = collate_documents(documents, pad_token_id=self.pad_token_id, with_teacher=self.with_teacher)
        self._check_ids("input_ids", batch["input_ids"].amax())
        if isinstance(batch["teacher"], PackedLogits | PackedHidden):
            # Reading a packed row has checked its ids against the store's vocabulary size.
            self._check_ids("teacher.ids", batch["teacher"].vocab_size - 1)
        elif batch["teacher"] is not None:
            self._check_ids("teacher.ids", batch["teacher"].ids.amax() if batch["teacher"].ids.numel() else 0)
        return batch

    def _check_ids(self, name: str, largest: Tensor | int) -> None:
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise ValueError(
                f"{name} must be below the student's vocabulary size {self.vocab_size}, got {int(largest)}; use "
                "the teacher's tokenizer and a student with as many tokens as the teacher"
            )


def teacher_rows(teacher: SparseLogits | PackedLogits | PackedHidden) -> SparseLogits:
    """Returns the teacher rows of a batch, decoding packed ones on the device that they are on."""
    return teacher if isinstance(teacher, SparseLogits) else decode_logits(teacher)
