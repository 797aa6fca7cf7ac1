"""The losses with ``group=`` on two gloo ranks, against the reference on the whole vocabulary."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts.vocab_parallel_cases import CASES, DEPTH, MEMORY_SHAPE, NUM_ROWS, loss_of, make_operands
from support.helpers import assert_as_accurate, assert_same_bits, explain, to_dtype

from slimkernels import reference

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch with gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank of one pair of processes computed."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).parent / "scripts/vocab_parallel_cases.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(rank)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=900)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_vocab_parallel_loss_equals_the_whole_one(name, ranks):
    case = CASES[name]
    (fields, first), (fields_there, second) = (rank["cases"][name] for rank in ranks)
    assert_same_bits(fields, fields_there)
    grads = [torch.cat([a, b], dim=0 if case.linear else -1) for a, b in zip(first, second, strict=True)]
    if case.linear:
        assert_same_bits(first[0], second[0])  # hidden's gradient is whole on both
        grads[0] = first[0]
    operands, target, teacher = make_operands(case)
    theirs, their_grads = reference_of(case, operands, target, teacher, product=True)
    wide = tuple(operand.double() for operand in operands)
    teacher = None if teacher is None else to_dtype(teacher, torch.float64)
    truth, true_grads = reference_of(case, wide, target, teacher)
    for field, *values in zip(reference.SlimLoss._fields, fields, theirs, truth, strict=True):
        with explain(field):
            if values[-1] is None:
                assert values[0] is None
            else:
                assert_as_accurate(*values, at_least=1.0)
    for index, values in enumerate(zip(grads, their_grads, true_grads, strict=True)):
        with explain(f"gradient of operand {index}"):
            assert_as_accurate(*values)
    assert not grads[0][target == -100].any(), "an ignored row has a gradient"


def reference_of(case, operands, target, teacher, **options):
    leaves = tuple(operand.clone().requires_grad_() for operand in operands)
    out = loss_of(case, reference, leaves, target, teacher, **options)
    grads = torch.autograd.grad(out.loss, leaves, torch.full_like(out.loss, case.upstream))
    return out, [grad.to(operand.dtype) for grad, operand in zip(grads, operands, strict=True)]


def test_vocab_parallel_collectives_are_few_and_small(ranks):
    for rank in ranks:
        *forward, backward = rank["collectives"]
        assert forward == [("all_gather", (10, NUM_ROWS)), ("all_reduce", (2, NUM_ROWS))]
        assert backward == ("all_reduce", (NUM_ROWS, DEPTH))
        *forward, backward = rank["collectives of statistics"]
        assert forward == [("all_gather", (13, NUM_ROWS)), ("all_reduce", (2, NUM_ROWS))]
        assert backward == ("all_reduce", (NUM_ROWS, DEPTH))


def test_vocab_parallel_frozen_weight_and_no_grad(ranks):
    assert [rank["frozen"] for rank in ranks] == [(True, False)] * 2


def test_vocab_parallel_linear_never_holds_its_logits(ranks):
    num_rows, vocab_size = MEMORY_SHAPE
    for rank in ranks:
        assert rank["largest"] < num_rows * vocab_size * 4 / 8


def test_vocab_parallel_gradient_twice(ranks):
    for rank in ranks:
        assert_same_bits(*rank["twice"])


def test_patched_model_with_a_sharded_head_equals_the_whole_one(ranks):
    for rank in ranks:
        loss, expected, differences = rank["patched"]
        torch.testing.assert_close(loss, expected)
        assert max(differences.values()) < 1e-5, differences


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gap", r"ValueError: the slices .* each id once, got [0, 130), [137, 210)"),
        ("overlap", r"ValueError: the slices .* each id once, got [0, 130), [123, 196)"),
        ("other tokens", r"ValueError: every rank of group must have the same tokens, got target[3] = [0, 1]"),
        ("label", r"ValueError: target[3] must be a label in [0, V) or ignored"),
        ("negative label", r"ValueError: target[3] must be a label in [0, V) or ignored"),
        ("id", r"ValueError: teacher.ids[3] must ascend strictly inside [0, V)"),
        ("order", r"ValueError: teacher.ids[5] must ascend strictly inside [0, V)"),
        ("no group", r"ValueError: vocab_start=3 means that logits is a slice of the vocabulary: pass group"),
        ("group", r"TypeError: group must be a torch.distributed ProcessGroup that this rank is in, got str"),
        ("all statistics", r"ValueError: statistics must be False or 'without_overlap' where a rank holds a slice"),
        ("negative start", r"ValueError: vocab_start must be at least 0, got -1"),
        ("float start", r"TypeError: vocab_start must be an integer, got float"),
        ("depth", r"ValueError: weight as a DTensor must be sharded on its vocabulary dimension, [Shard(0)]"),
        (
            "both",
            r"ValueError: weight is a DTensor, whose placement tells its slice: do not pass group",
        ),
        ("bias", r"ValueError: bias must have shape ("),
        ("hidden", r"ValueError: hidden must be whole on every rank, got a DTensor with placements"),
        ("few ids", r"ValueError: every rank must hold some of the vocabulary, got 1 ids in slices of 1 over 2 ranks"),
        ("replicated", r"no error"),
    ],
)
def test_vocab_parallel_refuses(name, message, ranks):
    for rank in ranks:
        said = rank["errors"][name]
        for part in message.split(" .* "):
            assert part in said
