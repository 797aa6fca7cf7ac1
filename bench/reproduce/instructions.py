"""Reproduces an experiment on following instructions: SFT, KD, SLIM and MiniLLM train the same students.

python -m bench.reproduce.instructions tune --train TRAIN.jsonl --eval dolly/test.jsonl self_instruct/test.jsonl \
    --work runs/instructions --out bench/results/instructions.jsonl
python -m bench.reproduce.instructions test (the same arguments) [--students half] [--methods slim minillm]
python -m bench.reproduce.instructions judge (the same arguments) --judge FILE.gguf [--llamacpp PYTHON]

The data are not shipped; ``instructions_data.read_examples`` lists the supported layouts. A student keeps some layers
of the teacher and learns from all responses of the training data once, by SFT. All methods start from there, and learn
from as many labels again: SFT from the responses, KD and SLIM from the responses with the teacher's largest logits, and
MiniLLM (extra ``minillm``) from as many tokens that the student draws itself. ``tune`` tries two learning rates of each
method on examples that are held out of the training data, and writes the better one down. ``test`` trains three
students by each choice and measures Rouge-L of their responses to the evaluation files, which nothing else reads. Then
each method has as much processor time as SLIM had, in place of as many labels. ``judge`` shows pairs of responses,
SLIM's and another's, to a model behind llama.cpp, in both orders.

Each training is one line of the results file, written when it has ended, and is never run again; so is each pair that
was judged. ``--work`` keeps the teacher's logits, the students that all methods start from, and all responses.
Processor time counts, since it changes less than wall time beside other work (``--beside``).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from bench import records
from bench.machine import installed_version, machine, one_at_a_time
from bench.reproduce.instructions_data import Example, documents, prompt_ids, read_examples, short, spread, without
from bench.reproduce.instructions_judge import PairJudge, Verdict, hash_of, serve
from bench.reproduce.instructions_plan import (
    BEFORE,
    METHODS,
    START,
    STUDENTS,
    TEACHER,
    TEST_SEEDS,
    TUNING_SEED,
    Rows,
    Unit,
    chosen,
    pairs,
    trials,
)
from bench.reproduce.methods_training import Clock, train_student
from slimkernels.cli.options import positive_int
from slimkernels.evaluate.scoring import rouge_l
from slimkernels.models.make_student import drop_layers, make_student
from slimkernels.store import Store, StoreDataset
from slimkernels.teacher import capture, load_model, load_teacher

# Packages other than torch whose versions decide a result.
PACKAGES = ("transformers", "trl", "rouge-score")
_START_FIELDS = ("teacher", "top_fraction", "start_learning_rate")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that decide the result, in addition to the data.

    Attributes:
        teacher: Name or folder of the teacher, as for ``load_teacher``.
        labels: Number of labels from which each method learns; of tokens that the student draws, for MiniLLM.
        eval_examples: Maximum number of examples per evaluation file, evenly spread over those that fit.
        development_examples: Number of training examples that are held out, to choose learning rates by.
        max_length: Maximum number of tokens of a training example (prompt and response), and of a prompt.
        max_new_tokens: Maximum number of tokens of a response.
        top_fraction: Share of the vocabulary kept of each row of the teacher's logits.
        start_learning_rate: Peak learning rate of the SFT that all methods share.
    """

    teacher: str = "smollm2-135m-instruct"
    labels: int = 8000
    eval_examples: int = 100
    development_examples: int = 64
    max_length: int = 192
    max_new_tokens: int = 64
    top_fraction: float = 0.05
    start_learning_rate: float = 7.07e-4


