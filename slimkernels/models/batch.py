"""A batch of store documents for a student, and the checks that they fit it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimkernels.models.fingerprints import tokenizer_fingerprint
from slimkernels.ops.decode_logits import decode_logits
from slimkernels.packed_logits import PackedLogits
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import collate_documents

if TYPE_CHECKING:
    from slimkernels.store import Document, PackedDocument


@dataclasses.dataclass(frozen=True)
class SlimCollator:
    """Makes one right-padded batch of store documents.

    Attributes:
        pad_token_id: Fills ``input_ids`` behind each document; never a label, never attended to.
        vocab_size: V of the student; ids are checked against it. None: not checked.
        max_length: Longest document the student can read. None: not checked.
        with_teacher: False leaves the teacher out of the batch, as supervised training needs none.
    """

    pad_token_id: int = 0
    vocab_size: int | None = None
    max_length: int | None = None
    with_teacher: bool = True

    def __call__(self, documents: Sequence[Document | PackedDocument]) -> dict[str, Any]:
        """``slimkernels.store.collate_documents``, checked against what the student can read.

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
        if isinstance(batch["teacher"], PackedLogits):
            # Every row of a store was checked against its vocabulary when it was read.
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


def teacher_rows(teacher: SparseLogits | PackedLogits) -> SparseLogits:
    """The teacher of a batch, decoded where it is if it is packed."""
    return decode_logits(teacher) if isinstance(teacher, PackedLogits) else teacher


def check_tokenizer(dataset: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Compares a student's tokenizer with the one that a store was captured with, where both are known.

    Raises:
        ValueError: They differ.
    """
    stored = getattr(dataset, "tokenizer_fingerprint", None)
    if not stored or tokenizer is None:
        return
    own = tokenizer_fingerprint(tokenizer)
    if own != stored:
        raise ValueError(
            f"the student's tokenizer must be the one the store was captured with, fingerprint {stored}, got {own}; "
            "load the teacher's tokenizer, or capture again with this one"
        )
