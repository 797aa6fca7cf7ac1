"""The rows that a teacher's store gives a student: who may train on them, and which tokens they belong to."""

from __future__ import annotations

import logging

import pytest
import torch
from support.tiny import VOCAB_SIZE, make_model, make_store, make_tokenizer
from test_trainer import make_trainer, training_logs
from test_trainer_methods import make_drawn_store
from torch.utils.data import ConcatDataset, Subset
from transformers import Trainer, TrainingArguments

import slimkernels as sk
from slimkernels.store import Store, StoreDataset, StoreIterableDataset, StoreWriter
from slimkernels.trainer.teachers import StoredTeacher


class Distiller(sk.SlimLossMixin, Trainer):
    pass


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def make_mixed(tmp_path, rows, **kwargs) -> Distiller:
    settings = {"max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    args = TrainingArguments(str(tmp_path), **settings | kwargs.pop("options", {}))
    model = kwargs.pop("model", None) or make_model()
    return Distiller(model=model, args=args, train_dataset=rows, data_collator=collate, **kwargs)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(make_store(tmp_path_factory.mktemp("store") / "train"))


def copy_store(store: Store, path, vocab_size: int = VOCAB_SIZE, **settings) -> Store:
    """Writes the documents of a store again with other settings."""
    settings = {"selection": store.settings.selection, "tokenizer_fingerprint": "", "codec": "float32"} | settings
    with StoreWriter(path, vocab_size=vocab_size, teacher={}, temperatures=store.temperatures, **settings) as writer:
        for document in store:
            writer.add(document.input_ids, document.positions, document.teacher)
    return Store(path)


WAYS = {
    "store": lambda store: store,
    "dataset": StoreDataset,
    "path": lambda store: str(store.path),
    "subset": lambda store: Subset(StoreDataset(store), [0, 1]),
    "concatenated": lambda store: ConcatDataset([StoreDataset(store), Subset(StoreDataset(store), [0])]),
    "mixin": None,
    "mixin-path": None,
}


def train_on(way: str, tmp_path, store: Store, method: str, **options):
    tokenizer = options.pop("tokenizer", None)
    if not way.startswith("mixin"):
        return make_trainer(tmp_path, WAYS[way](store), method=method, tokenizer=tokenizer, **options)
    fields = {name: options.pop(name) for name in ("temperature", "rest") if name in options}
    ids = torch.arange(2, 10)
    return make_mixed(
        tmp_path,
        [{"input_ids": ids, "labels": ids}],
        teacher_store=store if way == "mixin" else str(store.path),
        objective=sk.SlimObjective(method, **fields),
        processing_class=tokenizer,
        **options,
    )


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_checked_whichever_way_they_come(tmp_path, store, way):
    drawn = make_drawn_store(tmp_path / "draws", rounds=5)
    with pytest.raises(ValueError, match="temperature must be 1 with a store of select='sample'"):
        train_on(way, tmp_path, drawn, "kd", temperature=2.0)
    with pytest.raises(ValueError, match="'sampled' needs a store of draws"):
        train_on(way, tmp_path, store, "sampled")
    larger = copy_store(store, tmp_path / "larger", vocab_size=VOCAB_SIZE + 7)
    with pytest.raises(ValueError, match=r"as many rows as the teacher's vocabulary in the store, 104, got 97"):
        train_on(way, tmp_path, larger, "kd")
    with pytest.raises(ValueError, match="the student's tokenizer must be the one the store was captured with"):
        train_on(way, tmp_path, store, "kd", tokenizer=make_tokenizer(VOCAB_SIZE - 1))
    served = copy_store(store, tmp_path / "served", selection={"kind": "top_logprobs", "value": 20, "top_k": 20})
    with pytest.raises(ValueError, match="rest must be chosen with a store of a server's answers"):
        train_on(way, tmp_path, served, "kd")
    train_on(way, tmp_path, served, "kd", rest="ghost")
    with pytest.raises(ValueError, match=r"temperature=2\.0 is not among the teacher's temperatures=\(1\.0,\)"):
        train_on(way, tmp_path, store, "kd", rest="ghost", temperature=2.0)
    if not way.startswith("mixin"):
        # Rows that are not read need not be such.
        train_on(way, tmp_path, served, "sft")


@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith("mixin")])
def test_a_document_that_the_student_cannot_read_is_found_before_the_first_step(tmp_path, store, way):
    longest = max(len(document.input_ids) for document in store)
    assert store.longest_document() == longest
    make_trainer(tmp_path, WAYS[way](store), model=make_model(max_length=longest))
    with pytest.raises(ValueError, match=rf"at most max_length={longest - 1} tokens .* got one of {longest} in "):
        make_trainer(tmp_path, WAYS[way](store), model=make_model(max_length=longest - 1))


