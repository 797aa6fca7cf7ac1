"""What the ops accept as an option, and what they refuse by its name."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.helpers import assert_same_bits, random_problem

import slimkernels as sk
from slimkernels import reference
from slimkernels.search import PathFinderConfig
from slimkernels.store.format import StoreSettings
from slimkernels.teacher.generation import SamplingOptions

DIVERGENCE_OPTIONS = ("beta", "alpha", "forward_weight", "entropy_threshold", "teacher_blend", "tail_weight")
NUMBERS = ("temperature", "logit_scale", "softcap", "ce_weight", "kd_weight", "z_loss_weight", "label_smoothing")


def losses(**options):
    """The two losses of one problem, as functions of nothing; both learn."""
    logits, target, teacher = random_problem(ignored=(2,))
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(7, 16, generator=generator), torch.randn(203, 16, generator=generator)
    return (
        lambda: sk.slim_loss(logits.requires_grad_(), target, teacher, **options),
        lambda: sk.linear_slim_loss(hidden.requires_grad_(), head, target, teacher, **options),
    )


@pytest.mark.parametrize("name", [*NUMBERS, *DIVERGENCE_OPTIONS])
def test_an_option_that_requires_a_gradient_is_refused_by_name(name):
    parameter = torch.nn.Parameter(torch.tensor(0.5))
    rest = "ghost" if name == "tail_weight" else "renorm_both"
    for loss in losses(rest=rest, **{name: parameter}):
        with pytest.raises(ValueError, match=f"^{name} requires a gradient"):
            loss()
        with torch.no_grad():
            assert loss().loss.isfinite()


def test_token_weights_that_require_a_gradient_are_refused_by_name():
    weight = torch.rand(7, requires_grad=True)
    for loss in losses(token_weight=weight):
        with pytest.raises(ValueError, match=r"^token_weight requires a gradient"):
            loss()


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p"])
def test_sampling_options_that_require_a_gradient_are_refused_by_name(name):
    option = torch.full((3,), 0.5, requires_grad=True)
    with pytest.raises(ValueError, match=f"^{name} requires a gradient"):
        sk.sample_logits(torch.randn(3, 9), seed=0, position=0, **{name: option})


@pytest.mark.parametrize(
    "num_items",
    [
        torch.tensor([2, 6]),
        torch.tensor(-1),
        torch.tensor(math.nan),
        torch.tensor(True),
        torch.tensor(3.0, requires_grad=True),
        -1,
        math.nan,
        math.inf,
        True,
        "3",
    ],
)
def test_num_items_that_is_no_count_is_refused(num_items):
    for loss in losses(num_items=num_items):
        with pytest.raises((TypeError, ValueError), match="num_items"):
            loss()


@pytest.mark.parametrize(
    "num_items",
    [
        torch.tensor([4]),
        torch.tensor([[4.0]], dtype=torch.float64),
        torch.tensor(4.0, dtype=torch.bfloat16),
        torch.tensor(4, dtype=torch.int32),
        4.0,
        np.int64(4),
        np.float32(4.0),
    ],
)
def test_num_items_is_any_number_or_tensor_of_one(num_items):
    for loss, plain in zip(losses(num_items=num_items), losses(num_items=4), strict=True):
        torch.testing.assert_close(loss().loss, plain().loss, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("num_items", [0, 0.0, torch.tensor(0), torch.tensor([0.0])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_items_loss_and_gradient_are_zero(num_items, dtype):
    logits, target, teacher = random_problem(dtype=dtype)
    leaf = logits.clone().requires_grad_()
    loss = sk.slim_loss(leaf, target, teacher, num_items=num_items).loss
    loss.backward()
    assert loss.item() == 0
    assert not leaf.grad.any()


def test_numbers_of_numpy_are_numbers():
    x, y = torch.randn(3, 50), torch.tensor([1, 2, 3])
    hidden, head = torch.randn(3, 8), torch.randn(50, 8)
    teacher = sk.topk_logits(x, np.int64(5), target=y, temperatures=(np.float32(2.0),))
    assert_same_bits(teacher.lse, sk.topk_logits(x, 5, temperatures=(2.0,)).lse)
    assert sk.topk_logits(x, top_fraction=np.float32(0.125)).top_k == 7
    assert sk.linear_topk_logits(hidden, head, np.int32(5), chunk_rows=np.int64(2)).top_k == 5
    for name in NUMBERS:
        one, other = (sk.slim_loss(x, y, teacher, **{name: kind(0.5)}) for kind in (np.float32, float))
        assert_same_bits(one.loss, other.loss)
    assert_same_bits(
        sk.linear_slim_loss(hidden, head, y, teacher, chunk_rows=np.int64(2), ignore_index=np.int64(2)).ce,
        sk.linear_slim_loss(hidden, head, y, teacher, chunk_rows=2, ignore_index=2).ce,
    )
    drawn = sk.sample_logits(x, seed=np.int64(1), position=np.uint8(2), top_k=np.int16(7), temperature=np.float32(0.5))
    plain = sk.sample_logits(x, seed=1, position=2, top_k=7, temperature=0.5)
    assert_same_bits(list(drawn), list(plain))
    assert sk.sample_distinct(x, np.int64(2), seed=0, position=0).token.shape == (3, 2)
    assert sk.sample_targets(x, np.int64(4), 0, position=0).top_k == 4
    assert sk.sparse_softmax(teacher, rest="zero_logit", vocab_size=np.int64(50)).tail_logprob.shape == (3,)


X, Y, HIDDEN, HEAD = torch.randn(3, 50), torch.tensor([1, 2, 3]), torch.randn(3, 8), torch.randn(50, 8)
KEPT = reference.topk_logits(X, 5, target=Y)
BOOLEANS = {
    "top_k": lambda value: sk.topk_logits(X, value),
    "top_fraction": lambda value: sk.topk_logits(X, top_fraction=value),
    "temperatures": lambda value: sk.topk_logits(X, 5, temperatures=(value,)),
    "chunk_rows": lambda value: sk.linear_topk_logits(HIDDEN, HEAD, 5, chunk_rows=value),
    "logit_scale": lambda value: sk.linear_topk_logits(HIDDEN, HEAD, 5, logit_scale=value),
    "ignore_index": lambda value: sk.slim_loss(X, Y, ignore_index=value),
    "kd_weight": lambda value: sk.slim_loss(X, Y, kd_weight=value),
    "seed": lambda value: sk.sample_logits(X, seed=value, position=0),
    "min_p": lambda value: sk.sample_logits(X, seed=0, position=0, min_p=value),
    "m": lambda value: sk.sample_distinct(X, value, seed=0, position=0),
    "rounds": lambda value: sk.sample_targets(X, value, 0, position=0),
}


@pytest.mark.parametrize("name", BOOLEANS)
@pytest.mark.parametrize("value", [True, np.True_, "1", None])
def test_what_is_no_number_is_refused_by_name(name, value):
    if value is None and name in ("top_k", "top_fraction", "chunk_rows"):
        pytest.skip("None stands for the default")
    with pytest.raises(TypeError, match=name):
        BOOLEANS[name](value)


TEMPERATURES = {
    "temperatures of topk_logits": lambda t: sk.topk_logits(X, 5, temperatures=(t,)),
    "temperatures of linear_topk_logits": lambda t: sk.linear_topk_logits(HIDDEN, HEAD, 5, temperatures=(t,)),
    "temperatures of gather_logits": lambda t: sk.gather_logits(X, KEPT.ids, temperatures=(t,)),
    "temperatures of linear_gather_logits": lambda t: sk.linear_gather_logits(
        HIDDEN, HEAD, KEPT.ids, temperatures=(t,)
    ),
    "temperatures of SparseLogits": lambda t: sk.SparseLogits(
        KEPT.ids, KEPT.logits, KEPT.lse.expand(-1, 2), temperatures=(1.0, t)
    ),
    "temperatures of StoreSettings": lambda t: StoreSettings(50, "", {}, {}, (1.0, t), "affine8"),
    "temperature of sparse_softmax": lambda t: sk.sparse_softmax(KEPT, temperature=t),
    "temperature of slim_loss": lambda t: sk.slim_loss(X, Y, KEPT, temperature=t),
    "temperature of linear_slim_loss": lambda t: sk.linear_slim_loss(HIDDEN, HEAD, Y, KEPT, temperature=t),
    "temperature of sample_logits": lambda t: sk.sample_logits(X, seed=0, position=0, temperature=t),
    "temperature of sample_distinct": lambda t: sk.sample_distinct(X, 2, seed=0, position=0, temperature=t),
    "temperature of rows": lambda t: sk.sample_logits(
        X, seed=0, position=0, temperature=torch.tensor([1.0, t, 0.0], dtype=torch.float64)
    ),
    "temperature of sample_targets": lambda t: sk.sample_targets(X, 5, 0, position=0, temperature=t),
    "temperature of mixed_targets": lambda t: sk.mixed_targets(X, 5, 3, 0, position=0, temperature=t),
    "temperature of SlimObjective": lambda t: sk.SlimObjective("kd", temperature=t),
    "temperature of generated documents": lambda t: SamplingOptions(1, t, None, 0, 1),
    "sampling_temperature of SlimObjective": lambda t: sk.SlimObjective("gkd", sampling_temperature=t),
    "temperature of PathFinderConfig": lambda t: PathFinderConfig(temperature=t),
}


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("taker", TEMPERATURES)
def test_a_temperature_that_float32_cannot_divide_by_is_refused_by_name(taker):
    # Below 2^-126 a temperature is denormal, above 2^126 its inverse is.
    for temperature in (1e-40, 1.1e-38, 1e38, 3e300, 5e-324):
        with pytest.raises(ValueError, match=rf"^{taker.split()[0]} must be .*in \[1.2e-38, 8.5e\+37\].* got"):
            TEMPERATURES[taker](temperature)
    for temperature in (2.0**-126, 2.0**126):
        TEMPERATURES[taker](temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [2.0**-126, 2.0**126])
def test_the_outermost_temperatures_give_no_nan(temperature, dtype):
    logits = X.to(dtype)
    sparse = sk.topk_logits(logits, 5, target=Y, temperatures=(temperature,))
    wide = torch.logsumexp(logits.double() / temperature, -1).to(sparse.lse.dtype)
    torch.testing.assert_close(sparse.lse[:, 1], wide, rtol=1e-6, atol=1e-6)
    for rest in ("ghost", "renorm", "zero_logit"):
        assert not sk.sparse_softmax(sparse, temperature=temperature, rest=rest, vocab_size=50).logprobs.isnan().any()


def test_temperatures_that_are_one_number_are_refused():
    for make in (
        lambda: sk.topk_logits(X, 5, temperatures=2.0),
        lambda: sk.linear_topk_logits(HIDDEN, HEAD, 5, temperatures=2.0),
        lambda: sk.SparseLogits(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1), torch.zeros(1, 1), 2.0),
    ):
        with pytest.raises(TypeError, match=r"temperatures must be a sequence of numbers, got 2.0: write \(2.0,\)"):
            make()


OPERANDS = {
    "logits of topk_logits": lambda x: sk.topk_logits(x, 5),
    "target of topk_logits": lambda x: sk.topk_logits(X, 5, target=x),
    "hidden of linear_topk_logits": lambda x: sk.linear_topk_logits(x, HEAD, 5),
    "weight of linear_topk_logits": lambda x: sk.linear_topk_logits(HIDDEN, x, 5),
    "bias of linear_topk_logits": lambda x: sk.linear_topk_logits(HIDDEN, HEAD, 5, bias=x),
    "logits of gather_logits": lambda x: sk.gather_logits(x, KEPT.ids),
    "ids of gather_logits": lambda x: sk.gather_logits(X, x),
    "hidden of linear_gather_logits": lambda x: sk.linear_gather_logits(x, HEAD, KEPT.ids),
    "weight of linear_gather_logits": lambda x: sk.linear_gather_logits(HIDDEN, x, KEPT.ids),
    "ids of linear_gather_logits": lambda x: sk.linear_gather_logits(HIDDEN, HEAD, x),
    "target of linear_gather_logits": lambda x: sk.linear_gather_logits(HIDDEN, HEAD, KEPT.ids, target=x),
    "sparse of sparse_softmax": lambda x: sk.sparse_softmax(x),
    "logits of slim_loss": lambda x: sk.slim_loss(x, Y, KEPT),
    "target of slim_loss": lambda x: sk.slim_loss(X, x, KEPT),
    "teacher of slim_loss": lambda x: sk.slim_loss(X, Y, x),
    "token_weight of slim_loss": lambda x: sk.slim_loss(X, Y, KEPT, token_weight=x),
    "hidden of linear_slim_loss": lambda x: sk.linear_slim_loss(x, HEAD, Y, KEPT),
    "weight of linear_slim_loss": lambda x: sk.linear_slim_loss(HIDDEN, x, Y, KEPT),
    "bias of linear_slim_loss": lambda x: sk.linear_slim_loss(HIDDEN, HEAD, Y, KEPT, bias=x),
    "target of linear_slim_loss": lambda x: sk.linear_slim_loss(HIDDEN, HEAD, x, KEPT),
    "teacher of linear_slim_loss": lambda x: sk.linear_slim_loss(HIDDEN, HEAD, Y, x),
    "hidden of HeadTeacher": lambda x: sk.HeadTeacher(x, HEAD, 5),
    "weight of HeadTeacher": lambda x: sk.HeadTeacher(HIDDEN, x, 5),
    "logits of sample_logits": lambda x: sk.sample_logits(x, seed=0, position=0),
    "temperature of sample_logits": lambda x: sk.sample_logits(X, seed=0, position=0, temperature=x),
    "seed of sample_logits": lambda x: sk.sample_logits(X, seed=x, position=0),
    "position of sample_logits": lambda x: sk.sample_logits(X, seed=0, position=x),
    "logits of sample_distinct": lambda x: sk.sample_distinct(x, 2, seed=0, position=0),
    "logits of sample_targets": lambda x: sk.sample_targets(x, 2, 0, position=0),
    "logits of mixed_targets": lambda x: sk.mixed_targets(x, 2, 2, 0, position=0),
    "packed of decode_logits": lambda x: sk.decode_logits(x),
    "ids of SparseLogits": lambda x: sk.SparseLogits(x, KEPT.logits, KEPT.lse),
    "logits of SparseLogits": lambda x: sk.SparseLogits(KEPT.ids, x, KEPT.lse),
    "lse of SparseLogits": lambda x: sk.SparseLogits(KEPT.ids, KEPT.logits, x),
    "target_logit of SparseLogits": lambda x: sk.SparseLogits(KEPT.ids, KEPT.logits, KEPT.lse, target_logit=x),
    "rest_lse of SparseLogits": lambda x: sk.SparseLogits(KEPT.ids, KEPT.logits, KEPT.lse, rest_lse=x),
    "values of PackedLogits": lambda x: sk.PackedLogits(KEPT.ids, x, KEPT.lse, 50),
    "id_words of PackedLogits": lambda x: sk.PackedLogits(x, KEPT.logits, KEPT.lse, 50),
    "lse of PackedLogits": lambda x: sk.PackedLogits(KEPT.ids, KEPT.logits, x, 50),
}


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("value", [[1.0, 2.0, 3.0], np.zeros((3, 50), np.float32)], ids=["list", "array"])
def test_what_is_no_tensor_is_refused_by_name(operand, value):
    with pytest.raises(TypeError, match=rf"^{operand.split()[0]} must be .*, got (list|ndarray)"):
        OPERANDS[operand](value)


@pytest.mark.cpu_kernels
def test_a_fault_names_its_row_in_the_shape_of_the_caller():
    logits, hidden = torch.randn(3, 4, 50), torch.randn(3, 4, 8)
    target = torch.randint(50, (3, 4))
    bad_target = target.clone()
    bad_target[1, 2] = 50
    kept = reference.topk_logits(logits, 5, target=target)
    bad_ids = kept.ids.clone()
    bad_ids[2, 1, 0] = 60
    bad = dataclasses.replace(kept, ids=bad_ids)
    options = {"seed": 0, "position": 0}
    hot = torch.ones(3, 4)
    hot[2, 3] = -1.0
    sums = {"reduction": "sum"}
    for make, named in (
        (lambda: sk.topk_logits(logits, 5, target=bad_target), "target[1, 2]"),
        (lambda: sk.linear_topk_logits(hidden, HEAD, 5, target=bad_target, chunk_rows=2), "target[1, 2]"),
        (lambda: sk.gather_logits(logits, kept.ids, target=bad_target), "target[1, 2]"),
        (lambda: sk.gather_logits(logits, bad_ids), "ids[2, 1]"),
        (lambda: sk.linear_gather_logits(hidden, HEAD, bad_ids, chunk_rows=2), "ids[2, 1]"),
        (lambda: sk.sample_targets(logits, 5, 0, position=0, target=bad_target), "target[1, 2]"),
        (lambda: sk.mixed_targets(logits, 5, 2, 0, position=0, target=bad_target), "target[1, 2]"),
        (lambda: sk.sample_logits(logits, **options, temperature=hot), "in row [2, 3]"),
        (lambda: sk.sample_distinct(logits, 2, **options, top_p=hot), "in row [2, 3]"),
        (lambda: sk.sparse_softmax(bad, vocab_size=50), "teacher.ids[2, 1]"),
        (lambda: sk.slim_loss(logits, bad_target, kept), "target[1, 2]"),
        (lambda: sk.slim_loss(logits, target, bad, reduction="none"), "teacher.ids[2, 1]"),
        (lambda: sk.slim_loss(logits.requires_grad_() * 1, target, bad, inplace_backward=True), "teacher.ids[2, 1]"),
        (lambda: sk.linear_slim_loss(hidden, HEAD, bad_target, kept, chunk_rows=2), "target[1, 2]"),
        (lambda: sk.linear_slim_loss(hidden.requires_grad_(), HEAD, target, bad, **sums), "teacher.ids[2, 1]"),
        (lambda: sk.slim_loss(logits[1, 2], bad_target[1, 2]), "target[]"),
        (lambda: sk.topk_logits(logits[1], 5, target=bad_target[1]), "target[2]"),
        (lambda: bad.validate(50), "row [2, 1] of the SparseLogits"),
    ):
        with pytest.raises(ValueError, match=re.escape(named)):
            make()


@pytest.mark.cpu_kernels
def test_a_label_at_or_above_the_vocabulary_says_how_to_mark_no_label():
    target = torch.tensor([1, 50, 2])
    for make in (
        lambda: sk.topk_logits(X, 5, target=target),
        lambda: sk.linear_topk_logits(HIDDEN, HEAD, 5, target=target),
        lambda: sk.sample_targets(X, 5, 0, position=0, target=target),
    ):
        with pytest.raises(
            ValueError, match=r"target\[1\].*negative for no label.*masked_fill\(target == ignore_index"
        ):
            make()


def test_a_head_without_depth_is_refused():
    for call in (
        lambda: sk.linear_topk_logits(torch.zeros(3, 0), torch.zeros(50, 0), 5),
        lambda: sk.linear_slim_loss(torch.zeros(3, 0), torch.zeros(50, 0), Y),
    ):
        with pytest.raises(ValueError, match=r"hidden must have shape \(..., D\) with D of at least 1"):
            call()


@pytest.mark.parametrize("token_weight", ["teacher_over_student", "student_over_teacher"])
def test_an_adaptive_weight_without_target_logit_warns_by_name(token_weight):
    teacher = sk.topk_logits(X, 5)
    named = f"no target_logit, so token_weight='{token_weight}'"
    for loss in (
        lambda **options: sk.slim_loss(X, Y, teacher, **options),
        lambda **options: sk.linear_slim_loss(HIDDEN, HEAD, Y, teacher, **options),
    ):
        with pytest.warns(UserWarning, match=named) as warned:
            loss(token_weight=token_weight)
        # The warning points at the caller, where Python shows it once.
        assert [Path(entry.filename).name for entry in warned] == ["test_op_inputs.py"]
        loss(token_weight="none")
        loss(token_weight=torch.ones(3))
        loss(token_weight=token_weight, kd_weight=0.0)


def test_the_token_weight_has_one_name():
    teacher = sk.topk_logits(X, 5, target=Y)
    for value in ("none", "student_over_teacher", torch.rand(3)):
        with pytest.warns(DeprecationWarning, match="weight of slim_loss is now called token_weight"):
            old = sk.slim_loss(X, Y, teacher, weight=value)
        assert_same_bits(list(old), list(sk.slim_loss(X, Y, teacher, token_weight=value)))
        with pytest.raises(TypeError, match="the token weight is token_weight="):
            sk.linear_slim_loss(HIDDEN, HEAD, Y, teacher, weight=value)
    by_name = sk.linear_slim_loss(HIDDEN, weight=HEAD, target=Y, teacher=teacher, token_weight="none")
    assert_same_bits(list(by_name), list(sk.linear_slim_loss(HIDDEN, HEAD, Y, teacher, token_weight="none")))


@pytest.mark.parametrize("lead", [(0,), (0, 4), (4, 0)])
def test_empty_batches_of_any_strides_give_empty_results(lead):
    logits, target = torch.zeros(*lead, 40)[..., ::2], torch.zeros(lead, dtype=torch.int64)
    assert logits.stride(-1) == 2
    teacher = sk.topk_logits(logits, 3, target=target)
    assert teacher.ids.shape == (*lead, 3)
    assert sk.sample_targets(logits, 3, 0, position=0, target=target).ids.shape == (*lead, 3)
    assert sk.mixed_targets(logits, 2, 3, 0, position=0).ids.shape[:-1] == lead
    assert sk.sample_logits(logits, seed=0, position=0).token.shape == lead
    assert sk.gather_logits(logits, torch.zeros(*lead, 2, dtype=torch.int32)).logits.shape == (*lead, 2)
    student = logits.clone().as_strided(logits.shape, logits.stride()).requires_grad_()
    loss = sk.slim_loss(student, target, teacher).loss
    loss.backward()
    assert (loss.item(), student.grad.shape) == (0.0, logits.shape)
