"""Several stores as one data set: which store a document is read from, mixed rows, and shares of an epoch."""

from __future__ import annotations

import collections
import copy
import dataclasses
import doctest
import itertools
import json
import logging

import numpy as np
import pytest
import torch
from support.helpers import assert_same_bits, sparse_fields
from support.store_cases import SETTINGS, random_teacher
from torch.utils.data import DataLoader

from slimkernels import SparseLogits
from slimkernels.packed_logits import PackedLogits
from slimkernels.store import MixedStores, ShareOrder, Store, StoreWriter, collate_documents, shares
from slimkernels.store.errors import SettingsMismatchError

# Documents by a name: the first token of each.
DOCUMENTS = {name: torch.tensor([token, 7, 8, 9, 10]) for token, name in enumerate("abcdefgh", 20)}


def write(path, names: str, *, seed: int = 0, positions=(2, 3, 4), **settings) -> Store:
    generator = torch.Generator().manual_seed(seed)
    with StoreWriter(path, **SETTINGS | {"codec": "float32"} | settings) as writer:
        for name in names:
            teacher = random_teacher(len(positions), 97, 6, generator, ragged=True)
            writer.add(DOCUMENTS[name], positions, teacher)
    return Store(path)


def names_of(dataset, indices) -> str:
    token = {int(ids[0]): name for name, ids in DOCUMENTS.items()}
    return "".join(token[int(dataset[index].input_ids[0])] for index in indices)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Store:
    return write(tmp_path_factory.mktemp("one"), "abcde", seed=1)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Store:
    return write(tmp_path_factory.mktemp("other"), "edf", seed=2)


def assert_same_document(found, expected) -> None:
    assert torch.equal(found.input_ids, expected.input_ids)
    assert torch.equal(found.positions, expected.positions)
    fields = (vars(found.teacher), vars(expected.teacher))
    for name, field in fields[1].items():
        assert torch.equal(fields[0][name], field) if isinstance(field, torch.Tensor) else fields[0][name] == field


def test_a_document_is_read_from_the_first_store_that_holds_it(one, other, caplog):
    with caplog.at_level(logging.WARNING):
        mixed = MixedStores([one, str(other.path)])
    assert "2 of 6 documents are in several stores, and are read from the first that holds them" in caplog.text
    assert names_of(mixed, range(len(mixed))) == "abcdef"
    for index in range(5):
        assert_same_document(mixed[index], one.packed(index))
    assert_same_document(mixed[5], other.packed(2))
    assert isinstance(mixed[5].teacher, PackedLogits)
    assert (mixed.find(DOCUMENTS["f"]), mixed.find(DOCUMENTS["g"])) == (5, None)
    assert sorted(mixed.order(seed=3, rank=0, world_size=1)) == list(range(6))


def test_stores_of_different_codecs_are_decoded(one, tmp_path):
    mixed = MixedStores([one, write(tmp_path, "gh", codec="affine8")])
    batch = next(iter(DataLoader(mixed, 7, collate_fn=collate_documents)))
    assert isinstance(batch["teacher"], SparseLogits)
    assert len(batch["teacher"]) == 7 * 3


@pytest.mark.parametrize("scale", [1, 1e-300, 5e307])
def test_rows_of_a_document_in_several_stores_are_mixed(one, other, scale):
    mixed = MixedStores([one, other], weights=[3 * scale, scale])
    for index, name in enumerate("abcdef"):
        holders = [
            (store[store.find(DOCUMENTS[name])].teacher, weight)
            for store, weight in ((one, 0.75), (other, 0.25))
            if DOCUMENTS[name] in store
        ]
        parts, weights = zip(*holders, strict=True)
        expected = SparseLogits.mix(parts, weights if len(parts) == 2 else [1.0])
        found = mixed[index].teacher
        width = int((expected.ids >= 0).sum(-1).max())
        assert found.top_k == width
        cut = dataclasses.replace(expected, ids=expected.ids[:, :width], logits=expected.logits[:, :width])
        assert_same_bits(sparse_fields(found), sparse_fields(cut))
        assert (found.temperatures, len(found)) == ((1.0,), 3)
    batch = next(iter(DataLoader(copy.deepcopy(mixed), 6, collate_fn=collate_documents)))
    assert len(batch["teacher"]) == len(batch["target"]) == 18
    batch["teacher"].validate(97)


def test_a_row_that_one_store_lacks_is_the_other_ones(one, tmp_path):
    late = write(tmp_path / "late", "ab", seed=5, positions=(1, 4))
    none = write(tmp_path / "none", "bg", seed=6, positions=())
    mixed = MixedStores([one, late, none], weights=[1, 3, 2])
    document = mixed[0]
    assert document.positions.tolist() == [1, 2, 3, 4]
    alone = [SparseLogits.mix([store[0].teacher], [1.0]) for store in (one, late)]
    for row, expected in ((1, alone[0][0:1]), (2, alone[0][1:2]), (0, alone[1][0:1])):
        kept = int((expected.ids >= 0).sum())
        assert torch.equal(document.teacher.ids[row, :kept], expected.ids[0, :kept])
        assert (document.teacher.ids[row, kept:] == -1).all()
        torch.testing.assert_close(document.teacher.logits[row, :kept], expected.logits[0, :kept])
    both = SparseLogits.mix([one[0].teacher[2:3], late[0].teacher[1:2]], [0.25, 0.75])
    torch.testing.assert_close(document.teacher.rest_lse[3], both.rest_lse[0])
    without = mixed[mixed.find(DOCUMENTS["g"])]
    assert (len(without.positions), len(without.teacher)) == (0, 0)
    assert len(collate_documents([without, document])["teacher"]) == 4


