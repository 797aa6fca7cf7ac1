"""A store as torch's datasets: every document once, whoever reads it, in an order that can be continued."""

from __future__ import annotations

import dataclasses
import doctest
import itertools
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.store_cases import SETTINGS, assert_stored, random_case, write_store
from torch.utils.data import BatchSampler, DataLoader

from slimkernels import PackedLogits, SparseLogits, decode_logits
from slimkernels.store import (
    Document,
    DocumentOrder,
    Store,
    StoreDataset,
    StoreIterableDataset,
    StoreWriter,
    collate_documents,
    dataset,
    errors,
)
from slimkernels.store.order import OrderIterator

COUNT = 23


@pytest.fixture(scope="module")
def cases():
    generator = torch.Generator().manual_seed(0)
    found = [random_case(6 + i % 5, 1 + i % 4, generator, ragged=i % 7 == 0) for i in range(COUNT)]
    for i, case in enumerate(found):
        # The first token names the document.
        case.input_ids[0] = i
    return found


@pytest.fixture(scope="module")
def path(cases, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder, [cases[:9], cases[9:10], cases[10:]])
    return folder


def names(documents) -> list[int]:
    return [int(document.input_ids[0]) for document in documents]


def batch_names(batches) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in batches]


def workers_of(order: DocumentOrder, num_workers: int, block_size: int) -> list[list[int]]:
    return [
        list(OrderIterator(order, worker=worker, num_workers=num_workers, block_size=block_size))
        for worker in range(num_workers)
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_store_dataset_reads_any_document(path, cases, packed):
    documents = StoreDataset(path, packed=packed)
    assert len(documents) == COUNT
    assert (documents.vocab_size, documents.tokenizer_fingerprint) == (97, "tokenizer-1")
    for index in (22, 0, 9, 13, -1):
        document = documents[index]
        assert isinstance(document.teacher, PackedLogits) == packed
        if packed:
            document = Document(document.input_ids, document.positions, decode_logits(document.teacher))
        assert_stored(document, cases[index])
    with pytest.raises(IndexError, match="holds 23"):
        documents[COUNT]
    assert names([pickle.loads(pickle.dumps(documents))[5]]) == [5]  # noqa: S301 -- our own bytes
    assert StoreDataset(Store(path)).store.num_rows == documents.store.num_rows


def test_order_is_a_permutation_that_seed_and_epoch_choose():
    def order(seed, epoch, **options):
        chosen = DocumentOrder(50, seed=seed, **options)
        chosen.set_epoch(epoch)
        return list(chosen)

    orders = {(seed, epoch): order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len({tuple(found) for found in orders.values()}) == 16
    for place, found in orders.items():
        assert sorted(found) == list(range(50))
        assert order(*place) == found
    assert order(3, 2, shuffle=False) == list(range(50))
    # Fixed for good: a run must be continued in the same order after an upgrade of numpy or torch.
    assert list(DocumentOrder(8, seed=1)) == [3, 5, 2, 7, 0, 6, 1, 4]


def test_order_has_no_favourite_places():
    """Each document is equally often in each place: a chi-squared statistic of 49 degrees of freedom."""
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        counts[np.arange(8), DocumentOrder(8, seed=5).permutation(epoch)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 95
    assert counts.min() > 0


@settings(max_examples=300, deadline=None)
@given(
    num_documents=st.integers(0, 60),
    world_size=st.integers(1, 17),
    num_workers=st.integers(1, 5),
    block_size=st.integers(1, 6),
    shuffle=st.booleans(),
    even=st.sampled_from([None, "drop", "repeat"]),
    epoch=st.integers(0, 3),
)
def test_ranks_and_workers_share_an_epoch_without_loss(
    num_documents, world_size, num_workers, block_size, shuffle, even, epoch
):
    read = Counter()
    lengths = []
    for rank in range(world_size):
        order = DocumentOrder(num_documents, shuffle=shuffle, seed=3, rank=rank, world_size=world_size, even=even)
        order.set_epoch(epoch)
        alone = list(order)
        parts = workers_of(order, num_workers, block_size)
        assert len(order) == len(alone) == sum(map(len, parts))
        # Taken from the workers in turn, block by block, the documents come as without workers.
        blocks = [[part[i : i + block_size] for i in range(0, len(part), block_size)] for part in parts]
        turns = [blocks[turn % num_workers][turn // num_workers] for turn in range(sum(map(len, blocks)))]
        assert [index for block in turns for index in block] == alone
        lengths.append(len(alone))
        read.update(alone)
    assert max(lengths) - min(lengths) <= (0 if even else 1)
    if even is None:
        assert read == Counter(range(num_documents))
    elif even == "drop":
        assert set(read.values()) <= {1}
        assert num_documents - len(read) == num_documents % world_size
    else:
        assert set(read) == set(range(num_documents))
        assert read.total() == -(-num_documents // world_size) * world_size


@settings(max_examples=200, deadline=None)
@given(
    num_documents=st.integers(1, 60),
    world_size=st.integers(1, 5),
    new_world_size=st.integers(1, 5),
    rounds=st.integers(0, 12),
    even=st.sampled_from([None, "drop", "repeat"]),
)
def test_stopped_epoch_goes_on_with_any_number_of_ranks(num_documents, world_size, new_world_size, rounds, even):
    """What all ranks together read before and after is the epoch, in its order."""
    before = [DocumentOrder(num_documents, seed=9, rank=r, world_size=world_size) for r in range(world_size)]
    for order in before:
        order.set_epoch(2)
    whole = [int(index) for index in before[0].permutation(2)]
    done = min(rounds * world_size, num_documents)
    state = before[0].state_dict(documents_read=rounds)
    after = []
    for rank in range(new_world_size):
        order = DocumentOrder(num_documents, seed=9, rank=rank, world_size=new_world_size, even=even)
        order.load_state_dict(pickle.loads(pickle.dumps(state)))  # noqa: S301 -- our own bytes
        # The loop of the run sets the epoch that it continues.
        order.set_epoch(2)
        after.append(list(order))
        assert len(order) == len(after[-1])
        order.set_epoch(3)
        assert len(order) == num_documents // new_world_size + (rank < num_documents % new_world_size) or even
    rest = [row[i] for i in range(max(map(len, after))) for row in after if i < len(row)]
    expected = whole[done:]
    if even == "drop":
        expected = expected[: len(expected) // new_world_size * new_world_size]
    elif even == "repeat" and expected:
        expected = (expected + whole * new_world_size)[: -(-len(expected) // new_world_size) * new_world_size]
    assert rest == expected


@pytest.mark.parametrize("stop", [0, 1, 4, 11, 23])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_each_worker_continues_where_it_was(stop, num_workers):
    order = DocumentOrder(COUNT, seed=2)
    for worker in range(num_workers):
        place = {"worker": worker, "num_workers": num_workers, "block_size": 2}
        whole = list(OrderIterator(order, **place))
        iterator = OrderIterator(order, **place)
        read = list(itertools.islice(iterator, stop))
        state = iterator.state_dict()
        fresh = OrderIterator(DocumentOrder(COUNT, seed=2), **place)
        fresh.load_state_dict(state)
        assert read + list(fresh) == whole


def test_states_of_something_else_are_refused():
    state = DocumentOrder(10, seed=1).state_dict()
    for order, message in (
        (DocumentOrder(11, seed=1), "num_documents=10 there, 11 here"),
        (DocumentOrder(10, seed=2), "seed=1 there, 2 here"),
        (DocumentOrder(10, seed=1, shuffle=False), "shuffle=True there, False here"),
    ):
        with pytest.raises(ValueError, match=message):
            order.load_state_dict(state)
    order = DocumentOrder(10, seed=1)
    of_a_worker = OrderIterator(order, worker=1, num_workers=2).state_dict()
    with pytest.raises(ValueError, match="worker 1 of 2"):
        order.load_state_dict(of_a_worker)
    for place in ({}, {"num_workers": 2}, {"worker": 1, "num_workers": 2, "block_size": 3}):
        with pytest.raises(ValueError, match="keep the number of ranks and workers"):
            OrderIterator(order, **place).load_state_dict(of_a_worker)
    alone = OrderIterator(order)
    first = next(alone)
    order.load_state_dict(alone.state_dict())
    assert [first, *order] == list(DocumentOrder(10, seed=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 1}, "given together"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in \[0, 1\], got 2"),
        ({"rank": 0, "world_size": 0}, "world_size must lie in"),
        ({"seed": -1}, "seed must lie in"),
        ({"even": "pad"}, "even must be None or one of"),
    ],
)
def test_order_refuses_bad_arguments(options, message, path):
    with pytest.raises(ValueError, match=message):
        DocumentOrder(5, **options)
    with pytest.raises(ValueError, match=message):
        StoreIterableDataset(path, **options)
    with pytest.raises(ValueError, match="epoch must not be negative"):
        DocumentOrder(5).set_epoch(-1)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        StoreIterableDataset(path, batch_size=0)


def test_damage_is_named_across_workers(path, cases, tmp_path):
    write_store(tmp_path, [cases[:4]])
    shard = tmp_path / "shard-000000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    loader = DataLoader(StoreIterableDataset(tmp_path, shuffle=False), batch_size=None, num_workers=2)
    with pytest.raises(errors.RowChecksumError, match=r"shard-000000\.safetensors, document 3"):
        list(loader)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # more than some machines have
@pytest.mark.parametrize(("num_workers", "context"), [(0, None), (2, "spawn"), (3, "fork")])
def test_batches_do_not_depend_on_the_workers(path, num_workers, context):
    options = {"num_workers": num_workers, "multiprocessing_context": context, "collate_fn": collate_documents}
    read = []
    for rank in range(2):
        place = {"seed": 4, "rank": rank, "world_size": 2}
        stream = StoreIterableDataset(path, batch_size=3, **place)
        stream.set_epoch(1)
        order = DocumentOrder(COUNT, **place)
        order.set_epoch(1)
        loader = DataLoader(stream, batch_size=3, **options)
        batches = list(loader)
        expected = [list(order)[i : i + 3] for i in range(0, len(order), 3)]
        assert batch_names(batches) == expected
        assert len(loader) == len(expected)
        assert batch_names(DataLoader(StoreDataset(path), batch_size=3, sampler=order, **options)) == expected
        read += [index for batch in expected for index in batch]
        # Started from where the loop had used two batches, with another number of workers.
        state = stream.state_dict(documents_read=6)
        fresh = StoreIterableDataset(path, batch_size=3, **place)
        fresh.load_state_dict(state)
        fresh.set_epoch(1)
        assert batch_names(DataLoader(fresh, batch_size=3, collate_fn=collate_documents)) == expected[2:]
    assert sorted(read) == list(range(COUNT))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_that_are_kept_see_the_next_epoch(path, context):
    stream = StoreIterableDataset(path, batch_size=4, seed=6)
    loader = DataLoader(
        stream,
        batch_size=4,
        num_workers=2,
        multiprocessing_context=context,
        persistent_workers=True,
        collate_fn=collate_documents,
    )
    for epoch in range(3):
        stream.set_epoch(epoch)
        order = DocumentOrder(COUNT, seed=6)
        order.set_epoch(epoch)
        assert [name for batch in batch_names(loader) for name in batch] == list(order)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["stream", "by index"])
def test_stateful_data_loader_resumes(path, num_workers, kind):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")

    def make():
        options = {"batch_size": 3, "num_workers": num_workers, "collate_fn": collate_documents}
        if kind == "stream":
            stream = StoreIterableDataset(path, batch_size=3, seed=8)
            return stream, stateful.StatefulDataLoader(stream, **options)
        order = DocumentOrder(COUNT, seed=8)
        return order, stateful.StatefulDataLoader(StoreDataset(path), sampler=order, **options)

    owner, loader = make()
    owner.set_epoch(5)
    whole = batch_names(loader)
    for stop in (1, 2, 5):
        owner, loader = make()
        owner.set_epoch(5)
        iterator = iter(loader)
        read = batch_names(next(iterator) for _ in range(stop))
        state = pickle.loads(pickle.dumps(loader.state_dict()))  # noqa: S301 -- our own bytes
        owner, loader = make()
        loader.load_state_dict(state)
        assert read + batch_names(loader) == whole
        # And the epoch after it is whole.
        owner.set_epoch(6)
        assert sorted(name for batch in batch_names(loader) for name in batch) == list(range(COUNT))


RANKS = """
import json, pathlib, sys
import torch
from slimkernels.store import StoreIterableDataset
torch.distributed.init_process_group("gloo")
stream = StoreIterableDataset(sys.argv[1], seed=3)
read = [int(document.input_ids[0]) for document in stream]
pathlib.Path(sys.argv[2], f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(read))
torch.distributed.destroy_process_group()
"""


def test_ranks_come_from_torch_distributed(path, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    arguments = [str(path), str(tmp_path)]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    parts = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert sorted(map(len, parts)) == [11, 12]
    assert sorted(parts[0] + parts[1]) == list(range(COUNT))


def test_collate_documents_points_each_row_at_the_label_before(path):
    documents = [StoreDataset(path, packed=False)[index] for index in (1, 2)]
    packed = [StoreDataset(path)[index] for index in (1, 2)]
    batch, packed_batch = collate_documents(documents, pad_token_id=96), collate_documents(packed, pad_token_id=96)
    length = max(len(document.input_ids) for document in documents)
    for name in ("input_ids", "attention_mask", "rows", "target"):
        assert torch.equal(batch[name], packed_batch[name])
    labels = [(r, int(p)) for r, document in enumerate(documents) for p in document.positions]
    assert batch["rows"].tolist() == [r * length + p - 1 for r, p in labels]
    assert batch["target"].tolist() == [int(documents[r].input_ids[p]) for r, p in labels]
    for r, document in enumerate(documents):
        size = len(document.input_ids)
        assert batch["input_ids"][r].tolist() == document.input_ids.tolist() + [96] * (length - size)
        assert batch["attention_mask"][r].tolist() == [1] * size + [0] * (length - size)
    decoded = decode_logits(packed_batch["teacher"])
    assert torch.equal(decoded.ids, batch["teacher"].ids)
    assert torch.equal(decoded.logits, batch["teacher"].logits)
    assert collate_documents(documents, with_teacher=False)["teacher"] is None
    with pytest.raises(ValueError, match="at least one document"):
        collate_documents([])
    with pytest.raises(ValueError, match=r"positions must lie in \[1, "):
        collate_documents([dataclasses.replace(documents[0], positions=torch.tensor([0]))])


def test_store_dataset_example_in_the_docstring():
    assert doctest.testmod(dataset).failed == 0


@pytest.mark.parametrize("kind", ["store", "dataset", "stream"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_without_a_collate_function_makes_batches(tmp_path, generator, kind, num_workers) -> None:
    write_store(tmp_path, [[random_case(9 + i, 4, generator) for i in range(5)]])
    data = {
        "store": Store(tmp_path),
        "dataset": StoreDataset(tmp_path),
        "stream": StoreIterableDataset(tmp_path, shuffle=False, batch_size=2),
    }[kind]
    documents = list(Store(tmp_path)) if kind == "store" else [StoreDataset(tmp_path)[i] for i in range(5)]
    batches = list(DataLoader(data, batch_size=2, num_workers=num_workers))
    assert len(batches) == 3
    for batch, first in zip(batches, (0, 2, 4), strict=True):
        expected = collate_documents(documents[first : first + 2])
        assert batch.keys() == expected.keys()
        for name in ("input_ids", "attention_mask", "rows", "target", "prompt_lengths"):
            assert torch.equal(batch[name], expected[name])
        assert type(batch["teacher"]) is type(expected["teacher"])
        assert torch.equal(batch["teacher"].lse, expected["teacher"].lse)


def test_a_batch_is_one_that_accelerate_handles(tmp_path, generator) -> None:
    accelerate = pytest.importorskip("accelerate")
    write_store(tmp_path, [[random_case(9 + i, 4, generator) for i in range(3)]])
    batch = collate_documents([StoreDataset(tmp_path)[i] for i in range(3)])
    assert accelerate.utils.find_batch_size(batch) == 3
    moved = accelerate.utils.send_to_device(batch, "meta")
    assert moved["teacher"].device.type == moved["input_ids"].device.type == "meta"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["dataset", "stream"])
def test_a_loader_that_accelerate_prepared_gives_the_same_batches(kind, packed, tmp_path, generator, request) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    request.addfinalizer(lambda: accelerate.state.AcceleratorState._reset_state(reset_partial_state=True))
    write_store(tmp_path, [[random_case(9 + i, 4, generator) for i in range(5)]])
    data = StoreDataset(tmp_path, packed=packed)
    if kind != "dataset":
        data = StoreIterableDataset(tmp_path, packed=packed, shuffle=False, batch_size=2, rank=0, world_size=1)
    options = accelerate.utils.DataLoaderConfiguration(dispatch_batches=False)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=options)
    loader = DataLoader(data, batch_size=2, collate_fn=collate_documents)
    for one, other in zip(accelerator.prepare(loader), loader, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one if name != "teacher")
        assert type(one["teacher"]) is (PackedLogits if packed else SparseLogits)
        assert torch.equal(one["teacher"].lse, other["teacher"].lse)
    # What accelerate does with a stream by default cuts the labels like the documents.
    cutting = accelerate.data_loader.prepare_data_loader(
        loader, torch.device("cpu"), dispatch_batches=True, put_on_device=True
    )
    with pytest.raises(ValueError, match=r"1 in rows, 1 in target, 8 in teacher: .* set dispatch_batches=False"):
        next(iter(cutting))


def test_a_stream_that_accelerate_splits_is_read_once(tmp_path, generator) -> None:
    accelerate = pytest.importorskip("accelerate")
    cases = [random_case(9 + i, 4, generator) for i in range(8)]
    write_store(tmp_path, [cases])
    stream = StoreIterableDataset(tmp_path, shuffle=False, rank=0, world_size=1)
    shards = [
        accelerate.data_loader.IterableDatasetShard(stream, batch_size=2, num_processes=2, process_index=index)
        for index in range(2)
    ]
    order = accelerate.data_loader.BatchSamplerShard(
        BatchSampler(DocumentOrder(8, rank=0, world_size=1), 2, drop_last=False), num_processes=2, process_index=1
    )
    read = [len(document.input_ids) for shard in shards for document in shard]
    assert sorted(read) == sorted(len(case.input_ids) for case in cases)
    assert len({number for batch in order for number in batch}) == 4


def test_records_of_several_processes_are_refused_by_accelerate_or_joined_as_objects(tmp_path, generator) -> None:
    accelerate = pytest.importorskip("accelerate")
    write_store(tmp_path, [[random_case(9 + i, 4, generator) for i in range(4)]])
    documents = Store(tmp_path)[:]
    batches = [collate_documents(documents[:2]), collate_documents(documents[2:])]
    # A dispatcher joins the batches of all processes first. Only tensors can be joined in its way.
    for refused in (
        lambda: accelerate.utils.concatenate([batch["teacher"] for batch in batches]),
        lambda: accelerate.utils.pad_across_processes(batches[0]),
    ):
        with pytest.raises(TypeError, match="SparseLogits"):
            refused()
    sent = [pickle.loads(pickle.dumps(batch["teacher"])) for batch in batches]  # noqa: S301 -- as gather_object does
    joined, expected = SparseLogits.cat(sent), collate_documents(documents)["teacher"]
    for name in ("ids", "logits", "lse", "target_logit"):
        assert torch.equal(getattr(joined, name), getattr(expected, name))


def test_prompt_lengths_of_a_batch_are_the_stored_ones_or_those_before_the_first_label(tmp_path, generator) -> None:
    known, unknown, unlabelled = (random_case(length, rows, generator) for length, rows in ((9, 4), (8, 3), (7, 0)))
    with StoreWriter(tmp_path, **SETTINGS) as writer:
        writer.add(*known, prompt_length=6)
        writer.add(*unknown)
        writer.add(*unlabelled)
    batch = collate_documents(list(Store(tmp_path)))
    assert batch["prompt_lengths"].tolist() == [6, int(unknown.positions[0]), 7]
