"""Distillation with TRL from a teacher that does not run in the training process.

On what the student writes, scored by a vLLM or SGLang server; a line of PROMPTS is {"prompt": "..."}:

    python trl_distillation.py STUDENT OUT --prompts PROMPTS --server http://localhost:8000/v1 --name TEACHER

Or on the documents of a store, which ``slimkernels capture`` writes, without generating anything:

    python trl_distillation.py STUDENT OUT --store STORE
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DistillationConfig

from slimkernels.integrations.trl import DistillationTrainer
from slimkernels.trainer import SlimObjective, TeacherServer


def make_trainer(
    student: str,
    output_dir: str,
    *,
    store: str | None = None,
    prompts: str | None = None,
    server: str | None = None,
    name: str = "teacher",
    **options,
) -> DistillationTrainer:
    """Makes the trainer for a store, or for prompts and the URL of a server that has the teacher ``name``."""
    if store is not None:
        # The labels of a store are words of the teacher or of people: learn from them too.
        teacher = {"teacher_store": store, "objective": SlimObjective("kd", rest="ghost", ce_weight=0.2)}
    elif prompts is None or server is None:
        raise ValueError("store, or prompts and server, must be given: they hold the documents to learn from")
    else:
        rows = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
        # The server's 20 most probable tokens, and one outcome for all others; the student's words are no labels.
        teacher = {
            "teacher_server": TeacherServer(server, name, store=Path(output_dir, "rows"), top_logprobs=20),
            "objective": SlimObjective("reverse_kl", rest="ghost", ce_weight=0.0),
            "train_dataset": Dataset.from_list(rows),
        }
    options = {"report_to": "none", "bf16": torch.cuda.is_available(), "logging_steps": 1} | options
    args = DistillationConfig(output_dir, **options)
    return DistillationTrainer(student, args=args, processing_class=AutoTokenizer.from_pretrained(student), **teacher)


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser()
    parser.add_argument("student")
    parser.add_argument("out")
    parser.add_argument("--store")
    parser.add_argument("--prompts")
    parser.add_argument("--server")
    parser.add_argument("--name", default="teacher")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    args = parser.parse_args()
    if not args.store and not (args.prompts and args.server):
        parser.error("give --store, or --prompts and --server")
    given = {"store": args.store, "prompts": args.prompts, "server": args.server, "name": args.name}
    trainer = make_trainer(args.student, args.out, **given, max_steps=args.steps, learning_rate=args.learning_rate)
    trainer.train()
    trainer.save_model(args.out)
    print("last loss", trainer.state.log_history[-2]["loss"])


if __name__ == "__main__":
    main()
