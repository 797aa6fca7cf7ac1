"""A tiny teacher, student, tokenizer and store for the tests of the trainer, the metrics and the demo."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import slimkernels as sk
from slimkernels.models.make_student import make_student
from slimkernels.store import StoreWriter
from slimkernels.teacher import tokenizer_fingerprint

VOCAB_SIZE = 97
TOP_K = 11


def make_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Makes a tokenizer of whole words, "w2" and so on, with "<end>" as end of text and padding."""
    return word_level((f"w{index}" for index in range(2, vocab_size)), pre_tokenizers.Whitespace())


def word_level(words: Iterable[str], pre_tokenizer: Any, decoder: Any = None) -> PreTrainedTokenizerFast:
    """Makes a tokenizer of given words, whose ids begin at 2, with "<end>" as end of text and padding."""
    vocab = {"<end>": 0, "<unk>": 1} | {word: index for index, word in enumerate(words, 2)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<end>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def make_model(seed: int = 0, **sizes) -> PreTrainedModel:
    """Makes a Llama of a few thousand parameters whose head is scaled up so that probabilities differ."""
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_length": 64} | sizes
    model = make_student(seed=seed, **sizes)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return model


def make_store(
    path: Path, *, num_documents: int = 8, seed: int = 0, temperatures=(1.0,), codec: str = "float32"
) -> str:
    """Writes a store of documents of 5 to 20 random tokens, with a tiny teacher's logits for their later halves."""
    teacher = make_model(seed=1234).eval()
    generator = torch.Generator().manual_seed(seed)
    writer = StoreWriter(
        path,
        vocab_size=VOCAB_SIZE,
        tokenizer_fingerprint=tokenizer_fingerprint(make_tokenizer()),
        teacher={"name": "tiny"},
        selection={"kind": "top_k", "value": TOP_K, "top_k": TOP_K},
        temperatures=temperatures,
        codec=codec,
    )
    with writer:
        for _ in range(num_documents):
            length = int(torch.randint(5, 21, (), generator=generator))
            tokens = torch.randint(2, VOCAB_SIZE, (length,), generator=generator)
            positions = torch.arange(length // 2, length)
            with torch.no_grad():
                logits = teacher(tokens[None]).logits[0, positions - 1]
            kept = sk.topk_logits(logits, top_k=TOP_K, target=tokens[positions], temperatures=temperatures)
            writer.add(tokens, positions, kept)
    return str(path)
