"""The training examples against eager loops on full logits."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny import make_model, make_store
from test_trainer import batch_terms, dense_loss
from transformers import AutoModelForCausalLM

from slimkernels.store import DocumentOrder, StoreDataset

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