def test_shares_hold_in_every_epoch_and_a_store_goes_on_where_it_stopped(one, tmp_path):
    mixed = MixedStores([one, write(tmp_path, "fgh")], shares=[3, 1])
    order = mixed.order(seed=11, rank=0, world_size=1)
    read = ""
    for epoch in range(20):
        order.set_epoch(epoch)
        part = names_of(mixed, order)
        assert len(part) == len(mixed) == len(order) == 8
        assert sum(name in "abcde" for name in part) == 6
        read += part
        # Within each store all documents are read equally often, to one.
        for names in ("abcde", "fgh"):
            times = [read.count(name) for name in names]
            assert max(times) - min(times) <= 1
    assert len({read[8 * epoch :][:8] for epoch in range(20)}) > 15
    again = mixed.order(seed=11, rank=0, world_size=1)
    again.set_epoch(7)
    assert names_of(mixed, again) == read[56:64]
    assert names_of(mixed, mixed.order(seed=12, rank=0, world_size=1)) != read[:8]


def test_only_the_proportions_of_shares_count():
    stores = [np.arange(5), np.arange(5, 8)]
    counts = [ShareOrder(stores, [3 * scale, scale], num_documents=8).counts for scale in (1, 1e-300, 5e307)]
    assert counts == [[6, 2]] * 3


def test_shares_are_split_by_rank_and_resumed():
    options = {"num_documents": 23, "seed": 5}
    stores = [np.arange(20), np.arange(20, 23)]
    whole = list(ShareOrder(stores, [1, 1], rank=0, world_size=1, **options))
    assert [sum(index >= 20 for index in whole), len(whole)] == [11, 23]
    ranks = [list(ShareOrder(stores, [1, 1], rank=rank, world_size=2, **options)) for rank in range(2)]
    assert [len(part) for part in ranks] == [12, 11]
    assert [index for pair in itertools.zip_longest(*ranks) for index in pair][:23] == whole
    for stop in (0, 9, 22):
        stopped = ShareOrder(stores, [1, 1], rank=0, world_size=1, **options)
        reading = iter(stopped)
        first = [next(reading) for _ in range(stop)]
        state = json.loads(json.dumps(reading.state_dict()))
        resumed = ShareOrder(stores, [1, 1], rank=0, world_size=1, **options)
        resumed.load_state_dict(state)
        assert first + list(resumed) == whole
    with pytest.raises(ValueError, match=r"shares=\[1.0, 1.0\] there, \[2.0, 1.0\] here"):
        ShareOrder(stores, [2, 1], rank=0, world_size=1, **options).load_state_dict(state)
    with pytest.raises(ValueError, match=r"store_sizes=\[20, 3\] there, \[19, 3\] here"):
        ShareOrder([stores[0][1:], stores[1]], [1, 1], rank=0, world_size=1, **options).load_state_dict(state)


@pytest.mark.parametrize(
    ("given", "counts"), [((1, 1, 1), [4, 3, 3]), ((2, 1, 0.34), [6, 3, 1]), ((7, 2, 1), [7, 2, 1])]
)
def test_counts_of_an_epoch_are_those_of_the_shares(given, counts):
    order = ShareOrder([[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]], given, num_documents=10, rank=0, world_size=1)
    assert order.counts == counts
    store_of = [min((index - 1) // 3, 2) if index else 0 for index in order]
    assert [collections.Counter(store_of)[number] for number in range(3)] == counts


def test_the_example_of_shares():
    assert doctest.testmod(shares) == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stores": []}, "stores must be a list of at least one store"),
        ({"stores": "runs/one"}, "stores must be a list of at least one store, got 'runs/one'"),
        ({"weights": [1.0]}, "weights must be as many as the stores, 2, got 1"),
        ({"weights": [1.0, 0.0]}, "weights must be positive and finite, got 0.0"),
        ({"shares": [1.0, float("inf")]}, "shares must be positive and finite, got inf"),
        (
            {"shares": [1000, 1]},
            r"shares must give each store a document of the 6 .* store 1 with 3 documents, 0 of them",
        ),
    ],
)
def test_a_mixture_refuses(one, other, arguments, message):
    with pytest.raises(ValueError, match=message):
        MixedStores(**{"stores": [one, other]} | arguments)


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"tokenizer_fingerprint": "tokenizer-2"}, "tokenizer_fingerprint"), ({"vocab_size": 98}, "vocab_size")],
)
def test_stores_of_another_vocabulary_or_tokenizer_are_refused(one, tmp_path, settings, name):
    with StoreWriter(tmp_path, **SETTINGS | settings) as writer:
        vocab_size = settings.get("vocab_size", 97)
        teacher = random_teacher(1, vocab_size, 6, torch.Generator().manual_seed(0))
        writer.add(DOCUMENTS["h"], [1], teacher)
    with pytest.raises(
        SettingsMismatchError, match=f"must have one {name}, got .* in .* and .*: capture them with one"
    ):
        MixedStores([one, tmp_path])
