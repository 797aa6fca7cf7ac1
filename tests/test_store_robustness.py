"""A damaged, hostile or interrupted store: the named error, or the right rows; never a wrong row and never a crash."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import store_killed_writer
from support import store_oracle as oracle
from support.store_cases import SETTINGS, assert_stored, random_case, write_store

from slimkernels.store import Store, StoreError, StoreWriter, errors, info, verify
from slimkernels.store.format import shard_layout
from slimkernels.store.manifest import seal_manifest, unseal_manifest

MANIFEST = "manifest.json"
SHARDS = ("shard-000000.safetensors", "shard-000001.safetensors")
# The tensors of a row in the order of its checksum.
_HASHED = ("lse", "target_logit", "affine", "id_words", "values", "rest_lse")


def small_cases():
    generator = torch.Generator().manual_seed(3)
    options = {"vocab_size": 19, "top_k": 3, "temperatures": (1.0,)}
    return [[random_case(4, 2, generator, **options)], [random_case(3, 2, generator, ragged=True, **options)]]


def write_small(path: Path, codec: str = "affine8") -> None:
    """Two shards of one document, the first uniform, the second ragged."""
    write_store(path, small_cases(), vocab_size=19, temperatures=(1.0,), codec=codec)


@pytest.fixture
def small(tmp_path) -> Path:
    write_small(tmp_path / "store")
    assert [entry.top_k for entry in Store(tmp_path / "store").shards] == [3, None]
    return tmp_path / "store"


def change_manifest(path: Path, change) -> None:
    """Applies ``change`` to the manifest's content and gives it the right checksum, as a hostile writer would."""
    content = unseal_manifest((path / MANIFEST).read_bytes())
    content = change(content) or content
    (path / MANIFEST).write_bytes(seal_manifest(content))


def tensor_span(path: Path, number: int, name: str) -> tuple[int, int]:
    """Where a tensor lies in its shard."""
    store = Store(path)
    (spec,) = (spec for spec in shard_layout(store.settings, store.shards[number]).tensors if spec.name == name)
    return spec.start, spec.stop


def change_shard(path: Path, number: int, position: int, value: bytes, *, rows: bool = False) -> None:
    """Overwrites bytes of a shard and gives the shard (and its rows) the right checksums, as a hostile writer would."""
    store = Store(path)
    layout = shard_layout(store.settings, store.shards[number])
    data = bytearray((path / SHARDS[number]).read_bytes())
    data[position : position + len(value)] = value
    if rows:
        arrays = {spec.name: np.frombuffer(data, np.uint8)[spec.start : spec.stop] for spec in layout.tensors}
        parts = [arrays[name].reshape(2, -1) for name in _HASHED if name in arrays]
        for r in range(2):
            h = r
            for part in parts:
                h = oracle.xxh64(part[r].tobytes(), h)
            arrays["row_checksums"][8 * r : 8 * r + 8] = np.frombuffer(h.to_bytes(8, "little"), np.uint8)
    (path / SHARDS[number]).write_bytes(data)

    def reseal(content):
        content["shards"][number]["head_checksum"] = oracle.blake(bytes(data[: layout.head_bytes]))
        content["shards"][number]["checksum"] = oracle.blake(bytes(data))

    change_manifest(path, reseal)


def seal_text(text: bytes) -> bytes:
    """Gives a manifest's text, its checksum digits 0, the right ones."""
    return text[:16] + oracle.blake(text).encode() + text[48:]


def test_store_verify_notices_every_flipped_byte(small):
    choose = random.Random(0)
    for file in (MANIFEST, *SHARDS):
        path = small / file
        original = path.read_bytes()
        for position in range(len(original)):
            damaged = bytearray(original)
            damaged[position] ^= 1 << choose.randrange(8) if position % 2 else choose.randrange(1, 256)
            path.write_bytes(damaged)
            with pytest.raises(StoreError) as raised:
                verify(small)
            assert raised.value.file == file, f"byte {position} of {file}: {raised.value}"
        path.write_bytes(original)
    verify(small)


