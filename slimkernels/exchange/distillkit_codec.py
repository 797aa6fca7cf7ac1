"""Decodes rows of DistillKit's compressed log-probabilities.

A row of k entries in descending order consists, byte after byte and little-endian, of:

1. the first ``exact_k`` values, in ``exact_dtype``;
2. a coefficient for each of ``polynomial_terms``, in ``term_dtype``: the other n = k - exact_k values are approximately
   sum_i(c_i * f_i(t)) at t = 0, 1, ..., n - 1 (with ``normalize_t`` n points from 0 to 1), where f_i(t) is t to the
   power of a whole number, sqrt(t) or exp(t);
3. for each of ``residual_bins`` a scale in ``scale_dtype`` and ``num_elements`` whole numbers of ``element_bits`` bits,
   filled up to a byte: the residuals of the next entries are (number - 2^(bits - 1)) * scale, of one bit
   (2 * number - 1) * scale. Entries after the last bin have none.

With ``delta_encoding`` each value is the difference to the one before. Bits are ordered from the highest to the lowest,
in the bytes and in each number. The ids take ceil(log2(d)) bits each, in the same order.

References: arcee-ai's DistillKit (Apache-2.0), https://github.com/arcee-ai/DistillKit: README.md ("Compression
Deep-Dive"), distillkit/compression/config.py, bitpack.py and monotonic_logprobs.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_SPECIAL_TERMS = {"sqrt": torch.sqrt, "exp": torch.exp}
_MAX_ENTRIES, _MAX_POWER = 1 << 20, 64


@dataclasses.dataclass(frozen=True)
class Bin:
    """The quantised residuals of consecutive entries."""

    scale_dtype: torch.dtype
    element_bits: int
    num_elements: int

    @property
    def packed_bytes(self) -> int:
        """The bytes of the numbers, without the scale."""
        return (self.element_bits * self.num_elements + 7) // 8


@dataclasses.dataclass(frozen=True)
class Compression:
    """A ``DistributionQuantizationConfig`` with DistillKit's field names; ``of`` reads and checks one.

    Attributes:
        d: Vocabulary size, which decides the width of an id.
        k: Number of entries of a row.
        exact_k: Number of entries that are stored exactly.
        exact_dtype, term_dtype: Dtypes of exact values and of coefficients.
        polynomial_terms: Whole numbers, "sqrt", "exp".
        residual_bins: Corrections of the polynomial.
        delta_encoding: Whether the values are differences.
        normalize_t: Whether t ends at 1.
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: torch.dtype
    term_dtype: torch.dtype
    polynomial_terms: tuple[int | str, ...]
    residual_bins: tuple[Bin, ...]
    delta_encoding: bool
    normalize_t: bool

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> Compression:
        """Reads a configuration with DistillKit's defaults; errors name ``where``.

        Raises:
            ValueError: A field is missing, unknown, or out of range.
        """
        config = dict(config)
        if "logprob_compressor" in config:
            config = dict(config["logprob_compressor"])
        if "polynomial_degree" in config or "legacy_logit_compression" in config:
            raise ValueError(
                f"{where}: is of DistillKit's legacy compression, which is not supported because its files do not say "
                "whether their values are log-probabilities or centred logits"
            )
        known = {field.name for field in dataclasses.fields(cls)} | {"error_diffusion"}
        if unknown := sorted(set(config) - known):
            raise ValueError(f"{where}: holds unknown fields {', '.join(unknown)}")
        # Only the encoder uses it.
        config.pop("error_diffusion", None)

        def integer(source: dict[str, Any], name: str, least: int, most: int) -> int:
            value = source.get(name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{where}: {name} must be a whole number in [{least}, {most}], got {value!r}")
            return value

        def dtype(source: dict[str, Any], name: str, default: str | None = None) -> torch.dtype:
            value = source.get(name, default)
            if value not in _DTYPES:
                raise ValueError(f"{where}: {name} must be one of {', '.join(_DTYPES)}, got {value!r}")
            return _DTYPES[value]

        k = integer(config, "k", 1, _MAX_ENTRIES)
        terms = tuple(config.get("polynomial_terms") or ())
        for term in terms:
            if term not in _SPECIAL_TERMS and (type(term) is not int or not 0 <= term <= _MAX_POWER):
                raise ValueError(f"{where}: polynomial_terms must be whole numbers, 'sqrt' or 'exp', got {term!r}")
        bins = tuple(
            Bin(
                dtype(bin_, "scale_dtype"),
                integer(bin_, "element_bits", 1, 63),
                integer(bin_, "num_elements", 1, _MAX_ENTRIES),
            )
            for bin_ in config.get("residual_bins") or ()
        )
        exact_k = integer(config, "exact_k", 0, k)
        if sum(bin_.num_elements for bin_ in bins) > k - exact_k:
            raise ValueError(f"{where}: residual_bins must hold at most k - exact_k = {k - exact_k} elements")
        if exact_k < k and not terms and not bins:
            raise ValueError(f"{where}: polynomial_terms or residual_bins must define entries after exact_k={exact_k}")
        return cls(
            d=integer(config, "d", 1, 2**31 - 1),
            k=k,
            exact_k=exact_k,
            exact_dtype=dtype(config, "exact_dtype", "float32"),
            term_dtype=dtype(config, "term_dtype", "float32"),
            polynomial_terms=terms,
            residual_bins=bins,
            delta_encoding=bool(config.get("delta_encoding", True)),
            normalize_t=bool(config.get("normalize_t", False)),
        )

    @property
    def index_bits(self) -> int:
        """The bits of an id."""
        return max((self.d - 1).bit_length(), 1)

    @property
    def index_bytes(self) -> int:
        """The bytes of the ids of a row."""
        return (self.k * self.index_bits + 7) // 8

    @property
    def value_bytes(self) -> int:
        """The bytes of the values of a row."""
        return (
            self.exact_k * self.exact_dtype.itemsize
            + len(self.polynomial_terms) * self.term_dtype.itemsize
            + sum(bin_.scale_dtype.itemsize + bin_.packed_bytes for bin_ in self.residual_bins)
        )

    def ids(self, packed: np.ndarray) -> np.ndarray:
        """Decodes (R, index_bytes) uint8 to ids (R, k) int64, in descending order of their values."""
        return _unpack(packed, self.index_bits, self.k)

    def values(self, packed: np.ndarray) -> np.ndarray:
        """Decodes (R, value_bytes) uint8 to log-probabilities (R, k) float64, descending up to the error of the fit."""
        start = self.exact_k * self.exact_dtype.itemsize
        exact = _floats(packed[:, :start], self.exact_dtype)
        approximate = torch.zeros(len(packed), self.k - self.exact_k, dtype=torch.float64)
        stop = start + len(self.polynomial_terms) * self.term_dtype.itemsize
        if self.polynomial_terms:
            approximate += self._fit(_floats(packed[:, start:stop], self.term_dtype)).double()
        first = 0
        for bin_ in self.residual_bins:
            start, stop = stop, stop + bin_.scale_dtype.itemsize
            scale = _floats(packed[:, start:stop], bin_.scale_dtype).double()
            start, stop = stop, stop + bin_.packed_bytes
            numbers = torch.from_numpy(_unpack(packed[:, start:stop], bin_.element_bits, bin_.num_elements))
            if bin_.element_bits == 1:
                steps = 2.0 * numbers - 1.0
            else:
                steps = numbers.double() - 2.0 ** (bin_.element_bits - 1)
            last = first + bin_.num_elements
            approximate[:, first:last] += steps * scale
            first = last
        values = torch.cat([exact.double(), approximate], -1)
        return (values.cumsum(-1) if self.delta_encoding else values).numpy()

    def _fit(self, coefficients: Tensor) -> Tensor:
        """Evaluates the polynomial (R, n), in the dtype in which the encoder computed the residuals."""
        count = self.k - self.exact_k
        if self.normalize_t:
            points = torch.linspace(0, 1, steps=count, dtype=self.term_dtype)
        else:
            points = torch.arange(count, dtype=self.term_dtype)
        terms = [
            _SPECIAL_TERMS[term](points) if isinstance(term, str) else points**term for term in self.polynomial_terms
        ]
        return (torch.stack(terms, -1) * coefficients[:, None, :]).sum(-1)


def _floats(packed: np.ndarray, dtype: torch.dtype) -> Tensor:
    num_rows, num_bytes = packed.shape
    values = torch.empty(num_rows, num_bytes // dtype.itemsize, dtype=dtype)
    if values.numel():
        values.view(torch.uint8).numpy()[:] = packed
    return values


def _unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unpacks (R, ceil(count * bits / 8)) bytes to (R, count) int64."""
    each = np.unpackbits(packed, axis=-1, count=count * bits).reshape(len(packed), count, bits)
    numbers = np.zeros((len(packed), count), np.int64)
    for bit in range(bits):
        numbers = (numbers << 1) | each[:, :, bit]
    return numbers
