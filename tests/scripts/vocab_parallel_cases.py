"""Computes the cases of tests/test_vocab_parallel.py on two ranks, each with its slice of the vocabulary.

Run as a script by every rank: ``python vocab_parallel_cases.py FOLDER RANK``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.helpers import RESTS_AND_DIVERGENCES, Problem, largest_allocation, random_problem
from support.tiny import make_model
from torch import Tensor

import slimkernels as sk
from slimkernels import SparseLogits, reference

NUM_ROWS, VOCAB_SIZE, TOP_K, DEPTH = 9, 203, 13, 24
FIRST_SLICE = 130  # rank 0 holds [0, 130), rank 1 the rest
SLICES = ((0, FIRST_SLICE), (FIRST_SLICE, VOCAB_SIZE))
TEMPERATURE = 2.0
MEMORY_SHAPE = (64, 500)  # N, V_local
WEIGHTS = ("teacher_over_student", "student_over_teacher", "none", "tensor")
TOKEN_WEIGHT = torch.linspace(0.1, 1.5, NUM_ROWS)


class Case(NamedTuple):
    """``options`` of the loss; ``top_k`` 0 for no teacher; ``upstream`` of the backward pass.

    With ``rows_without_mass`` some rows of the teacher are all -inf; with ``is_damaged`` one holds a NaN.
    """

    options: dict[str, Any]
    linear: bool = False
    dtype: torch.dtype = torch.float32
    top_k: int = TOP_K
    upstream: float = 1.0
    all_ignored: bool = False
    num_rows: int = NUM_ROWS
    rows_without_mass: bool = False
    is_damaged: bool = False
    sharding: str = "group"  # or "dtensor"
    ours: Mapping[str, Any] = MappingProxyType({})  # options that the reference does not have


def make_cases() -> dict[str, Case]:
    cases = {}
    for i, (rest, divergence) in enumerate(RESTS_AND_DIVERGENCES):
        for j, weight in enumerate(WEIGHTS):
            options = {
                "rest": rest,
                "divergence": divergence,
                "token_weight": TOKEN_WEIGHT if weight == "tensor" else weight,
            }
            options |= {"temperature": (1.0, TEMPERATURE)[(i + j) % 2], "detach_weight": j % 2 == 0}
            cases[f"{rest}-{divergence}-{weight}"] = Case(options)
        options = {"rest": rest, "divergence": divergence, "temperature": (TEMPERATURE, 1.0)[i % 2]}
        cases[f"linear-{rest}-{divergence}"] = Case(options, linear=True, ours={"chunk_rows": 4})
        cases[f"without-mass-{rest}-{divergence}"] = Case(options, rows_without_mass=True)
    whole = {"rest": "zero_logit", "token_weight": "none"}
    cases["without-mass-whole"] = Case(whole, top_k=VOCAB_SIZE, rows_without_mass=True)
    everything = {"softcap": 5.0, "logit_scale": 0.7, "label_smoothing": 0.1, "z_loss_weight": 0.01, "ce_weight": 0.5}
    for rest in ("renorm", "ghost", "zero_logit"):
        for temperature in (1.0, TEMPERATURE):
            options = everything | {"rest": rest, "temperature": temperature, "detach_weight": False}
            cases[f"everything-{rest}-{temperature}"] = Case(options)
        cases[f"linear-everything-{rest}"] = Case(options, linear=True, ours={"chunk_rows": 2})
    ghost = {"rest": "ghost", "temperature": TEMPERATURE}
    gated = {"divergence": "gated", "entropy_threshold": 1.0}
    cases["blended"] = Case(ghost | gated | {"teacher_blend": 0.4, "tail_weight": 2.0})
    cases["blended-part"] = Case({"rest": "renorm_both", "divergence": "jsd", "teacher_blend": 0.4})
    cases["blended-without-mass"] = Case(ghost | {"teacher_blend": 0.4}, rows_without_mass=True)
    cases["without-tail"] = Case(ghost | {"divergence": "skew_reverse_kl", "tail_weight": 0.0}, linear=True)
    cases["without-skew"] = Case(ghost | {"divergence": "skew_kl", "alpha": 0.0})
    for temperature in (1.0, TEMPERATURE):
        options = {"rest": "ghost", "temperature": temperature, "kd_weight": 0.0, "detach_weight": False}
        cases[f"dropped-{temperature}"] = Case(options, is_damaged=True)
    for linear in (False, True):
        form = "linear" if linear else "logits"
        cases[f"sum-{form}"] = Case(ghost | {"reduction": "sum"}, linear, upstream=0.5)
        cases[f"none-{form}"] = Case(ghost | {"reduction": "none"}, linear, upstream=3.0)
        cases[f"num-items-{form}"] = Case({"num_items": 5}, linear)
        cases[f"cross-entropy-{form}"] = Case({"label_smoothing": 0.2}, linear, top_k=0)
        cases[f"kd-alone-{form}"] = Case(ghost | {"ce_weight": 0.0}, linear)
        cases[f"all-kept-{form}"] = Case(ghost | {"divergence": "jsd"}, linear, top_k=VOCAB_SIZE)
        cases[f"all-ignored-{form}"] = Case(ghost, linear, all_ignored=True)
        cases[f"no-rows-{form}"] = Case(ghost, linear, num_rows=0)
        cases[f"dtensor-{form}"] = Case(ghost, linear, sharding="dtensor")
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            name = str(dtype).removeprefix("torch.")
            cases[f"{name}-{form}"] = Case(ghost | {"divergence": "skew_kl"}, linear, dtype)
        for temperature in (1.0, TEMPERATURE):
            options = {"temperature": temperature, "statistics": "without_overlap"}
            cases[f"statistics-{form}-{temperature}"] = Case(ghost | options, linear)
            cases[f"statistics-renorm-{form}-{temperature}"] = Case(options | {"softcap": 5.0}, linear)
        cases[f"statistics-all-kept-{form}"] = Case({"statistics": "without_overlap"}, linear, top_k=VOCAB_SIZE)
        cases[f"statistics-cross-entropy-{form}"] = Case({"statistics": "without_overlap"}, linear, top_k=0)
    cases["over-logits"] = Case(ghost, ours={"inplace_backward": True})
    return cases


CASES = make_cases()


def make_problem(case: Case) -> Problem:
    """Makes a problem: row 1 keeps ids of rank 0 only, row 4 of rank 1 only; row 2 is ignored; both have labels."""
    problem = random_problem(NUM_ROWS, VOCAB_SIZE, max(case.top_k, 1), dtype=case.dtype)
    whole = random_problem(NUM_ROWS, VOCAB_SIZE, VOCAB_SIZE, dtype=case.dtype).teacher.logits.clone()
    whole[1, FIRST_SLICE:] -= 40
    whole[4, :FIRST_SLICE] -= 40
    target = problem.target
    target[1], target[4], target[5], target[6] = VOCAB_SIZE - 1, 0, FIRST_SLICE - 1, FIRST_SLICE
    if case.all_ignored:
        target.fill_(-100)
    teacher = reference.topk_logits(whole, max(case.top_k, 1), target=target, temperatures=(1.0, TEMPERATURE))
    ids, logits = teacher.ids.clone(), teacher.logits
    if case.top_k == TOP_K:
        ids[7, 5:] = -1
    rest_lse = None
    if case.rows_without_mass:
        rest_lse = cast(Tensor, teacher.rest_lse).clone()
        for values in (logits, teacher.lse, rest_lse, cast(Tensor, teacher.target_logit)):
            values[[0, 1, 7, 8]] = -math.inf
        target[0] = ids[0, 3]
        rest_lse[8] = math.nan
    if case.is_damaged:
        logits[3, 1] = math.nan
    teacher = dataclasses.replace(teacher, ids=ids, rest_lse=rest_lse)
    rows = slice(0, case.num_rows)
    return Problem(problem.logits[rows], target[rows], teacher[rows])


def make_operands(case: Case) -> tuple[tuple[Tensor, ...], Tensor, SparseLogits | None]:
    """Returns (logits,) or (hidden, weight, bias), the labels, and the teacher."""
    problem = make_problem(case)
    operands = (problem.logits,)
    if case.linear:
        generator = torch.Generator().manual_seed(11)
        shapes = ((NUM_ROWS, DEPTH), (VOCAB_SIZE, DEPTH), (VOCAB_SIZE,))
        hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in shapes)
        hidden = hidden[: case.num_rows]
        operands = tuple(t.to(case.dtype) for t in (hidden, weight * 0.6, bias))
    return operands, problem.target, problem.teacher if case.top_k else None


def loss_of(case: Case, module, operands, target, teacher, *, product: bool = False, **more):
    """Of ``module``'s functions; ``product``: of torch's logits in the dtype of the operands."""
    options = dict(case.options)
    if not case.linear:
        return module.slim_loss(*operands, target, teacher, **options, **more)
    hidden, weight, bias = operands
    if product:
        return module.slim_loss(F.linear(hidden, weight, bias), target, teacher, **options)
    return module.linear_slim_loss(hidden, weight, target, teacher, bias=bias, **options, **more)


def run_case(case: Case, rank: int):
    """Returns the fields of the loss, and the gradients of this rank's part of the operands."""
    operands, target, teacher = make_operands(case)
    dims = (None, 0, 0) if case.linear else (-1,)
    more = dict(case.ours)
    if case.sharding == "dtensor":
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        placements = [
            Replicate() if dim is None else Shard(dim % t.ndim) for t, dim in zip(operands, dims, strict=True)
        ]
        leaves = [distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in zip(operands, placements, strict=True)]
        inputs = leaves
    else:
        start, stop = SLICES[rank]
        more |= {"group": dist.group.WORLD, "vocab_start": start}
        cut = [t if dim is None else t.narrow(dim, start, stop - start) for t, dim in zip(operands, dims, strict=True)]
        leaves = [t.clone().requires_grad_() for t in cut]
        inputs = [t.clone() for t in leaves] if "inplace_backward" in case.ours else leaves
    out = loss_of(case, sk, inputs, target, teacher, **more)
    grads = torch.autograd.grad(out.loss, leaves, torch.full_like(out.loss, case.upstream))
    if case.sharding == "dtensor":
        assert all(g.placements == t.placements for g, t in zip(grads, leaves, strict=True))
        grads = [g.to_local() for g in grads]
    return tuple(field if field is None else field.detach() for field in out), tuple(grads)


