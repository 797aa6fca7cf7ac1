"""Measures size on disk and rounding error of a teacher's kept logits, in our codecs and in layouts of other projects.

slimkernels capture --teacher smollm2-135m-instruct --prompts --tokens 3000 --codec float32 --out runs/exact
python -m bench.codecs --store runs/exact --out bench/results/codecs.jsonl

The rows of the store, which must have codec float32, are encoded with every codec in turn. Bits per entry of our codecs
count the whole store with index and checksums; for the other layouts they count the rows only. The error is the mean of
KL(q || r), with q a row's probabilities renormalised over its kept ids and r the same after rounding.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bench import records
from bench.machine import machine
from slimkernels.exchange.distillkit_codec import Compression
from slimkernels.store import Store, StoreWriter, info

OURS = ("affine6", "affine8", "bfloat16", "float32")
EXACT = 32  # number of values that the polynomial layout keeps unfitted
TERMS = (0, 1, 2, 3, 4, "sqrt")
RESIDUAL_BITS = 4


def packed_24_bits(ids: np.ndarray, logprobs: np.ndarray, vocab_size: int) -> tuple[int, np.ndarray]:
    """Encodes 17 bits of id and 7 bits of position between the row's smallest and largest log-probability.

    Returns:
        The bytes of the row, and the log-probabilities as they are read back, in the order of ``ids``. The
        functions below return the same.
    """
    if vocab_size > 1 << 17:
        raise ValueError(f"17 bits hold ids below {1 << 17}, got a vocabulary of {vocab_size}")
    low, high = logprobs.min(), logprobs.max()
    step = max((high - low) / 127, np.finfo(np.float64).tiny)
    return 3 * len(ids), low + np.rint((logprobs - low) / step) * step


def polynomial(ids: np.ndarray, logprobs: np.ndarray, vocab_size: int) -> tuple[int, np.ndarray]:
    """Encodes as DistillKit does: the largest values exactly, a polynomial fit of the sorted rest, 4-bit residuals."""
    order = np.argsort(-logprobs, kind="stable")
    falling = logprobs[order]
    exact = min(EXACT, len(ids))
    points = np.linspace(0, 1, len(ids) - exact)
    basis = np.stack([np.sqrt(points) if term == "sqrt" else points**term for term in TERMS], -1)
    rest = falling[exact:]
    coefficients = np.linalg.lstsq(basis, rest, rcond=None)[0].astype(np.float32)
    fitted = basis @ coefficients
    half = 2 ** (RESIDUAL_BITS - 1)
    scale = np.float64(np.float16(np.abs(rest - fitted).max(initial=0) / (half - 1)))
    levels = np.rint((rest - fitted) / scale).clip(-half, half - 1) if scale > 0 else np.zeros_like(rest)
    read = np.empty_like(logprobs)
    read[order] = np.concatenate([_bfloat16(falling[:exact]), fitted + levels * scale])
    layout = Compression.of(
        {
            "d": vocab_size,
            "k": len(ids),
            "exact_k": exact,
            "exact_dtype": "bfloat16",
            "polynomial_terms": TERMS,
            "residual_bins": [
                {"scale_dtype": "float16", "element_bits": RESIDUAL_BITS, "num_elements": len(ids) - exact}
            ],
            "delta_encoding": False,
            "normalize_t": True,
        },
        "the benchmark's layout",
    )
    return layout.index_bytes + layout.value_bytes, read


def arrays(ids: np.ndarray, logprobs: np.ndarray, _vocab_size: int) -> tuple[int, np.ndarray]:
    """Encodes an int32 and a bfloat16 per entry."""
    return 6 * len(ids), _bfloat16(logprobs)


def text(ids: np.ndarray, logprobs: np.ndarray, _vocab_size: int) -> tuple[int, np.ndarray]:
    """Encodes JSON as a server returns it."""
    record = {f"token_id:{token}": float(np.float32(logprob)) for token, logprob in zip(ids, logprobs, strict=True)}
    return len(json.dumps(record, separators=(",", ":"))), logprobs


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds to the nearest bfloat16, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


OTHERS: dict[str, Callable[[np.ndarray, np.ndarray, int], tuple[int, np.ndarray]]] = {
    "polynomial and 4-bit residuals (DistillKit's layout)": polynomial,
    "24-bit records": packed_24_bits,
    "int32 and bfloat16 arrays": arrays,
    "JSON": text,
}


def rows_of(store: Store) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields ids and log-probabilities (float64) of every row, without padding."""
    for index in range(len(store)):
        teacher = store[index].teacher
        for ids, logits, lse in zip(teacher.ids.numpy(), teacher.logits.numpy(), teacher.lse.numpy(), strict=True):
            kept = ids >= 0
            yield ids[kept], logits[kept].astype(np.float64) - float(lse[0])


def kl(before: np.ndarray, after: np.ndarray) -> float:
    """Returns KL(q || r) of two rows of log-probabilities, each renormalised to sum to 1."""
    log_q, log_r = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (before, after))
    return float((np.exp(log_q) * (log_q - log_r)).sum())


def measure_ours(store: Store, codec: str, folder: Path) -> dict:
    """Measures one of our codecs by writing the whole store again."""
    settings = store.settings
    with StoreWriter(
        folder / codec,
        vocab_size=store.vocab_size,
        tokenizer_fingerprint=settings.tokenizer_fingerprint,
        teacher=settings.teacher,
        selection=settings.selection,
        temperatures=settings.temperatures,
        codec=codec,
    ) as writer:
        for index in range(len(store)):
            document = store[index]
            writer.add(document.input_ids, document.positions, document.teacher)
    errors = [
        kl(before, after)
        for (_, before), (_, after) in zip(rows_of(store), rows_of(Store(folder / codec)), strict=True)
    ]
    return {"bits_per_entry": info(folder / codec)["bits_per_entry"], "kl_nats": float(np.mean(errors))}


def measure_other(store: Store, encode: Callable[[np.ndarray, np.ndarray, int], tuple[int, np.ndarray]]) -> dict:
    """Measures another layout row by row."""
    size = entries = 0
    errors = []
    for ids, logprobs in rows_of(store):
        row_bytes, read = encode(ids, logprobs, store.vocab_size)
        size, entries = size + row_bytes, entries + len(ids)
        errors.append(kl(logprobs, read))
    return {"bits_per_entry": 8 * size / entries, "kl_nats": float(np.mean(errors))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True, help="store with codec float32")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    args = parser.parse_args()
    store = Store(args.store)
    if store.settings.codec != "float32":
        parser.error(
            f"--store must have codec float32, the exact rows that errors are measured against, "
            f"got {store.settings.codec}"
        )
    shared = {"op": "codec", "teacher": store.settings.teacher.get("name", ""), "vocab": store.vocab_size}
    shared |= {"rows": store.num_rows, "top_k": store.shards[0].top_k}
    with tempfile.TemporaryDirectory() as folder:
        for name in (*OURS, *OTHERS):
            measured = measure_ours(store, name, Path(folder)) if name in OURS else measure_other(store, OTHERS[name])
            print(f"{name}: {measured['bits_per_entry']:.2f} bits per entry, {measured['kl_nats']:.2e} nats")
            row = shared | {"codec": name, "is_ours": name in OURS} | measured | machine()
            records.append(args.out, [row])


if __name__ == "__main__":
    main()
