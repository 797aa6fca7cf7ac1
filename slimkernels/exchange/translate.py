"""``translate_store``: turns a store of a teacher's tokenizer into one of the student's."""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from slimkernels.exchange.alignment import AlignedDocument, Aligner, UntranslatableError
from slimkernels.exchange.token_bytes import TokenMap
from slimkernels.exchange.translated_rows import TranslatedRows, translate_rows
from slimkernels.exchange.writing import Document, write_documents
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import Document as StoredDocument
from slimkernels.store import Store
from slimkernels.store.identity import is_same_tokenizer

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


class TranslationReport(NamedTuple):
    """The result of translating a store; all numbers but ``added`` count what earlier runs have written, too.

    Attributes:
        documents: Documents that were translated.
        added: Documents that this run added to the store.
        skipped: Number of documents that were not translated, by reason.
        labels: Labels of the student in all translated documents, each of which has a row.
        aligned: Labels at whose first byte a token of the teacher begins too, so that their row has the teacher's
            distribution.
        same_token: Aligned labels that are the teacher's token, whose ``target_logit`` is known.
        mass_kept: Teacher's probability on the ids of a row that have a student id, "mean" and quantiles ("q01" to
            "q99") over the aligned labels.
        mass_before: Mean of the teacher's probability on all ids of these rows.
        teacher_ids: Number of ids of the teacher's vocabulary.
        mapped_ids: Number of them that have a student id.
        student_ids: Number of ids of the student's vocabulary.
    """

    documents: int
    added: int
    skipped: dict[str, int]
    labels: int
    aligned: int
    same_token: int
    mass_kept: dict[str, float]
    mass_before: float
    teacher_ids: int
    mapped_ids: int
    student_ids: int


def translate_store(
    store: Store | str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    teacher_tokenizer: Any,
    student_tokenizer: Any,
    *,
    codec: str | None = None,
) -> TranslationReport:
    """Writes the documents of a store in a student's tokens, with the teacher's rows over the student's vocabulary.

    Labels are the student's tokens that begin within a label of the teacher. Such a token at byte b is aligned if a
    token of the teacher begins at b: both then continue the same text, and the row of the teacher's token becomes its
    row. An id becomes the student's id of the same bytes (``map_tokens``); the probabilities of ids that become one id
    are added, and those of ids that have none go into the rest, so every row still sums to one. A label that is not
    aligned has a row without entries, whose mass is all in the rest: under ``rest="ghost"``, and only there, it has
    the gradient of the cross entropy alone and counts as a label like all others. ``target_logit`` is known where the
    label is the teacher's token, and NaN elsewhere. The rows at a temperature T other than 1 are those of the added
    probabilities.

    Args:
        store: A store, or its directory; one of hidden states gives the rows that are made of them.
        store_path: New directory, or a store that was begun by the same call, whose documents are kept as they are.
        teacher_tokenizer: Tokenizer of the store.
        student_tokenizer: Tokenizer of the student.
        codec: "affine8", "affine6", "bfloat16" or "float32"; None for that of the store, or "affine8" for one of hidden
            states.

    Raises:
        ValueError: A tokenizer is of a kind that cannot be translated, the teacher's is not that of the store, or no
            document can be translated.
        SettingsMismatchError: ``store_path`` is a store of other settings.
        StoreError: The store is damaged.
    """
    from slimkernels.models.fingerprints import tokenizer_fingerprint

    store = store if isinstance(store, Store) else Store(store)
    own = tokenizer_fingerprint(teacher_tokenizer)
    if not is_same_tokenizer(store.tokenizer_fingerprint, own):
        raise ValueError(
            f"teacher_tokenizer must be that of {store.path}, fingerprint {store.tokenizer_fingerprint}, got {own}: "
            "load the tokenizer of the model that was captured"
        )
    aligner = Aligner(teacher_tokenizer, student_tokenizer)
    old = store.settings
    settings = {
        "vocab_size": len(student_tokenizer),
        "tokenizer_fingerprint": tokenizer_fingerprint(student_tokenizer),
        # Sizes of the teacher's hidden states say nothing of a vocabulary that its head does not have.
        "teacher": {name: value for name, value in old.teacher.items() if name != "hidden_size"},
        "selection": {
            "kind": "translated",
            "source": old.selection,
            "source_tokenizer": old.tokenizer_fingerprint,
            "source_ids": len(aligner.teacher.texts),
            "mapped_ids": aligner.map.num_mapped,
        },
        "temperatures": old.temperatures,
        "codec": codec or (old.codec if old.hidden is None else "affine8"),
    }
    count = _Count()
    written = write_documents(_documents(store, aligner, count), store_path, settings)
    kept = np.concatenate([np.zeros(0), *count.mass_kept])
    return TranslationReport(
        documents=count.documents,
        added=written.documents,
        skipped=dict(count.skipped),
        labels=count.labels,
        aligned=len(kept),
        same_token=count.same_token,
        mass_kept={"mean": float(kept.mean()) if len(kept) else math.nan}
        | {f"q{round(100 * q):02d}": float(np.quantile(kept, q)) if len(kept) else math.nan for q in QUANTILES},
        mass_before=count.mass_before / len(kept) if len(kept) else math.nan,
        teacher_ids=len(aligner.teacher.texts),
        mapped_ids=aligner.map.num_mapped,
        student_ids=len(student_tokenizer),
    )


