"""Stores damaged at random, by accident and on purpose: a named error, or exactly what was stored."""

from __future__ import annotations

from collections import Counter

import pytest
from support.store_fuzz import KINDS, fuzz

from slimkernels.store import shard

# What must have been among the outcomes of each kind for it to have been tried at all.
EXPECTED = {
    "bytes": {"as stored", "ManifestChecksumError", "ShardHeaderError", "ShardIndexError", "RowChecksumError"},
    "size": {"ShardSizeError", "NotAStoreError", "MissingShardError"},
    "manifest": {"as stored", "ManifestFieldError", "ShardNameError", "UnsupportedVersionError"},
    "text": {"ManifestSyntaxError", "ManifestFieldError"},
    "bomb": {"ManifestFieldError", "ShardSizeError"},
    "sealed": {"as stored", "ShardIndexError", "RowDataError", "DocumentDamagedError", "RowChecksumError"},
}


def assert_tried(outcomes: Counter) -> None:
    assert {kind.__name__ for kind, _ in KINDS} == {f"damage_{name}" for name in EXPECTED}
    for name, expected in EXPECTED.items():
        found = {outcome: count for (kind, outcome), count in outcomes.items() if kind == name}
        assert expected <= found.keys(), f"{name}: {found}"


def test_store_fuzz(tmp_path):
    outcomes = fuzz(tmp_path, 5000, seed=0)
    assert outcomes.total() == 5000
    assert_tried(outcomes)


class AnyHash:
    """Equal to every hash."""

    def __ne__(self, other: object) -> bool:
        return False


def test_store_fuzz_notices_a_reader_that_checks_less(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "document_hash", lambda input_ids: AnyHash())
    with pytest.raises(AssertionError, match=r"case \d+ .*is not what was stored"):
        fuzz(tmp_path, 3000, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_store_fuzz_of_100000_cases(tmp_path, seed):
    assert_tried(fuzz(tmp_path, 10_000, seed))
