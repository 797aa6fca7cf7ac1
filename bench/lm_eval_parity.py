"""Compares our multiple-choice scores with those of lm-eval's own command line on the same model and files.

    python -m bench.lm_eval_parity --model FOLDER --data DIR [--tasks arc_easy hellaswag ...] [--limit 40]

Runs ``lm_eval run --model hf`` in another process and ``evaluate_multiple_choice`` in this one, and prints both scores
of every task. Fails on any difference of scores, standard errors, or log-likelihoods of samples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from slimkernels.evaluate.lm_eval.local_data import write_local_tasks
from slimkernels.evaluate.lm_eval.tasks import ChoiceEvaluation, evaluate_multiple_choice

TASKS = ("arc_easy", "arc_challenge", "hellaswag", "mmlu_anatomy", "truthfulqa_mc1", "truthfulqa_mc2")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a transformers folder with its tokenizer")
    parser.add_argument("--data", required=True, help="the folder with the tasks' files")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args(arguments)

    theirs, their_samples = run_command_line(options)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    ours = evaluate_multiple_choice(
        model,
        AutoTokenizer.from_pretrained(options.model),
        options.tasks,
        data=options.data,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        batch_size=options.batch_size,
    )
    differences = list(compare(ours, theirs, their_samples))
    for difference in differences:
        print(difference)
    print(f"{len(ours.samples)} samples of {len(ours.tasks)} tasks: {len(differences) or 'no'} differences")
    return 1 if differences else 0


def run_command_line(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Runs ``lm_eval`` and returns its results and its samples, both by task."""
    with tempfile.TemporaryDirectory() as folder:
        names = write_local_tasks(Path(folder, "tasks"), options.tasks, options.data)
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--log_samples"]
        command += ["--model_args", f"pretrained={options.model}", "--tasks", *options.tasks]
        command += ["--include_path", f"{folder}/tasks", "--output_path", f"{folder}/out"]
        command += ["--limit", str(options.limit), "--batch_size", str(options.batch_size)]
        if options.num_fewshot is not None:
            command += ["--num_fewshot", str(options.num_fewshot)]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
        [results] = Path(folder, "out").rglob("results_*.json")
        samples = {}
        for name in names:
            [path] = Path(folder, "out").rglob(f"samples_{name}_*.jsonl")
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            samples[name] = sorted(rows, key=lambda row: row["doc_id"])
        return json.loads(results.read_text(encoding="utf-8"))["results"], samples


def compare(ours: ChoiceEvaluation, theirs: dict[str, Any], their_samples: dict[str, list[dict[str, Any]]]):
    """Yields a line for every number that is not equal bit for bit."""
    for name, found in (ours.tasks | ours.groups).items():
        for metric, score in found.scores.items():
            their_score, their_error = theirs[name][f"{metric},none"], theirs[name][f"{metric}_stderr,none"]
            error = found.standard_errors.get(metric, "N/A")
            print(f"{name} {metric}: ours {score!r} +- {error!r}, lm_eval's {their_score!r} +- {their_error!r}")
            if (score, error) != (their_score, their_error):
                yield f"{name} {metric} differs"
    for name, rows in their_samples.items():
        samples = [sample for sample in ours.samples if sample.task == name]
        if len(samples) != len(rows):
            yield f"{name}: {len(samples)} samples, lm_eval has {len(rows)}"
        for sample, row in zip(samples, rows, strict=False):
            loglikelihoods = [float(loglikelihood) for loglikelihood, _ in row["filtered_resps"]]
            scores = {metric: row[metric] for metric in row["metrics"]}
            if (sample.doc_hash, sample.loglikelihoods, sample.scores) != (row["doc_hash"], loglikelihoods, scores):
                yield f"{name} question {sample.doc_id}: {sample.loglikelihoods}, lm_eval's {loglikelihoods}"


if __name__ == "__main__":
    sys.exit(main())
