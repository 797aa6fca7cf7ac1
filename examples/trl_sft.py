"""TRL's SFTTrainer with a teacher's largest logits: python examples/trl_sft.py STUDENT STORE TEXT OUT.

A line of TEXT is {"text": "..."}, and the store was captured from the same file with the same tokenizer:

    slimkernels capture --teacher TEACHER --text TEXT --out STORE
"""

import sys
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import slimkernels as sk


class Distiller(sk.SlimLossMixin, SFTTrainer):
    """TRL's trainer with the loss of ``sk.SlimObjective``, without the student's logits."""


def make_trainer(student: str, store: str, text: str, out: str, **options) -> Distiller:
    """Makes the trainer for a folder of a student, a store, a file of texts and options of ``SFTConfig``."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    # The store's documents are tokenised as they stand, so that TRL must add nothing to them.
    rows = load_dataset("json", data_files=text, split="train")
    rows = rows.map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]}, remove_columns=rows.column_names)
    given: dict[str, Any] = {"report_to": "none", "bf16": torch.cuda.is_available()} | options
    args = SFTConfig(out, **given)
    objective = sk.SlimObjective("kd", rest="ghost")
    return Distiller(
        student, args, train_dataset=rows, processing_class=tokenizer, teacher_store=store, objective=objective
    )


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: python examples/trl_sft.py STUDENT STORE TEXT OUT")
    trainer = make_trainer(*sys.argv[1:])
    trainer.train()
    trainer.save_model()
