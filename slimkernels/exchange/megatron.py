"""``import_megatron``: imports the cached logits of Megatron-LM's offline distillation."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from slimkernels.exchange.records import read_records, require_columns, require_pyarrow
from slimkernels.exchange.writing import Document, ImportReport, Meaning, document, write_store

_META_NAME = "_meta.json"
_SHARD_NAME = re.compile(r"dp(\d+)__(\d+)-(\d+)\.tar")
_MEMBER_NAME = re.compile(r"(\d+)-(\d+)\.pt\.zst")
_FORMAT_VERSION = 2
# Log-probabilities over the whole row, of unscaled logits.
_MEANING = Meaning(temperature=1.0, whole_row=True)


def import_megatron(
    source: str | os.PathLike[str],
    store_path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    samples: Iterable[Sequence[int]] | str | os.PathLike[str],
    vocab_size: int | None = None,
    teacher: str = "",
    codec: str = "affine8",
    check_alignment: bool = True,
) -> ImportReport:
    """Streams a cache that Megatron-LM wrote with ``--logits-save-dir`` into a store.

    The cache has the teacher's rows but no tokens: a student of Megatron-LM reads the rows along with the same data in
    the same order. So this function needs the ``samples`` of that run, in order, as token ids. It checks that they are
    the right ones by how often a row keeps its own label. Row s of a sample is about its token s + 1.

    The values are log-probabilities at temperature 1, in float16 by default. They were normalised over the vocabulary
    before the K largest (and of those, with ``--logits-save-top-p``, a nucleus) were taken, so the tail mass is known
    and rest "ghost", "zero" and "renorm" all apply. Megatron's own loss is "ghost". If rounding makes a row sum to more
    than 1, lse is that of the kept ids. Rows of a packed sample across the borders of its documents are left out.

    Args:
        source: Folder of the ``dp<rank>__<first>-<last>.tar`` files of all data-parallel ranks.
        store_path: New directory, or a store made with the same settings, whose samples are skipped.
        tokenizer: The teacher's tokenizer, from transformers.
        samples: Token ids of sample 0, 1, 2, ... of the run: its T input tokens, or those and the last label. A file
            or folder of .parquet, .arrow or .jsonl with a column ``input_ids``, or an iterable of lists.
        vocab_size: V of the teacher; ``len(tokenizer)`` by default. Megatron pads its vocabulary: give the padded size
            if the padding can be among the kept ids.
        teacher: Name of the teacher, kept in the store.
        codec: Codec of the store: "affine8", "affine6", "bfloat16" or "float32".
        check_alignment: Whether to refuse rows that seem to be about other tokens.

    Returns:
        ImportReport. The store's ``target_logit`` is that of the label if it is kept, otherwise -inf.

    Raises:
        FileNotFoundError: There is no such folder.
        ImportError: pyarrow, which decompresses the files, is not installed.
        ValueError: The cache is of version 1, incomplete or damaged, there are too few samples or samples of another
            length, a row cannot be stored, or the rows are about other tokens. The message names the file.

    References: NVIDIA Megatron-LM, https://github.com/NVIDIA/Megatron-LM:
    docs/user-guide/features/offline_logits_distillation.md ("On-Disk Format"), and in megatron/training/distillation
    logits_saver.py (members, tensors, what is saved) and utils.py (names, indices, the order of samples over ranks).
    """

    def documents() -> Iterator[Document]:
        tokens = enumerate(_samples(samples))
        for where, index, ids, values, borders in _saved_samples(source):
            input_ids = next((sample for number, sample in tokens if number == index), None)
            if input_ids is None:
                raise ValueError(f"{where}: holds sample {index}, but samples has no such sample")
            if len(input_ids) not in (len(ids), len(ids) + 1):
                raise ValueError(
                    f"{where}: has {len(ids)} rows, so sample {index} must have as many tokens or one more, got "
                    f"{len(input_ids)}"
                )
            positions = np.setdiff1d(np.arange(1, min(len(ids) + 1, len(input_ids))), borders)
            rows = values[positions - 1]
            # Entries outside the nucleus are -1e3, or -1e4 in an earlier release: placeholders for ``document``.
            valid = np.ones(rows.shape, bool)
            yield document(where, _MEANING, input_ids, positions, ids[positions - 1], rows, valid)

    return write_store(
        documents(),
        store_path,
        format_name="megatron",
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        teacher=teacher,
        meaning=_MEANING,
        codec=codec,
        check_alignment=check_alignment,
    )


class _Iteration(NamedTuple):
    """The part of samples [first, last) that one rank saved: (T, B, K) ids and values, borders (B, n) or None."""

    where: str
    first: int
    last: int
    micro_batch: int
    ids: np.ndarray
    values: np.ndarray
    borders: np.ndarray | None


def _saved_samples(source: str | os.PathLike[str]) -> Iterator[tuple[str, int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields the samples in order: location, number, (T, K) ids and values, and the borders of the documents."""
    ranks = _shards(Path(source))
    end = 0
    for parts in itertools.zip_longest(*(_iterations(paths, len(ranks)) for paths in ranks)):
        present = [part for part in parts if part is not None]
        one = present[0]
        if len(present) < len(ranks) or any((part.first, part.last) != (one.first, one.last) for part in present):
            raise ValueError(f"{one.where}: not every data-parallel rank has the same samples at this place")
        if one.first < end:
            raise ValueError(f"{one.where}: begins at sample {one.first}, but earlier files hold those below {end}")
        end = one.last
        if one.last - one.first != sum(part.ids.shape[1] for part in parts):
            raise ValueError(f"{one.where}: its ranks hold {[part.ids.shape[1] for part in parts]} samples")
        for offset in range(one.last - one.first):
            # Megatron's sampler assigns micro-batches to the ranks in turn.
            block, within = divmod(offset, one.micro_batch)
            turn, rank = divmod(block, len(ranks))
            column = turn * one.micro_batch + within
            part = parts[rank]
            borders = np.zeros(0, np.int64) if part.borders is None else part.borders[column]
            yield part.where, one.first + offset, part.ids[:, column], part.values[:, column], borders


