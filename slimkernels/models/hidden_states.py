"""Hidden states that a causal language model's head is given, computed without its logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from slimkernels.models.head import output_embeddings
from slimkernels.models.replaced import replaced


def hidden_states(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Computes the decoder's last hidden states (N, D) at the labelled rows of a batch of ``SlimCollator``."""
    output = model.get_decoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return output.last_hidden_state.flatten(0, 1).index_select(0, batch["rows"])


class HeadInput:
    """Keeps the input of a model's head, and skips the head's product, while ``inside(model)``."""

    def __init__(self) -> None:
        self._hidden: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """Input (B, T, D) of the head in the last call of the model.

        Raises:
            ValueError: The model has not called its head.
        """
        if self._hidden is None:
            raise ValueError(
                "the model computed its logits without calling its output embeddings, which LanguageModelHead is read "
                "from: use a causal language model whose get_output_embeddings() is the module that it calls"
            )
        return self._hidden

    @contextlib.contextmanager
    def inside(self, model: PreTrainedModel) -> Iterator[None]:
        """Makes calls of ``model``, or of a wrapper around it, return logits of shape (..., 0) within the context."""
        with replaced(output_embeddings(model), forward=self._head):
            yield

    def _head(self, hidden: Tensor) -> Tensor:
        self._hidden = hidden
        return empty_logits(hidden)


def empty_logits(hidden: Tensor) -> Tensor:
    """Returns logits (..., 0) for hidden states (..., D); what a model does to its logits costs nothing on them."""
    return hidden.new_empty(*hidden.shape[:-1], 0)
