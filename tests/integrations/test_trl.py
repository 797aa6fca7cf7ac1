"""TRL's trainers with the losses and teachers of this package, against the same trainers with their own."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support import teachers
from support.integrations import trainer_package
from support.served_scores import ScoringServer

import slimkernels as sk
from slimkernels.models.fingerprints import tokenizer_fingerprint
from slimkernels.models.make_student import make_student
from slimkernels.store import Store, StoreWriter
from slimkernels.trainer import TeacherServer

trl = trainer_package("trl")
from slimkernels.integrations.trl import DistillationTrainer, GKDTrainer  # noqa: E402 -- TRL is there

gkd = trainer_package("trl.experimental.gkd")

# All run in make test-integrations.
SLOW = pytest.mark.slow
VOCAB_SIZE = 300
STEPS = 4
RECIPE = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*experimental.*:UserWarning"),
]


def make_model():
    model = make_student(vocab_size=VOCAB_SIZE, hidden_size=16, num_layers=1, num_heads=2, max_length=64, seed=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return model


def make_teacher():
    return teachers.make_teacher(seed=3)


def lora(**options) -> Any:
    peft = pytest.importorskip("peft", reason="needs the extra slimkernels[trl]")
    return peft.LoraConfig(r=3, lora_alpha=12, **options)


def write_store(path, documents: list[list[int]], prompt_length: int, top_k: int = VOCAB_SIZE) -> Store:
    """Writes the teacher's ``top_k`` largest logits of the documents' tokens after their prompts."""
    teacher = make_teacher()
    writer = StoreWriter(
        path,
        vocab_size=VOCAB_SIZE,
        tokenizer_fingerprint=tokenizer_fingerprint(teachers.make_tokenizer()),
        teacher={"name": "tiny"},
        selection={"kind": "top_k", "value": top_k, "top_k": top_k},
        codec="float32",
    )
    with writer, torch.no_grad():
        for document in documents:
            ids, positions = torch.tensor(document), torch.arange(prompt_length, len(document))
            logits = teacher(ids[None]).logits[0, positions - 1]
            kept = sk.topk_logits(logits, top_k=top_k, target=ids[positions])
            writer.add(ids, positions, kept, prompt_length=prompt_length)
    return Store(path)


def make_documents(count: int = 8) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, VOCAB_SIZE, (6 + number % 5,), generator=generator).tolist() for number in range(count)]


def trained(trainer):
    trainer.train()
    trainer.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(trainer.losses) == STEPS
    assert len(set(trainer.losses)) == STEPS
    return trainer


def assert_same(ours, theirs, rel: float = 1e-4) -> None:
    """Compares the curves of the loss and of its gradient, and the weights at the end."""
    assert ours.losses == pytest.approx(theirs.losses, rel=rel)
    norms = [[entry["grad_norm"] for entry in run.state.log_history if "loss" in entry] for run in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=10 * rel)
    start = dict(make_model().named_parameters())
    for (name, mine), own in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-2, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
    moved = [(value - start[name]).abs().max() for name, value in ours.model.named_parameters() if name in start]
    assert not moved or max(moved) > 1e-2


# SFTTrainer


@SLOW
def test_sft_trainer_follows_its_own_curve(tmp_path, ran):
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(2, VOCAB_SIZE, (9,), generator=generator).tolist()} for _ in range(16)]

    class Distiller(sk.SlimLossMixin, trl.SFTTrainer):
        pass

    def losses(trainer_class, **options) -> list[float]:
        args = trl.SFTConfig(output_dir=str(tmp_path), **RECIPE)
        options |= {"train_dataset": Dataset.from_list(rows), "processing_class": teachers.make_tokenizer()}
        return trained(trainer_class(make_model(), args, **options)).losses

    found, expected = losses(Distiller, objective="sft"), losses(trl.SFTTrainer)
    assert found == pytest.approx(expected, rel=1e-5)
    ran("trl", "SFTTrainer", f"{len(found)} steps on the labels, with the loss curve of its own loss")


# DistillationTrainer


def distill(tmp_path, trainer_class, *, config: dict[str, Any] | None = None, **options):
    torch.manual_seed(0)
    given = {"output_dir": str(tmp_path), "max_completion_length": 6, **RECIPE, **(config or {})}
    if "teacher_store" not in options:
        options.setdefault("train_dataset", Dataset.from_list([{"prompt": text} for text in teachers.PROMPTS * 2]))
    args = trl.DistillationConfig(**given)
    return trainer_class(make_model(), args=args, processing_class=teachers.make_tokenizer(), **options)


DISTILLATIONS = {
    "forward_kl": {"beta": 0.0},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "warm": {"beta": 0.0, "temperature": 1.5},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("case", ["jsd", *(pytest.param(case, marks=SLOW) for case in DISTILLATIONS if case != "jsd")])
def test_distillation_trainer_follows_its_own_curve(tmp_path, ran, case):
    config = DISTILLATIONS[case]
    theirs = trained(distill(tmp_path, trl.DistillationTrainer, config=config, teacher_model=make_teacher()))
    ours = trained(distill(tmp_path, DistillationTrainer, config=config, teacher_model=make_teacher()))
    if case == "bf16":
        assert ours.losses == pytest.approx(theirs.losses, rel=3e-2)
    else:
        assert_same(ours, theirs)
    counts = [[entry["num_tokens"] for entry in run.state.log_history if "loss" in entry] for run in (ours, theirs)]
    assert counts[0] == counts[1]
    ran("trl", "DistillationTrainer", f"{STEPS} steps on the student's words, {case}, with the curve of its own loss")


@SLOW
def test_distillation_trainer_trains_adapters(tmp_path, ran):
    config = {"gradient_checkpointing": True}
    theirs, ours = (
        trained(
            distill(
                tmp_path, one, config=config, teacher_model=make_teacher(), peft_config=lora(target_modules=["q_proj"])
            )
        )
        for one in (trl.DistillationTrainer, DistillationTrainer)
    )
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    adapters = {name: value for name, value in ours.model.named_parameters() if "lora_B" in name}
    assert adapters
    assert all(value.abs().max() > 1e-3 for value in adapters.values())
    for name, value in make_model().named_parameters():
        if "q_proj" not in name:
            assert torch.equal(value, dict(ours.model.base_model.model.named_parameters())[name])
    ran("trl", "DistillationTrainer", f"{STEPS} steps with LoRA, with the curve of its own loss")


@SLOW
def test_distillation_trainer_asks_a_server(tmp_path, ran):
    """Learns its own curve from a server that gives all V entries, and with few of them that of the same few."""
    theirs = trained(distill(tmp_path, trl.DistillationTrainer, teacher_model=make_teacher()))
    for top_k in (VOCAB_SIZE, 5):
        with ScoringServer(model=make_teacher()) as server:
            settings = TeacherServer(server.url, "smollm2", tmp_path / f"rows-{top_k}", top_logprobs=top_k)
            ours = trained(distill(tmp_path, DistillationTrainer, teacher_server=settings))
            assert len(server.documents) == STEPS * 4
            # No completion is written twice, and so none is stored.
            assert len(Store(tmp_path / f"rows-{top_k}" / "rank-00000")) == 0
        if top_k == VOCAB_SIZE:
            assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
        else:
            objective = sk.SlimObjective("reverse_kl", ce_weight=0, teacher_top_k=top_k)
            sparse = trained(distill(tmp_path, DistillationTrainer, teacher_model=make_teacher(), objective=objective))
            assert ours.losses == pytest.approx(sparse.losses, rel=1e-3)
            assert ours.losses[0] < 0.9 * theirs.losses[0]
    ran("trl", "DistillationTrainer", f"{STEPS} steps from a server: K = V with the curve of its own loss, and K = 5")


class OnDocuments(trl.DistillationTrainer):
    """TRL's trainer and its loss, on given completions in place of ones that the student writes."""

    documents: Store

    def _generate(self, prompts: list):
        documents = [self.documents[number] for number in prompts]
        ids = [document.input_ids.tolist() for document in documents]
        starts = [document.prompt_length for document in documents]
        prompts = [one[:start] for one, start in zip(ids, starts, strict=True)]
        return prompts, [one[start:] for one, start in zip(ids, starts, strict=True)], None, None, []


