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
from slimkernels.exchange.writing import Document, write_documents
from slimkernels.sparse_logits import SparseLogits, rest_of_logprobs
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
        rows = _rows(document, aligned, positions, aligner.map)
        count.documents += 1
        count.labels += len(positions)
        count.same_token += rows.same_token
        count.mass_kept.append(rows.mass_kept)
        count.mass_before += float(rows.mass_before.sum())
        yield Document(
            f"{store.path}: document {index}", aligned.input_ids, positions, rows.teacher, aligned.prompt_length
        )
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


class _Rows(NamedTuple):
    """Rows (R,) of the student's labels, and the teacher's mass of the A aligned ones."""

    teacher: SparseLogits
    mass_kept: np.ndarray
    mass_before: np.ndarray
    same_token: int


def _rows(document: StoredDocument, aligned: AlignedDocument, positions: np.ndarray, tokens: TokenMap) -> _Rows:
    """Makes the rows of the student's labels at ``positions``; those that are not aligned keep nothing."""
    at = np.flatnonzero(aligned.is_aligned[positions])
    place = aligned.place[positions[at]]
    begins_word = aligned.begins_word[positions[at]].astype(np.int64)
    # Every label of the student lies in one of the teacher, which has a row.
    teacher = document.teacher[np.searchsorted(document.positions.numpy(), place)]
    label = document.input_ids.numpy()[place]
    mapped = tokens.ids[begins_word[:, None], teacher.ids.numpy()]
    new_label = aligned.input_ids[positions[at]]
    is_same = tokens.ids[begins_word, label] == new_label
    found = translate_rows(teacher, mapped, label, np.where(is_same, new_label, -1), is_injective=tokens.is_injective)
    rows, width = len(positions), found.teacher.top_k
    temperatures = document.teacher.temperatures
    ids = torch.full((rows, width), -1, dtype=torch.int32)
    logits = torch.zeros(rows, width, dtype=torch.float64)
    lse, rest_lse = torch.zeros(2, rows, len(temperatures), dtype=torch.float64)
    target_logit = torch.full((rows,), math.nan, dtype=torch.float64)
    for whole, part in (
        (ids, found.teacher.ids),
        (logits, found.teacher.logits),
        (lse, found.teacher.lse),
        (rest_lse, found.teacher.rest_lse),
        (target_logit, found.teacher.target_logit),
    ):
        whole[torch.from_numpy(at)] = part
    # In float32 here, so that the rest of an empty row is its lse.
    teacher = SparseLogits(ids, logits.float(), lse.float(), temperatures, target_logit.float(), rest_lse.float())
    return _Rows(teacher, found.mass_kept, found.mass_before, int(is_same.sum()))


class TranslatedRows(NamedTuple):
    """Rows over the student's ids in float64, and the teacher's mass (R,) on ids with a student id and on all kept."""

    teacher: SparseLogits
    mass_kept: np.ndarray
    mass_before: np.ndarray