def test_store_verify_notices_every_truncation(small):
    for file in (MANIFEST, *SHARDS):
        path = small / file
        original = path.read_bytes()
        sizes = set(range(0, len(original), 97)) | set(range(64)) | {len(original) - i for i in range(1, 9)}
        if file != MANIFEST:
            number = SHARDS.index(file)
            store = Store(small)
            spans = [(s.start, s.stop) for s in shard_layout(store.settings, store.shards[number]).tensors]
            sizes |= {edge + i for span in spans for edge in span for i in (-1, 0, 1)}
        for size in sizes - {len(original), len(original) + 1}:
            path.write_bytes(original[:size])
            with pytest.raises(StoreError) as raised:
                Store(small)
            assert raised.value.file == file
        for extra in (b"\0", b" ", b"\n", original):
            path.write_bytes(original + extra)
            with pytest.raises(StoreError):
                Store(small)
        path.write_bytes(original)
    verify(small)


@pytest.mark.parametrize("file", SHARDS)
def test_store_reads_the_right_rows_or_raises_for_every_flipped_byte(small, file):
    path = small / file
    original = path.read_bytes()
    cases = [case for shard in small_cases() for case in shard]
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        raised = 0
        for i, case in enumerate(cases):
            try:
                document = Store(small)[i]
            except StoreError as error:
                raised += error.file == file
            else:
                assert_stored(document, case)
        assert raised, f"nobody noticed byte {position}"


@pytest.mark.parametrize(
    ("number", "name", "index", "value"),
    [
        (0, "document_row_offsets", 0, 1),
        (0, "document_row_offsets", 0, -1),
        (0, "document_row_offsets", 1, 1),
        (0, "document_row_offsets", 1, 2**62),
        (0, "document_token_offsets", 0, 2),
        (0, "document_token_offsets", 1, -(2**63)),
        (1, "entry_offsets", 0, -1),
        (1, "entry_offsets", 1, 0),
        (1, "entry_offsets", 1, 2**40),
        (1, "entry_offsets", 2, 2**40),
        (1, "id_word_offsets", 1, 0),
        (1, "id_word_offsets", 2, 1),
        (0, "positions", 0, 0),
        (0, "positions", 0, -7),
        (0, "positions", 1, 4),
        (0, "positions", 1, 1),
    ],
)
def test_store_hostile_index(small, number, name, index, value):
    size = 4 if name == "positions" else 8
    if (name, index, value) == ("positions", 1, 1):
        change_shard(small, number, tensor_span(small, number, name)[0], (2).to_bytes(4, "little"))
    position = tensor_span(small, number, name)[0] + size * index
    change_shard(small, number, position, value.to_bytes(size, "little", signed=True))
    for use in (verify, lambda path: Store(path)[number], lambda path: Store(path).find([1])):
        with pytest.raises(errors.ShardIndexError, match="its index is damaged") as raised:
            use(small)
        assert raised.value.file == SHARDS[number]


def test_store_hostile_id_word_offset_inside_the_shard(tmp_path):
    """An offset that is ascending and in range but not the row's own is found when the row is read."""
    generator = torch.Generator().manual_seed(0)
    case = random_case(5, 3, generator, vocab_size=300, top_k=20, ragged=True, temperatures=(1.0,))
    write_store(tmp_path, [[case]], vocab_size=300, temperatures=(1.0,))
    position = tensor_span(tmp_path, 0, "id_word_offsets")[0] + 8
    change_shard(tmp_path, 0, position, (1).to_bytes(8, "little"))
    with pytest.raises(errors.ShardIndexError, match="document 0, row 0"):
        verify(tmp_path)


def test_store_hostile_tokens(small):
    start, _ = tensor_span(small, 0, "input_ids")
    change_shard(small, 0, start, (19).to_bytes(4, "little"))
    with pytest.raises(errors.DocumentDamagedError, match="not those that were written"):
        verify(small)
    stop = tensor_span(small, 0, "input_ids")[1]
    data = (small / SHARDS[0]).read_bytes()[start:stop]
    change_shard(small, 0, tensor_span(small, 0, "document_hashes")[0], hashlib.blake2b(data, digest_size=16).digest())
    with pytest.raises(errors.DocumentDamagedError, match=r"document 0: .*outside \[0, 19\)"):
        verify(small)


def test_store_document_twice(tmp_path):
    for name in ("a", "b"):
        write_small(tmp_path / name)
    shutil.copy(tmp_path / "b" / SHARDS[0], tmp_path / "a" / "shard-000002.safetensors")
    change_manifest(
        tmp_path / "a",
        lambda content: content["shards"].append(content["shards"][0] | {"file": "shard-000002.safetensors"}),
    )
    with pytest.raises(errors.DuplicateDocumentError, match="is document 0 again") as raised:
        verify(tmp_path / "a")
    assert (raised.value.file, raised.value.document) == ("shard-000002.safetensors", 2)


