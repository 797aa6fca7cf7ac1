"""Damages stores at random and reads them: the result must be a named error or exactly the stored data."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from support import store_oracle as oracle
from support.store_cases import begin_store, random_case, write_store

from slimkernels.store import Store, StoreError, verify
from slimkernels.store.codec import VALUE_BITS, document_hash
from slimkernels.store.format import ShardEntry, shard_layout
from slimkernels.store.manifest import seal_manifest, unseal_manifest

MANIFEST = "manifest.json"
SHARDS = ("shard-000000.safetensors", "shard-000001.safetensors")
VOCAB_SIZE = 19
# Time after which a case counts as a hang, and memory that all cases together may add.
SECONDS, MEMORY = 20, 1 << 30

_NUMBERS = (-1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**40, 2**47, 2**48 - 1, 2**48, 2**63, 2**64, 10**30, -(2**63))
_NAMES = (
    *("../shard-000000.safetensors", "/etc/passwd", "./shard-000000.safetensors", "a/../shard-000001.safetensors"),
    *("shard-000001.safetensors", "shard-000000.safetensors", "shard-000000.safetensors\0", "", "..", "decoy", "~"),
)
_VALUES = (*_NUMBERS, *_NAMES, None, True, False, 1.0, 0.5, -0.0, 1e308, [], {}, [1], {"a": 1}, "affine6", "0" * 32)


class Pristine(NamedTuple):
    """A store before it is damaged."""

    path: Path
    files: dict[str, bytes]
    # The bytes of everything that is read, for every document.
    documents: list[tuple[bytes, ...]]


def read(store: Store, index: int) -> tuple[bytes, ...]:
    """Returns the bytes of a document and its rows, read decoded and packed."""
    document, packed = store[index], store.packed(index)
    teacher = document.teacher
    tensors = [document.input_ids, document.positions, teacher.ids, teacher.logits, teacher.lse, teacher.target_logit]
    tensors += [] if teacher.rest_lse is None else [teacher.rest_lse]
    tensors += packed.teacher._tensors().values()
    plain = (t.view(torch.int16) if t.dtype == torch.bfloat16 else t for t in tensors)
    return tuple(tensor.numpy().tobytes() for tensor in plain)


def make_store(path: Path, codec: str, version: int, rests: tuple[bool, bool, bool]) -> Pristine:
    """Makes a store of a uniform and a ragged shard, and a shard outside of it that no name may reach.

    ``rests`` tells whether the documents of the first shard, and the first of the second, have a ``rest_lse``.
    """
    generator = torch.Generator().manual_seed(3)
    settings = {"vocab_size": VOCAB_SIZE, "temperatures": (1.0,), "codec": codec}
    options = {"vocab_size": VOCAB_SIZE, "top_k": 3, "temperatures": (1.0,)}
    one, two, three = ({"rest": rest, **options} for rest in rests)
    shards = [
        [random_case(4, 2, generator, **one), random_case(2, 1, generator, **two)],
        [random_case(6, 4, generator, ragged=True, **three), random_case(3, 0, generator, **options)],
    ]
    begin_store(path, version, **settings)
    write_store(path, shards, **settings)
    store = Store(path)
    assert [entry.top_k for entry in store.shards] == [3, None]
    assert [entry.rest_lse for entry in store.shards] == [version > 1 and any(rests[:2]), version > 1 and rests[2]]
    files = {name: (path / name).read_bytes() for name in (MANIFEST, *SHARDS)}
    (path.parent / SHARDS[0]).write_bytes(files[SHARDS[0]])
    return Pristine(path, files, [read(store, index) for index in range(len(store))])


def scramble(data: bytes, choose: random.Random) -> bytes:
    """Makes a few random changes: bits, runs of noise, runs of one byte, and moved pieces of the file."""
    changed = bytearray(data)
    for _ in range(choose.randint(1, 4)):
        start = choose.randrange(len(changed))
        length = min(len(changed) - start, choose.randint(1, 24))
        kind = choose.randrange(4)
        if kind == 0:
            changed[start : start + length] = choose.randbytes(length)
        elif kind == 1:
            changed[start : start + length] = bytes([choose.choice([0, 0xFF])]) * length
        elif kind == 2:
            other = choose.randrange(len(changed) - length + 1)
            changed[start : start + length] = changed[other : other + length]
        else:
            changed[start] ^= 1 << choose.randrange(8)
    return bytes(changed)


def damage_bytes(store: Pristine, choose: random.Random) -> dict[str, bytes | None]:
    """Changes random bytes of one file."""
    name = choose.choice([MANIFEST, *SHARDS, *SHARDS])
    data = store.files[name]
    # The header is most of such a small shard.
    untouched = 0 if name == MANIFEST or choose.random() < 0.2 else 8 + struct.unpack_from("<Q", data)[0]
    return {name: data[:untouched] + scramble(data[untouched:], choose)}


def damage_size(store: Pristine, choose: random.Random) -> dict[str, bytes | None]:
    """Truncates, extends, empties, removes or replaces a file."""
    name = choose.choice([MANIFEST, *SHARDS])
    data = store.files[name]
    kind = choose.randrange(5)
    if kind == 0:
        return {name: data[: choose.randrange(len(data))]}
    if kind == 1:
        return {name: data + choose.choice([b"\0", b"\n", choose.randbytes(9), data, bytes(1 << 16)])}
    if kind == 2:
        return {name: None}
    if kind == 3:
        return {name: store.files[choose.choice([MANIFEST, *SHARDS])]}
    return {SHARDS[0]: store.files[SHARDS[1]], SHARDS[1]: store.files[SHARDS[0]]}


def damage_manifest(store: Pristine, choose: random.Random) -> dict[str, bytes | None]:
    """Changes values in the manifest and corrects its checksum."""
    content = unseal_manifest(store.files[MANIFEST])
    for _ in range(choose.randint(1, 2)):
        where = content
        if choose.random() < 0.7 and isinstance(content.get("shards"), list) and content["shards"]:
            where = choose.choice(content["shards"])
        if not isinstance(where, dict) or not where:
            continue
        key = choose.choice(sorted(where))
        kind = choose.randrange(8)
        if kind == 0:
            del where[key]
        elif kind == 1:
            where[f"{key}2"] = where[key]
        elif kind == 2 and type(where[key]) is int:
            where[key] += choose.choice([-8, -4, -1, 1, 4, 8])
        elif kind == 3 and where is not content:
            shards = content["shards"]
            content["shards"] = choose.choice([shards[::-1], [], shards[:1], shards[1:], [*shards, where]])
        else:
            where[key] = choose.choice(_VALUES)
    return {MANIFEST: seal_manifest(content)}


def damage_text(store: Pristine, choose: random.Random) -> dict[str, bytes | None]:
    """Changes the text of the manifest, which may then not be JSON, and corrects its checksum."""
    text = store.files[MANIFEST]
    tail = scramble(text[49:], choose) if choose.random() < 0.7 else text[49:]
    if choose.random() < 0.5:
        at = choose.randrange(len(tail))
        tail = tail[:at] + choose.choice([b"[" * 3000, b"9" * 5000, b"NaN", b'"', b"}", b"\xff", b"{}"]) + tail[at:]
    text = text[:16] + b"0" * 32 + text[48:49] + tail
    return {MANIFEST: text[:16] + oracle.blake(text).encode() + text[48:]}


def damage_bomb(store: Pristine, choose: random.Random) -> dict[str, bytes | None]:
    """Gives a shard counts of any size that agree with each other and with its file size."""
    content = unseal_manifest(store.files[MANIFEST])
    number = choose.randrange(2)
    entry = content["shards"][number]
    rows = choose.choice([10**3, 10**6, 2**31, 2**40])
    entry["rows"], entry["documents"] = rows, choose.choice([1, rows])
    entry["tokens"] = entry["documents"] + rows + choose.choice([0, 1, 2**40])
    if entry["top_k"] is None:
        entry["entries"] = rows * choose.choice([1, 2, VOCAB_SIZE])
        entry["id_words"] = rows * choose.choice([1, 2, 2**10])
    else:
        entry["entries"], entry["id_words"] = 3 * rows, rows * entry["id_words"] // 3
    # The package computes the sizes, so that they agree.
    layout = shard_layout(Store(store.path).settings, ShardEntry(**entry))
    entry["bytes"] = layout.total_bytes
    changed: dict[str, bytes | None] = {MANIFEST: seal_manifest(content)}
    if layout.total_bytes < 1 << 22 and choose.random() < 0.5:
        changed[SHARDS[number]] = layout.header + bytes(layout.total_bytes - len(layout.header))
    elif choose.random() < 0.5:
        changed[SHARDS[number]] = layout.header + store.files[SHARDS[number]]
    return changed


def damage_sealed(store: Pristine, choose: random.Random) -> dict[str, bytes | None]:
    """Changes the bytes after the header of a shard, and corrects the checksums of rows, documents, index and file."""
    number = choose.randrange(2)
    plain = Store(store.path)
    layout = shard_layout(plain.settings, plain.shards[number])
    data = bytearray(store.files[SHARDS[number]])
    spans = {spec.name: (spec.start, spec.stop) for spec in layout.tensors}
    start, stop = spans[choose.choice(sorted(spans))]
    piece = scramble(bytes(data[start:stop]), choose)
    if choose.random() < 0.5:
        # One number instead of noise: a plausible offset or float.
        size = choose.choice([4, 8])
        at = choose.randrange(0, max(1, stop - start - size + 1), 4)
        number_bytes = struct.pack("<q", choose.choice([-1, 0, 1, 2, 3, 4, 18, 19, 2**31, 2**40, 2**62, -(2**63)]))
        piece = bytes(data[start:stop])
        piece = (piece[:at] + number_bytes[:size] + piece[at + size :])[: stop - start]
    data[start:stop] = piece
    with contextlib.suppress(IndexError, ValueError, struct.error):
        _seal_rows(data, plain, number, spans)
    content = unseal_manifest(store.files[MANIFEST])
    content["shards"][number]["head_checksum"] = oracle.blake(bytes(data[: layout.head_bytes]))
    content["shards"][number]["checksum"] = oracle.blake(bytes(data))
    return {SHARDS[number]: bytes(data), MANIFEST: seal_manifest(content)}


def _seal_rows(data: bytearray, plain: Store, number: int, spans: dict[str, tuple[int, int]]) -> None:
    """Rewrites the checksum of every row and the hash of every document whose offsets are valid."""
    entry, codec = plain.shards[number], plain.settings.codec

    def array(name: str, dtype: str) -> np.ndarray:
        return np.frombuffer(bytes(data[slice(*spans.get(name, (0, 0)))]), dtype)

    tokens, offsets = array("input_ids", "<i4"), array("document_token_offsets", "<i8")
    for d in range(entry.documents):
        at = spans["document_hashes"][0] + 16 * d
        if 0 <= offsets[d] < offsets[d + 1] <= len(tokens):
            data[at : at + 16] = document_hash(tokens[offsets[d] : offsets[d + 1]])
    words, values = array("id_words", "<u4"), array("values", "u1").tobytes()
    entry_offsets, word_offsets = array("entry_offsets", "<i8"), array("id_word_offsets", "<i8")
    for r in range(entry.rows):
        if entry.top_k is None:
            first, last = int(entry_offsets[r]), int(entry_offsets[r + 1])
            row_words = words[int(word_offsets[r]) : int(word_offsets[r + 1])]
        else:
            first, last = r * entry.top_k, (r + 1) * entry.top_k
            row_words = words.reshape(entry.rows, -1)[r]
        if not 0 <= first < last <= 1000:
            continue
        start = oracle.value_start(codec, r, first, ragged=entry.top_k is None)
        h = oracle.xxh64(array("lse", "<f4")[r : r + 1].tobytes(), r)
        h = oracle.xxh64(array("target_logit", "<f4")[r : r + 1].tobytes(), h)
        if "affine" in spans:
            h = oracle.xxh64(array("affine", "<f4")[2 * r : 2 * r + 2].tobytes(), h)
        h = oracle.xxh64(row_words.tobytes(), h)
        h = oracle.xxh64(values[start : start + oracle.row_bytes(codec, last - first)], h)
        if "rest_lse" in spans:
            h = oracle.xxh64(array("rest_lse", "<f4")[r : r + 1].tobytes(), h)
        at = spans["row_checksums"][0] + 8 * r
        data[at : at + 8] = h.to_bytes(8, "little")


def assert_well_formed(store: Store, index: int) -> None:
    """Checks the properties that every reader may rely on, whoever wrote the bytes."""
    document = store[index]
    teacher = document.teacher
    kept = teacher.ids >= 0
    assert (document.input_ids >= 0).all()
    assert (document.input_ids < store.vocab_size).all()
    assert (document.positions >= 1).all()
    assert (document.positions < len(document.input_ids)).all()
    assert (document.positions.diff() > 0).all()
    assert (teacher.ids < store.vocab_size).all()
    assert ((teacher.ids.diff(dim=-1) > 0) | ~kept[:, 1:]).all()
    assert kept[:, 0].all()
    assert not (kept[:, 1:] & ~kept[:, :-1]).any()
    assert teacher.logits[kept].isfinite().all()
    assert teacher.lse.isfinite().all()
    assert teacher.rest_lse is None or not teacher.rest_lse.isposinf().any()


# Damage that does not correct the checksums.
_ACCIDENTS = (damage_bytes, damage_size)
# Only the last may return rows that were never stored, because it corrects the checksums, which are not secret.
KINDS: tuple[tuple[Callable, int], ...] = (
    (damage_bytes, 5),
    (damage_size, 2),
    (damage_manifest, 4),
    (damage_text, 2),
    (damage_bomb, 1),
    (damage_sealed, 3),
)


def run_case(store: Pristine, choose: random.Random) -> tuple[str, str]:
    """Damages, reads and repairs a store; returns the kind of damage, and an error's name or "as stored"."""
    damage = choose.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])[0]
    changed = damage(store, choose)
    opened = None
    # An open store does not read the manifest again.
    if choose.random() < 0.4 and changed.keys() - {MANIFEST}:
        opened = Store(store.path)
        if choose.random() < 0.5:
            read(opened, choose.randrange(len(store.documents)))
    outcome = "as stored"
    try:
        for name, data in changed.items():
            if data is None:
                (store.path / name).unlink()
            else:
                # Written in place, so that an open store sees the change.
                with open(store.path / name, "r+b") as file:
                    file.write(data)
                    file.truncate()
        outcome = _read_all(store, opened, damage)
        if damage in _ACCIDENTS:
            _check_verify(store, changed)
    finally:
        for name in changed:
            (store.path / name).write_bytes(store.files[name])
    return damage.__name__.removeprefix("damage_"), outcome


