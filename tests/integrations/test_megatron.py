"""slim_loss_func on logits split by Megatron's own tensor-parallel groups, against one device and Megatron's loss."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.integrations import trainer_package
from support.tiny import VOCAB_SIZE

trainer_package("megatron")
pytestmark = pytest.mark.filterwarnings("ignore")
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


def compute(rank: int, folder: str) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from slimkernels.integrations.megatron import BATCH, slim_loss_func

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=SIZE)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=SIZE)
    batch = case()
    width = PADDED // SIZE
    found = {}
    for name, options in {"ce": {"kd_weight": 0.0}, "kd": {"token_weight": "none", "rest": "ghost"}}.items():
        logits = batch["logits"][..., rank * width : (rank + 1) * width].clone().requires_grad_()
        loss_func = slim_loss_func(**{key: batch[key] for key in BATCH}, **options)
        loss, num_tokens, log = loss_func(logits)
        (loss / num_tokens).backward()
        assert log["lm loss"].tolist() == [loss.item(), num_tokens.item()]
        found[name] = {"loss": loss.item(), "num_tokens": num_tokens.item(), "gradient": logits.grad}
    logits = batch["logits"][..., rank * width : (rank + 1) * width].clone()
    own = vocab_parallel_cross_entropy(logits.transpose(0, 1).contiguous(), batch["labels"].T.contiguous())
    found["own"] = (own.T * batch["loss_mask"]).sum().item()
    torch.save(found, f"{folder}/{rank}.pt")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_slices_of_two_ranks_give_the_dense_loss_and_gradient(tmp_path, ran):
    mp.spawn(compute, (str(tmp_path),), nprocs=SIZE)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(SIZE)]
    batch = case()
    logits = batch["logits"].clone().requires_grad_()
    mask = batch["loss_mask"].bool()
    logprobs = logits[mask].log_softmax(-1)
    ce = torch.nn.functional.nll_loss(logprobs, batch["labels"][mask], reduction="sum")
    teacher = torch.full((2, 5, PADDED), -torch.inf)
    teacher = teacher.scatter(-1, batch["teacher_ids"], batch["teacher_logprobs"])[mask]
    kl = torch.nn.functional.kl_div(logprobs, teacher, reduction="none", log_target=True).nan_to_num().sum()
    for name, dense in {"ce": ce, "kd": ce + kl}.items():
        (gradient,) = torch.autograd.grad(dense / mask.sum(), logits, retain_graph=True)
        for rank in ranks:
            assert rank[name]["loss"] == pytest.approx(dense.item(), rel=1e-5)
            assert rank[name]["num_tokens"] == mask.sum()
        torch.testing.assert_close(
            torch.cat([rank[name]["gradient"] for rank in ranks], -1), gradient, atol=1e-6, rtol=1e-4
        )
    assert ranks[0]["own"] == pytest.approx(ranks[0]["ce"]["loss"], rel=1e-5)
    ran("megatron-core", "tensor parallel groups", "loss and gradient on two ranks, its own loss and the dense one")
