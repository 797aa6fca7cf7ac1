"""Models to evaluate: what identifies one, and an engine and a prompt format for it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkernels.evaluate.records import content_key

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        model: In evaluation mode.
        tokenizer: Its own.
        chats: Whether it is asked in its chat template.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chats: bool

    @cached_property
    def engine(self) -> Engine:
        """For the search.

        Raises:
            ValueError: The search does not know this kind of model.
        """
        from slimkernels.search import TransformersEngine

        return TransformersEngine(self.model, self.tokenizer)

    def render(self, prompt: str) -> str:
        """What the model reads: a task's prompt, or a chat with it."""
        if not self.chats:
            return prompt
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def encode(self, text: str) -> list[int]:
        """The token ids of what ``render`` gives; a chat template writes the first token of a text itself."""
        return self.tokenizer(text, add_special_tokens=not self.chats)["input_ids"]


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
        names: Of the models; NAME=MODEL calls one NAME in the report.
        dtype: Of the weights.
        prompt_style: "chat" asks in the model's chat template, "plain" lets it continue a text, "auto" chats with
            models that have a template.

    Raises:
        ValueError: The same model twice, or a server, which has no engine here.
        FileNotFoundError: There is no such model.
    """
    found = []
    for label, name in _labelled(names):
        if name.startswith(("http://", "https://")):
            raise ValueError(f"models must be folders, .gguf files or names, got the server {name}")
        identity = content_key(_fingerprint(name), dtype, prompt_style)
        found.append(EvaluatedModel(label, identity, _loader(name, dtype, prompt_style)))
    return found


def _labelled(names: list[str]) -> list[tuple[str, str]]:
    """Labels and names: the label given, or as much of the end of a folder's path as tells it from the others."""
    given: list[str | None] = []
    paths: list[str] = []
    for name in names:
        label, equals, rest = name.partition("=")
        is_labelled = bool(equals and label and "/" not in label and not Path(name).expanduser().exists())
        given.append(label if is_labelled else None)
        paths.append(rest if is_labelled else name)
    parts = [Path(path).expanduser().resolve().parts if Path(path).expanduser().exists() else (path,) for path in paths]
    labels = [label or part[-1] for label, part in zip(given, parts, strict=True)]
    for depth in range(2, 1 + max(map(len, parts))):
        labels = [
            label if own or labels.count(label) == 1 else "/".join(part[-depth:])
            for label, own, part in zip(labels, given, parts, strict=True)
        ]
    if len(set(labels)) < len(labels):
        raise ValueError(f"models must be different ones with names of their own, got {', '.join(names)}")
    return list(zip(labels, paths, strict=True))


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

        from slimkernels.teacher_model import load_teacher

        model, tokenizer = load_teacher(name, dtype=getattr(torch, dtype))
        return LoadedModel(model, tokenizer, _chats(tokenizer, prompt_style, name))

    return load


def _chats(tokenizer: Any, prompt_style: str, name: str) -> bool:
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if prompt_style == "chat" and not has_template:
        raise ValueError(f"--prompt-style chat needs a chat template, but the tokenizer of {name} has none: use plain")
    return has_template and prompt_style != "plain"
