"""A language model's head: what turns its last hidden states into logits, read from the model and checked."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


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
