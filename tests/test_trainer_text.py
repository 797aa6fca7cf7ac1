"""Training on text without a store: by its labels, or with a teacher that scores it in the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import tiny

import slimkernels as sk
from slimkernels.cli import main
from slimkernels.store import Store, StoreDataset
from slimkernels.teacher.corpus import TokenizedDocument
from slimkernels.trainer import UnscoredDocuments


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tiny.make_store(tmp_path_factory.mktemp("text") / "store"))


def unscored(store: Store) -> UnscoredDocuments:
    documents = [store[index] for index in range(len(store))]
    return UnscoredDocuments(
        TokenizedDocument(one.input_ids.tolist(), positions=one.positions.tolist()) for one in documents
    )


def trained(dataset, out: Path, method: str = "kd", teacher=None, **options) -> dict[str, torch.Tensor]:
    args = sk.SlimConfig(
        output_dir=str(out), method=method, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        save_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, **options
    )  # fmt: skip
    trainer = sk.SlimTrainer(model=tiny.make_model(seed=1), args=args, train_dataset=dataset, teacher_model=teacher)
    trainer.train(resume_from_checkpoint=True)
    return trainer.model.state_dict()


@pytest.mark.parametrize("method", ["sft", "slim", "gkd"])
def test_text_trains_as_the_same_documents_of_a_store(method, store, tmp_path):
    teacher = None if method == "sft" else tiny.make_model(seed=7).eval()
    options = {"on_policy_fraction": 0.0} if method == "gkd" else {}
    of_store = trained(StoreDataset(store), tmp_path / "store", method, teacher, **options)
    of_text = trained(unscored(store), tmp_path / "text", method, teacher, **options)
    assert all(torch.equal(of_text[name], value) for name, value in of_store.items())


def test_a_run_continues_on_its_own_text_only(store, tmp_path):
    trained(unscored(store), tmp_path, "sft")
    other = unscored(store)
    other._documents[0].input_ids[1] += 1
    with pytest.raises(ValueError, match="store"):
        trained(UnscoredDocuments([one.input_ids.tolist() for one in other._documents]), tmp_path, "sft")


def test_rows_of_a_teacher_that_are_not_there_are_named(store, tmp_path):
    with pytest.raises(ValueError, match=r"method 'slim' needs a teacher.*teacher_model or teacher_server"):
        trained(unscored(store), tmp_path, "slim")
    with pytest.raises(ValueError, match=r"'easy-first' needs documents of stores.*UnscoredDocuments"):
        trained(unscored(store), tmp_path, "slim", tiny.make_model().eval(), document_order="easy-first")


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "at least one document, got none"),
        ([[1, 2], [3]], "at least one label, got none in document 1"),
        ([TokenizedDocument([1, 2, 3], teacher_ids=[5, 1, 2, 3])], "prefix for the teacher alone, document 0"),
    ],
)
def test_documents_that_cannot_be_trained_on_are_refused(documents, message):
    with pytest.raises(ValueError, match=message):
        UnscoredDocuments(documents)


def test_documents_longer_than_the_student_reads_are_found_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="max_length=64 tokens for this student, got one of 70"):
        trained(UnscoredDocuments([[2] * 70]), tmp_path, "sft")


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder with a model, its tokenizer, and a text."""
    monkeypatch.chdir(tmp_path)
    tiny.make_model(seed=7).save_pretrained("model")
    tiny.make_tokenizer().save_pretrained("model")
    texts = [" ".join(f"w{2 + (start + step) % 90}" for step in range(12)) for start in range(8)]
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


QUICK = ["--epochs", "1", "--batch-size", "4", "--option", "use_cpu=true"]


def test_the_command_trains_on_text(files, capsys):
    command = [
        "train",
        "--text",
        "corpus.jsonl",
        "--teacher",
        "model",
        "--tokenizer",
        "model",
        "--method",
        "reverse_kl",
    ]
    assert main([*command, "--out", "one", *QUICK]) == 0, capsys.readouterr().err
    capture = ["capture", "--teacher", "model", "--text", "corpus.jsonl", "--top-k", "3", "--out", "store"]
    assert main(capture) == 0, capsys.readouterr().err
    command[1:3] = ["--store", "store"]
    assert main([*command, "--out", "two", *QUICK]) == 0, capsys.readouterr().err
    one, two = (load_file(files / out / "model.safetensors") for out in ("one", "two"))
    assert all(torch.equal(one[name], value) for name, value in two.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method sft", "--store DIR or --text FILE must be given"),
        ("--method sft --text corpus.jsonl --store s", "--store has no meaning with --text"),
        ("--method kd --text corpus.jsonl --student model", "needs --teacher or --teacher-server"),
        ("--method sft --text corpus.jsonl", "--text needs --student, or --tokenizer"),
        ("--method sft --text missing.jsonl --student model", "missing.jsonl"),
        ("--method sft --store s --max-length 5", "--max-length has no meaning without --text"),
    ],
)
def test_the_command_names_what_is_missing(options, message, files, capsys):
    assert main(["train", "--out", "out", *options.split()]) != 0
    assert message in capsys.readouterr().err
