"""The training examples against eager loops on full logits."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import teachers
from support.served import MODEL
from support.served_scores import ScoringServer
from support.tiny import make_model, make_store
from test_trainer import batch_terms, dense_loss
from transformers import AutoModelForCausalLM

from slimkernels.store import DocumentOrder, StoreDataset
from slimkernels.teacher import capture

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def eager_losses(model, store, batches: list[list[int]]) -> list[float]:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    losses = []
    for batch in batches:
        loss = dense_loss(batch_terms(model, [store[index] for index in batch]), "slim").mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_plain_loop_follows_the_eager_curve(tmp_path):
    dataset = StoreDataset(make_store(tmp_path / "store"))
    losses = list(load("plain_loop").train(make_model(), dataset, epochs=2, batch_size=3))
    order, batches = DocumentOrder(len(dataset), seed=0), []
    for epoch in range(2):
        order.set_epoch(epoch)
        indices = list(order)
        batches += [indices[first : first + 3] for first in range(0, len(indices), 3)]
    assert losses == pytest.approx(eager_losses(make_model(), dataset.store, batches), rel=1e-4)
    assert len(losses) == 6


def test_plain_loop_runs_as_a_script(tmp_path):
    make_store(tmp_path / "store")
    make_model().save_pretrained(tmp_path / "model")
    command = [sys.executable, EXAMPLES / "plain_loop.py", tmp_path / "store", tmp_path / "model", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 ")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(trained.lm_head.weight, make_model().lm_head.weight)


@pytest.mark.filterwarnings("ignore")
def test_lightning_follows_the_eager_curve(tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs the package lightning")
    example, dataset = load("lightning_module"), StoreDataset(make_store(tmp_path / "store"))

    class Keep(lightning.Callback):
        losses = []  # noqa: RUF012 -- one test's

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            self.losses.append(float(outputs["loss"]))

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=2, callbacks=[Keep()], enable_model_summary=False, **options)
    trainer.fit(example.Student(make_model().train()), example.make_loader(dataset, batch_size=4))
    batches = [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    assert Keep.losses == pytest.approx(eager_losses(make_model(), dataset.store, batches), rel=1e-4)
    assert 0 < float(trainer.callback_metrics["weight"]) < 1


@pytest.fixture
def texts(tmp_path):
    """A folder with a student and its tokenizer, and a file of prompts."""
    teachers.save_teacher(tmp_path / "student", seed=5)
    rows = [json.dumps({"prompt": text}) for text in teachers.PROMPTS[:4]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    return tmp_path


SHORT = {"per_device_train_batch_size": 2, "max_completion_length": 5, "max_steps": 2, "learning_rate": 1e-3}
SHORT |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}


@pytest.mark.filterwarnings("ignore")
def test_trl_distillation_learns_from_a_server(texts):
    pytest.importorskip("trl", reason="needs the extra slimkernels[trl]")
    options = {"prompts": str(texts / "prompts.jsonl"), **SHORT}
    with ScoringServer() as server:
        trainer = load("trl_distillation").make_trainer(
            str(texts / "student"), str(texts / "out"), server=server.url, name=MODEL, **options
        )
        before = trainer.model.get_output_embeddings().weight.detach().clone()
        trainer.train()
        prompts = [tuple(server.tokenizer(text)["input_ids"]) for text in teachers.PROMPTS[:4]]
    assert len(server.documents) == 4
    assert all(any(document[: len(prompt)] == prompt for prompt in prompts) for document in server.documents)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    assert all(entry["loss"] == pytest.approx(entry["kd"], rel=1e-4) and entry["kd"] > 0 for entry in logs)
    assert all(0 < entry["teacher_mass"] < 1 for entry in logs)
    assert not torch.equal(trainer.model.get_output_embeddings().weight, before)


@pytest.mark.filterwarnings("ignore")
def test_trl_distillation_learns_from_a_store(texts):
    pytest.importorskip("trl", reason="needs the extra slimkernels[trl]")
    model, tokenizer = teachers.make_teacher(seed=3), teachers.make_tokenizer()
    capture(model, tokenizer, [tokenizer(text)["input_ids"] for text in teachers.PROMPTS], texts / "store")
    options = SHORT | {"max_steps": 12, "learning_rate": 1e-2}
    trainer = load("trl_distillation").make_trainer(
        str(texts / "student"), str(texts / "out"), store=str(texts / "store"), **options
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
