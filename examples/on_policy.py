"""A student that learns from its own words: python examples/on_policy.py STUDENT TEACHER CHATS OUT.

A line of CHATS is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, and the
tokenizer's chat template marks answers with {% generation %}. In half of the micro-batches the student answers in its
own words, which the teacher scores; in the others it learns from the answers of the file (arXiv 2306.13649).
"""

import sys
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import slimkernels as sk
from slimkernels.teacher import read_documents
from slimkernels.trainer import UnscoredDocuments


def make_trainer(student: str, teacher: str, chats: str, out: str, **options) -> sk.SlimTrainer:
    """Makes the trainer for folders of a student and a teacher, a file of chats and options of ``sk.SlimConfig``."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    documents = read_documents(chats, tokenizer, text_field="messages")
    # The divergence is computed on the student's 64 largest logits, which hold most of its probability.
    objective = {"divergence": "reverse_kl", "support": "student", "student_top_k": 64, "on_policy_fraction": 0.5}
    given: dict[str, Any] = {"report_to": "none"} | objective | options
    args = sk.SlimConfig(output_dir=out, method="gkd", **given)
    return sk.SlimTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        args=args,
        train_dataset=UnscoredDocuments(documents),
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: python examples/on_policy.py STUDENT TEACHER CHATS OUT")
    trainer = make_trainer(*sys.argv[1:])
    trainer.train()
    trainer.save_model()
