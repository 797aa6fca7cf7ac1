"""A store as a parquet file: what it holds, that Hugging Face datasets reads it, and the way back."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch
from support import teachers
from support.store_cases import SETTINGS, random_case

from slimkernels import SparseLogits
from slimkernels.cli import main
from slimkernels.exchange import export_parquet, import_parquet
from slimkernels.store import Document, Store, StoreWriter, verify
from slimkernels.store.errors import SettingsMismatchError
from slimkernels.teacher import tokenizer_fingerprint

pq = pytest.importorskip("pyarrow.parquet")

VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def tokenizer():
    return teachers.make_tokenizer()


def make_store(path, *, codec="float32", ragged=True, count=5, seed=0) -> Store:
    generator = torch.Generator().manual_seed(seed)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "tokenizer_fingerprint": tokenizer_fingerprint(teachers.make_tokenizer()),
        "teacher": {"name": "tiny", "revision": None},
        "selection": {"kind": "top_k", "value": 9, "top_k": 9},
        "temperatures": (1.0, 2.0),
        "codec": codec,
        "shard_rows": 20,
    }
    with StoreWriter(path, **settings) as writer:
        for number in range(count):
            length = 3 + 4 * number
            ids = torch.randint(VOCAB_SIZE, (length,), generator=generator)
            # Some positions alone; the second document has no row.
            positions = torch.arange(1, length, 1 + number % 2) if number != 1 else torch.arange(0)
            logits = 4 * torch.randn(len(positions), VOCAB_SIZE, generator=generator)
            kept = logits.topk(9).indices.sort(-1).values
            values = logits.gather(-1, kept)
            if ragged:
                gone = torch.arange(9) >= torch.randint(1, 10, (len(positions), 1), generator=generator)
                kept, values = kept.masked_fill(gone, -1), values.masked_fill(gone, 0)
            target_logit = logits.gather(-1, ids[positions][:, None])[:, 0]
            if len(target_logit):
                target_logit[0] = (math.nan, -math.inf)[number % 2]
            lse = torch.stack([(logits / t).logsumexp(-1) for t in (1.0, 2.0)], -1)
            writer.add(ids, positions, SparseLogits(kept.int(), values, lse, (1.0, 2.0), target_logit))
    return Store(path)


def assert_same(one: Document, other: Document) -> None:
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.positions, other.positions)
    width = one.teacher.top_k
    assert width == other.teacher.top_k
    for name in ("ids", "logits", "lse", "target_logit"):
        first, second = getattr(one.teacher, name).numpy(), getattr(other.teacher, name).numpy()
        assert first.tobytes() == second.tobytes(), name


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
def test_the_way_back_is_exact(codec, ragged, tokenizer, tmp_path) -> None:
    store = make_store(tmp_path / "a", codec=codec, ragged=ragged)
    assert export_parquet(store, tmp_path / "a.parquet") == 5
    report = import_parquet(tmp_path / "a.parquet", tmp_path / "b", tokenizer)
    # A document without a row says nothing.
    assert report[:3] == (4, store.num_rows, 1)
    verify(tmp_path / "b")
    back = Store(tmp_path / "b")
    assert back.settings == store.settings
    for document in back:
        assert_same(document, store[store.find(document.input_ids)])
    export_parquet(back, tmp_path / "b.parquet")
    with_rows = [record for record in pq.read_table(tmp_path / "a.parquet").to_pylist() if record["positions"]]
    assert str(pq.read_table(tmp_path / "b.parquet").to_pylist()) == str(with_rows)
    assert os.listdir(tmp_path).count("a.parquet.tmp") == 0


def test_the_way_back_of_quantised_logits_is_within_a_step(tmp_path) -> None:
    store = make_store(tmp_path / "a", codec="affine8")
    export_parquet(store, tmp_path / "a.parquet")
    import_parquet(tmp_path / "a.parquet", tmp_path / "b")
    import_parquet(tmp_path / "a.parquet", tmp_path / "c", codec="float32")
    back, exact = Store(tmp_path / "b"), Store(tmp_path / "c")
    assert (back.settings, exact.settings) == (store.settings, dataclasses.replace(store.settings, codec="float32"))
    for number, document in enumerate(exact):
        original = store[store.find(document.input_ids)]
        assert_same(document, original)
        span = (original.teacher.logits.amax(-1) - original.teacher.logits.amin(-1)).max()
        torch.testing.assert_close(
            back[number].teacher.logits, original.teacher.logits, atol=float(span) / 255 + 1e-5, rtol=0
        )
        assert torch.equal(back[number].teacher.ids, original.teacher.ids)


def test_the_file_holds_the_documented_columns(tmp_path) -> None:
    store = make_store(tmp_path / "a")
    export_parquet(tmp_path / "a", tmp_path / "a.parquet")
    schema = pq.read_schema(tmp_path / "a.parquet")
    assert {name: str(schema.field(name).type).replace("element", "item") for name in schema.names} == {
        "input_ids": "list<item: int32>",
        "positions": "list<item: int32>",
        "ids": "list<item: list<item: int32>>",
        "logits": "list<item: list<item: float>>",
        "lse": "list<item: list<item: float>>",
        "target_logit": "list<item: float>",
    }
    metadata = json.loads(schema.metadata[b"slimkernels"])
    assert metadata["temperatures"] == [1.0, 2.0]
    assert metadata["tokenizer_fingerprint"] == store.tokenizer_fingerprint
    for record, document in zip(pq.read_table(tmp_path / "a.parquet").to_pylist(), store, strict=True):
        assert record["input_ids"] == document.input_ids.tolist()
        assert record["positions"] == document.positions.tolist()
        for row, (ids, logits, lse) in enumerate(zip(record["ids"], record["logits"], record["lse"], strict=True)):
            kept = document.teacher.ids[row] >= 0
            assert ids == document.teacher.ids[row][kept].tolist()
            assert logits == document.teacher.logits[row][kept].tolist()
            assert lse == document.teacher.lse[row].tolist()
        np.testing.assert_array_equal(record["target_logit"], document.teacher.target_logit.numpy())


def test_hugging_face_datasets_reads_the_file(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    store = make_store(tmp_path / "a")
    export_parquet(store, tmp_path / "a.parquet")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "a.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(loaded) == 5
    assert loaded.column_names == ["input_ids", "positions", "ids", "logits", "lse", "target_logit"]
    record = loaded.with_format("numpy")[2]
    np.testing.assert_array_equal(record["input_ids"], store[2].input_ids)
    np.testing.assert_array_equal(np.stack(record["lse"]), store[2].teacher.lse)
    for kept, row in zip(record["ids"], store[2].teacher.ids, strict=True):
        np.testing.assert_array_equal(kept, row[row >= 0])
    # And what datasets writes of it, in several files, is read too.
    (tmp_path / "again").mkdir()
    for part in range(2):
        loaded.shard(2, part, contiguous=True).to_parquet(tmp_path / "again" / f"{part}.parquet")
    import_parquet(tmp_path / "again", tmp_path / "b", teachers.make_tokenizer(), temperatures=(1.0, 2.0))
    for document in Store(tmp_path / "b"):
        one = store[store.find(document.input_ids)]
        assert torch.equal(document.teacher.ids, one.teacher.ids)


def test_files_of_another_origin_need_a_tokenizer(tokenizer, tmp_path) -> None:
    import pyarrow

    record = {
        "input_ids": [5, 6, 7],
        "positions": [1, 2],
        "ids": [[6, 9], [7]],
        "logits": [[-0.5, -2.0], [-0.1]],
        "lse": [[0.0], [0.0]],
        "target_logit": [-0.5, -0.1],
    }
    pq.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="does not say which tokenizer its ids belong to"):
        import_parquet(tmp_path / "a.parquet", tmp_path / "store")
    import_parquet(tmp_path / "a.parquet", tmp_path / "store", tokenizer, codec="float32", teacher="big")
    store = Store(tmp_path / "store")
    assert (store.vocab_size, store.manifest["teacher"]) == (300, {"name": "big"})
    assert store[0].teacher.logits.tolist() == [[-0.5, -2.0], [pytest.approx(-0.1), 0.0]]


def test_import_parquet_refuses(tokenizer, tmp_path) -> None:
    import pyarrow

    make_store(tmp_path / "a")
    export_parquet(tmp_path / "a", tmp_path / "a.parquet")
    other = teachers.make_tokenizer()
    other.eos_token = other.bos_token
    with pytest.raises(ValueError, match="the tokenizer must be the file's"):
        import_parquet(tmp_path / "a.parquet", tmp_path / "b", other)
    with pytest.raises(ValueError, match="codec must be one of"):
        import_parquet(tmp_path / "a.parquet", tmp_path / "b", codec="int4")
    table = pq.read_table(tmp_path / "a.parquet")
    record = table.to_pylist()[2]
    for change, message in (
        ({"ids": None}, "record 1: ids must be a list of lists, got null"),
        ({"lse": [[1.0]] * len(record["lse"])}, r"record 1: a row of lse must .*=\(1.0, 2.0\), got 1"),
        ({"logits": record["logits"][1:]}, "record 1: logits must have length 10, got 9"),
        ({"positions": record["positions"][::-1]}, "record 1: positions must be ascending"),
        ({"input_ids": [300, *record["input_ids"][1:]]}, r"record 1: input_ids must lie in \[0, 300\)"),
        ({"logits": [[1e9] * len(row) for row in record["logits"]]}, "record 1: .* more probability than its lse"),
        ({"ids": [row[::-1] for row in record["ids"]]}, "record 1: .* not strictly ascending"),
    ):
        pq.write_table(pyarrow.Table.from_pylist([record | change], schema=table.schema), tmp_path / "bad.parquet")
        with pytest.raises(ValueError, match=message):
            import_parquet(tmp_path / "bad.parquet", tmp_path / f"bad-{len(message)}", tokenizer)
    pq.write_table(table.drop(["lse"]), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="has no column lse, only"):
        import_parquet(tmp_path / "bad.parquet", tmp_path / "b", tokenizer)
    assert not (tmp_path / "b").exists()
    make_store(tmp_path / "c", codec="bfloat16", count=1)
    with pytest.raises(SettingsMismatchError, match="was made with codec='bfloat16'"):
        import_parquet(tmp_path / "a.parquet", tmp_path / "c")


def test_an_export_that_fails_leaves_no_file(tmp_path) -> None:
    make_store(tmp_path / "a")
    shard = next((tmp_path / "a").glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    from slimkernels.store.errors import StoreError

    (tmp_path / "old.parquet").write_bytes(b"as it was")
    with pytest.raises(StoreError):
        export_parquet(tmp_path / "a", tmp_path / "old.parquet")
    assert (tmp_path / "old.parquet").read_bytes() == b"as it was"
    assert sorted(os.listdir(tmp_path)) == ["a", "old.parquet"]


def test_an_empty_store_has_an_empty_file(tmp_path) -> None:
    make_store(tmp_path / "a", count=0)
    assert export_parquet(tmp_path / "a", tmp_path / "a.parquet") == 0
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 0
    with pytest.raises(ValueError, match="at least one document, got none"):
        import_parquet(tmp_path / "a.parquet", tmp_path / "b")


@pytest.mark.parametrize("name", ["a", "a.csv", "a.parquet.tmp"])
def test_a_file_that_would_not_be_recognised_is_refused(tmp_path, name) -> None:
    make_store(tmp_path / "store")
    with pytest.raises(ValueError, match=r"path must end in \.parquet, by which data sets recognise such a file"):
        export_parquet(tmp_path / "store", tmp_path / name)
    assert not (tmp_path / name).exists()


def test_export_and_import_commands(tmp_path, capsys) -> None:
    make_store(tmp_path / "a")
    file = str(tmp_path / "a.parquet")
    assert main(["store", "export", str(tmp_path / "a"), file]) == 0
    assert f"wrote 5 documents to {file}" in capsys.readouterr().out
    assert main(["store", "import", "--format", "parquet", file, str(tmp_path / "b")]) == 0
    assert "added 4 documents" in capsys.readouterr().out
    assert Store(tmp_path / "b").settings == Store(tmp_path / "a").settings
    assert main(["store", "import", "--format", "axolotl", file, str(tmp_path / "c")]) == 2
    assert "--format axolotl needs --tokenizer" in capsys.readouterr().err


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch) -> None:
    import sys

    make_store(tmp_path / "a", count=1)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'slimkernels\[exchange\]'"):
        export_parquet(tmp_path / "a", tmp_path / "a.parquet")


def test_prompt_lengths_go_out_and_come_in(tmp_path) -> None:
    generator = torch.Generator().manual_seed(1)
    with StoreWriter(tmp_path / "store", **SETTINGS) as writer:
        for length in (0, 3):
            writer.add(*random_case(9, 4, generator), prompt_length=length)
    export_parquet(tmp_path / "store", tmp_path / "a.parquet")
    import_parquet(tmp_path / "a.parquet", tmp_path / "copy")
    assert [document.prompt_length for document in Store(tmp_path / "copy")] == [0, 3]


def test_export_to_a_name_that_no_reader_takes_for_parquet_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"must end in .parquet, by which data sets recognise .*a.jsonl"):
        export_parquet(tmp_path / "absent", tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


def test_import_knows_a_tokenizer_with_an_added_padding_token(tmp_path) -> None:
    make_store(tmp_path / "a")
    export_parquet(tmp_path / "a", tmp_path / "a.parquet")
    padded = teachers.make_tokenizer()
    padded.add_special_tokens({"pad_token": "<pad>"})
    import_parquet(tmp_path / "a.parquet", tmp_path / "b", tokenizer=padded)
    assert Store(tmp_path / "b").settings == Store(tmp_path / "a").settings
    padded.add_tokens("<new>")
    with pytest.raises(ValueError, match="the tokenizer must be the file's"):
        import_parquet(tmp_path / "a.parquet", tmp_path / "c", tokenizer=padded)
