"""Questions to answer in writing, from local files in the form in which their authors publish them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slimkernels.evaluate.answers import AnswerKind, canonical
from slimkernels.evaluate.prompts import SHOTS

ROUGE = "rouge_l"
# Fixed, so that more samples of a task are always the same ones and some more.
ORDER_SEED = 0


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question with its right answer.

    Attributes:
        id: Unique in its task.
        question: As the model is asked it.
        reference: The right answer; a number, "yes" or "no", a letter, or a whole text.
        choices: What the letters stand for.
    """

    id: str
    question: str
    reference: str
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """Samples, and how they are asked and scored.

    Attributes:
        name: Of the task.
        kind: Of its answers; None: they are whole texts, scored by Rouge-L.
        source: The file they come from, without its folder's path.
        source_hash: Of the file's content.
        samples: In the order in which they are taken, the same for every run.
        available: How many samples the file has.
    """

    name: str
    kind: AnswerKind | None
    source: str
    source_hash: str
    samples: tuple[Sample, ...]
    available: int

    def prompt(self, sample: Sample, shots: int) -> str:
        """The question after this many worked examples, without any model's chat template.

        Raises:
            ValueError: There are not so many examples.
        """
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
        data_dir: The folder with a folder for each task.
        num_samples: How many to take, at least 1, of one order that is shuffled once for all runs; None: all.

    Raises:
        ValueError: An unknown name, ``num_samples`` below 1, or a file that does not hold such samples: which line.
        FileNotFoundError: The file is not there; the message names those that were looked for.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    check_num_samples(num_samples)
    kind, readers = TASKS[name]
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"data folder not found: {data_dir} is not there; {name} needs {' or '.join(readers)}")
    found = next((file for file in readers if (Path(data_dir) / file).is_file()), None)
    if found is None:
        looked_for = " or ".join(str(Path(data_dir) / file) for file in readers)
        raise FileNotFoundError(f"data for {name} not found: looked for {looked_for}")
    content = (Path(data_dir) / found).read_bytes()
    samples: list[Sample] = []
    ids: set[str] = set()
    for place, row in _rows(content, found):
        try:
            sample = readers[found](row)
            sample = dataclasses.replace(sample, id=sample.id or str(len(samples)))
            if sample.id in ids:
                raise ValueError(f"the id {sample.id!r} is that of a row before")
            if kind is not None and canonical(sample.reference, kind) is None:
                raise ValueError(f"{sample.reference!r} is no answer of kind {kind!r}")
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{Path(data_dir) / found}, {place}: not a sample of {name} ({error})") from error
        samples.append(sample)
        ids.add(sample.id)
    if not samples:
        raise ValueError(f"{Path(data_dir) / found} must hold samples of {name}, got none")
    random.Random(ORDER_SEED).shuffle(samples)  # noqa: S311 -- an order, not a secret
    digest = hashlib.blake2b(content, digest_size=12).hexdigest()
    return Task(name, kind, found, digest, tuple(samples[:num_samples]), len(samples))


def check_num_samples(num_samples: int | None) -> None:
    """Raises ValueError for a number of samples to take that is not at least 1, or None."""
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, or None for all, got {num_samples}")


def _rows(content: bytes, file: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a .json list or a .jsonl file, with where each stands."""
    try:
        text = content.decode()
        if file.endswith(".json"):
            rows: Iterable[tuple[str, Any]] = [(f"row {n}", row) for n, row in enumerate(json.loads(text), 1)]
        else:
            lines = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
            rows = [(place, json.loads(line)) for place, line in lines]
    except ValueError as error:
        raise ValueError(f"{file} must hold JSON, as its name says: {error}") from error
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
# The kind of a task's answers, and the files that it may be read from, the first that is there.
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