def translate_rows(
    teacher: SparseLogits,
    mapped: np.ndarray,
    label: np.ndarray,
    new_label: np.ndarray,
    *,
    is_injective: bool = False,
) -> TranslatedRows:
    """Gives rows the ids of another vocabulary; what has none goes into the rest, what becomes one id is added.

    With p_i the probability of the kept id i and u(i) its new id, the row keeps exp(logit_u) = sum of exp(logit_i) over
    u(i) = u, and its rest is the old rest plus the exp(logit_i) of all i without u(i). At another temperature T the
    exponents are logit / T, and lse changes by as much as adding the probabilities changes the sum over u.

    Args:
        teacher: Rows (R, K) with ``target_logit``. A ``rest_lse`` that is not known is what the kept entries leave of
            1, NaN below 1e-5.
        mapped: (R, K) integers, the new id of every entry; -1 where there is none, also for padding.
        label: (R,) integers, the old ids of the labels, which ``target_logit`` is of.
        new_label: (R,) integers, the new ids of the labels; -1 where the new label is another token, whose
            ``target_logit`` is NaN.
        is_injective: Whether no two entries of a row have one new id, which makes it faster.

    Returns:
        Rows (R, L) in float64, L at least 1.
    """
    old_ids, lse = teacher.ids.numpy(), teacher.lse.double().numpy()
    is_mapped = mapped >= 0
    logits = np.where(old_ids >= 0, teacher.logits.double().numpy(), -np.inf)
    by_row, ids, sums = _added(mapped, logits, is_mapped, is_injective)
    counts = np.bincount(by_row, minlength=len(mapped))
    column = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (len(mapped), int(counts.max(initial=1)))
    new_ids, new_logits = np.full(shape, -1, np.int32), np.full(shape, -np.inf)
    new_ids[by_row, column], new_logits[by_row, column] = ids, sums
    new_lse, new_rest = np.empty_like(lse), np.empty_like(lse)
    old_rest = np.full_like(lse, np.nan) if teacher.rest_lse is None else teacher.rest_lse.double().numpy()
    masses: list[np.ndarray] = []
    for column, temperature in enumerate(teacher.temperatures):
        level, rest = lse[:, column], old_rest[:, column]
        kept, dropped, added = (
            np.exp(values / temperature - level[:, None]).sum(-1)
            for values in (
                np.where(is_mapped, logits, -np.inf),
                np.where(is_mapped, -np.inf, logits),
                new_logits,
            )
        )
        new_lse[:, column] = level + np.log1p(added - kept)
        unknown = np.isnan(rest)
        left = rest_of_logprobs(torch.from_numpy(new_logits / temperature - new_lse[:, column, None])).numpy()
        with np.errstate(divide="ignore"):
            known = level + np.log(np.exp(rest - level) + dropped)
            new_rest[:, column] = np.where(unknown, left + new_lse[:, column], known)
        if column == 0:
            whole = np.where(unknown, 1.0, kept + dropped + np.exp(rest - level))
            masses = [kept / whole, (kept + dropped) / whole]
    is_empty = counts == 0
    # All of such a row's mass is in the rest, whatever rounding the sums have.
    new_rest[is_empty] = new_lse[is_empty]
    rows = SparseLogits(
        ids=torch.from_numpy(new_ids),
        logits=torch.from_numpy(np.where(new_ids >= 0, new_logits, 0.0)),
        lse=torch.from_numpy(new_lse),
        temperatures=teacher.temperatures,
        target_logit=torch.from_numpy(_target_logits(teacher, mapped, logits, label, new_label)),
        rest_lse=torch.from_numpy(new_rest),
    )
    return TranslatedRows(rows, *masses)


def _added(
    mapped: np.ndarray, logits: np.ndarray, is_mapped: np.ndarray, is_injective: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns rows, ids and logits of the mapped entries, by row and ascending in ids, with equal ids added."""
    by_row, _ = np.nonzero(is_mapped)
    ids, values = mapped[is_mapped].astype(np.int64), logits[is_mapped]
    order = np.argsort(by_row << 32 | ids, kind="stable")
    ids, values = ids[order], values[order]
    if is_injective or not len(ids):
        return by_row, ids, values
    is_first = np.ones(len(ids), bool)
    is_first[1:] = (np.diff(ids) != 0) | (np.diff(by_row) != 0)
    starts = np.flatnonzero(is_first)
    return by_row[starts], ids[starts], np.logaddexp.reduceat(values, starts)


def _target_logits(
    teacher: SparseLogits, mapped: np.ndarray, logits: np.ndarray, label: np.ndarray, new_label: np.ndarray
) -> np.ndarray:
    """Returns the (R,) logits of the labels, to which those of the other kept ids that become the label are added."""
    if teacher.target_logit is None:
        raise ValueError("teacher must have a target_logit, as rows of a store have, got None")
    is_other = (mapped == new_label[:, None]) & (mapped >= 0) & (teacher.ids.numpy() != label[:, None])
    others = np.logaddexp.reduce(np.where(is_other, logits, -np.inf), -1)
    return np.where(new_label >= 0, np.logaddexp(teacher.target_logit.double().numpy(), others), np.nan)
