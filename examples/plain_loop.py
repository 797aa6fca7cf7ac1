"""Trains a transformers student on a store in a plain torch loop: python examples/plain_loop.py STORE MODEL OUT."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

import slimkernels as sk
from slimkernels.models.batch import SlimCollator, teacher_rows
from slimkernels.models.head import LanguageModelHead
from slimkernels.models.hidden_states import hidden_states
from slimkernels.store import DocumentOrder, StoreDataset


def train(model: PreTrainedModel, dataset: StoreDataset, *, epochs: int = 1, batch_size: int = 8) -> Iterator[float]:
    """Trains the model, yielding the loss of every step."""
    order = DocumentOrder(len(dataset), seed=0)
    loader = DataLoader(dataset, batch_size, sampler=order, collate_fn=SlimCollator(vocab_size=dataset.vocab_size))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    for epoch in range(epochs):
        order.set_epoch(epoch)
        for batch in loader:
            batch = {name: value.to(model.device) for name, value in batch.items()}
            head = LanguageModelHead.of(model).arguments(hidden_states(model, batch))
            loss = sk.linear_slim_loss(target=batch["target"], teacher=teacher_rows(batch["teacher"]), **head).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/plain_loop.py STORE MODEL OUT")
    store, name, out = sys.argv[1:]
    student: Any = AutoModelForCausalLM.from_pretrained(name)
    student.to("cuda" if torch.cuda.is_available() else "cpu")
    for step, loss in enumerate(train(student, StoreDataset(store))):
        print(step, loss)
    student.save_pretrained(out)
