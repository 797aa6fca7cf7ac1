from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.helpers import assert_same_bits, random_problem, sparse_fields

from slimkernels import SparseLogits, topk_logits

INT = torch.int32


def record(leading_shape=(4,), top_k=3, *, temperatures=(1.0, 2.0), with_target_logit=True) -> SparseLogits:
    logits = torch.randn(*leading_shape, 20)
    target = torch.randint(20, leading_shape) if with_target_logit else None
    return topk_logits(logits, top_k, target=target, temperatures=temperatures)


def test_sparse_logits_describes_itself():
    sparse = record((2, 5), 3)
    assert (sparse.leading_shape, sparse.top_k, len(sparse)) == ((2, 5), 3, 2)
    assert sparse.device == torch.device("cpu")
    assert sparse.temperatures == (1.0, 2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sparse.ids = sparse.ids


def test_sparse_logits_lse_at_finds_the_column():
    sparse = record(temperatures=(1.0, 2.0, 0.1))
    for column, temperature in enumerate((1.0, 2.0, 0.1)):
        assert torch.equal(sparse.lse_at(temperature), sparse.lse[..., column])
    # A temperature that went through float32 is the same temperature.
    assert torch.equal(sparse.lse_at(float(torch.tensor(0.1))), sparse.lse[..., 2])
    with pytest.raises(ValueError, match=r"temperature=3\.0"):
        sparse.lse_at(3.0)


@pytest.mark.parametrize("with_target_logit", [True, False])
@pytest.mark.parametrize("leading_shape", [(), (4,), (2, 3), (2, 0, 3)])
def test_sparse_logits_flatten_and_reshape_are_inverse(leading_shape, with_target_logit):
    sparse = record(leading_shape, with_target_logit=with_target_logit)
    num_rows = math.prod(leading_shape)
    flat = sparse.flatten()
    assert (flat.leading_shape, flat.top_k, flat.lse.shape) == ((num_rows,), 3, (num_rows, 2))
    assert_same_bits(sparse_fields(flat.reshape(*leading_shape)), sparse_fields(sparse))
    assert (sparse.target_logit is None) == (not with_target_logit)


def test_sparse_logits_selects_rows():
    sparse = record((4, 2))
    for index in (1, -1, slice(1, 3), torch.tensor([3, 0]), torch.tensor([True, False, False, True]), (slice(None), 1)):
        selected = sparse[index]
        for field, whole in zip(sparse_fields(selected), sparse_fields(sparse), strict=True):
            assert torch.equal(field, whole[index])
        assert selected.temperatures == sparse.temperatures
    assert sparse[1, 0].leading_shape == ()


def test_sparse_logits_moves_every_field_and_keeps_dtypes():
    sparse = record()
    moved = sparse.to("meta")
    for field, original in zip(sparse_fields(moved), sparse_fields(sparse), strict=True):
        assert (field.device.type, field.dtype, field.shape) == ("meta", original.dtype, original.shape)


def test_sparse_logits_cat_pads_to_the_widest():
    parts = [record((2,), 3), record((1,), 5), record((0,), 1)]
    whole = SparseLogits.cat(parts)
    assert (whole.leading_shape, whole.top_k) == ((3,), 5)
    assert whole.ids[:2, 3:].tolist() == [[-1, -1], [-1, -1]]
    assert_same_bits(sparse_fields(whole[2:3]), sparse_fields(parts[1]))
    for name in ("ids", "logits"):
        assert torch.equal(getattr(whole, name)[:2, :3], getattr(parts[0], name))
    whole.validate(20)


def test_sparse_logits_cat_refuses_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="at least one"):
        SparseLogits.cat([])
    with pytest.raises(ValueError, match="temperatures"):
        SparseLogits.cat([record(), record(temperatures=(1.0,))])
    with pytest.raises(ValueError, match="target_logit"):
        SparseLogits.cat([record(), record(with_target_logit=False)])
    narrow = dataclasses.replace(record(), logits=record().logits.to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match="must share a dtype where one is float8"):
        SparseLogits.cat([record(), narrow])
    assert SparseLogits.cat([narrow, narrow]).logits.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("error", "message", "fields"),
    [
        (TypeError, "ids", {"ids": torch.zeros(4, 3, dtype=torch.int64)}),
        (TypeError, "logits", {"logits": torch.zeros(4, 3, dtype=INT)}),
        (ValueError, "ids and logits", {"logits": torch.zeros(4, 2)}),
        (ValueError, "ids and logits", {"ids": torch.zeros((), dtype=INT), "logits": torch.zeros(())}),
        (ValueError, "lse", {"lse": torch.zeros(4)}),
        (ValueError, "lse", {"lse": torch.zeros(4, 2)}),
        (ValueError, "lse", {"lse": torch.zeros(3, 1)}),
        (ValueError, "temperatures", {"temperatures": (2.0,)}),
        (ValueError, "temperatures", {"temperatures": (), "lse": torch.zeros(4, 0)}),
        (ValueError, "temperatures", {"temperatures": (1.0, -1.0), "lse": torch.zeros(4, 2)}),
        (ValueError, "temperatures", {"temperatures": (1.0, math.inf), "lse": torch.zeros(4, 2)}),
        (ValueError, "target_logit", {"target_logit": torch.zeros(4, 1)}),
    ],
)
def test_sparse_logits_refuses(error, message, fields):
    legal = {
        "ids": torch.arange(3, dtype=INT).repeat(4, 1),
        "logits": torch.zeros(4, 3),
        "lse": torch.full((4, 1), 2.0),
    }
    SparseLogits(**legal).validate()
    with pytest.raises(error, match=message):
        SparseLogits(**{**legal, **fields})


