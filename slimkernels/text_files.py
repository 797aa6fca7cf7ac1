"""Text files as they are found: with a byte order mark, in UTF-16, with any line ends."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from typing import Any


def read_lines(path: str | os.PathLike[str]) -> Iterator[str]:
    r"""Yields the lines of a text file without their ends and without a byte order mark.

    A line ends with ``\n``, ``\r\n`` or ``\r`` alone. Python's ``str.splitlines`` also splits at a form feed, U+0085,
    U+2028 and other characters that texts and JSON strings contain.

    Args:
        path: Path of a file in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is in another encoding; the message names it.
    """
    number = 0
    try:
        with open(path, encoding=_encoding(path)) as file:
            for line in file:
                number += 1
                yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be text in UTF-8, but holds the byte {error.object[error.start]:#04x} after line {number}: "
            f"convert it, as `iconv -f latin1 -t utf-8` does for a file in Latin-1"
        ) from error


def read_json_records(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yields the JSON values of a file with one value per line, or those of a file that is one JSON array of objects.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is in another encoding, or a line is not JSON; the message names file and line.
    """
    lines = enumerate(read_lines(path), 1)
    for number, line in lines:
        if not line.strip():
            continue
        # An array over the whole file opens with a bracket that its line does not close, or holds objects.
        if number == 1 and line.lstrip().startswith("["):
            yield from _array(path, "\n".join([line, *(rest for _, rest in lines)]))
            return
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: is not JSON: {error}") from error


def check_characters(value: Any, name: str) -> None:
    """Checks that UTF-8 has every character of a JSON value, which no tokenizer reads otherwise.

    JSON can also spell one half of a surrogate pair, as in a text that was cut within an emoji.

    Args:
        value: JSON value.
        name: Name of the value, for the message.

    Raises:
        ValueError: The value holds half of a surrogate pair.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half of a surrogate pair, which is no character: remove it") from error


def _array(path: str | os.PathLike[str], text: str) -> list[Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: is not a JSON array: {error}") from error


def _encoding(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        start = file.read(4)
    # Tried first, because the mark of UTF-32 may begin with that of UTF-16.
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        raise ValueError(f"{path} must be text in UTF-8, but is in UTF-32: convert it with `iconv -f utf-32 -t utf-8`")
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
