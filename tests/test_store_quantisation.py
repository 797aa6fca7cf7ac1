"""The error of rounding that ``info`` estimates from a store, against the error of the same rows kept in float32."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from support import teachers
from support.store_cases import random_case, write_store

from slimkernels.store import Store, errors, info
from slimkernels.teacher import capture, shipped_prompts

NAMES = ("quantisation_kl_nats", "quantisation_gradient", "quantisation_log_mass")


def true_error(rounded: Path, exact: Path) -> dict[str, float]:
    """The three errors between two stores of the same rows, in float64 from their definitions."""
    sums, rows = torch.zeros(3, dtype=torch.float64), 0
    for document, original in zip(Store(rounded), Store(exact), strict=True):
        assert torch.equal(document.teacher.ids, original.teacher.ids)
        kept = original.teacher.ids >= 0
        after, before = (d.teacher.logits.double().masked_fill(~kept, -torch.inf) for d in (document, original))
        q, r = before.softmax(-1), after.softmax(-1)
        kl = (q * (before.log_softmax(-1) - after.log_softmax(-1)))[kept]
        log_mass = (after.logsumexp(-1) - before.logsumexp(-1)).abs()
        sums += torch.stack([kl.sum(), (r - q).norm(dim=-1).sum(), log_mass.sum()])
        rows += len(kept)
    return dict(zip(NAMES, (sums / rows).tolist(), strict=True))


def assert_close(estimate: dict, truth: dict, factor: float = 2.0) -> None:
    for name in NAMES:
        assert truth[name] / factor < estimate[name] < truth[name] * factor, (name, estimate[name], truth[name])


@pytest.mark.parametrize("codec", ["affine8", "affine6", "bfloat16"])
@pytest.mark.parametrize("spread", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("ragged", [False, True])
def test_estimate_is_near_the_error_of_random_rows(tmp_path, codec, spread, ragged):
    """From nearly flat rows to rows of one likely token; more of them than the estimate reads."""
    generator = torch.Generator().manual_seed(0)
    options = {"vocab_size": 400, "top_k": 60, "temperatures": (1.0,), "spread": spread, "ragged": ragged}
    cases = [random_case(102, 101, generator, **options) for _ in range(5)]
    for name in (codec, "float32"):
        write_store(tmp_path / name, [cases[:2], cases[2:]], vocab_size=400, temperatures=(1.0,), codec=name)
    estimate, truth = info(tmp_path / codec), true_error(tmp_path / codec, tmp_path / "float32")
    assert_close(estimate, truth)
    assert info(tmp_path / codec) == estimate
    assert [info(tmp_path / "float32")[name] for name in NAMES] == [0.0] * 3


def test_estimate_of_constant_rows_and_of_the_largest_numbers(tmp_path):
    generator = torch.Generator().manual_seed(0)
    case = random_case(9, 4, generator, temperatures=(1.0,), rest=False)
    flat, wide = torch.zeros_like(case.teacher.logits), torch.full_like(case.teacher.logits, -3e37)
    wide[:, ::2] = 3e37
    for logits, lse in ((flat, 5.0), (wide, 3.1e37)):
        teacher = dataclasses.replace(case.teacher, logits=logits, lse=torch.full_like(case.teacher.lse, lse))
        for codec in ("affine8", "affine6", "bfloat16"):
            path = tmp_path / f"{lse}-{codec}"
            write_store(path, [[case._replace(teacher=teacher)]], temperatures=(1.0,), codec=codec)
            assert all(info(path)[name] >= 0 for name in NAMES)
            assert lse != 5.0 or info(path)["quantisation_kl_nats"] == pytest.approx(0, abs=1e-12)


def test_damaged_row_is_named_by_the_estimate(tmp_path):
    write_store(tmp_path, [[random_case(9, 4, torch.Generator().manual_seed(0))]])
    shard = tmp_path / "shard-000000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(errors.RowChecksumError, match="document 0, row 3"):
        info(tmp_path)


def test_estimate_is_near_the_error_of_a_real_teacher(tmp_path):
    """SmolLM2 on a few prompts at 5 % of its vocabulary: the error of 8 bits is small, and the estimate near it."""
    model, tokenizer = teachers.smollm2()
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in shipped_prompts()[:6]]
    for codec in ("float32", "affine8", "affine6"):
        capture(model, tokenizer, documents, tmp_path / codec, codec=codec)
    truths = {codec: true_error(tmp_path / codec, tmp_path / "float32") for codec in ("affine8", "affine6")}
    assert truths["affine8"]["quantisation_kl_nats"] < 1e-3
    for codec, truth in truths.items():
        assert_close(info(tmp_path / codec), truth)