def test_distillation_trainer_learns_from_a_store(tmp_path, ran):
    """Learns its own curve from a store of whole rows, and with few entries that of a teacher which keeps as few."""
    documents = make_documents()
    numbers = Dataset.from_dict({"prompt": range(len(documents))})
    whole = write_store(tmp_path / "whole", documents, prompt_length=2)
    OnDocuments.documents = whole
    theirs = trained(distill(tmp_path, OnDocuments, train_dataset=numbers, teacher_model=make_teacher()))
    assert_same(trained(distill(tmp_path, DistillationTrainer, teacher_store=whole)), theirs)

    few = write_store(tmp_path / "few", documents, prompt_length=2, top_k=5)
    ours = trained(distill(tmp_path, DistillationTrainer, teacher_store=str(few.path)))

    class SparseOnDocuments(DistillationTrainer):
        _generate = OnDocuments._generate
        documents = few

    objective = sk.SlimObjective("reverse_kl", ce_weight=0, teacher_top_k=5)
    options = {"train_dataset": numbers, "teacher_model": make_teacher(), "objective": objective}
    assert_same(ours, trained(distill(tmp_path, SparseOnDocuments, **options)))
    assert ours.losses[0] < 0.9 * theirs.losses[0]
    ran("trl", "DistillationTrainer", f"{STEPS} steps from a store: K = V with the curve of its own loss, and K = 5")


