"""``rest_lse`` in a store: exact for every codec, true when entries are dropped, and absent from version 1."""

from __future__ import annotations

import dataclasses
import math
import shutil
from typing import NamedTuple

import pytest
import torch
from support import store_oracle as oracle
from support.store_cases import SETTINGS, Case, assert_stored, begin_store, random_case, write_store

from slimkernels import SparseLogits, decode_logits
from slimkernels.store import RankWriter, Store, StoreWriter, collate_documents, info, verify
from slimkernels.store.format import part_name

CODECS = ("affine8", "affine6", "bfloat16", "float32")
ONE = {"temperatures": (1.0,)}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def without(case: Case) -> Case:
    return case._replace(teacher=dataclasses.replace(case.teacher, rest_lse=None))


class Peaked(NamedTuple):
    """Four rows of 2000 logits whose 1900 smallest hold a share below 1e-9, their largest 100, and a student's rows."""

    rows: torch.Tensor
    kept: SparseLogits
    student: torch.Tensor


def peaked() -> Peaked:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(4, 2000, generator=generator) + 20
    rows[:, :100] += 25
    wide = rows.double()
    kept = SparseLogits(
        torch.arange(100, dtype=torch.int32).repeat(4, 1),
        rows[:, :100],
        wide.logsumexp(-1, keepdim=True).float(),
        rest_lse=wide[:, 100:].logsumexp(-1, keepdim=True).float(),
    )
    return Peaked(wide, kept, torch.randn(4, 2000, generator=generator).double())


