"""``import_distillkit``: imports the compressed teacher data of arcee-ai's DistillKit."""

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
    """Streams the output of DistillKit's ``sample_logits_vllm`` into a store.

    A record has ``input_ids`` (T,), and for every token but the first a row of bytes: ``compressed_logprobs`` and
    ``bytepacked_indices``. Row j is about token j + 1. Packed data sets have T rows, the last of which is about a token
    beyond the end and is left out.

    The values are log-probabilities of vLLM at temperature 1, normalised over the vocabulary, so the tail mass is known
    and rest "ghost", "zero" and "renorm" all apply. But only the first ``exact_k`` are exact. The others come from a
    polynomial, whose fit limits the accuracy of a row's mass; if the values sum to more than 1, lse is that of the kept
    ids. The tool appends one padding token to a short text to get the teacher's distribution after its last token. The
    label of that row is the padding, and ``pad_token_id`` leaves it out. Sequences that were packed from several texts
    have rows across the borders between the texts, which the files do not record.

    Args:
        source: A .parquet file, or a folder of them.
        store_path: New directory, or a store made with the same settings, whose documents are skipped.
        tokenizer: The teacher's tokenizer, from transformers.
        compression_config: Configuration of the capture, as a mapping or a file of YAML or JSON (the
            ``logprob_compressor`` of a training configuration is found too). The default is compression_config.yaml in
            the folder of the source.
        pad_token_id: Label of rows to leave out.
        vocab_size: V of the teacher; ``len(tokenizer)`` by default.
        teacher: Name of the teacher, kept in the store.
        codec: Codec of the store: "affine8", "affine6", "bfloat16" or "float32".
        check_alignment: Whether to refuse rows that seem to be about other tokens.

    Returns:
        ImportReport. The store's ``target_logit`` is that of the label if it is kept, otherwise -inf.

    Raises:
        FileNotFoundError: There is no such source or configuration.
        ImportError: pyarrow or pyyaml is not installed.
        ValueError: The configuration is of another kind or does not match the rows, a column is missing, a row cannot
            be stored, or the rows are about other tokens. The message names the file and the record.

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
            # Rows of fewer than k entries are padded with -inf, which ``document`` takes for a placeholder.
            valid = np.ones(decoded.shape, bool)
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
    """Returns a column of bytes as (R, width) uint8."""
    data, widths = ragged_list(record[name], f"{where}: {name}")
    if len(widths) not in (length - 1, length):
        raise ValueError(
            f"{where}: {name} must have a row for each of {length} tokens but the first, got {len(widths)}"
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
        raise FileNotFoundError(
            f"compression configuration not found: there is no file {path}; give the one of the capture"
        )
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
    # A training configuration has the compression under "teacher".
    return Compression.of(content.get("teacher", content), str(path))
