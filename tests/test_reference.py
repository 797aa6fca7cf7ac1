"""The oracle against paper, against torch where they coincide, and against the closed forms of its gradients."""

from __future__ import annotations

import dataclasses
import itertools
import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from support.helpers import (
    HAND_WORKED,
    HAND_WORKED_WEIGHTS,
    RESTS_AND_DIVERGENCES,
    hand_worked_problem,
    hostile_rows,
    loss_and_grads,
    random_problem,
    to_dtype,
)

from slimkernels import SparseLogits, reference

F64 = torch.float64
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def kd_only(**options):
    """The options under which the summed loss is D * T^2."""
    return {"ce_weight": 0.0, "token_weight": "none", "reduction": "sum", **options}


# ---- topk_logits


@pytest.mark.parametrize(
    ("row", "top_k", "ids"),
    [
        ([3.0, 1.0, 2.0, 3.0], 2, [0, 3]),
        ([3.0, 1.0, 3.0, 3.0], 2, [0, 2]),
        ([0.0, -0.0, 0.0, -1.0], 2, [0, 1]),
        ([-0.0, 0.0, -0.0, 0.0], 3, [0, 1, 2]),
        ([1.0, math.nan, math.inf, math.nan], 3, [1, 2, 3]),
        ([math.nan, math.nan, math.inf, math.nan], 2, [0, 1]),
        ([-math.inf, 0.0, -math.inf, -math.inf], 3, [0, 1, 2]),
        ([5.0, 4.0, 3.0], 3, [0, 1, 2]),
        ([7.0], 1, [0]),
    ],
)
def test_topk_logits_hand_worked(row, top_k, ids):
    sparse = reference.topk_logits(torch.tensor([row]), top_k)
    assert sparse.ids.tolist() == [ids]
    torch.testing.assert_close(sparse.logits, torch.tensor([[row[i] for i in ids]]), rtol=0, atol=0, equal_nan=True)


def test_topk_logits_lse_and_target_hand_worked():
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)], [math.inf, 0.0, 0.0], [-math.inf] * 3], dtype=F64)
    sparse = reference.topk_logits(logits, 1, target=torch.tensor([1, -1, 2]), temperatures=(1.0, 0.5))
    # exp(x / 0.5) squares the exponentials: 1 + 4 + 25.
    expected = [[math.log(8.0), math.log(30.0)], [math.inf] * 2, [-math.inf] * 2]
    torch.testing.assert_close(sparse.lse, torch.tensor(expected, dtype=F64), **CLOSE)
    expected = torch.tensor([math.log(2.0), math.nan, -math.inf], dtype=F64)
    torch.testing.assert_close(sparse.target_logit, expected, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_logits_of_hostile_rows_is_the_plain_definition(dtype):
    for name, row in hostile_rows(37, dtype).items():
        values = row.tolist()
        # NaN first, then falling values, then rising index.
        order = sorted(range(37), key=lambda i, v=values: (not math.isnan(v[i]), 0.0 if math.isnan(v[i]) else -v[i], i))
        for top_k in (1, 5, 36, 37):
            sparse = reference.topk_logits(row, top_k)
            assert sparse.ids.tolist() == sorted(order[:top_k]), f"{name}, K={top_k}"
            assert sparse.logits.dtype == dtype
            torch.testing.assert_close(sparse.logits, row[sparse.ids.long()], rtol=0, atol=0, equal_nan=True)


def test_topk_logits_gradient_scatters_and_softmaxes():
    logits = torch.randn(3, 11, dtype=F64, requires_grad=True)
    target = torch.tensor([2, -1, 7])
    sparse = reference.topk_logits(logits, 4, target=target, temperatures=(1.0, 2.0))
    grad_values, grad_lse = torch.randn(3, 4, dtype=F64), torch.randn(3, 2, dtype=F64)
    (grad,) = torch.autograd.grad(
        (sparse.logits * grad_values).sum() + (sparse.lse * grad_lse).sum() + sparse.target_logit[[0, 2]].sum(), logits
    )
    expected = torch.zeros_like(logits).scatter(1, sparse.ids.long(), grad_values)
    expected += grad_lse[:, :1] * torch.softmax(logits, -1)
    expected += grad_lse[:, 1:] * torch.softmax(logits / 2.0, -1) / 2.0
    expected[0, 2] += 1.0
    expected[2, 7] += 1.0
    torch.testing.assert_close(grad, expected, **CLOSE)


def test_linear_topk_logits_is_topk_of_the_effective_logits():
    hidden, weight, bias = torch.randn(2, 3, 5, dtype=F64), torch.randn(17, 5, dtype=F64), torch.randn(17, dtype=F64)
    target = torch.randint(17, (2, 3))
    actual = reference.linear_topk_logits(
        hidden, weight, 4, bias=bias, target=target, temperatures=(1.0, 3.0), softcap=2.0, logit_scale=0.5
    )
    logits = 2.0 * torch.tanh(0.5 * F.linear(hidden, weight, bias) / 2.0)
    expected = reference.topk_logits(logits, 4, target=target, temperatures=(1.0, 3.0))
    assert torch.equal(actual.ids, expected.ids)
    for name in ("logits", "lse", "target_logit"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), **CLOSE)


