"""Multiple-choice benchmarks as tasks of a side-by-side run: lm-eval asks and scores, its samples become records."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slimkernels.evaluate.heldout import HELDOUT, NO_DECODER
from slimkernels.evaluate.records import Record, content_key, record_path
from slimkernels.evaluate.tasks import TASKS, Sample, check_num_samples

if TYPE_CHECKING:
    from slimkernels.evaluate.lm_eval.tasks import ChoiceSample
    from slimkernels.evaluate.models import EvaluatedModel, LoadedModel


@dataclasses.dataclass(frozen=True)
class ChoiceTask:
    """A multiple-choice task of lm-eval.

    Attributes:
        name: lm-eval's.
        source: Where its questions come from, and how they are asked.
        source_hash: Of its questions and its few-shot examples.
        samples: The first of its data; the id is the index there. References and choices come with the answers.
        available: How many its data have.
        data: The folder with local files; None: the hub.
        num_fewshot: Examples before each question; None: what its definition says.
        batch_size: Sequences in a forward; as other sums, another one may change the last digits.
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
        names: Of lm-eval's tasks and groups; a group stands for its tasks.
        data: A folder laid out as ``write_local_tasks`` says; None: the hub.
        num_samples: The first so many of each task, at least 1, as lm-eval's ``limit``; None: all.
        num_fewshot: Examples before each question; None: what the definition of a task says.
        batch_size: Sequences in a forward.

    Raises:
        ImportError: lm-eval is not installed; the message names the extra.
        FileNotFoundError, ConnectionError: The data are not there.
        ValueError: Neither a task of ours nor one of lm-eval's that is multiple choice, or ``num_samples`` below 1.
    """
    check_num_samples(num_samples)
    own = ", ".join((HELDOUT, *TASKS))
    try:
        from slimkernels.evaluate.lm_eval.tasks import read_multiple_choice

        found = read_multiple_choice(names, data=data if data is None else Path(data), num_fewshot=num_fewshot)
    except ImportError as error:
        raise ImportError(
            f"tasks other than {own} are multiple-choice tasks of lm-eval, got {', '.join(names)}: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"tasks other than {own} are multiple-choice tasks of lm-eval: {error}") from error
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
class ChoiceCell:
    """One model on one multiple-choice task: the likeliest choice is its answer, whatever the decoders are.

    Attributes:
        model: To be asked.
        task: With the questions.
        folder: Of the run: beside the records, what the model gave is kept until all of them are there.
        decoder: None.
    """

    model: EvaluatedModel
    task: ChoiceTask
    folder: str | os.PathLike[str]
    decoder: str = NO_DECODER

    @property
    def seeds(self) -> list[int | None]:
        """There is no noise."""
        return [None]

    @property
    def _decided_by(self) -> list[str | int]:
        # With which others a sample is in a batch may change its last digits.
        task = self.task
        return [self.model.identity, task.name, task.source_hash, task.source, len(task.samples), task.batch_size]

    @property
    def file(self) -> str:
        """Named by what decides its records."""
        return record_path(self.model.label, self.task.name, decided_by=self._decided_by)

    def key(self, sample: Sample, seed: int | None) -> str:
        """Of a question's record."""
        return content_key(*self._decided_by, sample.id)

    def answer(self, loaded: LoadedModel, missing: Sequence[tuple[int, Sample, int | None]]) -> Iterable[Record]:
        """Has lm-eval evaluate all of the task, for the batches to be the same; questions share the time equally.

        Batches that a run before this one had from the model are not computed again.

        Raises:
            ValueError, BlockingIOError: As ``BatchJournal``.
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
        # Whoever takes the records has written the last one when it asks for another.
        path.unlink(missing_ok=True)

    def _record(self, sample: Sample, answered: ChoiceSample, order: int, seconds: float) -> Record:
        choices = tuple(choice.strip() for choice in answered.choices)
        return Record(
            key=self.key(sample, None),
            model=self.model.label,
            decoder=self.decoder,
            task=self.task.name,
            sample=sample.id,
            order=order,
            seed=None,
            prompt=answered.prompt,
            question=sample.question,
            reference=" | ".join(choices[target] for target in answered.targets),
            output=choices[answered.prediction],
            answers={},
            scores=answered.scores,
            choices=choices,
            seconds=seconds,
            candidates=tuple(
                {"text": choice, "score": loglikelihood, "sum_logprob": loglikelihood}
                for choice, loglikelihood in zip(choices, answered.loglikelihoods, strict=True)
            ),
        )
