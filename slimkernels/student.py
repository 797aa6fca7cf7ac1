"""The student's side of a step: the model, its decoder and head, and the batch that both read."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from slimkernels.ops.decode_logits import decode_logits
from slimkernels.packed_logits import PackedLogits
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import collate_documents

if TYPE_CHECKING:
    from slimkernels.store import Document, PackedDocument


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
    """Loads a student, or makes a small randomly initialised one over the teacher's vocabulary.

    Args:
        config_or_path: A folder or hub name to load, a configuration to initialise at random, or None for a
            Llama-style model with tied embeddings of the sizes below.
        tokenizer: The teacher's tokenizer; gives ``vocab_size`` and the special tokens of a new student.
        vocab_size: V of a new student; wins over ``len(tokenizer)`` (a teacher's head may be padded).
        hidden_size: D of a new student.
        num_layers: Decoder layers of a new student.
        num_heads: Attention heads of a new student; divides ``hidden_size``.
        intermediate_size: Width of the feed-forward layers, by default ``3 * hidden_size``.
        max_length: Longest sequence of a new student, in tokens.
        seed: Of the random initialisation. The global generator is left as it was.
        dtype: Of the parameters.

    Returns:
        A causal language model in training mode, on the CPU.

    Raises:
        ValueError: A new student without ``vocab_size`` and ``tokenizer``, or sizes that do not fit.
    """
    if isinstance(config_or_path, str):
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


def drop_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A student of some of a teacher's layers: layer i of it is layer round(i (L - 1) / (num_layers - 1)) of L.

    First and last layer, embeddings, norms and head are the teacher's; with ``num_layers=1`` the first layer stays.
    Initialising a student so is that of DistilBERT (arXiv 1910.01108).

    Args:
        model: The teacher, whose decoder holds its layers in one ``torch.nn.ModuleList``; left as it is.
        num_layers: From 1 to L.

    Returns:
        A new model of the teacher's class and dtype, in training mode, on the CPU; it shares no memory with the
        teacher.

    Raises:
        ValueError: ``num_layers`` out of range, or a decoder without such a list.
    """
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    if not 1 <= num_layers <= total:
        raise ValueError(f"num_layers must be from 1 to {total}, the teacher's layers, got {num_layers}")
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if len(lists) != 1:
        raise ValueError(
            f"the layers of {type(model).__name__} must be one torch.nn.ModuleList of length {total}, got {len(lists)}"
        )
    kept = [round(i * (total - 1) / max(num_layers - 1, 1)) for i in range(num_layers)]
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    for name, value in text.to_dict().items():
        # What a configuration says of each layer, such as the kinds of its attention.
        if isinstance(value, list) and len(value) == total:
            setattr(text, name, [value[layer] for layer in kept])
    text.num_hidden_layers = num_layers
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


class LowRankAdapter(NamedTuple):
    """What a LoRA adapter of rank r adds to the logits: scaling * (down(dropout(hidden)) @ up.T).

    Attributes:
        dropout: (N, D) to (N, D), the identity in evaluation mode.
        down: (N, D) to (N, r).
        up: (V, r).
        scaling: lora_alpha / r, or as configured.
    """

    dropout: nn.Module
    down: nn.Module
    up: Tensor
    scaling: float


@dataclasses.dataclass(frozen=True)
class LanguageModelHead:
    """What turns hidden states into logits: softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap).

    LoRA adapters (arXiv 2106.09685) are columns of the same product: hidden @ weight.T + scaling * (down @ up.T) is
    [hidden, scaling * down] @ [weight, up].T, so that they are trained without the logits, too.

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        softcap: None: no cap.
        logit_scale: 1.0: no scale.
        adapters: Active LoRA adapters of the head.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    adapters: tuple[LowRankAdapter, ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> LanguageModelHead:
        """Reads a causal language model's head and what its configuration does to the logits.

        Raises:
            ValueError: The model's output embeddings are not one ``torch.nn.Linear`` of floating-point weights, with
                PEFT's LoRA adapters or as PEFT's modules to save; or its configuration names no positive scale.
        """
        linear, adapters = _adapted_linear(model.get_output_embeddings(), type(model).__name__)
        return cls(weight=linear.weight, bias=linear.bias, adapters=adapters, **_logits_options(model.config))

    @property
    def vocab_size(self) -> int:
        """V, the rows of the weight, also of one that DeepSpeed ZeRO-3 has partitioned."""
        return getattr(self.weight, "ds_shape", self.weight.shape)[0]

    def first_rows(self, vocab_size: int) -> LanguageModelHead:
        """The head of the first ``vocab_size`` tokens."""
        return dataclasses.replace(
            self,
            weight=self.weight[:vocab_size],
            bias=None if self.bias is None else self.bias[:vocab_size],
            adapters=tuple(adapter._replace(up=adapter.up[:vocab_size]) for adapter in self.adapters),
        )

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        """``hidden`` (N, D) and the head as arguments of ``linear_slim_loss``, all in the dtype of ``hidden``."""
        hidden, weight = self._product(hidden)
        return {
            "hidden": hidden,
            "weight": weight,
            "bias": None if self.bias is None else self.bias.to(hidden.dtype),
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }

    def logits(self, hidden: Tensor) -> Tensor:
        """The dense logits (..., V) of a few rows, to compare with the model's own."""
        hidden, weight = self._product(hidden)
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        # Of a head whose vocabulary is sharded, these are DTensors.
        tensors: tuple[Any, ...] = (hidden, weight, bias)
        hidden, weight, bias = (t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors)
        logits = self.logit_scale * nn.functional.linear(hidden, weight, bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _product(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        dtype = hidden.dtype
        inputs, weights = [hidden], [self.weight.to(dtype)]
        for adapter in self.adapters:
            low = adapter.down(adapter.dropout(hidden.to(adapter.up.dtype)))
            inputs.append((adapter.scaling * low).to(dtype))
            weights.append(adapter.up.to(dtype))
        return (hidden, weights[0]) if len(inputs) == 1 else (torch.cat(inputs, -1), torch.cat(weights, -1))


def _adapted_linear(module: Any, model_name: str) -> tuple[nn.Linear, tuple[LowRankAdapter, ...]]:
    """The linear layer that a head is, and the adapters that PEFT has put around it."""
    is_off = getattr(module, "disable_adapters", False)
    if hasattr(module, "modules_to_save"):
        active = module.active_adapters
        module = module.original_module if is_off or not active else module.modules_to_save[active[0]]
    adapters = []
    if hasattr(module, "lora_A") and isinstance(getattr(module, "base_layer", None), nn.Linear):
        names = [] if is_off or module.merged else [name for name in module.active_adapters if name in module.lora_A]
        for name in names:
            if name in module.lora_variant or module.lora_bias[name]:
                raise ValueError(
                    f"the LoRA adapter {name!r} on the head of {model_name} must be a plain one (no DoRA or other "
                    "variant, lora_bias=False), or it would not be trained: change its LoraConfig, or leave the head "
                    "out of target_modules"
                )
            adapters.append(
                LowRankAdapter(
                    module.lora_dropout[name], module.lora_A[name], module.lora_B[name].weight, module.scaling[name]
                )
            )
        module = module.base_layer
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise ValueError(
            f"the output embeddings of {model_name} must be one torch.nn.Linear of floating-point weights, by itself, "
            f"with LoRA adapters or in modules_to_save, got {type(module).__name__}: merge other adapters first, and "
            "do not quantise the head"
        )
    return module, tuple(adapters)


def _logits_options(config: PreTrainedConfig) -> dict[str, Any]:
    """The softcap and the scale of the logits, under the names that the model families give them."""
    config = config.get_text_config(decoder=True)
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale *= float(getattr(config, name, None) or 1.0)
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    scale = scale * scaling if config.model_type == "hyperclovax" else scale / scaling
    if not scale > 0:
        raise ValueError(f"the configuration of a {config.model_type} model must scale its logits by > 0, got {scale}")
    return {"softcap": getattr(config, "final_logit_softcapping", None) or None, "logit_scale": scale}


def hidden_states(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """The decoder's last hidden state (N, D) of a collated batch's labelled rows; no logits are computed."""
    output = model.get_decoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return output.last_hidden_state.flatten(0, 1).index_select(0, batch["rows"])


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Runs two tokens through the model and checks that ``LanguageModelHead`` reproduces its logits.

    Raises:
        ValueError: The model does something else to its logits, or its decoder does not end in the head's input.
    """
    head, was_training = LanguageModelHead.of(model), model.training
    ids = torch.tensor([[0, head.vocab_size - 1]], device=head.weight.device)
    model.eval()
    try:
        expected = model(input_ids=ids, use_cache=False).logits.float()
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        model.train(was_training)
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 5e-2
    error = (head.logits(hidden.to(head.weight.dtype)).float() - expected).abs().max()
    if not error <= tolerance * expected.abs().max().clamp(min=1.0):
        raise ValueError(
            f"the logits of {type(model).__name__} are not softcap(logit_scale * (hidden @ weight.T + bias)) of its "
            f"decoder's last hidden state (they differ by {float(error):.3g}); train it with your own loop and "
            "slimkernels.slim_loss on its logits"
        )


@dataclasses.dataclass(frozen=True)
class SlimCollator:
    """Makes one right-padded batch of store documents.

    Attributes:
        pad_token_id: Fills ``input_ids`` behind each document; never a label, never attended to.
        vocab_size: V of the student; ids are checked against it. None: not checked.
        max_length: Longest document the student can read. None: not checked.
        with_teacher: False leaves the teacher out of the batch, as supervised training needs none.
    """

    pad_token_id: int = 0
    vocab_size: int | None = None
    max_length: int | None = None
    with_teacher: bool = True

    def __call__(self, documents: Sequence[Document | PackedDocument]) -> dict[str, Any]:
        """``slimkernels.store.collate_documents``, checked against what the student can read.

        Raises:
            ValueError: A document longer than ``max_length``, a position outside [1, T), or an id outside
                [0, ``vocab_size``).
        """
        length = max((len(document.input_ids) for document in documents), default=0)
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"documents must have at most max_length={self.max_length} tokens for this student, got one of "
                f"{length}; capture shorter documents or give the student more positions"
            )
        batch = collate_documents(documents, pad_token_id=self.pad_token_id, with_teacher=self.with_teacher)
        self._check_ids("input_ids", batch["input_ids"].amax())
        if isinstance(batch["teacher"], PackedLogits):
            # Every row of a store was checked against its vocabulary when it was read.
            self._check_ids("teacher.ids", batch["teacher"].vocab_size - 1)
        elif batch["teacher"] is not None:
            self._check_ids("teacher.ids", batch["teacher"].ids.amax() if batch["teacher"].ids.numel() else 0)
        return batch

    def _check_ids(self, name: str, largest: Tensor | int) -> None:
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise ValueError(
                f"{name} must be below the student's vocabulary size {self.vocab_size}, got {int(largest)}; use "
                "the teacher's tokenizer and a student with as many tokens as the teacher"
            )


def teacher_rows(teacher: SparseLogits | PackedLogits) -> SparseLogits:
    """The teacher of a batch, decoded where it is if it is packed."""
    return decode_logits(teacher) if isinstance(teacher, PackedLogits) else teacher


def check_tokenizer(dataset: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Compares a student's tokenizer with the one that a store was captured with, where both are known.

    Raises:
        ValueError: They differ.
    """
    stored = getattr(dataset, "tokenizer_fingerprint", None)
    if not stored or tokenizer is None:
        return
    from slimkernels.teacher_checks import tokenizer_fingerprint

    own = tokenizer_fingerprint(tokenizer)
    if own != stored:
        raise ValueError(
            f"the student's tokenizer must be the one the store was captured with, fingerprint {stored}, got {own}; "
            "load the teacher's tokenizer, or capture again with this one"
        )