def test_documents_without_a_completion_cost_nothing(tmp_path):
    document = make_documents()[3]
    losses = []
    for number, documents in enumerate([[document], [document[:2], document], [document[:2]]]):
        store = write_store(tmp_path / str(number), documents, prompt_length=2)
        config = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": len(documents), "max_steps": 1}
        trainer = distill(tmp_path, DistillationTrainer, config=config, teacher_store=store)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses == pytest.approx([losses[0], losses[0], 0.0])
    assert losses[0] > 1


DIVERGENCES = ("soft_ce", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "ab", "gated")


@pytest.mark.parametrize("divergence", ["forward_kl", *(pytest.param(name, marks=SLOW) for name in DIVERGENCES)])
def test_distillation_trainer_learns_the_labels_of_a_store_alone(tmp_path, ran, divergence):
    """Has every divergence on the rows of a document that the store has, wherever they are, and on no others."""
    document = make_documents()[3]
    ids, positions = torch.tensor(document), torch.tensor([2, 3, 6])
    teacher = make_teacher()
    writer = StoreWriter(
        tmp_path / "parts",
        vocab_size=VOCAB_SIZE,
        tokenizer_fingerprint=tokenizer_fingerprint(teachers.make_tokenizer()),
        teacher={"name": "tiny"},
        selection={"kind": "top_k", "value": 7, "top_k": 7},
        codec="float32",
    )
    with writer, torch.no_grad():
        kept = sk.topk_logits(teacher(ids[None]).logits[0, positions - 1], top_k=7, target=ids[positions])
        writer.add(ids, positions, kept)
    objective = sk.SlimObjective("kd", rest="ghost", divergence=divergence, ce_weight=0.5)
    config = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 1, "max_steps": 1}
    trainer = distill(
        tmp_path, DistillationTrainer, config=config, teacher_store=tmp_path / "parts", objective=objective
    )
    trainer.train()
    with torch.no_grad():
        logits = make_model()(ids[None]).logits[0, positions - 1]
    options = objective.loss_options
    expected = sk.slim_loss(logits, ids[positions], kept, **options)
    assert (options["divergence"], options["rest"]) == (divergence, "ghost")
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    ran("trl", "DistillationTrainer", f"a step on {divergence} from the rows that a store has, K = 7")


@SLOW
def test_distillation_trainer_makes_the_rows_of_its_teacher_in_chunks(tmp_path, ran):
    kept = sk.SlimObjective("jsd", ce_weight=0, teacher_top_k=5)
    in_chunks = sk.SlimObjective("jsd", ce_weight=0, teacher_top_k=5, teacher_in_chunks=True)
    held, made = (
        trained(distill(tmp_path, DistillationTrainer, teacher_model=make_teacher(), objective=objective))
        for objective in (kept, in_chunks)
    )
    assert_same(made, held, rel=1e-5)
    ran("trl", "DistillationTrainer", f"{STEPS} steps on a teacher's 5 largest logits, made in chunks")


def test_distillation_trainer_evaluates(tmp_path):
    data = Dataset.from_list([{"prompt": text} for text in teachers.PROMPTS])
    metrics = []
    for trainer_class in (trl.DistillationTrainer, DistillationTrainer):
        trainer = distill(tmp_path, trainer_class, teacher_model=make_teacher(), eval_dataset=data)
        torch.manual_seed(1)
        metrics.append(trainer.evaluate())
    for name in ("eval_loss", "eval_entropy", "eval_completions/mean_length"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-4)
    assert metrics[1]["eval_kd"] == pytest.approx(metrics[1]["eval_loss"], rel=1e-4)