def ghost(kept_logits: torch.Tensor, rest_lse: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (N, K + 1) of the entries as they are read and of one outcome for all others, in float64."""
    return torch.cat([kept_logits.double(), rest_lse.double()], -1).log_softmax(-1)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("ragged", [False, True])
def test_rest_lse_comes_back_bit_for_bit(tmp_path, generator, codec, ragged):
    cases = [random_case(9 + i, 4 + i, generator, ragged=ragged) for i in range(4)]
    unknown = cases[1].teacher.rest_lse.clone()
    unknown[:2] = torch.tensor([[math.nan, 1.0], [-math.inf, math.nan]])
    cases[1] = cases[1]._replace(teacher=dataclasses.replace(cases[1].teacher, rest_lse=unknown))
    write_store(tmp_path, [cases[:3], cases[3:]], codec=codec)
    verify(tmp_path)
    store = Store(tmp_path)
    assert store.has_rest_lse
    for index, (case, (_, rows)) in enumerate(zip(cases, oracle.read_store(tmp_path), strict=True)):
        expected = case.teacher.rest_lse.numpy().tobytes()
        assert store[index].teacher.rest_lse.numpy().tobytes() == expected
        packed = store.packed(index).teacher
        assert packed.rest_lse.numpy().tobytes() == expected
        assert decode_logits(packed).rest_lse.numpy().tobytes() == expected
        assert b"".join(row.rest_lse.tobytes() for row in rows) == expected
        position = int(case.positions[1])
        assert store.row(index, position).rest_lse.numpy().tobytes() == case.teacher.rest_lse[1:2].numpy().tobytes()
    for documents in (store[:], [store.packed(index) for index in range(4)]):
        joined = collate_documents(documents)["teacher"].rest_lse
        assert torch.equal(joined.nan_to_num(9.0), torch.cat([c.teacher.rest_lse for c in cases]).nan_to_num(9.0))


@pytest.mark.parametrize("codec", CODECS)
def test_ghost_of_a_stored_peaked_teacher_is_that_of_its_rows(tmp_path, codec):
    case = peaked()
    with StoreWriter(tmp_path, **SETTINGS | ONE | {"vocab_size": 2000, "codec": codec}) as writer:
        writer.add(range(5), range(1, 5), case.kept)
    stored = Store(tmp_path)[0].teacher
    assert torch.equal(stored.rest_lse, case.kept.rest_lse)
    student = ghost(case.student[:, :100], case.student[:, 100:].logsumexp(-1, keepdim=True))

    def reverse_kl(teacher: torch.Tensor) -> torch.Tensor:
        return (student.exp() * (student - teacher)).sum(-1)

    truth = ghost(case.rows[:, :100], case.rows[:, 100:].logsumexp(-1, keepdim=True))
    assert (truth[:, -1].exp() < 1e-9).all()
    assert reverse_kl(truth).tolist() == pytest.approx([21.05, 20.76, 20.92, 20.76], abs=0.01)
    # The entries as read move by up to half a step of their row, and the rest by as much against them.
    spans = case.rows[:, :100].amax(-1) - case.rows[:, :100].amin(-1)
    steps = {
        "affine8": spans / 255,
        "affine6": spans / 63,
        "bfloat16": torch.tensor(0.25),
        "float32": torch.tensor(1e-5),
    }
    half_step = steps[codec].double() / 2
    read = ghost(stored.logits, stored.rest_lse)
    assert ((read - truth).abs().amax(-1) <= 2 * half_step).all()
    assert ((reverse_kl(read) - reverse_kl(truth)).abs() <= 2 * half_step).all()
    # 1 - the kept mass does not know this rest, neither of the rows nor of the store.
    for teacher in (case.kept, stored):
        tail = torch.log(-torch.expm1(teacher.logits.logsumexp(-1) - teacher.lse[:, 0]))
        assert not torch.allclose(tail.double(), truth[:, -1], rtol=0, atol=1.0)


def test_rows_with_and_without_rest_lse_share_a_store(tmp_path, generator):
    cases = [random_case(9, 4, generator) for _ in range(4)]
    mixed = [cases[0], without(cases[1]), without(cases[2]), cases[3]]
    write_store(tmp_path, [mixed[:2], mixed[2:3], mixed[3:]])
    verify(tmp_path)
    store = Store(tmp_path)
    assert [entry.rest_lse for entry in store.shards] == [True, False, True]
    for index, case in enumerate(mixed):
        assert_stored(store[index], case)
        assert store.packed(index).teacher.rest_lse.isnan().all() == (index in (1, 2))
    assert info(tmp_path)["rest_lse_rows"] == 12
    assert len(oracle.read_store(tmp_path)) == 4


def test_store_of_rows_without_rest_lse_has_none_and_takes_no_byte_for_it(tmp_path, generator):
    cases = [random_case(9, 4, generator) for _ in range(2)]
    write_store(tmp_path / "without", [[without(case) for case in cases]])
    write_store(tmp_path / "with", [cases])
    store = Store(tmp_path / "without")
    verify(store.path)
    assert not store.has_rest_lse
    assert store[0].teacher.rest_lse is None
    assert store.packed(1).teacher.rest_lse is None
    # 8 rows, 2 temperatures, 4 bytes; the rest of the difference is the header, whose size is a multiple of 8.
    sizes = [Store(tmp_path / name).shards[0].bytes for name in ("without", "with")]
    headers = [
        8 + int.from_bytes((tmp_path / name / "shard-000000.safetensors").read_bytes()[:8], "little")
        for name in ("without", "with")
    ]
    assert (sizes[1] - headers[1]) - (sizes[0] - headers[0]) == 8 * 2 * 4
    for name in ("without", "with"):
        on_disk = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
        assert info(tmp_path / name)["bytes_per_token"] == on_disk / 18


@pytest.mark.parametrize(("codec", "span"), [("affine8", 40.0), ("affine6", 30.0)])
@pytest.mark.parametrize("warmest", [1.0, 4.0])
def test_entries_that_are_dropped_add_their_mass_to_rest_lse(tmp_path, codec, span, warmest):
    temperatures = (1.0, warmest) if warmest > 1 else (1.0,)
    row = torch.tensor([[0.0, -1.0, -5 - span * warmest, -6 - span * warmest, -7 - span * warmest, -8.0]]).double()
    ids = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
    kept = {"known": row[:, 4:], "none": row[:, :0], "unknown": None}
    for name, others in kept.items():
        lse, rest_lse, expected = [], [], []
        for temperature in temperatures:
            all_of_row = row if others is None else torch.cat([row[:, :4], others], -1)
            lse.append((all_of_row / temperature).logsumexp(-1))
            rest_lse.append(torch.tensor([math.nan]) if others is None else (others / temperature).logsumexp(-1))
            dropped = row[:, 2:4] if others is None else torch.cat([row[:, 2:4], others], -1)
            expected.append(torch.tensor([math.nan]) if others is None else (dropped / temperature).logsumexp(-1))
        teacher = SparseLogits(
            ids,
            row[:, :4].float(),
            torch.stack(lse, -1).float(),
            temperatures,
            rest_lse=torch.stack(rest_lse, -1).float(),
        )
        settings = SETTINGS | {"temperatures": temperatures, "codec": codec}
        with StoreWriter(tmp_path / name, **settings) as writer:
            writer.add([5, 1], [1], teacher)
        stored = Store(tmp_path / name)[0].teacher
        assert stored.ids.tolist() == [[0, 1]]
        torch.testing.assert_close(
            stored.rest_lse, torch.stack(expected, -1).float(), rtol=0, atol=1e-5, equal_nan=True
        )
    # Without the field, nothing is made up.
    with StoreWriter(tmp_path / "without", **settings) as writer:
        writer.add([5, 1], [1], dataclasses.replace(teacher, rest_lse=None))
    assert Store(tmp_path / "without")[0].teacher.rest_lse is None


def test_store_of_version_1_is_continued_in_version_1(tmp_path, generator):
    cases = [random_case(9, 4, generator) for _ in range(3)]
    for name in ("old", "rows without"):
        begin_store(tmp_path / name, 1)
        for case in cases[:2]:
            write_store(tmp_path / name, [[case if name == "old" else without(case)]])
        with StoreWriter(tmp_path / name, **SETTINGS) as writer:
            assert cases[0].input_ids in writer
            writer.add(*cases[2])
        verify(tmp_path / name)
    store = Store(tmp_path / "old")
    assert store.manifest["version"] == 1
    assert not any("rest_lse" in entry for entry in store.manifest["shards"])
    assert not store.has_rest_lse
    assert store[2].teacher.rest_lse is None
    assert info(store.path)["rest_lse_rows"] == 0
    files = sorted(path.name for path in store.path.iterdir())
    for name in files:
        assert (tmp_path / "rows without" / name).read_bytes() == (store.path / name).read_bytes()
    # A new store of rows without the field differs in its manifest alone.
    write_store(tmp_path / "new", [[without(case)] for case in cases])
    assert Store(tmp_path / "new").manifest["version"] == 2
    for name in files:
        if name != "manifest.json":
            assert (tmp_path / "new" / name).read_bytes() == (store.path / name).read_bytes()


def test_parts_of_both_versions_are_one_store(tmp_path, generator):
    cases = [random_case(9, 4, generator) for _ in range(12)]
    with RankWriter(tmp_path / "new", num_parts=2, **SETTINGS) as writer:
        for case in cases:
            writer.add(*case)
    part = tmp_path / "new" / part_name(1)
    old = [case for case in cases if case.input_ids in Store(part)]
    new = [case for case in cases if case.input_ids not in Store(part)]
    assert old
    assert new
    shutil.rmtree(part)
    begin_store(part, 1)
    write_store(part, [old[1:]])
    verify(tmp_path / "new")
    # The part is continued in its own version.
    with RankWriter(tmp_path / "new", **SETTINGS) as writer:
        writer.add(*old[0])
    verify(tmp_path / "new")
    assert [Store(tmp_path / "new" / part_name(p)).manifest["version"] for p in range(2)] == [2, 1]
    store = Store(tmp_path / "new")
    for case in new:
        assert_stored(store[store.find(case.input_ids)], case)
    for case in old:
        index = store.find(case.input_ids)
        assert_stored(store[index], without(case))
        assert store[index].teacher.rest_lse.isnan().all()
        assert store.packed(index).teacher.rest_lse.isnan().all()
    batch = collate_documents(store[:])["teacher"]
    assert batch.rest_lse.isnan().any(-1).sum() == 4 * len(old)
    assert info(store.path)["rest_lse_rows"] == 4 * len(new)


def test_rows_can_be_changed_by_the_caller_once_they_are_added(tmp_path, generator):
    case = random_case(9, 4, generator)
    teacher = dataclasses.replace(
        case.teacher, **{name: getattr(case.teacher, name).clone() for name in ("lse", "target_logit", "rest_lse")}
    )
    with StoreWriter(tmp_path, **SETTINGS) as writer:
        writer.add(case.input_ids, case.positions, teacher)
        for name in ("lse", "target_logit", "rest_lse"):
            getattr(teacher, name).fill_(7.0)
    verify(tmp_path)
    assert_stored(Store(tmp_path)[0], case)


@pytest.mark.parametrize("codec", CODECS)
def test_store_keeps_rows_whose_mass_is_all_in_the_rest(codec, generator, tmp_path):
    """They come back without entries, decoded by the store and by the op, next to others and alone."""
    case = random_case(9, 4, generator)
    is_empty = torch.tensor([True, False, True, False])
    lse = case.teacher.lse.masked_fill(is_empty[:, None], 0.5)
    rows = dataclasses.replace(
        case.teacher,
        ids=case.teacher.ids.masked_fill(is_empty[:, None], -1),
        lse=lse,
        rest_lse=torch.where(is_empty[:, None], lse, case.teacher.rest_lse),
    )
    with StoreWriter(tmp_path, **SETTINGS, codec=codec) as writer:
        writer.add(case.input_ids, case.positions, rows)
        writer.add(case.input_ids.flip(0), case.positions[is_empty], rows[is_empty])
    verify(tmp_path)
    assert info(tmp_path)["quantisation_log_mass"] < 0.01
    store = Store(tmp_path)
    assert_stored(store[0], case._replace(teacher=rows), codec)
    assert store[1].teacher.ids.tolist() == [[-1], [-1]]
    assert torch.equal(store[1].teacher.rest_lse, store[1].teacher.lse)
    for index in (0, 1):
        packed = decode_logits(store.packed(index).teacher)
        assert torch.equal(packed.ids, store[index].teacher.ids)
        assert torch.equal(packed.logits, store[index].teacher.logits)
    # On the disk such a row is the entry of id 0 that the format page names.
    _, [first, second, *_] = oracle.read_store(tmp_path)[0]
    assert (first.ids.tolist(), first.logits.tolist()) == ([0], [-(2.0**127)])
    assert len(second.ids) == 6


def test_store_refuses_a_row_without_entries_whose_mass_is_elsewhere(generator, tmp_path):
    case = random_case(9, 2, generator)
    rows = dataclasses.replace(case.teacher, ids=torch.full_like(case.teacher.ids, -1))
    with StoreWriter(tmp_path, **SETTINGS) as writer, pytest.raises(ValueError, match=r"row 0 .* keeps no entry"):
        writer.add(case.input_ids, case.positions, rows)
