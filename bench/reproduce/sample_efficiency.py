"""Reproduces a sample-efficiency experiment: students from random weights on nested subsets of a teacher's text.

python -m bench.reproduce.sample_efficiency --out bench/results/sample_efficiency.jsonl [--english FILE]

The experiment follows the pre-training experiment of "For Distillation, Tokens Are Not All You Need" (Raman, Mani,
Liang, Lipton, 2023; OpenReview 2fc5GOPYip), with a smaller teacher and smaller students. The teacher continues the
shipped prompts, and the top 5 % of its logits go to a store. Students learn from 5,000 to 40,000 of its tokens by
supervised training (sft), dense distillation on the whole vocabulary (kd), SLIM (slim) and sampled distillation
(sampled), all with the same recipe. They are measured after every epoch on text of held-out prompts and on plain
English. The learning rate was chosen on a seed that is not in the results: at 10,000 tokens, 6e-3 gave a lower
perplexity than 2e-3, both on labels alone (773 against 822) and with the teacher (520 against 647).

Every finished training is one line of the results file. The same command resumes an experiment that was stopped, and
finishes one seed before the next.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

import slimkernels as sk
from bench import records
from bench.machine import machine
from bench.reproduce.sample_efficiency_corpus import Corpus, Settings
from bench.reproduce.sample_efficiency_results import ABLATIONS, METHODS
from slimkernels.durable import Journal
from slimkernels.models.heldout import evaluate_store
from slimkernels.models.make_student import make_student
from slimkernels.store import Store


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        method: Method of ``SlimConfig``.
        size: Number of tokens to train on.
        seed: Seed of the choice of documents, of their order and of the student's initialisation.
        teacher: Source of the teacher's rows, as in ``Arm``.
        options: Options of ``SlimConfig`` that differ from the method's defaults.
    """

    method: str
    size: int
    seed: int
    teacher: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name in the log, which ``--only`` is matched with."""
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        return f"seed {self.seed}, {self.size} tokens, {self.method} {options}".rstrip()


def all_runs(settings: Settings, seeds: Sequence[int]) -> Iterator[Run]:
    """Yields all trainings, seed by seed; a training that belongs to two tables occurs once."""
    changed = dict.fromkeys(arm for ablation in ABLATIONS.values() for arm in ablation.arms.values())
    asked = [(arm, size) for size in settings.sizes for arm in METHODS.values()]
    asked += [(arm, settings.ablation_size) for arm in changed]
    for seed in seeds:
        for arm, size in dict.fromkeys(asked):
            yield Run(arm.method, size, seed, arm.teacher, dict(arm.options))


class HeldoutCurve(TrainerCallback):
    """A callback that measures the student on every held-out store after every epoch.

    Attributes:
        heldout: Stores to measure on, by name.
        points: Measurements after every epoch.
        teacher_perplexity: Perplexity of the teacher on every store, by the store's name.
        train_seconds: Wall time of training, without the measurements.
    """

    def __init__(self, heldout: dict[str, Store]) -> None:
        self.heldout = heldout
        self.points: list[dict[str, float]] = []
        self.teacher_perplexity: dict[str, float] = {}
        self.train_seconds = 0.0

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_epoch_end(self, args, state, control, model=None, **kwargs) -> None:
        """Stops the clock and measures the student."""
        self.train_seconds += time.perf_counter() - self._start
        point = {"epoch": round(state.epoch, 3), "step": state.global_step}
        for name, store in self.heldout.items():
            metrics = evaluate_store(model, store, batch_size=16)
            point |= {f"{name}_perplexity": metrics["perplexity"], f"{name}_kl": metrics["kl_ghost"]}
            self.teacher_perplexity[name] = metrics["teacher_perplexity"]
        self.points.append(point)


def train(run: Run, corpus: Corpus) -> dict[str, Any]:
    """Trains one student and returns its measurements after every epoch."""
    settings = corpus.settings
    student = make_student(
        tokenizer=corpus.tokenizer,
        vocab_size=corpus.vocab_size,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        seed=run.seed,
    )
    documents = corpus.subset(run.seed, run.size, "draws" if run.teacher == "draws" else "top_k")
    curve = HeldoutCurve(corpus.heldout)
    with tempfile.TemporaryDirectory() as folder:
        config = sk.SlimConfig(
            output_dir=folder,
            method=run.method,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            seed=run.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            # The paper's factor of the divergence, for every method.
            **{"kd_weight": 0.0 if run.method == "sft" else 1.0} | run.options,
        )
        trainer = sk.SlimTrainer(
            model=student,
            args=config,
            train_dataset=documents,
            processing_class=corpus.tokenizer,
            teacher_model=corpus.remembered if run.teacher == "online" else None,
            callbacks=[curve],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {
        "curve": curve.points,
        "teacher_perplexity": curve.teacher_perplexity,
        "parameters": student.num_parameters(),
        "documents": len(documents),
        "tokens": sum(len(documents[index].input_ids) for index in range(len(documents))),
        "train_seconds": round(curve.train_seconds, 1),
        "loss_options": config.loss_options,
    }


def key_of(row: dict[str, Any]) -> str:
    """Returns everything that decides a training's result, as a key."""
    return json.dumps([row["run"], row["settings"]], sort_keys=True)


