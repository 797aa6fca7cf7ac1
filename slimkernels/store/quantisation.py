"""Estimates from a store alone how much the rounding of the kept logits, or of hidden states, costs a student."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from slimkernels.packed_logits import HeadWeights, PackedHidden
from slimkernels.store.codec import AFFINE_CODECS, EncodedRows, decode_rows, encode_rows
from slimkernels.store.format import HiddenSettings
from slimkernels.store.hidden import decode_hidden, encode_hidden
from slimkernels.store.reader import Store
from slimkernels.store.shard import Shard

_ROWS, _ENTRIES = 256, 1 << 22
_WEIGHT_ROWS = 1 << 14
# Larger than the log-sum-exp of any row, so that the encoder refuses no row because of its lse.
_LSE = np.full((1, 1), np.finfo(np.float32).max, np.float32)


def quantisation_error(store: Store) -> dict[str, float]:
    """Estimates the mean error of rounding a row's logits or hidden state, from rows spread evenly over the store.

    The original logits are not stored, but each lay within half a step of its stored value. So uniform noise of up to
    half a step either way is added to the stored logits of a row, the codec encodes and decodes the result, and the
    error is measured between the two. This assumes that the original logits are spread uniformly within a step. If they
    were on the grid of the codec, such as bfloat16 logits in a store of codec bfloat16, nothing was lost and the
    estimate is too high. The noise of a hidden state is added to its numbers, and its logits are those of the head in
    float32.

    Args:
        store: Any store. At most 256 rows and about 4 million entries of it are read.

    Returns:
        With q the probabilities of a row over its kept ids, normalised to 1, and r those of the rounded row:
        ``quantisation_kl_nats`` is the mean of KL(q || r). ``quantisation_gradient`` is the mean Euclidean norm of
        r - q, which is the error of the gradient of KL(q || student) with respect to the student's logits, whose norm
        is at most 1.41 for any student. ``quantisation_log_mass`` is the mean absolute change of the logarithm of the
        kept probability. All are 0 for codec float32 and for a store without rows.

    Raises:
        StoreError: A row that is read is damaged.
    """
    total = store.num_rows
    if store.settings.codec == "float32" or total == 0:
        return dict.fromkeys(("quantisation_kl_nats", "quantisation_gradient", "quantisation_log_mass"), 0.0)
    hidden = store.settings.hidden
    mean_entries = sum(entry.entries for entry in store.shards) / total if hidden is None else hidden.top_k
    count = min(total, _ROWS, max(1, int(_ENTRIES / mean_entries)))
    noise = np.random.default_rng(0)
    rows = [(2 * i + 1) * total // (2 * count) for i in range(count)]
    if hidden is not None:
        errors = _hidden_errors(store, hidden, rows, noise)
    else:
        errors = [_row_error(store, row, noise) for row in rows]
    kl, gradient, log_mass = np.mean(errors, axis=0).tolist()
    return {"quantisation_kl_nats": kl, "quantisation_gradient": gradient, "quantisation_log_mass": log_mass}


def _row_error(store: Store, row: int, noise: np.random.Generator) -> tuple[float, float, float]:
    """Returns the three errors of one row; ``row`` is its index among the rows of all shards."""
    ids, logits, step = _stored_row(store, row)
    if ids[0, 0] == -1:
        # A row without entries has nothing to round.
        return 0.0, 0.0, 0.0
    moved = logits + step * noise.uniform(-0.5, 0.5, logits.shape)
    # Clipped to the range of the stored logits, so that the largest ones stay finite.
    before = moved.clip(logits.min(), logits.max()).astype(np.float32)
    after = _rounded(ids, before, store.vocab_size, store.settings.codec)
    return _error(before, after)


def _error(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """Returns the three errors of the logits of a row after rounding."""
    before, after = before.astype(np.float64), after.astype(np.float64)
    before_lse, after_lse = (x.max() + np.log(np.exp(x - x.max()).sum()) for x in (before, after))
    log_q, log_r = before - before_lse, after - after_lse
    kl = (np.exp(log_q) * (log_q - log_r)).sum()
    return kl, float(np.linalg.norm(np.exp(log_r) - np.exp(log_q))), abs(after_lse - before_lse)


def _hidden_errors(
    store: Store, hidden: HiddenSettings, rows: list[int], noise: np.random.Generator
) -> list[tuple[float, float, float]]:
    """Returns the errors of rows that are made of hidden states, over the K ids that they keep before rounding."""
    places = [_place(store, row) for row in rows]
    packed = PackedHidden.cat([shard.packed_hidden(hidden, row, row + 1, document) for shard, row, document in places])
    stored = packed.hidden(torch.float32)
    # bfloat16 has 2^16 times the spacing of float32.
    steps = np.spacing(stored.abs().numpy()) * 2**16 if packed.scale is None else packed.scale[:, None].numpy()
    moved = stored + torch.from_numpy(steps * noise.uniform(-0.5, 0.5, stored.shape)).float()
    largest = stored.abs().amax(-1, keepdim=True)
    before = moved.clamp(-largest, largest)
    rounded = encode_hidden(before, hidden_size=hidden.hidden_size, codec=store.settings.codec, first_row=0)
    values, scale = decode_hidden(rounded.values, rounded.scale, rounded.checksums, first_row=0, file="", document=0)
    after = dataclasses.replace(packed, values=values, scale=scale).hidden(torch.float32)
    weights = packed.head.on(torch.device("cpu"))
    logits, ids = _logits(weights, before).topk(hidden.top_k)
    return [_error(*pair) for pair in zip(logits.numpy(), _logits(weights, after).gather(-1, ids).numpy(), strict=True)]


def _logits(head: HeadWeights, hidden: Tensor) -> Tensor:
    """Computes the logits (N, V) in float32, from a part of the weight at a time."""
    logits = torch.cat([hidden @ part.float().T for part in head.weight.split(_WEIGHT_ROWS)], -1)
    if head.bias is not None:
        logits += head.bias.float()
    logits *= head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _stored_row(store: Store, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | np.float64]:
    """Returns the (1, K) ids and logits of a row, and the distance between adjacent values of its codec."""
    shard, row, document = _place(store, row)
    teacher = shard.teacher(row, row + 1, document)
    ids, logits = teacher.ids.numpy(), teacher.logits.numpy()
    if store.settings.codec in AFFINE_CODECS:
        return ids, logits, np.float64(shard.arrays["affine"][row, 0])
    # bfloat16 has 2^16 times the spacing of float32.
    return ids, logits, np.abs(np.spacing(logits).astype(np.float64)) * 2**16


def _place(store: Store, row: int) -> tuple[Shard, int, int]:
    """Returns the shard of a row, its index there, and the index of its document in the store."""
    number = 0
    while row >= store.shards[number].rows:
        row -= store.shards[number].rows
        number += 1
    shard = store.shard(number)
    document = int(np.searchsorted(shard.arrays["document_row_offsets"], row, side="right")) - 1
    return shard, row, sum(entry.documents for entry in store.shards[:number]) + document


def _rounded(ids: np.ndarray, logits: np.ndarray, vocab_size: int, codec: str) -> np.ndarray:
    """Encodes and decodes (1, K) logits."""
    scalar = np.zeros(1, np.float32)
    rows: EncodedRows = encode_rows(ids, logits, _LSE, scalar, vocab_size=vocab_size, codec=codec, first_row=0)
    arrays = {name: getattr(rows, name) for name in ("id_words", "values", "affine", "lse", "target_logit")}
    return decode_rows(
        vocab_size=vocab_size,
        codec=codec,
        top_k=ids.shape[1],
        first_row=0,
        num_rows=1,
        width=ids.shape[1],
        arrays=arrays | {"row_checksums": rows.checksums},
        file="",
        document=0,
    )[1]
