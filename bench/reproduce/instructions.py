"""Reproduces an instruction-following experiment: SFT, KD, MiniLLM and SLIM train the same student, scored by Rouge-L.

python -m bench.reproduce.instructions --train dolly/train.jsonl --eval dolly/test.jsonl self_instruct/test.jsonl \
    --work runs/instructions --out bench/results/instructions.jsonl

The data are not shipped; ``instructions_data.read_examples`` lists the supported layouts. The student consists of some
layers of the teacher and is first trained on the responses for --warm-up-steps. All methods start from this student:
SFT trains on the responses, KD and SLIM on the responses with the teacher's kept logits, and MiniLLM (extra
``minillm``) on the student's own responses to the prompts. The teacher and the student before and after the warm-up are
measured as well. --work keeps all responses and intermediate results, which are not computed again. A method and seed
that --out has with the same settings is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import slimkernels as sk
from bench import records
from bench.machine import installed_version, machine
from bench.reproduce.instructions_data import Example, documents, prompt_ids, read_examples, short, without
from slimkernels.demo.phases import Phase, quiet_libraries
from slimkernels.durable import Journal
from slimkernels.evaluate.judge import Judge, RatedResponse
from slimkernels.evaluate.scoring import rouge_l
from slimkernels.evaluate.statistics import bootstrap_interval
from slimkernels.models.head import LanguageModelHead
from slimkernels.models.make_student import drop_layers, make_student
from slimkernels.store import Store, StoreWriter
from slimkernels.teacher import load_teacher, tokenizer_fingerprint
from slimkernels.trainer import train

# Models that are measured without further training.
BOUNDS = ("teacher", "dropped", "warmed_up")
METHODS = ("sft", "kd", "minillm", "slim")
# Packages other than torch whose versions decide a result.
PACKAGES = ("transformers", "trl", "rouge-score")
_WARM_UP_SEED = 1234


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that decide the result, in addition to the data.

    The experiment takes 40 minutes on one CPU core with bfloat16 and the defaults.

    Attributes:
        teacher: Name or folder of the teacher, as for ``load_teacher``.
        layers: Number of layers of the student.
        train_examples: Maximum number of training examples; the first ones that fit are used.
        eval_examples: Maximum number of examples per evaluation file, evenly spread over those that fit.
        max_length: Maximum number of tokens of a training example (prompt and response), and of an evaluation prompt.
        max_new_tokens: Maximum number of tokens of a response.
        temperature: Sampling temperature of the measured responses; 0 decodes greedily.
        top_fraction: Share of the vocabulary kept of each row of the teacher's logits.
        warm_up_steps: Number of SFT steps before the methods start.
        steps: Number of steps of every method except MiniLLM.
        minillm_steps: Number of steps of MiniLLM.
        batch_size: Number of examples or prompts per step.
        learning_rate: Peak learning rate, after a warm-up over a tenth of the steps and before a linear decay.
        minillm_learning_rate: Peak learning rate of MiniLLM.
        bf16: 1 computes in bfloat16 with float32 weights, 0 computes in float32.
    """

    teacher: str = "smollm2-135m-instruct"
    layers: int = 10
    train_examples: int = 1000
    eval_examples: int = 50
    max_length: int = 192
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_fraction: float = 0.05
    warm_up_steps: int = 200
    steps: int = 200
    minillm_steps: int = 40
    batch_size: int = 8
    learning_rate: float = 1e-3
    minillm_learning_rate: float = 1e-4
    bf16: int = 1


