"""The store as its readers see it: what was added comes back, by index, by document, in workers."""

from __future__ import annotations

import dataclasses
import doctest
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
from support.store_cases import SETTINGS, Case, assert_stored, random_case, write_store
from torch.utils.data import DataLoader

import slimkernels.store
from slimkernels import SparseLogits, decode_logits
from slimkernels.store import Store, StoreWriter, errors, info, verify

CODECS = ("affine8", "affine6", "bfloat16", "float32")


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
    scalars = {name: getattr(case.teacher, name).to(wide) for name in ("lse", "rest_lse")}
    teacher = dataclasses.replace(case.teacher, logits=case.teacher.logits.to(dtype), **scalars)
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
            case.teacher.rest_lse.T.contiguous().T,
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


def test_store_reader_refuses_another_vocabulary_or_tokenizer(tmp_path, generator):
    write_store(tmp_path, [[random_case(8, 3, generator)]])
    Store(tmp_path, vocab_size=97, tokenizer_fingerprint="tokenizer-1")
    with pytest.raises(errors.SettingsMismatchError, match="vocab_size=97"):
        Store(tmp_path, vocab_size=98)
    with pytest.raises(errors.SettingsMismatchError, match="tokenizer_fingerprint='tokenizer-1'"):
        Store(tmp_path, tokenizer_fingerprint="tokenizer-2")


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
        "version": "2",
        "vocab_size": "97",
        "codec": codec,
        "top_k": "ragged" if ragged else "6",
    }


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