def reproduce(
    out: Path,
    work: Path,
    settings: Settings,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    english: Path | None = None,
    only: str = "",
    most: int | None = None,
) -> int:
    """Runs every training that ``out`` does not have, appends its result, and returns the number of trainings run.

    Args:
        out: JSONL file of results.
        work: Folder for text and stores.
        settings: Settings of the experiment.
        seeds: Seeds, in the order in which they are run.
        english: File of plain English to measure on.
        only: Regular expression that is searched in the names of the trainings to run.
        most: Maximum number of trainings to run.
    """
    asked = dataclasses.asdict(settings) | {"english": None if english is None else english.name}
    # A training's result does not depend on the other trainings; its own size is part of the run.
    del asked["sizes"], asked["ablation_size"]

    done = {key_of(row) for row in records.read(out)}
    missing = []
    for run in all_runs(settings, seeds):
        row = {"op": "sample_efficiency", "run": dataclasses.asdict(run), "settings": asked}
        if key_of(row) not in done and re.search(only, run.name):
            missing.append((run, row))
    missing = missing[:most]
    if not missing:
        return 0
    corpus = Corpus(work, settings, english)
    with Journal(out) as journal:
        for number, (run, row) in enumerate(missing, 1):
            start = time.perf_counter()
            row |= train(run, corpus)
            row["seconds"] = round(time.perf_counter() - start, 1)
            journal.append(json.dumps(row | machine()).encode() + b"\n")
            last = row["curve"][-1]["teacher_perplexity"]
            print(f"{number} of {len(missing)}, {run.name}: perplexity {last:.1f}, {row['seconds']} s", flush=True)
    return len(missing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument("--work", type=Path, default=Path("runs/sample-efficiency"), help="folder for text and stores")
    parser.add_argument("--english", type=Path, help="plain English to measure on, one paragraph a line")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", metavar="REGEX", help="run only trainings whose name matches")
    parser.add_argument("--runs", type=int, metavar="N", help="maximum number of trainings to run")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.english is not None and not args.english.is_file():
        parser.error(f"--english must be a text file, got {args.english}, which is not a file")
    if args.english is None:
        print("perplexity on plain English is not measured: pass a file, such as WikiText-2's test.txt, as --english")
    count = reproduce(
        args.out,
        args.work,
        Settings(),
        seeds=args.seeds,
        english=args.english,
        only=args.only,
        most=args.runs,
    )
    print(f"{count} trainings finished")


if __name__ == "__main__":
    main()