class Experiment:
    """The phases of the experiment in the order in which they run; each keeps its result in ``work``.

    Attributes:
        held_out: Evaluation examples by data set.
        data: Hash of the training and evaluation examples.
    """

    def __init__(
        self, settings: Settings, training: list[Example], held_out: dict[str, list[Example]], work: Path
    ) -> None:
        self.settings, self.training, self.work = settings, training, work
        self.console, self.seconds = Console(), {}
        self.teacher, self.tokenizer = _load(settings.teacher)
        self.held_out = {
            dataset: _spread(short(self.tokenizer, examples, settings.max_length), settings.eval_examples)
            for dataset, examples in held_out.items()
        }
        self.data = hashlib.sha256(json.dumps([training, self.held_out]).encode()).hexdigest()[:16]
        self._key = {"data": self.data, "version": sk.__version__}

    def capture(self) -> dict[str, Any]:
        """Captures the teacher's top logits for every response token in a store; prompts have no labels."""
        key = self._key | self._pick("teacher", "top_fraction", "train_examples", "max_length")
        with self._phase("store", "store", key) as phase:
            if not phase.is_done:
                phase.finish(_capture(self.teacher, self.tokenizer, self._documents(), phase.folder, key))
        return phase.result

    def start(self) -> None:
        """Makes the student that every method starts from."""
        key = self._key | self._pick(*_STUDENT)
        with self._phase("dropped", "students/dropped", key) as phase:
            if not phase.is_done:
                drop_layers(self.teacher.float(), self.settings.layers).save_pretrained(phase.folder)
                self.teacher.to(torch.bfloat16)
                phase.finish({})
        with self._phase("warmed_up", "students/warmed_up", key) as phase:
            if not phase.is_done:
                options = {"max_steps": self.settings.warm_up_steps, "learning_rate": self.settings.learning_rate}
                phase.finish(self._train("sft", self._student("dropped"), phase.folder, _WARM_UP_SEED, options))

    def train(self, method: str, seed: int) -> dict[str, Any]:
        """Trains one method's student and returns its training loss and times."""
        is_minillm = method == "minillm"
        names = ("minillm_steps", "minillm_learning_rate") if is_minillm else ("steps", "learning_rate")
        options = dict(zip(("max_steps", "learning_rate"), self._pick(*names).values(), strict=True))
        if is_minillm:
            options |= {"max_completion_length": self.settings.max_new_tokens, "teacher_model": self.teacher}
        key = self._key | self._pick(*_STUDENT, *names) | {"seed": seed}
        with self._phase(f"{method} {seed}", f"students/{method}-{seed}", key) as phase:
            if not phase.is_done:
                phase.finish(self._train(method, self._student("warmed_up"), phase.folder, seed, options))
        return phase.result

    def respond(self, method: str, seed: int) -> list[dict[str, str]]:
        """Returns a model's responses to all held-out prompts, with references and Rouge-L in %."""
        name = method if method in BOUNDS else f"{method}-{seed}"
        key = self._key | dataclasses.asdict(self.settings) | {"seed": seed}
        with self._phase(f"responses of {name}", f"responses/{method}-{seed}", key) as phase:
            path = phase.folder / "responses.jsonl"
            if not phase.is_done:
                torch.manual_seed(seed)
                model = self.teacher if method == "teacher" else self._student(name, torch.bfloat16)
                rows = []
                for dataset, examples in self.held_out.items():
                    said = respond(model, self.tokenizer, examples, self.settings)
                    for example, response in zip(examples, said, strict=True):
                        row = {"dataset": dataset, **example._asdict(), "response": response}
                        rows.append(row | {"rouge_l": 100 * rouge_l(response, example.reference)})
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
                phase.finish({})
        return records.read(path)

    def _train(self, method: str, student: PreTrainedModel, folder: Path, seed: int, options: dict) -> dict[str, Any]:
        settings = self.settings
        start = time.perf_counter(), time.process_time()
        metrics = train(
            self.work / "store" / "rows",
            student,
            method,
            folder / "model",
            tokenizer=self.tokenizer,
            seed=seed,
            per_device_train_batch_size=settings.batch_size,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            bf16=bool(settings.bf16),
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10,
            **options,
        )
        # Processor time is the better measure on a machine that does other work as well.
        seconds = {"train_seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}
        return seconds | {"train_loss": metrics["train_loss"]}

    def _student(self, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        folder = self.work / "students" / name
        return make_student(str(folder / "model" if (folder / "model").exists() else folder), dtype=dtype)

    def _documents(self) -> list[tuple[list[int], int]]:
        found = list(documents(self.tokenizer, self.training, self.settings.max_length))
        return found[: self.settings.train_examples]

    def _phase(self, name: str, folder: str, key: dict[str, Any]) -> Phase:
        return Phase(name, self.work / folder, key, self.seconds, self.console)

    def _pick(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self.settings, name) for name in names}


_STUDENT = ("teacher", "layers", "train_examples", "max_length", "top_fraction", "warm_up_steps", "batch_size")
_STUDENT += ("learning_rate", "bf16")


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_teacher(name, dtype=torch.bfloat16)
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise ValueError(
            f"the teacher {name} must have a chat template and an end-of-text token: choose an instruction-tuned model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return model, tokenizer


@torch.no_grad()
def _capture(teacher, tokenizer, found: list[tuple[list[int], int]], folder: Path, key: dict) -> dict[str, Any]:
    head = LanguageModelHead.of(teacher)
    writer = StoreWriter(
        folder / "rows",
        vocab_size=head.vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        teacher={"name": key["teacher"], "dtype": str(teacher.dtype).removeprefix("torch.")},
        selection={"kind": "top_fraction", "value": key["top_fraction"]},
    )
    with writer:
        for document, prompt_length in found:
            ids = torch.tensor(document)
            positions = torch.arange(prompt_length, len(ids))
            if ids not in writer:
                hidden = teacher.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0, positions - 1]
                rows = sk.linear_topk_logits(
                    top_fraction=key["top_fraction"], target=ids[positions], **head.arguments(hidden)
                )
                writer.add(ids, positions, rows)
    store = Store(folder / "rows")
    return {"documents": len(store), "labels": store.num_rows}


@torch.inference_mode()
def respond(model, tokenizer, examples: list[Example], settings: Settings, batch_size: int = 32) -> list[str]:
    """Generates a response to each example, in the order of the examples."""
    prompts = [prompt_ids(tokenizer, example) for example in examples]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    said: dict[int, str] = {}
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        padded = tokenizer.pad(
            {"input_ids": [prompts[index] for index in chosen]}, padding_side="left", return_tensors="pt"
        )
        drawn = {"do_sample": True, "temperature": settings.temperature, "top_k": 0}
        whole = model.generate(
            **padded,
            **(drawn if settings.temperature else {"do_sample": False}),
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for index, ids in zip(chosen, whole[:, padded["input_ids"].shape[1] :], strict=True):
            said[index] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return [said[index] for index in range(len(examples))]


def summary(rows: list[dict]) -> dict[str, Any]:
    """Returns Rouge-L by data set (mean, interval, values), and counts texts outside ASCII and empty responses."""
    scores: dict[str, Any] = {}
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        values = [round(row["rouge_l"], 3) for row in rows if row["dataset"] == dataset]
        interval = bootstrap_interval(values)[1:]
        scores[dataset] = {"rouge_l": math.fsum(values) / len(values), "interval": interval, "values": values}
    non_ascii = {name: sum(not row[name].isascii() for row in rows) for name in ("reference", "response")}
    return {"scores": scores, "non_ascii": non_ascii, "empty": sum(not row["response"] for row in rows)}


def judged(rows: list[dict], args: argparse.Namespace) -> dict[str, Any]:
    """Returns the judge's mean rating and its number of unrated responses by data set."""
    responses = [RatedResponse(row["instruction"], row["reference"], row["response"]) for row in rows]
    with Judge(args.judge, args.judge_model, key_env=args.judge_key_env) as judge:
        ratings = [rating.value for rating in judge.rate_all(responses)]
    by_dataset: dict[str, list[float | None]] = {}
    for row, rating in zip(rows, ratings, strict=True):
        by_dataset.setdefault(row["dataset"], []).append(rating)
    means = {}
    for dataset, found in by_dataset.items():
        known = [rating for rating in found if rating is not None]
        means[dataset] = {"rating": math.fsum(known) / len(known) if known else None, "unrated": found.count(None)}
    return {"model": args.judge_model, "ratings": means}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL files")
    parser.add_argument(
        "--eval", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL files, each in a folder of its own"
    )
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="folder for the store, students and responses"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL file to append to")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N")
    parser.add_argument("--judge", metavar="URL", help="OpenAI-compatible server that rates the responses")
    parser.add_argument("--judge-model", metavar="NAME", help="name of the judge on the server")
    parser.add_argument("--judge-key-env", metavar="NAME", help="variable with the key (default: OPENAI_API_KEY)")
    for field in dataclasses.fields(Settings):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if (args.judge is None) != (args.judge_model is None):
        parser.error("--judge and --judge-model must be given together")
    folders = [path.resolve().parent.name for path in args.eval]
    if len(set(folders)) < len(folders):
        parser.error(f"--eval files are named by their folders, which must differ, got {folders}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    held_out = {path.resolve().parent.name: read_examples(path) for path in args.eval}
    everything = [example for path in args.train for example in read_examples(path)]
    training = without(everything, (example for examples in held_out.values() for example in examples))
    with quiet_libraries():
        experiment = Experiment(settings, training, held_out, args.work)
        counts = experiment.capture() | {"left_out": len(everything) - len(training)}
        experiment.start()
        said = {"op": "instructions", "settings": dataclasses.asdict(settings), "data": experiment.data} | counts
        said["judge_model"] = args.judge_model
        runs = [(name, 0) for name in BOUNDS] + [(method, seed) for seed in args.seeds for method in args.methods]
        for method, seed in runs:
            row = said | {"method": method, "seed": seed}
            if any(all(old.get(name) == value for name, value in row.items()) for old in records.read(args.out)):
                experiment.console.print(f"{method} {seed}: already in {args.out}")
                continue
            row |= {} if method in BOUNDS else experiment.train(method, seed)
            responses = experiment.respond(method, seed)
            row |= summary(responses) | ({} if args.judge is None else {"judge": judged(responses, args)})
            row["versions"] = {name: installed_version(name) for name in PACKAGES}
            with Journal(args.out) as out:
                out.append(json.dumps(row | machine()).encode() + b"\n")
            shown = {dataset: round(score["rouge_l"], 2) for dataset, score in row["scores"].items()}
            experiment.console.print(f"{method} {seed}: Rouge-L {shown}", highlight=False)


def _spread(examples: list[Example], count: int) -> list[Example]:
    """Picks at most ``count`` examples evenly from a file, since neighbours are often similar."""
    count = min(count, len(examples))
    return [examples[index * len(examples) // count] for index in range(count)]


if __name__ == "__main__":
    main()