def test_sparse_logits_validate_accepts_what_topk_makes():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        sparse = topk_logits((5.0 * torch.randn(30, 400)).to(dtype), 400 // 20)
        sparse.validate(400)
        topk_logits(torch.randn(3, 17).to(dtype), 17).validate(17)
    random_problem(ragged=True).teacher.validate(203)
    record((2, 3)).validate(20)
    topk_logits(torch.full((2, 9), -math.inf), 4).validate(9)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([3, 3, 4], "ascending"),
        ([5, 4, 6], "ascending"),
        ([4, 5, 20], "outside"),
        ([-2, 4, 5], "outside"),
        ([4, -1, 5], "padding"),
        ([-1, 4, 5], "padding"),
    ],
)
def test_sparse_logits_validate_names_the_first_bad_row(row, message):
    sparse = record()
    sparse.ids[2] = torch.tensor(row, dtype=INT)
    sparse.ids[3] = torch.tensor(row, dtype=INT)
    with pytest.raises(ValueError, match=rf"row \[2\] .*{message}"):
        sparse.validate(20)


def test_sparse_logits_validate_refuses_more_than_the_whole():
    sparse = record()
    sparse.lse[1] -= 10.0
    with pytest.raises(ValueError, match=r"row \[1\] .*lse"):
        sparse.validate(20)


def test_sparse_logits_validate_never_reads_padding():
    sparse = random_problem(ragged=True).teacher
    assert sparse.logits.isnan().any()
    sparse.logits[sparse.ids < 0] = math.inf
    sparse.validate(203)


@pytest.mark.parametrize(
    "index",
    [
        (..., slice(2)),
        (slice(None), slice(None), slice(2)),
        (0, 0, 0),
        ...,
        torch.zeros(2, 5, 3, dtype=torch.bool),
    ],
)
def test_sparse_logits_never_selects_among_the_kept_entries(index):
    with pytest.raises(IndexError, match="never some of the K kept entries"):
        record((2, 5), 3)[index]


@pytest.mark.parametrize(
    "index", [1, (1, 2), (slice(None), slice(2)), None, torch.ones(2, 5, dtype=torch.bool), [0, 0]]
)
def test_sparse_logits_selects_along_all_leading_dimensions(index):
    sparse = record((2, 5), 3)
    part = sparse[index]
    for field, whole in zip(sparse_fields(part), sparse_fields(sparse), strict=True):
        assert_same_bits(field, whole[index])


