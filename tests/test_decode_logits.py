"""Packed rows to ids and logits: what was written, bit for bit, and no trust in any byte."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import assert_same_bits, column_major, explain, misaligned, opcheck_calls_of, random_problem
from support.packed_cases import VALUE_DTYPES, oracle_row, pack, random_ids

import slimkernels as sk
from slimkernels import PackedLogits
from slimkernels.packed_logits import row_words

CODECS = sorted(VALUE_DTYPES)


def int32(words: list) -> torch.Tensor:
    return torch.from_numpy(np.array(words, np.uint32).view(np.int32))


def assert_decodes(packed: PackedLogits, ids: list[list[int]]) -> None:
    """To these ids, to the logits that the oracle reads, and to the scalars as they are."""
    sparse = sk.decode_logits(packed)
    for r, row in enumerate(ids):
        with explain(f"row {r}"):
            assert sparse.ids[r].tolist() == row + [-1] * (packed.top_k - len(row))
            assert_same_bits((sparse.ids[r], sparse.logits[r]), oracle_row(packed, r))
    assert (sparse.temperatures, len(sparse)) == (packed.temperatures, len(ids))
    assert_same_bits((sparse.lse, sparse.target_logit), (packed.lse, packed.target_logit))


@pytest.mark.parametrize(
    ("vocab_size", "ids", "words"),
    [
        # The example of store/FORMAT.md: l = 2; low 2 3 1 1; high parts 0 0 2 4 -> bits 0 1 4 7.
        (20, [2, 3, 9, 17], [0x5E, 0x93]),
        # l = 0: no low part; bit id + j.
        (4, [0, 1, 2, 3], [0b1010101]),
        # l = 30 and two buckets: the low part is the id without its top bit.
        (2**31 - 1, [2**31 - 2], [0x3FFFFFFE, 0b10]),
        (1, [0], [0b1]),
        # l = 1; the low part of 33 ids spills one bit into a second word; high bits 0, 2, 4, ... spill too.
        (66, list(range(0, 66, 2)), [0, 0, 0x55555555, 0x55555555, 0b1]),
        (66, list(range(1, 66, 2)), [0xFFFFFFFF, 1, 0x55555555, 0x55555555, 0b1]),
        # l = 29, so that the second field lies in two words: 2^29 - 1 twice, in buckets 1 and 2 -> bits 1 3.
        (2**30, [2**30 - 1, 2**30 - 1 - 2**29][::-1], [0xFFFFFFFF, 0x03FFFFFF, 0b101]),
    ],
)
def test_decode_logits_hand_worked(vocab_size, ids, words):
    values = torch.arange(len(ids), dtype=torch.uint8)[None]
    packed = PackedLogits(int32([words]), values, torch.zeros(1, 1), vocab_size, affine=torch.tensor([[0.5, -1.0]]))
    sparse = sk.decode_logits(packed)
    assert sparse.ids.tolist() == [ids]
    assert sparse.logits.tolist() == [[0.5 * j - 1 for j in range(len(ids))]]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("vocab_size", "top_k"),
    # Low parts of 3 bits, as of 100 ids below 1003, may end just one bit behind their word.
    [
        *((1, 1), (7, 7), (97, 1), (97, 6), (300, 300), (1003, 100), (1003, 129)),
        *((32000, 1600), (262144, 33), (2**31 - 1, 40)),
    ],
)
def test_decode_logits_of_uniform_rows(vocab_size, top_k, codec):
    ids = random_ids(vocab_size, [top_k] * (2 if top_k > 1000 else 5))
    assert_decodes(pack(ids, vocab_size, codec), ids)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("vocab_size", "counts"), [(97, [6, 1, 3, 97, 48, 49]), (32000, [1, 333, 2, 70]), (2**31 - 1, [1, 2, 33])]
)
def test_decode_logits_of_ragged_rows(vocab_size, counts, codec):
    ids = random_ids(vocab_size, counts)
    packed = pack(ids, vocab_size, codec)
    assert packed.counts is not None
    assert_decodes(packed, ids)


@pytest.mark.parametrize("codec", CODECS)
def test_decode_logits_never_reads_padding(codec):
    ids = random_ids(97, [6, 1, 3, 40])
    packed = pack(ids, 97, codec)
    expected = sk.decode_logits(packed)
    for r, count in enumerate(packed.counts.tolist()):
        packed.id_words[r, row_words(97, count) :] = -1
        packed.values.view(torch.uint8)[r, count * packed.values.itemsize :] = 255
    decoded = sk.decode_logits(packed)
    assert_same_bits((decoded.ids, decoded.logits), (expected.ids, expected.logits))


@settings(max_examples=60, deadline=None)
@given(
    vocab_size=st.one_of(st.integers(1, 300), st.sampled_from([49152, 128256, 2**31 - 1])),
    largest=st.sampled_from([1, 7, 33, 200]),
    codec=st.sampled_from(CODECS),
    seed=st.integers(0, 2**32 - 1),
)
def test_decode_logits_of_any_rows(vocab_size, largest, codec, seed):
    counts = np.random.default_rng(seed).integers(1, min(largest, vocab_size) + 1, 3).tolist()
    ids = random_ids(vocab_size, counts, seed)
    assert_decodes(pack(ids, vocab_size, codec, ragged=True), ids)


@pytest.mark.parametrize("codec", CODECS)
def test_decode_logits_of_special_values(codec):
    packed = pack([[1, 5, 9, 11]] * 2, 20, codec)
    if packed.affine is not None:
        # A constant row; the largest code of the widest row.
        packed.affine.copy_(torch.tensor([[0.0, -0.0], [2.0**119, -(2.0**126)]]))
        packed.values.copy_(torch.tensor([[0, 1, 254, 255]] * 2))
    else:
        packed.values[0] = torch.tensor([-0.0, torch.finfo(packed.values.dtype).smallest_normal / 4, 3e38, -3e38])
        packed.values[1] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    assert_decodes(packed, [[1, 5, 9, 11]] * 2)


def decoded_rows(packed: PackedLogits) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Every row decoded, None where it is refused: by raising, or by ids -2 and NaN. Guarded against strays.

    The rows lie between others' bytes, which must neither matter nor change.
    """
    results = []
    for poison in (0, 255):
        guarded = {}
        for name in ("id_words", "values", "affine", "counts"):
            if (tensor := getattr(packed, name)) is not None:
                room = torch.empty(3, *tensor.shape, dtype=tensor.dtype)
                room.view(torch.uint8).fill_(poison)
                room[1] = tensor
                guarded[name] = room[1]
        shape = packed.values.shape
        ids = torch.full((3, *shape), 1234567, dtype=torch.int32)
        logits = torch.full((3, *shape), 1234567.0)
        rows = []
        for r in range(len(packed)):
            fields = (guarded.get(name) for name in ("id_words", "values", "affine", "counts"))
            one = [None if field is None else field[r : r + 1] for field in fields]
            out = ids[1, r : r + 1], logits[1, r : r + 1]
            fault = torch.ops.slimkernels.decode_logits_rows(*one, packed.vocab_size, *out)
            assert fault in (0, 2)
            broken = (out[0] == -2).all()
            assert not broken or out[1].isnan().all()
            rows.append(None if fault or broken else (out[0][0].clone(), out[1][0].clone()))
        assert (ids[::2] == 1234567).all()
        assert (logits[::2] == 1234567.0).all()
        results.append(rows)
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same_bits(one, other)
    return results[0]


