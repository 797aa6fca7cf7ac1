"""A student with MiniLM's tokenizer learns more from SmolLM2's translated rows than from the same text alone."""

from __future__ import annotations

import re

import pytest
from support import teachers
from support import tokenizers_of_kinds as kinds

from slimkernels.exchange import translate_store
from slimkernels.models.make_student import make_student
from slimkernels.teacher import capture
from slimkernels.trainer import train


def paragraphs(path, count):
    """Returns the longest paragraphs of a file of WikiText-2, with its spaces around punctuation taken away."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    texts = [re.sub(r" @(.)@ ", r"\1", line) for line in lines if line and not line.startswith("=")]
    texts = [re.sub(r" ([.,;:!?)'\u2019%])", r"\1", text).replace("( ", "(") for text in texts]
    return sorted(texts, key=len, reverse=True)[:count]


@pytest.mark.slow
def test_translated_rows_teach_more_than_the_text(public_data, tmp_path):
    """About five minutes on two cores; the report says 29,000 labels, 92 % of them aligned."""
    model, tokenizer = teachers.smollm2()
    student = kinds.minilm()
    for name, file, count in (("train", "valid.txt", 136), ("heldout", "test.txt", 40)):
        texts = paragraphs(public_data / "wikitext2" / file, count)
        capture(model, tokenizer, [tokenizer(text)["input_ids"][:256] for text in texts], tmp_path / name)
        report = translate_store(tmp_path / name, tmp_path / f"student-{name}", tokenizer, student)
        assert report.documents == count
        assert report.aligned > 0.8 * report.labels
        assert 0.7 < report.mass_kept["mean"] < report.mass_before
    losses = {}
    for method, options in (("sft", {}), ("kd", {"rest": "ghost"})):
        losses[method] = train(
            tmp_path / "student-train",
            make_student(vocab_size=len(student), hidden_size=64, max_length=512),
            method,
            tmp_path / method,
            eval_store_path=tmp_path / "student-heldout",
            num_train_epochs=3,
            per_device_train_batch_size=2,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=0,
            **options,
        )["eval_loss"]
    assert losses["kd"] < losses["sft"]
