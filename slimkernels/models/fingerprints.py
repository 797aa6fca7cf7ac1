"""Fingerprints of tokenizers and weights: is this the model that it was?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the sorted vocabulary and the ids of the special tokens that occur in text, as 64 hex digits.

    Two tokenizers share it if and only if every token id means the same. The padding token is left out: it never
    occurs in a document, and training code sets it freely.
    """
    content = {
        "vocab": sorted(tokenizer.get_vocab().items()),
        "special": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk")},
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Returns SHA-256 over the names, shapes, dtypes and samples of all parameters, as 16 hex digits.

    Reads about 1024 evenly spaced elements of each parameter, which takes milliseconds. Another training run or another
    quantisation changes it; a change to a handful of weights may not.
    """
    digest = hashlib.sha256()
    for name, parameter, sample in _sampled_parameters(model, 1024):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample)
    return digest.hexdigest()[:16]


def trace_fingerprint(model: PreTrainedModel) -> str:
    """Returns the hash of the weights that a search's trace records, as 16 hex digits.

    BLAKE2b over names, shapes and about 1000 elements of each parameter. It is not ``weights_fingerprint`` because a
    search must still resume from older traces, which hold this hash. A trace records the dtype separately.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter, sample in _sampled_parameters(model, 1000):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sample)
    return digest.hexdigest()


def _sampled_parameters(model: PreTrainedModel, num_samples: int) -> Iterator[tuple[str, Tensor, bytes]]:
    """Yields the name, the parameter and its evenly spaced elements as float32 bytes, sorted by name."""
    for name, parameter in sorted(model.named_parameters()):
        flat = whole_tensor(parameter.detach()).flatten()
        sample = flat[:: max(1, flat.numel() // num_samples)]
        yield name, parameter, sample.float().cpu().numpy().tobytes()


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is split over processes, all of which must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
