"""One training of the comparison of methods, and its measurement on held-out text."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from bench.reproduce.methods_corpus import DEVELOPMENT, TEST, Corpus
from bench.reproduce.methods_plan import METHODS, STUDENTS, SUPPORTS, Student, Unit
from slimkernels.models.heldout import evaluate_documents
from slimkernels.models.make_student import drop_layers, make_student
from slimkernels.models.perplexity import perplexity
from slimkernels.store import Store
from slimkernels.teacher import load_model
from slimkernels.trainer import trainer_of

# Another process took part of the machine if it used more than this share of it.
_NOT_ALONE = 0.05


def run_unit(
    unit: Unit, corpus: Corpus, english: Path | None = None, student_folder: Path | None = None
) -> dict[str, Any]:
    """Trains a student, measures it, and returns the fields of its row.

    Text and stores that are missing are made before the clock starts. The test part is opened by a test only.

    Args:
        unit: The training.
        corpus: Text and stores.
        english: File of plain English to measure on too.
        student_folder: Folder to save the student and its tokenizer in.
    """
    kind, teacher = STUDENTS[unit.student], (METHODS | SUPPORTS)[unit.method].teacher
    documents = corpus.training(unit.seed, unit.labels, "top" if teacher in ("online", "none") else teacher)
    heldout = corpus.heldout(TEST if unit.op == "test" else DEVELOPMENT)
    student = start(kind, corpus, unit.seed)
    clock = Clock()
    logs, config = train_student(
        student,
        documents,
        corpus.teacher[1],
        teacher=corpus.teacher[0] if teacher == "online" else None,
        num_train_epochs=kind.passes,
        per_device_train_batch_size=kind.batch_size,
        seed=unit.seed,
        **unit.options,
    )
    clock.stop()
    weights = [entry["weight"] for entry in logs if "weight" in entry]
    row = {
        "loss_options": config.loss_options,
        "parameters": student.num_parameters(),
        "documents": len(documents),
        "tokens": sum(len(documents[index].input_ids) for index in range(len(documents))),
        "steps": len(logs),
        "mean_weight": statistics.fmean(weights) if weights else None,
        "train_loss": statistics.fmean(entry["loss"] for entry in logs[-max(1, len(logs) // 10) :]),
        "seconds": round(clock.seconds, 1),
        "alone": clock.alone,
    }
    row |= measure(student, heldout, documents=unit.op == "test")
    if english is not None:
        row["english"] = {"file": english.name} | measure(student, corpus.english(english))
    if student_folder is not None:
        # A folder of this name is complete.
        unfinished = student_folder.with_name(f"{student_folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        student.save_pretrained(unfinished)
        corpus.teacher[1].save_pretrained(unfinished)
        unfinished.rename(student_folder)
    return row


def start(kind: Student, corpus: Corpus, seed: int) -> PreTrainedModel:
    """Returns a student before its training, in float32."""
    if kind.layers is not None:
        return drop_layers(load_model(corpus.text.teacher), kind.layers)
    model, tokenizer = corpus.teacher
    return make_student(
        tokenizer=tokenizer,
        vocab_size=model.get_output_embeddings().weight.shape[0],
        hidden_size=kind.hidden_size,
        num_layers=kind.num_layers,
        num_heads=kind.num_heads,
        seed=seed,
    )


def measure(student: PreTrainedModel, heldout: Store, *, documents: bool = False) -> dict[str, Any]:
    """Returns perplexity and KL to the teacher on held-out documents.

    Args:
        student: The student.
        heldout: Store of the documents.
        documents: Whether to return the sums of each document too, as [labels, loss, KL].
    """
    with torch.autocast("cpu", torch.bfloat16):
        found = list(evaluate_documents(student, heldout, batch_size=16))
    labels = sum(one.labels for one in found)
    loss = sum(one.loss for one in found) / labels
    row = {
        "perplexity": perplexity(loss),
        "loss": loss,
        "kl": sum(one.kl_ghost for one in found) / labels,
        "teacher_perplexity": perplexity(sum(one.teacher_loss or 0.0 for one in found) / labels),
        "heldout_labels": labels,
    }
    if documents:
        row["per_document"] = [[one.labels, round(one.loss, 4), round(one.kl_ghost, 4)] for one in found]
    return row


def train_student(
    student: PreTrainedModel,
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    teacher: PreTrainedModel | None = None,
    **options: Any,
) -> tuple[list[dict[str, float]], Any]:
    """Trains a student as all experiments do: in bfloat16 autocast, a linear warm-up over a tenth of the steps, cosine.

    Args:
        student: The student, which is changed.
        documents: Documents of a store.
        tokenizer: Tokenizer of student and documents.
        teacher: The teacher, for methods that do not read the documents' rows.
        **options: Fields of the configuration of the method's trainer, among them ``method``.

    Returns:
        The trainer's log of each step, and its configuration.
    """
    trainer_class, config_class = trainer_of(options["method"])
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            bf16=True,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        trainer = trainer_class(
            model=student, args=config, train_dataset=documents, processing_class=tokenizer, teacher_model=teacher
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], config


class Clock:
    """A clock that starts when it is made, and also sees whether other processes used the machine.

    Attributes:
        seconds: Wall time until it was stopped.
        processor_seconds: Processor time of this process until then, over all threads, which other work on the machine
            changes less.
        alone: Whether this process had the machine to itself; None where the system does not say.
    """

    def __init__(self) -> None:
        self._start, self._before = time.perf_counter(), _processor_seconds()
        self._own = time.process_time()

    def stop(self) -> None:
        """Stops the clock."""
        self.seconds, after = time.perf_counter() - self._start, _processor_seconds()
        self.processor_seconds, self.alone = time.process_time() - self._own, None
        if self._before is not None and after is not None:
            everyone, own = (after[index] - self._before[index] for index in range(2))
            self.alone = everyone - own <= _NOT_ALONE * self.seconds * (os.cpu_count() or 1)


def _processor_seconds() -> tuple[float, float] | None:
    """Returns the processor time of all processes since the start of the machine, and of this one."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _, _, irq, soft, steal, *_ = map(int, path.read_text().split("\n")[0].split()[1:])
    own = os.times()
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK"), own.user + own.system