def _read_all(store: Pristine, opened: Store | None, damage: Callable) -> str:
    outcome = "as stored"
    try:
        reader = opened or Store(store.path)
    except StoreError as error:
        return type(error).__name__
    for index in range(min(len(reader), len(store.documents))):
        try:
            if damage is damage_sealed:
                assert_well_formed(reader, index)
            else:
                # Other counts in a manifest with a correct checksum renumber the documents of later shards.
                known = [store.documents[index]] if damage in _ACCIDENTS else store.documents
                assert read(reader, index) in known, f"document {index} is not what was stored"
        except StoreError as error:
            outcome = type(error).__name__
    return outcome


def _check_verify(store: Pristine, changed: dict[str, bytes | None]) -> None:
    """Checks that damage without corrected checksums is never accepted, unless it changed nothing."""
    try:
        verify(store.path)
    except StoreError:
        return
    assert all(data == store.files[name] for name, data in changed.items()), "verify passed over a damaged file"


@contextlib.contextmanager
def guarded() -> Iterator[Callable[[], None]]:
    """Turns a hang into an exception, and an allocation that no small store needs into a MemoryError."""

    def hang(*_: object) -> None:
        raise AssertionError(f"a case took more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    try:
        yield lambda: signal.setitimer(signal.ITIMER_REAL, SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def fuzz(path: Path, cases: int, seed: int) -> Counter[tuple[str, str]]:
    """Runs cases, each with its own seed, and counts the outcomes of each kind of damage."""
    stores = [make_store(path / codec / "store", codec, 2, (True, True, True)) for codec in VALUE_BITS]
    for name, version, rests in (
        ("first version", 1, (True, True, True)),
        ("with and without rest_lse", 2, (True, False, False)),
        ("without rest_lse", 2, (False, False, False)),
    ):
        stores.append(make_store(path / name / "store", "affine8", version, rests))
    outcomes: Counter[tuple[str, str]] = Counter()
    with guarded() as start_clock:
        for number in range(seed * 10**7, seed * 10**7 + cases):
            choose = random.Random(number)
            start_clock()
            try:
                outcomes[run_case(choose.choice(stores), choose)] += 1
            except Exception as error:
                raise AssertionError(f"case {number} (seed {seed}) ended in {error!r}") from error
    return outcomes
