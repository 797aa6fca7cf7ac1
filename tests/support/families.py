"""Tiny random models of the causal LM families, with each family's operation on its logits enabled."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 61

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}

# Name: (configuration class, its options in addition to the sizes).
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "gpt2": ("GPT2Config", {"tie_word_embeddings": True, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt-j": ("GPTJConfig", {"rotary_dim": 4, "n_positions": 64}),  # its head has a bias
    "phi": ("PhiConfig", {}),  # its head has a bias
    "mistral": ("MistralConfig", {}),
    "mixtral": ("MixtralConfig", _EXPERTS),
    "olmo2": ("Olmo2Config", {}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0}),
    "opt": ("OPTConfig", {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "bloom": ("BloomConfig", {}),
}


def make_family(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Makes a model in training mode, without dropout, whose probabilities differ."""
    config, options = FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config)(**_SIZES | options)
    for option in ("attn_pdrop", "attention_dropout", "hidden_dropout"):
        if getattr(config, option, None):
            setattr(config, option, 0.0)
    model = AutoModelForCausalLM.from_config(config).train()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(20)
        if head.bias is not None:
            head.bias.normal_()
    return model.to(dtype)
