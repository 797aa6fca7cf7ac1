"""``slim_loss`` and its gradient by value, against hand-worked numbers and the reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from support.helpers import (
    DTYPES,
    HAND_WORKED,
    HAND_WORKED_WEIGHTS,
    RESTS_AND_DIVERGENCES,
    assert_as_accurate,
    assert_same_bits,
    assert_slim_loss_of_rows,
    explain,
    hand_worked_problem,
    loss_and_grads,
    random_problem,
    to_dtype,
)

import slimkernels as sk
from slimkernels import SparseLogits, reference

F64 = torch.float64
INF, NAN = math.inf, math.nan
WEIGHTS = ("teacher_over_student", "student_over_teacher", "none", "tensor")
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


@pytest.mark.parametrize(("rest", "divergence", "options", "expected"), HAND_WORKED)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_slim_loss_divergence_hand_worked(rest, divergence, options, expected, dtype):
    logits, target, teacher = hand_worked_problem()
    out = sk.slim_loss(logits.to(dtype), target, to_dtype(teacher, dtype), rest=rest, divergence=divergence, **options)
    tolerance = {"rtol": 3e-6, "atol": 1e-7} if dtype == torch.float32 else CLOSE
    torch.testing.assert_close(out.kd, torch.tensor([expected], dtype=dtype), **tolerance)


@pytest.mark.parametrize(("weight", "expected"), HAND_WORKED_WEIGHTS)
def test_slim_loss_terms_hand_worked(weight, expected):
    logits, target, teacher = hand_worked_problem()
    out = sk.slim_loss(
        logits, target, teacher, token_weight=weight, rest="zero", ce_weight=3.0, kd_weight=5.0, z_loss_weight=7.0
    )
    kd = 3 / 4 * math.log(2)
    fields = {"ce": math.log(4), "kd": kd, "weight": expected, "teacher_mass": 3 / 4, "student_mass": 5 / 8, "lse": 1}
    for name, value in fields.items():
        torch.testing.assert_close(getattr(out, name), torch.tensor([value], dtype=F64), **CLOSE, msg=name)
    torch.testing.assert_close(
        out.loss, torch.tensor(3 * math.log(4) + 5 * expected * kd + 7 * 1.0, dtype=F64), **CLOSE
    )


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("rest", "divergence"), RESTS_AND_DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slim_loss_matches_the_reference(dtype, rest, divergence, weight):
    logits, target, teacher = random_problem(dtype=dtype, temperature=1.7, ragged=weight == "tensor")
    options = {"rest": rest, "divergence": divergence, "temperature": 1.7}
    options["token_weight"] = torch.rand(7) if weight == "tensor" else weight
    assert_slim_loss_of_rows(logits, target, teacher, upstream=1.5, **options)


@pytest.mark.parametrize(("rest", "divergence"), RESTS_AND_DIVERGENCES)
@pytest.mark.parametrize("weight", ["teacher_over_student", "student_over_teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_slim_loss_through_the_weight(dtype, rest, divergence, weight):
    logits, target, teacher = random_problem(dtype=dtype, seed=1)
    options = {"rest": rest, "divergence": divergence, "token_weight": weight, "detach_weight": False}
    assert_slim_loss_of_rows(logits, target, teacher, reduction="sum", **options)


OPTIONS = {
    "no teacher": {"teacher": None},
    "no teacher, z-loss": {"teacher": None, "z_loss_weight": 0.1, "label_smoothing": 0.2},
    "ce alone": {"kd_weight": 0.0},
    "kd alone": {"ce_weight": 0.0},
    "weights": {"ce_weight": 0.3, "kd_weight": 2.5},
    "z-loss alone": {"ce_weight": 0.0, "kd_weight": 0.0, "z_loss_weight": 0.5},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss_weight": 1e-2},
    "softcap": {"softcap": 4.0},
    "logit scale": {"logit_scale": 0.125},
    "softcap and scale": {"softcap": 7.0, "logit_scale": 1.5, "temperature": 1.7},
    "temperature below 1": {"temperature": 0.6},
    "temperature": {"temperature": 4.0},
    "beta": {"divergence": "jsd", "beta": 0.9},
    "alpha": {"divergence": "skew_kl", "alpha": 0.6},
    "alpha of 0": {"divergence": "skew_kl", "alpha": 0.0},
    "alpha of 0, reverse": {"divergence": "skew_reverse_kl", "alpha": 0.0},
    "ab": {"divergence": "ab", "alpha": 0.9, "beta": 0.3, "temperature": 1.7},
    "smallest ab": {"divergence": "ab", "alpha": 0.05, "beta": 0.05},
    "forward_weight": {"divergence": "gated", "forward_weight": 0.3, "entropy_threshold": 0.0},
    "entropy_threshold": {"divergence": "gated", "entropy_threshold": 1.2, "temperature": 1.7},
    "teacher_blend": {"divergence": "jsd", "teacher_blend": 0.4, "temperature": 1.7},
    "teacher_blend of a part": {"rest": "renorm_both", "teacher_blend": 0.3},
    "tail_weight": {"divergence": "skew_kl", "tail_weight": 2.5},
    "tail_weight of 0": {"divergence": "reverse_kl", "tail_weight": 0.0},
    "tail_weight, blended": {"divergence": "gated", "tail_weight": 0.3, "teacher_blend": 0.8},
    "ignore_index": {"ignore_index": 5},
    "num_items": {"num_items": 20},
    "num_items tensor": {"num_items": torch.tensor(20)},
    "sum": {"reduction": "sum", "upstream": -2.5},
    "none": {"reduction": "none", "upstream": torch.linspace(-1.0, 2.0, 7)},
    "mean, upstream": {"upstream": 12.0},
    "upstream of 0": {"upstream": 0.0},
    "all": {
        "divergence": "jsd",
        "detach_weight": False,
        "label_smoothing": 0.1,
        "z_loss_weight": 1e-2,
        "softcap": 9.0,
        "logit_scale": 0.7,
        "temperature": 1.7,
        "num_items": 9,
        "ce_weight": 0.4,
        "upstream": 3.0,
    },
    "all, none": {
        "divergence": "reverse_kl",
        "detach_weight": False,
        "label_smoothing": 0.1,
        "z_loss_weight": 1e-2,
        "softcap": 9.0,
        "logit_scale": 0.7,
        "temperature": 1.7,
        "reduction": "none",
        "upstream": torch.linspace(-1.0, 2.0, 7),
    },
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slim_loss_options(dtype, name):
    options = {"rest": "ghost", **OPTIONS[name]}
    logits, target, teacher = random_problem(dtype=dtype, temperature=options.get("temperature", 1.0))
    if "ignore_index" in options:
        target[target == -100] = 5
        target[3] = 5
    assert_slim_loss_of_rows(logits, target, options.pop("teacher", teacher), **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_slim_loss_without_teacher_is_cross_entropy(reduction):
    logits, target, _ = random_problem(dtype=F64)
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, target, reduction=reduction, label_smoothing=0.1)
    upstream = torch.randn(expected.shape, dtype=F64)
    out, (grad,) = loss_and_grads(sk.slim_loss, (logits,), upstream, target, reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(out.loss, expected, **CLOSE)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, leaf, upstream)[0], **CLOSE)
    assert not any(field.any() for field in (out.kd, out.weight, out.teacher_mass, out.student_mass))


SHAPES = (
    *((0, 11, 3), (1, 1, 1), (1, 2, 1), (2, 2, 2), (3, 7, 7), (2, 63, 1), (2, 127, 127), (5, 129, 64)),
    *((3, 1023, 51), (3, 1025, 1024), (2, 4099, 205), (2, 9001, 9001), (2, 32003, 1601)),
)


@pytest.mark.parametrize(("num_rows", "vocab_size", "top_k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slim_loss_shapes(dtype, num_rows, vocab_size, top_k):
    pairs = RESTS_AND_DIVERGENCES
    if vocab_size > 1000:
        # What the walk over a long row shares: one pair with the tail, one without, one that fills it, one on S alone.
        pairs = (("renorm", "forward_kl"), ("ghost", "jsd"), ("zero_logit", "forward_kl"), ("renorm_both", "skew_kl"))
    logits, target, teacher = random_problem(num_rows, vocab_size, top_k, dtype=dtype, ignored=())
    for rest, divergence in pairs:
        assert_slim_loss_of_rows(logits, target, teacher, rest=rest, divergence=divergence)


@pytest.mark.parametrize("with_target_logit", [True, False])
@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("teacher", DTYPES)
def test_slim_loss_of_other_teacher_dtypes(student, teacher, with_target_logit):
    logits, target, record = random_problem(dtype=teacher, with_target_logit=with_target_logit)
    assert_slim_loss_of_rows(logits.to(student), target, record, rest="ghost")


@pytest.mark.parametrize("weight", WEIGHTS[:2])
def test_slim_loss_label_outside_the_ids_without_target_logit(weight):
    logits, target, teacher = random_problem(9, 203, 5, with_target_logit=False, ignored=(), seed=3)
    outside = (teacher.ids != target[:, None]).all(-1)
    assert 0 < outside.sum() < 9
    out = sk.slim_loss(logits, target, teacher, token_weight=weight)
    assert (out.weight[outside] == (0.0 if weight == "teacher_over_student" else 1.0)).all()
    assert ((out.weight[~outside] > 0.0) & (out.weight[~outside] < 1.0)).all()
    assert_slim_loss_of_rows(logits, target, teacher, token_weight=weight, detach_weight=False)


@pytest.mark.parametrize("weight", ["teacher_over_student", "student_over_teacher"])
def test_slim_loss_of_rows_whose_target_logit_is_not_known(weight):
    logits, target, teacher = random_problem(ignored=())
    kept = (teacher.ids == target[:, None]).any(-1)
    assert kept.any()
    assert not kept.all()
    unknown = dataclasses.replace(teacher, target_logit=None)
    partly = dataclasses.replace(teacher, target_logit=teacher.target_logit.clone())
    partly.target_logit[::2] = math.nan
    options = {"token_weight": weight, "reduction": "none", "rest": "ghost", "detach_weight": False}
    options["statistics"] = True
    outs = []
    for each in (teacher, unknown, partly):
        leaf = logits.clone().requires_grad_()
        out = sk.slim_loss(leaf, target, each, **options)
        outs.append((*out, torch.autograd.grad(out.loss.sum(), leaf)[0]))
    for known_field, unknown_field, partly_field in zip(*outs, strict=True):
        assert torch.equal(partly_field[::2], unknown_field[::2])
        assert torch.equal(partly_field[1::2], known_field[1::2])


@pytest.mark.parametrize(("weight", "expected"), [("teacher_over_student", 0.0), ("student_over_teacher", 1.0)])
def test_slim_loss_of_a_label_that_both_rule_out(weight, expected):
    logits, target, teacher = random_problem(3, 59, 5, with_target_logit=False, ignored=(), seed=3)
    target[1] = next(token for token in range(59) if token not in teacher.ids[1])
    logits[1, target[1]] = -INF
    out = sk.slim_loss(logits, target, teacher, token_weight=weight, ce_weight=0.0)
    assert out.weight[1] == expected
    assert out.loss.isfinite()


@pytest.mark.parametrize("weight", WEIGHTS[:2])
def test_slim_loss_looks_the_label_up_at_temperature_one(weight):
    logits, _, teacher = random_problem(with_target_logit=False, temperature=1.7)
    target = teacher.ids[:, 4].long()
    assert_slim_loss_of_rows(logits, target, teacher, token_weight=weight, temperature=1.7)


@pytest.mark.parametrize("gap", [5.0, 20.0, 80.0])
def test_slim_loss_tails_do_not_cancel(gap):
    # Float32 knows nothing of a student tail of exp(-20) that is computed as 1 - P.
    logits = torch.tensor([[gap, 0.0, 0.5, 1.0]])
    lse = torch.tensor([[math.log1p(2 * math.exp(-5.0))]])
    teacher = SparseLogits(torch.tensor([[0]], dtype=torch.int32), torch.zeros(1, 1), lse)
    options = {"rest": "ghost", "token_weight": "none", "ce_weight": 0.0}
    out, (grad,) = loss_and_grads(sk.slim_loss, (logits,), 1.0, torch.tensor([0]), teacher, **options)
    truth, (true_grad,) = loss_and_grads(
        reference.slim_loss, (logits.double(),), 1.0, torch.tensor([0]), to_dtype(teacher, F64), **options
    )
    torch.testing.assert_close(out.kd.double(), truth.kd, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad[:, 1:].double(), true_grad[:, 1:], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("rest", "divergence"), RESTS_AND_DIVERGENCES)
@pytest.mark.parametrize("shape", ["-inf off the support", "one kept", "empty row", "q = 0 in ids", "full mass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slim_loss_edges(rest, divergence, shape, dtype):
    logits, target, teacher = random_problem(3, 45, 6, dtype=dtype, ignored=())
    options = {"rest": rest, "divergence": divergence, "reduction": "sum"}
    if shape == "-inf off the support":
        outside = torch.ones_like(logits, dtype=torch.bool).scatter(1, teacher.ids.long(), False)
        # All but one, on which the bucket of "ghost" still has something.
        outside.scatter_(1, outside.int().argmax(-1, keepdim=True), False)
        logits = logits.masked_fill(outside, -INF)
        target = teacher.ids[:, 1].long()
        _, (grad,) = loss_and_grads(sk.slim_loss, (logits,), 1.0, target, teacher, **options)
        if rest == "zero_logit":
            # The teacher expects something of every id, so the loss is infinite.
            assert (sk.slim_loss(logits, target, teacher, **options).kd == INF).all()
            return
        assert not grad[outside].any()
    elif shape == "one kept":
        _, _, teacher = random_problem(3, 45, 1, dtype=dtype)
    elif shape == "empty row":
        teacher.ids[1] = -1
    elif shape == "q = 0 in ids":
        teacher.logits[1, 2] = -INF
    else:
        # A record whose lse says that nothing lies outside: 1 - a = 0, while the student has a tail.
        teacher = SparseLogits(teacher.ids, teacher.logits, torch.logsumexp(teacher.logits.float(), -1, keepdim=True))
        teacher.lse.sub_(1e-6)
    assert_slim_loss_of_rows(logits, target, teacher, **options)


@pytest.mark.parametrize("vocab_size", [45, 1000])
@pytest.mark.parametrize(
    "options", [{}, {"rest": "ghost", "temperature": 2.0, "statistics": True}], ids=["default", "ghost"]
)
def test_slim_loss_of_a_student_with_nan_off_the_support(options, vocab_size):
    # A kernel may take the largest logit off S from a few maxima, all of which are NaN here.
    temperature = options.get("temperature", 1.0)
    logits, _, teacher = random_problem(3, vocab_size, 6, temperature=temperature, ignored=())
    outside = torch.ones_like(logits, dtype=torch.bool).scatter(1, teacher.ids.long(), False)
    logits[0, outside[0].int().argmax()] = NAN
    logits[1, outside[1]] = NAN
    target = teacher.ids[:, 1].long()
    out, (grad,) = loss_and_grads(sk.slim_loss, (logits,), torch.ones(3), target, teacher, reduction="none", **options)
    assert torch.stack([out.loss, out.lse])[:, :2].isnan().all()
    assert grad[:2].isnan().all()
    assert grad[2].isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("rest", ["renorm", "zero", "ghost"])
def test_slim_loss_without_kd_is_that_without_a_teacher(rest, value):
    logits, target, teacher = random_problem(3, 45, 6, ignored=())
    teacher.logits[0, 2] = value
    operands = sk.slim_loss, (logits,), 1.0, target
    out, (grad,) = loss_and_grads(*operands, teacher, rest=rest, divergence="soft_ce", kd_weight=0.0)
    alone, (expected,) = loss_and_grads(*operands, None, kd_weight=0.0)
    torch.testing.assert_close(out.loss, alone.loss)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_slim_loss_scales_a_student_with_infinite_logits(temperature):
    logits, target, teacher = random_problem(3, 45, 6, temperature=temperature, ignored=())
    outside = torch.ones_like(logits, dtype=torch.bool).scatter(1, teacher.ids.long(), False)
    logits = logits.masked_fill(outside & (torch.arange(45) % 2 == 0), -INF)
    target = teacher.ids[:, 1].long()
    assert_slim_loss_of_rows(logits, target, teacher, rest="ghost", temperature=temperature, logit_scale=0.7)


# Divergences that are infinite where the student rules out what the teacher allows, "gated" where its gate is open.
WEIGH_WITH_THE_TEACHER = ("forward_kl", "soft_ce", "gated")


def test_slim_loss_of_a_student_without_anything_off_the_support():
    logits, _, teacher = random_problem(3, 45, 6)
    outside = torch.ones_like(logits, dtype=torch.bool).scatter(1, teacher.ids.long(), False)
    logits, target = logits.masked_fill(outside, -INF), teacher.ids[:, 1].long()
    for rest, divergence in RESTS_AND_DIVERGENCES:
        options = {"rest": rest, "divergence": divergence, "entropy_threshold": 0.0}
        if rest == "zero_logit" or (rest == "ghost" and divergence in WEIGH_WITH_THE_TEACHER):
            # The teacher expects something there.
            assert (sk.slim_loss(logits, target, teacher, **options).kd == INF).all()
            continue
        with explain(f"{rest}, {divergence}"):
            assert_slim_loss_of_rows(logits, target, teacher, **options)
        _, (grad,) = loss_and_grads(sk.slim_loss, (logits,), 1.0, target, teacher, **options)
        assert not grad[outside].any()


def test_slim_loss_of_infinite_student_logits_on_the_support():
    # The student rules out what the teacher allows: D is +inf where it weighs with the teacher, finite elsewhere.
    logits, target, teacher = random_problem(2, 31, 5, ignored=())
    target = teacher.ids[:, 0].long()
    logits[0, teacher.ids[0, 3].item()] = -INF
    for rest, divergence in RESTS_AND_DIVERGENCES:
        options = {"rest": rest, "divergence": divergence, "entropy_threshold": 0.0}
        out, truth = (f(logits, target, teacher, **options) for f in (sk.slim_loss, reference.slim_loss))
        assert_as_accurate(out.kd, truth.kd, truth.kd.double())
        assert out.kd.isinf().tolist() == [divergence in WEIGH_WITH_THE_TEACHER, False]


@pytest.mark.parametrize("magnitude", [1e-4, 80.0, 3e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slim_loss_of_small_and_large_logits(magnitude, dtype):
    generator = torch.Generator().manual_seed(5)
    logits = (magnitude * torch.rand(4, 301, generator=generator, dtype=F64)).to(dtype)
    teacher = reference.topk_logits(torch.randn(4, 301, generator=generator).to(dtype), 15)
    target = torch.tensor([0, 17, 300, -100])
    for rest in reference.RESTS:
        assert_slim_loss_of_rows(logits, target, teacher, rest=rest, z_loss_weight=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("scale", [1.0, -3e-5])
def test_slim_loss_gradient_below_the_smallest_normal_number_is_zero(dtype, scale):
    info = torch.finfo(dtype)
    lowest = 1.06 * math.log(info.tiny)
    logits = torch.linspace(lowest, 0.0, 4099, dtype=F64).to(dtype).repeat(2, 1).requires_grad_()
    target = torch.tensor([4000, 0])
    (scale * sk.slim_loss(logits, target, reduction="none").loss).sum().backward()
    exact = scale * (logits.detach().double().softmax(-1) - F.one_hot(target, 4099))
    size = exact.abs()
    below, above = size < (1 - 1e-4) * info.tiny, size > (1 + 1e-2) * info.tiny
    assert below.sum() > 100
    assert not logits.grad[below].any()
    torch.testing.assert_close(logits.grad[above].double(), exact[above], rtol=max(3e-5, 2 * info.eps), atol=0)


@pytest.mark.parametrize(("rest", "divergence"), RESTS_AND_DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_slim_loss_makes_no_denormal_gradient(rest, divergence, temperature, dtype):
    tiny = torch.finfo(dtype).tiny
    generator = torch.Generator().manual_seed(6)
    spread = -1.3 * math.log(tiny)
    logits = (-spread * torch.rand(5, 3001, generator=generator, dtype=F64)).to(dtype)
    teacher_logits = (-spread * torch.rand(5, 3001, generator=generator, dtype=F64)).to(dtype)
    logits[:, 7], teacher_logits[:, 7] = 3.0, 2.0
    target = torch.full((5,), 7)
    teacher = reference.topk_logits(teacher_logits, 2000, target=target, temperatures=(1.0, 0.5))
    logits.requires_grad_()
    sk.slim_loss(logits, target, teacher, rest=rest, divergence=divergence, temperature=temperature).loss.backward()
    size = logits.grad.abs()
    assert bool(logits.grad.isfinite().all())
    assert not ((size > 0) & (size < tiny)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.5, 0.995, 0.9995])
def test_slim_loss_of_masked_rows(dtype, share):
    vocab_size = 9001
    generator = torch.Generator().manual_seed(8)
    masked = torch.rand(vocab_size, generator=generator) < share
    masked[:130] = True
    masked[8990] = False
    rows = 3 * torch.randn(2, 3, vocab_size, generator=generator)
    student, teacher_logits = rows.masked_fill(masked, -INF).to(dtype)
    target = torch.full((3,), 8990)
    assert_slim_loss_of_rows(student, target, None)
    teacher = reference.topk_logits(teacher_logits, 2, target=target)
    assert_slim_loss_of_rows(student, target, teacher)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_slim_loss_float16_takes_the_default_loss_scale(reduction):
    # torch.amp.GradScaler starts at 2^16, which float16 itself cannot hold.
    logits, target, teacher = random_problem(dtype=torch.float16)
    assert_slim_loss_of_rows(
        logits, target, teacher, upstream=2.0**16 if reduction == "mean" else 2.0**13, reduction=reduction
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [16384, 16411])
def test_slim_loss_writes_a_large_gradient_like_a_small_one(dtype, vocab_size):
    num_rows = 2 * 2**22 // (vocab_size * dtype.itemsize)  # together past the size from which caches are passed by
    problem = random_problem(num_rows, vocab_size, 100, dtype=dtype)
    together = loss_and_grads(sk.slim_loss, problem[:1], 1.0, *problem[1:], reduction="sum")[1][0]
    for n in range(num_rows):
        row = slice(n, n + 1)
        alone = loss_and_grads(
            sk.slim_loss, (problem.logits[row],), 1.0, problem.target[row], problem.teacher[row], reduction="sum"
        )[1][0]
        assert_same_bits(together[row], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rest", ["renorm", "ghost", "zero_logit"])
@pytest.mark.parametrize("height", [300.0, 60.0, -60.0, -300.0])
def test_slim_loss_of_a_row_that_no_sample_tells(dtype, rest, height):
    # A few entries far above all others, and nearly all far below a few: whatever is read first misleads.
    problem = random_problem(6, 3001, 40, dtype=dtype, ignored=())
    logits = problem.logits.clone()
    lone = torch.tensor([1234, 1235, 2999])
    if height > 0:
        logits[:, lone] += height
    else:
        others = torch.ones(3001, dtype=torch.bool)
        others[[0, 17, *lone.tolist()]] = False
        logits[:, others] += height
    # float32 exponentials of large arguments carry the rounding of the arguments.
    assert_slim_loss_of_rows(logits, problem.target, problem.teacher, rest=rest)
