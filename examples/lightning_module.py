"""Trains a transformers student on a store with Lightning: python examples/lightning_module.py STORE MODEL OUT."""

import sys

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

import slimkernels as sk
from slimkernels.models.batch import SlimCollator, teacher_rows
from slimkernels.models.head import LanguageModelHead
from slimkernels.models.hidden_states import hidden_states
from slimkernels.store import StoreDataset


class Student(lightning.LightningModule):
    """A student trained with SLIM, without computing its logits."""

    def __init__(self, model: PreTrainedModel, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        """Computes the loss of one batch of ``SlimCollator``."""
        head = LanguageModelHead.of(self.model).arguments(hidden_states(self.model, batch))
        result = sk.linear_slim_loss(target=batch["target"], teacher=teacher_rows(batch["teacher"]), **head)
        self.log("loss", result.loss)
        self.log("weight", result.weight.mean())
        return result.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def make_loader(dataset: StoreDataset, **options) -> DataLoader:
    """Makes batches of the store's documents, which Lightning moves to the device and splits over its processes."""
    return DataLoader(dataset, collate_fn=SlimCollator(vocab_size=dataset.vocab_size), **options)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/lightning_module.py STORE MODEL OUT")
    store, name, out = sys.argv[1:]
    student = Student(AutoModelForCausalLM.from_pretrained(name))
    lightning.Trainer(max_epochs=1).fit(student, make_loader(StoreDataset(store), batch_size=8, shuffle=True))
    student.model.save_pretrained(out)
