"""Models to evaluate: what identifies one, and an engine and a prompt format for it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkernels.evaluate.records import content_key
from slimkernels.evaluate.served import PLAIN, Server, find_server, is_server

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimkernels.search import Engine

# What of a model's folder decides what it writes; checkpoints hold the state of their training beside it.
_MODEL_FILES = (
    *("*.safetensors", "*model*.bin", "*.gguf", "config.json", "adapter_config.json", "generation_config.json", "*.py"),
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
        return _chat(self.tokenizer, prompt) if self.chats else prompt

    def encode(self, text: str) -> list[int]:
        """The token ids of what ``render`` gives; a chat template writes the first token of a text itself."""
        return self.tokenizer(text, add_special_tokens=not self.chats)["input_ids"]


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model behind a server that can answer.

    Attributes:
        engine: For the search.
        tokenizer: Whose chat template it is asked in; None: it continues a text.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase | None = None

    def render(self, prompt: str) -> str:
        """What the model reads: a task's prompt, or a chat with it."""
        return prompt if self.tokenizer is None else _chat(self.tokenizer, prompt)

    def encode(self, text: str) -> str | list[int]:
        """The token ids of a chat; a text stays one, for the server to take as a text's beginning."""
        return text if self.tokenizer is None else self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Any:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
    """A model by name; it is loaded when the first answer is needed.

    Attributes:
        label: What it is called in the report, unique there.
        identity: Changes with its weights, its tokenizer, and its precision; of a server's model, with its URL, its
            name, what the server says of it, and how it is asked.
        load: Loads it: a ``LoadedModel``, or a server's ``ServedModel``.
        served: What is known of a server's model, for the report; None: it runs here.
    """

    label: str
    identity: str
    load: Callable[[], Any]
    served: Mapping[str, Any] | None = None


def find_models(
    names: Sequence[str],
    *,
    dtype: str = "float32",
    prompt_style: str = "auto",
    tokenizers: Sequence[str] = (),
    **client: Any,
) -> list[EvaluatedModel]:
    """Models by the names that ``load_teacher`` takes, and those of servers, which are asked whether they have them.

    Args:
        names: Of the models: a folder, a .gguf file, a shipped one's name, a hub's name, or a server's URL#MODEL (URL
            alone where it lists one model). NAME=MODEL calls one NAME in the report.
        dtype: Of the weights of models that run here.
        prompt_style: "chat" asks in the model's chat template, "plain" lets it continue a text, "auto" chats with
            models that have a template.
        tokenizers: Whose chat templates servers' models are asked in: MODEL for all of them, NAME=MODEL for the one
            called NAME. Those without one continue a text.
        **client: Of the servers' ``ServerClient``: ``key_env``, ``max_retries``, ...

    Raises:
        ValueError: The same model twice, one that a server has not, or a tokenizer that is of no use.
        FileNotFoundError: There is no such model.
        ServerUnavailableError, ServerRequestError, ImportError: As ``find_server``.
    """
    if tokenizers and prompt_style == "plain":
        raise ValueError("--tokenizer has no meaning with --prompt-style plain: leave one of them out")
    given = [_split(name) for name in names]
    servers = [find_server(name, **client) if is_server(name) else None for _, name in given]
    parts = [_parts(name) if found is None else found.parts for (_, name), found in zip(given, servers, strict=True)]
    labels = _labels([label for label, _ in given], parts)
    templates = _templates(tokenizers, [label for label, found in zip(labels, servers, strict=True) if found])
    models = []
    for label, (_, name), found in zip(labels, given, servers, strict=True):
        if found is not None:
            models.append(_of_server(label, found, prompt_style, templates.get(label)))
            continue
        identity = content_key(_fingerprint(name), dtype, prompt_style)
        models.append(EvaluatedModel(label, identity, _loader(name, dtype, prompt_style)))
    return models


def _of_server(label: str, server: Server, prompt_style: str, tokenizer_name: str | None) -> EvaluatedModel:
    tokenizer, style, template = None, PLAIN, []
    if tokenizer_name is not None:
        from slimkernels.models.fingerprints import tokenizer_fingerprint
        from slimkernels.models.load import load_tokenizer

        tokenizer = load_tokenizer(tokenizer_name)
        if not tokenizer.chat_template:
            raise ValueError(f"--tokenizer must have a chat template to ask {label} in, but {tokenizer_name} has none")
        style = f"the chat template of {_parts(tokenizer_name)[-1]}"
        template = [tokenizer_fingerprint(tokenizer), tokenizer.chat_template]
    elif prompt_style == "chat":
        raise ValueError(f"--prompt-style chat needs --tokenizer MODEL for {label}: its server gives no template")
    model = ServedModel(server.engine, tokenizer)
    try:
        # Found out now, not after the models before it: not every server takes token ids.
        server.engine.check(model.encode(model.render("Hi")))
    except ValueError as error:
        raise ValueError(f"{label} cannot be asked in {style}: {error}") from error
    known = {"url": server.url, "model": server.model, "said": server.said, "style": style}
    identity = content_key("server", server.url, server.model, server.said, template)
    return EvaluatedModel(label, identity, lambda: model, known | {"notes": server.engine.notes})


def _split(name: str) -> tuple[str | None, str]:
    """The label of NAME=MODEL, or None, and the model."""
    label, equals, rest = name.partition("=")
    if equals and label and "/" not in label and not Path(name).expanduser().exists():
        return label, rest
    return None, name


def _parts(name: str) -> tuple[str, ...]:
    """Of a folder's path; a name has one."""
    path = Path(name).expanduser()
    return path.resolve().parts if path.exists() else (name,)


def _labels(given: Sequence[str | None], parts: Sequence[tuple[str, ...]]) -> list[str]:
    """The labels given, or as much of the end of a model's parts as tells it from the others."""
    labels = [label or part[-1] for label, part in zip(given, parts, strict=True)]
    for depth in range(2, 1 + max(map(len, parts))):
        labels = [
            label if own or labels.count(label) == 1 else "/".join(part[-depth:])
            for label, own, part in zip(labels, given, parts, strict=True)
        ]
    if len(set(labels)) < len(labels):
        raise ValueError(f"models must be different ones with names of their own, got {', '.join(labels)}")
    return labels


def _templates(tokenizers: Sequence[str], served: Sequence[str]) -> dict[str, str]:
    """By the label of a server's model, the tokenizer whose chat template it is asked in."""
    templates: dict[str, str] = {}
    for label, name in map(_split, tokenizers):
        if not served or (label is not None and label not in served):
            those = ", ".join(served) or "none"
            raise ValueError(
                f"--tokenizer must be for a server's model (here: {those}), as one that runs here has its own, got "
                f"{name if label is None else label}"
            )
        templates |= dict.fromkeys(served if label is None else [label], name)
    return templates


def _fingerprint(name: str) -> str:
    """Of a local model's files; of a hub's model, its name and commit."""
    from slimkernels.models.load import model_origin

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

        from slimkernels.models.load import load_teacher

        model, tokenizer = load_teacher(name, dtype=getattr(torch, dtype))
        return LoadedModel(model, tokenizer, _chats(tokenizer, prompt_style, name))

    return load


def _chats(tokenizer: Any, prompt_style: str, name: str) -> bool:
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if prompt_style == "chat" and not has_template:
        raise ValueError(f"--prompt-style chat needs a chat template, but the tokenizer of {name} has none: use plain")
    return has_template and prompt_style != "plain"
