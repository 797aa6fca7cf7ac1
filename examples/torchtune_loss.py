"""SLIM in torchtune's ``full_finetune_single_device`` recipe, by these lines of its configuration.

This folder must be on PYTHONPATH.

model:
  _component_: torchtune_loss.without_logits
  builder: torchtune.models.llama3_2.llama3_2_1b
loss:
  _component_: torchtune_loss.StoreLoss
  store: runs/store        # captured from the same documents; omit it for cross-entropy
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchtune.config._utils import _get_component_from_path
from torchtune.modules import TransformerDecoder

import slimkernels as sk
from slimkernels.store import Store
from slimkernels.trainer.teachers import StoredTeacher


class WithoutLogits(TransformerDecoder):
    """A decoder that returns [hidden (B, T, D), the head's weight (V, D), tokens (B, T)] in place of logits."""

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, **options: Any) -> list[Tensor]:
        """Returns the list, which recipes pass to the loss unchanged."""
        if mask is not None:
            raise ValueError("a batch must not be packed: set dataset.packed to False")
        return [*super().forward(tokens, **options), tokens]

    def unembed(self, h: Tensor) -> list[Tensor]:
        """Returns the head's input and weight."""
        head = getattr(self.output, "tied_module", self.output)
        if not isinstance(head, nn.Linear | nn.Embedding):
            raise ValueError(f"the output layer must be linear, got {type(head).__name__}: do not apply LoRA to it")
        return [self.norm(h), head.weight]


def without_logits(builder: str, **arguments: Any) -> TransformerDecoder:
    """Builds a model with one of torchtune's builders and turns it into ``WithoutLogits``."""
    model = _get_component_from_path(builder)(**arguments)
    model.__class__ = WithoutLogits
    return model


class StoreLoss(nn.Module):
    """The loss ``linear_slim_loss`` of a ``WithoutLogits``, with teacher rows from a store of the batch's documents.

    Args:
        store: Folder of the store; None for the cross-entropy of the labels alone.
        ignore_index: Label of padding and prompts.
        **options: Options of ``linear_slim_loss``.
    """

    def __init__(self, store: str | None = None, ignore_index: int = -100, **options: Any) -> None:
        super().__init__()
        self.teacher = None if store is None else StoredTeacher(Store(store))
        self.ignore_index = ignore_index
        self.options = options

    def forward(self, outputs: list[Tensor], labels: Tensor) -> Tensor:
        """Computes the mean loss over labels (B, T), which the recipe has shifted to the places that predict them."""
        hidden, weight, tokens = outputs
        labelled = labels.ne(self.ignore_index)
        places = labelled.flatten().nonzero().squeeze(-1)
        teacher = None
        if self.teacher is not None:
            # The recipe passes no padding mask. A document ends with its last label, whose token is one place further.
            ends = torch.where(labelled, torch.arange(1, labels.shape[1] + 1, device=labels.device), 0).amax(-1)
            mask = torch.arange(labels.shape[1], device=labels.device) <= ends[:, None]
            teacher = self.teacher.rows({"input_ids": tokens, "attention_mask": mask}, places)
        hidden, target = hidden.flatten(0, 1).index_select(0, places), labels.flatten()[places]
        return sk.linear_slim_loss(hidden, weight.to(hidden.dtype), target, teacher, **self.options).loss