def test_stores_that_cannot_be_in_one_batch_are_found_before_the_first_step(tmp_path, store):
    rounded = StoreDataset(make_store(tmp_path / "rounded", codec="affine8"))
    other = StoreDataset(make_store(tmp_path / "other", temperatures=(1.0, 2.0)))
    with pytest.raises(ValueError, match=r"must share codec, .* packed=False"):
        make_trainer(tmp_path, ConcatDataset([StoreDataset(store), rounded]))
    with pytest.raises(ValueError, match=r"must share packed, .* packed=False"):
        make_trainer(tmp_path, ConcatDataset([store, rounded]))
    with pytest.raises(ValueError, match="must share temperatures"):
        make_trainer(tmp_path, ConcatDataset([StoreDataset(store), other]))
    both = ConcatDataset([store, StoreDataset(rounded.store, packed=False)])
    trainer = make_trainer(tmp_path, both, max_steps=4)
    trainer.train()
    assert len(training_logs(trainer)) == 4


def test_a_stream_is_refused_by_a_trainer_that_would_split_it_again(tmp_path, store):
    with pytest.raises(ValueError, match="got a stream, StoreIterableDataset, which does that itself"):
        make_trainer(tmp_path, StoreIterableDataset(store))


def test_a_padded_student_learns_from_a_store_without_the_padding(tmp_path, store, caplog):
    student = make_model(vocab_size=VOCAB_SIZE + 31)
    with caplog.at_level(logging.WARNING, "slimkernels"):
        trainer = make_trainer(tmp_path, store, model=student, max_steps=2)
    assert "head has 128 rows and the store's vocabulary 97: the last 31 rows are taken to be padding" in caplog.text
    trainer.train()
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in training_logs(trainer))


TEACHERS = {
    "store": lambda store: {"teacher_store": store, "objective": "kd"},
    "model": lambda store: {"teacher_model": make_model(seed=1234), "objective": "kd"},
    "draws": lambda store: {"teacher_model": make_model(seed=1234), "objective": "sampled"},
    "labels": lambda store: {"objective": "sft"},
}


@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_batch_without_labels_has_loss_0_and_goes_on(tmp_path, store, teacher, accumulation, caplog):
    """Trains on a batch of prompts that fill their rows and then on documents with labels."""
    document = next(d for d in store if len(d.positions) > 2)
    labels = torch.full_like(document.input_ids, -100)
    labels[document.positions] = document.input_ids[document.positions]
    empty = {"input_ids": document.input_ids, "labels": torch.full_like(labels, -100)}
    full = {"input_ids": document.input_ids, "labels": labels}
    rows = [empty] * accumulation + [full] * accumulation
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, "max_steps": 2}
    options |= {"train_sampling_strategy": "sequential"}
    model = make_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with caplog.at_level(logging.WARNING, "slimkernels"):
        trainer = make_mixed(tmp_path, rows, model=model, options=options, **TEACHERS[teacher](store))
        trainer.train()
    losses = [entry["loss"] for entry in training_logs(trainer)]
    assert losses[0] == 0
    assert losses[1] > 1
    assert "not finite" not in caplog.text
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_store_documents_without_labels_have_loss_0(tmp_path, store):
    documents = list(store)
    with StoreWriter(
        tmp_path / "store", vocab_size=VOCAB_SIZE, tokenizer_fingerprint="", teacher={}, selection={}, codec="float32"
    ) as writer:
        for number, document in enumerate(documents[:8]):
            kept = slice(0 if number < 4 else None, 0 if number < 4 else None)
            writer.add(document.input_ids, document.positions[kept], document.teacher[kept])
    trainer = make_trainer(tmp_path, Store(tmp_path / "store"), max_steps=2)
    trainer.train()
    losses = [entry["loss"] for entry in training_logs(trainer)]
    assert losses[0] == 0
    assert losses[1] > 1


