"""The size of a store, as ``info`` reports it and as the layout promises it."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from support.store_cases import SETTINGS, random_case, random_teacher, write_store

from slimkernels.store import Store, StoreWriter, info
from slimkernels.store.format import ShardEntry, StoreSettings, shard_layout, shard_name
from slimkernels.store.manifest import manifest_content, seal_manifest


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
        "rest_lse_rows": 13,
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
            shard_name(i),
            0,
            id_words=29 * 511 * words,
            top_k=2458,
            rest_lse=True,
            head_checksum="0" * 32,
            checksum="0" * 32,
            **counts,
        )
        shards.append(dataclasses.replace(entry, bytes=shard_layout(settings_, entry).total_bytes))
    manifest = len(seal_manifest(manifest_content(settings_, tuple(shards))))
    rows = sum(entry.rows for entry in shards)
    assert rows > 100_000
    assert all(60 << 20 < entry.bytes < 68 << 20 for entry in shards)
    bits = 8 * (manifest + sum(entry.bytes for entry in shards)) / (rows * 2458)
    assert bits == pytest.approx(14.37, abs=0.01)
