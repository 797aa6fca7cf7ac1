"""The store as its users see it: what is added comes back, at the promised size, also after a restart."""

from __future__ import annotations

import dataclasses
import doctest
import json
import math
import pickle

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import store_oracle as oracle
from support.store_cases import SETTINGS, Case, assert_stored, random_case, random_teacher, write_store
from torch.utils.data import DataLoader

import slimkernels.store
from slimkernels import SparseLogits, decode_logits
from slimkernels.store import Store, StoreWriter, errors, info, verify, writer
from slimkernels.store.format import (
    ShardEntry,
    StoreSettings,
    manifest_content,
    seal_manifest,
    shard_layout,
    shard_name,
)

CODECS = ("affine8", "affine6", "bfloat16", "float32")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("ragged", [False, True])
def test_store_round_trip(tmp_path, generator, codec, ragged):
    cases = [random_case(9 + i, 4 + i, generator, ragged=ragged) for i in range(5)]
    write_store(tmp_path / "store", [cases[:2], cases[2:]], codec=codec)
    store = Store(tmp_path / "store")
    assert len(store) == 5
    assert store.num_rows == sum(len(case.positions) for case in cases)
    assert (store.vocab_size, store.tokenizer_fingerprint, store.temperatures) == (97, "tokenizer-1", (1.0, 2.0))
    assert [entry.top_k for entry in store.shards] == ([None, None] if ragged else [6, 6])
    documents = oracle.read_store(tmp_path / "store")
    for i, (document, case) in enumerate(zip(store, cases, strict=True)):
        assert document.input_ids.dtype == document.positions.dtype == torch.int64
        assert document.teacher.ids.dtype == torch.int32
        assert {document.teacher.logits.dtype, document.teacher.lse.dtype, document.teacher.target_logit.dtype} == {
            torch.float32
        }
        assert_stored(document, case, codec)
        document.teacher.validate(97)
        input_ids, rows = documents[i]
        assert input_ids.tolist() == document.input_ids.tolist()
        for r, row in enumerate(rows):
            count = len(row.ids)
            assert row.position == document.positions[r]
            assert row.ids.tolist() == document.teacher.ids[r, :count].tolist()
            assert row.logits.tobytes() == document.teacher.logits[r, :count].numpy().tobytes()
            assert row.target_logit == document.teacher.target_logit[r]
    verify(tmp_path / "store")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_store_round_trip_of_any_documents(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("store")
    vocab_size = data.draw(st.integers(2, 400))
    codec = data.draw(st.sampled_from(CODECS))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    lengths = data.draw(st.lists(st.integers(1, 6), max_size=5))
    top_k = data.draw(st.integers(1, min(vocab_size, 40)))
    cases = []
    for i, num_tokens in enumerate(lengths):
        case = random_case(
            num_tokens + i * 6,
            data.draw(st.integers(0, num_tokens + i * 6 - 1)),
            generator,
            vocab_size=vocab_size,
            top_k=top_k,
            ragged=data.draw(st.booleans()),
            spread=data.draw(st.sampled_from([0.1, 5.0])),
        )
        if not any(torch.equal(case.input_ids, other.input_ids) for other in cases):
            cases.append(case)
    split = data.draw(st.integers(0, len(cases)))
    write_store(path, [cases[:split], cases[split:]], vocab_size=vocab_size, codec=codec)
    verify(path)
    store = Store(path)
    assert len(store) == len(cases)
    for i, case in enumerate(cases):
        assert_stored(store[i], case, codec)
        assert store.find(case.input_ids) == i
    assert len(oracle.read_store(path)) == len(cases)


@pytest.mark.parametrize("codec", CODECS)
def test_store_round_trip_of_a_vocabulary_of_2_20(tmp_path, generator, codec):
    """Uniform rows of 5 % of the vocabulary, and ragged ones from one entry to all of it."""
    vocab_size = 1 << 20
    options = {"vocab_size": vocab_size, "temperatures": (1.0,)}
    uniform = random_case(4, 2, generator, top_k=math.ceil(vocab_size / 20), **options)
    row = torch.randn(3, vocab_size, generator=generator)
    ids = torch.arange(vocab_size, dtype=torch.int32).repeat(3, 1)
    for r, count in ((0, 1), (1, 1001)):
        ids[r] = -1
        ids[r, :count] = torch.randperm(vocab_size, generator=generator)[:count].sort().values
    kept = row.gather(-1, ids.clamp_min(0).long())
    ragged = Case(
        torch.tensor([vocab_size - 1, 0, 1, 2]),
        torch.tensor([1, 2, 3]),
        SparseLogits(ids, kept, row.logsumexp(-1, keepdim=True), target_logit=row[:, 0].clone()),
    )
    write_store(
        tmp_path, [[uniform], [ragged, uniform._replace(input_ids=uniform.input_ids.flip(0))]], codec=codec, **options
    )
    verify(tmp_path)
    store = Store(tmp_path)
    assert [entry.top_k for entry in store.shards] == [math.ceil(vocab_size / 20), None]
    for i, case in enumerate((uniform, ragged)):
        assert_stored(store[i], case, codec)
        packed, whole = decode_logits(store.packed(i).teacher), store[i].teacher
        assert torch.equal(packed.ids, whole.ids)
        assert torch.equal(packed.logits, whole.logits)
    assert store[0].teacher.ids.max() > vocab_size // 2


def test_store_is_a_sequence(tmp_path, generator):
    cases = [random_case(8, 3, generator) for _ in range(4)]
    write_store(tmp_path, [cases[:1], cases[1:]])
    store = Store(tmp_path)
    assert_stored(store[-1], cases[3])
    assert_stored(store[np.int64(2)], cases[2])
    assert [document.input_ids.tolist() for document in store[1:3]] == [c.input_ids.tolist() for c in cases[1:3]]
    for index in (4, -5):
        with pytest.raises(IndexError, match="holds 4"):
            store[index]
    assert "4 documents, 12 rows" in repr(store)
    assert store.manifest["teacher"]["name"] == "teacher"
    assert slimkernels.Store is Store


def test_store_find(tmp_path, generator):
    cases = [random_case(8, 3, generator) for _ in range(4)]
    write_store(tmp_path, [cases[:3], cases[3:]])
    store = Store(tmp_path)
    for i, case in enumerate(cases):
        assert store.find(case.input_ids) == i
        assert case.input_ids.tolist() in store
    assert store.find(cases[0].input_ids[:-1]) is None
    assert cases[0].input_ids.flip(0) not in store
    with pytest.raises(ValueError, match=r"\[0, 97\)"):
        store.find([97])


def test_store_row(tmp_path, generator):
    cases = [random_case(20, 7, generator, ragged=ragged) for ragged in (False, True)]
    write_store(tmp_path, [cases[:1], cases[1:]])
    store = Store(tmp_path)
    for i, case in enumerate(cases):
        whole = store[i].teacher
        for r, position in enumerate(case.positions.tolist()):
            row = store.row(i, position)
            assert row.leading_shape == (1,)
            assert torch.equal(row.ids[0], whole.ids[r, : row.top_k])
            assert torch.equal(row.logits[0], whole.logits[r, : row.top_k])
        absent = next(p for p in range(20) if p not in case.positions.tolist())
        for position in (absent, -1, 20):
            with pytest.raises(KeyError, match=str(position)):
                store.row(i, position)


def test_store_documents_without_rows(tmp_path, generator):
    cases = [random_case(1, 0, generator), random_case(3, 0, generator), random_case(5, 2, generator)]
    write_store(tmp_path, [cases[:2], cases[2:]])
    verify(tmp_path)
    store = Store(tmp_path)
    for document, case in zip(store, cases, strict=True):
        assert_stored(document, case)
        document.teacher.validate(97)
    assert SparseLogits.cat([document.teacher for document in store]).leading_shape == (2,)


def test_store_empty(tmp_path):
    StoreWriter(tmp_path / "a" / "b", **SETTINGS).close()
    verify(tmp_path / "a" / "b")
    assert len(Store(tmp_path / "a" / "b")) == 0
    assert list(Store(tmp_path / "a" / "b")) == []
    report = info(tmp_path / "a" / "b")
    assert (report["documents"], report["bits_per_entry"], report["bytes_per_token"]) == (0, 0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_store_takes_every_float_dtype(tmp_path, generator, dtype):
    case = random_case(8, 5, generator, spread=1.0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    teacher = dataclasses.replace(case.teacher, logits=case.teacher.logits.to(dtype), lse=case.teacher.lse.to(wide))
    write_store(tmp_path, [[Case(case.input_ids.int(), case.positions.int(), teacher)]])
    assert_stored(Store(tmp_path)[0], case._replace(teacher=teacher))


def test_store_takes_strided_tensors(tmp_path, generator):
    case = random_case(8, 6, generator)
    strided = Case(
        torch.stack([case.input_ids, case.input_ids], 1)[:, 0],
        case.positions.repeat_interleave(2)[::2],
        SparseLogits(
            case.teacher.ids.T.contiguous().T,
            case.teacher.logits.T.contiguous().T,
            case.teacher.lse.T.contiguous().T,
            case.teacher.temperatures,
            torch.stack([case.teacher.target_logit] * 3, 1)[:, 1],
        ),
    )
    write_store(tmp_path, [[strided]])
    assert_stored(Store(tmp_path)[0], case)


def test_store_target_logit_may_be_unknown(tmp_path, generator):
    case = random_case(8, 6, generator)
    target = torch.tensor([math.nan, -math.inf, 1.0, math.nan, 0.0, -0.0])
    case = case._replace(teacher=dataclasses.replace(case.teacher, target_logit=target))
    write_store(tmp_path, [[case]])
    assert_stored(Store(tmp_path)[0], case)
    verify(tmp_path)


def test_store_target_logit_is_looked_up_among_the_kept(tmp_path):
    teacher = SparseLogits(
        torch.tensor([[3, 5], [3, 5], [5, -1]], dtype=torch.int32),
        torch.tensor([[0.25, 0.5], [0.75, 1.0], [2.0, 9.0]]),
        torch.full((3, 1), 5.0),
    )
    with StoreWriter(tmp_path, **SETTINGS | {"temperatures": (1.0,)}) as store_writer:
        store_writer.add([1, 5, 4, 5], [1, 2, 3], teacher)
        store_writer.add([1], [], teacher[:0])
    assert Store(tmp_path)[0].teacher.target_logit.tolist() == [0.5, -math.inf, 2.0]


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


def test_store_reader_refuses_another_vocabulary_or_tokenizer(tmp_path, generator):
    write_store(tmp_path, [[random_case(8, 3, generator)]])
    Store(tmp_path, vocab_size=97, tokenizer_fingerprint="tokenizer-1")
    with pytest.raises(errors.SettingsMismatchError, match="vocab_size=97"):
        Store(tmp_path, vocab_size=98)
    with pytest.raises(errors.SettingsMismatchError, match="tokenizer_fingerprint='tokenizer-1'"):
        Store(tmp_path, tokenizer_fingerprint="tokenizer-2")


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


def test_store_reader_is_a_snapshot(tmp_path, generator):
    cases = [random_case(8, 3, generator) for _ in range(2)]
    write_store(tmp_path, [cases[:1]])
    store = Store(tmp_path)
    write_store(tmp_path, [cases[1:]])
    assert len(store) == 1
    assert_stored(store[0], cases[0])
    assert len(Store(tmp_path)) == 2


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("ragged", [False, True])
def test_store_shards_are_safetensors(tmp_path, generator, codec, ragged):
    write_store(tmp_path, [[random_case(9, 4, generator, ragged=ragged)]], codec=codec)
    path = tmp_path / "shard-000000.safetensors"
    tensors, metadata = oracle.read_shard(path.read_bytes())
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in loaded.items():
        assert tuple(tensor.shape) == tensors[name].shape
        assert bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes()) == tensors[name].tobytes()
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == metadata
    assert metadata == {
        "format": "slimkernels-store",
        "version": "1",
        "vocab_size": "97",
        "codec": codec,
        "top_k": "ragged" if ragged else "6",
    }


def test_store_info(tmp_path, generator):
    cases = [random_case(9, 4, generator), random_case(10, 9, generator, ragged=True)]
    write_store(tmp_path, [cases[:1], cases[1:]])
    report = info(tmp_path)
    counts = [int(n) for case in cases for n in (case.teacher.ids >= 0).sum(-1)]
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    bound = sum(math.log2(math.comb(97, n)) for n in counts) / sum(counts) + 8
    expected = {
        "vocab_size": 97,
        "documents": 2,
        "tokens": 19,
        "rows": 13,
        "entries": sum(counts),
        "shards": 2,
        "bytes": size,
        "codec": "affine8",
        "temperatures": [1.0, 2.0],
        "teacher": SETTINGS["teacher"],
        "selection": SETTINGS["selection"],
        "tokenizer_fingerprint": "tokenizer-1",
    }
    assert {name: report[name] for name in expected} == expected
    assert report["bits_per_entry"] == pytest.approx(8 * size / sum(counts))
    assert report["bytes_per_token"] == pytest.approx(size / 19)
    assert report["entropy_bound_bits_per_entry"] == pytest.approx(bound)
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("vocab_size", [32000, 49152, 128256, 262144])
@pytest.mark.parametrize(("codec", "bits"), [("affine8", 8), ("affine6", 6)])
def test_store_size_bar(tmp_path, generator, vocab_size, codec, bits):
    """At 5 % of the vocabulary, everything included: at most 14.6 bits per kept entry, 12.6 with 6 bits."""
    top_k, num_rows = math.ceil(vocab_size / 20), 100_000
    # What is left of the bar for a store this small is the manifest and the header, which 100k rows share.
    teacher = random_teacher(24, vocab_size, top_k, generator, temperatures=(1.0,))
    options = SETTINGS | {"vocab_size": vocab_size, "temperatures": (1.0,), "codec": codec}
    with StoreWriter(tmp_path, **options) as store_writer:
        store_writer.add(torch.arange(25), torch.arange(1, 25), teacher)
    (entry,) = Store(tmp_path).shards
    overhead = (tmp_path / "manifest.json").stat().st_size + len(shard_layout(Store(tmp_path).settings, entry).header)
    report = info(tmp_path)
    per_row = (report["bytes"] - overhead) / 24
    rows_per_shard = (64 << 20) // per_row
    total = num_rows * per_row + num_rows / rows_per_shard * 2 * overhead
    assert 8 * total / (num_rows * top_k) <= 6.6 + bits
    assert report["entropy_bound_bits_per_entry"] == pytest.approx(5.73 + bits, abs=0.02)


def test_store_size_bar_of_100k_rows():
    """The same from the layout alone: the bytes of 100k rows in documents of 512 tokens, manifest included."""
    settings_ = StoreSettings(**SETTINGS | {"vocab_size": 49152, "temperatures": (1.0,), "codec": "affine8"})
    words, shards = 481, []
    for i in range(7):
        counts = {"documents": 29, "tokens": 29 * 512, "rows": 29 * 511, "entries": 29 * 511 * 2458}
        entry = ShardEntry(
            shard_name(i), 0, id_words=29 * 511 * words, top_k=2458, head_checksum="0" * 32, checksum="0" * 32, **counts
        )
        shards.append(dataclasses.replace(entry, bytes=shard_layout(settings_, entry).total_bytes))
    manifest = len(seal_manifest(manifest_content(settings_, tuple(shards))))
    rows = sum(entry.rows for entry in shards)
    assert rows > 100_000
    assert all(60 << 20 < entry.bytes < 68 << 20 for entry in shards)
    bits = 8 * (manifest + sum(entry.bytes for entry in shards)) / (rows * 2458)
    assert bits == pytest.approx(14.37, abs=0.01)


def test_store_pickles_without_its_maps(tmp_path, generator):
    cases = [random_case(8, 3, generator) for _ in range(2)]
    write_store(tmp_path, [cases])
    store = Store(tmp_path)
    assert_stored(store[0], cases[0])
    assert_stored(pickle.loads(pickle.dumps(store))[1], cases[1])  # noqa: S301 -- our own bytes


def test_store_maps_a_bounded_number_of_shards(tmp_path, generator, monkeypatch):
    monkeypatch.setattr("slimkernels.store.reader._MAX_MAPPED", 3)
    cases = [random_case(8, 3, generator) for _ in range(8)]
    write_store(tmp_path, [[case] for case in cases])
    store = Store(tmp_path)
    kept = [store[i] for i in range(8)]
    assert sorted(store._mapped) == [5, 6, 7]
    for document, case in zip(kept, cases, strict=True):
        assert_stored(document, case)


def test_store_in_data_loader_workers(tmp_path, generator):
    """Two workers, started anew: the store travels by pickle, documents come back, and so do errors by name."""
    cases = [random_case(8, 3, generator, ragged=i % 2 == 0) for i in range(6)]
    write_store(tmp_path, [cases[:3], cases[3:]])
    loader = DataLoader(
        Store(tmp_path), batch_size=None, num_workers=2, multiprocessing_context="spawn", persistent_workers=True
    )
    documents = list(loader)
    for document, case in zip(documents, cases, strict=True):
        assert_stored(document, case)
    shard = tmp_path / "shard-000001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(errors.RowChecksumError, match=r"shard-000001\.safetensors, document 5, row 8"):
        list(loader)


def test_store_example_in_the_docstring():
    assert doctest.testmod(slimkernels.store) == (0, 5)


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


class TestPromptLengths:
    """They lie next to the shard, where readers of version 0.1.0 do not look."""

    def write(self, path, generator, lengths=(3, 0, 4)) -> list[Case]:
        cases = [random_case(9 + i, 4, generator) for i in range(len(lengths))]
        with StoreWriter(path, **SETTINGS) as writer:
            for case, length in zip(cases, lengths, strict=True):
                writer.add(*case, prompt_length=length)
        return cases

    def test_come_back(self, tmp_path, generator) -> None:
        self.write(tmp_path / "store", generator)
        verify(tmp_path / "store")
        store = Store(tmp_path / "store")
        assert [document.prompt_length for document in store] == [3, 0, 4]
        assert [store.packed(i).prompt_length for i in range(3)] == [3, 0, 4]
        assert info(tmp_path / "store")["bytes"] == sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
        tensors = safetensors.torch.load_file(tmp_path / "store" / "prompts-000000.safetensors")
        assert tensors["prompt_lengths"].tolist() == [3, 0, 4]

    def test_change_no_byte_of_manifest_and_shard(self, tmp_path, generator) -> None:
        state = generator.get_state()
        self.write(tmp_path / "with", generator)
        generator.set_state(state)
        self.write(tmp_path / "without", generator, (0, 0, 0))
        names = {path.name: path.read_bytes() for path in (tmp_path / "without").iterdir()}
        assert "prompts-000000.safetensors" not in names
        for name, content in names.items():
            assert (tmp_path / "with" / name).read_bytes() == content

    def test_of_another_shard_or_damaged_are_refused(self, tmp_path, generator) -> None:
        self.write(tmp_path / "a", generator)
        self.write(tmp_path / "b", generator)
        path = tmp_path / "a" / "prompts-000000.safetensors"
        good = path.read_bytes()
        for content in (
            (tmp_path / "b" / path.name).read_bytes(),
            good[:-1],
            good + b"\0",
            b"",
            good[:-4] + b"\5\0\0\0",
            good.replace(b"I32", b"U32"),
        ):
            path.write_bytes(content)
            with pytest.raises(errors.PromptLengthsError, match=r"prompts-000000.safetensors: its bytes are not those"):
                verify(tmp_path / "a")
            with pytest.raises(errors.PromptLengthsError):
                Store(tmp_path / "a")[0]
        path.unlink()
        verify(tmp_path / "a")
        assert [document.prompt_length for document in Store(tmp_path / "a")] == [0, 0, 0]

    def test_that_a_killed_writer_left_belong_to_nobody(self, tmp_path, generator) -> None:
        self.write(tmp_path, generator)
        (tmp_path / "prompts-000001.safetensors").write_bytes(b"left")
        verify(tmp_path)
        with StoreWriter(tmp_path, **SETTINGS) as writer:
            writer.add(*random_case(5, 2, generator))
        verify(tmp_path)
        assert [document.prompt_length for document in Store(tmp_path)] == [3, 0, 4, 0]

    @pytest.mark.parametrize("length", [-1, 6])
    def test_lie_within_the_document(self, tmp_path, generator, length) -> None:
        with (
            StoreWriter(tmp_path, **SETTINGS) as writer,
            pytest.raises(
                ValueError, match=rf"prompt_length must lie in \[0, 5\], the number of input_ids, got {length}"
            ),
        ):
            writer.add(*random_case(5, 2, generator), prompt_length=length)

    def test_of_parts(self, tmp_path, generator) -> None:
        cases = [random_case(9 + i, 4, generator) for i in range(6)]
        with slimkernels.store.RankWriter(tmp_path, num_parts=3, **SETTINGS) as writer:
            for length, case in enumerate(cases):
                writer.add(*case, prompt_length=length)
        verify(tmp_path)
        store = Store(tmp_path)
        assert [store[store.find(case.input_ids)].prompt_length for case in cases] == list(range(6))

    def test_belong_to_the_fingerprint_of_a_store(self, tmp_path, generator) -> None:
        state, stores = generator.get_state(), {}
        for name, lengths in (("a", (3, 0, 4)), ("b", (3, 0, 5)), ("unknown", (0, 0, 0)), ("again", (3, 0, 4))):
            generator.set_state(state)
            self.write(tmp_path / name, generator, lengths)
            stores[name] = Store(tmp_path / name)
        found = {name: store.fingerprint for name, store in stores.items()}
        assert found["a"] == found["again"]
        assert len({found["a"], found["b"], found["unknown"]}) == 3
        # A store without prompts has the fingerprint of version 0.1.0, which checkpoints hold.
        assert {store.rows_fingerprint for store in stores.values()} == {found["unknown"]}
        assert stores["unknown"].prompts_fingerprint is None
        (tmp_path / "a" / "prompts-000000.safetensors").unlink()
        assert Store(tmp_path / "a").fingerprint == found["unknown"]
