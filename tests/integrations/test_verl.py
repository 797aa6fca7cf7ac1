"""The loss mode of verl's registry, through verl's own two calls of a loss, against its forward_kl_topk."""

from __future__ import annotations

import pytest
import torch
from support.integrations import trainer_package
from support.tiny import VOCAB_SIZE

trainer_package("verl")
pytestmark = pytest.mark.filterwarnings("ignore")
LENGTHS = (5, 8)
# The places of the packed sequences at which verl has an answer of the teacher.
ANSWERED = [place for place in range(sum(LENGTHS)) if place + 1 not in (LENGTHS[0], sum(LENGTHS))]


@pytest.fixture
def register(monkeypatch):
    """Returns ``slimkernels.integrations.verl.register``, whose registrations end with the test."""
    from verl.trainer.distillation import losses
    from verl.trainer.distillation.fsdp import losses as fsdp_losses

    import slimkernels.integrations.verl as ours

    for name in ("DISTILLATION_LOSS_REGISTRY", "DISTILLATION_SETTINGS_REGISTRY"):
        monkeypatch.setattr(losses, name, dict(getattr(losses, name)))
    monkeypatch.setattr(fsdp_losses, "compute_forward_kl_topk", fsdp_losses.compute_forward_kl_topk)
    return ours.register


def losses_of(mode: str, logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Calls verl's logits processor with a mode, and returns its losses and the two masses, where there is an answer.

    As ``extract_prompt_logprobs`` of verl's servers does, the row of a sequence's last token repeats id 0 with 0.0.
    """
    from verl.trainer.distillation.losses import compute_topk_loss
    from verl.workers.config import DistillationConfig, DistillationLossConfig

    settings = DistillationLossConfig(
        loss_mode=mode, topk=top_k, use_policy_gradient=False, log_prob_min_clamp=None, loss_max_clamp=None
    )
    generator = torch.Generator().manual_seed(5)
    teacher = [(3 * torch.randn(n, VOCAB_SIZE, generator=generator)).log_softmax(-1).topk(top_k) for n in LENGTHS]
    for kept in teacher:
        kept.values[-1], kept.indices[-1] = 0.0, 0
    data = {
        "teacher_logprobs": torch.nested.as_nested_tensor([kept.values for kept in teacher], layout=torch.jagged),
        "teacher_ids": torch.nested.as_nested_tensor([kept.indices for kept in teacher], layout=torch.jagged),
    }

    class Actor:
        strategy = "fsdp2"

    found = compute_topk_loss(Actor, DistillationConfig(distillation_loss=settings), data, logits, "thd")
    assert all(torch.isfinite(value).all() for value in found.values())
    return tuple(found[name][0, ANSWERED] for name in ("distillation_losses", "student_mass", "teacher_mass"))


def test_steps_on_all_logits_give_its_own_curve(register, ran):
    register()

    def curve(mode: str) -> list[float]:
        torch.manual_seed(0)
        logits = torch.nn.Parameter(torch.randn(1, sum(LENGTHS), VOCAB_SIZE))
        optimizer, losses = torch.optim.SGD([logits], lr=5.0), []
        for _ in range(4):
            loss = losses_of(mode, logits, VOCAB_SIZE)[0].mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return losses

    expected = curve("forward_kl_topk")
    assert len(set(expected)) == 4
    assert curve("slim_topk") == pytest.approx(expected, rel=1e-4)
    ran("verl", "compute_topk_loss of its FSDP engines", "4 steps with K = V, the curve of its forward_kl_topk")


def test_rest_zero_is_its_own_loss_and_masses(register):
    register("slim_zero", rest="zero")
    torch.manual_seed(0)
    logits = torch.randn(1, sum(LENGTHS), VOCAB_SIZE)
    for found, expected in zip(losses_of("slim_zero", logits, 6), losses_of("forward_kl_topk", logits, 6), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_it_cannot_honour_it_refuses(register):
    with pytest.raises(ValueError, match="no labels"):
        register(ce_weight=1.0)
    register()
    with pytest.raises(ValueError, match="already registered"):
        register()


@pytest.mark.parametrize("given", [{"strategy": "megatron"}, {"strategy": "veomni", "use_fused_kernels": True}])
def test_engines_with_a_loss_of_their_own_are_refused(register, given):
    from verl.trainer.distillation.losses import get_distillation_loss_fn
    from verl.workers.config import ActorConfig

    register()
    config = ActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, **given)
    with pytest.raises(ValueError, match="strategy must be another than 'megatron', and use_fused_kernels False"):
        get_distillation_loss_fn("slim_topk")(config=config, distillation_config=None, model_output={}, data={})
