"""Students to train: loaded, initialised at random, or made of some of a teacher's layers."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from slimkernels.models.load import is_adapter, load_adapter


def make_student(
    config_or_path: PreTrainedConfig | str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocab_size: int | None = None,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    intermediate_size: int | None = None,
    max_length: int = 2048,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Loads a student, or makes a small randomly initialised one with the teacher's vocabulary.

    Args:
        config_or_path: A folder (of a model, or of an adapter of PEFT) or hub name to load, a configuration to
            initialise at random, or None for a new Llama-style student with tied embeddings of the sizes below.
        tokenizer: The teacher's tokenizer, which gives a new student ``vocab_size`` and special tokens.
        vocab_size: Vocabulary size V of a new student; takes precedence over ``len(tokenizer)``, as a teacher's head
            may be padded.
        hidden_size: Width D of a new student.
        num_layers: Decoder layers of a new student.
        num_heads: Attention heads of a new student; ``hidden_size`` must be a multiple of twice as many.
        intermediate_size: Width of the feed-forward layers; None for ``3 * hidden_size``.
        max_length: Longest sequence of a new student, in tokens.
        seed: Seed of the random initialisation, which does not change torch's global generator.
        dtype: Data type of the parameters.

    Returns:
        A causal language model in training mode, on the CPU.

    Raises:
        ValueError: A new student without ``vocab_size`` and ``tokenizer``, or sizes that do not fit.
    """
    if isinstance(config_or_path, str):
        if is_adapter(config_or_path):
            return load_adapter(config_or_path, dtype=dtype).train()
        return AutoModelForCausalLM.from_pretrained(config_or_path, dtype=dtype).train()
    if config_or_path is None:
        if vocab_size is None:
            if tokenizer is None:
                raise ValueError("a new student needs vocab_size or tokenizer: pass the teacher's, got neither")
            vocab_size = len(tokenizer)
        if hidden_size % (2 * num_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 * num_heads={2 * num_heads} (rotary heads have an even "
                f"width), got {hidden_size}"
            )
        config_or_path = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size if intermediate_size is None else intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            max_position_embeddings=max_length,
            tie_word_embeddings=True,
            bos_token_id=getattr(tokenizer, "bos_token_id", None),
            eos_token_id=getattr(tokenizer, "eos_token_id", None),
            pad_token_id=getattr(tokenizer, "pad_token_id", None),
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config_or_path, dtype=dtype).train()


def has_new_weights(model: nn.Module) -> bool:
    """Returns whether a model starts from random weights: every norm is as it was initialised, all 1 or all 0.

    Training changes norms. A model without any, or whose parameters are on other processes, counts as trained.
    """
    norms = [
        parameter
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    ]
    return bool(norms) and all(p.numel() > 0 and bool((p == 0).all() or (p == 1).all()) for p in norms)


def drop_layers(model: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """Makes a student of some of a teacher's layers; its embeddings, norms and head are the teacher's.

    With a number n, the student's layer i is round(i (L - 1) / (n - 1)) of the teacher's L: the first and the last, and
    evenly spaced ones between them; 1 keeps the first. DistilBERT initialises its student in this way (arXiv
    1910.01108).

    Args:
        model: The teacher, whose decoder holds its layers in one ``torch.nn.ModuleList``; it is not changed.
        layers: Number of layers to keep, from 1 to L, or the indices of these layers, from 0 to L - 1 and increasing.

    Returns:
        A new model of the teacher's class and dtype, in training mode, on the CPU, which shares no memory with the
        teacher.

    Raises:
        ValueError: ``layers`` is out of range or not increasing, or the decoder has no such list.
    """
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    kept = _kept_layers(layers, total)
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if len(lists) != 1:
        raise ValueError(
            f"the layers of {type(model).__name__} must be one torch.nn.ModuleList of length {total}, got {len(lists)}"
        )
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    for name, value in text.to_dict().items():
        # Settings with one value for each layer, such as the kind of its attention.
        if isinstance(value, list) and len(value) == total:
            setattr(text, name, [value[layer] for layer in kept])
    text.num_hidden_layers = len(kept)
    student = make_student(config, dtype=model.dtype)
    place = {f"{lists[0]}.{old}.": f"{lists[0]}.{new}." for new, old in enumerate(kept)}
    weights = {}
    for name, tensor in model.state_dict().items():
        layer = re.match(rf"{re.escape(lists[0])}\.\d+\.", name)
        if layer is None or layer[0] in place:
            weights[name if layer is None else place[layer[0]] + name[layer.end() :]] = tensor
    student.load_state_dict(weights)
    student.generation_config = copy.deepcopy(model.generation_config)
    return student


def _kept_layers(layers: int | Sequence[int], total: int) -> list[int]:
    """Returns the indices of the layers to keep, of ``total``."""
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise ValueError(f"layers must be a number from 1 to {total}, the teacher's layers, got {layers}")
        return [round(i * (total - 1) / max(layers - 1, 1)) for i in range(layers)]
    kept = list(layers)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= total:
        raise ValueError(
            f"layers must be increasing indices from 0 to {total - 1}, as the teacher has {total} layers, got {kept}"
        )
    return kept
