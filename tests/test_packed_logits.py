"""The record of packed rows, and its way from a store to the ids and logits that were written."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from support import store_oracle as oracle
from support.helpers import assert_same_bits, sparse_fields
from support.packed_cases import VALUE_DTYPES, pack, random_ids
from support.store_cases import random_case, write_store

import slimkernels as sk
from slimkernels import PackedLogits, SparseLogits
from slimkernels.packed_logits import row_words
from slimkernels.store import PackedDocument, Store, errors
from slimkernels.store.codec import encode_rows

CODECS = sorted(VALUE_DTYPES)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def assert_same_rows(actual: SparseLogits, expected: SparseLogits) -> None:
    assert actual.temperatures == expected.temperatures
    assert_same_bits(sparse_fields(actual), sparse_fields(expected))


def test_packed_logits_row_words_are_those_of_the_store():
    for vocab_size in (1, 2, 3, 31, 64, 97, 32000, 2**31 - 1):
        for top_k in {1, 2, 3, 7, 32, 33, 1600, vocab_size // 2, vocab_size - 1, vocab_size}:
            if 1 <= top_k <= vocab_size:
                assert row_words(vocab_size, top_k) == sum(oracle.id_layout(vocab_size, top_k)[1:])
                if top_k <= 32000:
                    # The native encoder has a layout of its own, and refuses rows of another number of words.
                    ids, logits = np.arange(top_k, dtype=np.int32)[None], np.zeros((1, top_k), np.float32)
                    scalars = np.full((1, 1), 1e6, np.float32), np.zeros(1, np.float32)
                    encode_rows(ids, logits, *scalars, vocab_size=vocab_size, codec="affine8", first_row=0)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("codec", CODECS)
def test_packed_logits_of_a_store_decode_to_its_documents(tmp_path, generator, codec, ragged):
    cases = [random_case(200, rows, generator, ragged=ragged) for rows in (5, 130, 0, 1)]
    write_store(tmp_path, [cases[:3], cases[3:]], codec=codec)
    store = Store(tmp_path)
    for index in (0, 1, 2, 3, -1):
        document, packed = store[index], store.packed(index)
        assert isinstance(packed, PackedDocument)
        assert torch.equal(packed.input_ids, document.input_ids)
        assert torch.equal(packed.positions, document.positions)
        assert packed.teacher.vocab_size == store.vocab_size
        assert packed.teacher.values.dtype == VALUE_DTYPES[codec]
        assert_same_rows(sk.decode_logits(packed.teacher), document.teacher)
    whole = PackedLogits.cat([store.packed(i).teacher for i in range(4)])
    assert_same_rows(sk.decode_logits(whole), SparseLogits.cat([document.teacher for document in store]))
    with pytest.raises(IndexError, match="out of range"):
        store.packed(4)


def test_packed_logits_of_a_store_outlive_it(tmp_path, generator):
    write_store(tmp_path, [[random_case(20, 5, generator)]])
    store = Store(tmp_path)
    expected, packed = store[0].teacher, store.packed(0).teacher
    del store
    shard = tmp_path / "shard-000000.safetensors"
    with open(shard, "r+b") as file:
        file.write(bytes(shard.stat().st_size))
    assert_same_rows(sk.decode_logits(packed), expected)


@pytest.mark.parametrize("ragged", [False, True])
def test_packed_logits_of_a_damaged_store_are_refused(tmp_path, generator, ragged):
    write_store(tmp_path, [[random_case(20, 5, generator, ragged=ragged)]])
    shard = tmp_path / "shard-000000.safetensors"
    whole = shard.read_bytes()
    # The last bytes are the values of the last row.
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(errors.RowChecksumError):
        Store(tmp_path).packed(0)
    store = Store(tmp_path)
    with open(shard, "r+b") as file:
        file.truncate(len(whole) - 1)
    with pytest.raises(errors.ShardSizeError):
        store.packed(0)


def test_packed_logits_take_few_bytes():
    packed = pack(random_ids(32000, [1600] * 8), 32000, "affine8")
    # 6.25 bits of ids, 8 of logits, and what a row has once: scale, zero, lse, target_logit.
    assert packed.nbytes <= 8 * (1600 * 14.3 / 8 + 16)


@pytest.mark.parametrize("codec", CODECS)
def test_packed_logits_cat(codec):
    parts = [
        pack(random_ids(97, [6] * 3), 97, codec),
        pack(random_ids(97, [1, 40, 8]), 97, codec, seed=1),
        pack(random_ids(97, [11] * 2), 97, codec, seed=2)[:0],
        pack(random_ids(97, [97]), 97, codec, seed=3),
    ]
    whole = PackedLogits.cat(parts)
    assert whole.counts.tolist() == [6, 6, 6, 1, 40, 8, 97]
    assert_same_rows(sk.decode_logits(whole), SparseLogits.cat([sk.decode_logits(part) for part in parts]))
    same = PackedLogits.cat([parts[0], parts[0][1:]])
    assert same.counts is None
    assert_same_rows(sk.decode_logits(same), SparseLogits.cat([sk.decode_logits(parts[0])] * 2)[[0, 1, 2, 4, 5]])


def test_packed_logits_cat_refuses():
    one = pack([[1, 2]], 97, "affine8")
    others = {
        "vocab_size": pack([[1, 2]], 96, "affine8"),
        "dtype": pack([[1, 2]], 97, "float32"),
        "temperatures": dataclasses.replace(one, lse=torch.zeros(1, 2), temperatures=(1.0, 2.0)),
        "target_logit": dataclasses.replace(one, target_logit=None),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            PackedLogits.cat([one, other])
    with pytest.raises(ValueError, match="at least one"):
        PackedLogits.cat([])


@pytest.mark.parametrize(
    "index", [slice(1, 3), [3, 0], torch.tensor([2, 2, -1]), torch.tensor([True, False, True, False]), slice(0, 0)]
)
def test_packed_logits_select_rows(index):
    for packed in (pack(random_ids(97, [6] * 4), 97, "affine8"), pack(random_ids(97, [6, 1, 9, 2]), 97, "bfloat16")):
        assert_same_rows(sk.decode_logits(packed[index]), sk.decode_logits(packed)[index])


@pytest.mark.parametrize("index", [0, -1, True, None, ..., (slice(None), 0)])
def test_packed_logits_stay_rows(index):
    with pytest.raises(TypeError, match="slice"):
        pack([[1, 2]], 97, "affine8")[index]


def test_packed_logits_move_and_pickle():
    packed = pack(random_ids(97, [6, 1, 9, 2]), 97, "affine8")
    assert (len(packed), packed.top_k, packed.device) == (4, 9, torch.device("cpu"))
    moved = packed.to("meta", non_blocking=True)
    assert moved.device.type == moved.counts.device.type == moved.target_logit.device.type == "meta"
    assert sk.decode_logits(moved).ids.shape == (4, 9)
    assert_same_rows(sk.decode_logits(pickle.loads(pickle.dumps(packed))), sk.decode_logits(packed))  # noqa: S301


@pytest.mark.gpu
def test_packed_logits_on_a_gpu():
    packed = pack(random_ids(1003, [60, 129, 2]), 1003, "affine8")
    moved = packed.pin_memory().to("cuda", non_blocking=True)
    assert_same_rows(sk.decode_logits(moved).to("cpu"), sk.decode_logits(packed))


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "values must be uint8", {"values": torch.zeros(3, 6).half()}),
        (ValueError, "values must have shape", {"values": torch.zeros(3, dtype=torch.uint8)}),
        (ValueError, "values must have shape", {"values": torch.zeros(3, 0, dtype=torch.uint8)}),
        (ValueError, "vocab_size=5", {"vocab_size": 5}),
        (ValueError, "vocab_size", {"vocab_size": 2**31}),
        (TypeError, "id_words must have dtype", {"id_words": torch.zeros(3, 2, dtype=torch.int64)}),
        (ValueError, "id_words must have shape", {"id_words": torch.zeros((), dtype=torch.int32)}),
        (ValueError, "id_words must have shape", {"id_words": torch.zeros(3, 9, dtype=torch.int32)}),
        (ValueError, "id_words must have shape", {"id_words": torch.zeros(2, 2, dtype=torch.int32)}),
        (ValueError, "affine must be given", {"affine": None}),
        (ValueError, "affine must be given", {"values": torch.zeros(3, 6)}),
        (ValueError, "affine must have shape", {"affine": torch.zeros(2, 3)}),
        (TypeError, "affine must have dtype", {"affine": torch.zeros(3, 2).double()}),
        (TypeError, "counts must have dtype", {"counts": torch.ones(3, dtype=torch.int64)}),
        (ValueError, "counts must have shape", {"counts": torch.ones(2, dtype=torch.int32)}),
        (ValueError, "target_logit must have shape", {"target_logit": torch.zeros(3, 1)}),
        (TypeError, "lse must have dtype", {"lse": torch.zeros(3, 1).double()}),
        (ValueError, "lse must have shape", {"lse": torch.zeros(3, 2)}),
        (ValueError, "temperatures must start with 1.0", {"temperatures": (2.0,)}),
        (ValueError, "lse must be on cpu", {"lse": torch.zeros(3, 1, device="meta")}),
    ],
)
def test_packed_logits_refuse(error, match, change):
    packed = pack(random_ids(97, [6] * 3), 97, "affine8")
    with pytest.raises(error, match=match):
        dataclasses.replace(packed, **change)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda packed: sk.slim_loss(torch.zeros(1, 20), torch.tensor([1]), packed), "teacher"),
        (
            lambda packed: sk.linear_slim_loss(torch.zeros(1, 2), torch.zeros(20, 2), torch.tensor([1]), packed),
            "teacher",
        ),
        (sk.sparse_softmax, "sparse"),
    ],
)
def test_packed_logits_are_told_how_to_be_decoded(function, name):
    words = torch.tensor([[0x5E, 0x93]], dtype=torch.int32)
    packed = PackedLogits(words, torch.ones(1, 4), torch.ones(1, 1), vocab_size=20)
    with pytest.raises(TypeError, match=rf"decode it with slimkernels.decode_logits\({name}\), or .* packed=False"):
        function(packed)
    function(sk.decode_logits(packed))


def test_packed_logits_are_loaded_by_torch_load_without_running_code(tmp_path):
    words = torch.tensor([[0x5E, 0x93]], dtype=torch.int32)
    packed = sk.PackedLogits(words, torch.tensor([[1.0, 4.0, 2.0, 3.0]]), lse=torch.full((1, 1), 5.0), vocab_size=20)
    torch.save(packed, tmp_path / "rows.pt")
    assert sk.decode_logits(torch.load(tmp_path / "rows.pt", weights_only=True)).ids.tolist() == [[2, 3, 9, 17]]
