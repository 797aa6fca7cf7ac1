"""Tokenizers of three kinds for the tests of translations: two that packages ship, and one trained here."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from pathlib import Path

import pytest
from support import nli, teachers
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from slimkernels.models.load import load_tokenizer
from slimkernels.models.sanity import SANITY_TEXT

# The character by which SentencePiece writes a space.
SPACE = "\u2581"


@functools.cache
def smollm2() -> PreTrainedTokenizerBase:
    """Loads SmolLM2's byte-level tokenizer of 49,152 tokens, without its model."""
    teachers.smollm2_gguf()
    return load_tokenizer("smollm2-135m-instruct")


@functools.cache
def minilm() -> PreTrainedTokenizerBase:
    """Loads MiniLM's WordPiece tokenizer of 30,522 tokens, which reads lower case, with [SEP] as end of text."""
    try:
        files = importlib.metadata.distribution(nli.ENCODER).files or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {nli.ENCODER} is not installed")
    folder = next(Path(str(file.locate())).parent for file in files if file.name == "tokenizer.json")
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token = "[SEP]"
    return tokenizer


@functools.cache
def sentencepiece() -> PreTrainedTokenizerBase:
    """Trains a tokenizer of 400 tokens in the form of Llama's: spaces as part of tokens, bytes for what has none."""
    special = ["<unk>", "<s>", "</s>"]
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special + every_byte, show_progress=False)
    # Cut at spaces, so that no token holds several words.
    trained.train_from_iterator([f"{SPACE}{word}" for word in SANITY_TEXT.split()], trainer)
    content = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in content["merges"]]
    tokenizer = Tokenizer(models.BPE(content["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
