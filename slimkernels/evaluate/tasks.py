"""Tasks with questions to answer in writing, read from local files in the layouts that their authors publish."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slimkernels.evaluate.answers import AnswerKind, canonical
from slimkernels.evaluate.prompts import SHOTS
from slimkernels.evaluate.records import content_hash

ROUGE = "rouge_l"
# Kind of free texts in records; tasks have None.
TEXT = "text"
# The order is the same for every run, so that a larger number of samples extends a smaller one.
ORDER_SEED = 0


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question with its correct answer.

    Attributes:
        id: Identifier, unique in its task.
        question: Text of the question, with the choices if there are any.
        reference: Correct answer: a number, "yes" or "no", a letter, or a free text.
        choices: Texts that the letters A, B, ... stand for; empty without letters.
    """

    id: str
    question: str
    reference: str
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """Samples, and how they are asked and scored.

    Attributes:
        name: Name of the task.
        kind: Kind of the answers; None for free texts, which are scored by Rouge-L.
        source: Path of the file with the samples, relative to the data folder.
        source_hash: Hash of the file's content.
        samples: Samples in an order that is the same for every run.
        available: Number of samples in the file.
        template: Prompt with ``{question}`` for questions of the user's own; None for the named tasks.
    """

    name: str
    kind: AnswerKind | None
    source: str
    source_hash: str
    samples: tuple[Sample, ...]
    available: int
    template: str | None = None

    @property
    def own_kind(self) -> str:
        """Kind of the answers to questions of the user's own, as records keep it; empty for the named tasks."""
        return "" if self.template is None else self.kind or TEXT

    def prompt(self, sample: Sample, shots: int) -> str:
        """Returns the question after ``shots`` worked examples, without any model's chat template.

        Questions of the user's own have no examples.

        Raises:
            ValueError: The task has fewer examples than ``shots``.
        """
        if self.template is not None:
            return self.template.replace("{question}", sample.question)
        if self.kind is None:
            return f"{sample.question}\n"
        examples = SHOTS[self.name]
        if not 0 <= shots <= len(examples):
            raise ValueError(f"shots must be between 0 and {len(examples)} for {self.name}, got {shots}")
        parts = [f"Q: {question}\nA: {answer}\n" for question, answer in examples[:shots]]
        return "\n".join([*parts, f"Q: {sample.question}\nA:"])


def load_task(name: str, data_dir: str | os.PathLike[str], num_samples: int | None = None) -> Task:
    """Reads a task's samples.

    Args:
        name: "gsm8k", "strategyqa", "commonsenseqa", "self_instruct", or "dolly".
        data_dir: Folder that has a folder for each task.
        num_samples: Number of samples to take, at least 1, from the start of a shuffled order that is the same for all
            runs; None takes all.

    Raises:
        ValueError: ``name`` is unknown, ``num_samples`` is below 1, or the file has a row that is not a sample of the
            task; the message names the row.
        FileNotFoundError: No file of the task exists; the message names the paths that were tried.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    check_num_samples(num_samples)
    kind, readers = TASKS[name]
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"data folder not found: {data_dir}; {name} needs {' or '.join(readers)} in it")
    found = next((file for file in readers if (Path(data_dir) / file).is_file()), None)
    if found is None:
        looked_for = " or ".join(str(Path(data_dir) / file) for file in readers)
        raise FileNotFoundError(f"data for {name} not found: looked for {looked_for}")
    return read_task(name, kind, Path(data_dir) / found, found, readers[found], num_samples)


def read_task(
    name: str,
    kind: AnswerKind | None,
    path: Path,
    source: str,
    read: Callable[[Mapping[str, Any]], Sample],
    num_samples: int | None,
    template: str | None = None,
) -> Task:
    """Reads the samples of a .json or .jsonl file; ``source`` is the file's name in the report.

    Raises:
        ValueError: A row is not a sample, or there is none; the message names the row.
    """
    content = path.read_bytes()
    samples: list[Sample] = []
    ids: set[str] = set()
    for place, row in _rows(content, source):
        try:
            sample = read(row)
            sample = dataclasses.replace(sample, id=sample.id or str(len(samples)))
            if sample.id in ids:
                raise ValueError(f"an earlier row has the same id {sample.id!r}")
            if kind is not None and canonical(sample.reference, kind) is None:
                raise ValueError(f"{sample.reference!r} is not an answer of kind {kind!r}")
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{path}, {place}: not a sample of {name} ({error})") from error
        samples.append(sample)
        ids.add(sample.id)
    if not samples:
        raise ValueError(f"{path} must hold samples of {name}, got none")
    random.Random(ORDER_SEED).shuffle(samples)  # noqa: S311 -- an order, not a secret
    return Task(name, kind, source, content_hash([content]), tuple(samples[:num_samples]), len(samples), template)


def check_num_samples(num_samples: int | None) -> None:
    """Raises ValueError unless a number of samples is at least 1, or None for all."""
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, or None for all, got {num_samples}")


def _rows(content: bytes, file: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the rows of a .json list or a .jsonl file, each with its place for messages."""
    try:
        text = content.decode("utf-8-sig")
        if file.endswith(".json"):
            rows: Iterable[tuple[str, Any]] = [(f"row {n}", row) for n, row in enumerate(json.loads(text), 1)]
        else:
            lines = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
            rows = [(place, json.loads(line)) for place, line in lines]
    except ValueError as error:
        raise ValueError(f"{file} must hold JSON: {error}") from error
    yield from rows


