"""Turns the lists of a parsed answer into arrays, without Python code that runs once per entry.

The numbers come from outside: a value of another type is an error, never converted.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Iterable
from operator import methodcaller
from typing import Any

import numpy as np

_ID_PREFIX = "token_id:"
_NUMBER_TYPES = frozenset({float, int, type(None)})
_ENCODED = {"float16": "<f2", "float32": "<f4", "float64": "<f8", "int32": "<i4", "int64": "<i8"}
_has_id_prefix: Callable[[str], bool] = methodcaller("startswith", _ID_PREFIX)


def floats(values: Iterable[Any]) -> np.ndarray:
    """Returns numbers as float64, with NaN for None.

    Raises:
        ValueError: A value is neither a number nor None, or is too large.
    """
    values = list(values)
    if not set(map(type, values)) <= _NUMBER_TYPES:
        raise ValueError(f"a log-probability must be a number, got {_other_than(values, _NUMBER_TYPES)!r}")
    try:
        return np.array(values, dtype=np.float64)
    except OverflowError as error:
        raise ValueError(f"a log-probability is out of range: {error}") from error


def integers(values: Iterable[Any]) -> np.ndarray:
    """Returns token ids as int64.

    Raises:
        ValueError: A value is no integer, or is too large.
    """
    values = list(values)
    if not set(map(type, values)) <= {int}:
        raise ValueError(f"a token id must be an integer, got {_other_than(values, frozenset({int}))!r}")
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as error:
        raise ValueError(f"a token id is out of range: {error}") from error


def named_ids(names: Collection[str], prefix: str = _ID_PREFIX) -> np.ndarray | None:
    """Returns the ids in names such as "token_id:123" as int64, or None if a name is no id.

    Args:
        names: The names.
        prefix: The text in front of every id: "token_id:", or "" for names that are decimal numbers.
    """
    if not names:
        return np.zeros(0, np.int64)
    digits = "\n".join(names)
    if prefix:
        # With one prefix per name, at its begin, nothing but the rest of each name is left.
        if digits.count(prefix) != len(names) or not all(map(_has_id_prefix, names)):
            return None
        digits = digits.replace(prefix, "")
    parts = digits.split("\n")
    if len(parts) != len(names) or not digits.isascii() or not all(map(str.isdecimal, parts)):
        return None
    try:
        return np.fromiter(map(int, parts), np.int64, len(parts))
    except (OverflowError, ValueError):
        return None


def decoded(text: Any, dtype: Any, shape: tuple[int, int]) -> np.ndarray:
    """Returns the array in a base64 text of little-endian numbers, row by row.

    Raises:
        ValueError: The text is not base64, the type is not known, or there are more or fewer numbers.
    """
    if not isinstance(text, str) or dtype not in _ENCODED:
        raise ValueError(f"an encoded array must be a text of one of {', '.join(_ENCODED)}, got dtype {dtype!r}")
    values = np.frombuffer(base64.b64decode(text, validate=True), np.dtype(_ENCODED[dtype]))
    # A signaling NaN would warn.
    with np.errstate(invalid="ignore"):
        return values.astype(np.float64 if dtype.startswith("float") else np.int64).reshape(shape)


def _other_than(values: list[Any], types: frozenset[type]) -> Any:
    return next(value for value in values if type(value) not in types)
