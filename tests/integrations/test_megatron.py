"""slim_loss_func on logits split by Megatron's own tensor-parallel groups, against one device and Megatron's loss."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.integrations import trainer_package
from support.tiny import VOCAB_SIZE

trainer_package("megatron")
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4
SIZE, PADDED = 2, 98  # Megatron pads the vocabulary to a multiple of the ranks


def case() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(2, 5, VOCAB_SIZE, generator=generator)
    kept = teacher.log_softmax(-1).topk(VOCAB_SIZE)
    return {
        "logits": 3 * torch.randn(2, 5, PADDED, generator=generator),
        "labels": torch.randint(VOCAB_SIZE, (2, 5), generator=generator),
        "loss_mask": torch.tensor([[0.0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "teacher_ids": kept.indices,
        "teacher_logprobs": kept.values,
    }


def curve(logits: torch.Tensor, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> tuple[list[float], torch.Tensor]:
    """Returns the mean losses of some steps on the logits themselves, and the gradient of the first."""
    weights, losses, gradients = torch.nn.Parameter(logits.clone()), [], []
    optimizer = torch.optim.SGD([weights], lr=5.0)
    for _ in range(STEPS):
        loss = loss_of(weights)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        gradients.append(weights.grad.clone())
        optimizer.step()
    return losses, gradients[0]


def compute(rank: int, folder: str) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from slimkernels.integrations.megatron import BATCH, slim_loss_func

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=SIZE)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=SIZE)
    batch = case()
    width = PADDED // SIZE
    logits = batch["logits"][..., rank * width : (rank + 1) * width]

    def slim(logits: torch.Tensor, **options) -> torch.Tensor:
        loss, num_tokens, log = slim_loss_func(**{key: batch[key] for key in BATCH}, **options)(logits)
        assert log["lm loss"].tolist() == [loss.item(), num_tokens.item()]
        assert num_tokens == batch["loss_mask"].sum()
        return loss / num_tokens

    def own(logits: torch.Tensor) -> torch.Tensor:
        losses = vocab_parallel_cross_entropy(logits.transpose(0, 1).contiguous(), batch["labels"].T.contiguous())
        return (losses.T * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

    found = {
        "ce": curve(logits, functools.partial(slim, kd_weight=0.0)),
        "kd": curve(logits, functools.partial(slim, token_weight="none", rest="ghost")),
        "own": curve(logits, own),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_slices_of_two_ranks_give_its_own_curve_and_the_dense_one(tmp_path, ran):
    mp.spawn(compute, (str(tmp_path),), nprocs=SIZE)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(SIZE)]
    batch = case()
    mask = batch["loss_mask"].bool()
    teacher = torch.full((2, 5, PADDED), -torch.inf)
    teacher = teacher.scatter(-1, batch["teacher_ids"], batch["teacher_logprobs"])[mask]

    def dense(logits: torch.Tensor, kd_weight: float) -> torch.Tensor:
        logprobs = logits[mask].log_softmax(-1)
        kl = torch.nn.functional.kl_div(logprobs, teacher, reduction="none", log_target=True).nan_to_num()
        return torch.nn.functional.nll_loss(logprobs, batch["labels"][mask]) + kd_weight * kl.sum() / mask.sum()

    for name, kd_weight in {"ce": 0.0, "kd": 1.0}.items():
        losses, gradient = curve(batch["logits"], functools.partial(dense, kd_weight=kd_weight))
        assert losses[-1] < losses[0]
        for rank in ranks:
            assert rank[name][0] == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(torch.cat([rank[name][1] for rank in ranks], -1), gradient, atol=1e-6, rtol=1e-4)
    for rank in ranks:
        assert rank["ce"][0] == pytest.approx(rank["own"][0], rel=1e-5)
        torch.testing.assert_close(rank["ce"][1], rank["own"][1], atol=1e-6, rtol=1e-4)
    did = f"{STEPS} steps on two ranks with K = V, the dense curve; on the labels, that of its own loss"
    ran("megatron-core", "tensor parallel groups", did)
