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


def test_wrong_arguments_are_named():
    ids, logprobs = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="logprobs must have the shape of ids"):
        rows_of_logprobs(ids, logprobs[:, :2])
    with pytest.raises(ValueError, match="target must have shape"):
        rows_of_logprobs(ids, logprobs, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="either logits or hidden"):
        loss_of_logprobs(torch.zeros(2, dtype=torch.int64), ids, logprobs)
