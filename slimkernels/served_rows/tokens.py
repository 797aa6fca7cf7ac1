"""Maps a server's names of tokens to the ids of a tokenizer, byte for byte."""

from __future__ import annotations

import dataclasses
import itertools
import json
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

_ID_TYPES = frozenset({int, type(None)})
_LOGPROB_TYPES = frozenset({float, int, type(None)})
_ID_PREFIX = "token_id:"
_BYTES_PREFIX = "bytes:"
_SHOWN_EXAMPLES = 5
_REPLACEMENT = "\ufffd".encode()
_AMBIGUOUS = -1


class ServerToken(NamedTuple):
    """One token as a server names it.

    Attributes:
        text: String of the token. For bytes that are not UTF-8 servers write replacement characters, or nothing.
        logprob: Natural log of its probability; NaN if the server does not give it.
        data: Bytes of the token; None if the server does not give them.
        id: Id of the token; None if the server does not give it.
    """

    text: str
    logprob: float
    data: bytes | None = None
    id: int | None = None

    @classmethod
    def named(cls, text: str, logprob: float | None, data: list[int] | None = None, token: int | None = None):
        r"""Reads the different ways in which servers name a token.

        With ``return_tokens_as_token_ids`` vLLM writes "token_id:123", together with the bytes of that string. The
        legacy completions of OpenAI write "bytes:\xe2\x80" for bytes that are not UTF-8.
        """
        if not isinstance(data, list | None) or type(token) not in _ID_TYPES or type(logprob) not in _LOGPROB_TYPES:
            raise TypeError(f"a token has a number, bytes and an id or null, got {logprob!r}, {data!r}, {token!r}")
        raw = None if data is None else bytes(data)
        if text.startswith(_ID_PREFIX) and text[len(_ID_PREFIX) :].isdecimal():
            token, raw = int(text[len(_ID_PREFIX) :]), None
        elif raw is None and text.startswith(_BYTES_PREFIX):
            raw = _unescaped(text[len(_BYTES_PREFIX) :])
        # The first token of a text has no log-probability.
        return cls(text, float("nan") if logprob is None else float(logprob), raw, token)

    @classmethod
    def numbered(cls, token: int, logprob: float, text: Any = None):
        """Makes a token from its id and, where the server gives it, its text."""
        return cls(text if isinstance(text, str) else f"{_ID_PREFIX}{token}", logprob, None, token)

    @property
    def is_spelled(self) -> bool:
        """Whether ``text`` is that of the token itself, all of which is shown."""
        return not self.text.startswith(_ID_PREFIX) and bool(self.text) and _REPLACEMENT.decode() not in self.text


