"""The evaluation mode of a model, and the number of tokens that it can read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode within the context, and afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def context_length(config: Any) -> int | None:
    """Returns how many tokens a model of this configuration can read, or None if the configuration does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