PADDED = {
    "runs-on": lambda length, width: torch.arange(width),
    "ones": lambda length, width: torch.cat([torch.arange(length), torch.ones(width - length, dtype=torch.int64)]),
    "zeros": lambda length, width: torch.cat([torch.arange(length), torch.zeros(width - length, dtype=torch.int64)]),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("positions", PADDED)
def test_the_mask_says_which_tokens_are_of_a_document(store, positions, side):
    documents, width = [store[0], store[1]], 24
    inputs = {name: torch.zeros(2, width, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    inputs["position_ids"] = torch.zeros(2, width, dtype=torch.int64)
    places = []
    for row, document in enumerate(documents):
        length = len(document.input_ids)
        start = 0 if side == "right" else width - length
        inputs["input_ids"][row, start : start + length] = document.input_ids
        inputs["attention_mask"][row, start : start + length] = 1
        numbers = PADDED[positions](length, width)
        inputs["position_ids"][row] = numbers if side == "right" else numbers.roll(start)
        places.append(row * width + start + document.positions - 1)
    found = StoredTeacher(store).rows(inputs, torch.cat(places))
    expected = sk.SparseLogits.cat([document.teacher for document in documents])
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.rest_lse.nan_to_num(9.0), expected.rest_lse.nan_to_num(9.0))
    none = StoredTeacher(store).rows(inputs, torch.cat(places)[:0])
    assert sk.SparseLogits.cat([none, found]).rest_lse.shape == found.rest_lse.shape
    assert none.rest_lse.shape == (0, len(store.temperatures))


@pytest.mark.parametrize("numbers", ["positions", "mask"])
def test_packed_documents_are_told_apart_by_their_positions_or_by_numbers_in_the_mask(store, numbers):
    documents = [store[0], store[1], store[2]]
    inputs = {"input_ids": torch.cat([document.input_ids for document in documents])[None]}
    if numbers == "positions":
        inputs["position_ids"] = torch.cat([torch.arange(len(document.input_ids)) for document in documents])[None]
    else:
        parts = [torch.full((len(document.input_ids),), number + 1) for number, document in enumerate(documents)]
        inputs["attention_mask"] = torch.cat(parts)[None]
    starts = torch.tensor([0, *(len(document.input_ids) for document in documents)]).cumsum(0)
    places = torch.cat([int(start) + d.positions - 1 for start, d in zip(starts, documents, strict=False)])
    found = StoredTeacher(store).rows(inputs, places)
    assert torch.equal(found.ids, sk.SparseLogits.cat([document.teacher for document in documents]).ids)


def test_a_student_that_could_not_be_saved_is_found_before_the_first_step(tmp_path, store):
    def student():
        model = make_model()
        model.generation_config.temperature = 0.7
        model.generation_config.do_sample = False
        return model

    ids = torch.arange(2, 10)
    message = "generation_config must be one that can be saved, or no checkpoint could be written"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, store, model=student())
    with pytest.raises(ValueError, match=message):
        make_mixed(tmp_path, [{"input_ids": ids, "labels": ids}], model=student(), objective="sft")


@pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"])
def test_what_the_trainer_would_never_call_is_refused(tmp_path, store, name):
    args = make_trainer(tmp_path, store).args
    with pytest.raises(ValueError, match=f"{name} must be None: SlimTrainer computes the loss and its own metrics"):
        sk.SlimTrainer(model=make_model(), args=args, train_dataset=store, **{name: lambda *arguments: {}})
