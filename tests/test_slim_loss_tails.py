"""The log-sum-exp of what a row leaves out: exact where the kept entries hold nearly all of the probability."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.helpers import DTYPES, RESTS_AND_DIVERGENCES, hostile_rows

import slimkernels as sk
from slimkernels import reference

F64 = torch.float64
INF = math.inf
PROPER = [divergence for rest, divergence in RESTS_AND_DIVERGENCES if rest == "ghost"]


def peaked_teacher(gap: float, num_rows: int = 4, vocab_size: int = 2000, top_k: int = 100) -> torch.Tensor:
    """Returns teacher logits whose first K lie ``gap`` above the others."""
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(num_rows, vocab_size, generator=generator) + 20
    teacher[:, :top_k] += gap
    return teacher


def after_teacher() -> torch.Generator:
    """Returns the generator of ``peaked_teacher`` after it drew four rows."""
    generator = torch.Generator().manual_seed(3)
    torch.randn(4, 2000, generator=generator)
    return generator


def dense_divergence(teacher, student, ids, divergence, beta=0.5, alpha=0.1):
    """Computes the divergence of the K + 1 outcomes from whole rows in float64, without any log-sum-exp of S."""
    off = torch.ones_like(teacher, dtype=torch.bool).scatter(1, ids.long(), False)
    log_q, log_p = (
        torch.cat([log_s.gather(1, ids.long()), log_s.masked_fill(~off, -INF).logsumexp(-1, keepdim=True)], -1)
        for log_s in (teacher.double().log_softmax(-1), student.log_softmax(-1))
    )
    q, p = log_q.exp(), log_p.exp()
    if divergence == "reverse_kl":
        return (p * (log_p - log_q)).sum(-1)
    if divergence == "soft_ce":
        return -(q * log_p).sum(-1)
    share = {"jsd": beta, "skew_kl": alpha, "forward_kl": 0.0}[divergence]
    log_m = (share * q + (1 - share) * p).log()
    forward = (q * (log_q - log_m)).sum(-1)
    return forward if divergence != "jsd" else beta * forward + (1 - beta) * (p * (log_p - log_m)).sum(-1)


def test_reverse_kl_of_a_tail_below_float32_is_right():
    teacher = peaked_teacher(25.0)
    student = torch.randn(4, 2000, generator=after_teacher())
    target = torch.zeros(4, dtype=torch.int64)
    rows = sk.topk_logits(teacher, 100, target=target)
    out = sk.slim_loss(
        student, target, rows,
        rest="ghost", divergence="reverse_kl", token_weight="none", ce_weight=0.0, reduction="none",
    )  # fmt: skip
    expected = dense_divergence(teacher, student.double(), rows.ids, "reverse_kl")
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.loss, torch.tensor([21.05, 20.76, 20.92, 20.76]), rtol=0, atol=0.006)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("gap", [0.0, 8.0, 20.0, 40.0, 70.0])
def test_tail_has_the_accuracy_of_its_dtype_however_small(gap, temperature, dtype):
    teacher = peaked_teacher(gap).to(dtype)
    rows = sk.topk_logits(teacher, 100, temperatures=(1.0, temperature))
    wide = teacher.double() / temperature
    off = wide.scatter(1, rows.ids.long(), -INF)
    rest_lse = off.logsumexp(-1)
    expected = rest_lse - wide.logsumexp(-1)
    tolerance = 1e-12 if dtype == F64 else 5e-6
    torch.testing.assert_close(rows.rest_lse_at(temperature).double(), rest_lse, rtol=0, atol=tolerance)
    tail = sk.sparse_softmax(rows, temperature=temperature, rest="ghost").tail_logprob
    torch.testing.assert_close(tail.double(), expected, rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("divergence", PROPER)
@pytest.mark.parametrize("gap", [12.0, 25.0, 60.0])
def test_every_divergence_at_tiny_tails_is_that_of_whole_rows(gap, divergence):
    teacher = peaked_teacher(gap)
    student = torch.randn(4, 2000, generator=after_teacher())
    # A student that is nearly as sure as the teacher, one that knows nothing, and one that bets on the tail.
    student[0, :100] += gap
    student[3, 100:] += gap
    target = torch.zeros(4, dtype=torch.int64)
    rows = sk.topk_logits(teacher, 100, target=target)
    options = {"rest": "ghost", "divergence": divergence, "token_weight": "none", "ce_weight": 0.0, "reduction": "none"}
    leaf, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    actual = sk.slim_loss(leaf, target, rows, **options).loss
    expected = dense_divergence(teacher, wide, rows.ids, divergence)
    torch.testing.assert_close(actual.double(), expected, rtol=3e-6, atol=3e-6)
    (gradient,) = torch.autograd.grad(actual.sum(), leaf)
    (truth,) = torch.autograd.grad(expected.sum(), wide)
    scale = truth.abs().amax(-1, keepdim=True).clamp(min=1e-6)
    assert ((gradient.double() - truth).abs() <= 1e-5 * scale + 3e-7).all()


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("divergence", [name for name in PROPER if name != "soft_ce"])
@pytest.mark.parametrize("rest", ["ghost", "renorm_both"])
def test_a_divergence_is_never_negative(rest, divergence, is_known):
    generator = torch.Generator().manual_seed(5)
    teacher = torch.cat([peaked_teacher(gap, 16, 500, 25) for gap in (0.0, 3.0, 12.0, 14.0, 16.0, 30.0)])
    student = teacher + 1e-4 * torch.randn(teacher.shape, generator=generator)
    # Half of the students are the teacher itself.
    student[::2] = teacher[::2]
    target = torch.zeros(len(teacher), dtype=torch.int64)
    rows = sk.topk_logits(teacher, 25, target=target)
    rows = rows if is_known else dataclasses.replace(rows, rest_lse=None)
    kd = sk.slim_loss(student, target, rows, rest=rest, divergence=divergence, token_weight="none").kd
    assert (kd >= 0).all()
    if is_known:
        assert (kd[::2] <= 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 7, 64])
def test_rest_lse_of_hostile_rows(top_k, dtype):
    logits = torch.stack(list(hostile_rows(64, dtype).values()))
    kept = sk.topk_logits(logits, top_k, temperatures=(1.0, 0.5))
    truth = reference.topk_logits(logits.double(), top_k, temperatures=(1.0, 0.5))
    torch.testing.assert_close(kept.rest_lse.double(), truth.rest_lse, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_rest_lse_of_a_row_that_is_kept_whole_is_minus_infinity():
    kept = sk.topk_logits(torch.randn(3, 40), 40, temperatures=(1.0, 2.0))
    assert (kept.rest_lse == -INF).all()


def test_a_row_with_an_unknown_rest_is_as_before():
    teacher, student = peaked_teacher(3.0), peaked_teacher(1.0).flip(-1)
    target = torch.zeros(4, dtype=torch.int64)
    rows = sk.topk_logits(teacher, 100, target=target)
    old = dataclasses.replace(rows, rest_lse=None)
    partly = dataclasses.replace(rows, rest_lse=rows.rest_lse.clone())
    partly.rest_lse[1] = math.nan
    outs = [sk.slim_loss(student, target, each, rest="ghost", reduction="none").kd for each in (rows, old, partly)]
    assert torch.equal(outs[2][1], outs[1][1])
    assert torch.equal(outs[2][[0, 2, 3]], outs[0][[0, 2, 3]])
