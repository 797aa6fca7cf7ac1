"""A student in few bits that learns from its whole self: python examples/quantisation_aware.py MODEL BITS STORE OUT.

The weights of the decoder's linear layers are rounded in every forward pass, and the gradient passes the rounding as if
it were not there. The store holds the logits of MODEL itself, so that no labels but its own judgement are learned.
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, PreTrainedModel

import slimkernels as sk
from slimkernels.store import StoreDataset


class Rounded(nn.Module):
    """Weights (O, I) on 2^bits - 1 levels of their own for each output, symmetric around 0."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.largest = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the rounded weights, with the gradient of the weights themselves."""
        scale = weight.detach().abs().amax(-1, keepdim=True).clamp(min=1e-8) / self.largest
        rounded = (weight / scale).round() * scale
        return weight + (rounded - weight).detach()


def quantised(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """Rounds the linear layers of a model's decoder, in place; embeddings, norms and the head stay as they are."""
    for layer in model.get_decoder().modules():
        if isinstance(layer, nn.Linear):
            parametrize.register_parametrization(layer, "weight", Rounded(bits))
    return model


def make_trainer(model: str, bits: int, store: str, out: str, **options) -> sk.SlimTrainer:
    """Makes the trainer for the folder of a model and a store of its own logits."""
    student = quantised(AutoModelForCausalLM.from_pretrained(model), bits)
    options = {"learning_rate": 1e-4, "save_strategy": "no", "report_to": "none"} | options
    args = sk.SlimConfig(output_dir=out, method="kd", ce_weight=0.0, rest="ghost", **options)
    return sk.SlimTrainer(model=student, args=args, train_dataset=StoreDataset(store))


@torch.no_grad()
def bake(model: PreTrainedModel) -> PreTrainedModel:
    """Replaces the weights by the rounded ones, so that the model can be saved."""
    for layer in model.get_decoder().modules():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return model


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: python examples/quantisation_aware.py MODEL BITS STORE OUT")
    name, bits, store, out = sys.argv[1:]
    trainer = make_trainer(name, int(bits), store, out)
    trainer.train()
    bake(trainer.model).save_pretrained(out)
