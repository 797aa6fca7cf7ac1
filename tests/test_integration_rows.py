"""Rows of log-probabilities in any order, and the loss of them, against rows of whole logits."""

from __future__ import annotations

import pytest
import torch

import slimkernels as sk
from slimkernels.integrations.rows import loss_of_logprobs, rows_of_logprobs

VOCAB_SIZE, TOP_K = 31, 6


def teacher_of(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def test_rows_are_those_of_the_logits():
    logits = teacher_of((2, 4))
    target = logits.argsort(-1, descending=True)[..., 2].clone()
    target[0, 0] = logits[0, 0].argmin()
    kept = logits.log_softmax(-1).topk(TOP_K)
    order = torch.randperm(TOP_K, generator=torch.Generator().manual_seed(1))
    padding = torch.full((2, 4, 2), 5)
    ids = torch.cat([kept.indices[..., order], padding], -1)
    logprobs = torch.cat([kept.values[..., order], torch.zeros(2, 4, 2)], -1)
    mask = torch.arange(TOP_K + 2).lt(TOP_K).expand_as(ids)
    found, expected = rows_of_logprobs(ids, logprobs, target, mask=mask), sk.topk_logits(logits, TOP_K, target=target)
    found.validate(VOCAB_SIZE)
    assert torch.equal(found.ids[..., :TOP_K], expected.ids)
    assert (found.ids[..., TOP_K:] == -1).all()
    torch.testing.assert_close(found.logits[..., :TOP_K], expected.logits - expected.lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.rest_lse, expected.rest_lse - expected.lse, atol=1e-4, rtol=1e-4)
    label = (expected.target_logit - expected.lse[..., 0]).where(torch.arange(8).reshape(2, 4) > 0, torch.nan)
    torch.testing.assert_close(found.target_logit, label, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"rest": "ghost"}, {"divergence": "reverse_kl", "rest": "ghost"}])
def test_both_losses_are_those_of_the_teachers_logits(options):
    target = torch.arange(5)
    teacher = teacher_of((5,))
    kept = teacher.log_softmax(-1).topk(TOP_K)
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(VOCAB_SIZE, 8)
    rows = sk.topk_logits(teacher, TOP_K, target=target)
    options = {"token_weight": "none"} | options
    expected = sk.linear_slim_loss(hidden, weight, target, rows, **options).loss
    logits = (hidden @ weight.T).detach().requires_grad_()
    given = (target, kept.indices, kept.values)
    of_logits = loss_of_logprobs(*given, logits=logits, **options).loss
    of_hidden = loss_of_logprobs(*given, hidden=hidden, weight=weight, **options).loss
    assert of_logits.item() == pytest.approx(expected.item(), rel=1e-5)
    assert of_hidden.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in (of_hidden, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_values_that_are_normalised_on_the_kept_ids_have_no_other_mass():
    kept = teacher_of((4,)).topk(TOP_K)
    rows = rows_of_logprobs(kept.indices, kept.values, has_whole_mass=False)
    torch.testing.assert_close((rows.logits - rows.lse).exp().sum(-1), torch.ones(4))
    assert rows.rest_lse is None
    given = (torch.zeros(4, dtype=torch.int64), kept.indices, kept.values)
    with pytest.raises(ValueError, match="got 'ghost'"):
        loss_of_logprobs(*given, logits=torch.zeros(4, VOCAB_SIZE), has_whole_mass=False, rest="ghost")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rest", ["ghost", "zero"])
def test_rows_of_all_ids_have_no_other_mass(dtype, rest):
    """The student has no mass outside of all ids, so that a rounded rest of the teacher would cost infinitely much."""
    teacher, target = teacher_of((4,)), torch.arange(4)
    kept = teacher.log_softmax(-1).to(dtype).topk(VOCAB_SIZE)
    logits = teacher_of((4,), seed=1)
    options = {"rest": rest, "token_weight": "none"}
    found = loss_of_logprobs(target, kept.indices, kept.values, logits=logits, **options).loss
    dense = torch.nn.functional.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    dense += torch.nn.functional.cross_entropy(logits, target)
    assert found.item() == pytest.approx(dense.item(), rel=1e-5 if dtype == torch.float32 else 2e-2)


def test_a_row_that_is_not_finite_is_not_left_out():
    kept = teacher_of((4,)).log_softmax(-1).topk(TOP_K)
    kept.values[2, 1] = torch.nan
    given = (torch.zeros(4, dtype=torch.int64), kept.indices, kept.values)
    found = loss_of_logprobs(*given, logits=torch.zeros(4, VOCAB_SIZE), reduction="none").loss
    assert found.isnan().tolist() == [False, False, True, False]


def test_logits_in_place_of_logprobs_are_refused():
    kept, target = teacher_of((4,)).topk(TOP_K), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"sum to 1 at most, got a sum of .*: subtract the logsumexp of all logits"):
        loss_of_logprobs(target, kept.indices, kept.values, logits=torch.zeros(4, VOCAB_SIZE))
    # What a trainer fills up a batch with.
    rows_of_logprobs(torch.zeros_like(kept.indices), torch.zeros_like(kept.values), target - 100)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8])
def test_ids_may_be_of_any_integers(dtype):
    kept = teacher_of((4,)).log_softmax(-1).topk(TOP_K)
    expected, found = (rows_of_logprobs(ids, kept.values) for ids in (kept.indices, kept.indices.to(dtype)))
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.logits, expected.logits)


def test_wrong_arguments_are_named():
    ids, logprobs = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="logprobs must have the shape of ids"):
        rows_of_logprobs(ids, logprobs[:, :2])
    with pytest.raises(ValueError, match="target must have shape"):
        rows_of_logprobs(ids, logprobs, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"ids must be integers, got torch\.float32"):
        rows_of_logprobs(logprobs, logprobs)
    with pytest.raises(TypeError, match=r"logprobs must be floating-point numbers, got torch\.int64"):
        rows_of_logprobs(ids, ids)
    target = torch.zeros(2, dtype=torch.int64)
    for operands in ({}, {"hidden": logprobs}, {"logits": logprobs, "weight": logprobs}):
        with pytest.raises(ValueError, match="either logits, or hidden and weight, must be given"):
            loss_of_logprobs(target, ids, logprobs, **operands)