@pytest.mark.parametrize("top", [{}, {"top_k": 2, "top_fraction": 0.5}, {"top_k": 0}, {"top_k": 5}])
def test_topk_logits_refuses(top):
    with pytest.raises(ValueError, match="top_k"):
        reference.topk_logits(torch.zeros(1, 4), **top)


def test_topk_logits_fraction_rounds_up():
    assert reference.topk_logits(torch.zeros(1, 41), top_fraction=0.05).top_k == 3


# ---- sparse_softmax


@pytest.mark.parametrize(
    ("rest", "probs", "tail"),
    [
        ("renorm", [2 / 3, 1 / 3], 0.0),
        ("renorm_both", [2 / 3, 1 / 3], 0.0),
        ("zero", [1 / 2, 1 / 4], 0.0),
        ("ghost", [1 / 2, 1 / 4], 1 / 4),
        ("zero_logit", [8 / 14, 4 / 14], 2 / 14),
    ],
)
def test_sparse_softmax_hand_worked(rest, probs, tail):
    actual = reference.sparse_softmax(hand_worked_problem().teacher, rest=rest, vocab_size=4)
    torch.testing.assert_close(actual.logprobs.exp(), torch.tensor([probs], dtype=F64), **CLOSE)
    torch.testing.assert_close(actual.tail_logprob.exp(), torch.tensor([tail], dtype=F64), **CLOSE)


def test_sparse_softmax_at_another_temperature_hand_worked():
    # At T = 1/2 the exponentials of ln (8, 4, 2, 2) become (64, 16, 4, 4), sum 88.
    teacher = hand_worked_problem().teacher
    lse = torch.tensor([[math.log(16.0), math.log(88.0)]], dtype=F64)
    teacher = SparseLogits(teacher.ids, teacher.logits, lse, (1.0, 0.5))
    actual = reference.sparse_softmax(teacher, temperature=0.5, rest="ghost")
    torch.testing.assert_close(actual.logprobs.exp(), torch.tensor([[64 / 88, 16 / 88]], dtype=F64), **CLOSE)
    torch.testing.assert_close(actual.tail_logprob.exp(), torch.tensor([8 / 88], dtype=F64), **CLOSE)