def assert_as_the_oracle(packed: PackedLogits) -> list[bool]:
    """Every row is refused where the oracle refuses it and decoded as it does elsewhere; which were decoded."""
    rows = decoded_rows(packed)
    for r, row in enumerate(rows):
        expected = oracle_row(packed, r)
        with explain(f"row {r}: {packed.id_words[r].tolist()}"):
            assert (row is None) == (expected is None)
            if row is not None:
                assert_same_bits(row, expected)
    return [row is not None for row in rows]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_decode_logits_of_hostile_words(data):
    vocab_size = data.draw(st.sampled_from([1, 2, 20, 33, 64, 97, 1000, 2**20, 2**31 - 1]))
    top_k = data.draw(st.integers(1, min(vocab_size, 40)))
    ragged = data.draw(st.booleans())
    counts = data.draw(st.lists(st.integers(1, top_k), min_size=3, max_size=3)) if ragged else [top_k] * 3
    packed = pack(random_ids(vocab_size, counts), vocab_size, "affine8", ragged=True)
    packed = dataclasses.replace(packed, values=torch.nn.functional.pad(packed.values, (0, top_k - packed.top_k)))
    words = packed.id_words.numpy().view(np.uint32)
    for r in range(3):
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, words.shape[1] - 1))
            words[r, at] ^= data.draw(
                st.one_of(st.integers(0, 31).map(lambda bit: 1 << bit), st.sampled_from([3, 0xFFFFFFFF, 0x80000001]))
            )
        if data.draw(st.integers(0, 3)) == 0:
            packed.counts[r] = data.draw(st.sampled_from([-(2**31), -1, 0, top_k - 1, top_k + 1, 2**31 - 1]))
    assert_as_the_oracle(packed)


