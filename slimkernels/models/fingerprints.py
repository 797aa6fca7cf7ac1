"""Fingerprints of tokenizers and weights, which tell whether a model is the one that was used before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slimkernels.models.sharding import full_tensor
from slimkernels.store.identity import is_same_tokenizer

if TYPE_CHECKING:
    # Packages that do not need transformers import this module.
    from transformers import PreTrainedTokenizerBase

_SAMPLES_PER_PARAMETER = 1024


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Computes SHA-256 over the sorted vocabulary and the ids of the special tokens that occur in text.

    Which token pads does not count: it never occurs in a document, and training code sets it freely. Where it is the
    last of the vocabulary, as one that was added is, the other ids mean what they meant without it. The fingerprint
    then holds a second hash, of the tokenizer without that token. ``slimkernels.store.identity.is_same_tokenizer``
    compares fingerprints.

    Returns:
        64 hexadecimal digits, or twice as many with a space between.
    """
    vocab, pad = tokenizer.get_vocab(), tokenizer.pad_token
    forms = [vocab]
    others = {getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk")}
    if pad in vocab and pad not in others and vocab[pad] == max(vocab.values()):
        forms.append({token: number for token, number in vocab.items() if token != pad})
    return " ".join(_hash_of_vocabulary(tokenizer, form) for form in forms)


def _hash_of_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab: dict[str, int]) -> str:
    content = {
        "vocab": sorted(vocab.items()),
        "special": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk")},
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check_tokenizer(dataset: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Checks that a student's tokenizer is the one that a store was captured with, where both are known.

    Args:
        dataset: A ``Store`` or ``StoreDataset``. Other data sets have no fingerprint and pass.
        tokenizer: The student's tokenizer. None passes.

    Raises:
        ValueError: The tokenizers differ.
    """
    stored = getattr(dataset, "tokenizer_fingerprint", None)
    if not stored or tokenizer is None:
        return
    own = tokenizer_fingerprint(tokenizer)
    if not is_same_tokenizer(stored, own):
        raise ValueError(
            f"the student's tokenizer must be the one the store was captured with, fingerprint {stored}, got {own}; "
            "load the teacher's tokenizer, or capture again with this one"
        )


def check_same_ids(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Checks that the tokens which two vocabularies share have the same ids, padding aside.

    Either may have tokens that the other lacks, as a tokenizer that was trained for chats has.

    Raises:
        ValueError: A token has two ids.
    """
    ids, of_student = teacher.get_vocab(), student.get_vocab()
    padding = (teacher.pad_token, student.pad_token)
    common = [token for token in ids if token in of_student and token not in padding]
    differ = sorted(token for token in common if ids[token] != of_student[token])
    if differ:
        token = differ[0]
        raise ValueError(
            f"the teacher must give the student's tokens the same ids, as logits are compared by id, got other ids "
            f"for {len(differ)} of {len(common)} tokens that both have, such as {token!r}, {ids[token]} of the teacher "
            f"and {of_student[token]} of the student: choose a teacher with the student's tokenizer, or capture its "
            "logits and turn them into a store of this tokenizer, by `slimkernels store translate`"
        )


def weights_fingerprint(model: nn.Module, *, only_frozen: bool = False) -> str:
    """Computes SHA-256 over the names, shapes, dtypes and evenly spaced elements of all parameters.

    It reads about a thousand elements of each parameter, which takes milliseconds. That tells apart training runs and
    quantisations, but may miss a change to a handful of weights.

    Args:
        model: The model. The processes that share a sharded one must all call this.
        only_frozen: True to leave out the parameters that are trained, such as adapters.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter, sample in _sampled_parameters(model, _SAMPLES_PER_PARAMETER):
        if only_frozen and parameter.requires_grad:
            continue
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample)
    return digest.hexdigest()[:16]


def trace_weights_fingerprint(model: nn.Module) -> str:
    """Returns a hash of the names, shapes and about 1000 elements of every parameter, as 16 hexadecimal digits.

    Traces of searches hold this hash, and existing ones must still resume. It never equals ``weights_fingerprint``,
    which stores hold: both its inputs and its hash function differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter, sample in _sampled_parameters(model, 1000):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(sample)
    return digest.hexdigest()


def _sampled_parameters(model: nn.Module, num_samples: int) -> Iterator[tuple[str, Tensor, bytes]]:
    """Yields the name, the parameter and evenly spaced elements of it, for all parameters of a model by name.

    Args:
        model: Any module. The processes that share a sharded one must all iterate.
        num_samples: Least number of elements of a parameter; fewer only where it has fewer, never twice as many.

    Yields:
        The name, the parameter, and the elements as the bytes of float32 numbers.
    """
    for name, parameter in sorted(model.named_parameters()):
        flat = full_tensor(parameter.detach()).flatten()
        sample = flat[:: max(1, flat.numel() // num_samples)]
        yield name, parameter, sample.float().cpu().numpy().tobytes()
