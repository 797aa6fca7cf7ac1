"""The ops in one compiled graph each: symbolic shapes, and options whose values change from call to call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.helpers import random_problem
from torch import Tensor

import slimkernels as sk

# The compiler itself imports what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def graphs_of(function: Callable[..., Tensor], calls: list[tuple], dynamic: bool | None = None) -> int:
    """Holds the compiled function to the eager one for all calls, and returns the number of graphs it took."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    for call in calls:
        operand, *rest = call
        eager, traced = operand.clone().requires_grad_(), operand.clone().requires_grad_()
        expected, actual = function(eager, *rest), compiled(traced, *rest)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
        if expected.requires_grad:
            expected.sum().backward()
            actual.sum().backward()
            torch.testing.assert_close(traced.grad, eager.grad, rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()
    return len(graphs)


LOGITS, TARGET, TEACHER = random_problem(5, 40, 6, temperature=2.0)
FIELDS = (TARGET, TEACHER.ids, TEACHER.logits, TEACHER.lse, TEACHER.target_logit)
HIDDEN, HEAD = torch.randn(5, 8), torch.randn(40, 8)


def record(ids: Tensor, logits: Tensor, lse: Tensor, target_logit: Tensor) -> sk.SparseLogits:
    return sk.SparseLogits(ids, logits, lse, (1.0, 2.0), target_logit)


def softmax(x: Tensor, *fields: Tensor) -> Tensor:
    return sk.sparse_softmax(sk.SparseLogits(fields[1], x, fields[3], (1.0, 2.0))).logprobs


DYNAMIC = {
    "slim_loss": (LOGITS, lambda x, *f: sk.slim_loss(x, f[0], record(*f[1:])).loss, FIELDS),
    "slim_loss alone": (LOGITS, lambda x, y: sk.slim_loss(x, y).loss, (TARGET,)),
    "linear_slim_loss": (HIDDEN, lambda h, w, y: sk.linear_slim_loss(h, w, y).loss, (HEAD, TARGET)),
    "topk_logits": (LOGITS, lambda x: sk.topk_logits(x, 4, temperatures=(1.0, 2.0)).logits, ()),
    "linear_topk_logits": (HIDDEN, lambda h, w: sk.linear_topk_logits(h, w, 4).logits, (HEAD,)),
    "sparse_softmax": (TEACHER.logits.nan_to_num(), softmax, FIELDS),
    "sample_logits": (LOGITS, lambda x: sk.sample_logits(x, seed=1, position=2).logprob, ()),
    "sample_targets": (LOGITS, lambda x: sk.sample_targets(x, 8, 1, position=2).logits, ()),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_an_op_compiles_with_symbolic_shapes(name):
    operand, function, others = DYNAMIC[name]
    # The compiler starts again once it knows which numbers must be constants.
    assert graphs_of(function, [(operand, *others)] * 2, dynamic=True) <= 2


OPTIONS = {
    "temperature": (1.5, 2.5, 0.7),
    "kd_weight": (0.5, 0.7, 2.0),
    "ce_weight": (0.5, 0.7, 2.0),
    "z_loss_weight": (1e-4, 2e-4, 0.3),
    "logit_scale": (0.5, 0.7, 2.0),
    "softcap": (5.0, 9.0, 30.0),
    "label_smoothing": (0.1, 0.2, 0.3),
    "beta": (0.2, 0.3, 0.9),
    "alpha": (0.2, 0.3, 0.9),
    "forward_weight": (0.5, 0.7, 2.0),
    "entropy_threshold": (0.5, 0.7, 2.0),
    "teacher_blend": (0.2, 0.3, 0.9),
    "tail_weight": (0.5, 0.7, 2.0),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("linear", [False, True])
def test_a_new_value_of_a_float_option_compiles_no_new_graph(name, linear):
    users = {"beta": "jsd", "alpha": "skew_kl", "forward_weight": "gated", "entropy_threshold": "gated"}
    rest = "ghost" if name == "tail_weight" else "renorm_both"
    fixed = {"divergence": users.get(name, "forward_kl"), "rest": rest}

    def loss(x: Tensor, value: float, *fields: Tensor) -> Tensor:
        target, teacher = fields[0], record(*fields[1:])
        if linear:
            return sk.linear_slim_loss(x, HEAD, target, teacher, **fixed, **{name: value}).loss
        return sk.slim_loss(x, target, teacher, **fixed, **{name: value}).loss

    operand = HIDDEN if linear else LOGITS
    assert graphs_of(loss, [(operand, value, *FIELDS) for value in OPTIONS[name]]) <= 2


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_new_temperature_compiles_no_new_graph_for_any_reduction(reduction):
    def loss(x: Tensor, temperature: float, *fields: Tensor) -> Tensor:
        return sk.slim_loss(x, fields[0], record(*fields[1:]), temperature=temperature, reduction=reduction).loss

    assert graphs_of(loss, [(LOGITS, value, *FIELDS) for value in (1.5, 2.5, 0.7)]) <= 2


def test_a_new_value_of_a_sampling_option_compiles_no_new_graph():
    def drawn(x: Tensor, temperature: float) -> Tensor:
        return sk.sample_logits(x, seed=1, position=2, temperature=temperature).truncated_logprob

    assert graphs_of(drawn, [(LOGITS, value) for value in (0.6, 0.7, 0.8, 1.2)]) <= 2


def test_a_new_value_of_top_k_compiles_no_new_graph():
    assert graphs_of(lambda x, k: sk.topk_logits(x, k).lse, [(LOGITS, k) for k in range(2, 14)]) <= 2
    assert graphs_of(lambda x, k: sk.linear_topk_logits(x, HEAD, k).lse, [(HIDDEN, k) for k in range(2, 14)]) <= 2


def test_a_new_value_of_a_teacher_op_compiles_no_new_graph():
    values = (1.5, 2.5, 0.7)

    def probabilities(x: Tensor, temperature: float, ids: Tensor, lse: Tensor) -> Tensor:
        sparse = sk.SparseLogits(ids, x, lse, (1.0, 2.0))
        return sk.sparse_softmax(sparse, temperature=temperature).logprobs

    kept = TEACHER.logits.nan_to_num()
    assert graphs_of(probabilities, [(kept, value, TEACHER.ids, TEACHER.lse) for value in values]) <= 2
    assert graphs_of(lambda x, t: sk.topk_logits(x, 4, temperatures=(t,)).lse, [(LOGITS, t) for t in values]) <= 2
    capped = [(HIDDEN, cap) for cap in values]
    assert graphs_of(lambda h, cap: sk.linear_topk_logits(h, HEAD, 4, softcap=cap).lse, capped) <= 2

    def taught(h: Tensor, number: float, name: str, target: Tensor, temperature: float) -> Tensor:
        teacher = sk.HeadTeacher(HIDDEN, HEAD, 4, **{name: number})
        return sk.linear_slim_loss(h, HEAD, target, teacher, rest="ghost", temperature=temperature).loss

    for name in ("softcap", "logit_scale"):
        assert graphs_of(taught, [(HIDDEN, value, name, TARGET, value) for value in values]) <= 2
    drawn = [(LOGITS, t) for t in values]
    assert graphs_of(lambda x, t: sk.sample_targets(x, 8, 1, position=2, temperature=t).logits, drawn) <= 2


def test_a_wrong_value_raises_in_a_compiled_graph_too():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y, t: sk.slim_loss(x, y, temperature=t).loss, backend="aot_eager")
    with pytest.raises(Exception, match="temperature must be positive and finite"):
        compiled(LOGITS, TARGET, -1.0)
    torch._dynamo.reset()