class _Count:
    """The running numbers of a report."""

    def __init__(self) -> None:
        self.documents = self.labels = self.same_token = 0
        self.skipped: collections.Counter[str] = collections.Counter()
        self.mass_kept: list[np.ndarray] = []
        self.mass_before = 0.0


def _documents(store: Store, aligner: Aligner, count: _Count) -> Iterator[Document]:
    """Yields the documents of a store that can be translated, and counts."""
    seen: set[bytes] = set()
    for index in range(len(store)):
        document = store[index]
        try:
            aligned = aligner(document.input_ids.numpy(), document.prompt_length)
            positions = _labels(document, aligned)
            if not len(positions):
                raise UntranslatableError("it has no label")
            if (key := aligned.input_ids.tobytes()) in seen:
                raise UntranslatableError("another document has the same tokens")
        except UntranslatableError as error:
            count.skipped[str(error)] += 1
            continue
        seen.add(key)
        rows, found, same_token = _rows(document, aligned, positions, aligner.map)
        count.documents += 1
        count.labels += len(positions)
        count.same_token += same_token
        count.mass_kept.append(found.mass_kept)
        count.mass_before += float(found.mass_before.sum())
        yield Document(f"{store.path}: document {index}", aligned.input_ids, positions, rows, aligned.prompt_length)
    if not count.documents:
        reasons = ", ".join(f"{number} because {reason}" for reason, number in count.skipped.items())
        raise ValueError(f"{store.path} holds no document that can be translated, of {len(store)}: {reasons}")


def _labels(document: StoredDocument, aligned: AlignedDocument) -> np.ndarray:
    """Returns the positions of the student's tokens that begin within a label of the teacher."""
    is_label = np.zeros(len(document.input_ids), bool)
    is_label[document.positions.numpy()] = True
    found = is_label[aligned.place]
    # Nothing predicts the first token.
    found[0] = False
    return np.flatnonzero(found)


def _rows(
    document: StoredDocument, aligned: AlignedDocument, positions: np.ndarray, tokens: TokenMap
) -> tuple[SparseLogits, TranslatedRows, int]:
    """Makes the rows of the student's labels at ``positions``, of which those that are not aligned keep nothing.

    Returns:
        The rows, those of the aligned labels alone, and the number of these that are the teacher's token.
    """
    at = np.flatnonzero(aligned.is_aligned[positions])
    place = aligned.place[positions[at]]
    within = aligned.begins_word[positions[at]].astype(np.int64)
    # Every label of the student lies in one of the teacher, which has a row.
    teacher = document.teacher[np.searchsorted(document.positions.numpy(), place)]
    label, new_label = document.input_ids.numpy()[place], aligned.input_ids[positions[at]]
    is_same = tokens.ids[within, label] == new_label
    found = translate_rows(
        teacher,
        tokens.ids[within[:, None], teacher.ids.numpy()],
        label,
        np.where(is_same, new_label, -1),
        is_injective=tokens.is_injective,
    )
    # The rest of a row that keeps nothing is its lse.
    sums = torch.zeros(2, len(positions), len(teacher.temperatures))
    ids = torch.full((len(positions), found.ids.shape[1]), -1, dtype=torch.int32)
    logits, target_logit = torch.zeros(ids.shape), torch.full((len(positions),), math.nan)
    index = torch.from_numpy(at)
    for whole, part in (
        (ids, found.ids),
        (logits, found.logits),
        (sums[0], found.lse),
        (sums[1], found.rest_lse),
        (target_logit, found.target_logit),
    ):
        whole[index] = torch.from_numpy(part).to(whole.dtype)
    rows = SparseLogits(ids, logits, sums[0], teacher.temperatures, target_logit, sums[1])
    return rows, found, int(is_same.sum())
