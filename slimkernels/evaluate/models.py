"""Models to evaluate: what identifies one, and an engine and a prompt format for it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkernels.evaluate.records import content_key

if TYPE_CHECKING:
    from slimkernels.search import Engine

# What of a model's folder decides what it writes; checkpoints hold the state of their training beside it.
_MODEL_FILES = (
    *("*.safetensors", "pytorch_model*.bin", "*.gguf", "config.json", "generation_config.json"),
    *("token*", "vocab*", "merges*", "*.model", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that can answer.

    Attributes:
        engine: For the search.
        render: A task's prompt -> what the model reads: the prompt, or a chat with it.
        encode: That -> its token ids.
    """

    engine: Engine
    render: Callable[[str], str]
    encode: Callable[[str], list[int]]


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
    """A model by name; it is loaded when the first answer is needed.

    Attributes:
        label: What it is called in the report, unique there.
        identity: Changes with its weights, its tokenizer, and its precision.
        load: Loads it.
    """

    label: str
    identity: str
    load: Callable[[], LoadedModel]


def find_models(names: list[str], *, dtype: str = "float32", prompt_style: str = "auto") -> list[EvaluatedModel]:
    """Models by the names that ``load_teacher`` takes: a folder, a .gguf file, a shipped one's name, a hub's name.

    Args:
        names: Of the models.
        dtype: Of the weights.
        prompt_style: "chat" asks in the model's chat template, "plain" lets it continue a text, "auto" chats with
            models that have a template.

    Raises:
        ValueError: The same model twice, or a server, which has no engine here.
        FileNotFoundError: There is no such model.
    """
    labels = _labels(names)
    found = []
    for name, label in zip(names, labels, strict=True):
        if name.startswith(("http://", "https://")):
            raise ValueError(f"models must be folders, .gguf files or names, got the server {name}")
        identity = content_key(_fingerprint(name), dtype, prompt_style)
        found.append(EvaluatedModel(label, identity, _loader(name, dtype, prompt_style)))
    return found


def _labels(names: list[str]) -> list[str]:
    """The last parts of the names; where two are equal, the names."""
    if len(set(names)) < len(names):
        raise ValueError(f"models must be different ones, got {', '.join(names)}")
    short = [Path(name).expanduser().resolve().name if Path(name).expanduser().exists() else name for name in names]
    return [label if short.count(label) == 1 else name for label, name in zip(short, names, strict=True)]


def _fingerprint(name: str) -> str:
    """Of a local model's files; of a hub's model, its name and commit."""
    from slimkernels.teacher_model import model_origin

    origin = model_origin(name)
    if isinstance(origin, str):
        return origin
    if origin.is_file():
        return _hash(origin)
    files = {file for pattern in _MODEL_FILES for file in origin.glob(pattern) if file.is_file()}
    return content_key([[file.name, _hash(file)] for file in sorted(files)])


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.blake2b(digest_size=12)
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _loader(name: str, dtype: str, prompt_style: str) -> Callable[[], LoadedModel]:
    def load() -> LoadedModel:
        import torch

        from slimkernels.search import TransformersEngine
        from slimkernels.teacher_model import load_teacher

        model, tokenizer = load_teacher(name, dtype=getattr(torch, dtype))
        chats = _chats(tokenizer, prompt_style, name)
        return LoadedModel(
            TransformersEngine(model, tokenizer), _renderer(tokenizer, chats), _encoder(tokenizer, chats)
        )

    return load


def _chats(tokenizer: Any, prompt_style: str, name: str) -> bool:
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if prompt_style == "chat" and not has_template:
        raise ValueError(f"--prompt-style chat needs a chat template, but the tokenizer of {name} has none: use plain")
    return has_template and prompt_style != "plain"


def _renderer(tokenizer: Any, chats: bool) -> Callable[[str], str]:
    def render(prompt: str) -> str:
        if not chats:
            return prompt
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    return render


def _encoder(tokenizer: Any, chats: bool) -> Callable[[str], list[int]]:
    # A chat template writes the first token of a text itself.
    return lambda text: tokenizer(text, add_special_tokens=not chats)["input_ids"]