@pytest.mark.parametrize("tail_mass", [1e-14, 1e-3, 0.3, 0.5, 0.9, 1 - 1e-9])
def test_sparse_softmax_tail_does_not_cancel(tail_mass):
    lse = -math.log1p(-tail_mass)
    logits = torch.zeros(1, 1, dtype=F64)
    sparse = SparseLogits(torch.tensor([[3]], dtype=torch.int32), logits, torch.tensor([[lse]], dtype=F64))
    tail = reference.sparse_softmax(sparse, rest="ghost").tail_logprob
    with mpmath.workdps(50):
        expected = float(mpmath.log(1 - mpmath.exp(-mpmath.mpf(lse))))
    torch.testing.assert_close(tail, torch.tensor([expected], dtype=F64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("rest", reference.RESTS)
def test_sparse_softmax_gradcheck_with_padding(rest):
    teacher = to_dtype(random_problem(3, 19, 5, ragged=True, temperature=1.7).teacher, F64)

    def probs(logits, lse, rest_lse):
        # The rest of the last row is not known.
        rest_lse = torch.cat([rest_lse[:2], torch.full_like(rest_lse[2:], math.nan)])
        sparse = SparseLogits(teacher.ids, logits, lse, teacher.temperatures, rest_lse=rest_lse)
        out = reference.sparse_softmax(sparse, temperature=1.7, rest=rest, vocab_size=19)
        return out.logprobs[teacher.ids >= 0], out.tail_logprob.masked_fill(out.tail_logprob == -math.inf, 0.0)

    logits = teacher.logits.nan_to_num(0.0).requires_grad_()
    given = tuple(field.clone().requires_grad_() for field in (teacher.lse, teacher.rest_lse))
    assert torch.autograd.gradcheck(probs, (logits, *given))


def test_sparse_softmax_never_reads_padding():
    teacher = random_problem(4, 23, 6, ragged=True).teacher
    clean = dataclasses.replace(teacher, logits=teacher.logits.nan_to_num(0.0))
    for rest in reference.RESTS:
        poisoned = reference.sparse_softmax(teacher, rest=rest, vocab_size=23)
        expected = reference.sparse_softmax(clean, rest=rest, vocab_size=23)
        assert torch.equal(poisoned.logprobs, expected.logprobs)
        assert torch.equal(poisoned.tail_logprob, expected.tail_logprob)
        assert (poisoned.logprobs[teacher.ids < 0] == -math.inf).all()


def test_sparse_softmax_refuses():
    teacher = hand_worked_problem().teacher
    with pytest.raises(ValueError, match="vocab_size"):
        reference.sparse_softmax(teacher, rest="zero_logit")
    with pytest.raises(ValueError, match="temperature"):
        reference.sparse_softmax(teacher, temperature=2.0, rest="ghost")
    with pytest.raises(ValueError, match="rest"):
        reference.sparse_softmax(teacher, rest="other")


# ---- slim_loss


@pytest.mark.parametrize(("rest", "divergence", "options", "expected"), HAND_WORKED)
def test_slim_loss_divergence_hand_worked(rest, divergence, options, expected):
    logits, target, teacher = hand_worked_problem()
    out = reference.slim_loss(logits, target, teacher, rest=rest, divergence=divergence, **options)
    torch.testing.assert_close(out.kd, torch.tensor([expected], dtype=F64), **CLOSE)


@pytest.mark.parametrize(("weight", "expected"), HAND_WORKED_WEIGHTS)
def test_slim_loss_terms_hand_worked(weight, expected):
    logits, target, teacher = hand_worked_problem()
    out = reference.slim_loss(
        logits, target, teacher, token_weight=weight, rest="zero", ce_weight=3.0, kd_weight=5.0, z_loss_weight=7.0
    )
    kd = 3 / 4 * math.log(2)
    # CE = -ln(1/4); lse = 1 by construction.
    fields = {"ce": math.log(4), "kd": kd, "weight": expected, "teacher_mass": 3 / 4, "student_mass": 5 / 8, "lse": 1}
    for name, value in fields.items():
        torch.testing.assert_close(getattr(out, name), torch.tensor([value], dtype=F64), **CLOSE, msg=name)
    torch.testing.assert_close(
        out.loss, torch.tensor(3 * math.log(4) + 5 * expected * kd + 7 * 1.0, dtype=F64), **CLOSE
    )


def test_slim_loss_temperature_hand_worked():
    # T = 1/2 squares: teacher (64, 16, 4, 4) / 88, student (1, 16, 4, 1) / 22; on S 64/88 : 1/22 = 16 and
    # 16/88 : 16/22 = 1/4. The weight and CE stay at T = 1.
    logits, target, teacher = hand_worked_problem()
    lse = torch.tensor([[math.log(16.0), math.log(88.0)]], dtype=F64)
    teacher = SparseLogits(teacher.ids, teacher.logits, lse, (1.0, 0.5), teacher.target_logit)
    out = reference.slim_loss(logits, target, teacher, temperature=0.5, rest="zero")
    expected = (8 / 11 * math.log(16) + 2 / 11 * math.log(1 / 4)) / 4
    torch.testing.assert_close(out.kd, torch.tensor([expected], dtype=F64), **CLOSE)
    torch.testing.assert_close(out.weight, torch.tensor([1 - math.exp(-0.5)], dtype=F64), **CLOSE)
    torch.testing.assert_close(out.ce, torch.tensor([math.log(4)], dtype=F64), **CLOSE)
    torch.testing.assert_close(out.teacher_mass, torch.tensor([80 / 88], dtype=F64), **CLOSE)
    torch.testing.assert_close(out.student_mass, torch.tensor([17 / 22], dtype=F64), **CLOSE)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_slim_loss_without_teacher_is_cross_entropy(reduction, label_smoothing):
    logits, target, _ = random_problem(dtype=F64)
    expected_logits = logits.clone().requires_grad_()
    expected = F.cross_entropy(expected_logits, target, reduction=reduction, label_smoothing=label_smoothing)
    upstream = torch.randn(expected.shape, dtype=F64)
    out, (grad,) = loss_and_grads(
        reference.slim_loss, (logits,), upstream, target, reduction=reduction, label_smoothing=label_smoothing
    )
    torch.testing.assert_close(out.loss, expected, **CLOSE)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, expected_logits, upstream)[0], **CLOSE)