# GKDTrainer


def make_rows() -> list[dict[str, Any]]:
    """Makes rows for TRL's collator, whose prompts are two tokens."""
    tokenizer = teachers.make_tokenizer()
    return [
        {
            "prompt": tokenizer.decode(document[:2]),
            "input_ids": document,
            "completion_mask": [0, 0] + [1] * (len(document) - 2),
        }
        for document in make_documents(16)
    ]


def distill_gkd(tmp_path, trainer_class, *, config: dict[str, Any] | None = None, rows=None, **options):
    torch.manual_seed(0)
    random.seed(0)
    args = gkd.GKDConfig(**{"output_dir": str(tmp_path), "max_new_tokens": 6, **RECIPE, **(config or {})})
    dataset, tokenizer = Dataset.from_list(make_rows() if rows is None else rows), teachers.make_tokenizer()
    tokenizer.pad_token = teachers.END
    return trainer_class(make_model(), args=args, train_dataset=dataset, processing_class=tokenizer, **options)


GKD = {
    "data": {"lmbda": 0.0},
    "both": {"lmbda": 0.5, "beta": 0.3},
    "student": {"lmbda": 1.0, "beta": 1.0, "temperature": 1.3},
    "teacher": {"lmbda": 0.0, "beta": 0.0, "seq_kd": True},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("case", ["both", *(pytest.param(case, marks=SLOW) for case in GKD if case != "both")])
def test_gkd_trainer_follows_its_own_curve(tmp_path, ran, case):
    config = GKD[case]
    theirs = trained(distill_gkd(tmp_path, gkd.GKDTrainer, config=config, teacher_model=make_teacher()))
    ours = trained(distill_gkd(tmp_path, GKDTrainer, config=config, teacher_model=make_teacher()))
    if case == "bf16":
        assert ours.losses == pytest.approx(theirs.losses, rel=3e-2)
    else:
        assert_same(ours, theirs)
    ran("trl", "GKDTrainer", f"{STEPS} steps on the words of {case}, with the curve of its own loss")


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@SLOW
def test_gkd_trainer_trains_adapters_and_a_whole_head(tmp_path, ran):
    config = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    options = {"teacher_model": make_teacher(), "peft_config": config}
    theirs, ours = (trained(distill_gkd(tmp_path, one, **options)) for one in (gkd.GKDTrainer, GKDTrainer))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    for (name, mine), own in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, own, rtol=1e-2, atol=2e-4)
        assert "lora_B" not in name or mine.abs().max() > 1e-3
    head = ours.model.get_output_embeddings()
    assert (head.modules_to_save["default"].weight - head.original_module.weight).abs().max() > 1e-2
    ran("trl", "GKDTrainer", f"{STEPS} steps with LoRA and a whole head, with the curve of its own loss")


