"""Writes the hidden states of a model into files, as vLLM's connector does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from transformers import PreTrainedModel

from slimkernels.models.final_layers import final_norm


@torch.inference_mode()
def layers_of(model: PreTrainedModel, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of every layer before the final norm (T, L, D), as vLLM writes them, and that of the norm (T, D)."""
    decoder, norm = model.get_decoder(), final_norm(model)
    caught: list[torch.Tensor] = []
    hook = norm.register_forward_hook(lambda _, given, __: caught.append(given[0]))
    output = decoder(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    hook.remove()
    # The embeddings and the outputs of all layers but the last, which transformers gives after the norm.
    layers = [*output.hidden_states[:-1], caught[-1].reshape(1, len(ids), -1)]
    return torch.stack([layer[0] for layer in layers], 1), output.last_hidden_state[0]


def write_files(
    folder: Path,
    model: PreTrainedModel,
    documents: Sequence[list[int]],
    *,
    normed=False,
    last=True,
    dtype=torch.bfloat16,
):
    """Writes a file per document with the first layer, the middle one, and, unless ``last`` is False, the last one."""
    folder.mkdir(exist_ok=True)
    for number, ids in enumerate(documents):
        layers, final = layers_of(model, ids)
        chosen = [layers[:, 0], layers[:, 1]]
        if last:
            chosen.append(final if normed else layers[:, -1])
        content = {"hidden_states": torch.stack(chosen, 1).to(dtype), "token_ids": torch.tensor(ids)}
        safetensors.torch.save_file(content, folder / f"cmpl-{number:02}-0.safetensors")
        (folder / f"cmpl-{number:02}-0.safetensors.lock").touch()
    return folder