@pytest.mark.parametrize("rest", reference.RESTS)
def test_slim_loss_with_the_whole_vocabulary_is_kl_div(rest):
    temperature, vocab_size = 2.5, 31
    logits, target, teacher = random_problem(5, vocab_size, vocab_size, dtype=F64, temperature=temperature, ignored=())
    log_q = torch.log_softmax(teacher.logits / temperature, -1)
    expected_logits = logits.clone().requires_grad_()
    log_p = torch.log_softmax(expected_logits / temperature, -1)
    expected = F.kl_div(log_p, log_q, reduction="sum", log_target=True) * temperature**2
    expected_grad = torch.autograd.grad(expected, expected_logits)[0]
    out, (grad,) = loss_and_grads(
        reference.slim_loss, (logits,), 1.0, target, teacher, **kd_only(rest=rest, temperature=temperature)
    )
    torch.testing.assert_close(out.loss, expected, **CLOSE)
    torch.testing.assert_close(grad, expected_grad, **CLOSE)
    if rest in ("ghost", "renorm_both"):
        out = reference.slim_loss(
            logits, target, teacher, **kd_only(rest=rest, temperature=temperature, divergence="reverse_kl")
        )
        expected = F.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2
        torch.testing.assert_close(out.loss, expected, **CLOSE)


@pytest.mark.parametrize("rest", reference.RESTS)
@pytest.mark.parametrize("divergence", ["forward_kl", "soft_ce"])
def test_slim_loss_gradient_is_the_closed_form(rest, divergence):
    temperature, num_rows, vocab_size = 1.7, 6, 53
    logits, target, teacher = random_problem(
        num_rows, vocab_size, 9, dtype=F64, temperature=temperature, ignored=(), ragged=True
    )
    _, (grad,) = loss_and_grads(
        reference.slim_loss,
        (logits,),
        1.0,
        target,
        teacher,
        **kd_only(rest=rest, divergence=divergence, temperature=temperature),
    )
    p = torch.softmax(logits / temperature, -1)
    q, filled, support = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p, dtype=torch.bool)
    for row, (ids, values, lse) in enumerate(zip(teacher.ids.tolist(), teacher.logits, teacher.lse[:, 1], strict=True)):
        for column, token in enumerate(ids):
            if token >= 0:
                q[row, token] = torch.exp(values[column] / temperature - lse)
                filled[row, token] = values[column] / temperature
                support[row, token] = True
    a, mass = q.sum(-1, keepdim=True), (p * support).sum(-1, keepdim=True)
    expected = {
        "renorm": p - q / a,
        "zero": a * p - q,
        "ghost": torch.where(support, p - q, p * (1 - (1 - a) / (1 - mass))),
        "zero_logit": p - torch.softmax(filled, -1),
        "renorm_both": torch.where(support, p / mass - q / a, 0.0),
    }[rest]
    # D is multiplied by T^2 and z / T divides by T.
    torch.testing.assert_close(grad, expected * temperature, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("weight", ["teacher_over_student", "student_over_teacher"])
@pytest.mark.parametrize(("rest", "divergence"), RESTS_AND_DIVERGENCES)
def test_slim_loss_gradcheck(rest, divergence, weight):
    logits, target, teacher = random_problem(4, 11, 5, dtype=F64, temperature=1.3, ragged=True)

    def loss(logits):
        return reference.slim_loss(
            logits,
            target,
            teacher,
            rest=rest,
            divergence=divergence,
            token_weight=weight,
            detach_weight=False,
            temperature=1.3,
            softcap=9.0,
            logit_scale=0.8,
            label_smoothing=0.1,
            z_loss_weight=1e-2,
            reduction="none",
        ).loss

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))


