"""Asks the students of the comparison of methods multiple-choice questions, through lm-eval.

python -m bench.reproduce.downstream --students runs/students --data DATA --out bench/results/downstream.jsonl

``--students`` is the folder in which ``bench.reproduce.methods test --students`` saved them, and ``--data`` holds the
tasks' files as ``slimkernels.evaluate.lm_eval.local_data.write_local_tasks`` describes. The teacher, and the students
of ``--student half`` before their training, are asked too. Each model and task is one line of the results file, written
when it has ended, and is not asked again. Needs the extra ``harness``.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from bench import records
from bench.machine import machine
from bench.reproduce.methods_plan import METHODS, STUDENTS, SUPPORTS
from slimkernels.cli.options import positive_int
from slimkernels.evaluate.lm_eval.tasks import evaluate_multiple_choice
from slimkernels.models.make_student import drop_layers
from slimkernels.teacher import load_model, load_teacher

# Tasks, and the share of the limit that is asked of each of their parts: MMLU has 57 subjects, and TruthfulQA's prompts
# are five times as long as the others'.
TASKS = {"arc_easy": 1.0, "arc_challenge": 1.0, "hellaswag": 1.0, "truthfulqa_mc1": 0.4, "mmlu": 0.04}
TEACHER, BEFORE = "teacher", "before"
_NAME = re.compile(rf"({'|'.join(STUDENTS)})-(\d+)-({'|'.join(METHODS | SUPPORTS)})-(\d+)")


def models(students: Path, teacher: str) -> Iterator[tuple[dict[str, Any], Path | None]]:
    """Yields the fields that identify each model, and the folder of a saved student.

    Raises:
        ValueError: A folder is no saved student's.
    """
    yield {"student": None, "method": TEACHER, "labels": 0, "seed": 0, "teacher": teacher}, None
    yield {"student": "half", "method": BEFORE, "labels": 0, "seed": 0, "teacher": teacher}, None
    for folder in sorted(students.iterdir()):
        if folder.is_dir() and folder.suffix != ".tmp":
            if not (named := _NAME.fullmatch(folder.name)):
                raise ValueError(
                    f"students must hold folders named KIND-LABELS-METHOD-SEED, as `methods test --students` "
                    f"saves them, got {folder}"
                )
            student, labels, method, seed = named.groups()
            fields = {"student": student, "method": method, "labels": int(labels), "seed": int(seed)}
            yield fields | {"teacher": teacher}, folder


def load(fields: dict[str, Any], folder: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in float32, with its tokenizer."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    model, tokenizer = load_teacher(fields["teacher"])
    if fields["method"] == BEFORE:
        model = drop_layers(load_model(fields["teacher"]), STUDENTS["half"].layers or ())
    return model, tokenizer


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, data: Path, limit: int, batch_size: int = 16
) -> dict[str, Any]:
    """Returns the fields of a task's row: whether each question was answered rightly, and the accuracy of guessing."""
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate_multiple_choice(model, tokenizer, [task], data=data, limit=limit, batch_size=batch_size)
    right = [int(sample.prediction in sample.targets) for sample in found.samples]
    return {
        "accuracy": statistics.fmean(right),
        "right": "".join(map(str, right)),
        "guessing": statistics.fmean(len(sample.targets) / len(sample.choices) for sample in found.samples),
        "num_samples": len(right),
        "lm_eval": found.lm_eval_version,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=Path, required=True, help="folder of saved students")
    parser.add_argument("--data", type=Path, required=True, help="folder with the tasks' files")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file of the rows")
    parser.add_argument("--teacher", default="smollm2-135m-instruct", help="the students' teacher")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--limit", type=positive_int, default=100, help="questions of each task, from the first")
    args = parser.parse_args()
    for name, folder in (("students", args.students), ("data", args.data)):
        if not folder.is_dir():
            parser.error(f"--{name} must be a folder, got {folder}, which is none")
    records.arguments_rows(parser, args.out, "task", "student", "method", "limit")
    try:
        asked = list(models(args.students, args.teacher))
    except ValueError as error:
        parser.error(f"--{error}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for fields, folder in asked:
        identity = fields | {"limit": args.limit}
        done = [row["task"] for row in records.read(args.out) if identity.items() <= row.items()]
        missing = [task for task in args.tasks if task not in done]
        model, tokenizer = load(fields, folder) if missing else (None, None)
        for task in missing:
            limit = max(1, round(TASKS[task] * args.limit))
            row = {"op": "downstream", "task": task} | identity | machine()
            row |= ask(model, tokenizer, task, args.data, limit)
            print(f"{fields['student']}, {fields['method']}, seed {fields['seed']}, {task}: {row['accuracy']:.3f}")
            records.add(args.out, row)


if __name__ == "__main__":
    main()