@dataclasses.dataclass(frozen=True, eq=False)
class NumberedTokens:
    """Tokens that a server names by id, as arrays, so that no Python code runs once per token.

    Attributes:
        ids: (K,) int64.
        logprobs: (K,) float64. Natural logs of their probabilities; NaN where the server gives none.
        spellings: Bytes of each token, if the server gives them too; empty for tokens that it does not show.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    spellings: Sequence[bytes] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: np.ndarray) -> NumberedTokens:
        """Returns the tokens at given indices, or where a mask is true."""
        spellings = self.spellings
        if spellings is not None:
            indices = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
            spellings = [spellings[index] for index in indices.tolist()]
        return NumberedTokens(self.ids[rows], self.logprobs[rows], spellings)


class TokenMap:
    """Map from the tokens that a server names by id, bytes or string to the ids of a tokenizer.

    Of several tokens with the same bytes it takes the one that the tokenizer uses for the text: an added (special)
    token before one of the vocabulary, and that before a byte fallback token such as ``<0x41>``.

    Args:
        tokenizer: A fast tokenizer, byte-level or with byte fallback.
        vocab_size: V; ids at or above it are unknown.

    Attributes:
        vocab_size: V.
        seen: Number of tokens looked up.
        unmapped: Number of those that have no id.

    Raises:
        ValueError: The tokenizer is of a kind whose tokens have unknown bytes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self._tokenizer, self.vocab_size = tokenizer, vocab_size
        self._bytes = token_bytes(tokenizer)
        self._added = {token: added.content for token, added in tokenizer.added_tokens_decoder.items()}
        self._special = set(tokenizer.all_special_ids)
        added, own, fallback = {}, {}, {}
        for text, token in tokenizer.get_vocab().items():
            ids = added if token in self._added else own if _fallback_byte(text) is None else fallback
            data = self._bytes[token]
            # Two tokens of one kind: no way to tell which is meant.
            ids[data] = _AMBIGUOUS if data in ids else token
        named = fallback | own | added
        self._by_bytes: dict[bytes, int] = {data: token for data, token in named.items() if data and token >= 0}
        self.seen = self.unmapped = 0
        self._examples: dict[str, None] = {}

    def id_of(self, token: ServerToken) -> int | None:
        """Returns the id in [0, V), or None (and counts it) if no token matches or its id stands for other bytes."""
        self.seen += 1
        found = self._find(token)
        if found is None or (token.id is not None and token.data and not self._spells(found, token.data)):
            self.count_unmapped(token)
            return None
        return found

    def have_ids(self, tokens: NumberedTokens) -> np.ndarray:
        """Returns which tokens have an id in [0, V) that stands for the bytes that the server gives, as a mask (K,).

        The others are counted.
        """
        self.seen += len(tokens)
        known = (tokens.ids >= 0) & (tokens.ids < self.vocab_size)
        if tokens.spellings is not None:
            ids = tokens.ids.tolist()
            other = map(operator.ne, map(self._bytes.get, ids), tokens.spellings)
            for index in itertools.compress(range(len(ids)), other):
                known[index] &= not tokens.spellings[index] or ids[index] in self._added
        lost = np.flatnonzero(~known)
        # The examples are the first few.
        for index in lost[:_SHOWN_EXAMPLES].tolist():
            self.count_unmapped(_named(tokens, index))
        self.unmapped += max(0, len(lost) - _SHOWN_EXAMPLES)
        return known

    def count_unmapped(self, token: ServerToken, count: int = 1) -> None:
        """Counts ``count`` entries as lost because of a token."""
        self.unmapped += count
        if len(self._examples) < _SHOWN_EXAMPLES:
            name = repr(token.text) if token.data is None else f"{token.text!r} (bytes {token.data!r})"
            self._examples[name if token.id is None else f"{name} (id {token.id})"] = None

    @property
    def examples(self) -> list[str]:
        """The first tokens without an id."""
        return list(self._examples)

    def pieces_of(self, token: ServerToken) -> list[int] | None:
        """Returns the ids of a token of a document, or None (and counts it) if they are not known.

        Usually there is one id. llama.cpp reports the tokens that make up one character together, with the bytes of all
        and the id of the last. The ids are then the tokenizer's encoding of that character, if it ends in that id.
        """
        self.seen += 1
        found = self._find(token)
        if found is not None and (token.id is None or not token.data or self._spells(found, token.data)):
            return [found]
        if found is not None and token.data is not None:
            pieces = self._tokenizer.encode(token.data.decode(errors="replace"), add_special_tokens=False)
            if pieces and pieces[-1] == found and self.text_of(pieces) == token.data:
                return pieces
        self.count_unmapped(token)
        return None

    def may_be(self, token: ServerToken, expected: int) -> bool:
        """Returns whether a server's name of a token is consistent with an id."""
        if token.id is not None:
            return token.id == expected
        found = self._find(token)
        return found is None or found == expected or self._spells(found, self._bytes.get(expected, b""))

    def text_of(self, ids: list[int]) -> bytes:
        """Returns the bytes of a text without its special tokens, which servers do not show either."""
        return b"".join(self._bytes.get(token, b"") for token in ids if token not in self._special)

    def split(self, ids: list[int], reported: list[ServerToken]) -> Iterator[int]:
        """Yields, for every reported token, the index in ``ids`` of the last id that is a part of it.

        Stops early if the ids and the reported tokens do not match.
        """
        if len(ids) == len(reported):
            for place, token in enumerate(reported):
                if token.id not in (None, ids[place]):
                    return
                yield place
            return
        place = 0
        for token in reported:
            data = b"" if place >= len(ids) else self._bytes.get(ids[place], b"")
            while place + 1 < len(ids) and token.data and len(data) < len(token.data):
                place += 1
                data += self._bytes.get(ids[place], b"")
            if place >= len(ids) or (token.id is not None and ids[place] != token.id):
                return
            yield place
            place += 1

    def _find(self, token: ServerToken) -> int | None:
        if token.id is not None:
            return token.id if 0 <= token.id < self.vocab_size else None
        data = token.text.encode() if token.data is None else token.data
        # A replacement character stands for any bytes that are not UTF-8, rarely for the token that is that character.
        return None if _REPLACEMENT in data else self._by_bytes.get(data)

    def _spells(self, token: int, data: bytes) -> bool:
        # Some servers show the text of special tokens and others do not.
        return token in self._added or self._bytes.get(token) == data


def _named(tokens: NumberedTokens, index: int) -> ServerToken:
    token, data = int(tokens.ids[index]), None if tokens.spellings is None else tokens.spellings[index]
    text = f"{_ID_PREFIX}{token}" if data is None else data.decode(errors="replace")
    return ServerToken(text, float(tokens.logprobs[index]), data, token)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Returns the bytes that each token id stands for in a text.

    Raises:
        ValueError: The tokenizer is not a fast one, or is neither byte-level nor has byte fallback.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else backend.decoder
    kinds = set() if decoder is None else set(_kinds(json.loads(decoder.__getstate__())))
    if "ByteLevel" in kinds:
        spell = _byte_level
    elif kinds & {"ByteFallback", "Metaspace"}:
        spell = _sentence_piece
    else:
        raise ValueError(
            f"the tokenizer must be a fast one, byte-level or with byte fallback, so that the bytes of its tokens are "
            f"known, got {type(tokenizer).__name__} with decoder {sorted(kinds)}"
        )
    added = {token: entry.content for token, entry in tokenizer.added_tokens_decoder.items()}
    return {
        token: added[token].encode() if token in added else spell(text) for text, token in tokenizer.get_vocab().items()
    }


def _kinds(decoder: Any) -> Iterator[str]:
    if isinstance(decoder, dict):
        yield decoder["type"]
        for part in decoder.get("decoders", ()):
            yield from _kinds(part)


def _byte_alphabet() -> dict[str, int]:
    """Returns the byte for each of the printable characters that stand for bytes in GPT-2's encoder.py."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


# A table for ``str.translate``: the bytes as the characters of Latin-1. Characters that stand for no byte have no byte
# in Latin-1 afterwards either.
_ALPHABET = dict.fromkeys(range(256), 65535) | {ord(key): byte for key, byte in _byte_alphabet().items()}


def _byte_level(text: str) -> bytes:
    try:
        return text.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return text.encode()


def _sentence_piece(text: str) -> bytes:
    byte = _fallback_byte(text)
    return text.replace("\u2581", " ").encode() if byte is None else bytes([byte])


def _fallback_byte(text: str) -> int | None:
    """Returns the byte of a token like ``<0x0A>``, or None for other tokens."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            pass
    return None


def _unescaped(text: str) -> bytes:
    r"""Converts text such as ``\xe2\x80`` to bytes."""
    try:
        return text.encode("latin-1").decode("unicode_escape").encode("latin-1")
    except (UnicodeError, ValueError):
        return text.encode()
