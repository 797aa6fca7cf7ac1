"""Documents without the rows of a teacher: for a teacher that scores them in the training, or for labels alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from slimkernels.store.identity import new_digest


@dataclasses.dataclass(frozen=True, eq=False)
class UnscoredDocument:
    """A sequence of tokens with its labels.

    Attributes:
        input_ids: (T,) int64.
        positions: (R,) int64, ascending in [1, T), of the labels.
        prompt_length: Number of tokens at the beginning that are a prompt; 0 where that is not known.
    """

    input_ids: Tensor
    positions: Tensor
    prompt_length: int = 0


class UnscoredDocuments(Dataset):
    """A map-style data set of tokenised documents, such as those of ``slimkernels.teacher.read_documents``.

    Args:
        documents: Token ids of each document, at least 2. Of a ``TokenizedDocument`` its labels and the length of its
            prompt are taken too; of any other, every token but the first is a label.

    Attributes:
        fingerprint: Hash of the documents, 32 hexadecimal digits, by which a resumed run knows them.
        longest: Number of tokens of the longest document.

    Raises:
        ValueError: There is no document, or one has no label, or a prefix for the teacher alone.
    """

    def __init__(self, documents: Iterable[Sequence[int]]) -> None:
        self._documents = [_unscored(number, document) for number, document in enumerate(documents)]
        if not self._documents:
            raise ValueError("documents must hold at least one document, got none")
        self.longest = max(len(document.input_ids) for document in self._documents)
        digest = new_digest()
        for document in self._documents:
            digest.update(f"{len(document.input_ids)} {len(document.positions)} {document.prompt_length}\n".encode())
            for values in (document.input_ids, document.positions):
                digest.update(values.numpy().astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> UnscoredDocument:
        """Returns one document."""
        return self._documents[index]


def _unscored(number: int, document: Sequence[int]) -> UnscoredDocument:
    if getattr(document, "teacher_ids", None) is not None:
        raise ValueError(
            f"documents must be what student and teacher both read, got one with a prefix for the teacher alone, "
            f"document {number}: capture it, and train on the store"
        )
    labels = getattr(document, "labels", range(1, len(document)))
    if not len(labels):
        raise ValueError(f"documents must have at least one label, got none in document {number}: leave it out")
    ids, positions = (torch.tensor(list(values), dtype=torch.int64) for values in (document, labels))
    return UnscoredDocument(ids, positions, getattr(document, "prompt_length", 0))