@pytest.mark.parametrize(
    ("words", "decoded"),
    [
        ([0x5E, 0x93], True),
        ([0x5E, 0x13], False),  # a bit too few
        ([0x5E, 0x97], False),  # a bit too many
        ([0x5E, 0x193], False),  # one after the last
        ([0x5E, 0x93 | 1 << 9], False),  # one past the bitmap's end
        ([0x5E, 0x13 | 1 << 9], False),  # as many as there should be, one of them there
        ([0x5E | 1 << 8, 0x93], False),  # a bit past the low part's end
        ([0x5A, 0x93], False),  # 2, 2
        ([0x5B, 0x93], False),  # 3, 2
        ([0x5E, 0x113], False),  # the last id is 21
        ([0, 0], False),
        ([0xFFFFFFFF, 0xFFFFFFFF], False),
    ],
)
def test_decode_logits_of_broken_rows(words, decoded):
    values = torch.ones(2, 4)
    packed = PackedLogits(int32([[0x5E, 0x93], words]), values, torch.zeros(2, 1), 20)
    assert assert_as_the_oracle(packed) == [True, decoded]


def test_decode_logits_of_a_missing_id_whose_place_holds_one():
    ids, logits = torch.tensor([[0, 0, 0, 17]], dtype=torch.int32), torch.zeros(1, 4)
    row = int32([[0x5E, 0x13]]), torch.ones(1, 4), None, None, 20
    fault = torch.ops.slimkernels.decode_logits_rows(*row, ids, logits)
    assert fault == 2 or ids.tolist() == [[-2] * 4]


def test_decode_logits_of_counts_that_do_not_fit():
    packed = pack([[5], [6, 7], [1, 2, 3, 4, 9]], 20, "affine8")
    assert assert_as_the_oracle(packed) == [True] * 3
    # The last row, so that what is written past it stays to be seen.
    assert assert_as_the_oracle(dataclasses.replace(packed, values=packed.values[:, :4])) == [True, True, False]
    # Of bits that are all 0, as many are set as there are entries.
    packed.id_words[:2] = 0
    packed.counts[:2] = torch.tensor([0, -1])
    assert assert_as_the_oracle(packed) == [False, False, True]


def test_decode_logits_of_a_row_that_would_end_in_the_next():
    # The fifth word of the first row is the first of the second.
    words = int32([[0, 0, 0x55555555, 0x55555555], [1, 0, 0, 0]])
    counts = torch.full((2,), 33, dtype=torch.int32)
    packed = PackedLogits(words, torch.ones(2, 33), torch.zeros(2, 1), 66, counts=counts)
    assert assert_as_the_oracle(packed) == [False, False]


def test_decode_logits_of_a_bit_that_wraps():
    # l = 30 and 3 bits of bitmap: bit 4 would be the id 4 * 2^30 + 5, which is 5 in 32 bits.
    packed = PackedLogits(int32([[5, 1], [5, 1 << 4]]), torch.ones(2, 1), torch.zeros(2, 1), 2**31 - 1)
    assert assert_as_the_oracle(packed) == [True, False]