def _gsm8k(row: Mapping[str, Any]) -> Sample:
    return Sample("", row["question"].strip(), row["answer"].rpartition("####")[2].strip().replace(",", ""))


def _gsm8k_foundry(row: Mapping[str, Any]) -> Sample:
    return Sample("", row["context"].strip(), str(row["answer"]).replace(",", ""))


def _strategyqa(row: Mapping[str, Any]) -> Sample:
    if not isinstance(row["answer"], bool):
        raise ValueError(f"answer must be true or false, got {row['answer']!r}")
    return Sample(str(row["qid"]), row["question"].strip(), "yes" if row["answer"] else "no")


def _commonsenseqa(row: Mapping[str, Any]) -> Sample:
    choices = {choice["label"]: choice["text"] for choice in row["question"]["choices"]}
    if sorted(choices) != [chr(ord("A") + index) for index in range(len(choices))] or row["answerKey"] not in choices:
        raise ValueError(f"labels must be A, B, ... with the answer among them, got {sorted(choices)}")
    texts = tuple(choices[label] for label in sorted(choices))
    lines = [row["question"]["stem"].strip(), *(f"({label}) {choices[label]}" for label in sorted(choices))]
    return Sample(str(row["id"]), "\n".join(lines), row["answerKey"], texts)


def _self_instruct(row: Mapping[str, Any]) -> Sample:
    instance = row["instances"][0]
    question = f"{row['instruction'].strip()}\n\n{instance['input'].strip()}".strip()
    return Sample(str(row["id"]), question, instance["output"].strip())


def _dolly(row: Mapping[str, Any]) -> Sample:
    return Sample("", row["prompt"].strip(), (row["response"] if "response" in row else row["answer"]).strip())


_Reader = Callable[[Mapping[str, Any]], Sample]
# Each task has the kind of its answers, and files with their readers; the first file that exists is read.
TASKS: dict[str, tuple[AnswerKind | None, dict[str, _Reader]]] = {
    "gsm8k": ("number", {"gsm8k/test.jsonl": _gsm8k, "gsm8k/foundry_gsm8k.jsonl": _gsm8k_foundry}),
    "strategyqa": ("yes_no", {"strategyqa/dev.json": _strategyqa}),
    "commonsenseqa": ("letter", {"commonsenseqa/dev_rand_split.jsonl": _commonsenseqa}),
    "self_instruct": (
        None,
        {
            "self_instruct/user_oriented_instructions.jsonl": _self_instruct,
            "self_instruct/seed_tasks.jsonl": _self_instruct,
        },
    ),
    "dolly": (
        None,
        {"dolly_hhrlhf/dolly_hhrlhf_train_small.jsonl": _dolly, "dolly_small/dolly.jsonl": _dolly},
    ),
}
