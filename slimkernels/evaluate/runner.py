"""Runs an evaluation: every model and decoder answers every sample once, and records and settings are written."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from slimkernels.durable import write_json
from slimkernels.evaluate.cell import Cell
from slimkernels.evaluate.choices import ChoiceCell, ChoiceTask
from slimkernels.evaluate.decoders import DecoderSettings
from slimkernels.evaluate.heldout import HeldoutCell, HeldoutTask
from slimkernels.evaluate.judge import Judge, prompt_hash, rated_response
from slimkernels.evaluate.models import EvaluatedModel
from slimkernels.evaluate.records import (
    Record,
    RecordFile,
    read_records,
    write_records,
)
from slimkernels.evaluate.scoring import check_scorer, kind_of, score
from slimkernels.evaluate.tasks import Task
from slimkernels.evaluate.written import WrittenCell
from slimkernels.search import PathFinderConfig
from slimkernels.serving.errors import ServerUnavailableError

RUN_FILE = "run.json"
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
        check_decoding(self.tasks, self.decoders, self.settings, self.shots, self.batch_questions)


def check_decoding(
    tasks: Sequence[Task], decoders: Sequence[str], settings: DecoderSettings, shots: int, batch_questions: int
) -> None:
    """Checks that every decoder can be asked every task; a comparison does so before its models are looked for.

    Raises:
        ValueError: A decoder is unknown, a number is out of range, or a task has fewer worked examples.
        ImportError: A task is scored by a package that is not installed.
    """
    for task in tasks:
        check_scorer(task)
        task.prompt(task.samples[0], shots)
        dataclasses.replace(settings.config(task), batch_questions=batch_questions)
        for decoder in decoders:
            settings.of(decoder, task)


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
    cells = _cells(plan, output_dir)
    path = output_dir / RUN_FILE
    # Records keep the ratings of an earlier judge, so the description keeps the judge.
    judge = json.loads(path.read_text()).get("judge") if path.is_file() else None
    write_json(path, _describe(plan, cells) | ({"judge": judge} if judge else {}))
    records: list[Record] = []
    for model in plan.models:
        # Loaded once, and only if a record is missing.
        load = functools.cache(model.load)
        for cell in (cell for cell in cells if cell.model is model):
            report = progress(cell.name) if progress else lambda done, total: None
            try:
                with RecordFile(output_dir / cell.file) as file:
                    records += _complete(cell, file, load, report)
            except ServerUnavailableError as error:
                raise ServerUnavailableError(
                    f"{model.label}: {error}; its answers so far are kept in {output_dir}: run the same command to "
                    "continue"
                ) from error
    return records


def _cells(plan: Plan, output_dir: Path) -> list[Cell]:
    cells: list[Cell] = []
    for model in plan.models:
        if plan.heldout is not None:
            cells.append(HeldoutCell(model, plan.heldout))
        cells += [ChoiceCell(model, task, output_dir) for task in plan.choices]
        cells += [
            WrittenCell(model, task, plan.settings, plan.seeds, plan.shots, plan.batch_questions, decoder=decoder)
            for decoder in plan.decoders
            for task in plan.tasks
        ]
    return cells


def _complete(cell: Cell, file: RecordFile, load: Callable[[], Any], report: Progress) -> list[Record]:
    """Answers the samples of a cell that have no record in its file, and returns the records of all, scored again."""
    wanted = [(order, sample, seed) for seed in cell.seeds for order, sample in enumerate(cell.task.samples)]
    missing = [entry for entry in wanted if cell.key(*entry[1:]) not in file]
    report(len(wanted) - len(missing), len(wanted))
    answered = cell.answer(load(), missing) if missing else ()
    for done, record in enumerate(answered, len(wanted) - len(missing) + 1):
        file.append(record)
        report(done, len(wanted))
    return [score(file.records[cell.key(*entry[1:])]) for entry in wanted]


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
                zip(missing, judge.rate_all(rated_response(record) for record in missing), strict=True),
                len(own) - len(missing) + 1,
            ):
                file.append(judge.judged(record, rating))
                if report is not None:
                    report(done, len(own))
    return load_run(output_dir)


def _describe(plan: Plan, cells: Sequence[Cell]) -> dict[str, Any]:
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
            {"name": cell.name, "file": cell.file, "samples": len(cell.task.samples), "seeds": list(cell.seeds)}
            for cell in cells
        ],
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
