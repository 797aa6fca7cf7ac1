"""Conversion of GGUF files to model folders, which are cached because they load faster.

A 135M-parameter model loads in half a second from its folder and in a quarter of a minute from its GGUF file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from slimkernels.models.sanity import check_teacher_sanity

# Part of every cached folder's name. Raise it when the conversion changes.
_CONVERSION_VERSION = 1
_HASHED_BYTES = 1 << 20
_NUM_TOKENS = "tokenizer.ggml.tokens"
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def default_cache_dir() -> Path:
    """Returns ``$SLIMKERNELS_CACHE``, or ``~/.cache/slimkernels`` where it is not set."""
    return Path(os.environ.get("SLIMKERNELS_CACHE") or Path.home() / ".cache" / "slimkernels")


def converted_folder(path: Path, cache_dir: Path) -> Path:
    """Returns the folder of a GGUF file's conversion, named by a hash of its size and its first and last MiB."""
    digest = hashlib.sha256(f"{_CONVERSION_VERSION} {path.stat().st_size}".encode())
    with open(path, "rb") as file:
        digest.update(file.read(_HASHED_BYTES))
        file.seek(max(0, path.stat().st_size - _HASHED_BYTES))
        digest.update(file.read())
    return cache_dir / f"{path.stem}-{digest.hexdigest()[:16]}"


def convert_gguf(path: Path, cache_dir: Path, *, sanity_check: bool = True) -> Path:
    """Dequantises a GGUF file to a float32 model folder, unless the folder exists.

    The folder gets its name only when it is complete and its model has passed ``check_teacher_sanity``.

    Args:
        path: The GGUF file.
        cache_dir: Parent of the folder; created where it does not exist.
        sanity_check: False for a teacher that was not trained on English.

    Returns:
        The model folder.

    Raises:
        ImportError: The gguf or the accelerate package is not installed.
        ValueError: The file is damaged, or its architecture is not one that transformers converts.
        TeacherSanityError: The converted model does not read English.
    """
    folder = converted_folder(path, cache_dir)
    if folder.is_dir():
        return folder
    metadata = _read_metadata(path)
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache_dir))
    try:
        _convert(path, metadata, temporary)
        if sanity_check:
            model = AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32)
            check_teacher_sanity(model, AutoTokenizer.from_pretrained(temporary))
        try:
            temporary.rename(folder)
        except OSError:
            # Another process has made the same folder in the meantime.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        import accelerate  # noqa: F401 -- transformers needs it to load a GGUF file
        import gguf
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package {error.name}: pip install 'slimkernels[train]'") from error
    try:
        fields = gguf.GGUFReader(path).fields
        names = ["tokenizer.ggml.add_bos_token", *(_token_field(name) for name in _SPECIAL_TOKENS.values())]
        metadata = {name: fields[name].contents() for name in names if name in fields}
        return metadata | {_NUM_TOKENS: len(fields[_NUM_TOKENS].data)}
    # numpy and the reader raise these on damaged bytes.
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} must be a GGUF file, but cannot be read as one ({error}); download it again"
        ) from error


def _token_field(name: str) -> str:
    return f"tokenizer.ggml.{name}_token_id"


def _convert(path: Path, metadata: dict[str, Any], folder: Path) -> None:
    # From 5.23 on, transformers keeps the packed weights, which it cannot save, unless asked to dequantise them.
    packed = hasattr(transformers, "GgufConfig")
    options: dict[str, Any] = {"quantization_config": transformers.GgufConfig(dequantize=True)} if packed else {}
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **options)
    tokenizer = _plain_tokenizer(AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), metadata)
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    # Some releases write a class that others do not know, or that splits words differently in them.
    content = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(content, indent=2))


def _plain_tokenizer(tokenizer, metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Rebuilds a tokenizer with the special tokens of the file, because transformers may guess other ones."""
    tokens = {
        name: tokenizer.convert_ids_to_tokens(int(metadata[_token_field(field)]))
        for name, field in _SPECIAL_TOKENS.items()
        if _token_field(field) in metadata
    }
    if "eos_token" in tokens:
        tokens.setdefault("pad_token", tokens["eos_token"])
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Drop tokens that transformers added to those of the file: the model has no embeddings for them.
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < metadata[_NUM_TOKENS]]
    backend = Tokenizer.from_str(json.dumps(content))
    adds_special_tokens = len(backend.encode("a").ids) > len(backend.encode("a", add_special_tokens=False).ids)
    if adds_special_tokens and not metadata.get("tokenizer.ggml.add_bos_token", True):
        # An empty sequence of processors adds no tokens.
        backend.post_processor = processors.Sequence([])
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **tokens)
    plain.chat_template = tokenizer.chat_template
    return plain
