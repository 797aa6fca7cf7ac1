"""Held-out perplexity and divergence to a teacher as a task: no questions, but the labels of a store's documents."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from slimkernels.evaluate.records import Record, content_key, record_path
from slimkernels.evaluate.tasks import ORDER_SEED, Sample, check_num_samples

if TYPE_CHECKING:
    from slimkernels.evaluate.models import EvaluatedModel, LoadedModel
    from slimkernels.store import Store

HELDOUT = "heldout"
# The arm of a model that predicts labels: nothing is decoded.
NO_DECODER = ""
LOSS, KL = "loss", "kl"


@dataclasses.dataclass(frozen=True)
class HeldoutTask:
    """Documents of a store, and how many are measured at a time.

    Attributes:
        store: With the teacher's rows.
        samples: Documents with labels, in the order in which they are taken, the same for every run; the id is the
            index in the store, and their text is filled in with a model's tokenizer.
        available: How many documents with labels the store has.
        batch_size: Documents at a time; changes nothing but the speed and the memory.
    """

    store: Store
    samples: tuple[Sample, ...]
    available: int
    batch_size: int = 8
    name: str = HELDOUT

    @property
    def source(self) -> str:
        """The store's folder, without its path."""
        return self.store.path.resolve().name

    @property
    def source_hash(self) -> str:
        """Of all bytes of the store."""
        return self.store.manifest["checksum"][:24]


def load_heldout(path: str | os.PathLike[str], num_samples: int | None = None, *, batch_size: int = 8) -> HeldoutTask:
    """Opens a store of held-out documents.

    Args:
        path: Of the store.
        num_samples: Documents to take, at least 1, of one order that is shuffled once for all runs; None: all.
        batch_size: Documents at a time.

    Raises:
        StoreError: There is no such store, or it is damaged.
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
class HeldoutCell:
    """One model on the held-out documents."""

    model: EvaluatedModel
    task: HeldoutTask
    decoder: str = NO_DECODER

    @property
    def seeds(self) -> list[int | None]:
        """There is no noise."""
        return [None]

    @property
    def file(self) -> str:
        """Named by what decides its records."""
        return record_path(self.model.label, self.task.name, decided_by=(self.model.identity, self.task.source_hash))

    def key(self, sample: Sample, seed: int | None) -> str:
        """Of a document's record."""
        return content_key(self.model.identity, self.task.name, self.task.source_hash, sample.id)

    def answer(self, loaded: LoadedModel, missing: Sequence[tuple[int, Sample, int | None]]) -> Iterable[Record]:
        """Measures documents, a batch at a time; each has an equal share of its batch's time.

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
                teacher_loss = metrics.teacher_loss
                yield Record(
                    key=self.key(sample, None),
                    model=self.model.label,
                    decoder=self.decoder,
                    task=self.task.name,
                    sample=sample.id,
                    order=order,
                    seed=None,
                    prompt=text,
                    question=text,
                    reference="",
                    output="",
                    answers={},
                    scores=scores,
                    seconds=seconds,
                    labels=metrics.labels,
                    published={} if teacher_loss is None else {"teacher_loss": teacher_loss / metrics.labels},
                )