def _shards(folder: Path) -> list[list[Path]]:
    """Returns the files of each data-parallel rank, sorted by their first sample."""
    if not folder.is_dir():
        raise FileNotFoundError(f"source not found: there is no folder {folder}")
    found: dict[int, list[tuple[int, Path]]] = {}
    for path in folder.glob("*.tar"):
        match = _SHARD_NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(
                f"{path}: must be named dp<rank>__<first>-<last>.tar, as caches of version 2 are; earlier ones do not "
                "say which samples they are of: save the logits again"
            )
        rank, first, _ = map(int, match.groups())
        found.setdefault(rank, []).append((first, path))
    if sorted(found) != list(range(len(found))) or not found:
        raise ValueError(f"{folder} must hold the .tar files of ranks 0, 1, ..., got those of {sorted(found)}")
    return [[path for _, path in sorted(found[rank])] for rank in range(len(found))]


def _iterations(paths: list[Path], num_ranks: int) -> Iterator[_Iteration]:
    """Streams the iterations that one rank saved."""
    for path in paths:
        micro_batch = None
        for name, data in _members(path):
            where = f"{path}, {name}"
            if name == _META_NAME:
                micro_batch = _micro_batch(data, where, num_ranks)
            elif match := _MEMBER_NAME.fullmatch(name):
                if micro_batch is None:
                    raise ValueError(f"{path}: must begin with {_META_NAME}")
                first, last = map(int, match.groups())
                yield _Iteration(where, first, last, micro_batch, *_payload(data, where))


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Streams the names and contents of a tar file's members."""
    try:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                file = tar.extractfile(member)
                yield member.name, b"" if file is None else file.read()
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read as tar: {error}") from error


def _micro_batch(data: bytes, where: str, num_ranks: int) -> int:
    try:
        saver = json.loads(data)["saver"]
        version, micro_batch, ranks = (saver[name] for name in ("format_version", "mbs_save", "dp_size_save"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where}: must have saver.format_version, .mbs_save and .dp_size_save, as caches of version 2 have: "
            f"{error!r}"
        ) from error
    if version != _FORMAT_VERSION or type(micro_batch) is not int or micro_batch < 1:
        raise ValueError(f"{where}: format_version must be 2 and mbs_save at least 1, got {version} and {micro_batch}")
    if ranks != num_ranks:
        raise ValueError(f"{where}: was saved by {ranks} data-parallel ranks, but there are files of {num_ranks}")
    return micro_batch


def _payload(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Reads ids (T, B, K) int64, values (T, B, K) float32 and borders (B, n) of a compressed ``torch.save``."""
    pyarrow = require_pyarrow()
    try:
        # weights_only refuses to unpickle anything but tensors.
        saved = pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()
        content = torch.load(io.BytesIO(saved), weights_only=True)
        values, low, high = (content[name] for name in ("values", "indices_low", "bit_17"))
        borders = content.get("cu_seqlens_padded")
        if not (isinstance(values, torch.Tensor) and values.ndim == 3 and low.shape == values.shape):
            raise ValueError("values and indices_low must be tensors (T, B, K)")
        # The 17th bit of every id, eight to a byte over the flattened tensor.
        bits = np.unpackbits(high.numpy(), count=values.numel()).reshape(values.shape)
        ids = low.numpy().astype(np.int64) | bits.astype(np.int64) << 16
        return ids, values.float().numpy(), None if borders is None else borders.numpy()
    except (OSError, RuntimeError, pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: is not a payload of version 2: {error}") from error


def _samples(samples: Iterable[Sequence[int]] | str | os.PathLike[str]) -> Iterator[np.ndarray]:
    if isinstance(samples, (str, os.PathLike)):
        records = read_records(samples)
    else:
        records = ((f"sample {number}", {"input_ids": ids}) for number, ids in enumerate(samples))
    for where, record in records:
        require_columns(list(record), ("input_ids",), where)
        input_ids = np.asarray(record["input_ids"])
        if input_ids.ndim != 1 or input_ids.dtype.kind not in "iu":
            raise ValueError(f"{where}: must be a list of token ids, got {str(record['input_ids'])[:60]}")
        yield input_ids
