"""A training on several stores: where its rows come from, shares of the stores, a stop and two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from support.tiny import TOP_K, VOCAB_SIZE, make_model, make_store
from test_trainer import make_trainer, training_logs
from test_trainer_rows import Distiller, collate
from torch.utils.data import ConcatDataset, DataLoader, Subset
from transformers import Trainer, TrainingArguments

import slimkernels as sk
from slimkernels.cli import main
from slimkernels.store import MixedStores, Store, StoreWriter
from slimkernels.trainer import train
from slimkernels.trainer.teachers import StoredTeacher

QUICK = {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}


class Recording(sk.SlimTrainer):
    """A trainer that keeps the first tokens of the documents of every micro-batch that it trains on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.read: list[list[int]] = []

    def _compute_step(self, model, inputs, *args):
        self.read.append([int("".join(f"{token:02d}" for token in ids[:3].tolist())) for ids in inputs["input_ids"]])
        return super()._compute_step(model, inputs, *args)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> tuple[str, str]:
    """A store of six documents, and one with rows of another teacher for two of them and two documents of its own."""
    folder = tmp_path_factory.mktemp("stores")
    one, own = make_store(folder / "one", num_documents=6), Store(make_store(folder / "own", num_documents=2, seed=9))
    settings = {"tokenizer_fingerprint": own.tokenizer_fingerprint, "selection": own.settings.selection}
    teacher = make_model(seed=77).eval()
    with StoreWriter(folder / "other", vocab_size=VOCAB_SIZE, teacher={}, codec="float32", **settings) as writer:
        for document in (*Store(one)[:2], *own):
            with torch.no_grad():
                logits = teacher(document.input_ids[None]).logits[0, document.positions - 1]
            rows = sk.topk_logits(logits, top_k=TOP_K, target=document.input_ids[document.positions])
            writer.add(document.input_ids, document.positions, rows)
    return one, str(folder / "other")


def recording(output: Path, mixed: MixedStores, **options) -> Recording:
    options = {"per_device_train_batch_size": 2, "learning_rate": 5e-3, "logging_steps": 1} | QUICK | options
    args = sk.SlimConfig(output_dir=str(output), **options)
    return Recording(model=make_model(), args=args, train_dataset=mixed)


def test_the_loss_is_that_of_the_mixed_rows(paths, tmp_path):
    one, other = map(Store, paths)
    mixed = MixedStores([one, other], weights=[0.7, 0.3])
    trainer = make_trainer(tmp_path, mixed, max_steps=1, rest="ghost", per_device_train_batch_size=2)
    trainer.train()
    hidden, targets, rows = [], [], []
    for index in range(2):
        document, model = one[index], make_model()
        decoded = model.get_decoder()(document.input_ids[None]).last_hidden_state[0]
        hidden.append(decoded[document.positions - 1])
        targets.append(document.input_ids[document.positions])
        parts = [document.teacher, other[other.find(document.input_ids)].teacher]
        rows.append(sk.SparseLogits.mix(parts, [0.7, 0.3]))
    head = model.get_output_embeddings().weight
    teacher = sk.SparseLogits.cat(rows)
    loss = sk.linear_slim_loss(
        torch.cat(hidden), head, torch.cat(targets), teacher, rest="ghost", token_weight="none", kd_weight=3
    ).loss
    assert training_logs(trainer)[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_shares_are_resumed_within_an_epoch(paths, tmp_path):
    """The batches after a stop at step 3 of 4 in the second epoch are those of the run that was never stopped."""
    mixed = MixedStores(paths, weights=[1, 1], shares=[1, 1])
    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 7, "save_total_limit": None}
    whole = recording(tmp_path / "whole", mixed, **options)
    whole.train()
    assert [len(batch) for batch in whole.read] == [2] * 12
    of_other = {int("".join(f"{token:02d}" for token in doc.input_ids[:3].tolist())) for doc in Store(paths[1])[2:]}
    epochs = [[one for batch in whole.read[4 * epoch :][:4] for one in batch] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    # Half of the epoch is of the other store, whose four documents are read once each: two of them are its own.
    assert [sum(document in of_other for document in epoch) for epoch in epochs] == [2, 2, 2]

    shutil.copytree(tmp_path / "whole" / "checkpoint-7", tmp_path / "stopped" / "checkpoint-7")
    resumed = recording(tmp_path / "stopped", mixed, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.read == whole.read[7:]
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], parameter), name

    for changed, message in (
        (MixedStores(paths, weights=[1, 2], shares=[1, 1]), r"store_weights=\[1.0, 1.0\] there, \[1.0, 2.0\] here"),
        (MixedStores(paths, weights=[1, 1], shares=[2, 1]), r"store_shares=\[1.0, 1.0\] there, \[2.0, 1.0\] here"),
        (MixedStores(paths, weights=[1, 1]), r"store_shares=\[1.0, 1.0\] there, None here"),
    ):
        with pytest.raises(ValueError, match=message):
            recording(tmp_path / "stopped", changed, **options).train(resume_from_checkpoint=True)


