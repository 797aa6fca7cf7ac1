"""The documents and the command of a training from a server, as it is recorded and replayed."""

from __future__ import annotations

from pathlib import Path

import torch
from support import served, teachers

import slimkernels as sk
from slimkernels.models.fingerprints import tokenizer_fingerprint
from slimkernels.store import StoreWriter

TOP_LOGPROBS = served.OPTIONS["top_logprobs"]


def make_documents(path: Path) -> Path:
    """Makes a store of ``served.TEXTS`` with random rows, which a training from a server never reads."""
    tokenizer = teachers.smollm2()[1]
    vocab_size = len(tokenizer.get_vocab())
    generator = torch.Generator().manual_seed(0)
    writer = StoreWriter(
        path,
        vocab_size=vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        teacher={"name": "none"},
        selection={"kind": "top_k", "value": 2, "top_k": 2},
    )
    with writer:
        for text in served.TEXTS:
            ids = tokenizer(text)["input_ids"]
            logits = torch.randn(len(ids) - 1, vocab_size, generator=generator)
            writer.add(ids, range(1, len(ids)), sk.topk_logits(logits, top_k=2))
    return path


def command(url: str, store: Path, out: Path, *options: str) -> list[str]:
    """Returns the arguments of ``slimkernels`` that train on the rows of a server."""
    return [
        *f"train --store {store} --out {out} --teacher-server {url} --teacher-name {served.MODEL}".split(),
        *f"--top-logprobs {TOP_LOGPROBS} --max-retries 0".split(),
        *recipe(),
        *options,
    ]


def recipe() -> list[str]:
    """Returns the options that do not depend on where the rows come from."""
    options = "--method reverse_kl --tokenizer smollm2-135m-instruct --epochs 2 --batch-size 1 --learning-rate 5e-3"
    return [*options.split(), "--option", "use_cpu=true"]
