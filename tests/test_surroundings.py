"""The ops do not depend on the modes of torch that their caller has chosen."""

from __future__ import annotations

import pytest
import torch
from support.helpers import assert_same_bits, random_problem

import slimkernels as sk


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("region", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_does_not_reach_the_op(reduction, region, dtype):
    # More rows than D, so that the products of several rounds are summed.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=generator).to(dtype)
    head = torch.randn(300, 16, generator=generator).to(dtype)
    target = torch.arange(64)
    teacher = sk.topk_logits(torch.randn(64, 300, generator=generator), 7, target=target)

    def run(enabled: bool):
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        with torch.autocast("cpu", region, enabled=enabled):
            options = {"reduction": reduction, "chunk_rows": 8, "statistics": True}
            out = sk.linear_slim_loss(*leaves, target, teacher, **options)
            out.loss.sum().mul(1e-6 * 65536).backward()
            kept = sk.linear_topk_logits(hidden, head, 5, softcap=9.0)
            probs = sk.sparse_softmax(kept, rest="ghost")
            mixed = sk.mixed_targets(hidden @ torch.eye(16, dtype=dtype), 3, 8, 0, position=0)
        return [*(leaf.grad for leaf in leaves), *out, kept.logits, kept.lse, *probs, mixed.logits]

    assert_same_bits([t.detach() for t in run(True)[:-1]], [t.detach() for t in run(False)[:-1]])


@pytest.mark.parametrize(("dtype", "reduction"), [(torch.float16, "mean"), (torch.float32, "none")])
def test_a_teacher_made_in_inference_mode_is_a_teacher(dtype, reduction):
    logits, target, teacher = random_problem(dtype=dtype)
    hidden, head = torch.randn(7, 16).to(dtype), torch.randn(203, 16).to(dtype)
    with torch.inference_mode():
        made = teacher.to("cpu", copy=True)
        labels = target.clone()
    assert made.ids.is_inference()
    grads = []
    for given, y in ((made, labels), (teacher, target)):
        leaf, depth = logits.clone().requires_grad_(), hidden.clone().requires_grad_()
        sk.slim_loss(leaf, y, given, reduction=reduction).loss.sum().backward()
        sk.linear_slim_loss(depth, head, y, given, reduction=reduction).loss.sum().backward()
        grads.append([leaf.grad, depth.grad])
    assert_same_bits(*grads)
    leaf = logits.clone().requires_grad_()
    sk.topk_logits(leaf, 5, target=labels).target_logit.sum().backward()
    assert leaf.grad.any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "chunk_rows"), [(12, None), (64, 8), (64, 3)])
def test_ignored_rows_contribute_nothing_whatever_they_hold(poison, dtype, num_rows, chunk_rows):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, 16, generator=generator).to(dtype)
    head, bias = torch.randn(300, 16, generator=generator).to(dtype), torch.randn(300, generator=generator).to(dtype)
    target = torch.randint(300, (num_rows,), generator=generator)
    ignored = torch.arange(num_rows) % 5 == 1
    target[ignored] = -100
    poisoned = hidden.clone()
    poisoned[ignored, 3] = poison
    for reduction in ("mean", "none"):
        grads = []
        for values in (poisoned, hidden):
            leaves = [t.clone().requires_grad_() for t in (values, head, bias)]
            loss = sk.linear_slim_loss(
                leaves[0], leaves[1], target, bias=leaves[2], chunk_rows=chunk_rows, reduction=reduction
            ).loss
            loss.sum().backward()
            grads.append([leaf.grad for leaf in leaves])
        assert_same_bits(*grads)
        assert grads[0][1].isfinite().all()
        assert not grads[0][0][ignored].any()