def test_gkd_trainer_learns_from_a_store_and_packed(tmp_path, ran):
    """Learns its own curve from a store of whole rows, also where all documents of a batch are one sequence."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    documents = make_documents(16)
    store = write_store(tmp_path / "store", documents, prompt_length=2)
    config = {"lmbda": 0.0, "beta": 0.3}
    theirs = trained(distill_gkd(tmp_path, gkd.GKDTrainer, config=config, teacher_model=make_teacher()))
    assert_same(trained(distill_gkd(tmp_path, GKDTrainer, config=config, teacher_store=store)), theirs)

    rows = [{"input_ids": document, "labels": [-100, -100, *document[2:]]} for document in documents]
    options = {"rows": rows, "data_collator": DataCollatorForLanguageModeling(pad_token_id=1, padding_free=True)}
    packed = distill_gkd(tmp_path, GKDTrainer, config=config, teacher_store=store, **options)
    assert len(packed.data_collator(rows[:3])["input_ids"]) == 1
    assert_same(trained(packed), theirs)
    online = trained(distill_gkd(tmp_path, GKDTrainer, config=config, teacher_model=make_teacher(), **options))
    assert_same(online, theirs)
    ran("trl", "GKDTrainer", f"{STEPS} steps from a store, padded and packed, with the curve of its own loss")


def test_gkd_trainer_asks_a_server(tmp_path, ran):
    """Asks for the data's text once and stores it, and for the student's words without storing them."""
    config = {"lmbda": 0.5, "beta": 0.3}
    theirs = trained(distill_gkd(tmp_path, gkd.GKDTrainer, config=config, teacher_model=make_teacher()))
    with ScoringServer(model=make_teacher()) as server:
        settings = TeacherServer(server.url, "smollm2", tmp_path / "rows", top_logprobs=VOCAB_SIZE)
        ours = trained(distill_gkd(tmp_path, GKDTrainer, config=config, teacher_server=settings))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    stored, data = Store(tmp_path / "rows" / "rank-00000"), {tuple(document) for document in make_documents(16)}
    kept = {tuple(stored[number].input_ids.tolist()) for number in range(len(stored))}
    assert 0 < len(kept) < len(server.documents)
    assert kept == data & set(server.documents)
    ran("trl", "GKDTrainer", f"{STEPS} steps from a server, with the curve of its own loss")


# What neither can honour


REFUSED = {
    "no-teacher": ({}, {}, "needs one of teacher_model, teacher_store and teacher_server, got"),
    "two-teachers": ({}, {"teacher_model": make_teacher, "teacher_server": True}, "needs one of teacher_model"),
    "beta": (
        {"beta": 0.0},
        {"teacher_model": make_teacher, "objective": "kd"},
        "beta of DistillationConfig has no effect with an objective, which says the divergence, got 0.0",
    ),
    "teacher-arguments": (
        {"teacher_model_init_kwargs": {"dtype": "float32"}},
        {"teacher_model": make_teacher},
        "teacher_model_init_kwargs and teacher_model_revision must be None",
    ),
    "liger": (
        {"use_liger_kernel": True},
        {"teacher_model": make_teacher},
        'set liger_kernel_config={"fused_linear_cross_entropy": False}',
    ),
    "store-and-prompts": ({}, {"teacher_store": True, "train_dataset": []}, "holds the prompts and completions"),
    "store-and-vllm": ({"use_vllm": True}, {"teacher_store": True}, "holds the prompts and completions"),
    "store-temperature": ({"temperature": 0.7}, {"teacher_store": True}, "temperature=0.7 is not among the teacher's"),
    "temperature": (
        {"temperature": 0.0},
        {"teacher_model": make_teacher},
        "temperature must be positive and finite, got 0.0",
    ),
    "head-adapter": (
        {},
        {"teacher_model": make_teacher, "peft_config": lambda: lora(target_modules=["lm_head"])},
        "Applying a PEFT adapter to `lm_head` is not supported",
    ),
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_distillation_trainer_refuses(tmp_path, case):
    config, options, message = REFUSED[case]
    options = {name: value() if callable(value) else value for name, value in options.items()}
    if options.pop("teacher_store", None):
        options["teacher_store"] = write_store(tmp_path / "store", make_documents(), prompt_length=2, top_k=5)
        options.setdefault("train_dataset", None)
        if options["train_dataset"] is not None:
            options["train_dataset"] = Dataset.from_dict({"prompt": ["a"]})
    with ScoringServer(model=make_teacher()) as server:
        if options.pop("teacher_server", None):
            options["teacher_server"] = TeacherServer(server.url, "smollm2", tmp_path / "rows", top_logprobs=5)
        with pytest.raises(ValueError, match=re.escape(message)):
            distill(tmp_path, DistillationTrainer, config=config, **options)


REFUSED_BY_GKD = {
    "store": ({"lmbda": 0.5}, {"teacher_store": "store"}, "lmbda must be 0 with a teacher_store"),
    "seq_kd": ({"lmbda": 0.0, "seq_kd": True}, {"teacher_store": "store"}, "seq_kd needs a teacher_model"),
    "packing": ({"packing": True}, {"teacher_model": make_teacher}, "packing and padding_free must be False"),
    "padding_free": ({"padding_free": True}, {"teacher_model": make_teacher}, "pass a data_collator that packs"),
    "fsdp": ({"fsdp": "full_shard"}, {"teacher_model": make_teacher}, "prepares a teacher of its own with FSDP"),
    "no-teacher": ({}, {}, "needs one of teacher_model, teacher_store and teacher_server"),
}


@pytest.mark.parametrize("case", REFUSED_BY_GKD)
def test_gkd_trainer_refuses(tmp_path, case):
    config, options, message = REFUSED_BY_GKD[case]
    options = {name: value() if callable(value) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        distill_gkd(tmp_path, GKDTrainer, config=config, **options)


def test_gkd_trainer_refuses_to_write_for_packed_batches(tmp_path):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [{"input_ids": document, "labels": document} for document in make_documents()]
    collator = DataCollatorForLanguageModeling(pad_token_id=1, padding_free=True)
    options = {"rows": rows, "data_collator": collator, "teacher_model": make_teacher()}
    trainer = distill_gkd(tmp_path, GKDTrainer, config={"lmbda": 1.0}, **options)
    with pytest.raises(ValueError, match="lmbda and seq_kd must be 0 and False with batches that have position_ids"):
        trainer.train()


@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"sp_size": 2}])
def test_parts_of_sequences_are_refused(tmp_path, monkeypatch, sizes):
    """Refuses what accelerate accepts on GPUs only, with the configuration that it would have there."""
    from accelerate import Accelerator, ParallelismConfig

    config = ParallelismConfig(**sizes)
    monkeypatch.setattr(Accelerator, "parallelism_config", property(lambda self: config))
    monkeypatch.setattr(ParallelismConfig, "get_device_mesh", lambda *_: None)
    monkeypatch.setattr(ParallelismConfig, "_validate_accelerator", lambda *_: None)
    for make, trainer_class in ((distill, DistillationTrainer), (distill_gkd, GKDTrainer)):
        with pytest.raises(ValueError, match="parallelism_config must leave sequences whole"):
            make(tmp_path, trainer_class, teacher_model=make_teacher())


def test_configurations_of_other_trainers_are_refused(tmp_path):
    from trl.experimental import server_distillation

    args = trl.SFTConfig(output_dir=str(tmp_path), **RECIPE)
    for trainer_class in (DistillationTrainer, GKDTrainer):
        with pytest.raises(TypeError, match="Config, got SFTConfig"):
            trainer_class(make_model(), make_teacher(), args)
    url = "http://localhost:1"
    args = server_distillation.ServerDistillationConfig(str(tmp_path), teacher_model_server_url=url, **RECIPE)
    with pytest.raises(ValueError, match="whose loss and teacher would have no effect: pass teacher_server="):
        DistillationTrainer(make_model(), make_teacher(), args)


def test_own_words_as_labels_are_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "slimkernels"):
        distill(tmp_path, DistillationTrainer, teacher_model=make_teacher())
        distill_gkd(tmp_path, GKDTrainer, config={"lmbda": 0.0}, teacher_model=make_teacher(), objective="kd")
        assert "own words" not in caplog.text
        distill(tmp_path, DistillationTrainer, teacher_model=make_teacher(), objective="kd")
    assert "the student learns from its own words as if they were labels: set SlimObjective(..., ce_weight=0)" in (
        caplog.text
    )


# Two processes

RANKS = """
import json, os, sys
import importlib.util
import torch

torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("test_trl", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
curves = module.curves_of_ranks({output!r})
if torch.distributed.get_rank() == 0:
    with open({output!r} + "/curves.json", "w") as file:
        json.dump(curves, file)
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def curves_of_ranks(output: str) -> list[list[list[float]]]:
    """Trains with TRL's and with our trainers in this process of several; returns losses and norms of gradients."""
    config, curves = {"per_device_train_batch_size": 1, "lmbda": 0.0}, []
    for make, trainer_class in (
        (distill, trl.DistillationTrainer),
        (distill, DistillationTrainer),
        (distill_gkd, gkd.GKDTrainer),
        (distill_gkd, GKDTrainer),
    ):
        given = config if make is distill_gkd else {"per_device_train_batch_size": 1}
        trainer = trained(make(Path(output), trainer_class, config=given, teacher_model=make_teacher()))
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        curves.append([[entry["loss"], entry["grad_norm"]] for entry in logs])
    return curves


@SLOW
def test_two_processes_follow_the_curve(tmp_path, ran):
    """Follows TRL's curve in DistillationTrainer, and twice that of GKDTrainer, which forgets that there are two."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(path=str(Path(__file__)), output=str(tmp_path)))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    theirs, ours, their_gkd, our_gkd = map(torch.tensor, json.loads((tmp_path / "curves.json").read_text()))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    # AdamW's steps do not depend on the scale of the gradient.
    torch.testing.assert_close(our_gkd, 2 * their_gkd, rtol=1e-2, atol=0)
    ran("trl", "DistillationTrainer", f"{STEPS} steps on two processes, with the curve of its own loss")
    ran("trl", "GKDTrainer", f"{STEPS} steps on two processes, with twice the curve of its own loss")
