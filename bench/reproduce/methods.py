"""Compares methods of distillation that were all tuned alike, in two steps that can be stopped and continued.

python -m bench.reproduce.methods tune --out bench/results/methods.jsonl [--student half] [--methods kd slim]
python -m bench.reproduce.methods test --out bench/results/methods.jsonl [--labels 25000] [--english FILE]
python -m bench.reproduce.methods table --out bench/results/methods.jsonl

A teacher writes text, and its largest logits are stored. ``tune`` trains a student six times by each method, with other
learning rates, weights of the divergence and values of the method's own options, and measures it on a development part
of the text. The best trial's options are written down as the method's choice. ``test`` trains by the chosen options
from three other seeds, each with a text of its own, and measures on a test part that nothing else reads, and on plain
English, such as WikiText-2's test.txt, where a file is given. It also trains by KD, with the options that were chosen
for it, from less or more of the teacher than the largest 5 % of its logits. ``table`` prints what the documentation
shows. A student is half of the teacher's layers, which has to be healed ("half"), or starts from random weights
("random").

Each training is one line of the results file, written when it has ended, and is never run again. A row names its text
by a digest. Another processor would write another one from the same seed, which would be a comparison of its own, so
what the teacher wrote is kept beside the results, and every machine learns from it. Trainings that run beside
other work (``--beside``), such as those of other methods on the other cores, are equally valid but give no seconds.
Methods, students and the search are in ``methods_plan.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from bench import records
from bench.machine import installed_version, machine, one_at_a_time
from bench.reproduce.methods_corpus import DEVELOPMENT, TEST, Corpus, Text
from bench.reproduce.methods_plan import (
    BUDGETS,
    METHODS,
    STUDENTS,
    SUPPORTS,
    TEST_SEEDS,
    TUNING_LABELS,
    TUNING_SEED,
    Rows,
    Unit,
    chosen,
    options_for_test,
    test_units,
    tuning_units,
)
from bench.reproduce.methods_results import methods_block
from bench.reproduce.methods_training import run_unit
from slimkernels.cli.options import positive_int


class Comparison:
    """The rows of a results file, and what is added to them.

    Args:
        out: JSONL file of rows.
        work: Folder for stores.
        text: The teacher, and how it writes.
        english: File of plain English that the test measures on too.
        documents: Folder for what the teacher wrote; None for one in ``work``.
        students: Folder in which the students of the test are saved, each in one of its own; None to save none.
        alone: Whether each training waits for the other benchmarks of the machine, and holds up later ones.
    """

    def __init__(
        self,
        out: Path,
        work: Path,
        text: Text | None = None,
        english: Path | None = None,
        *,
        documents: Path | None = None,
        students: Path | None = None,
        alone: bool = True,
    ) -> None:
        self.out, self.english, self.alone = out, english, alone
        self.corpus = Corpus(work, text or Text(), documents)
        self.students = students
        self._texts: dict[tuple[int, int, str], str] = {}

    def rows(self, student: str) -> Rows:
        """Reads the rows of a kind of student."""
        return Rows(records.read(self.out), self._settings(student), self._text_of)

    def tune(self, student: str, names: Iterable[str], *, labels: int = TUNING_LABELS, most: int | None = None) -> int:
        """Runs the missing trials of methods and writes down their choices; returns the number of trainings run."""
        left = math.inf if most is None else most
        run = 0
        for name in names:
            rows = self.rows(student)
            if rows.choice(student, name) is not None:
                continue
            units = []
            for unit in tuning_units(rows, student, name, labels=labels, seed=TUNING_SEED):
                if rows.of(unit) is None:
                    if run >= left:
                        return run
                    rows.add(self._run(unit))
                    run += 1
                units.append(unit)
            if units:
                self._append(chosen(rows, units) | {"settings": rows.settings} | machine())
        return run

    def test(
        self, student: str, names: Iterable[str], budgets: Sequence[int], seeds: Sequence[int], most: int | None = None
    ) -> int:
        """Runs the missing trainings of the test; returns the number of trainings run."""
        rows = self.rows(student)
        missing = [unit for unit in test_units(rows, student, names, budgets, seeds) if not self._done(unit, rows)]
        for unit in missing[:most]:
            self._run(unit)
        return len(missing[:most])

    def _done(self, unit: Unit, rows: Rows) -> dict[str, Any] | None:
        folder = self._student_folder(unit)
        return rows.of(unit) if folder is None or folder.is_dir() else None

    def _student_folder(self, unit: Unit) -> Path | None:
        if self.students is None or unit.op != "test":
            return None
        return self.students / f"{unit.student}-{unit.labels}-{unit.method}-{unit.seed}"

    def _run(self, unit: Unit) -> dict[str, Any]:
        with one_at_a_time() if self.alone else contextlib.nullcontext():
            # Another run may have finished it in the meantime.
            if done := self._done(unit, self.rows(unit.student)):
                return done
            print(unit.name, flush=True)
            # The commit is that of the code that runs, also if another is checked out before the end.
            row = dataclasses.asdict(unit) | {"settings": self._settings(unit.student)} | machine()
            row["text"] = self._text_of(unit)
            row |= run_unit(unit, self.corpus, self.english if unit.op == "test" else None, self._student_folder(unit))
            print(f"  perplexity {row['perplexity']:.2f}, KL {row['kl']:.3f}, {row['seconds']:.0f} s", flush=True)
            return self._append(row)

    def _text_of(self, unit: Unit) -> str:
        key = unit.seed, unit.labels, TEST if unit.op == "test" else DEVELOPMENT
        if key not in self._texts:
            self._texts[key] = self.corpus.digest(*key)
        return self._texts[key]

    def _append(self, row: dict[str, Any]) -> dict[str, Any]:
        row = row | {"transformers": installed_version("transformers")}
        records.add(self.out, row)
        return row

    def _settings(self, student: str) -> dict[str, Any]:
        settings = {"text": dataclasses.asdict(self.corpus.text), "student": dataclasses.asdict(STUDENTS[student])}
        # A row has its own; this one only says where the search begins.
        del settings["student"]["learning_rate"]
        # A file gives tuples back as lists.
        return json.loads(json.dumps(settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    tune = commands.add_parser("tune", help="choose every method's options on the development part")
    test = commands.add_parser("test", help="measure the choices on the test part")
    table = commands.add_parser("table", help="print what the rows show")
    for command in (tune, test, table):
        command.add_argument("--out", type=Path, required=True, help="JSONL file of the rows")
    for command in (tune, test):
        command.add_argument("--work", type=Path, default=Path("runs/methods"), help="folder for stores")
        command.add_argument(
            "--documents",
            type=Path,
            metavar="DIR",
            default=Path("bench/results/methods-text"),
            help="folder for what the teacher wrote, which every machine learns from",
        )
        command.add_argument("--student", choices=STUDENTS, default="half", help="kind of student")
        names = METHODS if command is tune else METHODS | SUPPORTS
        command.add_argument("--methods", choices=names, nargs="+", default=list(names), metavar="METHOD")
        command.add_argument("--runs", type=positive_int, metavar="N", help="maximum number of trainings to run")
        command.add_argument("--beside", action="store_true", help="run beside other work; seconds then do not count")
    test.add_argument(
        "--labels",
        type=int,
        nargs="+",
        choices=BUDGETS,
        default=[TUNING_LABELS],
        help="numbers of labels to learn from",
    )
    test.add_argument("--seeds", type=int, nargs="+", default=list(TEST_SEEDS))
    test.add_argument("--english", type=Path, help="plain English to measure on too, one paragraph a line")
    test.add_argument(
        "--students", type=Path, metavar="DIR", help="save the students; those that are not there are trained again"
    )
    args = parser.parse_args()
    rows = records.arguments_rows(parser, args.out, "op", "student", "settings", "options")
    if args.command == "table":
        if not rows:
            parser.error(f"--out must be a file with rows, got {args.out}, which has none: run `tune` first")
        print(methods_block(rows))
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.command == "tune":
        comparison = Comparison(args.out, args.work, documents=args.documents, alone=not args.beside)
        run = comparison.tune(args.student, args.methods, most=args.runs)
    else:
        if TUNING_SEED in args.seeds:
            parser.error(f"--seeds must not have {TUNING_SEED}, which chose the options, got {args.seeds}")
        if args.english is None:
            print("plain English is not measured on: pass a file, such as WikiText-2's test.txt, as --english")
        elif not args.english.is_file():
            parser.error(f"--english must be a text file, got {args.english}, which is not a file")
        comparison = Comparison(
            args.out,
            args.work,
            english=args.english,
            documents=args.documents,
            students=args.students,
            alone=not args.beside,
        )
        for name in args.methods:
            if options_for_test(comparison.rows(args.student), args.student, name) is None:
                print(f"{name} is left out: its options are not chosen yet, run `tune` first")
        run = comparison.test(args.student, args.methods, args.labels, args.seeds, args.runs)
    print(f"{run} trainings finished")


if __name__ == "__main__":
    main()
