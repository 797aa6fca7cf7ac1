"""``import_distillkit``: the compressed teacher data of arcee-ai's DistillKit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slimkernels.exchange.distillkit_codec import Compression
from slimkernels.exchange.records import flat_list, ragged_list, read_batches
from slimkernels.exchange.writing import Document, ImportReport, Meaning, document, write_store

_COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
_CONFIG_NAME = "compression_config.yaml"
# The capture tool samples at temperature 1 and asks vLLM for raw log-probabilities.
_MEANING = Meaning(temperature=1.0, whole_row=True)


def import_distillkit(
    source: str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    compression_config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    pad_token_id: int | None = None,
    vocab_size: int | None = None,
    teacher: str = "",
    codec: str = "affine8",
    check_alignment: bool = True,
) -> ImportReport:
    """Streams what DistillKit's ``sample_logits_vllm`` writes into a store.

    A record has ``input_ids`` (T,), and for every token but the first a row of bytes: ``compressed_logprobs`` and
    ``bytepacked_indices``. Row j is about token j + 1. A row more than that (packed data sets have T) is about a token
    that is not there, and left out.

    The values are log-probabilities of vLLM at temperature 1, normalised over the vocabulary, so the tail mass is known
    and rest "ghost", "zero" and "renorm" are all right. But those behind the first ``exact_k`` are a polynomial's, so
    that the mass of a row is as good as the fit; where the values sum to more than 1, lse is that of the kept ids. The
    tool appends one padding token to a short text, to have the teacher's word on what follows its last token: that row
    has the padding as its label, and ``pad_token_id`` leaves it out. Sequences that were packed from several texts have
    rows across the borders, which the files do not show.

    Args:
        source: A .parquet file, or a folder of them.
        store_path: A new directory, or a store made with the same settings; documents that are in it are skipped.
        tokenizer: The teacher's, from transformers.
        compression_config: The capture's, as a mapping or a file of YAML or JSON (a training configuration's
            ``logprob_compressor`` is found too). By default compression_config.yaml beside the source.
        pad_token_id: Rows with this label are left out.
        vocab_size: V of the teacher; by default ``len(tokenizer)``.
        teacher: Its name, kept in the store.
        codec: "affine8", "affine6", "bfloat16" or "float32".
        check_alignment: False imports rows whatever tokens they seem to be about.

    Returns:
        ImportReport. The store's ``target_logit`` is the label's where it is kept, -inf elsewhere.

    Raises:
        FileNotFoundError, ImportError: There is no such source or configuration, or no package to read it with.
        ValueError: The configuration is of another kind or does not fit the rows, a column is missing, a row cannot be
            stored, or the rows turn out to be about other tokens. The message says which file and record.

    References: arcee-ai's DistillKit (Apache-2.0), https://github.com/arcee-ai/DistillKit: distillkit/sample_common.py
    (columns) and sample_logits_vllm.py (what is sampled, and what row j is about); the bytes: ``distillkit_codec``.
    """
    compression = _compression(compression_config, source)

    def documents() -> Iterator[Document]:
        for where, record in read_batches(source, _COLUMNS):
            input_ids = flat_list(record["input_ids"], f"{where}: input_ids").astype(np.int64)
            values = _rows(record, "compressed_logprobs", compression.value_bytes, len(input_ids), where)
            ids = _rows(record, "bytepacked_indices", compression.index_bytes, len(input_ids), where)
            if len(values) != len(ids):
                raise ValueError(f"{where}: compressed_logprobs has {len(values)} rows, bytepacked_indices {len(ids)}")
            positions = 1 + np.arange(min(len(values), len(input_ids) - 1))
            if pad_token_id is not None:
                positions = positions[input_ids[positions] != pad_token_id]
            decoded = compression.values(values[positions - 1])
            # -inf fills rows of fewer than k entries.
            valid = decoded != -np.inf
            yield document(where, _MEANING, input_ids, positions, compression.ids(ids[positions - 1]), decoded, valid)

    return write_store(
        documents(),
        store_path,
        format_name="distillkit",
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        teacher=teacher,
        meaning=_MEANING,
        codec=codec,
        check_alignment=check_alignment,
    )


def _rows(record: dict[str, Any], name: str, width: int, length: int, where: str) -> np.ndarray:
    """A column of bytes as (R, width) uint8."""
    data, widths = ragged_list(record[name], f"{where}: {name}")
    if len(widths) not in (length - 1, length):
        raise ValueError(
            f"{where}: {name} must have a row for every one of {length} tokens but the first, got {len(widths)}"
        )
    if (widths != width).any():
        raise ValueError(
            f"{where}: {name} must have {width} bytes a row, as the compression configuration says, got "
            f"{widths[widths != width][0]}: give the configuration that the capture was made with"
        )
    return data.astype(np.uint8).reshape(-1, width)


def _compression(config: Mapping[str, Any] | str | os.PathLike[str] | None, source: Any) -> Compression:
    if isinstance(config, Mapping):
        return Compression.of(dict(config), "compression_config")
    if config is None:
        folder = Path(source)
        path = (folder if folder.is_dir() else folder.parent) / _CONFIG_NAME
    else:
        path = Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"compression configuration not found: there is no file {path}; give the capture's")
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "the compression configuration is read by the package pyyaml, which is not installed: "
            "pip install 'slimkernels[exchange]'"
        ) from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a mapping of settings, got {type(content).__name__}")
    # A training configuration has it under its teacher.
    return Compression.of(content.get("teacher", content), str(path))
