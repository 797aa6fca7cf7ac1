"""``slim_loss`` as an operator of torch: layouts, backward passes, threads, compilation, and what it refuses."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
from support.helpers import (
    DTYPES,
    LAYOUTS,
    RESTS_AND_DIVERGENCES,
    assert_same_bits,
    loss_and_grads,
    misaligned,
    opcheck_calls_of,
    random_problem,
)

import slimkernels as sk
from slimkernels import SparseLogits, reference

F64 = torch.float64
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("leading_shape", [(), (1,), (2, 3), (2, 0, 3), (2, 1, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_slim_loss_keeps_leading_dimensions(leading_shape, reduction):
    num_rows = math.prod(leading_shape)
    logits, target, teacher = random_problem(num_rows, 53, 6, ignored=(2,))
    token_weight = torch.rand(num_rows)
    options = {"reduction": reduction, "statistics": True}
    flat, (flat_grad,) = loss_and_grads(
        sk.slim_loss, (logits,), 1.0, target, teacher, token_weight=token_weight, **options
    )
    out, (grad,) = loss_and_grads(
        sk.slim_loss,
        (logits.reshape(*leading_shape, 53),),
        1.0,
        target.reshape(leading_shape),
        teacher.reshape(*leading_shape),
        token_weight=token_weight.reshape(leading_shape),
        **options,
    )
    assert grad.shape == (*leading_shape, 53)
    assert_same_bits(grad.reshape(-1, 53), flat_grad)
    for name, field, wanted in zip(out._fields, out, flat, strict=True):
        assert field.shape == (() if name == "loss" and reduction == "mean" else leading_shape)
        assert_same_bits(field.reshape(-1), wanted.reshape(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_slim_loss_of_any_layout(dtype, layout, reduction):
    logits, target, teacher = random_problem(dtype=dtype)
    expected = loss_and_grads(sk.slim_loss, (logits,), 1.0, target, teacher, rest="ghost", reduction=reduction)
    strided = LAYOUTS[layout](logits).requires_grad_()
    strange_teacher = SparseLogits(
        LAYOUTS[layout](teacher.ids.double()).int() if layout == "row strided" else LAYOUTS[layout](teacher.ids),
        LAYOUTS[layout](teacher.logits),
        misaligned(teacher.lse),
        teacher.temperatures,
        torch.stack([teacher.target_logit] * 2, -1)[:, 0],
        misaligned(teacher.rest_lse),
    )
    strange_target = torch.stack([target, target], -1)[:, 0]
    out = sk.slim_loss(strided, strange_target, strange_teacher, rest="ghost", reduction=reduction)
    grads = torch.autograd.grad(out.loss, strided, torch.ones_like(out.loss))
    assert_same_bits([*out, *grads], [*expected[0], *expected[1]])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_slim_loss_gradient_through_views(reduction):
    logits, target, teacher = random_problem()
    wide = torch.zeros(7, 300).requires_grad_()
    expected = loss_and_grads(sk.slim_loss, (logits,), 1.0, target, teacher, reduction=reduction)[1][0]
    loss = sk.slim_loss(wide[:, 40:243] + logits, target, teacher, reduction=reduction).loss
    (grad,) = torch.autograd.grad(loss, wide, torch.ones_like(loss))
    assert_same_bits(grad[:, 40:243], expected)
    assert not grad[:, :40].any()
    assert not grad[:, 243:].any()
    one = torch.zeros(1, 203, requires_grad=True)
    logits, target = torch.zeros(7, 203), torch.arange(7)
    expected = loss_and_grads(sk.slim_loss, (logits,), 1.0, target, teacher, reduction=reduction)[1][0]
    loss = sk.slim_loss(one.expand(7, 203), target, teacher, reduction=reduction).loss
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), one)[0], expected.sum(0, keepdim=True))


def test_slim_loss_addresses_past_two_to_the_31():
    # Only the touched pages of the buffer exist.
    stride = 2**30 + 7
    logits, target, teacher = random_problem(3, 203, dtype=torch.bfloat16)
    far = torch.empty(2 * stride + 203, dtype=torch.bfloat16).as_strided((3, 203), (stride, 1))
    far.copy_(logits)
    assert_same_bits(sk.slim_loss(far, target, teacher), sk.slim_loss(logits, target, teacher))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slim_loss_second_backward(reduction, dtype):
    logits, target, teacher = random_problem(dtype=dtype)
    leaf = logits.clone().requires_grad_()
    loss = sk.slim_loss(leaf, target, teacher, rest="ghost", reduction=reduction).loss
    upstream = torch.ones_like(loss)
    (first,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
    kept = first.clone()
    (tripled,) = torch.autograd.grad(loss, leaf, 3.0 * upstream, retain_graph=True)
    tolerance = {"rtol": 2e-2, "atol": 0.0} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(tripled, 3.0 * kept, **tolerance)
    loss.backward(upstream, retain_graph=True)
    assert_same_bits(leaf.grad, kept)
    # Autograd may refuse once the caller has changed a gradient that the graph keeps; it may not be wrong.
    leaf.grad.zero_()
    first.mul_(1e3)
    with contextlib.suppress(RuntimeError):
        assert_same_bits(torch.autograd.grad(loss, leaf, upstream)[0], kept)


@pytest.mark.parametrize(("rest", "divergence"), RESTS_AND_DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slim_loss_ignored_rows_cannot_leak(rest, divergence, dtype):
    logits, target, teacher = random_problem(6, 59, 5, dtype=dtype, ignored=(0, 3))
    options = {"rest": rest, "divergence": divergence, "detach_weight": False, "statistics": True}
    for reduction in ("mean", "none"):
        expected = loss_and_grads(sk.slim_loss, (logits,), 1.0, target, teacher, reduction=reduction, **options)
        hostile = logits.clone()
        hostile[0], hostile[3] = NAN, INF
        wrong = SparseLogits.cat([teacher])
        wrong.logits[[0, 3]] = NAN
        wrong.lse[[0, 3]] = INF
        wrong.rest_lse[[0, 3]] = INF
        wrong.target_logit[[0, 3]] = NAN
        actual = loss_and_grads(sk.slim_loss, (hostile,), 1.0, target, wrong, reduction=reduction, **options)
        assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])
        assert not actual[1][0][[0, 3]].any()
        assert not any(field[[0, 3]].any() for field in actual[0][1:])


@pytest.mark.parametrize("num_rows", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_slim_loss_without_a_label_is_zero(num_rows, reduction):
    logits, target, teacher = random_problem(num_rows, 17, 3, ignored=(0, 1, 2))
    options = {"reduction": reduction, "z_loss_weight": 1.0, "statistics": True}
    out, (grad,) = loss_and_grads(sk.slim_loss, (logits,), 1.0, target, teacher, **options)
    assert grad.shape == logits.shape
    assert not any(tensor.any() for tensor in (*out, grad))


def test_slim_loss_detaches_all_but_the_loss():
    logits, target, teacher = random_problem()
    teacher.logits.requires_grad_()
    teacher.lse.requires_grad_()
    weight = torch.rand(7)
    before = [logits.clone(), target.clone(), teacher.logits.detach().clone()]
    logits.requires_grad_()
    out = sk.slim_loss(logits, target, teacher, token_weight=weight, statistics=True)
    assert [field.requires_grad for field in out] == [True] + [False] * 12
    out.loss.backward()
    assert teacher.logits.grad is None
    assert teacher.lse.grad is None
    assert_same_bits([logits, target, teacher.logits], before)


def test_slim_loss_is_the_same_without_gradient():
    logits, target, teacher = random_problem(dtype=torch.bfloat16)
    for reduction in ("mean", "none"):
        expected = sk.slim_loss(logits.clone().requires_grad_(), target, teacher, reduction=reduction)
        assert_same_bits(sk.slim_loss(logits, target, teacher, reduction=reduction), expected)
        with torch.no_grad():
            out = sk.slim_loss(logits.clone().requires_grad_(), target, teacher, reduction=reduction)
        assert not out.loss.requires_grad
        assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rest", "divergence"), [("renorm", "forward_kl"), ("ghost", "jsd"), ("zero_logit", "soft_ce")]
)
def test_slim_loss_is_bitwise_repeatable_and_batch_invariant(dtype, rest, divergence):
    logits, target, teacher = random_problem(9, 2051, 103, dtype=dtype)
    options = {"rest": rest, "divergence": divergence, "reduction": "none", "statistics": True}
    whole, (whole_grad,) = loss_and_grads(sk.slim_loss, (logits,), 1.0, target, teacher, **options)
    again, (again_grad,) = loss_and_grads(sk.slim_loss, (logits,), 1.0, target, teacher, **options)
    assert_same_bits([*again, again_grad], [*whole, whole_grad])
    for row in (0, 2, 8):
        one = slice(row, row + 1)
        alone, (alone_grad,) = loss_and_grads(sk.slim_loss, (logits[one],), 1.0, target[one], teacher[one], **options)
        assert_same_bits([*alone, alone_grad], [field[one] for field in (*whole, whole_grad)])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slim_loss_does_not_depend_on_the_number_of_threads(dtype, reduction, set_threads):
    logits, target, teacher = random_problem(67, 2051, 103, dtype=dtype)
    options = {"rest": "ghost", "reduction": reduction}
    expected = loss_and_grads(sk.slim_loss, (logits,), 1.0, target, teacher, **options)
    for count in (2, 5):
        set_threads(count)
        actual = loss_and_grads(sk.slim_loss, (logits,), 1.0, target, teacher, **options)
        assert_same_bits([*actual[0], *actual[1]], [*expected[0], *expected[1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 2.0, "rest": "ghost"}, {"softcap": 5.0, "rest": "zero_logit", "label_smoothing": 0.1}],
    ids=str,
)
def test_slim_loss_splits_a_lone_row_over_threads(dtype, options, set_threads):
    # Long enough to be split, and no multiple of a block or a vector.
    problem = random_problem(1, 20011, 300, dtype=dtype, temperature=options.get("temperature", 1.0), ignored=())
    results = []
    for threads in (1, 3):
        set_threads(threads)
        out, grads = loss_and_grads(sk.slim_loss, problem[:1], 1.0, *problem[1:], **options)
        results.append([*out, *grads])
    assert_same_bits(*results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("rest", "divergence"), RESTS_AND_DIVERGENCES)
def test_slim_loss_gradcheck(rest, divergence, reduction):
    logits, target, teacher = random_problem(4, 11, 5, dtype=F64, temperature=1.3, ragged=True)
    options = {"rest": rest, "divergence": divergence, "temperature": 1.3, "reduction": reduction}
    options |= {"softcap": 9.0, "logit_scale": 0.8, "label_smoothing": 0.1, "z_loss_weight": 1e-2}

    def loss(logits):
        return sk.slim_loss(logits, target, teacher, detach_weight=False, **options).loss

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_slim_loss_opcheck(reduction):
    logits, target, teacher = random_problem(4, 21, 5, ragged=True)
    # NaN at padding would pass through opcheck's comparisons as a difference.
    teacher.logits.nan_to_num_(0.0)
    options = {"rest": "ghost", "reduction": reduction}
    names = opcheck_calls_of(sk.slim_loss, logits.requires_grad_(), target, teacher, **options)
    assert names == ["slimkernels::slim_loss_fwd"]
    opcheck_calls_of(sk.slim_loss, logits, target, None, reduction=reduction)


# Inductor itself imports what torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_slim_loss_compiles_whole(backend, reduction):
    logits, target, teacher = random_problem(4, 41, 5)

    def loss(logits, target, ids, values, lse, target_logit, rest_lse):
        record = SparseLogits(ids, values, lse, target_logit=target_logit, rest_lse=rest_lse)
        out = sk.slim_loss(logits * 1.5, target, record, rest="ghost", reduction=reduction)
        return out.loss, out.kd, out.weight

    operands = (target, teacher.ids, teacher.logits, teacher.lse, teacher.target_logit, teacher.rest_lse)
    eager, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = loss(eager, *operands)
    actual = torch.compile(loss, fullgraph=True, backend=backend)(compiled, *operands)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    expected[0].sum().backward()
    actual[0].sum().backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_slim_loss_fake_has_the_shapes_and_dtypes_of_the_real():
    for dtype, reduction in itertools.product(DTYPES, ("mean", "none")):
        logits, target, teacher = random_problem(4, 21, 5, dtype=dtype)
        options = {"reduction": reduction, "statistics": True}
        real = sk.slim_loss(logits, target, teacher, **options)
        fake = sk.slim_loss(logits.to("meta"), target.to("meta"), teacher.to("meta"), **options)
        for one, other in zip(fake, real, strict=True):
            assert (one.shape, one.dtype, one.device.type) == (other.shape, other.dtype, "meta")


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "rest", {"rest": "other"}),
        (ValueError, "divergence", {"divergence": "other"}),
        (ValueError, "token_weight", {"token_weight": "other"}),
        (ValueError, "token_weight", {"token_weight": torch.ones(3)}),
        (ValueError, "reduction", {"reduction": "other"}),
        (ValueError, "temperature", {"temperature": 0.0}),
        (ValueError, "temperature", {"temperature": -1.0}),
        (ValueError, "temperature", {"temperature": NAN}),
        (ValueError, "temperature", {"temperature": 2.0, "rest": "ghost"}),
        (ValueError, "temperature", {"temperature": 2.0, "rest": "zero"}),
        (ValueError, "softcap", {"softcap": -1.0}),
        (ValueError, "logit_scale", {"logit_scale": NAN}),
        (ValueError, "label_smoothing", {"label_smoothing": 1.5}),
        (ValueError, "beta", {"beta": 1.5}),
        (ValueError, "alpha", {"alpha": -0.5}),
        (ValueError, r"alpha=0\.04", {"rest": "ghost", "divergence": "ab", "alpha": 0.04}),
        (ValueError, r"beta=0\.0", {"rest": "ghost", "divergence": "ab", "alpha": 0.5, "beta": 0}),
        (ValueError, "beta", {"rest": "ghost", "divergence": "ab", "beta": math.inf}),
        (ValueError, "forward_weight", {"forward_weight": -0.5}),
        (ValueError, "entropy_threshold", {"entropy_threshold": NAN}),
        (ValueError, "teacher_blend", {"rest": "ghost", "teacher_blend": 0.0}),
        (ValueError, "teacher_blend", {"rest": "ghost", "teacher_blend": 1.1}),
        (ValueError, r"teacher_blend.*rest.*'zero'", {"rest": "zero", "teacher_blend": 0.5}),
        (ValueError, "tail_weight", {"rest": "ghost", "tail_weight": -1.0}),
        (ValueError, r"tail_weight.*rest.*'renorm'", {"tail_weight": 2.0}),
        (ValueError, r"tail_weight.*divergence.*'jsd'", {"rest": "ghost", "divergence": "jsd", "tail_weight": 2.0}),
        (ValueError, "temperature", {"temperature": 2.0, "rest": "renorm_both", "divergence": "gated"}),
        (ValueError, "num_items", {"num_items": 3, "reduction": "sum"}),
        (ValueError, "num_items", {"num_items": 3, "reduction": "none"}),
        (TypeError, "logits", {"logits": torch.zeros(7, 203, dtype=torch.int64)}),
        (TypeError, "target", {"target": torch.zeros(7, dtype=torch.int32)}),
        (ValueError, "target", {"target": torch.zeros(6, dtype=torch.int64)}),
        (ValueError, "target", {"target": torch.zeros(7, 1, dtype=torch.int64)}),
        pytest.param(ValueError, "target", {"target": torch.full((7,), 203)}, marks=pytest.mark.cpu_kernels),
        pytest.param(ValueError, "target", {"target": torch.full((7,), -1)}, marks=pytest.mark.cpu_kernels),
        (ValueError, "target", {"target": torch.zeros(7, dtype=torch.int64, device="meta")}),
        (TypeError, "teacher", {"teacher": torch.zeros(7, 5)}),
        (ValueError, "teacher", {"teacher": random_problem(6).teacher}),
        (ValueError, "teacher", {"teacher": random_problem(7).teacher.to("meta")}),
        pytest.param(
            ValueError, "ids", {"teacher": random_problem(7, 500, 400).teacher}, marks=pytest.mark.cpu_kernels
        ),
    ],
)
def test_slim_loss_refuses(error, message, options):
    logits, target, teacher = random_problem()
    arguments = {"logits": logits, "target": target, "teacher": teacher, **options}
    with pytest.raises(error, match=message):
        sk.slim_loss(**arguments)


@pytest.mark.parametrize(
    ("rest", "divergence"),
    [pair for pair in itertools.product(reference.RESTS, reference.DIVERGENCES) if pair not in RESTS_AND_DIVERGENCES],
)
def test_slim_loss_refuses_improper_distributions(rest, divergence):
    with pytest.raises(ValueError, match="rest"):
        sk.slim_loss(*random_problem(), rest=rest, divergence=divergence)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("bad", [[3, 3], [5, 2], [-1, 4], [-2, 4], [4, 203]])
@pytest.mark.parametrize("with_grad", [False, True])
def test_slim_loss_refuses_bad_ids(bad, with_grad):
    logits, target, teacher = random_problem(top_k=2)
    teacher.ids[4] = torch.tensor(bad, dtype=torch.int32)
    with pytest.raises(ValueError, match="ids"):
        sk.slim_loss(logits.requires_grad_(with_grad), target, teacher)