def test_decode_logits_refuses_by_order_where_every_high_part_is_its_own():
    # Every pair of ids in one bucket, swapped or equal: seen by the order of the ids alone.
    ids = [[4 * i + j for i in range(60) for j in (1, 2)]]
    packed = pack(ids, 512, "float32")
    assert assert_as_the_oracle(packed) == [True]
    for pair in range(60):
        swapped = packed[[0]]
        bit = 2 * (2 * pair)  # l = 2, the low bits of the first of the pair
        swapped.id_words[0, bit // 32] ^= 3 << bit % 32 if pair % 2 else 0b1111 << bit % 32
        assert assert_as_the_oracle(swapped) == [False]


@pytest.mark.cpu_kernels
def test_decode_logits_names_the_first_broken_row():
    packed = pack(random_ids(97, [6] * 40), 97, "affine8")
    for row in (38, 7, 20):
        packed.id_words[row, 0] ^= -1
        packed.id_words[row, -1] = 0
    with pytest.raises(ValueError, match="row 7 of packed"):
        sk.decode_logits(packed)
    packed = dataclasses.replace(pack(random_ids(97, [6, 5]), 97, "affine8"), vocab_size=96)
    packed.counts[1] = 7
    with pytest.raises(ValueError, match=r"row 1 of packed .* vocabulary of 96"):
        sk.decode_logits(packed)


@pytest.mark.cpu_kernels
def test_decode_logits_on_threads(set_threads):
    ids = random_ids(1003, [129] * 300)
    packed = pack(ids, 1003, "affine8")
    expected = sk.decode_logits(packed)
    set_threads(3)
    actual = sk.decode_logits(packed)
    assert_same_bits((actual.ids, actual.logits), (expected.ids, expected.logits))
    packed.id_words[299] = packed.id_words[201] = 0
    with pytest.raises(ValueError, match="row 201 of packed"):
        sk.decode_logits(packed)


def test_decode_logits_row_does_not_depend_on_its_neighbours():
    packed = pack(random_ids(1003, [60, 129, 2]), 1003, "affine8")
    whole, again = sk.decode_logits(packed), sk.decode_logits(packed)
    assert_same_bits((whole.ids, whole.logits), (again.ids, again.logits))
    for r in range(3):
        alone = sk.decode_logits(packed[r : r + 1])
        assert_same_bits((alone.ids[0], alone.logits[0]), (whole.ids[r], whole.logits[r]))


def strided(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, rows], -1)[:, : rows.shape[1]]


@pytest.mark.parametrize("layout", [misaligned, strided, column_major])
@pytest.mark.parametrize("codec", CODECS)
def test_decode_logits_of_any_layout(codec, layout):
    packed = pack(random_ids(203, [17] * 5), 203, codec)
    fields = {name: getattr(packed, name) for name in ("id_words", "values", "affine", "lse")}
    strange = {name: layout(field) for name, field in fields.items() if field is not None}
    actual, expected = sk.decode_logits(dataclasses.replace(packed, **strange)), sk.decode_logits(packed)
    assert_same_bits((actual.ids, actual.logits, actual.lse), (expected.ids, expected.logits, expected.lse))


@pytest.mark.parametrize("codec", CODECS)
def test_decode_logits_of_no_rows(codec):
    sparse = sk.decode_logits(pack([[1, 2, 3]], 9, codec)[:0])
    assert (sparse.ids.shape, sparse.logits.shape, sparse.lse.shape) == ((0, 3), (0, 3), (0, 1))
    assert (sparse.ids.dtype, sparse.logits.dtype) == (torch.int32, torch.float32)


@pytest.mark.parametrize("codec", CODECS)
def test_decode_logits_opcheck(codec):
    packed = pack([[1, 4, 5], [2, 3, 7]], 9, codec)
    assert opcheck_calls_of(sk.decode_logits, packed) == ["slimkernels::decode_logits"]
    assert opcheck_calls_of(sk.decode_logits, pack([[1, 4, 5], [2, 3]], 9, codec)) == ["slimkernels::decode_logits"]


@pytest.mark.parametrize("codec", CODECS)
def test_decode_logits_compiles_whole(codec):
    packed = pack(random_ids(97, [6, 1, 3]), 97, codec)

    def decode(packed):
        sparse = sk.decode_logits(packed)
        return sparse.ids + 1, sparse.logits.exp(), sparse.lse

    assert_same_bits(torch.compile(decode, fullgraph=True, backend="aot_eager")(packed), decode(packed))


def test_decode_logits_feeds_the_ops():
    problem = random_problem(5, 301, 17)
    teacher = problem.teacher
    packed = pack(teacher.ids.tolist(), 301, "float32")
    packed = dataclasses.replace(
        packed, values=teacher.logits.float(), lse=teacher.lse, target_logit=teacher.target_logit
    )
    options = {"target": problem.target, "divergence": "forward_kl"}
    expected = sk.slim_loss(problem.logits, teacher=teacher, **options)
    assert_same_bits(sk.slim_loss(problem.logits, teacher=sk.decode_logits(packed), **options), expected)
