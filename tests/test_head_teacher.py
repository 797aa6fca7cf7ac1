"""``HeadTeacher`` in ``linear_slim_loss``, against rows of ``linear_topk_logits`` and the reference in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.helpers import (
    DTYPES,
    RESTS_AND_DIVERGENCES,
    assert_same_bits,
    largest_allocation,
    opcheck_calls_of,
)
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import slimkernels as sk
from bench.ops.case import Work
from bench.ops.measure import peak_extra_bytes
from slimkernels import reference

F64 = torch.float64
V = 203


def problem(num_rows=7, dtype=torch.float32, teacher_dtype=None, vocab_size=V, bias=True):
    """(hidden, weight, bias, target) of the student and the fields of a teacher of another width."""
    generator = torch.Generator().manual_seed(5)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    student = (randn(num_rows, 24), randn(vocab_size, 24), randn(vocab_size) if bias else None)
    target = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    dtype = teacher_dtype or dtype
    head = {"hidden": randn(num_rows, 16, dtype=dtype), "weight": randn(vocab_size, 16, dtype=dtype)}
    return student, target, head | {"bias": randn(vocab_size, dtype=dtype) if bias else None}


def run(student, target, teacher, **options):
    """Every field of the loss, and the gradients of hidden, weight and bias."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in student]
    hidden, weight, bias = leaves
    result = sk.linear_slim_loss(hidden, weight, target, teacher, bias=bias, statistics=True, **options)
    result.loss.sum().backward()
    return [*(field.detach() for field in result), *(t.grad for t in leaves if t is not None)]


def assert_same_results(actual, expected, *, bitwise):
    """Compares results of ``run``. Where all logits are kept, a GPU sums them in another order than a selection."""
    for one, other in zip(actual, expected, strict=True):
        (assert_same_bits if bitwise else torch.testing.assert_close)(one, other)


