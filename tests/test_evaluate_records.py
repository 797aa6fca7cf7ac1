"""Record files: only an incomplete last line is lost, records are never mixed, and damaged lines are named."""

from __future__ import annotations

import pytest
from support.evaluation import make_record

from slimkernels.evaluate.records import RecordFile, content_key, read_records, write_records

RECORDS = [
    make_record(0, 'a "quoted" <b>\n\u2028ü answer is 3', candidates=({"text": "x", "spent": 3},)),
    make_record(1, "The answer is 1.", seed=2, choices=("a", "b"), published={"is_correct": 1}),
]


def test_round_trip(tmp_path):
    with RecordFile(tmp_path / "deep" / "a.jsonl") as file:
        for record in RECORDS:
            file.append(record)
    with RecordFile(tmp_path / "deep" / "a.jsonl") as file:
        assert list(file.records.values()) == RECORDS
        assert RECORDS[0].key in file
        assert "other" not in file
    write_records(tmp_path / "b.jsonl", RECORDS)
    assert read_records(tmp_path / "b.jsonl") == RECORDS
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "deep" / "a.jsonl").read_bytes()


def test_a_torn_last_line_is_dropped_wherever_it_was_torn(tmp_path):
    path = tmp_path / "a.jsonl"
    first, second = (record.to_line() for record in RECORDS)
    for length in range(0, len(second), 7):
        path.write_bytes(first + second[:length])
        assert read_records(path) == RECORDS[:1]
        with RecordFile(path) as file:
            assert list(file.records.values()) == RECORDS[:1]
            file.append(RECORDS[1])
        assert path.read_bytes() == first + second


def test_damage_before_the_last_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for bad in (b'{"key": 1\n', b'{"key": "1"}\n', b"[]\n", b"\n"):
        path.write_bytes(RECORDS[0].to_line() + bad + RECORDS[1].to_line())
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2, must be a record"):
            RecordFile(path)
        # Nothing was cut off.
        assert path.read_bytes().endswith(RECORDS[1].to_line())


def test_one_run_at_a_time(tmp_path):
    with RecordFile(tmp_path / "a.jsonl"), pytest.raises(BlockingIOError, match="being written by another process"):
        RecordFile(tmp_path / "a.jsonl")
    RecordFile(tmp_path / "a.jsonl").close()


def test_keys_depend_on_content_alone():
    assert content_key("m", {"a": 1, "b": 2}, None) == content_key("m", {"b": 2, "a": 1}, None)
    # Keys must be the same in every process and release, or old records would not be found.
    assert content_key("m", {"a": 1}, 0) == "4ea40a3005c7d592306a7cfa"
    assert len({content_key(*parts) for parts in (("a", "b"), ("ab",), ("a", "b", None), ("a", ["b"]))}) == 4
