"""The row codec: ids exactly, logits within half a step, the bytes of FORMAT.md, and no trust in any of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import store_oracle as oracle
from support.store_cases import assert_logits

from slimkernels import _C
from slimkernels.packed_logits import row_words
from slimkernels.store.codec import decode_rows, encode_rows, offsets_of, ragged_values, words_of
from slimkernels.store.errors import RowChecksumError, RowDataError, ShardIndexError, StoreError

CODECS = ("affine8", "affine6", "bfloat16", "float32")


def encode(ids, logits, *, vocab_size, codec="float32", lse=None, target=0.0, first_row=0, rest=None):
    ids, logits = np.array(ids, np.int32), np.array(logits, np.float32)
    if lse is None:
        lse = np.full((len(ids), 1), 1e6)
    return encode_rows(
        ids,
        logits,
        np.array(lse, np.float32),
        np.full(len(ids), target, np.float32),
        rest_lse=None if rest is None else np.array(rest, np.float32),
        vocab_size=vocab_size,
        codec=codec,
        first_row=first_row,
    )


def shard_arrays(encoded, vocab_size, codec="float32"):
    """The encoded rows as the arrays of a ragged shard."""
    has_rest = encoded.rest_lse is not None
    return ({"rest_lse": encoded.rest_lse} if has_rest else {}) | {
        "entry_offsets": offsets_of(encoded.counts),
        "id_word_offsets": offsets_of(words_of(vocab_size, encoded.counts)),
        "row_checksums": encoded.checksums_with_rest() if has_rest else encoded.checksums,
        "lse": encoded.lse,
        "target_logit": encoded.target_logit,
        "affine": encoded.affine,
        "id_words": encoded.id_words,
        "values": ragged_values(codec, encoded.counts, encoded.values),
    }


def decode(arrays, *, vocab_size, codec, width, top_k=None, first_row=0, num_rows=None):
    if num_rows is None:
        num_rows = len(arrays["row_checksums"]) - first_row
    return decode_rows(
        vocab_size=vocab_size,
        codec=codec,
        top_k=top_k,
        first_row=first_row,
        num_rows=num_rows,
        width=width,
        arrays=arrays,
        file="shard-000000.safetensors",
        document=0,
    )


def seal(arrays, codec):
    """Gives every row the checksum of its bytes, as a hostile writer would."""
    words, entries = arrays["id_word_offsets"], arrays["entry_offsets"]
    for r in range(len(arrays["row_checksums"])):
        h = oracle.xxh64(arrays["lse"][r].tobytes(), r)
        h = oracle.xxh64(arrays["target_logit"][r].tobytes(), h)
        if codec in ("affine8", "affine6"):
            h = oracle.xxh64(arrays["affine"][r].tobytes(), h)
        h = oracle.xxh64(arrays["id_words"][words[r] : words[r + 1]].tobytes(), h)
        start = oracle.value_start(codec, r, int(entries[r]), ragged=True)
        stop = start + oracle.row_bytes(codec, int(entries[r + 1] - entries[r]))
        h = oracle.xxh64(arrays["values"][start:stop].tobytes(), h)
        if "rest_lse" in arrays:
            h = oracle.xxh64(arrays["rest_lse"][r].tobytes(), h)
        arrays["row_checksums"][r] = h


def test_store_codec_xxh64_published_values():
    assert oracle.xxh64(b"", 0) == 0xEF46DB3751D8E999
    assert oracle.xxh64(b"a", 0) == 0xD24EC4F1A98C6E5B
    assert oracle.xxh64(b"abc", 0) == 0x44BC2CF5AD770999
    assert oracle.xxh64(b"Nobody inspects the spammish repetition", 0) == 0xFBCEA83C8A378BF1


@pytest.mark.parametrize(
    ("vocab_size", "ids", "words"),
    [
        # l = 2; low 2 3 1 1; high parts 0 0 2 4 -> bits 0 1 4 7.
        (20, [2, 3, 9, 17], [0x5E, 0x93]),
        # l = 0: no low part; bit id + j.
        (4, [0, 1, 2, 3], [0b1010101]),
        # One id of 2^31 - 1: l = 30, two buckets; the low part is the id without its top bit, high bit 1.
        (2**31 - 1, [2**31 - 2], [0x3FFFFFFE, 0b10]),
        (1, [0], [0b1]),
        # l = 1; the low part of 33 ids spills one bit into a second word; high bits 0, 2, 4, ... spill too.
        (66, list(range(0, 66, 2)), [0, 0, 0x55555555, 0x55555555, 0b1]),
        (66, list(range(1, 66, 2)), [0xFFFFFFFF, 1, 0x55555555, 0x55555555, 0b1]),
    ],
)
def test_store_codec_hand_worked_ids(vocab_size, ids, words):
    encoded = encode([ids], [[0.0] * len(ids)], vocab_size=vocab_size)
    assert encoded.id_words.tolist() == words
    assert oracle.encode_ids(vocab_size, ids) == words
    assert row_words(vocab_size, len(ids)) == len(words)
    decoded, _ = decode(shard_arrays(encoded, vocab_size), vocab_size=vocab_size, codec="float32", width=len(ids))
    assert decoded.tolist() == [ids]


@st.composite
def id_rows(draw):
    vocab_size = draw(st.one_of(st.integers(1, 300), st.sampled_from([32000, 49152, 128256, 262144, 2**31 - 1])))
    rows = draw(st.integers(1, 4))
    largest = min(vocab_size, draw(st.sampled_from([1, 7, 8, 9, 40, 300])))
    seed = draw(st.integers(0, 2**32 - 1))
    clustered = draw(st.booleans())
    generator = np.random.default_rng(seed)
    result = []
    for _ in range(rows):
        count = int(generator.integers(1, largest + 1))
        span = min(vocab_size, max(count, 2 * count)) if clustered else vocab_size
        start = int(generator.integers(0, vocab_size - span + 1))
        result.append(
            sorted((start + generator.choice(span, count, replace=False)).tolist())
            if span < 10**7
            else sorted(set(generator.integers(0, vocab_size, count).tolist()))
        )
    return vocab_size, result, seed


@settings(max_examples=150, deadline=None)
@given(rows=id_rows(), codec=st.sampled_from(CODECS), spread=st.sampled_from([0.0, 1e-30, 0.01, 1.0, 40.0, 1e30]))
def test_store_codec_round_trip_agrees_with_the_oracle(rows, codec, spread):
    vocab_size, ids, seed = rows
    width = max(len(row) for row in ids) + 1
    padded = np.full((len(ids), width), -1, np.int32)
    for r, row in enumerate(ids):
        padded[r, : len(row)] = row
    logits = (np.random.default_rng(seed).normal(size=padded.shape) * spread).astype(np.float32)
    rest = np.random.default_rng(seed).choice([-np.inf, np.nan, 1.0], (len(ids), 2)) if seed % 2 else None
    encoded = encode(padded, logits, vocab_size=vocab_size, codec=codec, lse=np.full((len(ids), 2), 1e38), rest=rest)
    arrays = shard_arrays(encoded, vocab_size, codec)
    got_ids, got_logits = decode(arrays, vocab_size=vocab_size, codec=codec, width=width)
    assert np.array_equal(got_ids, padded)
    assert_logits(torch.from_numpy(got_logits), torch.from_numpy(logits), torch.from_numpy(padded >= 0), codec)
    for r, row in enumerate(ids):
        start, stop = arrays["id_word_offsets"][r : r + 2]
        assert encoded.id_words[start:stop].tolist() == oracle.encode_ids(vocab_size, row)
        start = oracle.value_start(codec, r, int(arrays["entry_offsets"][r]), ragged=True)
        raw = arrays["values"][start : start + oracle.row_bytes(codec, len(row))].tobytes()
        affine = encoded.affine[r] if codec in ("affine8", "affine6") else None
        assert oracle.decode_values(codec, raw, affine, len(row)).tobytes() == got_logits[r, : len(row)].tobytes()
    sealed = arrays | {"row_checksums": np.zeros_like(arrays["row_checksums"])}
    seal(sealed, codec)
    assert np.array_equal(sealed["row_checksums"], arrays["row_checksums"])


@pytest.mark.parametrize("vocab_size", [32000, 49152])
@pytest.mark.parametrize("spread", [1.0, 4.0, 8.0])
@pytest.mark.parametrize(("codec", "bound"), [("affine8", 3e-4), ("affine6", 1e-3)])
def test_store_codec_affine_keeps_the_mass(vocab_size, spread, codec, bound):
    row = torch.randn(32, vocab_size) * spread
    logits, ids = row.topk(math.ceil(vocab_size / 20))
    ids, order = ids.sort(-1)
    logits = logits.gather(-1, order)
    lse = row.logsumexp(-1, keepdim=True)
    encoded = encode(ids.numpy(), logits.numpy(), vocab_size=vocab_size, codec=codec, lse=lse.numpy())
    arrays = shard_arrays(encoded, vocab_size, codec)
    _, got = decode(arrays, vocab_size=vocab_size, codec=codec, width=ids.shape[1])
    got = torch.from_numpy(got)
    log_mass_error = got.double().logsumexp(-1) - logits.double().logsumexp(-1)
    assert log_mass_error.abs().max() < bound
    assert_logits(got, logits, ids >= 0, codec)


@pytest.mark.parametrize("codec", ["affine8", "affine6"])
def test_store_codec_affine_constant_row_is_exact(codec):
    encoded = encode([[1, 5, 9]], [[3.7, 3.7, 3.7]], vocab_size=10, codec=codec)
    assert encoded.affine.tolist() == [[0.0, np.float32(3.7)]]
    assert encoded.values.tolist() == [0, 0, 0]
    arrays = shard_arrays(encoded, 10, codec)
    assert decode(arrays, vocab_size=10, codec=codec, width=3)[1].tolist() == [[np.float32(3.7)] * 3]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 11])
def test_store_codec_affine6_bits_of_the_format_page(count):
    """scale 1 and zero 0 make logits and values the same; 0 and 63 among them fix both."""
    values = [0, 63, 3, 63, 5, 1, 62, 32, 7, 9, 33][:count]
    logits = values if count > 1 else [0]
    encoded = encode([list(range(count))], [logits], vocab_size=20, codec="affine6")
    number = sum(value << (6 * j) for j, value in enumerate(logits))
    assert encoded.affine[0, 0] == (1 if count > 1 else 0)
    assert encoded.affine[0, 1] == 0
    assert encoded.values.tobytes() == number.to_bytes(-(-6 * count // 8), "little")


def test_store_codec_affine6_example_of_the_format_page():
    raw = bytes([0x81, 0x30, 0xFC, 0x05])
    assert oracle.decode_values("affine6", raw, np.float32([1, 0]), 5).tolist() == [1, 2, 3, 63, 5]
    words = oracle.encode_ids(20, [0, 1, 2, 3, 4])
    assert hand_made(20, words, list(raw), codec="affine6", count=5)[1].tolist() == [[1, 2, 3, 63, 5]]


@pytest.mark.parametrize(("values", "count"), [([0, 0x10], 2), ([0x40], 1), ([0, 0, 0x04], 3), ([0, 0, 0, 1], 4)])
def test_store_codec_affine6_refuses_bits_behind_the_values(values, count):
    """In the last byte of the values, and in the byte that may part two rows of a ragged shard."""
    words = oracle.encode_ids(20, list(range(count)))
    with pytest.raises(RowDataError, match="a padding bit after its values is set"):
        hand_made(20, words, values, codec="affine6", count=count)
    hand_made(20, words, [0] * len(values), codec="affine6", count=count)


@pytest.mark.parametrize(
    ("ids", "logits", "options", "match"),
    [
        ([[1, 3, 3]], [[0, 0, 0]], {}, "not strictly ascending"),
        ([[1, 4, 2]], [[0, 0, 0]], {}, "not strictly ascending"),
        ([[1, 2, 10]], [[0, 0, 0]], {}, r"outside \[0, 10\)"),
        ([[-2, 2, 3]], [[0, 0, 0]], {}, r"outside \[0, 10\)"),
        ([[1, -1, 3]], [[0, 0, 0]], {}, "after padding"),
        ([[-1, -1, -1]], [[0, 0, 0]], {}, "keeps no entry"),
        ([list(range(11))], [[0.0] * 11], {}, "ascending|outside"),
        ([[1, 2, 3]], [[0, math.inf, 0]], {}, "NaN or infinite"),
        ([[1, 2, 3]], [[0, -math.inf, 0]], {"codec": "affine8"}, "padding the row"),
        ([[1, 2, 3]], [[0, math.nan, 0]], {"codec": "bfloat16"}, "NaN or infinite"),
        ([[1, 2, 3]], [[0, 3.4e38, 0]], {"codec": "bfloat16", "lse": [[3.4e38]]}, "codec='float32'"),
        ([[1, 2]], [[-3e38, 3e38]], {"codec": "affine8", "lse": [[3.4e38]]}, "codec='float32'"),
        ([[1, 2]], [[0, 0]], {"lse": [[math.nan]]}, "lse is NaN"),
        ([[1, 2]], [[0, 0]], {"lse": [[math.inf]]}, "lse is NaN or infinite"),
        ([[1, 2]], [[0, 0]], {"target": math.inf}, "target_logit"),
        ([[1, 2]], [[0, 0]], {"lse": [[0.5]]}, "more probability than its lse allows"),
        ([[1, 2]], [[0, 0]], {"rest": [[math.inf]]}, r"its rest_lse is \+inf"),
        ([[1, 2]], [[0, 0]], {"lse": [[9, 4]], "rest": [[1, 4.2]]}, "its rest_lse is above its lse"),
    ],
)
def test_store_codec_refuses_rows(ids, logits, options, match):
    with pytest.raises(ValueError, match=match):
        encode(ids, logits, vocab_size=10, **options)


def test_store_codec_names_the_first_bad_row():
    with pytest.raises(ValueError, match="row 1 of"):
        encode([[1, 2], [3, 3], [4, 4]], [[0, 0]] * 3, vocab_size=10)


def test_store_codec_mass_within_rounding_is_accepted():
    encode([[1, 2]], [[0, 0]], vocab_size=10, lse=[[math.log(2) - 0.05]])


def hand_made(
    vocab_size, words, values, *, codec="float32", affine=(1.0, 0.0), lse=0.0, target=0.0, count=None, rest=None
):
    """One row of a shard with these id words and values (affine6: bytes) and the right checksum."""
    dtype = {"affine8": "u1", "affine6": "u1", "bfloat16": "<u2", "float32": "<f4"}[codec]
    raw = np.array(values, dtype).view(np.uint8)
    count = len(values) if count is None else count
    raw = np.pad(raw, (0, max(0, oracle.value_start(codec, 1, count, ragged=True) - len(raw))))
    arrays = {
        "entry_offsets": np.array([0, count], np.int64),
        "id_word_offsets": np.array([0, len(words)], np.int64),
        "row_checksums": np.zeros(1, np.uint64),
        "lse": np.array([[lse]], np.float32),
        "target_logit": np.array([target], np.float32),
        "affine": np.array([affine], np.float32),
        "id_words": np.array(words, np.uint32),
        "values": raw,
    }
    if rest is not None:
        arrays["rest_lse"] = np.array([[rest]], np.float32)
    seal(arrays, codec)
    return decode(arrays, vocab_size=vocab_size, codec=codec, width=count)


def test_store_codec_hand_made_row_is_read():
    ids, logits = hand_made(20, [0x5E, 0x93], [1, 2, 3, 4])
    assert ids.tolist() == [[2, 3, 9, 17]]
    assert logits.tolist() == [[1, 2, 3, 4]]
    assert hand_made(20, [0x5E, 0x93], [0, 2, 255, 1], codec="affine8", affine=(0.5, -1))[1].tolist() == [
        [-1, 0, 126.5, -0.5]
    ]


@pytest.mark.parametrize(
    ("words", "options", "match"),
    [
        ([0x5E, 0x13], {}, "one bit per entry"),
        ([0x5E, 0x97], {}, "one bit per entry"),
        ([0x5E, 0x93 | 1 << 9], {}, "one bit per entry"),
        ([0x5E | 1 << 8, 0x93], {}, "one bit per entry"),
        # 2, 2: the same low bits in one bucket; 3, 2: descending ones.
        ([0x5A, 0x93], {}, "not strictly ascending"),
        ([0x5B, 0x93], {}, "not strictly ascending"),
        # The last set bit in bucket 5: id 21.
        ([0x5E, 0x113], {}, "outside"),
        ([0x5E, 0x93], {"values": [0, math.nan, 0, 0]}, "NaN or infinite"),
        ([0x5E, 0x93], {"values": [0, 0x7F80, 0, 0], "codec": "bfloat16"}, "NaN or infinite"),
        ([0x5E, 0x93], {"codec": "affine8", "affine": (-1.0, 0.0)}, "scale or zero"),
        ([0x5E, 0x93], {"codec": "affine8", "affine": (math.nan, 0.0)}, "scale or zero"),
        ([0x5E, 0x93], {"codec": "affine8", "affine": (1.0, math.inf)}, "scale or zero"),
        ([0x5E, 0x93], {"codec": "affine8", "affine": (1.0, 3.4028235e38)}, None),
        ([0x5E, 0x93], {"codec": "affine8", "affine": (2.0**120, 3.4028235e38)}, "scale or zero"),
        ([0x5E, 0x93], {"codec": "affine8", "affine": (0.1, 0.0)}, "scale or zero"),
        ([0x5E, 0x93], {"codec": "affine8", "affine": (2.0**-130, 0.0)}, "scale or zero"),
        ([0x5E, 0x93], {"lse": math.inf}, "lse"),
        ([0x5E, 0x93], {"target": math.inf}, "target_logit"),
        ([0x5E, 0x93], {"target": -math.inf}, None),
        ([0x5E, 0x93], {"target": math.nan}, None),
        ([0x5E, 0x93], {"rest": math.inf}, r"rest_lse is \+inf"),
        ([0x5E, 0x93], {"rest": -math.inf}, None),
        ([0x5E, 0x93], {"rest": math.nan}, None),
    ],
)
def test_store_codec_refuses_hand_made_rows(words, options, match):
    options = {"values": [0, 0, 0, 0]} | options
    if match is None:
        hand_made(20, words, **options)
        return
    with pytest.raises(RowDataError, match=match):
        hand_made(20, words, **options)


@pytest.mark.parametrize("codec", ["affine8", "affine6"])
def test_store_codec_notices_every_flipped_bit_of_a_row(codec):
    encoded = encode([[2, 3, 9, 17]], [[1, 2, 3, 4]], vocab_size=20, codec=codec, first_row=0, rest=[[math.nan]])
    arrays = shard_arrays(encoded, 20, codec)
    for name in ("row_checksums", "lse", "target_logit", "affine", "id_words", "values", "rest_lse"):
        for bit in range(arrays[name].nbytes * 8):
            damaged = arrays[name].copy()
            damaged.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << (bit % 8)
            # The byte behind an affine6 row is not part of it, and must be 0.
            outside = codec == "affine6" and name == "values" and bit >= 24
            with pytest.raises(RowDataError if outside else RowChecksumError):
                decode(arrays | {name: damaged}, vocab_size=20, codec=codec, width=4)


def test_store_codec_notices_swapped_rows():
    encoded = encode([[1, 2], [3, 4]], [[0, 0], [0, 0]], vocab_size=10)
    arrays = shard_arrays(encoded, 10)
    swapped = arrays | {
        "id_words": arrays["id_words"].reshape(2, -1)[::-1].reshape(-1).copy(),
        "row_checksums": arrays["row_checksums"][::-1].copy(),
    }
    with pytest.raises(RowChecksumError, match="row 0"):
        decode(swapped, vocab_size=10, codec="float32", width=2)


@pytest.mark.parametrize(
    ("name", "offsets"),
    [
        ("entry_offsets", [0, 5, 4]),
        ("entry_offsets", [-1, 2, 4]),
        ("entry_offsets", [0, 2, 5]),
        ("entry_offsets", [0, 2, 2**62]),
        ("entry_offsets", [-(2**62), 2**62, 4]),
        ("entry_offsets", [0, 0, 4]),
        ("id_word_offsets", [0, 9, 2]),
        ("id_word_offsets", [-(2**63), 1, 2]),
        ("id_word_offsets", [0, 1, 2**63 - 1]),
        ("id_word_offsets", [0, 0, 2]),
        ("entry_offsets", [0, 2, 2**63 - 1]),
        ("entry_offsets", [2**61, 2**61 + 2, 2**61 + 4]),
    ],
)
@pytest.mark.parametrize("codec", ["float32", "affine6"])
def test_store_codec_refuses_offsets(name, offsets, codec):
    encoded = encode([[1, 2], [3, 4]], [[0, 0], [0, 0]], vocab_size=10, codec=codec)
    arrays = shard_arrays(encoded, 10, codec)
    with pytest.raises(ShardIndexError, match="offsets"):
        decode(arrays | {name: np.array(offsets, np.int64)}, vocab_size=10, codec=codec, width=2)


def test_store_codec_refuses_a_row_wider_than_the_output():
    arrays = shard_arrays(encode([[1, 2]], [[0, 0]], vocab_size=10), 10)
    with pytest.raises(ShardIndexError):
        decode(arrays, vocab_size=10, codec="float32", width=1)


def test_store_codec_uniform_shard_shorter_than_its_rows():
    arrays = shard_arrays(encode([[1, 2], [3, 4]], [[0, 0], [0, 0]], vocab_size=10), 10)
    for name in ("id_words", "values"):
        with pytest.raises(StoreError):
            decode(arrays | {name: arrays[name][:-1].copy()}, vocab_size=10, codec="float32", width=2, top_k=2)


def test_store_codec_random_words_decode_to_valid_ids_or_raise():
    generator = np.random.default_rng(0)
    accepted = 0
    for _ in range(3000):
        vocab_size = int(generator.integers(1, 200)) if generator.random() < 0.9 else 2**31 - 1
        top_k = int(generator.integers(1, min(vocab_size, 12) + 1))
        low_bits, low_words, _ = oracle.id_layout(vocab_size, top_k)
        words = generator.integers(0, 2**32, row_words(vocab_size, top_k), np.uint32)
        if generator.random() < 0.9:
            # Nearly right: the bitmap holds top_k ones where ones may be, and no padding bit of the low part is set.
            words[low_words:] = 0
            for bit in generator.choice(top_k + math.ceil(vocab_size / 2**low_bits), top_k, replace=False):
                words[low_words + bit // 32] |= np.uint32(1 << (bit % 32))
            if low_words and top_k * low_bits % 32:
                words[low_words - 1] &= np.uint32((1 << (top_k * low_bits % 32)) - 1)
        try:
            ids, _ = hand_made(vocab_size, words.tolist(), [0.0] * top_k)
        except RowDataError:
            continue
        accepted += 1
        assert ids[0].tolist() == oracle.decode_ids(vocab_size, top_k, words).tolist()
        assert ids.min() >= 0
        assert ids.max() < vocab_size
        assert (np.diff(ids[0].astype(np.int64)) > 0).all()
    assert accepted > 100


@pytest.mark.parametrize(
    "change",
    [
        {"first": -1},
        {"first": 1},
        {"top_k": 11},
        {"top_k": -1},
        {"vocab_size": 0},
        {"vocab_size": 2**31},
        {"codec": "int4"},
        {"lse": np.zeros((2, 1), np.float32)},
        {"rest_lse": np.zeros((2, 1), np.float32)},
        {"target_logit": np.zeros(3, np.float32)},
        {"entry_offsets": np.zeros(1, np.int64)},
        {"out_logits": np.zeros((1, 3), np.float32)},
        {"affine": np.zeros((0, 2), np.float32), "codec": "affine8"},
    ],
)
def test_store_codec_binding_refuses_shapes_that_do_not_fit(change):
    arrays = shard_arrays(encode([[1, 2]], [[0, 0]], vocab_size=10), 10)
    arguments = {
        "vocab_size": 10,
        "codec": "float32",
        "top_k": 0,
        "first": 0,
        "entry_offsets": arrays["entry_offsets"],
        "id_word_offsets": arrays["id_word_offsets"],
        "id_words": arrays["id_words"],
        "values": arrays["values"],
        "affine": arrays["affine"],
        "lse": arrays["lse"],
        "rest_lse": np.zeros(0, np.float32),
        "target_logit": arrays["target_logit"],
        "checksums": arrays["row_checksums"],
        "out_ids": np.zeros((1, 2), np.int32),
        "out_logits": np.zeros((1, 2), np.float32),
    }
    assert _C.store_decode_rows(**arguments) == (-1, 0)
    with pytest.raises(ValueError, match="codec"):
        _C.store_decode_rows(**arguments | change)
