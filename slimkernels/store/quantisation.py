"""What rounding the kept logits costs a student, estimated from the store alone."""

from __future__ import annotations

import numpy as np

from slimkernels.store.codec import AFFINE_CODECS, EncodedRows, decode_rows, encode_rows
from slimkernels.store.reader import Store

_ROWS, _ENTRIES = 256, 1 << 22
# Above the log-sum-exp of any row, so that no row is refused for it.
_LSE = np.full((1, 1), np.finfo(np.float32).max, np.float32)


def quantisation_error(store: Store) -> dict[str, float]:
    """The error of rounding a row's logits, a mean over rows spread evenly over the store.

    The logits before rounding are gone, but every one of them lay within half a step of the stored one. So each row is
    taken for what was stored, moved by uniform noise of half a step either way, and what the codec makes of that row
    is compared with it. Nothing is assumed of the codec itself: it is run. What is assumed is that the logits lie
    anywhere within a step. Where a teacher's logits were on the codec's own grid, as bfloat16 ones in a store of
    codec bfloat16, nothing was lost, and this is what would have been lost otherwise.

    Args:
        store: Any store. At most 256 rows, and about 4 million entries, of it are read.

    Returns:
        With q a row's probabilities over its kept ids, adding up to 1, and r the same of the rounded row:
        ``quantisation_kl_nats``, the mean of KL(q || r); ``quantisation_gradient``, the mean of the Euclidean norm of
        r - q, which is the error of the gradient of KL(q || student) by the student's logits, a vector of norm at
        most 1.41, whatever the student; ``quantisation_log_mass``, the mean of how far the logarithm of the row's
        kept probability moves. All 0 for codec float32 and where there are no rows.

    Raises:
        StoreError: A row that is read is damaged.
    """
    total = store.num_rows
    if store.settings.codec == "float32" or total == 0:
        return dict.fromkeys(("quantisation_kl_nats", "quantisation_gradient", "quantisation_log_mass"), 0.0)
    mean_entries = sum(entry.entries for entry in store.shards) / total
    count = min(total, _ROWS, max(1, int(_ENTRIES / mean_entries)))
    noise = np.random.default_rng(0)
    errors = [_row_error(store, (2 * i + 1) * total // (2 * count), noise) for i in range(count)]
    kl, gradient, log_mass = np.mean(errors, axis=0).tolist()
    return {"quantisation_kl_nats": kl, "quantisation_gradient": gradient, "quantisation_log_mass": log_mass}


def _row_error(store: Store, row: int, noise: np.random.Generator) -> tuple[float, float, float]:
    """The three errors of one row, counted over the shards of the store."""
    ids, logits, step = _stored_row(store, row)
    moved = logits + step * noise.uniform(-0.5, 0.5, logits.shape)
    # No wider than what is stored: the largest numbers must stay numbers.
    before = moved.clip(logits.min(), logits.max()).astype(np.float32)
    after = _rounded(ids, before, store.vocab_size, store.settings.codec)
    before, after = before.astype(np.float64), after.astype(np.float64)
    before_lse, after_lse = (x.max() + np.log(np.exp(x - x.max()).sum()) for x in (before, after))
    log_q, log_r = before - before_lse, after - after_lse
    kl = (np.exp(log_q) * (log_q - log_r)).sum()
    return kl, float(np.linalg.norm(np.exp(log_r) - np.exp(log_q))), abs(after_lse - before_lse)


def _stored_row(store: Store, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | np.float64]:
    """(1, K) ids and logits of a row, and the distance between the values that its codec could have stored there."""
    number = 0
    while row >= store.shards[number].rows:
        row -= store.shards[number].rows
        number += 1
    shard = store.shard(number)
    document = int(np.searchsorted(shard.arrays["document_row_offsets"], row, side="right")) - 1
    first_document = sum(entry.documents for entry in store.shards[:number])
    teacher = shard.teacher(row, row + 1, first_document + document)
    ids, logits = teacher.ids.numpy(), teacher.logits.numpy()
    if store.settings.codec in AFFINE_CODECS:
        return ids, logits, np.float64(shard.arrays["affine"][row, 0])
    # bfloat16 has 2^16 times the spacing of float32.
    return ids, logits, np.abs(np.spacing(logits).astype(np.float64)) * 2**16


def _rounded(ids: np.ndarray, logits: np.ndarray, vocab_size: int, codec: str) -> np.ndarray:
    """(1, K) logits, encoded and decoded."""
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
