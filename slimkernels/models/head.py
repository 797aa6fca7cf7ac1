"""The head of a causal language model, which turns hidden states into logits: found, read and checked."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimkernels.models.evaluation import evaluation_mode
from slimkernels.models.sharding import full_tensor
from slimkernels.packed_logits import HeadWeights

# Description of the first result of ``decoded``, for ``check_logits``.
DECODED = "its decoder's last hidden state"


def base_model(model: nn.Module) -> PreTrainedModel:
    """Returns the transformers model inside PEFT's wrapper, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, model if inner is None else inner())


def output_embeddings(model: PreTrainedModel) -> nn.Module:
    """Returns the module that computes a causal language model's logits.

    Raises:
        ValueError: The model has none.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} must be a causal language model with output embeddings, got none")
    return head


class LowRankAdapter(NamedTuple):
    """A LoRA adapter of rank r on the head, which adds scaling * (down(dropout(hidden)) @ up.T) to the logits.

    Attributes:
        dropout: Module from (N, D) to (N, D), the identity in evaluation mode.
        down: Module from (N, D) to (N, r).
        up: Weight (V, r).
        scaling: Factor, lora_alpha / r unless PEFT is configured otherwise.
    """

    dropout: nn.Module
    down: nn.Module
    up: Tensor
    scaling: float


@dataclasses.dataclass(frozen=True)
class LanguageModelHead:
    """A head whose logits are softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap).

    LoRA adapters (arXiv 2106.09685) become columns of the same product, hidden @ weight.T + scaling * (down @ up.T) =
    [hidden, scaling * down] @ [weight, up].T, and are trained without the logits as well.

    Attributes:
        weight: Weight (V, D).
        bias: Bias (V,), or None.
        softcap: Cap of the logits' magnitude; None for no cap.
        logit_scale: Factor of the logits; 1.0 for no scaling.
        adapters: Active LoRA adapters on the head.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    adapters: tuple[LowRankAdapter, ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> LanguageModelHead:
        """Reads a causal language model's head, and the softcap and scale that its configuration names.

        Raises:
            ValueError: The output embeddings are not one ``torch.nn.Linear`` of floating-point weights, possibly with
                LoRA adapters or in PEFT's ``modules_to_save``; or the configured scale is not positive.
        """
        linear, adapters = _adapted_linear(model.get_output_embeddings(), type(model).__name__)
        return cls(weight=linear.weight, bias=linear.bias, adapters=adapters, **_logits_options(model.config))

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V, also where DeepSpeed ZeRO-3 has partitioned the weight."""
        return getattr(self.weight, "ds_shape", self.weight.shape)[0]

    def first_rows(self, vocab_size: int) -> LanguageModelHead:
        """Returns the head of the first ``vocab_size`` tokens."""
        return dataclasses.replace(
            self,
            weight=self.weight[:vocab_size],
            bias=None if self.bias is None else self.bias[:vocab_size],
            adapters=tuple(adapter._replace(up=adapter.up[:vocab_size]) for adapter in self.adapters),
        )

    def gathered(self) -> LanguageModelHead:
        """Returns the head with its full weight and bias, which all processes that share them must ask for together."""
        bias = None if self.bias is None else full_tensor(self.bias)
        return dataclasses.replace(self, weight=full_tensor(self.weight), bias=bias)

    def weights(self) -> HeadWeights:
        """Returns the head as a store of hidden states keeps it.

        Raises:
            ValueError: There are adapters on the head.
        """
        if self.adapters:
            raise ValueError(
                "a store of hidden states keeps a head without adapters, got LoRA adapters on the head: merge them "
                "(model.merge_and_unload()) or choose another codec"
            )
        return HeadWeights(self.weight.detach(), self.bias, self.softcap, self.logit_scale)

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        """Returns ``hidden`` (N, D) and the head as arguments of ``linear_slim_loss``, in the dtype of ``hidden``."""
        hidden, weight = self._product(hidden)
        return {
            "hidden": hidden,
            "weight": weight,
            "bias": None if self.bias is None else self.bias.to(hidden.dtype),
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }

    def logits(self, hidden: Tensor) -> Tensor:
        """Computes the dense logits (..., V) of a few hidden states (..., D)."""
        hidden, weight = self._product(hidden)
        bias = None if self.bias is None else full_tensor(self.bias.to(hidden.dtype))
        logits = self.logit_scale * nn.functional.linear(full_tensor(hidden), full_tensor(weight), bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _product(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the two factors whose product is the logits before bias and scale, adapters included."""
        dtype = hidden.dtype
        inputs, weights = [hidden], [self.weight.to(dtype)]
        for adapter in self.adapters:
            low = adapter.down(adapter.dropout(hidden.to(adapter.up.dtype)))
            inputs.append((adapter.scaling * low).to(dtype))
            weights.append(adapter.up.to(dtype))
        return (hidden, weights[0]) if len(inputs) == 1 else (torch.cat(inputs, -1), torch.cat(weights, -1))


def _adapted_linear(module: Any, model_name: str) -> tuple[nn.Linear, tuple[LowRankAdapter, ...]]:
    """Returns the linear layer inside a head and the active adapters that PEFT has put around it."""
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
                    "variant, lora_bias=False), or it would not be trained: change its LoraConfig, or take the head "
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
            f"the output embeddings of {model_name} must be one torch.nn.Linear of floating-point weights, alone, "
            f"with LoRA adapters or in modules_to_save, got {type(module).__name__}: merge other adapters first, and "
            "do not quantise the head"
        )
    return module, tuple(adapters)


def _logits_options(config: PreTrainedConfig) -> dict[str, Any]:
    """Reads the softcap and the scale of the logits, which every model family names in its own way."""
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
        ValueError: The model does something else to its logits, or its decoder's output is not the head's input.
    """
    head = LanguageModelHead.of(model)
    ids = torch.tensor([[0, head.vocab_size - 1]], device=head.weight.device)
    hidden, logits = decoded(model, ids)
    advice = "; train it with your own loop and slimkernels.slim_loss on its logits"
    check_logits(model, head, hidden.to(head.weight.dtype), logits, hidden_name=DECODED, advice=advice)


def decoded(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the decoder's last hidden state (B, T, D) and the model's logits (B, T, V) in evaluation mode."""
    with evaluation_mode(model):
        logits = model(input_ids=ids, use_cache=False).logits
        return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state, logits


def check_logits(
    model: nn.Module, head: LanguageModelHead, hidden: Tensor, logits: Tensor, *, hidden_name: str, advice: str = ""
) -> None:
    """Checks that a head computes a model's logits from hidden states, up to the rounding of the weight's dtype.

    Args:
        model: Model that the head was read from, named in the error.
        head: The head.
        hidden: Hidden states (..., D).
        logits: Logits (..., V) that the model computed; NaN fails.
        hidden_name: Description of ``hidden`` in the error.
        advice: End of the error message, which says what to do.

    Raises:
        ValueError: The logits differ.
    """
    expected = logits.float()
    error = float((head.logits(hidden).float() - expected).abs().max())
    tolerance = relative_tolerance(head.weight.dtype) * max(1.0, float(expected.abs().max()))
    # NaN compares false and so fails.
    if not error <= tolerance:
        raise ValueError(
            f"the logits of {type(model).__name__} are not softcap(logit_scale * (hidden @ weight.T + bias)) of "
            f"{hidden_name} (they differ by {error:.3g}){advice}"
        )


def relative_tolerance(dtype: torch.dtype) -> float:
    """Returns the error, relative to the value or to 1 if that is larger, up to which two computations agree."""
    return 1e-4 if dtype == torch.float32 else 5e-2
