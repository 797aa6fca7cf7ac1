"""A loop under FSDP2: torchrun --nproc-per-node 8 examples/fsdp2.py STORE MODEL OUT."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimkernels.models.batch import SlimCollator, teacher_rows
from slimkernels.models.head_loss import loss_of_batch
from slimkernels.store import StoreDataset


def train(model: PreTrainedModel, dataset: StoreDataset, *, batch_size: int = 8) -> Iterator[float]:
    """Trains one epoch, yielding the loss of every step over all processes."""
    layers: Any = model.get_decoder().layers
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    sampler = DistributedSampler(dataset, shuffle=False)
    loader = DataLoader(dataset, batch_size, sampler=sampler, collate_fn=SlimCollator(vocab_size=dataset.vocab_size))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    for batch in loader:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        # FSDP2 averages gradients over the processes, and the loss is a mean over the labels of all of them.
        num_items = torch.tensor(float(len(batch["target"])), device=model.device)
        dist.all_reduce(num_items)
        teacher = teacher_rows(batch["teacher"])
        share = loss_of_batch(model, batch, teacher=teacher, num_items=num_items / dist.get_world_size()).loss
        share.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = share.detach() / dist.get_world_size()
        dist.all_reduce(loss)
        yield loss.item()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: torchrun --nproc-per-node 8 examples/fsdp2.py STORE MODEL OUT")
    store, name, out = sys.argv[1:]
    dist.init_process_group()
    device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else "cpu"
    student: Any = AutoModelForCausalLM.from_pretrained(name)
    student.to(device)
    for step, loss in enumerate(train(student, StoreDataset(store))):
        if dist.get_rank() == 0:
            print(step, loss, flush=True)
    weights = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        student.save_pretrained(out, state_dict=weights)
    dist.destroy_process_group()
