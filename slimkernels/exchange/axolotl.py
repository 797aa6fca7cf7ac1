"""``import_axolotl``: imports the log-probability columns of axolotl's knowledge distillation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from slimkernels import _checks
from slimkernels.exchange.records import read_records, require_columns
from slimkernels.exchange.writing import Document, ImportReport, Meaning, document, padded, write_store

_PREPARED = ("target_logprobs", "target_token_ids", "target_mask")
ALIGNMENTS = ("next", "same")


def import_axolotl(
    source: str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    logprobs_field: str | None = None,
    messages_field: str = "messages",
    temperature: float = 1.0,
    alignment: str = "next",
    vocab_size: int | None = None,
    teacher: str = "",
    codec: str = "affine8",
    check_alignment: bool = True,
) -> ImportReport:
    """Streams axolotl's offline teacher data into a store.

    **Raw columns** (with ``logprobs_field``) are the input of axolotl: for each of the last L tokens of a conversation
    the list of a vLLM server's entries, ``{"token": "token_id:123", "logprob": -0.5}``, or, for newer releases, a list
    of log-probabilities with the ids in ``target_token_ids``. Row r is the distribution OVER token T - L + r. The
    values are the server's log-probabilities, normalised over the vocabulary, so the tail mass is known: train with
    rest "ghost", "zero" or "renorm". Their temperature is the one at which the server reports them (1 for vLLM, unless
    it runs with processed log-probabilities). For another temperature T the store holds the exact lse at T, and at 1
    only that of the kept ids: train at T, or with rest "renorm". Rows may keep different numbers of ids; axolotl cuts
    them to the shortest, and this import keeps them all.

    **Prepared columns** (without ``logprobs_field``) are what axolotl trains on: ``target_logprobs`` and
    ``target_token_ids`` (T, K), ``target_mask`` (T, K) with 0 for padding and for prompts. These values were
    renormalised over the K ids, at axolotl's ``kd_temperature``, so the tail mass is lost: the kept mass is 1, and
    only rest "renorm" (or "renorm_both") applies. Row j is about token j + 1 ("next"). Older releases of axolotl stored
    the row about token j at index j ("same"). The data show which of the two it is, and this is checked.

    Records without ``input_ids`` are rendered by the tokenizer's chat template, which must be the one the teacher saw.
    If there are ``labels``, rows with label -100 are left out.

    Args:
        source: A .parquet, .arrow or .jsonl file, or a folder of them (as ``datasets.save_to_disk`` writes).
        store_path: New directory, or a store made with the same settings, whose documents are skipped.
        tokenizer: The teacher's tokenizer, from transformers.
        logprobs_field: Name of the raw column (axolotl's option of the same name). None reads prepared columns.
        messages_field: Name of the column with the conversation, for records without ``input_ids``.
        temperature: Temperature T of the values: the server's for raw columns, ``kd_temperature`` for prepared ones.
        alignment: "next" or "same", for prepared columns.
        vocab_size: V of the teacher; ``len(tokenizer)`` by default.
        teacher: Name of the teacher, kept in the store.
        codec: Codec of the store: "affine8", "affine6", "bfloat16" or "float32".
        check_alignment: Whether to refuse rows that seem to be about other tokens.

    Returns:
        ImportReport. The store's ``target_logit`` is that of the label if it is kept, otherwise -inf.

    Raises:
        FileNotFoundError: There is no such source.
        ImportError: pyarrow is not installed.
        ValueError: A column is missing or has another form, a row cannot be stored, or the rows are about other tokens.
            The message names the file and the record.

    References: axolotl (Apache-2.0), https://github.com/axolotl-ai-cloud/axolotl, folder src/axolotl/integrations/kd:
    README.md ("Target alignment"), chat_template.py (columns, placement, renormalisation), collator.py (padding).
    """
    _checks.check_one_of(alignment, "alignment", ALIGNMENTS)
    _checks.as_temperature(temperature)
    meaning = Meaning(float(temperature), whole_row=logprobs_field is not None)

    def documents() -> Iterator[Document]:
        for where, record in read_records(source):
            input_ids = _input_ids(record, tokenizer, messages_field, where)
            if logprobs_field is None:
                first, rows = int(alignment == "next"), _prepared_rows(record, len(input_ids), where)
            else:
                first, rows = _raw_rows(record, logprobs_field, len(input_ids), where)
            positions = first + np.arange(len(rows[0]))
            is_label = (positions >= 1) & (positions < len(input_ids))
            labels = record.get("labels")
            if labels is not None:
                _require_length(labels, len(input_ids), "labels", where)
                is_label[is_label] = np.asarray(labels)[positions[is_label]] != -100
            yield document(where, meaning, input_ids, positions[is_label], *(array[is_label] for array in rows))

    return write_store(
        documents(),
        store_path,
        format_name="axolotl",
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        teacher=teacher,
        meaning=meaning,
        codec=codec,
        check_alignment=check_alignment,
    )


def _input_ids(record: dict[str, Any], tokenizer: Any, messages_field: str, where: str) -> np.ndarray:
    ids = record.get("input_ids")
    if ids is None:
        if messages_field not in record:
            raise ValueError(
                f"{where}: has neither input_ids nor a conversation in {messages_field!r}, only {sorted(record)}: name "
                "the column as messages_field"
            )
        ids = tokenizer.apply_chat_template(record[messages_field], tokenize=True, return_dict=True)["input_ids"]
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise ValueError(f"{where}: input_ids must be a list of token ids, got {str(ids)[:60]}")
    return np.asarray(ids)


def _prepared_rows(record: dict[str, Any], length: int, where: str) -> tuple[np.ndarray, ...]:
    require_columns(list(record), _PREPARED, where)
    values, ids, mask = (record[name] for name in _PREPARED)
    for name, rows in zip(_PREPARED, (values, ids, mask), strict=True):
        _require_length(rows, length, name, where)
    _require_same_widths(values, ids, "target_logprobs", where)
    _require_same_widths(mask, ids, "target_mask", where)
    return padded(ids, np.int64), padded(values, np.float64), padded(mask, np.int64) != 0


def _raw_rows(record: dict[str, Any], field: str, length: int, where: str) -> tuple[int, tuple[np.ndarray, ...]]:
    require_columns(list(record), (field,), where)
    rows = record[field]
    if not isinstance(rows, list):
        raise ValueError(f"{where}: {field} must be a list with a row for each token, got {str(rows)[:60]}")
    # vLLM gives None for the first token of a text.
    rows: list[list[Any]] = [row or [] for row in rows]
    if any(isinstance(row[0], dict) for row in rows if row):
        ids = [[_token_id(entry, where) for entry in row] for row in rows]
        values = [[entry["logprob"] for entry in row] for row in rows]
    else:
        values, ids = rows, [row or [] for row in record.get("target_token_ids") or []]
        _require_length(ids, len(rows), "target_token_ids", where)
        _require_same_widths(values, ids, field, where)
    # A truncated conversation keeps its beginning.
    first = max(length - len(rows), 0)
    widths = np.array([len(row) for row in rows])[:, None]
    logprobs = padded(values, np.float64)
    return first, (padded(ids, np.int64), logprobs, np.arange(logprobs.shape[1]) < widths)


def _token_id(entry: Any, where: str) -> int:
    try:
        return int(entry["token"].removeprefix("token_id:"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f'{where}: an entry must be {{"token": "token_id:<number>", "logprob": <number>}}, got {str(entry)[:60]}: '
            "ask the server for token ids (vLLM: return_tokens_as_token_ids)"
        ) from error


def _require_length(rows: Any, length: int, name: str, where: str) -> None:
    if not isinstance(rows, list) or len(rows) != length:
        count = len(rows) if isinstance(rows, list) else str(rows)[:60]
        raise ValueError(f"{where}: {name} must have {length} rows, got {count}")


def _require_same_widths(rows: list[list], ids: list[list], name: str, where: str) -> None:
    for number, (row, of_ids) in enumerate(zip(rows, ids, strict=True)):
        if len(row) != len(of_ids):
            raise ValueError(f"{where}: {name} has {len(row)} entries in row {number}, but {len(of_ids)} ids")
