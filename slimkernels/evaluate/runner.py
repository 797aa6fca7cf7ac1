"""Runs an evaluation: every model and decoder answers every sample once, and records and settings are written."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from slimkernels.durable import write_json
from slimkernels.evaluate.choices import ChoiceCell, ChoiceTask
from slimkernels.evaluate.decoders import DecoderSettings, is_random, make_search
from slimkernels.evaluate.heldout import HeldoutCell, HeldoutTask
from slimkernels.evaluate.judge import Judge, answer_of, prompt_hash
from slimkernels.evaluate.models import EvaluatedModel, LoadedModel, ServedModel
from slimkernels.evaluate.records import (
    Record,
    RecordFile,
    content_key,
    read_records,
    record_path,
    write_records,
)
from slimkernels.evaluate.scoring import check_scorer, kind_of, score
from slimkernels.evaluate.tasks import Sample, Task
from slimkernels.search import PathFinderConfig, Question, QuestionError, Result, Tree
from slimkernels.search.tree import ROOT
from slimkernels.serving.client import ServerUnavailableError

RUN_FILE = "run.json"
# Increment it when prompts or decoders change, so that new records are not mixed with old ones.
_VERSION = 1

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """An evaluation: every model on held-out documents and multiple choice, and with every decoder on written tasks.

    Attributes:
        models: Different models.
        decoders: Names of the decoders.
        tasks: Tasks with questions to answer in writing; may be empty if there is another kind of task.
        settings: Settings of the decoders.
        seeds: Seeds of the sampling; a decoder without randomness runs once.
        shots: Number of worked examples before each question.
        batch_questions: Number of samples that are decoded together.
        heldout: Held-out documents; None if there are none.
        choices: Multiple-choice tasks, which need no decoder.
    """

    models: Sequence[EvaluatedModel]
    decoders: Sequence[str]
    tasks: Sequence[Task]
    settings: DecoderSettings = dataclasses.field(default_factory=DecoderSettings)
    seeds: Sequence[int] = (0,)
    shots: int = 3
    batch_questions: int = PathFinderConfig.batch_questions
    heldout: HeldoutTask | None = None
    choices: Sequence[ChoiceTask] = ()

    def __post_init__(self) -> None:
        for name in ("models", "decoders", "tasks", "seeds"):
            if name == "tasks" and not self.tasks and (self.heldout is not None or self.choices):
                continue
            values = [getattr(value, "label", getattr(value, "name", value)) for value in getattr(self, name)]
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be at least one, all different, got {values}")
        texts = [task.name for task in (self.heldout, *self.choices) if task is not None]
        served = [model.label for model in self.models if model.served is not None]
        if texts and served:
            raise ValueError(
                f"tasks must have written answers for servers' models ({', '.join(served)}), got {', '.join(texts)}, "
                "which need probabilities of given texts: evaluate these with models that run here"
            )
        for task in self.tasks:
            check_scorer(task)
            task.prompt(task.samples[0], self.shots)
            for decoder in self.decoders:
                self.settings.config(task)
                self.settings.of(decoder, task)


@dataclasses.dataclass(frozen=True)
class _Cell:
    """One model with one decoder on one task."""

    model: EvaluatedModel
    decoder: str
    task: Task
    plan: Plan

    @property
    def seeds(self) -> list[int | None]:
        return list(self.plan.seeds) if is_random(self.decoder) else [None]

    @property
    def settings(self) -> dict[str, Any]:
        return self.plan.settings.of(self.decoder, self.task)

    @property
    def file(self) -> str:
        """The path of the records in the run's folder; it contains a hash of everything that decides the outputs."""
        decided_by = (self.model.identity, self.settings, self.plan.shots, self.task.source_hash, _VERSION)
        return record_path(self.model.label, self.decoder, self.task.name, decided_by=decided_by)

    def key(self, sample: Sample, seed: int | None) -> str:
        prompt = self.task.prompt(sample, self.plan.shots)
        return content_key(self.model.identity, self.decoder, self.settings, self.task.name, sample.id, prompt, seed)

    def answer(
        self, loaded: LoadedModel | ServedModel, missing: Sequence[tuple[int, Sample, int | None]]
    ) -> Iterable[Record]:
        """Decodes samples batch by batch and yields their records; a batch's wall time is shared equally."""
        return _answer(self, loaded, missing)


