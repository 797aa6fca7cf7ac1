"""The statistics of ``slim_loss`` by value: entropies, the student's first choice, its overlap with the kept ids."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from support.helpers import (
    DTYPES,
    RESTS_AND_DIVERGENCES,
    assert_as_accurate,
    assert_same_bits,
    explain,
    hand_worked_problem,
    hostile_rows,
    loss_and_grads,
    opcheck_calls_of,
    random_problem,
    to_dtype,
)

import slimkernels as sk
from slimkernels import SparseLogits, reference
from slimkernels.ops.slim_result import NUM_STATS

F64 = torch.float64
NAN = math.nan
FIELDS = sk.SlimLoss._fields
STATISTICS = FIELDS[NUM_STATS["none"] :]
FLAGS = ("argmax_kept", "argmax_correct", "overlap")
LEVELS = {False: "none", "without_overlap": "without_overlap", True: "all"}


def assert_statistics_of_rows(logits, target, teacher, **options) -> sk.SlimLoss:
    """Asserts that the statistics are those of the reference, and that they change no other field by a bit."""
    out = sk.slim_loss(logits, target, teacher, statistics=True, **options)
    assert_same_bits(out[: NUM_STATS["none"]], sk.slim_loss(logits, target, teacher, **options)[: NUM_STATS["none"]])
    theirs = reference.slim_loss(logits, target, teacher, statistics=True, **options)
    wide = None if teacher is None else to_dtype(teacher, F64)
    truth = reference.slim_loss(logits.double(), target, wide, statistics=True, **options)
    for name in STATISTICS:
        values = [getattr(result, name) for result in (out, theirs, truth)]
        with explain(name):
            if name in FLAGS:
                # Whole numbers and their shares, of comparisons that no rounding touches.
                torch.testing.assert_close(values[0].double(), values[2], rtol=1e-6, atol=0, equal_nan=True)
            elif name == "teacher_surer":
                near = (theirs.ce - truth.ce).abs() > 1e-3 if teacher is None else _almost_as_sure(truth, wide, target)
                assert_same_bits(values[0].double()[~near], values[2][~near])
            else:
                assert_as_accurate(*values, at_least=1.0)
    return out


def _almost_as_sure(truth, teacher, target):
    """Whether t_y and s_y are too close to tell apart in float32."""
    log_t_y = teacher.logits.masked_fill(teacher.ids != target.unsqueeze(-1), -math.inf).amax(-1)
    if teacher.target_logit is not None:
        log_t_y = torch.where(teacher.target_logit.isnan(), log_t_y, teacher.target_logit)
    return (log_t_y - teacher.lse[..., 0] + truth.ce).abs() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_statistics_hand_worked(dtype):
    logits, target, teacher = hand_worked_problem()
    s = torch.softmax(logits.double(), -1)[0].tolist()
    q = (teacher.logits - teacher.lse).exp()[0].tolist()
    outcomes = [*q, 1 - sum(q)]
    out = sk.slim_loss(logits.to(dtype), target, to_dtype(teacher, dtype), statistics=True)
    expected = {
        "entropy": -sum(p * math.log(p) for p in s),
        "teacher_entropy": -sum(p * math.log(p) for p in outcomes),
        "argmax_kept": float(s.index(max(s)) in teacher.ids[0].tolist()),
        "argmax_correct": float(s.index(max(s)) == int(target)),
        "overlap": len({*teacher.ids[0].tolist()} & {*sorted(range(4), key=lambda v: (-s[v], v))[:2]}) / 2,
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name), torch.tensor([value], dtype=dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rest", reference.RESTS)
@pytest.mark.parametrize("ragged", [False, True])
def test_statistics_match_the_reference(dtype, rest, ragged):
    for temperature in (1.0, 1.7):
        problem = random_problem(9, dtype=dtype, temperature=temperature, ragged=ragged)
        assert_statistics_of_rows(*problem, rest=rest, temperature=temperature)


OPTIONS = {
    "softcap": {"softcap": 4.0, "logit_scale": 0.7},
    "softcap at a temperature": {"softcap": 4.0, "temperature": 1.7},
    "label smoothing": {"label_smoothing": 0.1, "token_weight": "none"},
    "no divergence": {"kd_weight": 0.0},
    "other weight": {"token_weight": "student_over_teacher", "divergence": "jsd", "rest": "ghost"},
    "none": {"reduction": "none"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_with_options(name, dtype):
    options = OPTIONS[name]
    problem = random_problem(dtype=dtype, temperature=options.get("temperature", 1.0))
    assert_statistics_of_rows(*problem, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_without_a_teacher(dtype):
    logits, target, _ = random_problem(dtype=dtype)
    target[1] = logits[1].argmax()
    out = assert_statistics_of_rows(logits, target, None, label_smoothing=0.1)
    assert out.argmax_correct[1] == 1
    for name in ("teacher_entropy", "argmax_kept", "teacher_surer", "overlap"):
        assert not getattr(out, name).any()


def hostile_problem(vocab_size: int, dtype: torch.dtype, top_k: int, shift: int):
    """Every hostile row as a student whose label has a probability, against other such rows as teachers."""
    rows = {name: row for name, row in hostile_rows(vocab_size, dtype).items() if not (row == math.inf).any()}
    logits = torch.stack(list(rows.values()))
    teachers = logits.roll(shift, 0).nan_to_num(nan=0.0, neginf=-math.inf)
    empty = (teachers == -math.inf).all(-1)
    teachers[empty] = 0.5
    target = logits.nan_to_num(nan=-math.inf, neginf=-math.inf).argmax(-1)
    return logits, target, reference.topk_logits(teachers, top_k, target=target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab_size", "top_k"), [(301, 16), (1100, 1100), (130, 129)])
@pytest.mark.parametrize("shift", [0, 7])
def test_statistics_of_hostile_rows(dtype, vocab_size, top_k, shift):
    logits, target, teacher = hostile_problem(vocab_size, dtype, top_k, shift)
    # The loss of some is infinite, and that of a row without any probability is NaN.
    assert_statistics_of_rows(logits, target, teacher, ce_weight=0.0, kd_weight=0.0)


@pytest.mark.parametrize("magnitude", [1e-4, 80.0, 3e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_small_and_large_logits(magnitude, dtype):
    generator = torch.Generator().manual_seed(5)
    logits = (magnitude * torch.rand(4, 301, generator=generator, dtype=F64)).to(dtype)
    teacher = reference.topk_logits((magnitude * torch.randn(4, 301, generator=generator, dtype=F64)).to(dtype), 15)
    assert_statistics_of_rows(logits, torch.tensor([0, 17, 300, -100]), teacher, kd_weight=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("height", [300.0, 60.0, -60.0, -300.0])
def test_statistics_of_a_row_that_no_sample_tells(dtype, height):
    logits, target, teacher = random_problem(6, 3001, 40, dtype=dtype, ignored=())
    lone = torch.tensor([1234, 1235, 2999])
    if height > 0:
        logits[:, lone] += height
    else:
        others = torch.ones(3001, dtype=torch.bool)
        others[[0, 17, *lone.tolist()]] = False
        logits[:, others] += height
    assert_statistics_of_rows(logits, target, teacher)


@pytest.mark.parametrize("gap", [5.0, 20.0, 80.0])
def test_statistics_keep_the_entropy_of_a_peaked_teacher(gap):
    # Float32 knows nothing of a tail of exp(-20) that is computed as 1 - a; the record has it.
    rows = torch.tensor([[gap, 0.0, 0.5, 1.0]])
    teacher = sk.topk_logits(rows, 1)
    out = sk.slim_loss(rows, torch.tensor([0]), teacher, token_weight="none", statistics=True)
    tail = math.log(sum(math.exp(x) for x in (0.0, 0.5, 1.0))) - gap
    tail -= math.log1p(math.exp(tail))
    expected = -math.exp(tail) * tail - math.log1p(-math.exp(tail)) * -math.expm1(tail)
    assert out.teacher_entropy.item() == pytest.approx(expected, rel=1e-4, abs=1e-30)


def test_ties_go_to_the_lowest_id():
    # Four equal largest logits: the first is the choice, and three of them are in the top 3.
    logits = torch.tensor([[0.0, 2.0, -0.0, 2.0, 2.0, 1.0, 2.0]]).repeat(4, 1)
    ids = torch.tensor([[1, 3, 4], [3, 4, 6], [0, 5, 6], [0, 2, -1]], dtype=torch.int32)
    teacher = SparseLogits(ids, torch.zeros(4, 3), torch.full((4, 1), 2.0))
    target = torch.tensor([1, 3, 1, 0])
    out = sk.slim_loss(logits, target, teacher, token_weight="none", statistics=True)
    assert out.argmax_kept.tolist() == [1, 0, 0, 0]
    assert out.argmax_correct.tolist() == [1, 0, 1, 0]
    torch.testing.assert_close(out.overlap, torch.tensor([1, 2 / 3, 0, 0]))
    # The largest of a row of zeros of both signs is its first.
    zeros = sk.slim_loss(torch.tensor([[-0.0, 0.0, 0.0]]), torch.tensor([0]), statistics=True)
    assert zeros.argmax_correct.item() == 1


def test_a_row_that_keeps_nothing_has_no_overlap():
    logits, target, teacher = random_problem(3, 45, 6, ignored=())
    teacher.ids[1] = -1
    out = assert_statistics_of_rows(logits, target, teacher)
    assert (out.overlap[1], out.argmax_kept[1]) == (0, 0)


def test_the_teacher_entropy_is_a_lower_bound_and_nan_where_unknown():
    generator = torch.Generator().manual_seed(2)
    rows = 3 * torch.randn(5, 97, generator=generator)
    target = torch.randint(97, (5,), generator=generator)
    whole = torch.distributions.Categorical(logits=rows).entropy()
    before = torch.zeros(5)
    for top_k in (1, 5, 30, 97):
        out = sk.slim_loss(rows, target, sk.topk_logits(rows, top_k, target=target), statistics="without_overlap")
        assert (out.teacher_entropy >= before - 1e-6).all()
        assert (out.teacher_entropy <= whole + 1e-5).all()
        before = out.teacher_entropy
    torch.testing.assert_close(before, whole)
    torch.testing.assert_close(out.entropy, whole)
    out = sk.slim_loss(rows, target, sk.topk_logits(rows, 5, target=target), temperature=2.0, statistics=True)
    assert out.teacher_entropy.isnan().all()
    assert not out.entropy.isnan().any()


def test_statistics_without_rest_lse():
    logits, target, teacher = random_problem(top_k=203, with_target_logit=False, ignored=())
    assert teacher.rest_lse is None
    assert_statistics_of_rows(logits, target, teacher)
    logits, target, teacher = random_problem(with_target_logit=False)
    assert_statistics_of_rows(logits, target, teacher)
    known = random_problem().teacher
    partly = dataclasses.replace(known, rest_lse=known.rest_lse.clone())
    partly.rest_lse[::2] = NAN
    assert_statistics_of_rows(logits, target, partly)


@pytest.mark.parametrize("statistics", LEVELS)
def test_only_what_is_asked_for_is_there(statistics):
    logits, target, teacher = random_problem()
    for reduction in ("mean", "none"):
        out = sk.slim_loss(logits, target, teacher, reduction=reduction, statistics=statistics)
        present = [name for name, field in zip(FIELDS, out, strict=True) if field is not None]
        assert present == list(FIELDS[: NUM_STATS[LEVELS[statistics]]])
        assert not any(field.requires_grad for field in out if field is not None)


def test_statistics_refuse_other_values():
    for wrong in ("all", "overlap", 1, None):
        with pytest.raises(ValueError, match="statistics must be False, 'without_overlap' or True, got"):
            sk.slim_loss(*random_problem(), statistics=wrong)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_repeat_and_do_not_depend_on_the_batch(dtype):
    logits, target, teacher = random_problem(9, 2051, 103, dtype=dtype, ragged=True)
    whole = sk.slim_loss(logits, target, teacher, statistics=True)
    assert_same_bits(sk.slim_loss(logits, target, teacher, statistics=True), whole)
    for row in (0, 2, 8):
        one = slice(row, row + 1)
        alone = sk.slim_loss(logits[one], target[one], teacher[one], statistics=True)
        assert_same_bits(alone[1:], [field[one] for field in whole[1:]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_do_not_depend_on_the_number_of_threads(dtype, set_threads):
    many, lone = random_problem(67, 2051, 103, dtype=dtype), random_problem(1, 20011, 300, dtype=dtype, ignored=())
    for problem in (many, lone):
        expected = sk.slim_loss(*problem, statistics=True)
        for count in (2, 5):
            set_threads(count)
            assert_same_bits(sk.slim_loss(*problem, statistics=True), expected)
        set_threads(1)


@pytest.mark.parametrize(("rest", "divergence"), RESTS_AND_DIVERGENCES[::3])
def test_statistics_of_ignored_rows_are_zero(rest, divergence):
    logits, target, teacher = random_problem(6, 59, 5, ignored=(0, 3))
    logits[0], logits[3] = NAN, math.inf
    teacher.logits[[0, 3]] = NAN
    out = sk.slim_loss(logits, target, teacher, rest=rest, divergence=divergence, statistics=True)
    for name in STATISTICS:
        assert not getattr(out, name)[[0, 3]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ours", [{}, {"inplace_backward": True}, {"reduction": "none"}, {"reduction": "sum"}])
def test_statistics_come_with_the_gradient(dtype, ours):
    logits, target, teacher = random_problem(dtype=dtype)

    def loss(logits, **options):
        return sk.slim_loss(logits * 1.0, target, teacher, rest="ghost", **ours, **options)

    out, grads = loss_and_grads(loss, (logits,), 1.0, statistics=True)
    expected, expected_grads = loss_and_grads(loss, (logits,), 1.0)
    assert_same_bits([*out[:7], *grads], [*expected[:7], *expected_grads])
    assert_same_bits(out[7:], sk.slim_loss(logits, target, teacher, statistics=True)[7:])


@pytest.mark.parametrize("chunk_rows", [None, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics_of_the_linear_loss(chunk_rows, reduction):
    _, target, teacher = random_problem()
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(7, 16, generator=generator), torch.randn(203, 16, generator=generator)
    out, _ = loss_and_grads(
        sk.linear_slim_loss, (hidden, weight), 1.0, target, teacher,
        reduction=reduction, chunk_rows=chunk_rows, statistics=True,
    )  # fmt: skip
    expected = sk.slim_loss(hidden @ weight.T, target, teacher, statistics=True)
    for name in STATISTICS:
        with explain(name):
            torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    # A teacher whose rows are made in the loss.
    head = sk.HeadTeacher(2 * hidden, weight, top_k=13)
    rows = sk.linear_topk_logits(2 * hidden, weight, 13, target=target)
    made, given = (
        sk.linear_slim_loss(hidden, weight, target, record, chunk_rows=chunk_rows, statistics=True)
        for record in (head, rows)
    )
    for name in STATISTICS:
        with explain(name):
            torch.testing.assert_close(getattr(made, name), getattr(given, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("statistics", ["without_overlap", True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics_opcheck(reduction, statistics):
    logits, target, teacher = random_problem(4, 21, 5)
    options = {"reduction": reduction, "statistics": statistics}
    names = opcheck_calls_of(sk.slim_loss, logits.requires_grad_(), target, teacher, **options)
    assert names == ["slimkernels::slim_loss_fwd"]
    hidden, weight = torch.randn(4, 8).requires_grad_(), torch.randn(21, 8).requires_grad_()
    names = opcheck_calls_of(sk.linear_slim_loss, hidden, weight, target, teacher, **options)
    assert names == ["slimkernels::linear_slim_loss_fwd"]


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics_compile_whole(reduction, linear):
    logits, target, teacher = random_problem(4, 41, 5)
    weight = torch.eye(41)

    def loss(logits, target, ids, values, lse, target_logit, rest_lse):
        record = SparseLogits(ids, values, lse, target_logit=target_logit, rest_lse=rest_lse)
        options = {"reduction": reduction, "statistics": True}
        if linear:
            return sk.linear_slim_loss(logits * 1.5, weight, target, record, **options)
        return sk.slim_loss(logits * 1.5, target, record, **options)

    operands = (target, teacher.ids, teacher.logits, teacher.lse, teacher.target_logit, teacher.rest_lse)
    eager, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = loss(eager, *operands)
    actual = torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled, *operands)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    expected.loss.sum().backward()
    actual.loss.sum().backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_statistics_of_a_fake_have_the_shapes_of_the_real():
    for dtype, reduction, statistics in itertools.product(DTYPES, ("mean", "none"), ("without_overlap", True)):
        logits, target, teacher = random_problem(4, 21, 5, dtype=dtype)
        options = {"reduction": reduction, "statistics": statistics}
        real = sk.slim_loss(logits, target, teacher, **options)
        fake = sk.slim_loss(logits.to("meta"), target.to("meta"), teacher.to("meta"), **options)
        for one, other in zip(fake, real, strict=True):
            assert (one is None) == (other is None)
            assert one is None or (one.shape, one.dtype, one.device.type) == (other.shape, other.dtype, "meta")


def test_second_derivatives_still_raise():
    logits, target, teacher = random_problem()
    loss = sk.slim_loss(logits.requires_grad_(), target, teacher, statistics=True).loss
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="slim_loss has no second derivative"):
        grad.sum().backward()


def test_entropy_of_a_teacher_with_masked_logits():
    # The distance of the masked ones, divided by T, does not fit into float32.
    logits, target, teacher = random_problem(2, 2049, 2049, temperature=0.5, ignored=())
    teacher.logits[:, 1000:] = torch.finfo(torch.float32).min
    actual = sk.slim_loss(logits, target, teacher, rest="ghost", temperature=0.5, statistics=True)
    wide = to_dtype(teacher, torch.float64)
    truth = reference.slim_loss(logits.double(), target, wide, rest="ghost", temperature=0.5, statistics=True)
    torch.testing.assert_close(actual.teacher_entropy.double(), truth.teacher_entropy, rtol=1e-5, atol=1e-5)
