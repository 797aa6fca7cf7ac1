"""Writes rows in DistillKit's compression in plain Python: bits as text, bytes through ``struct``.

Written from the description alone (README.md, "Compression Deep-Dive", and the layout in the docstring of
``slimkernels.exchange.distillkit_codec``), it shares no code with the decoder.
"""

from __future__ import annotations

import itertools
import math
import struct

import numpy as np

FORMATS = {"float16": "<e", "float32": "<f", "float64": "<d"}


def float_bytes(value: float, dtype: str) -> bytes:
    if dtype != "bfloat16":
        return struct.pack(FORMATS[dtype], value)
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    # Rounds to nearest, ties to even.
    return struct.pack("<H", (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) if math.isfinite(value) else b"\x80\xff"


def rounded(value: float, dtype: str) -> float:
    """Returns the value that a reader gets."""
    data = float_bytes(value, dtype)
    if dtype != "bfloat16":
        return struct.unpack(FORMATS[dtype], data)[0]
    return struct.unpack("<f", b"\0\0" + data)[0]


def bit_bytes(numbers: list[int], bits: int) -> bytes:
    text = "".join(format(number, f"0{bits}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def index_bytes(ids: list[int], vocab_size: int) -> bytes:
    return bit_bytes(ids, math.ceil(math.log2(vocab_size)))


def term_value(term: int | str, t: float) -> float:
    return {"sqrt": math.sqrt, "exp": math.exp}[term](t) if isinstance(term, str) else t**term


def encode(values: list[float], config: dict) -> tuple[bytes, list[float]]:
    """Returns the bytes of a row of descending log-probabilities, and the decoded values."""
    if config.get("delta_encoding", True):
        values = [values[0], *(after - before for before, after in itertools.pairwise(values))]
    exact_k, k = config["exact_k"], config["k"]
    data = b"".join(float_bytes(value, config["exact_dtype"]) for value in values[:exact_k])
    result = [rounded(value, config["exact_dtype"]) for value in values[:exact_k]]
    rest = values[exact_k:k]
    approximate = [0.0] * len(rest)
    terms, term_dtype = config.get("polynomial_terms") or [], config.get("term_dtype", "float32")
    if terms:
        span = max(len(rest) - 1, 1) if config.get("normalize_t") else 1
        points = np.array([[term_value(term, t / span) for term in terms] for t in range(len(rest))])
        coefficients = np.linalg.lstsq(points, np.array(rest), rcond=None)[0]
        coefficients = [rounded(c, term_dtype) for c in coefficients]
        data += b"".join(float_bytes(c, term_dtype) for c in coefficients)
        approximate = (points @ np.array(coefficients)).tolist()
    first = 0
    for bin_ in config.get("residual_bins") or []:
        bits, last = bin_["element_bits"], first + bin_["num_elements"]
        residuals = [rest[i] - approximate[i] for i in range(first, last)]
        largest = max(map(abs, residuals))
        scale = rounded(largest / (1 if bits == 1 else 2 ** (bits - 1)), bin_["scale_dtype"]) if largest else 1.0
        if bits == 1:
            numbers = [int(residual > 0) for residual in residuals]
            steps = [2 * number - 1 for number in numbers]
        else:
            least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            steps = [min(max(round(residual / scale), least), most) for residual in residuals]
            numbers = [step - least for step in steps]
        data += float_bytes(scale, bin_["scale_dtype"]) + bit_bytes(numbers, bits)
        for i, step in zip(range(first, last), steps, strict=True):
            approximate[i] += step * scale
        first = last
    result += approximate
    if config.get("delta_encoding", True):
        result = np.cumsum(result).tolist()
    return data, result