def run(
    plan: Plan, output_dir: str | os.PathLike[str], progress: Callable[[str], Progress] | None = None
) -> list[Record]:
    """Answers all samples without a record; the same call resumes a run that was stopped.

    Args:
        plan: Models, decoders and tasks to run.
        output_dir: Folder for ``records/*.jsonl`` and ``run.json``.
        progress: Function of a description that returns a callback of the number of samples done and their total.

    Returns:
        Old and new records of the plan, scored again.

    Raises:
        ValueError: A record file is damaged, or a model cannot process a question.
        BlockingIOError: Another run is writing the same records.
        FloatingPointError: A model returned NaN logits.
        ServerUnavailableError, ServerRequestError: A server stopped answering; its earlier answers are on the disk.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    cells: list[_Cell | HeldoutCell | ChoiceCell] = []
    for model in plan.models:
        if plan.heldout is not None:
            cells.append(HeldoutCell(model, plan.heldout))
        cells += [ChoiceCell(model, task, output_dir) for task in plan.choices]
        cells += [_Cell(model, decoder, task, plan) for decoder in plan.decoders for task in plan.tasks]
    path = output_dir / RUN_FILE
    # Records keep the ratings of an earlier judge, so the description keeps the judge.
    judge = json.loads(path.read_text()).get("judge") if path.is_file() else None
    write_json(path, _describe(plan, cells) | ({"judge": judge} if judge else {}))
    records: list[Record] = []
    for model in plan.models:
        loaded: Any = None
        for cell in (cell for cell in cells if cell.model is model):
            report = progress(_name(cell)) if progress else lambda done, total: None
            with RecordFile(output_dir / cell.file) as file:
                wanted = [
                    (order, sample, seed) for seed in cell.seeds for order, sample in enumerate(cell.task.samples)
                ]
                missing = [entry for entry in wanted if cell.key(*entry[1:]) not in file]
                report(len(wanted) - len(missing), len(wanted))
                if missing and loaded is None:
                    loaded = model.load()
                answered = cell.answer(loaded, missing) if loaded is not None else ()
                try:
                    for done, record in enumerate(answered, len(wanted) - len(missing) + 1):
                        file.append(record)
                        report(done, len(wanted))
                except ServerUnavailableError as error:
                    raise ServerUnavailableError(
                        f"{model.label}: {error}; its answers so far are kept in {output_dir}: run the same command to "
                        "continue"
                    ) from error
                records += [score(file.records[cell.key(*entry[1:])]) for entry in wanted]
    return records


def load_run(output_dir: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Record]]:
    """Reads the description and the records of a folder's last run, and scores the records again.

    Raises:
        FileNotFoundError: The folder holds no run.
        ValueError: A file is damaged.
    """
    path = Path(output_dir) / RUN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no run found: {path} does not exist; run without --rescore first")
    described = json.loads(path.read_text())
    records, unfinished = [], []
    for cell in described["cells"]:
        file = Path(output_dir) / cell["file"]
        found = read_records(file) if file.is_file() else []
        found = [record for record in found if record.order < cell["samples"] and record.seed in cell["seeds"]]
        wanted = cell["samples"] * len(cell["seeds"])
        if len(found) < wanted:
            unfinished.append(f"{cell.get('name', cell['file'])}: {len(found)} of {wanted}")
        records += map(score, found)
    if not any(record.judged for record in records):
        described.pop("judge", None)
    return described | {"unfinished": unfinished}, records


def rescore(output_dir: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Record]]:
    """Extracts answers and scores again in every record file of a folder's last run, without generating anything.

    Raises:
        FileNotFoundError, ValueError: ``load_run`` raises them.
        BlockingIOError: Another run is writing the same records.
    """
    described, _ = load_run(output_dir)
    for cell in described["cells"]:
        file = Path(output_dir) / cell["file"]
        if file.is_file():
            with RecordFile(file) as held:
                write_records(file, [score(record) for record in held.records.values()])
    return load_run(output_dir)


def rate(
    output_dir: str | os.PathLike[str], judge: Judge, progress: Callable[[str], Progress] | None = None
) -> tuple[dict[str, Any], list[Record]]:
    """Has a judge rate the outputs of a folder's last run that it has not rated yet.

    Raises:
        FileNotFoundError, ValueError: ``load_run`` raises them.
        ServerUnavailableError, ServerRequestError: The judge stopped answering; its earlier ratings are on the disk.
    """
    output_dir = Path(output_dir)
    described, records = load_run(output_dir)
    asked = {"model": judge.model, "url": judge.url, "prompt": prompt_hash()}
    write_json(output_dir / RUN_FILE, described | {"judge": asked})
    wanted = {record.key for record in records if kind_of(record) is not None}
    for cell in described["cells"]:
        if not (output_dir / cell["file"]).is_file():
            continue
        with RecordFile(output_dir / cell["file"]) as file:
            own = [record for record in file.records.values() if record.key in wanted]
            missing = [record for record in own if not judge.has_rated(record)]
            if not own:
                continue
            report = (
                progress(f"{judge.model} rates {own[0].model}, {own[0].decoder}, {own[0].task}") if progress else None
            )
            for done, (record, rating) in enumerate(
                zip(missing, judge.rate_all(answer_of(record) for record in missing), strict=True),
                len(own) - len(missing) + 1,
            ):
                file.append(judge.judged(record, rating))
                if report is not None:
                    report(done, len(own))
    return load_run(output_dir)


def _answer(
    cell: _Cell, loaded: LoadedModel | ServedModel, missing: Sequence[tuple[int, Sample, int | None]]
) -> Iterable[Record]:
    size = cell.plan.batch_questions
    for seed in cell.seeds:
        of_seed = [(order, sample) for order, sample, other in missing if other == seed]
        for first in range(0, len(of_seed), size):
            batch = of_seed[first : first + size]
            search = make_search(
                cell.decoder,
                loaded.engine,
                cell.plan.settings,
                cell.task,
                seed=seed or 0,
                batch_questions=size,
            )
            prompts = [loaded.render(cell.task.prompt(sample, cell.plan.shots)) for _, sample in batch]
            questions = [
                Question(loaded.encode(prompt), sample.question, sample.choices)
                for prompt, (_, sample) in zip(prompts, batch, strict=True)
            ]
            start = time.perf_counter()
            try:
                results = search.solve(questions)
            except QuestionError as error:
                sample = batch[error.index][1]
                raise ValueError(
                    f"{cell.model.label} cannot read sample {sample.id} of task {cell.task.name} with "
                    f"shots={cell.plan.shots}: {error.reason}"
                ) from error
            seconds = (time.perf_counter() - start) / len(batch)
            for (order, sample), prompt, result in zip(batch, prompts, results, strict=True):
                yield score(_record(cell, sample, order, seed, prompt, result, seconds))


def _record(
    cell: _Cell, sample: Sample, order: int, seed: int | None, prompt: str, result: Result, seconds: float
) -> Record:
    return Record(
        key=cell.key(sample, seed),
        model=cell.model.label,
        decoder=cell.decoder,
        task=cell.task.name,
        sample=sample.id,
        order=order,
        seed=seed,
        prompt=prompt,
        question=sample.question,
        reference=sample.reference,
        output=result.text,
        answers={},
        scores={},
        choices=sample.choices,
        kind=cell.task.own_kind,
        tokens=result.num_tokens,
        output_tokens=0 if result.node is None else int(result.tree.num_tokens[result.node]),
        seconds=seconds,
        finished=result.finished,
        candidates=tuple(_candidates(cell.decoder, result)),
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


def _describe(plan: Plan, cells: Sequence[_Cell | HeldoutCell | ChoiceCell]) -> dict[str, Any]:
    """Describes a run for the report: models, decoders, tasks, versions, the machine, and the files of the records."""
    asked = {"seeds": list(plan.seeds), "shots": plan.shots, "batch_questions": plan.batch_questions}
    heldout = [] if plan.heldout is None else [plan.heldout]
    return {
        "models": [
            {"model": model.label, "identity": model.identity}
            | ({} if model.served is None else {"served": model.served})
            for model in plan.models
        ],
        "decoders": [
            {"decoder": decoder, "settings": plan.settings.of(decoder, plan.tasks[0])}
            for decoder in plan.decoders
            if plan.tasks
        ],
        "tasks": [
            {
                "task": task.name,
                "file": task.source,
                "hash": task.source_hash,
                "samples": len(task.samples),
                "available": task.available,
            }
            for task in (*heldout, *plan.choices, *plan.tasks)
        ],
        **(asked if plan.tasks else {}),
        "versions": {name: _version(name) for name in ("slimkernels", "torch", "transformers")},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "cells": [
            {"name": _name(cell), "file": cell.file, "samples": len(cell.task.samples), "seeds": cell.seeds}
            for cell in cells
        ],
    }


def _name(cell: _Cell | HeldoutCell | ChoiceCell) -> str:
    return ", ".join(filter(None, (cell.model.label, cell.decoder, cell.task.name)))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