def set_shard(**fields):
    return lambda content: content["shards"][0].update(fields)


def set_top(**fields):
    return lambda content: content.update(fields)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        *[
            (set_shard(file=file), errors.ShardNameError)
            for file in (
                "../shard-000000.safetensors",
                "/etc/passwd",
                "a/../shard-000000.safetensors",
                "./shard-000000.safetensors",
                "shard-000001.safetensors",
                "shard-000000.safetensors\0",
                "shard-0.safetensors",
                "",
                None,
                7,
                ["shard-000000.safetensors"],
            )
        ],
        (lambda content: content["shards"].append(content["shards"][0]), errors.ShardNameError),
        (lambda content: content["shards"].reverse(), errors.ShardNameError),
        *[
            (set_shard(**{name: value}), errors.ManifestFieldError)
            for name in ("bytes", "documents", "tokens", "rows", "entries", "id_words", "top_k")
            for value in (-1, 0, 2**47, 2**48, 2**63, 10**400, True, 1.0, "1", [], {})
        ],
        *[
            (set_shard(**{name: value}), errors.ManifestFieldError)
            for name in ("checksum", "head_checksum")
            for value in ("", "0" * 31, "0" * 33, "A" * 32, "0" * 32 + "\n", None, 5)
        ],
        (set_shard(checksum="0" * 32), errors.ShardChecksumError),
        (set_shard(head_checksum="0" * 32), errors.ShardIndexError),
        (set_shard(top_k=None), errors.ManifestFieldError),
        (set_shard(extra=1), errors.ManifestFieldError),
        *[(set_shard(rest_lse=value), errors.ManifestFieldError) for value in (False, None, 1, "true", [])],
        (lambda content: content["shards"][0].pop("rest_lse") and None, errors.ManifestFieldError),
        (set_top(version=1), errors.ManifestFieldError),
        (lambda content: content["shards"][0].pop("rows") and None, errors.ManifestFieldError),
        (lambda content: content["shards"].insert(0, "shard"), errors.ManifestFieldError),
        (set_top(shards={}), errors.ManifestFieldError),
        (set_top(shards=None), errors.ManifestFieldError),
        (set_top(extra=1), errors.ManifestFieldError),
        (lambda content: content.pop("teacher") and None, errors.ManifestFieldError),
        (lambda content: content.pop("version") and None, errors.UnsupportedVersionError),
        *[(set_top(version=value), errors.UnsupportedVersionError) for value in (0, 4, True, 1.0, 2.0, "2", None)],
        *[(set_top(format=value), errors.ManifestFieldError) for value in ("other", None, 1)],
        *[
            (set_top(vocab_size=value), errors.ManifestFieldError)
            for value in (0, -1, 2**31, 2**70, 19.0, "19", None, True)
        ],
        (set_top(vocab_size=20), errors.ShardHeaderError),
        *[
            (set_top(temperatures=value), errors.ManifestFieldError)
            for value in ([], [2.0], [True], ["1"], "1", None, [1.0, 0], [1.0, -1], [1.0] * 65, [1, 10**400], {})
        ],
        *[(set_top(codec=value), errors.ManifestFieldError) for value in ("int4", None, ["affine8"], "float32")],
        *[(set_top(teacher=value), errors.ManifestFieldError) for value in (None, [], "teacher")],
        *[(set_top(tokenizer_fingerprint=value), errors.ManifestFieldError) for value in (None, 3, [])],
    ],
)
def test_store_hostile_manifest(small, change, error):
    change_manifest(small, change)
    with pytest.raises(error):
        verify(small)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda text: b"", errors.ManifestSyntaxError),
        (lambda text: text[:30], errors.ManifestSyntaxError),
        (lambda text: b" " + text, errors.ManifestSyntaxError),
        (lambda text: text.replace(b'"rows"', b'"rows": 2, "rows"', 1), errors.ManifestSyntaxError),
        (lambda text: text.replace(b'"version": 2', b'"version": 2, "version": 1'), errors.ManifestSyntaxError),
        (lambda text: text.replace(b'"version": 2', b'"version": NaN'), errors.ManifestSyntaxError),
        (lambda text: text.replace(b'"version": 2', b'"version": -Infinity'), errors.ManifestSyntaxError),
        (lambda text: text.replace(b'"version": 2', b'"version": ' + b"9" * 5000), errors.ManifestSyntaxError),
        (lambda text: text.replace(b'"version": 2', b'"version": 2,'), errors.ManifestSyntaxError),
        (lambda text: text.replace(b"tokenizer-1", b"tokenizer-\xff"), errors.ManifestSyntaxError),
        (lambda text: text.replace(b"tokenizer-1", "tokenizer-ä".encode()), errors.ManifestSyntaxError),
        (lambda text: text.replace(b'"version": 2', b'"version": ' + b"[" * 200000), errors.ManifestSyntaxError),
        (lambda text: text + b"{}", errors.ManifestSyntaxError),
        (lambda text: text.replace(b'"version": 2', b'"version": 2e999'), errors.UnsupportedVersionError),
        (lambda text: text.replace(b'"name": "teacher"', b'"name": 1e999'), errors.ManifestFieldError),
    ],
)
def test_store_hostile_manifest_text(small, change, error):
    text = (small / MANIFEST).read_bytes()
    changed = change(text[:16] + b"0" * 32 + text[48:])
    (small / MANIFEST).write_bytes(seal_text(changed) if changed[:16] == text[:16] and len(changed) > 48 else changed)
    with pytest.raises(error):
        verify(small)


