"""The cells of a comparison: a model on a task, with a decoder where the task is answered in writing."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from slimkernels.evaluate.models import EvaluatedModel
from slimkernels.evaluate.records import Record
from slimkernels.evaluate.tasks import Sample

# The decoder's name in records of tasks on which nothing is decoded.
NO_DECODER = ""


class CellTask(Protocol):
    """A task as a cell and the description of a run read it."""

    @property
    def name(self) -> str:
        """The name of the task."""
        ...

    @property
    def samples(self) -> Sequence[Sample]:
        """The samples, in the task's fixed order."""
        ...


@dataclasses.dataclass(frozen=True)
class Cell(abc.ABC):
    """A model on a task, whose records are in one file.

    Attributes:
        model: Model to evaluate.
        task: Task with the samples.
        decoder: Name of the decoder; ``NO_DECODER`` for a task on which nothing is decoded.
    """

    model: EvaluatedModel
    task: CellTask
    decoder: str = dataclasses.field(default=NO_DECODER, kw_only=True)

    @property
    def seeds(self) -> Sequence[int | None]:
        """The seeds of the sampling; only None without randomness."""
        return [None]

    @property
    def name(self) -> str:
        """The labels of the model, the decoder and the task."""
        return ", ".join(filter(None, (self.model.label, self.decoder, self.task.name)))

    @property
    @abc.abstractmethod
    def file(self) -> str:
        """The path of the records in the run's folder; it contains a hash of everything that decides them."""

    @abc.abstractmethod
    def key(self, sample: Sample, seed: int | None) -> str:
        """Returns the key of a sample's record."""

    @abc.abstractmethod
    def answer(self, loaded: Any, missing: Sequence[tuple[int, Sample, int | None]]) -> Iterable[Record]:
        """Yields the records of samples that have none, in any order.

        Args:
            loaded: The model as it was loaded.
            missing: Place of each sample in the task, the sample, and the seed.
        """

    def record(self, sample: Sample, order: int, seed: int | None = None, **fields: Any) -> Record:
        """Returns the record of a sample, whose model, decoder, task and key are those of the cell."""
        return Record(
            key=self.key(sample, seed),
            model=self.model.label,
            decoder=self.decoder,
            task=self.task.name,
            sample=sample.id,
            order=order,
            seed=seed,
            answers={},
            **fields,
        )
