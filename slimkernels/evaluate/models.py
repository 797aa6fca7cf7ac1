"""Models to evaluate: each has an identity, an engine for the search and a prompt format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkernels.evaluate.records import content_hash, content_key
from slimkernels.evaluate.served import PLAIN, Server, find_server, is_server

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimkernels.search import Engine

# These files of a model's folder decide its outputs. Others do not, such as the training state in checkpoints.
_MODEL_FILES = (
    *("*.safetensors", "*model*.bin", "*.gguf", "config.json", "adapter_config.json", "generation_config.json", "*.py"),
    *("token*", "vocab*", "merges*", "*.model", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that runs in this process.

    Attributes:
        model: Model in evaluation mode.
        tokenizer: Tokenizer of the model.
        chats: Whether prompts use the tokenizer's chat template.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chats: bool

    @cached_property
    def engine(self) -> Engine:
        """The engine for the search.

        Raises:
            ValueError: The search does not support this kind of model.
        """
        from slimkernels.search import TransformersEngine

        return TransformersEngine(self.model, self.tokenizer)

    def render(self, prompt: str) -> str:
        """Returns the text that the model reads: the prompt, in the chat template if the model has one."""
        return _chat(self.tokenizer, prompt) if self.chats else to_continue(prompt)

    def encode(self, text: str) -> list[int]:
        """Tokenizes the result of ``render``, without special tokens for a chat, whose template writes them."""
        return self.tokenizer(text, add_special_tokens=not self.chats)["input_ids"]


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model behind a server.

    Attributes:
        engine: Engine for the search.
        tokenizer: Tokenizer whose chat template prompts use; None sends plain text to continue.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase | None = None

    def render(self, prompt: str) -> str:
        """Returns the text that the model reads: the prompt, in the chat template if there is a tokenizer."""
        return to_continue(prompt) if self.tokenizer is None else _chat(self.tokenizer, prompt)

    def encode(self, text: str) -> str | list[int]:
        """Tokenizes a chat, and returns plain text as it is, so that the server adds the special tokens."""
        return text if self.tokenizer is None else self.tokenizer(text, add_special_tokens=False)["input_ids"]


def to_continue(prompt: str) -> str:
    """Returns a prompt that a model continues on a line of its own, unless it ends as in "A:"."""
    return prompt if prompt.endswith((" ", "\n", ":")) else f"{prompt}\n"


def _chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Any:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate, which is loaded when the first answer is needed.

    Attributes:
        label: Name in the report, unique there.
        identity: Hash of the weights, the tokenizer, the precision and the prompt style. For a server's model, hash of
            its URL, its name, the facts that the server states about it, and the chat template.
        load: Function that loads it as a ``LoadedModel``, or as a ``ServedModel`` if it is a server's.
        served: Facts about a server's model, for the report; None for a model that runs in this process.
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
    """Finds models by name, local or behind servers; servers are asked whether they have the model.

    Args:
        names: A folder, a .gguf file, the name of a shipped model, a name on the hub, or a server's URL#MODEL (the URL
            alone if the server lists one model) for each model. NAME=MODEL labels a model NAME in the report.
        dtype: Data type of the weights of models that run in this process.
        prompt_style: "chat" uses the model's chat template, "plain" lets the model continue a text, and "auto" uses the
            chat template of models that have one.
        tokenizers: Models whose chat templates are used for servers' models: MODEL for all of them, NAME=MODEL for the
            one labelled NAME. Servers' models without a tokenizer continue a text.
        **client: Options of ``ServerClient``, such as ``key_env`` and ``max_retries``.

    Raises:
        ValueError: A model occurs twice, a server does not have a model, or a tokenizer fits no model.
        FileNotFoundError: A model does not exist.
        ServerUnavailableError, ServerRequestError, ImportError: ``find_server`` raises them.
    """
    if tokenizers and prompt_style == "plain":
        raise ValueError("--tokenizer has no effect with --prompt-style plain: give only one of them")
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
        # The first hash alone, as in the records of earlier runs.
        template = [tokenizer_fingerprint(tokenizer).split()[0], tokenizer.chat_template]
    elif prompt_style == "chat":
        raise ValueError(f"--prompt-style chat needs --tokenizer MODEL for {label}: servers do not give a template")
    model = ServedModel(server.engine, tokenizer)
    try:
        # Not every server takes token ids. Fail before the other models have spent hours on their answers.
        server.engine.check(model.encode(model.render("Hi")))
    except ValueError as error:
        raise ValueError(f"{label} cannot be asked in {style}: {error}") from error
    known = {"url": server.url, "model": server.model, "said": server.said, "style": style}
    identity = content_key("server", server.url, server.model, server.said, template)
    return EvaluatedModel(label, identity, lambda: model, known | {"notes": server.engine.notes})


def are_servers(names: Sequence[str]) -> list[bool]:
    """Returns which models, named as for ``find_models``, are those of servers."""
    return [is_server(name) for _, name in map(_split, names)]


def _split(name: str) -> tuple[str | None, str]:
    """Splits NAME=MODEL into label and model; the label of a bare MODEL is None."""
    label, equals, rest = name.partition("=")
    if equals and label and "/" not in label and not Path(name).expanduser().exists():
        return label, rest
    return None, name


def _parts(name: str) -> tuple[str, ...]:
    """Splits a path into its parts; a name that is not a path is its own single part."""
    path = Path(name).expanduser()
    return path.resolve().parts if path.exists() else (name,)


def _labels(given: Sequence[str | None], parts: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns the given labels; a model without one is labelled by as many of its last parts as make it unique."""
    labels = [label or part[-1] for label, part in zip(given, parts, strict=True)]
    for depth in range(2, 1 + max(map(len, parts))):
        labels = [
            label if own or labels.count(label) == 1 else "/".join(part[-depth:])
            for label, own, part in zip(labels, given, parts, strict=True)
        ]
    if len(set(labels)) < len(labels):
        raise ValueError(f"models must be different and have different names, got {', '.join(labels)}")
    return labels


def _templates(tokenizers: Sequence[str], served: Sequence[str]) -> dict[str, str]:
    """Returns the name of the tokenizer for every server's model that has one, by the model's label."""
    templates: dict[str, str] = {}
    for label, name in map(_split, tokenizers):
        if not served or (label is not None and label not in served):
            those = ", ".join(served) or "none"
            raise ValueError(
                f"--tokenizer must be for a server's model (here: {those}), since local models have their own, got "
                f"{name if label is None else label}"
            )
        templates |= dict.fromkeys(served if label is None else [label], name)
    return templates


def _fingerprint(name: str) -> str:
    """Returns a hash of a local model's files, or the name and commit of a model on the hub."""
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
        return content_hash(iter(lambda: file.read(1 << 22), b""))


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