def test_store_of_a_newer_version_is_named_as_such_whatever_else_it_holds(small):
    change_manifest(small, lambda content: {"version": 4, "format": content["format"], "shards_of_another_form": {}})
    for use in (verify, Store, info, lambda path: StoreWriter(path, **SETTINGS)):
        with pytest.raises(errors.UnsupportedVersionError, match="got 4: a newer release of slimkernels wrote"):
            use(small)


def test_store_hostile_rest_lse(small):
    position = tensor_span(small, 0, "rest_lse")[0] + 4
    plus_infinity = np.float32(np.inf).tobytes()
    change_shard(small, 0, position, plus_infinity)
    with pytest.raises(errors.RowChecksumError, match="row 1"):
        verify(small)
    change_shard(small, 0, position, plus_infinity, rows=True)
    with pytest.raises(errors.RowDataError, match=r"row 1: its rest_lse is \+inf"):
        verify(small)


def test_store_manifest_white_space_counts(small):
    text = (small / MANIFEST).read_bytes()
    (small / MANIFEST).write_bytes(text.replace(b'"version": 2', b'"version":\t2'))
    with pytest.raises(errors.ManifestChecksumError):
        verify(small)


def test_store_hostile_header(small):
    change_shard(small, 0, 8, b'{"__metadata__":{"format":"slimkernels-stora"')
    with pytest.raises(errors.ShardHeaderError):
        verify(small)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("junk", b""),
        (".hidden", b"x"),
        ("shard-000002.safetensors", b"x"),
        ("shard-000000.safetensors.tmp", b"x"),
        ("shard-000003.safetensors.tmp", b"x"),
        ("manifest.json.bak", b"x"),
        ("writer.lock", b"x"),
        ("folder", None),
        ("manifest.json.tmp", None),
    ],
)
def test_store_verify_notices_extra_files(small, name, content):
    if content is None:
        (small / name).mkdir()
    else:
        (small / name).write_bytes(content)
    with pytest.raises(errors.UnexpectedFileError) as raised:
        verify(small)
    assert raised.value.file == name
    Store(small)[0]


@pytest.mark.parametrize("file", SHARDS)
def test_store_verify_notices_missing_shards(small, file):
    data = (small / file).read_bytes()
    (small / file).unlink()
    for make in (None, Path.mkdir, os.mkfifo):
        if make is not None:
            make(small / file)
        for use in (verify, Store, info, lambda path: StoreWriter(path, **SETTINGS)):
            with pytest.raises(errors.MissingShardError) as raised:
                use(small)
            assert raised.value.file == file
        if make is not None:
            Path.rmdir(small / file) if make is Path.mkdir else (small / file).unlink()
    (small / file).write_bytes(data)
    verify(small)