def rows_of(head, target, temperature=1.0, **options):
    return sk.linear_topk_logits(**head, target=target, temperatures=(1.0, temperature), **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("top_k", [1, 11, V])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_teacher_has_the_bits_of_the_two_calls(dtype, top_k, reduction):
    student, target, head = problem(dtype=dtype)
    teacher = rows_of(head, target, 1.7, top_k=top_k, chunk_rows=3, softcap=9.0, logit_scale=1.5)
    options = {"temperature": 1.7, "reduction": reduction, "chunk_rows": 3, "rest": "ghost"}
    expected = run(student, target, teacher, **options)
    head_teacher = sk.HeadTeacher(**head, top_k=top_k, softcap=9.0, logit_scale=1.5)
    assert_same_results(run(student, target, head_teacher, **options), expected, bitwise=top_k < V)


@pytest.mark.parametrize(("rest", "divergence"), RESTS_AND_DIVERGENCES)
def test_head_teacher_matches_the_reference_on_hostile_rows(rest, divergence):
    student, target, head = problem(dtype=F64)
    head["hidden"][0] = 0  # ties but for the bias
    head["bias"][:100] = 0
    head["bias"][150:] = -torch.inf
    head["hidden"][1] *= 1e4  # all of the mass on one entry
    head["hidden"][2] = 5e-310  # denormals
    target[:] = target % 150
    target[4] = -100
    head["hidden"][4] = torch.nan
    options = {"temperature": 1.7, "rest": rest, "divergence": divergence}
    ours = run(student, target, sk.HeadTeacher(**head, top_k=11), chunk_rows=3, **options)
    rows = reference.topk_logits(
        torch.nn.functional.linear(**{"input": head["hidden"], "weight": head["weight"], "bias": head["bias"]}),
        11, target=target.clamp(min=-1), temperatures=(1.0, 1.7)
    )  # fmt: skip
    leaves = [t.detach().requires_grad_() for t in student]
    options |= {"bias": leaves[2], "statistics": True}
    expected = reference.linear_slim_loss(leaves[0], leaves[1], target, rows, **options)
    expected.loss.backward()
    for one, other in zip(ours, [*expected, *(t.grad for t in leaves)], strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("ignore_index", [-100, V + 5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_head_teacher_computes_no_ignored_row(reduction, ignore_index):
    student, target, head = problem(num_rows=12)
    target[[0, 4]] = ignore_index
    target[6:9] = ignore_index
    expected_rows = rows_of(head, target.masked_fill(target == ignore_index, -1), top_k=5)
    options = {"reduction": reduction, "chunk_rows": 3, "ignore_index": ignore_index}
    expected = run(student, target, expected_rows, **options)
    for one, other in zip(run(student, target, sk.HeadTeacher(**head, top_k=5), **options), expected, strict=True):
        torch.testing.assert_close(one, other)
    with torch.profiler.profile(record_shapes=True) as profile:
        sk.linear_slim_loss(*student[:2], target, sk.HeadTeacher(**head, top_k=5), **options)
    shapes = [event.input_shapes[0] for event in profile.events() if event.name == "slimkernels::topk_logits_rows"]
    assert sum(shape[0] for shape in shapes) == 7


def test_head_teacher_takes_other_dtypes_and_leading_dimensions():
    student, target, head = problem(num_rows=6, teacher_dtype=torch.bfloat16)
    flat = run(student, target, sk.HeadTeacher(**head, top_fraction=0.05), reduction="none")
    head["hidden"] = head["hidden"].reshape(2, 3, -1)
    student = (student[0].reshape(2, 3, -1), *student[1:])
    out = run(student, target.reshape(2, 3), sk.HeadTeacher(**head, top_fraction=0.05), reduction="none")
    assert out[0].shape == (2, 3)
    for one, other in zip(out, flat, strict=True):
        assert_same_bits(one.reshape(other.shape), other)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_a_teacher_that_keeps_all_is_dense_distillation_and_selects_nothing(temperature, reduction):
    student, target, head = problem(num_rows=12, dtype=F64)
    target[[2, 9]] = -100
    head["hidden"][[2, 9]] = torch.nan
    teacher = sk.HeadTeacher(**head, top_fraction=1.0, softcap=9.0, logit_scale=1.5)
    options = {"temperature": temperature, "reduction": reduction, "token_weight": "none", "chunk_rows": 5}
    with torch.profiler.profile() as profile:
        loss, *_, dhidden, dweight, dbias = run(student, target, teacher, **options)
    names = {event.name for event in profile.events()}
    assert "slimkernels::slim_loss_rows" in names
    assert "slimkernels::topk_logits_rows" not in names
    hidden, weight, bias = leaves = [t.detach().requires_grad_() for t in student]
    counted = target != -100
    logits = torch.nn.functional.linear(hidden, weight, bias)[counted]
    product = torch.nn.functional.linear(head["hidden"], head["weight"], head["bias"])[counted]
    log_q = (9.0 * torch.tanh(1.5 * product / 9.0) / temperature).log_softmax(-1)
    kl = (log_q.exp() * (log_q - (logits / temperature).log_softmax(-1))).sum(-1) * temperature**2
    dense = torch.nn.functional.cross_entropy(logits, target[counted], reduction="none") + kl
    (dense.mean() if reduction == "mean" else dense.sum()).backward()
    torch.testing.assert_close(loss.sum(), dense.mean() if reduction == "mean" else dense.sum())
    for one, leaf in zip((dhidden, dweight, dbias), leaves, strict=True):
        torch.testing.assert_close(one, leaf.grad)


@pytest.mark.parametrize("top_fraction", [0.05, 1.0])
def test_head_teacher_of_a_vocabulary_that_the_students_head_pads(top_fraction):
    student, target, head = problem(num_rows=12)
    teacher = {name: None if t is None else t[: V - 7] for name, t in head.items() if name != "hidden"}
    teacher["hidden"] = head["hidden"]
    target = target.clamp(max=V - 8)
    rows = rows_of(teacher, target, top_fraction=top_fraction, chunk_rows=5)
    options = {"chunk_rows": 5, "rest": "ghost"}
    expected = run(student, target, rows, **options)
    actual = run(student, target, sk.HeadTeacher(**teacher, top_fraction=top_fraction), **options)
    assert_same_results(actual, expected, bitwise=top_fraction < 1)
    target[7] = V - 7
    with pytest.raises(ValueError, match=r"target\[7\] must be a token of the teacher's vocabulary, below 196"):
        run(student, target, sk.HeadTeacher(**teacher, top_fraction=top_fraction), **options)


def test_head_teacher_makes_no_rows_without_a_divergence():
    student, target, head = problem()
    teacher = sk.HeadTeacher(**head, top_k=5)
    with torch.profiler.profile() as profile:
        actual = run(student, target, teacher, kd_weight=0.0)
    assert not {"slimkernels::linear_topk_logits", "slimkernels::gather_logits_rows"} & {
        e.name for e in profile.events()
    }
    for one, other in zip(actual, run(student, target, None), strict=True):
        assert_same_bits(one, other)


def test_head_teachers_are_not_compared():
    _, _, head = problem()
    teacher, other = (sk.HeadTeacher(**head, top_k=5) for _ in range(2))
    assert teacher == teacher
    assert teacher != 3
    assert len({teacher, other}) == 2
    with pytest.raises(TypeError, match="HeadTeachers have no =="):
        _ = teacher == other


def test_head_teacher_gets_no_gradient():
    student, target, head = problem()
    head = {name: tensor.requires_grad_() for name, tensor in head.items()}
    run(student, target, sk.HeadTeacher(**head, top_k=5), reduction="none")
    assert all(tensor.grad is None for tensor in head.values())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_head_teacher_gradcheck_opcheck_and_compile(reduction):
    (hidden, weight, bias), target, head = problem(num_rows=3, dtype=F64, vocab_size=17)
    target[1] = -100
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def loss(hidden, weight, bias):
        teacher = sk.HeadTeacher(**head, top_k=4)
        return sk.linear_slim_loss(
            hidden, weight, target, teacher, bias=bias, reduction=reduction, temperature=1.7, rest="ghost", chunk_rows=2
        ).loss

    # The token weight is a constant to the gradient, but not to finite differences.
    def unweighted(hidden, weight, bias):
        teacher = sk.HeadTeacher(**head, top_k=4)
        return sk.linear_slim_loss(
            hidden, weight, target, teacher, bias=bias, reduction=reduction, token_weight="none", chunk_rows=2
        ).loss

    assert torch.autograd.gradcheck(unweighted, leaves)
    assert "slimkernels::linear_slim_loss_fwd" in opcheck_calls_of(loss, *leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(*leaves).detach(), loss(*leaves).detach())


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_head_teacher_never_holds_all_rows(reduction):
    num_rows, vocab_size = 512, 1000
    (hidden, weight, _), target, head = problem(num_rows=num_rows, vocab_size=vocab_size, bias=False)
    teacher = sk.HeadTeacher(**head, top_fraction=1.0)

    def step():
        leaf = hidden.detach().requires_grad_()
        sk.linear_slim_loss(leaf, weight, target, teacher, reduction=reduction, chunk_rows=16).loss.sum().backward()

    assert largest_allocation(step) < num_rows * vocab_size * 4 // 8


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(6, 16)}, ValueError, "teacher.hidden must hold one row for each row of hidden"),
        ({"weight": torch.zeros(V + 1, 16), "bias": None}, ValueError, "teacher.weight must have at most"),
        ({"weight": torch.zeros(V, 15)}, ValueError, "weight must have shape"),
        ({"top_fraction": 0.5}, ValueError, "exactly one of top_k and top_fraction"),
        ({"top_k": V + 1}, ValueError, "top_k must be an integer in"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale must be positive"),
        ({"bias": torch.zeros(V, dtype=F64)}, TypeError, "bias must have hidden's dtype"),
    ],
)
def test_head_teacher_refuses(change, error, message):
    student, target, head = problem()
    with pytest.raises(error, match=message):
        run(student, target, sk.HeadTeacher(**{**head, "top_k": 5, **change}))


def test_head_teacher_names_the_row_of_a_wrong_label():
    student, target, head = problem()
    target[0], target[5] = -100, V
    with pytest.raises(ValueError, match=r"target\[5\]"):
        run(student, target, sk.HeadTeacher(**head, top_k=5), chunk_rows=3)


def test_head_teacher_refuses_slices_of_a_vocabulary(tmp_path):
    student, target, head = problem()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for name in ("hidden", "weight", "bias"):
            sharded = distribute_tensor(head[name], mesh, [Shard(0)])
            with pytest.raises(ValueError, match=rf"HeadTeacher.{name} must be whole on every rank, got a DTensor"):
                sk.HeadTeacher(**{**head, name: sharded}, top_k=5)
        replicated = {name: distribute_tensor(tensor, mesh, [Replicate()]) for name, tensor in head.items()}
        expected = run(student, target, sk.HeadTeacher(**head, top_k=5))
        for one, other in zip(run(student, target, sk.HeadTeacher(**replicated, top_k=5)), expected, strict=True):
            assert_same_bits(one, other)
        with pytest.raises(ValueError, match="teacher must hold rows where weight is a slice"):
            run(student, target, sk.HeadTeacher(**head, top_k=5), group=torch.distributed.group.WORLD)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("top_fraction", [0.05, 1.0])
def test_head_teacher_of_64k_tokens_takes_less_than_2_gb(top_fraction):
    num_rows, vocab_size, width = 65_536, 152_064, 16
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(num_rows, width, generator=generator) for _ in range(2))
    weight, teacher_weight = (torch.randn(vocab_size, width, generator=generator) for _ in range(2))
    target = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    teacher = sk.HeadTeacher(teacher_hidden, teacher_weight, top_fraction=top_fraction)
    extra = peak_extra_bytes(
        Work({}, lambda *_: None, leaves), lambda: sk.linear_slim_loss(*leaves, target, teacher).loss.backward()
    )
    assert extra < 2e9