def record_collectives(rank: int, **options) -> list[tuple[str, tuple[int, ...]]]:
    """Records the collectives (name, shape) of a forward and a backward pass of the linear form, in chunks."""
    calls = []

    def recorded(name: str, which: int):
        function = getattr(dist, name)

        def wrapper(*args, **kwargs):
            calls.append((name, tuple(args[which].shape)))
            return function(*args, **kwargs)

        return function, wrapper

    originals = {}
    names = {"all_reduce": 0, "all_gather": 1, "all_gather_into_tensor": 1, "broadcast": 0, "reduce_scatter_tensor": 1}
    for name, which in names.items():
        originals[name], wrapper = recorded(name, which)
        setattr(dist, name, wrapper)
    run_case(Case({"rest": "ghost"} | options, linear=True, ours={"chunk_rows": 2}), rank)
    for name, function in originals.items():
        setattr(dist, name, function)
    return calls


def frozen_weight(rank: int) -> tuple[bool, bool]:
    """Returns whether a frozen weight leaves only hidden a gradient, and whether a loss under no_grad requires one."""
    (hidden, weight, _), target, teacher = make_operands(Case({}, linear=True))
    start, stop = SLICES[rank]
    group = {"group": dist.group.WORLD, "vocab_start": start}
    hidden.requires_grad_()
    sk.linear_slim_loss(hidden, weight[start:stop], target, teacher, **group).loss.backward()
    with torch.no_grad():
        out = sk.linear_slim_loss(hidden, weight[start:stop], target, teacher, **group)
    return hidden.grad is not None and weight.grad is None, out.loss.requires_grad


