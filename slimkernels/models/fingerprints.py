"""Fingerprints of tokenizers and weights: is this the model that it was?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAMPLES_PER_PARAMETER = 1024


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
    """Computes SHA-256 over the names, shapes, dtypes and evenly spaced elements of all parameters.

    It reads about a thousand elements of each parameter, which takes milliseconds. That tells apart training runs and
    quantisations, but may miss a change to a handful of weights.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter, sample in sampled_parameters(model, _SAMPLES_PER_PARAMETER):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample)
    return digest.hexdigest()[:16]


def sampled_parameters(model: PreTrainedModel, num_samples: int) -> Iterator[tuple[str, Tensor, bytes]]:
    """Yields the name, the parameter and evenly spaced elements of it, for all parameters of a model by name.

    Args:
        model: Any module. The processes that share a sharded one must all iterate.
        num_samples: Least number of elements of a parameter; fewer only where it has fewer, never twice as many.

    Yields:
        The name, the parameter, and the elements as the bytes of float32 numbers.
    """
    for name, parameter in sorted(model.named_parameters()):
        flat = whole_tensor(parameter.detach()).flatten()
        sample = flat[:: max(1, flat.numel() // num_samples)]
        yield name, parameter, sample.float().cpu().numpy().tobytes()


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is split over processes, all of which must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