def test_store_not_a_store(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / MANIFEST)
    for path in (tmp_path, tmp_path / "absent", tmp_path / "file", tmp_path / "fifo"):
        for use in (Store, verify, info):
            with pytest.raises(errors.NotAStoreError, match=r"manifest\.json"):
                use(path)
    assert not (tmp_path / "absent").exists()
    for path in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(errors.NotAStoreError, match="choose"):
            StoreWriter(path, **SETTINGS)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file"]


def test_store_shard_that_shrinks_while_open(small):
    store = Store(small)
    store[0]
    os.truncate(small / SHARDS[0], 100)
    with pytest.raises(errors.ShardSizeError, match="now"):
        store[0]


def test_store_leftovers_of_a_killed_writer(small):
    cases = [case for shard in small_cases() for case in shard]
    shard = (small / SHARDS[0]).read_bytes()
    temporary = small / "manifest.json.tmp"
    for leftovers in (
        {"shard-000002.safetensors.tmp": shard[:50]},
        {"shard-000002.safetensors.tmp": shard, "manifest.json.tmp": b""},
        {"shard-000002.safetensors": shard, "manifest.json.tmp": b"{"},
    ):
        for name, data in leftovers.items():
            (small / name).write_bytes(data)
        verify(small)
        for i, case in enumerate(cases):
            assert_stored(Store(small)[i], case)
        StoreWriter(small, **SETTINGS | {"vocab_size": 19, "temperatures": (1.0,)}).close()
        assert sorted(os.listdir(small)) == sorted([MANIFEST, "writer.lock", *SHARDS])
        assert not temporary.exists()
    # Killed before the first manifest had its name.
    fresh = small.parent / "fresh"
    fresh.mkdir()
    (fresh / "writer.lock").write_bytes(b"")
    (fresh / "manifest.json.tmp").write_bytes(b"{")
    StoreWriter(fresh, **SETTINGS).close()
    verify(fresh)


def test_store_two_writers_are_refused(tmp_path):
    first = StoreWriter(tmp_path, **SETTINGS)
    with pytest.raises(errors.StoreLockedError, match="another writer"):
        StoreWriter(tmp_path, **SETTINGS)
    first.close()
    second = StoreWriter(tmp_path, **SETTINGS)
    with pytest.raises(errors.StoreLockedError):
        StoreWriter(tmp_path, **SETTINGS)
    del second
    gc.collect()
    StoreWriter(tmp_path, **SETTINGS).close()


def test_store_big_endian_host_is_refused(small, monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    for use in (Store, verify, info, lambda path: StoreWriter(path, **SETTINGS)):
        with pytest.raises(errors.ByteOrderError, match="big-endian"):
            use(small)


class StoppedError(Exception):
    """Stands for the moment of a kill."""


@pytest.mark.parametrize("step", range(12))
def test_store_survives_a_stop_at_every_system_call(tmp_path, monkeypatch, step):
    """A flush that ends before its n-th fsync or rename leaves the old store or the new one, and can be repeated."""
    generator = torch.Generator().manual_seed(0)
    cases = [random_case(8, 3, generator) for _ in range(3)]
    write_store(tmp_path / "store", [cases[:1]])
    writer = StoreWriter(tmp_path / "store", **SETTINGS)
    writer.add(*cases[1])
    calls = 0

    def stopping(function):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls > step:
                raise StoppedError
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stopping(os.fsync))
        patch.setattr(os, "replace", stopping(os.replace))
        if step >= 8:
            writer.flush()
            assert calls == 7
            reported = 2
        else:
            reported = 1
            try:
                writer.flush()
                reported = 2
            except StoppedError:
                pass
    verify(tmp_path / "store")
    store = Store(tmp_path / "store")
    assert len(store) >= reported
    for document, case in zip(store, cases, strict=False):
        assert_stored(document, case)
    # What the killed process left, met by a new one.
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    with StoreWriter(tmp_path / "copy", **SETTINGS) as other:
        for case in cases:
            if case.input_ids not in other:
                other.add(*case)
    # The same writer tries again.
    writer.add(*cases[2])
    writer.close()
    for name in ("store", "copy"):
        verify(tmp_path / name)
        assert sorted(d.input_ids.tolist() for d in Store(tmp_path / name)) == sorted(
            case.input_ids.tolist() for case in cases
        )


