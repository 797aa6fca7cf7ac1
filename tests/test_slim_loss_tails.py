"""``slim_loss`` where the teacher's kept ids hold nearly all of its probability, by the rest's log-sum-exp."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.helpers import (
    DTYPES,
    RESTS_AND_DIVERGENCES,
    assert_same_bits,
    explain,
    loss_and_grads,
    random_problem,
    to_dtype,
)

import slimkernels as sk
from slimkernels import SparseLogits, reference

F64 = torch.float64
INF, NAN = math.inf, math.nan
KD_ALONE = {"token_weight": "none", "ce_weight": 0.0, "reduction": "none"}
KLS = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "gated")


def test_slim_loss_reverse_kl_of_a_peaked_teacher_is_exact():
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(4, 2000, generator=generator) + 20
    teacher[:, :100] += 25
    student = torch.randn(4, 2000, generator=generator)
    out = sk.slim_loss(
        student,
        torch.zeros(4, dtype=torch.int64),
        sk.topk_logits(teacher, 100),
        rest="ghost",
        divergence="reverse_kl",
        **KD_ALONE,
    )
    torch.testing.assert_close(out.loss, torch.tensor([21.0476, 20.7614, 20.9221, 20.7574]), rtol=0, atol=1e-4)


def dense_divergence(log_q, log_p, divergence, beta=0.5, alpha=0.1):
    """Computes a divergence of rows of finite log-probabilities from its textbook formula."""
    q, p = log_q.exp(), log_p.exp()
    if divergence in ("forward_kl", "soft_ce"):
        return (q * ((0.0 if divergence == "soft_ce" else log_q) - log_p)).sum(-1)
    if divergence == "reverse_kl":
        return (p * (log_p - log_q)).sum(-1)
    if divergence == "jsd":
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
        return (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(-1)
    if divergence == "skew_reverse_kl":
        log_m = torch.logaddexp(log_p + math.log(alpha), log_q + math.log(1 - alpha))
        return (p * (log_p - log_m)).sum(-1)
    if divergence == "gated":
        gate = (-(q * log_q).sum(-1) > 0.8).double()
        return (p * (log_p - log_q)).sum(-1) + gate * (q * (log_q - log_p)).sum(-1)
    if divergence == "tvd":
        return 0.5 * (q - p).abs().sum(-1)
    if divergence == "ab":
        alpha, beta = 0.2, 0.7
        both = alpha + beta
        terms = q**alpha * p**beta - alpha / both * q**both - beta / both * p**both
        return -terms.sum(-1) / (alpha * beta)
    log_m = torch.logaddexp(log_q + math.log(alpha), log_p + math.log(1 - alpha))
    return (q * (log_q - log_m)).sum(-1)


@pytest.mark.parametrize("divergence", [*KLS, "soft_ce", "tvd", "ab"])
@pytest.mark.parametrize("teacher_gap", [5.0, 15.0, 30.0, 70.0])
@pytest.mark.parametrize("student_gap", [0.0, 20.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_slim_loss_of_tiny_tails_is_that_of_the_dense_rows(divergence, teacher_gap, student_gap, dtype):
    generator = torch.Generator().manual_seed(4)
    teacher, student = torch.randn(2, 5, 400, generator=generator, dtype=F64)
    teacher[:, 30:50] += teacher_gap
    student[:, 30:50] += student_gap
    teacher, student = teacher.to(dtype), student.to(dtype)
    for temperature in (1.0, 2.0):
        record = sk.topk_logits(teacher, 20, temperatures=(1.0, temperature))
        options = {"rest": "ghost", "divergence": divergence, "temperature": temperature, **KD_ALONE}
        out, (grad,) = loss_and_grads(
            sk.slim_loss, (student,), 1.0, torch.zeros(5, dtype=torch.int64), record, **options
        )

        ids = record.ids.long()
        outcomes = []
        leaf = student.double().requires_grad_()
        for rows in (teacher.double(), leaf):
            logprobs = torch.log_softmax(rows / temperature, -1)
            tail = torch.logsumexp(logprobs.scatter(-1, ids, -INF), -1, keepdim=True)
            outcomes.append(torch.cat([logprobs.gather(-1, ids), tail], -1))
        expected = dense_divergence(*outcomes, divergence) * temperature**2
        (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
        accumulated = 1e-11 if dtype == F64 else 1e-5
        torch.testing.assert_close(out.kd.double(), expected, rtol=accumulated, atol=accumulated)
        rounding = accumulated if dtype != torch.bfloat16 else 2.0**-8
        # The bucket's gradient is one number of the row times p, so it is judged by itself.
        is_kept = torch.zeros_like(grad, dtype=torch.bool).scatter(1, ids, True)
        for part in (is_kept, ~is_kept):
            ours, wanted = grad.double()[part], expected_grad[part]
            torch.testing.assert_close(ours, wanted, rtol=0, atol=rounding * float(wanted.abs().max()) + 1e-36)


@pytest.mark.parametrize("divergence", [*KLS, "tvd", "ab"])
@pytest.mark.parametrize("rest", ["ghost", "renorm_both"])
@pytest.mark.parametrize("rest_is_known", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slim_loss_kl_is_never_negative(rest, divergence, rest_is_known, dtype):
    for gap in (0.0, 5.0, 12.0, 25.0, 60.0):
        for distance in (0.0, 1e-6, 1e-3, 0.1, 3.0):
            logits = torch.randn(16, 400, generator=torch.Generator().manual_seed(5), dtype=F64)
            logits[:, 30:50] += gap
            noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6), dtype=F64)
            student = (logits + distance * noise).to(dtype)
            record = sk.topk_logits(logits.to(dtype), 20)
            if not rest_is_known:
                record = dataclasses.replace(record, rest_lse=None)
            target = torch.zeros(16, dtype=torch.int64)
            out = sk.slim_loss(student, target, record, rest=rest, divergence=divergence, **KD_ALONE)
            assert (out.kd >= 0).all(), (gap, distance)
            if distance == 0.0 and (rest_is_known or rest == "renorm_both"):
                # The total variation is of the first order in the rounding, the others are of the second.
                assert (out.kd < (1e-6 if divergence == "tvd" and dtype != F64 else 1e-11)).all(), (gap, distance)


def test_slim_loss_of_a_rest_that_is_not_known_is_that_of_a_record_without_it():
    logits, target, teacher = random_problem(ignored=())
    partly = dataclasses.replace(teacher, rest_lse=teacher.rest_lse.clone())
    partly.rest_lse[::2] = NAN
    options = {"rest": "ghost", "reduction": "none", "divergence": "reverse_kl", "statistics": True}
    outs = []
    for record in (teacher, dataclasses.replace(teacher, rest_lse=None), partly):
        out, grads = loss_and_grads(sk.slim_loss, (logits,), 1.0, target, record, **options)
        outs.append((*out, *grads))
    for known, unknown, either in zip(*outs, strict=True):
        assert_same_bits(either[::2], unknown[::2])
        assert_same_bits(either[1::2], known[1::2])


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_slim_loss_leaves_out_only_outcomes_that_the_teacher_excludes(divergence):
    # Two outcomes with probabilities that float32 cannot hold: exp(-150) is a real cost, and -inf is left out.
    ids = torch.tensor([[2, 5, 7]], dtype=torch.int32).expand(2, 3)
    logits = torch.tensor([[0.0, -150.0, -1.0], [0.0, -INF, -1.0]])
    record = SparseLogits(
        ids, logits, torch.logsumexp(logits, -1, keepdim=True), rest_lse=torch.tensor([[-160.0], [-INF]])
    )
    student = torch.zeros(2, 9)
    options = {"rest": "ghost", "divergence": divergence, **KD_ALONE}
    target = torch.zeros(2, dtype=torch.int64)
    out, (grad,) = loss_and_grads(sk.slim_loss, (student,), 1.0, target, record, **options)
    truth, (true_grad,) = loss_and_grads(
        reference.slim_loss, (student.double(),), 1.0, target, to_dtype(record, F64), **options
    )
    torch.testing.assert_close(out.kd.double(), truth.kd, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-6)
    if divergence == "reverse_kl":
        assert out.kd[0] > 100
        assert out.kd[1] < 2


@pytest.mark.parametrize("top_k", [3, 9])
@pytest.mark.parametrize(("rest", "divergence"), RESTS_AND_DIVERGENCES)
def test_slim_loss_of_a_teacher_row_without_mass(rest, divergence, top_k):
    # Rows of nothing but -inf with the label kept, not kept and nothing kept, one of unknown rest, and two others.
    ids = torch.arange(9 - top_k, 9, dtype=torch.int32).repeat(6, 1)
    ids[2] = -1
    logits = torch.randn(6, top_k, generator=torch.Generator().manual_seed(7))
    logits[:4] = -INF
    tail_mass = 0.4 if top_k < 9 else 0.0
    lse = torch.logsumexp(logits, -1, keepdim=True) - math.log1p(-tail_mass)
    rest_lse = lse + (math.log(tail_mass) if tail_mass else -INF)
    rest_lse[[3, 5]] = NAN
    student = torch.randn(6, 9, generator=torch.Generator().manual_seed(8))
    target = torch.tensor([8, 0, 8, 8, 8, 0])
    for temperature, label_smoothing, label_logit in ((1.0, 0.0, -INF), (2.0, 0.1, NAN)):
        record = SparseLogits(
            ids,
            logits * temperature,
            torch.cat([lse, lse], -1),
            temperatures=(1.0, 2.0),
            target_logit=torch.tensor([label_logit] * 4 + [0.3, -1.0]),
            rest_lse=torch.cat([rest_lse, rest_lse], -1),
        )
        options = {"rest": rest, "divergence": divergence, "temperature": temperature, "reduction": "none"}
        for token_weight in ("none", "teacher_over_student"):
            more = {"label_smoothing": label_smoothing, "token_weight": token_weight}
            out, (grad,) = loss_and_grads(sk.slim_loss, (student,), 1.0, target, record, **options, **more)
            truth, (expected,) = loss_and_grads(
                reference.slim_loss, (student.double(),), 1.0, target, to_dtype(record, F64), **options, **more
            )
            fields = [*zip(out._fields, out, truth, strict=True), ("gradient", grad, expected)]
            for name, actual, wanted in fields:
                if wanted is None:  # a statistic that was not asked for
                    assert actual is None
                    continue
                with explain(f"{name} at T={temperature}, token_weight={token_weight}"):
                    assert wanted.isfinite().all()
                    torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-6)
        # A teacher that says nothing pulls nowhere, except that "zero_logit" gives the unkept ids the logit 0, and that
        # the p^(alpha + beta) of "ab" do not sum to a constant.
        if (rest != "zero_logit" or top_k == 9) and divergence != "ab":
            _, (grad,) = loss_and_grads(sk.slim_loss, (student,), 1.0, target, record, **options | KD_ALONE)
            is_silent = torch.tensor([True, True, top_k < 9 or rest != "zero_logit", True, False, False])
            torch.testing.assert_close(grad[is_silent], torch.zeros_like(grad[is_silent]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "soft_ce"])
def test_slim_loss_of_a_student_that_excludes_what_has_no_mass(divergence):
    # Beside a logit of 800, ids that are not kept, with the logit 0, have a mass of 0 in float64 too.
    ids = torch.tensor([[0, 1]] * 2, dtype=torch.int32)
    logits = torch.tensor([[800.0, 799.0], [8.0, 7.0]])
    record = SparseLogits(ids, logits, torch.logsumexp(logits, -1, keepdim=True))
    student = torch.tensor([[1.0, 0.5, 0.0, -INF, 2.0]] * 2)
    options = {"rest": "zero_logit", "divergence": divergence, **KD_ALONE}
    target = torch.zeros(2, dtype=torch.int64)
    out, (grad,) = loss_and_grads(sk.slim_loss, (student,), 1.0, target, record, **options)
    truth, (true_grad,) = loss_and_grads(
        reference.slim_loss, (student.double(),), 1.0, target, to_dtype(record, F64), **options
    )
    assert truth.kd.isinf().tolist() == [False, True]
    torch.testing.assert_close(out.kd.double(), truth.kd, rtol=1e-4, atol=1e-6)  # 800 in float32
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-6)


MIXTURES = (
    *(("jsd", {"beta": beta}) for beta in (0.1, 0.99)),
    *((name, {"alpha": alpha}) for name in ("skew_kl", "skew_reverse_kl") for alpha in (0.0, 1e-7, 0.1, 0.9)),
)


@pytest.mark.parametrize(("divergence", "options"), MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_slim_loss_of_mixtures_at_the_smallest_normal_number(divergence, options, dtype):
    # Probabilities of the student around those whose product with a share is flushed to 0, and far below them.
    lowest = -math.log(torch.finfo(dtype).tiny)
    far = torch.linspace(lowest - 3, lowest + 1, 40, dtype=F64).to(dtype)
    student = torch.zeros(40, 6, dtype=dtype)
    # Kept ids with a share of the teacher's mass and without one, and an id that is not kept.
    student[:, [1, 3, 4]] = -far[:, None]
    teacher = torch.tensor([0.0, 0.0, -3.0, -INF, -INF, -1.0], dtype=dtype).repeat(40, 1)
    teacher[20:, 1] = -far[20:].flip(0)
    record = sk.topk_logits(teacher, 5)
    options = options | {"rest": "ghost", "divergence": divergence, **KD_ALONE}
    target = torch.zeros(40, dtype=torch.int64)
    out, (grad,) = loss_and_grads(sk.slim_loss, (student,), 1.0, target, record, **options)
    truth, (true_grad,) = loss_and_grads(
        reference.slim_loss, (student.double(),), 1.0, target, to_dtype(record, F64), **options
    )
    torch.testing.assert_close(out.kd.double(), truth.kd, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rest", "divergence"), RESTS_AND_DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_slim_loss_without_a_divergence_that_is_infinite_or_not_a_number(rest, divergence, temperature):
    logits, target, teacher = random_problem(5, 40, 6, temperature=temperature, ignored=())
    record = dataclasses.replace(teacher, logits=teacher.logits.clone())
    record.logits[2, 1] = NAN
    logits[0, record.ids[0, record.ids[0] != target[0]].long()] = -INF
    options = {"rest": rest, "divergence": divergence, "temperature": temperature, "detach_weight": False}
    out, (grad,) = loss_and_grads(sk.slim_loss, (logits,), 1.0, target, record, kd_weight=0.0, **options)
    expected, (expected_grad,) = loss_and_grads(sk.slim_loss, (logits,), 1.0, target)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)