def test_slim_loss_detached_weight_scales_the_kd_gradient():
    logits, target, teacher = random_problem(dtype=F64, ignored=())
    out, (weighted,) = loss_and_grads(
        reference.slim_loss, (logits,), 1.0, target, teacher, ce_weight=0.0, reduction="sum"
    )
    _, (plain,) = loss_and_grads(reference.slim_loss, (logits,), 1.0, target, teacher, **kd_only())
    torch.testing.assert_close(weighted, out.weight.unsqueeze(-1) * plain, **CLOSE)
    _, (given,) = loss_and_grads(
        reference.slim_loss, (logits,), 1.0, target, teacher, **kd_only(token_weight=out.weight.clone())
    )
    torch.testing.assert_close(weighted, given, **CLOSE)


def test_slim_loss_weight_of_a_label_outside_ids():
    logits, target, teacher = hand_worked_problem()
    bare = SparseLogits(teacher.ids, teacher.logits, teacher.lse)
    assert reference.slim_loss(logits, target, bare).weight.item() == 0.0
    assert reference.slim_loss(logits, target, bare, token_weight="student_over_teacher").weight.item() == 1.0
    # Label 1 is kept: t_y / s_y = (1/4) / (1/2), whether looked up or given.
    label = torch.tensor([1])
    expected = torch.tensor([1 - math.exp(-0.5)], dtype=F64)
    torch.testing.assert_close(reference.slim_loss(logits, label, bare).weight, expected, **CLOSE)


def test_slim_loss_softcap_and_scale_are_a_change_of_logits():
    logits, target, teacher = random_problem(dtype=F64)
    options = {"rest": "ghost", "z_loss_weight": 0.1}
    leaf = logits.clone().requires_grad_()
    expected = reference.slim_loss(5.0 * torch.tanh(0.7 * leaf / 5.0), target, teacher, **options)
    out, (grad,) = loss_and_grads(
        reference.slim_loss, (logits,), 1.0, target, teacher, softcap=5.0, logit_scale=0.7, **options
    )
    torch.testing.assert_close(out.loss, expected.loss, **CLOSE)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.loss, leaf)[0], **CLOSE)