def memory_of_chunks(rank: int) -> int:
    """Returns the bytes of the largest tensor that the linear form allocates, forward and backward."""
    num_rows, vocab_size = MEMORY_SHAPE
    hidden, weight = torch.randn(num_rows, 4, requires_grad=True), torch.randn(vocab_size, 4, requires_grad=True)
    teacher = reference.topk_logits(torch.randn(num_rows, 2 * vocab_size), 4)
    target = torch.zeros(num_rows, dtype=torch.int64)
    dist.broadcast(hidden.data, 0)
    for field in (teacher.ids, teacher.logits, teacher.lse):
        dist.broadcast(field, 0)
    options = {"rest": "ghost", "chunk_rows": 4, "group": dist.group.WORLD, "vocab_start": rank * vocab_size}

    def step():
        sk.linear_slim_loss(hidden, weight, target, teacher, **options).loss.backward()

    return largest_allocation(step)


def gradient_twice(rank: int) -> tuple[Tensor, Tensor]:
    """Computes the gradient of hidden twice: the sum over ranks must not be summed again."""
    (hidden, weight, _), target, teacher = make_operands(Case({}, linear=True))
    start, stop = SLICES[rank]
    hidden.requires_grad_()
    group = {"group": dist.group.WORLD, "vocab_start": start}
    loss = sk.linear_slim_loss(hidden, weight[start:stop], target, teacher, **group).loss
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    return first, second


