"""``export_parquet`` and ``import_parquet``: convert between a store and columns for any parquet reader."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from slimkernels.durable import replaced_atomically
from slimkernels.exchange.records import flat_list, ragged_list, read_batches, require_pyarrow, source_files
from slimkernels.exchange.writing import Document, ImportReport, write_documents
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import Store
from slimkernels.store.format import StoreSettings
from slimkernels.store.identity import is_same_tokenizer
from slimkernels.store.prompts import prompts_name

_METADATA_KEY = b"slimkernels"
_PROMPT_LENGTH = "prompt_length"
_REST_LSE = "rest_lse"
_COLUMNS = ("input_ids", "positions", "ids", "logits", "lse", "target_logit")
_GROUP_BYTES = 64 << 20


def export_parquet(store: Store | str | os.PathLike[str], path: str | os.PathLike[str]) -> int:
    """Writes a store as one parquet file that ``datasets.load_dataset("parquet", data_files=path)`` reads.

    One record per document, in the store's order; T tokens, R rows, K_r kept ids in row r, M temperatures:

    ================  ============================  ============================================================
    column            type                          content
    ================  ============================  ============================================================
    ``input_ids``     list<int32>           (T,)    token ids
    ``positions``     list<int32>           (R,)    row r predicts ``input_ids[positions[r]]``, ascending
    ``ids``           list<list<int32>>     (R, K)  kept vocabulary ids, ascending
    ``logits``        list<list<float32>>   (R, K)  the teacher's logits at them, decoded
    ``lse``           list<list<float32>>   (R, M)  log-sum-exp of the whole row at each temperature
    ``target_logit``  list<float32>         (R,)    the label's logit; NaN: not known; -inf: probability 0
    ``prompt_length``  int32                        tokens of the prompt, 0: not known; only if the store knows one
    ``rest_lse``      list<list<float32>>   (R, M)  log-sum-exp of the ids that are not kept at each temperature; -inf:
                                                    there are none; NaN: not known; only if the store has it
    ================  ============================  ============================================================

    So q = exp(logits - lse[:, 0]) are the teacher's probabilities. The file's key-value metadata has, under
    "slimkernels", the settings in the store's manifest (vocabulary, tokenizer, teacher, selection, temperatures, codec)
    as JSON. Documents are streamed.

    Args:
        store: A store, or its directory.
        path: Path of the file, which ends in .parquet; an existing file is replaced, but only when everything is
            written.

    Returns:
        The number of documents.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: ``path`` does not end in .parquet.
        StoreError: The store is damaged.
    """
    if Path(path).suffix != ".parquet":
        raise ValueError(
            f"path must end in .parquet, by which data sets recognise such a file, got {os.fspath(path)!r}"
        )
    pyarrow = require_pyarrow()
    store = store if isinstance(store, Store) else Store(store)
    lists = {np.dtype(np.int32): pyarrow.list_(pyarrow.int32()), np.dtype(np.float32): pyarrow.list_(pyarrow.float32())}
    ints, floats = lists.values()
    types = (ints, ints, pyarrow.list_(ints), pyarrow.list_(floats), pyarrow.list_(floats), floats)
    settings = store.settings
    if settings.hidden is not None:
        # The file holds the rows that are made of the hidden states.
        settings = dataclasses.replace(settings, codec="float32", hidden=None)
    metadata = {_METADATA_KEY: json.dumps(settings.content())}
    fields: list[tuple[str, Any]] = list(zip(_COLUMNS, types, strict=True))
    if any((store.path / prompts_name(entry.file)).exists() for entry in store.shards):
        fields.append((_PROMPT_LENGTH, pyarrow.int32()))
    if store.has_rest_lse:
        fields.append((_REST_LSE, pyarrow.list_(floats)))
    schema = pyarrow.schema(fields, metadata=metadata)
    with (
        replaced_atomically(path) as temporary,
        pyarrow.parquet.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for group in _groups(store):
            columns = [_column(pyarrow, [record[name] for record in group]) for name in schema.names]
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
    return len(store)


def import_parquet(
    source: str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    vocab_size: int | None = None,
    temperatures: Sequence[float] | None = None,
    teacher: str | None = None,
    codec: str | None = None,
) -> ImportReport:
    """Streams the columns of ``export_parquet`` into a store; the round trip is exact up to the codec.

    The values have the same meaning as in a store: raw logits with the exact lse of the whole row at each temperature,
    or log-probabilities with lse 0. With codec "float32" and "bfloat16" a store, its file and the store of the file
    hold the same numbers bit for bit; "affine8" quantises the logits once more, to within a step. Files of another
    origin, or rewritten by ``datasets``, which drops the metadata, can be read if a tokenizer is given.

    Args:
        source: A .parquet or .arrow file, or a folder of them with the same settings.
        store_path: New directory, or a store made with the same settings, whose documents are skipped.
        tokenizer: Tokenizer to check against that of the file; needed if the file does not name one.
        vocab_size: V; by default that of the file, or ``len(tokenizer)``.
        temperatures: Temperatures of the columns of ``lse``; by default those of the file, or (1.0,).
        teacher: Name of the teacher; by default that of the file.
        codec: "affine8", "affine6", "bfloat16" or "float32"; by default that of the file.

    Returns:
        ImportReport.

    Raises:
        FileNotFoundError: There is no such source.
        ImportError: pyarrow is not installed.
        ValueError: A column is missing, a row cannot be stored, the tokenizer is another one, or neither the file nor
            the arguments name it.
    """
    require_pyarrow()
    settings = _settings(source, tokenizer)
    given = {"vocab_size": vocab_size, "temperatures": temperatures, "codec": codec}
    settings |= {name: value for name, value in given.items() if value is not None}
    if teacher is not None:
        settings["teacher"] = {"name": teacher}

    def documents() -> Iterator[Document]:
        for where, record in read_batches(source, _COLUMNS, (_PROMPT_LENGTH, _REST_LSE)):
            yield _document(where, record, tuple(settings["temperatures"]))

    return write_documents(documents(), store_path, settings)


def _groups(store: Store) -> Iterator[list[dict[str, Any]]]:
    """Yields the records of consecutive documents in groups of about ``_GROUP_BYTES``."""
    group, size = [], 0
    for index in range(len(store)):
        document = store[index]
        teacher = document.teacher
        kept = (teacher.ids >= 0).numpy()
        widths = kept.sum(-1)
        record = {
            "input_ids": document.input_ids.to(torch.int32).numpy(),
            "positions": document.positions.to(torch.int32).numpy(),
            "ids": (teacher.ids.numpy()[kept], widths),
            "logits": (teacher.logits.numpy()[kept], widths),
            "lse": (teacher.lse.numpy().reshape(-1), np.full(len(teacher), teacher.lse.shape[1])),
            "target_logit": cast(torch.Tensor, teacher.target_logit).numpy(),
            _PROMPT_LENGTH: document.prompt_length,
        }
        if teacher.rest_lse is not None:
            record[_REST_LSE] = (teacher.rest_lse.numpy().reshape(-1), np.full(len(teacher), teacher.lse.shape[1]))
        group.append(record)
        size += 8 * int(widths.sum()) + 4 * len(document.input_ids)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _column(pyarrow: Any, values: list[Any]) -> Any:
    """Makes a column of numbers, of lists from an array per document, or of nested lists from (array, row widths)."""
    if isinstance(values[0], int):
        return pyarrow.array(values, pyarrow.int32())
    if not isinstance(values[0], tuple):
        return pyarrow.ListArray.from_arrays(_offsets([len(array) for array in values]), np.concatenate(values))
    rows = pyarrow.ListArray.from_arrays(
        _offsets(np.concatenate([widths for _, widths in values])), np.concatenate([array for array, _ in values])
    )
    return pyarrow.ListArray.from_arrays(_offsets([len(widths) for _, widths in values]), rows)


def _offsets(lengths: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _document(where: str, record: dict[str, Any], temperatures: tuple[float, ...]) -> Document:
    input_ids, positions, target_logit = (
        flat_list(record[name], f"{where}: {name}") for name in ("input_ids", "positions", "target_logit")
    )
    num_rows = len(positions)
    ids, widths = ragged_list(record["ids"], f"{where}: ids")
    logits, logit_widths = ragged_list(record["logits"], f"{where}: logits")
    lse, lse_widths = ragged_list(record["lse"], f"{where}: lse")
    per_temperature = {"lse": (lse, lse_widths)}
    # A file without the column, and a null where files with and without it were joined.
    if _REST_LSE in record and record[_REST_LSE].is_valid:
        per_temperature[_REST_LSE] = ragged_list(record[_REST_LSE], f"{where}: {_REST_LSE}")
    for name, got in (
        ("ids", len(widths)),
        ("logits", len(logit_widths)),
        *((name, len(number_widths)) for name, (_, number_widths) in per_temperature.items()),
        ("target_logit", len(target_logit)),
    ):
        if got != num_rows:
            raise ValueError(f"{where}: {name} must have length {num_rows}, got {got}")
    for name, (_, number_widths) in per_temperature.items():
        if wrong := set(number_widths.tolist()) - {len(temperatures)}:
            raise ValueError(
                f"{where}: a row of {name} must have a number for each of temperatures={temperatures}, "
                f"got {wrong.pop()}"
            )
    if not np.array_equal(widths, logit_widths):
        raise ValueError(f"{where}: ids and logits must have the same length in every row")
    kept = np.arange(widths.max(initial=1)) < widths[:, None]
    padded_ids = np.full(kept.shape, -1, np.int32)
    padded_logits = np.zeros(kept.shape, np.float32)
    padded_ids[kept], padded_logits[kept] = ids, logits
    numbers = {
        name: torch.from_numpy(flat.reshape(num_rows, len(temperatures)).astype(np.float32))
        for name, (flat, _) in per_temperature.items()
    }
    teacher = SparseLogits(
        ids=torch.from_numpy(padded_ids),
        logits=torch.from_numpy(padded_logits),
        temperatures=temperatures,
        target_logit=torch.from_numpy(target_logit.astype(np.float32)),
        **numbers,
    )
    prompt_length = record[_PROMPT_LENGTH].as_py() if _PROMPT_LENGTH in record else 0
    return Document(where, input_ids.astype(np.int64), positions.astype(np.int64), teacher, prompt_length or 0)


def _settings(source: Any, tokenizer: Any) -> dict[str, Any]:
    """Returns the settings for ``StoreWriter``, from the file's metadata and the tokenizer."""
    settings = _stored_settings(source)
    if tokenizer is not None:
        from slimkernels.models.fingerprints import tokenizer_fingerprint

        own = tokenizer_fingerprint(tokenizer)
        stored = settings.get("tokenizer_fingerprint") or own
        if not is_same_tokenizer(stored, own):
            raise ValueError(f"the tokenizer must be the file's, fingerprint {stored}, got {own}: load the teacher's")
        settings |= {"tokenizer_fingerprint": stored, "vocab_size": settings.get("vocab_size", len(tokenizer))}
    if "tokenizer_fingerprint" not in settings:
        raise ValueError(
            f"{source} does not say which tokenizer its ids belong to, as files of export_parquet do: give a tokenizer"
        )
    defaults = {
        "teacher": {"name": ""},
        "selection": {"kind": "imported", "format": "parquet"},
        "temperatures": (1.0,),
        "codec": "affine8",
    }
    return defaults | settings


def _stored_settings(source: Any) -> dict[str, Any]:
    """Returns the settings in the metadata of the first file, or {} if it has none."""
    pyarrow = require_pyarrow()
    path = source_files(source, (".parquet", ".arrow"))[0]
    try:
        if path.suffix == ".parquet":
            metadata = pyarrow.parquet.read_schema(path).metadata or {}
        else:
            metadata = pyarrow.ipc.open_stream(path).schema.metadata or {}
        if _METADATA_KEY not in metadata:
            return {}
        return StoreSettings(**json.loads(metadata[_METADATA_KEY])).content()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