def test_slim_loss_reductions_and_num_items():
    logits, target, teacher = random_problem(dtype=F64, ignored=(1, 4))
    each = reference.slim_loss(logits, target, teacher, reduction="none").loss
    assert each[[1, 4]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(reference.slim_loss(logits, target, teacher, reduction="sum").loss, each.sum(), **CLOSE)
    torch.testing.assert_close(reference.slim_loss(logits, target, teacher).loss, each.sum() / 5, **CLOSE)
    for num_items in (12, torch.tensor(12)):
        out = reference.slim_loss(logits, target, teacher, num_items=num_items)
        torch.testing.assert_close(out.loss, each.sum() / 12, **CLOSE)


@pytest.mark.parametrize(("rest", "divergence"), RESTS_AND_DIVERGENCES)
def test_slim_loss_ignored_rows_cannot_leak(rest, divergence):
    logits, target, teacher = random_problem(4, 29, 5, dtype=F64, ignored=(0, 3))
    options = {"rest": rest, "divergence": divergence, "detach_weight": False, "statistics": True}
    expected, (expected_grad,) = loss_and_grads(reference.slim_loss, (logits,), 1.0, target, teacher, **options)
    logits[[0, 3]] = math.nan
    teacher.logits[[0, 3]] = math.nan
    teacher.lse[0] = math.inf
    out, (grad,) = loss_and_grads(reference.slim_loss, (logits,), 1.0, target, teacher, **options)
    for actual, wanted in zip((*out, grad), (*expected, expected_grad), strict=True):
        assert torch.equal(actual, wanted)
    assert not grad[[0, 3]].any()
    assert all(not field[[0, 3]].any() for field in out[1:])


@pytest.mark.parametrize("num_rows", [0, 3])
def test_slim_loss_without_a_label_is_zero(num_rows):
    logits, target, teacher = random_problem(num_rows, 17, 3, dtype=F64, ignored=(0, 1, 2))
    out, (grad,) = loss_and_grads(reference.slim_loss, (logits,), 1.0, target, teacher)
    assert out.loss.item() == 0.0
    assert not grad.any()


@pytest.mark.parametrize(("rest", "divergence"), RESTS_AND_DIVERGENCES)
@pytest.mark.parametrize("shape", ["-inf off the support", "K = V", "one kept", "empty row", "q = 0 in ids"])
def test_slim_loss_edges_have_finite_values_and_gradients(rest, divergence, shape):
    logits, target, teacher = random_problem(3, 13, 4, dtype=F64, ignored=())
    if shape == "-inf off the support":
        outside = torch.ones_like(logits, dtype=torch.bool).scatter(1, teacher.ids.long(), False)
        # All but one, on which the bucket of "ghost" still has something.
        outside.scatter_(1, outside.int().argmax(-1, keepdim=True), False)
        logits = logits.masked_fill(outside, -math.inf)
        target = teacher.ids[:, 1].long()
    elif shape == "K = V":
        _, _, teacher = random_problem(3, 13, 13, dtype=F64)
    elif shape == "one kept":
        _, _, teacher = random_problem(3, 13, 1, dtype=F64)
    elif shape == "empty row":
        teacher.ids[1] = -1
    else:
        teacher.logits[1, 2] = -math.inf
    out, (grad,) = loss_and_grads(
        reference.slim_loss,
        (logits,),
        1.0,
        target,
        teacher,
        rest=rest,
        divergence=divergence,
        detach_weight=False,
        reduction="sum",
        statistics=True,
    )
    if shape == "-inf off the support" and rest == "zero_logit":
        # The teacher expects something of every id.
        assert (out.kd == math.inf).all()
        return
    assert all(field.isfinite().all() for field in out)
    assert grad.isfinite().all()
    if shape == "-inf off the support":
        assert not grad[outside].any()
    if shape == "empty row" and rest != "zero_logit":
        assert abs(out.kd[1]) < 1e-15
        assert out.teacher_mass[1] == 0.0


def test_slim_loss_of_a_padded_row_is_that_of_the_shorter_row():
    logits, target, teacher = random_problem(5, 31, 8, dtype=F64, ignored=(), ragged=True)
    for rest, divergence in RESTS_AND_DIVERGENCES:
        options = {"rest": rest, "divergence": divergence, "reduction": "none", "statistics": True}
        padded = reference.slim_loss(logits, target, teacher, **options)
        for row in range(5):
            kept = int((teacher.ids[row] >= 0).sum())
            short = SparseLogits(
                teacher.ids[row, :kept],
                teacher.logits[row, :kept],
                teacher.lse[row],
                target_logit=teacher.target_logit[row],
            )
            alone = reference.slim_loss(logits[row], target[row], short, **options)
            for field, wanted in zip(padded, alone, strict=True):
                torch.testing.assert_close(field[row], wanted, **CLOSE)


@pytest.mark.parametrize("gap", [5.0, 40.0, 80.0])
def test_slim_loss_tails_do_not_cancel(gap):
    # Both sides keep one id of mass 1 - 3 exp(-gap) and more; 1 - P in float64 is pure rounding from gap = 37 on.
    logits = torch.tensor([[gap, 0.0, 0.5, 1.0]], dtype=F64)
    teacher_lse = math.log1p(2 * math.exp(-5.0))
    teacher = SparseLogits(
        torch.tensor([[0]], dtype=torch.int32), torch.zeros(1, 1, dtype=F64), torch.tensor([[teacher_lse]], dtype=F64)
    )
    out, (grad,) = loss_and_grads(
        reference.slim_loss, (logits,), 1.0, torch.tensor([0]), teacher, **kd_only(rest="ghost")
    )
    with mpmath.workdps(60):
        z = [mpmath.exp(mpmath.mpf(x)) for x in logits[0].tolist()]
        a, total = mpmath.exp(-mpmath.mpf(teacher_lse)), mpmath.fsum(z)
        tail = mpmath.fsum(z[1:]) / total
        expected = a * mpmath.log(a * total / z[0]) + (1 - a) * mpmath.log((1 - a) / tail)
        slopes = [z[0] / total - a] + [x / total * (1 - (1 - a) / tail) for x in z[1:]]
    torch.testing.assert_close(out.loss, torch.tensor(float(expected), dtype=F64), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, torch.tensor([[float(x) for x in slopes]], dtype=F64), rtol=1e-10, atol=1e-16)


def test_slim_loss_keeps_leading_dimensions_and_gives_the_teacher_no_gradient():
    logits, target, teacher = random_problem(6, 19, 4, dtype=F64, ignored=(4,))
    teacher.logits.requires_grad_()
    options = {"reduction": "none", "statistics": True}
    flat = reference.slim_loss(logits, target, teacher, **options)
    shaped = reference.slim_loss(logits.reshape(2, 3, 19), target.reshape(2, 3), teacher.reshape(2, 3), **options)
    for field, wanted in zip(shaped, flat, strict=True):
        assert torch.equal(field, wanted.reshape(2, 3))
        assert not field.requires_grad


@pytest.mark.parametrize("rest", reference.RESTS)
def test_slim_loss_teacher_mass_is_nan_where_unknown(rest):
    logits, target, teacher = random_problem()
    if rest in ("zero", "ghost"):
        with pytest.raises(ValueError, match="temperature"):
            reference.slim_loss(logits, target, teacher, rest=rest, temperature=2.0)
        return
    out = reference.slim_loss(logits, target, teacher, rest=rest, temperature=2.0)
    assert out.loss.isfinite()
    assert out.teacher_mass.isnan().tolist() == (target >= 0).tolist()


def test_slim_loss_half_types_are_computed_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        logits, target, teacher = random_problem(dtype=dtype)
        options = {"rest": "ghost", "statistics": True}
        out, (grad,) = loss_and_grads(reference.slim_loss, (logits,), 1.0, target, teacher, **options)
        wide, (wide_grad,) = loss_and_grads(reference.slim_loss, (logits.float(),), 1.0, target, teacher, **options)
        assert all(torch.equal(field, wanted) for field, wanted in zip(out, wide, strict=True))
        assert torch.equal(grad, wide_grad.to(dtype))


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("rest", {"rest": "other"}),
        ("divergence", {"divergence": "other"}),
        ("token_weight", {"token_weight": "other"}),
        ("reduction", {"reduction": "other"}),
        ("temperature", {"temperature": 0.0}),
        ("softcap", {"softcap": -1.0}),
        ("beta", {"beta": 1.5}),
        ("alpha", {"alpha": -0.5}),
        ("alpha, beta", {"rest": "ghost", "divergence": "ab", "beta": 0.0}),
        ("forward_weight", {"forward_weight": -0.5}),
        ("entropy_threshold", {"entropy_threshold": -0.5}),
        ("teacher_blend", {"rest": "ghost", "teacher_blend": 0.0}),
        ("rest", {"teacher_blend": 0.5}),
        ("tail_weight", {"rest": "ghost", "tail_weight": -0.5}),
        ("rest", {"tail_weight": 0.5}),
        ("divergence", {"rest": "ghost", "divergence": "ab", "tail_weight": 0.5}),
        ("num_items", {"num_items": 3, "reduction": "sum"}),
        *(
            ("rest", {"rest": rest, "divergence": divergence})
            for rest, divergence in itertools.product(reference.RESTS, reference.DIVERGENCES)
            if (rest, divergence) not in RESTS_AND_DIVERGENCES
        ),
    ],
)
def test_slim_loss_refuses(argument, options):
    logits, target, teacher = random_problem()
    with pytest.raises(ValueError, match=argument):
        reference.slim_loss(logits, target, teacher, **options)


def test_slim_loss_refuses_a_target_outside_the_vocabulary():
    logits, target, teacher = random_problem()
    for label in (203, -1):
        target[0] = label
        with pytest.raises(ValueError, match="target"):
            reference.slim_loss(logits, target, teacher)


def test_linear_slim_loss_is_slim_loss_of_the_product():
    _, target, teacher = random_problem(dtype=F64)
    hidden, weight, bias = torch.randn(7, 5, dtype=F64), torch.randn(203, 5, dtype=F64), torch.randn(203, dtype=F64)
    options = {"rest": "ghost", "softcap": 3.0, "z_loss_weight": 0.1}
    out, grads = loss_and_grads(
        lambda h, w, b: reference.linear_slim_loss(h, w, target, teacher, bias=b, token_weight="none", **options),
        (hidden, weight, bias),
        1.0,
    )
    expected, expected_grads = loss_and_grads(
        lambda h, w, b: reference.slim_loss(F.linear(h, w, b), target, teacher, token_weight="none", **options),
        (hidden, weight, bias),
        1.0,
    )
    for actual, wanted in zip((*out, *grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE)
