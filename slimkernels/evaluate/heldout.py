"""Held-out perplexity and divergence from a teacher as a task whose samples are the documents of a store."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from slimkernels.evaluate.cell import Cell
from slimkernels.evaluate.records import Record, content_key, record_path
from slimkernels.evaluate.tasks import ORDER_SEED, Sample, check_num_samples

if TYPE_CHECKING:
    from slimkernels.evaluate.models import LoadedModel
    from slimkernels.store import Store

HELDOUT = "heldout"
LOSS, KL = "loss", "kl"


@dataclasses.dataclass(frozen=True)
class HeldoutTask:
    """Documents of a store, and the number of them that are measured at a time.

    Attributes:
        store: Store of documents with the teacher's rows.
        samples: Documents with labels, in an order that is the same for every run. An id is the index in the store; the
            text is empty here, as it takes a model's tokenizer to decode it.
        available: Number of documents with labels in the store.
        batch_size: Documents at a time; affects only speed and memory.
        name: Name of the task.
    """

    store: Store
    samples: tuple[Sample, ...]
    available: int
    batch_size: int = 8
    name: str = HELDOUT

    @property
    def source(self) -> str:
        """The name of the store's folder, without its path."""
        return self.store.path.resolve().name

    @property
    def source_hash(self) -> str:
        """A hash of all bytes of the store."""
        return self.store.manifest["checksum"][:24]


def load_heldout(path: str | os.PathLike[str], num_samples: int | None = None, *, batch_size: int = 8) -> HeldoutTask:
    """Opens a store of held-out documents.

    Args:
        path: Folder of the store.
        num_samples: Number of documents to take, at least 1, from the start of a shuffled order that is the same for
            all runs; None takes all.
        batch_size: Documents at a time.

    Raises:
        StoreError: The store does not exist or is damaged.
        ValueError: None of its documents has a label, or ``num_samples`` is below 1.
    """
    from slimkernels.store import Store

    check_num_samples(num_samples)
    store = Store(path)
    found, first = [], 0
    for number, entry in enumerate(store.shards):
        shard = store.shard(number)
        spans = [shard.rows_of(document) for document in range(entry.documents)]
        found += [first + document for document, (start, stop) in enumerate(spans) if stop > start]
        first += entry.documents
    if not found:
        raise ValueError(f"{path} must hold at least one label to evaluate on, got none")
    random.Random(ORDER_SEED).shuffle(found)  # noqa: S311 -- an order, not a secret
    samples = tuple(Sample(str(index), "", "") for index in found[:num_samples])
    return HeldoutTask(store, samples, len(found), batch_size)


@dataclasses.dataclass(frozen=True)
class HeldoutCell(Cell):
    """One model on the held-out documents."""

    task: HeldoutTask

    @property
    def file(self) -> str:
        """The path of the records in the run's folder; it contains a hash of everything that decides them."""
        return record_path(self.model.label, self.task.name, decided_by=(self.model.identity, self.task.source_hash))

    def key(self, sample: Sample, seed: int | None) -> str:
        """Returns the key of a document's record."""
        return content_key(self.model.identity, self.task.name, self.task.source_hash, sample.id)

    def answer(self, loaded: LoadedModel, missing: Sequence[tuple[int, Sample, int | None]]) -> Iterable[Record]:
        """Measures documents batch by batch and yields their records; a batch's wall time is shared equally.

        Raises:
            ValueError: The model's tokenizer or vocabulary is not that of the store.
            FloatingPointError: The model's loss is not finite.
        """
        from slimkernels.models.fingerprints import tokenizer_fingerprint
        from slimkernels.models.heldout import evaluate_documents
        from slimkernels.store import Store

        if self.task.store.tokenizer_fingerprint:
            Store(self.task.store.path, tokenizer_fingerprint=tokenizer_fingerprint(loaded.tokenizer))
        for first in range(0, len(missing), self.task.batch_size):
            batch = missing[first : first + self.task.batch_size]
            documents = [self.task.store[int(sample.id)] for _, sample, _ in batch]
            start = time.perf_counter()
            found = list(evaluate_documents(loaded.model, documents, batch_size=len(documents)))
            seconds = (time.perf_counter() - start) / len(batch)
            for (order, sample, _), document, metrics in zip(batch, documents, found, strict=True):
                scores = {LOSS: metrics.loss / metrics.labels, KL: metrics.kl_ghost / metrics.labels}
                if not all(map(math.isfinite, scores.values())):
                    raise FloatingPointError(
                        f"{self.model.label} must have a finite loss on document {sample.id} of "
                        f"{self.task.store.path}, got {scores}: its weights may be damaged, or its dtype too narrow"
                    )
                text = str(loaded.tokenizer.decode(document.input_ids.tolist()))
                # A mean over some of the labels cannot be compared with the models' means over all of them.
                is_known = metrics.teacher_labels == metrics.labels
                teacher_loss = metrics.teacher_loss if is_known else None
                yield self.record(
                    sample,
                    order,
                    prompt=text,
                    question=text,
                    reference="",
                    output="",
                    scores=scores,
                    seconds=seconds,
                    labels=metrics.labels,
                    published={} if teacher_loss is None else {"teacher_loss": teacher_loss / metrics.labels},
                )