def test_two_ranks_share_the_batches_of_one(paths, tmp_path, monkeypatch):
    """accelerate splits the trainer's order over the processes, and skips what was read, as in the training itself."""
    monkeypatch.setattr(Trainer, "_run_epoch", lambda self, **options: None)
    trainer = recording(tmp_path, MixedStores(paths, weights=[1, 1], shares=[1, 1]), per_device_train_batch_size=1)

    def documents(num_processes: int, rank: int, skipped: int = 0) -> list[int]:
        trainer._order.set_epoch(0)  # as in a process that was just started
        loader = DataLoader(range(len(trainer.train_dataset)), batch_size=1, sampler=trainer._get_train_sampler())
        shard = prepare_data_loader(loader, num_processes=num_processes, process_index=rank, put_on_device=False)
        shard = skip_first_batches(shard, skipped) if skipped else shard
        shard.set_epoch(1)
        trainer._run_epoch(epoch=1)
        return [int(index) for batch in shard for index in batch]

    whole, ranks = documents(1, 0), [documents(2, rank) for rank in range(2)]
    order = trainer.train_dataset.order(seed=42, rank=0, world_size=1)
    order.set_epoch(1)
    assert whole == list(order)
    assert documents(2, 1, skipped=2) == ranks[1][2:]
    assert [index for pair in zip(*ranks, strict=True) for index in pair] == whole


def test_the_mixin_finds_its_documents_in_several_stores(paths, tmp_path):
    one, other = map(Store, paths)
    mixed = MixedStores([one, other], weights=[0.5, 0.5])
    document = one[1]
    inputs = {"input_ids": document.input_ids[None]}
    found = StoredTeacher(mixed).rows(inputs, document.positions - 1)
    expected = mixed[1].teacher
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.logits, expected.logits)
    assert StoredTeacher(mixed).rows(inputs, document.positions[:0]).temperatures == (1.0,)

    labels = torch.full_like(document.input_ids, -100)
    labels[document.positions] = document.input_ids[document.positions]
    rows = [{"input_ids": document.input_ids, "labels": labels}]
    args = TrainingArguments(str(tmp_path), max_steps=1, logging_steps=1, save_strategy="no", **QUICK)
    options = {"model": make_model(), "args": args, "train_dataset": rows, "data_collator": collate}
    trainer = Distiller(**options, objective=sk.SlimObjective("kd", rest="ghost"), teacher_store=mixed)
    trainer.train()
    logits = make_model()(document.input_ids[None]).logits[0, document.positions - 1]
    target = document.input_ids[document.positions]
    loss = sk.slim_loss(logits, target, expected, rest="ghost", token_weight="none", kd_weight=3).loss
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    with pytest.raises(ValueError, match="teacher_store must have no shares"):
        Distiller(**options, teacher_store=MixedStores([one, other], shares=[1, 1]))


def test_a_training_on_several_stores_refuses(paths, tmp_path):
    with pytest.raises(ValueError, match="temperature must be 1 with rest='ghost' and weights of the stores"):
        make_trainer(tmp_path, MixedStores(paths, weights=[1, 1]), rest="ghost", temperature=2.0)
    shared = MixedStores(paths, weights=[1, 1], shares=[1, 1])
    with pytest.raises(ValueError, match="train_sampling_strategy must be 'random' with shares"):
        make_trainer(tmp_path, shared)
    for inside in (Subset(shared, [0, 1]), ConcatDataset([shared])):
        with pytest.raises(ValueError, match=f"got MixedStores with shares inside of a {type(inside).__name__}"):
            make_trainer(tmp_path, inside)
    with pytest.raises(TypeError, match=r"teacher_server must be one TeacherServer, got dict: documents have no field"):
        sk.SlimTrainer(
            model=make_model(),
            args=sk.SlimConfig(output_dir=str(tmp_path), **QUICK),
            train_dataset=Store(paths[0]),
            teacher_server={"math": None},
        )
    for method, stores in (("kd", paths[0]), ("minillm", paths)):
        with pytest.raises(ValueError, match="store_weights and store_shares must be None with one store"):
            train(stores, make_model(), method, tmp_path, store_shares=[1, 2])


def test_the_command_trains_on_several_stores(paths, tmp_path, capsys):
    stores = ["--store", paths[0], "--store", paths[1]]
    command = ["train", *stores, "--method", "slim", "--out", str(tmp_path / "out"), "--option", "use_cpu=true"]
    command += ["--option", "save_steps=2", "--store-weights", "3", "1", "--store-shares", "1", "1"]
    assert main([*command, "--epochs", "1", "--batch-size", "4"]) == 0
    assert "student saved in" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "out" / "checkpoint-2" / "slim_run.json").read_text())
    assert (recorded["store_weights"], recorded["store_shares"]) == ([3.0, 1.0], [1.0, 1.0])
    assert len(recorded["store"].split()) == 2
    for given, message in (
        ([*stores[:2], "--store-weights", "1"], "--store-weights has no meaning with one --store: omit it, or repeat"),
        ([*stores, "--store-shares", "1"], "--store-shares must be as many as the stores, 2, got 1"),
        ([*stores, "--store-weights", "1", "0"], "--store-weights must be positive and finite, got 0.0"),
        ([*stores, "--store-weights", "1", "1", "--method", "sft"], "--store-weights has no meaning with --method sft"),
        ([*stores, "--store-shares", "1000", "1"], "--store-shares must give each store a document of the 8"),
        ([*stores, "--store", "nowhere"], "nowhere"),
    ):
        assert main(["train", "--method", "slim", "--out", str(tmp_path / "no"), *given]) == 2
        assert message in capsys.readouterr().err


def test_the_command_refuses_stores_of_different_tokenizers(paths, tmp_path, capsys):
    with StoreWriter(
        tmp_path / "foreign", vocab_size=VOCAB_SIZE, tokenizer_fingerprint="foreign", teacher={}, selection={}
    ) as writer:
        document = Store(paths[0])[0]
        writer.add(document.input_ids, document.positions, document.teacher)
    command = ["train", "--store", paths[0], "--store", str(tmp_path / "foreign"), "--method", "kd", "--out", "o"]
    assert main(command) == 2
    assert "stores that are trained on together must have one tokenizer_fingerprint" in capsys.readouterr().err