@contextlib.contextmanager
def no_file_above(size: int):
    """Within the context, writing a file past this size fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("full", ["shard", "manifest"])
@pytest.mark.parametrize("room", [0.0, 0.01, 0.5, 1.0])
def test_store_full_disk(tmp_path, full, room):
    """A flush that cannot write all of a file says so, loses nothing, and succeeds when it is called again."""
    generator = torch.Generator().manual_seed(0)
    cases = [random_case(8, 3, generator) for _ in range(3)]
    # What the manifest says of the teacher makes it the larger of the two files.
    options = SETTINGS | ({} if full == "shard" else {"teacher": {"name": "teacher" * 1000}})
    write_store(tmp_path / "store", [cases[:1]], **options)
    write_store(tmp_path / "other", [cases[:1], cases[1:]], **options)
    shard, manifest = ((tmp_path / "other" / name).stat().st_size for name in (SHARDS[1], MANIFEST))
    writer = StoreWriter(tmp_path / "store", **options)
    for case in cases[1:]:
        writer.add(*case)
    largest = int(room * (shard - 1)) if full == "shard" else shard + int(room * (manifest - 1 - shard))
    for _ in range(2):
        with no_file_above(largest), pytest.raises(OSError, match="File too large"):
            writer.flush()
        verify(tmp_path / "store")
        assert_stored(Store(tmp_path / "store")[0], cases[0])
        assert len(Store(tmp_path / "store")) == 1
    writer.close()
    verify(tmp_path / "store")
    for document, case in zip(Store(tmp_path / "store"), cases, strict=True):
        assert_stored(document, case)


FULL_TMPFS = """
import errno, os, sys
sys.path.insert(0, {tests!r})
from support.store_cases import SETTINGS, assert_stored
from scripts.store_killed_writer import documents
from slimkernels.store import Store, StoreWriter, verify

filler = os.path.join({mount!r}, "filler")
with open(filler, "wb") as file:
    file.write(bytes(65536))
cases, written = documents(60), 0
writer = StoreWriter({mount!r} + "/store", **SETTINGS)
try:
    for case in cases:
        writer.add(*case)
        writer.flush()
        written += 1
except OSError as error:
    assert error.errno == errno.ENOSPC, error
assert 0 < written < len(cases), written
verify({mount!r} + "/store")
assert len(Store({mount!r} + "/store")) == written
os.unlink(filler)
for case in cases:
    if case.input_ids not in writer:
        writer.add(*case)
writer.close()
verify({mount!r} + "/store")
store = Store({mount!r} + "/store")
for document, case in zip(store, cases, strict=True):
    assert_stored(document, case)
print(written)
"""


def test_store_full_file_system(tmp_path):
    """The same on a file system of its own that is really full."""
    script = tmp_path / "full.py"
    script.write_text(FULL_TMPFS.format(tests=str(Path(__file__).parent), mount=str(tmp_path / "mount")))
    (tmp_path / "mount").mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=160k tmpfs {tmp_path}/mount"
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount], capture_output=True).returncode != 0:
        pytest.skip("this process may not mount a file system in a namespace of its own")
    command = [*unshare, f"{mount} && exec {sys.executable} {script}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_store_killed_writers_lose_nothing(tmp_path, kills):
    """SIGKILL at random moments: what was reported written is there, and the next writer completes the store."""
    count = 60
    cases = store_killed_writer.documents(count)
    command = [sys.executable, store_killed_writer.__file__, str(tmp_path), str(count), "5", str(kills)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        lines = iter(process.stdout.readline, "{}\n")
        seen = []
        for line in lines:
            assert line, "the writers' parent died"
            state = json.loads(line)
            path = tmp_path / state["store"]
            seen.append(state["reported"])
            if (path / MANIFEST).exists():
                verify(path)
                store = Store(path)
                assert len(store) >= state["reported"]
                for i, case in enumerate(cases[: len(store)]):
                    assert_stored(store[i], case)
            else:
                assert state["reported"] == 0
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert len(seen) == kills
    assert any(0 < reported < count for reported in seen), seen
    for number in range(kills // 2):
        path = tmp_path / f"store-{number}"
        verify(path)
        for document, case in zip(Store(path), cases, strict=True):
            assert_stored(document, case)
        assert sorted(os.listdir(path)) == sorted([MANIFEST, "writer.lock", *(e.file for e in Store(path).shards)])
