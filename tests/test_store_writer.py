"""``StoreWriter``: what it takes up again, what it refuses, and which entries it leaves out."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.store_cases import SETTINGS, assert_stored, random_case, write_store

from slimkernels import SparseLogits
from slimkernels.store import Store, StoreWriter, errors, verify, writer


def test_store_writer_resumes(tmp_path, generator):
    cases = [random_case(8, 3, generator) for _ in range(4)]
    write_store(tmp_path, [cases[:1], cases[1:2]])
    before = {path.name: path.read_bytes() for path in tmp_path.glob("shard-*")}
    with StoreWriter(tmp_path, **SETTINGS) as store_writer:
        assert len(store_writer) == 2
        assert cases[0].input_ids in store_writer
        assert cases[2].input_ids not in store_writer
        for case in cases:
            if case.input_ids not in store_writer:
                store_writer.add(*case)
        assert cases[3].input_ids in store_writer
        assert len(store_writer) == 4
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    for document, case in zip(Store(tmp_path), cases, strict=True):
        assert_stored(document, case)
    verify(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 98),
        ("tokenizer_fingerprint", "tokenizer-2"),
        ("teacher", {"name": "another"}),
        ("selection", {"kind": "top_k", "value": 7, "top_k": 7}),
        ("temperatures", (1.0,)),
        ("codec", "float32"),
    ],
)
def test_store_writer_refuses_other_settings(tmp_path, generator, name, value):
    write_store(tmp_path, [[random_case(8, 3, generator)]])
    with pytest.raises(errors.SettingsMismatchError, match=f"{name}=.*but {name}="):
        StoreWriter(tmp_path, **SETTINGS | {name: value})
    # The failed writer must not hold the lock.
    StoreWriter(tmp_path, **SETTINGS).close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", 2**31),
        ("vocab_size", True),
        ("vocab_size", "97"),
        ("tokenizer_fingerprint", None),
        ("teacher", "gpt"),
        ("teacher", {"dtype": torch.bfloat16}),
        ("teacher", {"loss": math.nan}),
        ("selection", [1]),
        ("temperatures", (2.0,)),
        ("temperatures", ()),
        ("temperatures", (1.0, -1.0)),
        ("temperatures", (1.0, math.inf)),
        ("temperatures", (1.0, "two")),
        ("codec", "int4"),
        ("shard_rows", 0),
        ("shard_rows", 1.5),
    ],
)
def test_store_writer_refuses_bad_settings(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        StoreWriter(tmp_path / "store", **SETTINGS | {name: value})
    assert not (tmp_path / "store").exists()


def test_store_writer_refuses_a_document_twice(tmp_path, generator):
    cases = [random_case(8, 3, generator) for _ in range(2)]
    write_store(tmp_path, [cases[:1]])
    with StoreWriter(tmp_path, **SETTINGS) as store_writer:
        store_writer.add(*cases[1])
        for case in cases:
            with pytest.raises(errors.DuplicateDocumentError, match="in the store already"):
                store_writer.add(*case)
    assert len(Store(tmp_path)) == 2
    verify(tmp_path)


def test_store_writer_refuses_bad_documents_and_goes_on(tmp_path, generator):
    good = random_case(8, 3, generator)
    ids, positions, teacher = good
    broken_ids = teacher.ids.clone()
    broken_ids[1, 0] = 97
    broken_logits = teacher.logits.clone()
    broken_logits[2, 0] = -math.inf
    bad = [
        ((ids.float(), positions, teacher), "input_ids"),
        ((ids[None], positions, teacher), "input_ids"),
        (([], [], teacher[:0]), "input_ids"),
        ((ids + 97, positions, teacher), r"input_ids must lie in \[0, 97\)"),
        ((ids - 97, positions, teacher), r"input_ids must lie in \[0, 97\)"),
        ((ids, positions.flip(0), teacher), "positions"),
        ((ids, torch.tensor([1, 1, 2]), teacher), "positions"),
        ((ids, torch.tensor([0, 1, 2]), teacher), "positions"),
        ((ids, torch.tensor([1, 2, 8]), teacher), "positions"),
        ((ids, positions.float(), teacher), "positions"),
        ((ids, positions[:2], teacher), "a row for each of 2 positions"),
        ((ids, positions, teacher.reshape(3, 1)), "a row for each of 3 positions"),
        ((ids, positions, dataclasses.replace(teacher, temperatures=(1.0, 3.0))), "temperatures"),
        ((ids, positions, dataclasses.replace(teacher, ids=broken_ids)), "row 1 .* outside|row 1 .* ascending"),
        ((ids, positions, dataclasses.replace(teacher, ids=teacher.ids.flip(-1))), "row 0 .* ascending"),
        ((ids, positions, dataclasses.replace(teacher, logits=broken_logits)), "row 2 .* infinite"),
        ((ids, positions, dataclasses.replace(teacher, lse=teacher.lse - 9)), "row 0 .* more probability"),
    ]
    with StoreWriter(tmp_path, **SETTINGS) as store_writer:
        for arguments, message in bad:
            with pytest.raises(ValueError, match=message):
                store_writer.add(*arguments)
        assert len(store_writer) == 0
        store_writer.add(*good)
    assert_stored(Store(tmp_path)[0], good)


def test_store_writer_closed(tmp_path, generator):
    store_writer = StoreWriter(tmp_path, **SETTINGS)
    store_writer.close()
    store_writer.close()
    with pytest.raises(ValueError, match="closed"):
        store_writer.add(*random_case(8, 3, generator))
    with pytest.raises(ValueError, match="closed"):
        store_writer.flush()


def test_store_writer_keeps_whole_documents_when_an_exception_leaves_the_block(tmp_path, generator):
    case = random_case(8, 3, generator)

    def capture() -> None:
        with StoreWriter(tmp_path, **SETTINGS) as store_writer:
            store_writer.add(*case)
            raise RuntimeError("the teacher broke")

    with pytest.raises(RuntimeError, match="the teacher broke"):
        capture()
    assert_stored(Store(tmp_path)[0], case)


def test_store_writer_flushes_full_shards(tmp_path, generator, monkeypatch):
    cases = [random_case(8, 3, generator) for _ in range(7)]
    with StoreWriter(tmp_path / "rows", **SETTINGS, shard_rows=6) as store_writer:
        for case in cases:
            store_writer.add(*case)
        assert len(Store(tmp_path / "rows")) == 6
    assert [entry.rows for entry in Store(tmp_path / "rows").shards] == [6, 6, 6, 3]
    monkeypatch.setattr(writer, "_SHARD_BYTES", 400)
    with StoreWriter(tmp_path / "bytes", **SETTINGS) as store_writer:
        for case in cases:
            store_writer.add(*case)
    sizes = [entry.rows for entry in Store(tmp_path / "bytes").shards]
    assert len(sizes) > 1
    assert sizes[0] == max(sizes)
    assert len(Store(tmp_path / "bytes")) == 7
    verify(tmp_path / "bytes")


@pytest.mark.parametrize("codec", ["affine8", "affine6"])
@pytest.mark.parametrize("far", [-9999.0, -100.0, -3e38])
def test_entries_far_below_a_rows_maximum_do_not_coarsen_the_others(tmp_path, codec, far) -> None:
    """A placeholder for -inf, or the value at which a server clips, once took the whole range of the 8 bits."""
    likely = torch.tensor([0.5, 0.25, 0.125, 0.0625]).log()
    ids = torch.tensor([[1, 2, 5, 7, 8], [1, 2, 5, 7, 8]], dtype=torch.int32)
    logits = torch.stack([torch.cat([likely[:2], torch.tensor([far]), likely[2:]]), torch.arange(5.0).log_softmax(-1)])
    for name, tops in (("both", slice(None)), ("far", slice(1))):
        teacher = SparseLogits(ids[tops], logits[tops], torch.zeros(len(ids[tops]), 1))
        rows = {"temperatures": (1.0,), "codec": codec}
        with StoreWriter(tmp_path / name, **SETTINGS | rows) as writer:
            writer.add([3, 4, 5], torch.arange(1, 1 + len(teacher)), teacher)
        verify(tmp_path / name)
        stored = Store(tmp_path / name)[0].teacher
        assert [i for i in stored.ids[0].tolist() if i >= 0] == [1, 2, 7, 8]
        assert stored.logits[0, :4].exp().tolist() == pytest.approx(likely.exp().tolist(), rel=0.02)
        if name == "both":
            assert stored.ids[1].tolist() == [1, 2, 5, 7, 8]


def test_entries_far_below_a_rows_maximum_stay_where_they_harm_nothing(tmp_path) -> None:
    teacher = SparseLogits(torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([[-0.5, -200.0]]), torch.zeros(1, 1))
    for codec, kept in (("float32", [1, 2]), ("bfloat16", [1, 2]), ("affine8", [1])):
        with StoreWriter(tmp_path / codec, **SETTINGS | {"temperatures": (1.0,), "codec": codec}) as writer:
            writer.add([3, 2], [1], teacher)
        document = Store(tmp_path / codec)[0]
        assert document.teacher.ids[0].tolist() == kept
        # The label's logit is that of the entry as it came.
        assert document.teacher.target_logit.tolist() == [-200.0]
    # At temperature 8 the same entry has a probability of exp(-25).
    wide = SparseLogits(teacher.ids, teacher.logits, torch.zeros(1, 2), temperatures=(1.0, 8.0))
    with StoreWriter(tmp_path / "wide", **SETTINGS | {"temperatures": (1.0, 8.0)}) as writer:
        writer.add([3, 2], [1], wide)
    assert Store(tmp_path / "wide")[0].teacher.ids[0].tolist() == [1, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_entries_far_below_a_rows_maximum_hide_no_bad_one(tmp_path, bad) -> None:
    teacher = SparseLogits(
        torch.tensor([[1, 2, 3]], dtype=torch.int32),
        torch.tensor([[-0.5, bad, -200.0]]),
        torch.zeros(1, 1),
        target_logit=torch.zeros(1),
    )
    with (
        StoreWriter(tmp_path, **SETTINGS | {"temperatures": (1.0,)}) as writer,
        pytest.raises(ValueError, match="keeps a logit that is NaN or infinite"),
    ):
        writer.add([3, 2], [1], teacher)
