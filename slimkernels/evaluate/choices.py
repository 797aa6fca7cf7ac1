"""Multiple-choice benchmarks as tasks of a side-by-side run, asked and scored by lm-eval and kept as records."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slimkernels.evaluate.cell import Cell
from slimkernels.evaluate.heldout import HELDOUT
from slimkernels.evaluate.records import Record, content_key, record_path
from slimkernels.evaluate.tasks import TASKS, Sample, check_num_samples

if TYPE_CHECKING:
    from slimkernels.evaluate.lm_eval.tasks import ChoiceSample
    from slimkernels.evaluate.models import LoadedModel


@dataclasses.dataclass(frozen=True)
class ChoiceTask:
    """A multiple-choice task of lm-eval.

    Attributes:
        name: lm-eval's name of the task.
        source: Origin of the questions, lm-eval's version and the number of few-shot examples, in words.
        source_hash: Hash of the questions and of the few-shot examples.
        samples: First samples of the data; an id is the index in the data. Their references and choices are empty here
            and become known with the answers.
        available: Number of samples that the data have.
        data: Folder with local files; None takes the data from the hub.
        num_fewshot: Number of examples before each question; None uses that of the task's definition.
        batch_size: Sequences per forward pass; another size sums in another order and may change the last digits.
    """

    name: str
    source: str
    source_hash: str
    samples: tuple[Sample, ...]
    available: int
    data: str | os.PathLike[str] | None = None
    num_fewshot: int | None = None
    batch_size: int = 8


def load_choices(
    names: Sequence[str],
    data: str | os.PathLike[str] | None = None,
    num_samples: int | None = None,
    *,
    num_fewshot: int | None = None,
    batch_size: int = 8,
) -> list[ChoiceTask]:
    """Reads the questions of multiple-choice tasks.

    Args:
        names: Names of lm-eval's tasks and groups; a group stands for its tasks.
        data: Folder laid out as ``write_local_tasks`` describes; None takes the data from the hub.
        num_samples: Number of samples to take from the start of each task, at least 1, as lm-eval's ``limit``; None
            takes all.
        num_fewshot: Number of examples before each question; None uses that of a task's definition.
        batch_size: Sequences per forward pass.

    Raises:
        ImportError: lm-eval is not installed; the message names the extra.
        FileNotFoundError, ConnectionError: The data are missing, or the hub does not answer.
        ValueError: A name is not a multiple-choice task of lm-eval, or ``num_samples`` is below 1.
    """
    check_num_samples(num_samples)
    own = ", ".join((HELDOUT, *TASKS))
    try:
        from slimkernels.evaluate.lm_eval.tasks import read_multiple_choice

        found = read_multiple_choice(names, data=data if data is None else Path(data), num_fewshot=num_fewshot)
    except ImportError as error:
        raise ImportError(
            f"tasks must be {own}, or multiple-choice tasks of lm-eval, got {', '.join(names)}: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"tasks must be {own}, or multiple-choice tasks of lm-eval: {error}") from error
    where = "the hub" if data is None else "local files"
    return [
        ChoiceTask(
            name=task.task,
            source=f"{where}, by lm-eval {task.lm_eval_version}, {task.num_fewshot}-shot",
            source_hash=task.content_hash,
            samples=tuple(Sample(str(index), text, "") for index, text in enumerate(task.questions[:num_samples])),
            available=len(task.questions),
            data=data,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
        )
        for task in found
    ]


@dataclasses.dataclass(frozen=True)
class ChoiceCell(Cell):
    """One model on one multiple-choice task, whose answer is the likeliest choice; decoders play no part.

    Attributes:
        model: Model to evaluate.
        task: Task with the questions.
        folder: Folder of the run. A journal in it keeps the model's answers until all records are written.
    """

    task: ChoiceTask
    folder: str | os.PathLike[str]

    @property
    def _decided_by(self) -> list[str | int]:
        # The other samples in a sample's batch may change its last digits, so the number of samples counts.
        task = self.task
        return [self.model.identity, task.name, task.source_hash, task.source, len(task.samples), task.batch_size]

    @property
    def file(self) -> str:
        """The path of the records in the run's folder; it contains a hash of everything that decides them."""
        return record_path(self.model.label, self.task.name, decided_by=self._decided_by)

    def key(self, sample: Sample, seed: int | None) -> str:
        """Returns the key of a question's record."""
        return content_key(*self._decided_by, sample.id)

    def answer(self, loaded: LoadedModel, missing: Sequence[tuple[int, Sample, int | None]]) -> Iterable[Record]:
        """Evaluates the task with lm-eval and yields the missing records; the wall time is shared equally.

        lm-eval always gets the whole task, so that its batches, and with them the last digits, do not depend on which
        records are missing. Batches that an earlier run computed are read from the journal.

        Raises:
            ValueError, BlockingIOError: The journal is damaged or in use, as for ``BatchJournal``.
        """
        if not missing:
            return
        from slimkernels.evaluate.lm_eval.journal import BatchJournal
        from slimkernels.evaluate.lm_eval.tasks import evaluate_multiple_choice

        path = Path(self.folder, self.file).with_suffix(".batches")
        start = time.perf_counter()
        with BatchJournal(path, self._decided_by) as journal:
            found = evaluate_multiple_choice(
                loaded.model,
                loaded.tokenizer,
                [self.task.name],
                data=self.task.data if self.task.data is None else Path(self.task.data),
                limit=len(self.task.samples),
                num_fewshot=self.task.num_fewshot,
                batch_size=self.task.batch_size,
                journal=journal,
            )
            seconds = (time.perf_counter() - start + journal.seconds) / len(self.task.samples)
        by_id = {str(sample.doc_id): sample for sample in found.samples}
        for order, sample, _ in missing:
            yield self._record(sample, by_id[sample.id], order, seconds)
        # The consumer has written the last record by the time that it asks for the next one.
        path.unlink(missing_ok=True)

    def _record(self, sample: Sample, answered: ChoiceSample, order: int, seconds: float) -> Record:
        choices = tuple(choice.strip() for choice in answered.choices)
        return self.record(
            sample,
            order,
            prompt=answered.prompt,
            question=sample.question,
            reference=" | ".join(choices[target] for target in answered.targets),
            output=choices[answered.prediction],
            scores=answered.scores,
            choices=choices,
            seconds=seconds,
            candidates=tuple(
                {"text": choice, "score": loglikelihood, "sum_logprob": loglikelihood}
                for choice, loglikelihood in zip(choices, answered.loglikelihoods, strict=True)
            ),
        )