class Experiment:
    """The rows of a results file, and what is added to them.

    Args:
        settings: Settings.
        training: Training examples, of which some are held out to choose learning rates by.
        held_out: Evaluation examples by data set.
        work: Folder for the teacher's logits, students and responses.
        out: JSONL file of rows.
        alone: Whether each training waits for the other benchmarks of the machine, and holds up later ones.

    Attributes:
        identity: Fields of every row that name settings and data.
    """

    def __init__(
        self,
        settings: Settings,
        training: list[Example],
        held_out: dict[str, list[Example]],
        work: Path,
        out: Path,
        *,
        alone: bool = True,
    ) -> None:
        self.settings, self.out, self.alone = settings, out, alone
        self._teacher, self.tokenizer = _load(settings.teacher)
        fitting = [example for example in training if _fits(self.tokenizer, example, settings.max_length)]
        development = spread(fitting, settings.development_examples)
        self._training = [example for example in fitting if example not in development]
        self._development = {"development": development}
        self._held_out = {
            dataset: spread(short(self.tokenizer, examples, settings.max_length), settings.eval_examples)
            for dataset, examples in held_out.items()
        }
        fields = dataclasses.asdict(settings)
        self.identity = {"settings": fields, "data": _digest(self._training, development, self._held_out)}
        # Other numbers of labels and evaluation examples have the same teacher and start.
        work = work / _digest(self._training, {name: fields[name] for name in _START_FIELDS})
        self._shared, self._said = work, work / "responses" / _digest(self.identity)

    def rows(self) -> Rows:
        """Reads the rows of these settings and data."""
        return Rows(records.read(self.out), self.identity)

    def tune(self, names: Iterable[str]) -> None:
        """Runs the missing trials of methods and writes down their choices."""
        for name in names:
            if self.rows().choice(name) is None:
                found = [self._run(unit) for unit in trials(name, self.settings.labels)]
                self._add(chosen(found))

    def test(self, students: Iterable[str], names: Sequence[str], seeds: Iterable[int]) -> None:
        """Measures what methods start from, and runs the missing trainings of the test, seed by seed."""
        students = list(students)
        self._measure_untrained(None, TEACHER, lambda: self._teacher)
        for student in students:
            self._measure_untrained(student, BEFORE, lambda student=student: self._before(student))
            self._measure_untrained(student, START, lambda student=student: self._start(student))
        for seed in seeds:
            for student in students:
                # The second time each method's budget of seconds is known.
                for name in [*names, *names]:
                    unit = self.rows().missing(student, name, seed, self.settings.labels)
                    if unit is not None:
                        self._run(unit)

    def judge(self, judge: PairJudge, students: Iterable[str], seeds: Sequence[int], examples: int) -> None:
        """Has pairs of responses judged: the teacher's with those of the students before, and SLIM's with others'."""
        rows = self.rows()
        found = []
        for student in students:
            bounds = rows.find(op="bound", method=TEACHER), rows.find(op="bound", method=START, student=student)
            found += [bounds] if all(bounds) else []
            found += [pair for seed in seeds for pair in pairs(rows, student, seed)]
        for ours, theirs in found:
            fields = {"op": "judged", "judge": judge.identity, "ours": ours["method"], "examples": examples}
            fields |= {name: theirs[name] for name in ("student", "method", "budget", "seed")}
            if self.rows().find(**fields):
                continue
            said = [self._responses(row) for row in (ours, theirs)]
            verdicts: dict[str, list[Verdict]] = {}
            for dataset, held_out in self._held_out.items():
                own = [[one["response"] for one in rows if one["dataset"] == dataset] for rows in said]
                chosen = spread(list(zip(held_out, *own, strict=True)), examples)
                verdicts[dataset] = [judge.compare(example.instruction, *both) for example, *both in chosen]
            self._add(fields | {"verdicts": verdicts})

    @cached_property
    def _store(self) -> Store:
        """The teacher's largest logits for every label of the training examples; prompts have no labels."""
        path = self._shared / "store"
        found = list(documents(self.tokenizer, self._training))
        capture(self._teacher, self.tokenizer, found, path, top_fraction=self.settings.top_fraction)
        return Store(path)

    def _documents(self, labels: int, seed: int) -> Subset:
        """Returns documents in an order of a seed until they have this many labels, repeated if there are too few."""
        store, order, left = self._store, [], labels
        chance = np.random.default_rng(seed)
        while left > 0:
            for index in chance.permutation(len(store)).tolist():
                if left > 0:
                    order.append(index)
                    left -= len(store[index].positions)
        return Subset(StoreDataset(store), order)

    def _before(self, student: str) -> PreTrainedModel:
        return drop_layers(load_model(self.settings.teacher), STUDENTS[student].layers or ())

    def _start(self, student: str) -> PreTrainedModel:
        """Returns the student that all methods start from, in float32."""
        folder = self._shared / "students" / student
        if not folder.is_dir():
            model = self._before(student)
            store = self._store
            print(f"{student}: SFT on {len(store)} documents", flush=True)
            options = {"method": "sft", "learning_rate": self.settings.start_learning_rate}
            train_student(model, StoreDataset(store), self.tokenizer, **_once(student, TUNING_SEED), **options)
            # A folder of this name is complete.
            unfinished = folder.with_name(f"{student}.tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            model.save_pretrained(unfinished)
            unfinished.rename(folder)
        return make_student(str(folder), dtype=torch.float32)

    def _run(self, unit: Unit) -> dict[str, Any]:
        """Trains a student, measures it, and adds its row, unless it has one."""
        with self._turn():
            rows = self.rows()
            if done := rows.of(unit):
                return done
            print(unit.name, flush=True)
            # The commit is that of the code that runs, also if another is checked out before the end.
            row = dataclasses.asdict(unit) | machine()
            student = self._start(unit.student)
            row |= self._train(student, unit, rows.choice(unit.method))
            row |= self._measure(student, row, self._development if unit.op == "trial" else self._held_out)
            print(f"  Rouge-L {row['rouge_l']:.2f}, {row['processor_seconds']:.0f} s of processor time", flush=True)
            return self._add(row)

    def _train(self, student: PreTrainedModel, unit: Unit, choice: dict[str, Any] | None) -> dict[str, Any]:
        settings, draws = self.settings, unit.method == "minillm"
        options = _once(unit.student, unit.seed) | unit.options
        batch_size = options["per_device_train_batch_size"]
        if draws:
            # In the trials, as if no response ended early.
            per_step = batch_size * settings.max_new_tokens if choice is None else choice["labels_per_step"]
            options |= {"max_steps": max(1, round(unit.labels / per_step))}
            options |= {"max_completion_length": settings.max_new_tokens}
        learned = StoreDataset(self._store) if draws else self._documents(unit.labels, unit.seed)
        clock = Clock()
        logs, _ = train_student(student, learned, self.tokenizer, teacher=self._teacher if draws else None, **options)
        clock.stop()
        if draws:
            labels = round(sum(batch_size * entry["completions/mean_length"] for entry in logs))
        else:
            labels = sum(len(document.positions) for document in learned)
        return {
            "steps": len(logs),
            "documents_learned": len(logs) * batch_size if draws else len(learned),
            "labels_learned": labels,
            "labels_per_step": labels / len(logs),
            "train_loss": statistics.fmean(entry["loss"] for entry in logs[-max(1, len(logs) // 10) :]),
            "processor_seconds": round(clock.processor_seconds, 3),
            "seconds": round(clock.seconds, 1),
            "alone": clock.alone,
        }

    def _measure_untrained(self, student: str | None, method: str, model_of: Any) -> None:
        row = {"op": "bound", "student": student, "method": method, "budget": None, "seed": None}
        with self._turn():
            if self.rows().find(**row) is None:
                row |= machine()
                model = model_of()
                self._add(row | self._measure(model, row, self._held_out))

    def _measure(self, model: PreTrainedModel, row: dict[str, Any], held_out: dict[str, list[Example]]) -> dict:
        """Writes down a model's responses, and returns their Rouge-L in %; the model is in bfloat16 from then on."""
        model.to(torch.bfloat16)
        clock = Clock()
        said = []
        for dataset, examples in held_out.items():
            responses = respond(model, self.tokenizer, examples, self.settings.max_new_tokens)
            pairs = zip(examples, responses, strict=True)
            said += [{"dataset": dataset, **example._asdict(), "response": response} for example, response in pairs]
        clock.stop()
        path = self._responses_path(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in said))
        return summary(said) | {"respond_seconds": round(clock.processor_seconds, 3)}

    def _responses(self, row: dict[str, Any]) -> list[dict[str, str]]:
        path = self._responses_path(row)
        if not path.exists():
            raise FileNotFoundError(f"{path} must hold the responses whose scores {self.out} has: run `test` here")
        return records.read(path)

    def _responses_path(self, row: dict[str, Any]) -> Path:
        names = "student", "method", "budget", "seed", "op"
        name = "-".join(str(row[name]) for name in names if row[name] is not None)
        if row["op"] == "trial":
            name += f"-{row['options']['learning_rate']:g}"
        return self._said / f"{name}.jsonl"

    def _turn(self) -> contextlib.AbstractContextManager:
        return one_at_a_time() if self.alone else contextlib.nullcontext()

    def _add(self, row: dict[str, Any]) -> dict[str, Any]:
        row = row | self.identity | {"documents": len(self._store), "labels_stored": self._store.num_rows}
        row |= {"versions": {name: installed_version(name) for name in PACKAGES}}
        row = machine() | row
        records.add(self.out, row)
        return row


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_teacher(name, dtype=torch.bfloat16)
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise ValueError(
            f"the teacher {name} must have a chat template and an end-of-text token: choose an instruction-tuned model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return model, tokenizer


def _once(student: str, seed: int) -> dict[str, Any]:
    """Returns the options of one pass over the documents."""
    return {"per_device_train_batch_size": STUDENTS[student].batch_size, "num_train_epochs": 1, "seed": seed}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _fits(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> bool:
    return any(len(document) <= max_length for document in documents(tokenizer, [example]))


@torch.inference_mode()
def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """Generates a response to each example by greedy decoding, in the order of the examples."""
    prompts = [prompt_ids(tokenizer, example) for example in examples]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    said: dict[int, str] = {}
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        padded = tokenizer.pad(
            {"input_ids": [prompts[index] for index in chosen]}, padding_side="left", return_tensors="pt"
        )
        whole = model.generate(
            **padded,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for index, ids in zip(chosen, whole[:, padded["input_ids"].shape[1] :], strict=True):
            said[index] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return [said[index] for index in range(len(examples))]


def summary(said: list[dict[str, str]]) -> dict[str, Any]:
    """Returns the mean Rouge-L in % and its values by data set, and counts texts outside ASCII and empty responses."""
    scores: dict[str, list[float]] = {}
    for one in said:
        score = 100 * rouge_l(one["response"], one["reference"])
        scores.setdefault(one["dataset"], []).append(round(score, 3))
    values = [value for found in scores.values() for value in found]
    non_ascii = {name: sum(not one[name].isascii() for one in said) for name in ("reference", "response")}
    empty = sum(not one["response"] for one in said)
    return {"rouge_l": math.fsum(values) / len(values), "scores": scores, "non_ascii": non_ascii, "empty": empty}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    tune = commands.add_parser("tune", help="choose every method's learning rate on held-out training examples")
    test = commands.add_parser("test", help="train by the choices, and measure on the evaluation files")
    judge = commands.add_parser("judge", help="have pairs of responses judged")
    for command in (tune, test, judge):
        command.add_argument("--train", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL files")
        command.add_argument(
            "--eval",
            type=Path,
            nargs="+",
            required=True,
            metavar="FILE",
            help="JSONL files, each in a folder of its own",
        )
        command.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for logits and responses")
        command.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL file of the rows")
        command.add_argument("--beside", action="store_true", help="run beside other work")
        for field in dataclasses.fields(Settings):
            flag = f"--{field.name.replace('_', '-')}"
            command.add_argument(flag, type=type(field.default), default=field.default, help="(default: %(default)s)")
    for command in (test, judge):
        command.add_argument("--students", choices=STUDENTS, nargs="+", default=list(STUDENTS), metavar="STUDENT")
        command.add_argument("--seeds", type=int, nargs="+", default=list(TEST_SEEDS), metavar="N")
    for command in (tune, test):
        command.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), metavar="METHOD")
    judge.add_argument("--judge", type=Path, required=True, metavar="FILE", help="GGUF file of the judge")
    judge.add_argument("--llamacpp", metavar="PYTHON", help="interpreter that has xllamacpp (default: this one)")
    judge.add_argument("--examples", type=positive_int, default=20, help="examples per evaluation file to judge")
    args = parser.parse_args(argv)
    folders = [path.resolve().parent.name for path in args.eval]
    if len(set(folders)) < len(folders):
        parser.error(f"--eval files are named by their folders, which must differ, got {folders}")
    if TUNING_SEED in getattr(args, "seeds", ()):
        parser.error(f"--seeds must not have {TUNING_SEED}, which chose the options, got {args.seeds}")
    records.arguments_rows(parser, args.out, "op", "settings", "data", "student", "method")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    held_out = {path.resolve().parent.name: read_examples(path) for path in args.eval}
    everything = [example for path in args.train for example in read_examples(path)]
    training = without(everything, (example for examples in held_out.values() for example in examples))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    experiment = Experiment(settings, training, held_out, args.work, args.out, alone=not args.beside)
    if args.command == "tune":
        experiment.tune(args.methods)
    elif args.command == "test":
        for name in args.methods:
            if experiment.rows().choice(name) is None:
                print(f"{name} is left out: its learning rate is not chosen yet, run `tune` first")
        experiment.test(args.students, args.methods, args.seeds)
    else:
        with serve(args.judge, args.llamacpp) as url, PairJudge(url, args.judge.stem, hash_of(args.judge)) as judge:
            experiment.judge(judge, args.students, args.seeds, args.examples)


if __name__ == "__main__":
    main()
