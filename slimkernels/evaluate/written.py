"""Questions that a model answers in writing with a decoder: the cell of a comparison, and its records."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from slimkernels.evaluate.cell import Cell
from slimkernels.evaluate.decoders import DecoderSettings, is_random, make_search
from slimkernels.evaluate.models import LoadedModel, ServedModel
from slimkernels.evaluate.records import Record, content_key, record_path
from slimkernels.evaluate.scoring import score
from slimkernels.evaluate.tasks import Sample, Task
from slimkernels.search import Question, QuestionError, Result, Tree
from slimkernels.search.tree import ROOT

# Increment it when prompts or decoders change, so that new records are not mixed with old ones.
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class WrittenCell(Cell):
    """One model with one decoder on one task.

    Attributes:
        model: Model to evaluate.
        task: Task with the questions.
        all_settings: Settings of the decoders.
        random_seeds: Seeds of the sampling, for a decoder with randomness.
        shots: Number of worked examples before each question.
        batch_questions: Number of samples that are decoded together.
        decoder: Name of the decoder.
    """

    task: Task
    all_settings: DecoderSettings
    random_seeds: Sequence[int]
    shots: int
    batch_questions: int

    @property
    def seeds(self) -> Sequence[int | None]:
        """The seeds of the sampling; only None for a decoder without randomness."""
        return self.random_seeds if is_random(self.decoder) else [None]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the decoder that decide its outputs."""
        return self.all_settings.of(self.decoder, self.task)

    @property
    def file(self) -> str:
        """The path of the records in the run's folder; it contains a hash of everything that decides the outputs."""
        decided_by = (self.model.identity, self.settings, self.shots, self.task.source_hash, _VERSION)
        return record_path(self.model.label, self.decoder, self.task.name, decided_by=decided_by)

    def key(self, sample: Sample, seed: int | None) -> str:
        """Returns the key of a sample's record."""
        prompt = self.task.prompt(sample, self.shots)
        return content_key(self.model.identity, self.decoder, self.settings, self.task.name, sample.id, prompt, seed)

    def answer(
        self, loaded: LoadedModel | ServedModel, missing: Sequence[tuple[int, Sample, int | None]]
    ) -> Iterable[Record]:
        """Decodes samples batch by batch and yields their records; a batch's wall time is shared equally."""
        size = self.batch_questions
        for seed in self.seeds:
            of_seed = [(order, sample) for order, sample, other in missing if other == seed]
            for first in range(0, len(of_seed), size):
                batch = of_seed[first : first + size]
                search = make_search(
                    self.decoder, loaded.engine, self.all_settings, self.task, seed=seed or 0, batch_questions=size
                )
                prompts = [loaded.render(self.task.prompt(sample, self.shots)) for _, sample in batch]
                questions = [
                    # A sample's answer depends on nothing but the sample and the seed: not on what else is missing.
                    Question(loaded.encode(prompt), sample.question, sample.choices, repeat=0)
                    for prompt, (_, sample) in zip(prompts, batch, strict=True)
                ]
                start = time.perf_counter()
                try:
                    results = search.solve(questions)
                except QuestionError as error:
                    sample = batch[error.index][1]
                    raise ValueError(
                        f"{self.model.label} cannot read sample {sample.id} of task {self.task.name} with "
                        f"shots={self.shots}: {error.reason}"
                    ) from error
                seconds = (time.perf_counter() - start) / len(batch)
                for (order, sample), prompt, result in zip(batch, prompts, results, strict=True):
                    yield score(self._record(sample, order, seed, prompt, result, seconds))

    def _record(
        self, sample: Sample, order: int, seed: int | None, prompt: str, result: Result, seconds: float
    ) -> Record:
        return self.record(
            sample,
            order,
            seed,
            prompt=prompt,
            question=sample.question,
            reference=sample.reference,
            output=result.text,
            scores={},
            choices=sample.choices,
            kind=self.task.own_kind,
            tokens=result.num_tokens,
            output_tokens=0 if result.node is None else int(result.tree.num_tokens[result.node]),
            seconds=seconds,
            finished=result.finished,
            candidates=tuple(_candidates(self.decoder, result)),
        )


def _candidates(decoder: str, result: Result) -> Iterable[dict[str, Any]]:
    """Yields the candidates for an output, each with the number of tokens generated up to its end.

    Independent chains count as if they were generated one after the other; a tree's steps count in their real order.
    """
    spent = _spent_by_chain(result.tree) if decoder == "self-consistency" else _spent_by_node(result)
    for candidate, value in zip(result.candidates, result.scores, strict=True):
        yield {
            "text": candidate.text,
            "tokens": candidate.num_tokens,
            "spent": spent[candidate.node],
            "score": value,
            "sum_logprob": candidate.sum_logprob,
        }


def _spent_by_chain(tree: Tree) -> list[int]:
    """Returns, for every node, the number of tokens of its chain and of all chains before it."""
    chains = [tree.path(node)[0] if node != ROOT else 0 for node in range(len(tree))]
    lengths = np.zeros(max(chains) + 1, np.int64)
    np.maximum.at(lengths, chains, tree.num_tokens)
    return np.cumsum(lengths)[chains].tolist()


def _spent_by_node(result: Result) -> list[int]:
    """Returns, for every node, the number of tokens that had been generated when it was complete."""
    tree = result.tree
    own = tree.num_tokens - np.where(tree.parent >= 0, tree.num_tokens[tree.parent], 0)
    spent = np.cumsum(own * np.maximum(tree.attempts, 1))
    # Discarded attempts at a step are assumed to be as long as the step that replaced them.
    return np.round(spent * (result.num_tokens / max(int(spent[-1]), 1))).astype(int).tolist()