def patched_model(rank: int) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Returns the losses of a patched model with a sharded and a whole head, and how far their gradients differ."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    whole = make_model()
    whole.lm_head.weight = torch.nn.Parameter(whole.lm_head.weight.detach().clone())  # no longer the embeddings'
    model = copy.deepcopy(whole)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    sk.patch_model(model)
    ids = torch.arange(14).view(2, 7)
    losses = [each(ids, labels=ids).loss for each in (model, whole)]
    for loss in losses:
        loss.backward()
    pairs = zip(model.named_parameters(), whole.parameters(), strict=True)
    differences = {name: float((_full(p.grad) - q.grad).abs().max() / q.grad.abs().max()) for (name, p), q in pairs}
    return losses[0].detach(), losses[1].detach(), differences


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def error_of(function) -> str:
    try:
        function()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def collect_errors(rank: int) -> dict[str, str]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    operands, target, teacher = make_operands(Case({}))
    head, *_ = make_operands(Case({}, linear=True))
    (logits,) = operands
    start, stop = SLICES[rank]
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    world = dist.group.WORLD

    def of_slice(first=start, labels=target, rows=teacher, part=logits[:, start:stop], **options):
        options = {"group": world, "vocab_start": first} | options
        return lambda: sk.slim_loss(part, labels, rows, **options)

    def labelled(label):
        labels = target.clone()
        labels[3] = label
        return labels

    beyond, unsorted = teacher.ids.clone(), teacher.ids.clone()
    beyond[3, -1] = VOCAB_SIZE
    unsorted[5, :2] = unsorted[5, :2].flip(0)
    with_ids = {
        name: SparseLogits(ids, teacher.logits, teacher.lse, teacher.temperatures, teacher.target_logit)
        for name, ids in (("beyond", beyond), ("unsorted", unsorted))
    }
    hidden, weight, bias = head
    by_depth = distribute_tensor(weight, mesh, [Shard(1)])
    by_id = distribute_tensor(weight, mesh, [Shard(0)])
    functions = {
        "gap": of_slice(start + 7 * rank),
        "overlap": of_slice(start - 7 * rank),
        "other tokens": of_slice(labels=labelled(rank)),
        "label": of_slice(labels=labelled(VOCAB_SIZE)),
        "negative label": of_slice(labels=labelled(-5)),
        "id": of_slice(rows=with_ids["beyond"]),
        "order": of_slice(rows=with_ids["unsorted"]),
        "no group": of_slice(first=3, group=None),
        "group": of_slice(group="tp"),
        "all statistics": of_slice(statistics=True),
        "negative start": of_slice(first=-1),
        "float start": of_slice(first=1.5),
        "depth": lambda: sk.linear_slim_loss(hidden, by_depth, target),
        "both": lambda: sk.linear_slim_loss(hidden, by_id, target, group=world),
        "bias": lambda: sk.linear_slim_loss(hidden, by_id, target, bias=bias),
        "hidden": lambda: sk.linear_slim_loss(distribute_tensor(hidden, mesh, [Shard(1)]), by_id, target),
        "few ids": lambda: sk.linear_slim_loss(hidden, distribute_tensor(weight[:1], mesh, [Shard(0)]), target),
        "replicated": lambda: sk.linear_slim_loss(hidden, distribute_tensor(weight, mesh, [Replicate()]), target),
    }
    return {name: error_of(function) for name, function in functions.items()}


def main(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {
        "cases": {name: run_case(case, rank) for name, case in CASES.items()},
        "errors": collect_errors(rank),
        "collectives": record_collectives(rank),
        "collectives of statistics": record_collectives(rank, statistics="without_overlap"),
        "frozen": frozen_weight(rank),
        "largest": memory_of_chunks(rank),
        "twice": gradient_twice(rank),
        "patched": patched_model(rank),
    }
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
