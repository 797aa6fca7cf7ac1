"""A store of parts is one store to its readers, and several ranks fill it without waiting for each other."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.store_cases import SETTINGS, Case, assert_stored, random_case, write_store

from slimkernels.store import RankWriter, Store, StoreWriter, errors, info, rank_writer, verify, verify_complete
from slimkernels.store.codec import document_hash
from slimkernels.store.format import part_name, part_of
from slimkernels.store.manifest import load_manifest, parts_content, seal_manifest

MANIFEST = "manifest.json"


def make_cases(count: int = 12) -> list[Case]:
    generator = torch.Generator().manual_seed(3)
    return [random_case(9, 4, generator, ragged=i % 3 == 0) for i in range(count)]


def part_of_case(case: Case, num_parts: int) -> int:
    return part_of(document_hash(case.input_ids.numpy().astype("int32")), num_parts)


def write_rank(path: Path, cases: list[Case], **options) -> int:
    """Adds what belongs to one rank and is missing; the number added."""
    added = 0
    with RankWriter(path, **SETTINGS | options) as writer:
        for case in cases:
            if writer.part_of(case.input_ids) is not None and case.input_ids not in writer:
                writer.add(*case)
                added += 1
    return added


def write_parts(path: Path, cases: list[Case], num_parts: int = 3) -> Path:
    for rank in range(num_parts):
        write_rank(path, cases, rank=rank, num_ranks=num_parts)
    return path


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_ranks_fill_one_store(tmp_path) -> None:
    cases = make_cases()
    path = write_parts(tmp_path / "store", cases)
    verify(path)
    assert verify_complete(path, [case.input_ids.tolist() for case in cases]) == 12
    store = Store(path)
    assert (store.num_parts, len(store), store.num_rows) == (3, 12, 48)
    assert [store.manifest[name] for name in ("parts", "vocab_size", "selection")] == [3, 97, SETTINGS["selection"]]
    # Part after part, and within a part as added.
    ordered = sorted(cases, key=lambda case: part_of_case(case, 3))
    assert len({part_of_case(case, 3) for case in cases}) == 3
    for index, (document, case) in enumerate(zip(store, ordered, strict=True)):
        assert_stored(document, case)
        assert store.find(case.input_ids) == index
        assert torch.equal(store.packed(index).input_ids, case.input_ids)
    for part in range(3):
        mine = [case for case in ordered if part_of_case(case, 3) == part]
        for document, case in zip(Store(path / part_name(part)), mine, strict=True):
            assert_stored(document, case)
    content = info(path)
    assert (content["parts"], content["documents"], content["shards"]) == (3, 12, 3)
    assert content["bytes"] == sum(len(data) for data in tree(path).values())


def test_the_number_of_ranks_changes_nothing(tmp_path) -> None:
    cases = make_cases(30)
    write_parts(tmp_path / "three", cases)
    assert write_rank(tmp_path / "one", cases, num_parts=3) == 30
    assert tree(tmp_path / "three") == tree(tmp_path / "one")
    # Half with two ranks, the rest with five, two of which have nothing to do.
    other = tmp_path / "other"
    for rank in range(2):
        write_rank(other, cases[:15], rank=rank, num_ranks=2, num_parts=3)
    added = [write_rank(other, cases, rank=rank, num_ranks=5) for rank in range(5)]
    assert sum(added) == 15
    assert added[3:] == [0, 0]
    verify(other)
    for document, case in zip(Store(other), sorted(cases, key=lambda case: part_of_case(case, 3)), strict=True):
        assert_stored(document, case)


def test_one_part_is_an_ordinary_store(tmp_path) -> None:
    cases = make_cases(4)
    for options in ({}, {"num_parts": 1}, {"num_parts": 1, "num_ranks": 2}):
        path = tmp_path / str(len(options))
        assert write_rank(path, cases, **options) == 4
        write_store(tmp_path / "plain", [cases])
        assert tree(path) == tree(tmp_path / "plain")
        # A second rank has no part, and does not need the lock of the first.
        with StoreWriter(path, **SETTINGS), RankWriter(path, rank=1, num_ranks=2, **SETTINGS) as idle:
            assert idle.parts == ()
            assert idle.part_of(cases[0].input_ids) is None
        shutil.rmtree(tmp_path / "plain")


def test_a_rank_takes_its_own_documents_only(tmp_path) -> None:
    cases = make_cases()
    with RankWriter(tmp_path, rank=1, num_ranks=2, **SETTINGS) as writer:
        assert (writer.parts, writer.num_parts) == ((1,), 2)
        mine = [case for case in cases if writer.part_of(case.input_ids) == 1]
        others = [case for case in cases if writer.part_of(case.input_ids) is None]
        assert len(mine) + len(others) == 12
        assert mine
        with pytest.raises(ValueError, match="belongs to another rank"):
            writer.add(*others[0])
        writer.add(*mine[0])
        assert mine[0].input_ids in writer
        with pytest.raises(errors.DuplicateDocumentError):
            writer.add(*mine[0])
        assert len(Store(tmp_path)) == 0
        writer.flush()
        assert len(Store(tmp_path)) == len(writer) == 1
    with pytest.raises(ValueError, match="is closed"):
        writer.add(*mine[1])


def test_ranks_that_make_the_store_at_once(tmp_path) -> None:
    cases = make_cases(20)
    barrier = threading.Barrier(4)
    failures = []

    def fill(rank: int) -> None:
        barrier.wait()
        try:
            write_rank(tmp_path / "new" / "store", cases, rank=rank, num_ranks=4)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=fill, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    verify(tmp_path / "new" / "store")
    assert len(Store(tmp_path / "new" / "store")) == 20


class StoppedError(Exception):
    """Stands for the moment of a kill."""


def stopping(function, calls: Iterator[int], step: int):
    """The function, until it and those that share ``calls`` have been called ``step`` times."""

    def call(*arguments):
        if next(calls) >= step:
            raise StoppedError
        return function(*arguments)

    return call


def test_making_the_store_survives_a_stop_at_every_system_call(tmp_path, monkeypatch) -> None:
    cases = make_cases()
    step = 0
    while True:
        path, calls = tmp_path / str(step), itertools.count()
        with monkeypatch.context() as patch:
            # A killed process deletes nothing either.
            for name in ("fsync", "replace", "unlink"):
                patch.setattr(os, name, stopping(getattr(os, name), calls, step))
            try:
                RankWriter(path, num_parts=2, **SETTINGS).close()
            except StoppedError:
                is_stopped = True
            else:
                is_stopped = False
        if (path / MANIFEST).exists():
            verify(path)
            assert len(Store(path)) == 0
        else:
            assert is_stopped
            with pytest.raises(errors.NotAStoreError):
                Store(path)
        write_rank(path, cases, num_parts=2)
        verify(path)
        assert verify_complete(path, [case.input_ids.tolist() for case in cases]) == 12
        if not is_stopped:
            break
        step += 1
    # For each of two parts: its directory, its manifest's file, its rename; then the store's own.
    assert step >= 9


def test_a_part_that_is_held_is_waited_for(tmp_path, monkeypatch) -> None:
    cases = make_cases()
    write_parts(tmp_path, cases[:4], 2)
    holder = StoreWriter(tmp_path / part_name(1), **SETTINGS)
    write_rank(tmp_path, cases, rank=0, num_ranks=2)
    monkeypatch.setattr(rank_writer, "_LOCK_WAIT_S", 0.1)
    with pytest.raises(errors.StoreLockedError, match=r"part-00001 is held by another writer"):
        RankWriter(tmp_path, rank=1, num_ranks=2, **SETTINGS)
    monkeypatch.setattr(rank_writer, "_LOCK_WAIT_S", 30.0)
    timer = threading.Timer(0.3, holder.close)
    timer.start()
    write_rank(tmp_path, cases, rank=1, num_ranks=2)
    timer.join()
    assert len(Store(tmp_path)) == 12
    # A process alone is told at once, and what it had opened already is given up.
    with StoreWriter(tmp_path / part_name(1), **SETTINGS), pytest.raises(errors.StoreLockedError):
        RankWriter(tmp_path, **SETTINGS)
    StoreWriter(tmp_path / part_name(0), **SETTINGS).close()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"codec": "float32"}, errors.SettingsMismatchError, "was made with codec='affine8'"),
        ({"num_parts": 4}, errors.SettingsMismatchError, "was made with 3 parts, but num_parts=4"),
        ({"num_parts": 1}, errors.SettingsMismatchError, "was made with 3 parts, but num_parts=1"),
        ({"num_parts": 0}, ValueError, r"num_parts must be an int in \[1, 65536\], or None, got 0"),
        ({"rank": 2, "num_ranks": 2}, ValueError, "got rank=2 and num_ranks=2"),
        ({"rank": -1}, ValueError, "got rank=-1 and num_ranks=1"),
        ({"num_ranks": True}, ValueError, "num_ranks=True"),
    ],
)
def test_rank_writer_refuses(tmp_path, options, error, message) -> None:
    write_parts(tmp_path, make_cases())
    before = tree(tmp_path)
    with pytest.raises(error, match=message):
        RankWriter(tmp_path, **SETTINGS | options)
    assert tree(tmp_path) == before


def test_a_plain_writer_refuses_a_store_of_parts(tmp_path) -> None:
    write_parts(tmp_path, make_cases())
    with pytest.raises(errors.SettingsMismatchError, match="is a store of 3 parts: write it with a RankWriter"):
        StoreWriter(tmp_path, **SETTINGS)
    verify(tmp_path)


def test_parts_without_their_manifest_are_not_made_again(tmp_path) -> None:
    write_parts(tmp_path, make_cases())
    (tmp_path / MANIFEST).unlink()
    before = tree(tmp_path)
    for num_parts, message in ((3, "part-00000 holds documents, but .* has lost its manifest"), (2, "part-00002")):
        with pytest.raises(errors.NotAStoreError, match=message):
            RankWriter(tmp_path, num_parts=num_parts, **SETTINGS)
    assert tree(tmp_path) == before


def replace_manifest(path: Path, **changes) -> None:
    content = load_manifest(path)[1] | changes
    (path / MANIFEST).write_bytes(seal_manifest({key: value for key, value in content.items() if value is not None}))


def nest(path: Path) -> None:
    """Makes part 1 a store of parts itself."""
    settings = Store(path).settings
    shutil.rmtree(path / "part-00001")
    (path / "part-00001").mkdir()
    (path / "part-00001" / MANIFEST).write_bytes(seal_manifest(parts_content(settings, 1)))


def flip(path: Path) -> None:
    (shard,) = (path / "part-00001").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-30] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: shutil.rmtree(p / "part-00001"), errors.MissingPartError, "^part-00001: this part is missing"),
        (lambda p: (p / "part-00001" / MANIFEST).unlink(), errors.MissingPartError, "^part-00001: "),
        (
            lambda p: replace_manifest(p / "part-00001", codec="float32", shards=[]),
            errors.PartSettingsError,
            "part-00001/",
        ),
        (lambda p: replace_manifest(p, teacher={"name": "other"}), errors.PartSettingsError, "^part-00000/manifest"),
        (
            lambda p: replace_manifest(p, parts=0),
            errors.ManifestFieldError,
            r"parts must be an int in \[1, 65536\], got 0",
        ),
        (lambda p: replace_manifest(p, parts=True), errors.ManifestFieldError, "got True"),
        (lambda p: replace_manifest(p, parts=1 << 17), errors.ManifestFieldError, "got 131072"),
        (lambda p: replace_manifest(p, parts="3"), errors.ManifestFieldError, "got '3'"),
        (lambda p: replace_manifest(p, parts=4), errors.MissingPartError, "^part-00003: "),
        (lambda p: replace_manifest(p, shards=[]), errors.ManifestFieldError, r"has unknown \['shards'\]"),
        (lambda p: replace_manifest(p, parts=None), errors.ManifestFieldError, r"lacks \['shards'\]"),
        (nest, errors.ManifestFieldError, r"^part-00001/manifest.json: .*lacks \['shards'\]"),
        (
            lambda p: next((p / "part-00001").glob("shard*")).unlink(),
            errors.MissingShardError,
            "^part-00001/shard-000000",
        ),
    ],
)
def test_a_damaged_store_of_parts_is_not_opened(tmp_path, damage, error, message) -> None:
    write_parts(tmp_path, make_cases())
    damage(tmp_path)
    for use in (Store, verify, info):
        with pytest.raises(error, match=message):
            use(tmp_path)


def test_verify_looks_into_every_part(tmp_path) -> None:
    cases = make_cases()
    write_parts(tmp_path / "store", cases)
    verify(tmp_path / "store")

    def damaged(name: str) -> Path:
        return shutil.copytree(tmp_path / "store", tmp_path / name)

    path = damaged("flipped")
    flip(path)
    with pytest.raises(errors.RowChecksumError, match=r"^part-00001/shard-000000.safetensors, document \d+, row \d"):
        verify(path)
    for name in ("part-00003", "manifest.json.tmp", "shard-000000.safetensors", "part-00001/notes.txt"):
        path = damaged(name.replace("/", "-"))
        (path / name).write_bytes(b"")
        with pytest.raises(errors.UnexpectedFileError, match=f"^{name}: "):
            verify(path)
    # A document where its part's writer does not look for it, and one that is in its own part, too.
    extra = next(case for case in make_cases(20)[12:] if part_of_case(case, 3) == 1)
    stored = next(case for case in cases if part_of_case(case, 3) == 0)
    for name, case, error in (
        ("misplaced", extra, errors.MisplacedDocumentError),
        ("twice", stored, errors.DuplicateDocumentError),
    ):
        path = damaged(name)
        with StoreWriter(path / "part-00002", **SETTINGS) as writer:
            writer.add(*case)
        with pytest.raises(error, match=r"^part-00002"):
            verify(path)


@pytest.mark.parametrize("num_parts", [1, 3])
def test_verify_complete_names_what_is_missing(tmp_path, num_parts) -> None:
    cases = make_cases()
    write_rank(tmp_path, [case for i, case in enumerate(cases) if i not in (4, 7)], num_parts=num_parts)
    documents = [case.input_ids.tolist() for case in cases]
    digest = document_hash(cases[4].input_ids.numpy().astype("int32")).hex()
    with pytest.raises(errors.MissingDocumentError, match=f"2 of 12 documents .* document 5 .*hash {digest}, 9 tokens"):
        verify_complete(tmp_path, documents)
    # What has no label is never captured.
    assert verify_complete(tmp_path, [*documents[:4], [5], []]) == 4
    with pytest.raises(ValueError, match=r"must lie in \[0, 97\), got 1 to 97"):
        verify_complete(tmp_path, [[1, 97]])
    write_rank(tmp_path, cases)
    assert verify_complete(tmp_path, documents) == 12