def test_sparse_logits_converts_no_dtype():
    sparse = record()
    for arguments in ((torch.bfloat16,), ("cpu", torch.float64), (torch.zeros(1),)):
        with pytest.raises(TypeError, match=r"dataclasses\.replace\(sparse, logits"):
            sparse.to(*arguments)
    with pytest.raises(TypeError, match="converts no dtype"):
        sparse.to(dtype=torch.bfloat16)


def test_sparse_logits_have_no_equality_of_values():
    sparse = record()
    assert sparse == sparse
    assert sparse != 3
    assert sparse in {sparse}
    with pytest.raises(TypeError, match="compare their fields"):
        _ = sparse == sparse[:]


def test_sparse_logits_are_loaded_by_torch_load_without_running_code(tmp_path):
    sparse = record()
    torch.save({"teacher": sparse}, tmp_path / "batch.pt")
    loaded = torch.load(tmp_path / "batch.pt", weights_only=True)["teacher"]
    assert loaded.temperatures == sparse.temperatures
    for field, saved in zip(sparse_fields(loaded), sparse_fields(sparse), strict=True):
        assert_same_bits(field, saved)


def test_sparse_logits_are_collated_by_a_data_loader():
    samples = [{"ids": torch.arange(5), "teacher": record((5,), top_k)} for top_k in (3, 2, 4)]
    (batch,) = torch.utils.data.DataLoader(samples, batch_size=3)
    teacher = batch["teacher"]
    assert (teacher.leading_shape, teacher.top_k, teacher.temperatures) == ((3, 5), 4, (1.0, 2.0))
    for row, sample in enumerate(samples):
        kept = sample["teacher"].top_k
        assert_same_bits(teacher.ids[row, :, :kept], sample["teacher"].ids)
        assert (teacher.ids[row, :, kept:] == -1).all()
        assert_same_bits(teacher.lse[row], sample["teacher"].lse)
        assert_same_bits(teacher.target_logit[row], sample["teacher"].target_logit)
    with pytest.raises(ValueError, match="share their leading shape"):
        SparseLogits.stack([record((5,)), record((4,))])


def test_sparse_logits_are_pinned_field_by_field(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: (pinned.append(tensor), tensor)[1])
    sparse = record()
    assert_same_bits(sparse_fields(sparse.pin_memory()), sparse_fields(sparse))
    assert len(pinned) == 5


def _with_rest(num_rows: int, top_k: int, rest: float | None) -> SparseLogits:
    rows = topk_logits(torch.randn(num_rows, 9), top_k)
    rest_lse = None if rest is None else torch.full_like(rows.lse, rest)
    return dataclasses.replace(rows, rest_lse=rest_lse)


def test_parts_without_rest_lse_join_as_unknown():
    joined = SparseLogits.cat([_with_rest(2, 3, 1.5), _with_rest(1, 2, None)])
    assert joined.rest_lse[:2].eq(1.5).all()
    assert joined.rest_lse[2:].isnan().all()
    assert SparseLogits.cat([_with_rest(1, 2, None), _with_rest(1, 2, None)]).rest_lse is None
    assert SparseLogits.stack([_with_rest(2, 3, 0.5), _with_rest(2, 2, 1.0)]).rest_lse.tolist() == [
        [[0.5], [0.5]],
        [[1.0], [1.0]],
    ]


def test_rest_lse_follows_the_rows():
    rows = _with_rest(4, 3, 2.0)
    assert rows[1:3].rest_lse.shape == (2, 1)
    assert rows.reshape(2, 2).rest_lse.shape == (2, 2, 1)
    assert rows.rest_lse_at(1.0).tolist() == [2.0] * 4
    assert rows.rest_lse_at(3.0) is None
    with pytest.raises(ValueError, match=r"rest_lse must have shape \(4, 1\) like lse"):
        dataclasses.replace(rows, rest_lse=torch.zeros(4))
    with pytest.raises(TypeError, match=r"rest_lse must have dtype torch\.float32 like lse"):
        dataclasses.replace(rows, rest_lse=rows.rest_lse.double())
