"""The final layers of a causal language model, its last norm and its head: found, and loaded without the others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from slimkernels.models.head import output_embeddings

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """Returns the norm between a decoder's last layer and the head, or None for a decoder without one.

    It is the last of the decoder's own modules whose parameters are vectors: the others are embeddings and layers.
    """
    own = [module for module in model.get_decoder().children() if _is_norm(module)]
    return own[-1] if own else None


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    # The norms of some models have no parameters.
    return all(weight.ndim == 1 for weight in parameters) and (
        parameters != [] or "norm" in type(module).__name__.lower()
    )


def load_final_layers(folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads the last norm and the head of a model from a folder, a few of its tensors.

    Args:
        folder: Folder with a configuration and weights in safetensors.
        dtype: Data type of the weights.

    Returns:
        The model in evaluation mode. Its final norm and its head have weights; all others are on the device "meta".

    Raises:
        ValueError: The folder holds no configuration of a causal language model, or lacks one of the tensors.
    """
    folder = Path(folder).expanduser()
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"the folder {folder} must hold a model, but its configuration cannot be loaded") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    head, norm = output_embeddings(model), final_norm(model)
    is_tied = model.config.get_text_config(decoder=True).tie_word_embeddings
    _load(head, _name(model, head), folder, dtype, _name(model, model.get_input_embeddings()) if is_tied else None)
    if norm is not None:
        _load(norm, _name(model, norm), folder, dtype)
    return model


def has_safetensors(folder: str | os.PathLike[str]) -> bool:
    """Returns whether a folder holds a configuration and weights from which ``load_final_layers`` reads."""
    path = Path(folder).expanduser()
    return (path / "config.json").is_file() and any((path / name).is_file() for name in (_INDEX, _SINGLE))


def _name(model: PreTrainedModel, module: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


def _load(module: nn.Module, name: str, folder: Path, dtype: torch.dtype, tied: str | None = None) -> None:
    """Loads the parameters of a module; one that is missing may be that of the module ``tied`` to it."""
    state: dict[str, Tensor] = {}
    for parameter in module.state_dict():
        names = [f"{owner}.{parameter}" for owner in (name, tied) if owner is not None]
        tensor = next((found for found in (_tensor(folder, one) for one in names) if found is not None), None)
        if tensor is None:
            raise ValueError(
                f"the weights in {folder} must hold {' or '.join(names)} under this name, but do not: load the whole "
                "model"
            )
        state[parameter] = tensor.to(dtype)
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights of {name} in {folder} do not fit its configuration: {error}") from error


def _tensor(folder: Path, name: str) -> Tensor | None:
    file = folder / _SINGLE
    try:
        if not file.is_file():
            index: dict[str, Any] = json.loads((folder / _INDEX).read_text())
            if name not in index["weight_map"]:
                return None
            file = folder / index["weight_map"][name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name) if name in set(opened.keys()) else None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} cannot be read: {error}") from error
