"""What a server calls a token, mapped to the tokenizer's ids byte for byte."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

_ID_PREFIX = "token_id:"
_BYTES_PREFIX = "bytes:"
_SHOWN_EXAMPLES = 5
_REPLACEMENT = "\ufffd".encode()


class ServerToken(NamedTuple):
    """One token as a server names it.

    Attributes:
        text: Its string; where its bytes are no UTF-8, servers put replacement characters, or nothing.
        logprob: Natural log of its probability.
        data: Its bytes, where the server gives them.
        id: Its id, where the server gives it.
    """

    text: str
    logprob: float
    data: bytes | None = None
    id: int | None = None

    @classmethod
    def named(cls, text: str, logprob: float | None, data: list[int] | None = None, token: int | None = None):
        r"""Reads the ways of naming a token that servers have.

        vLLM's ``return_tokens_as_token_ids`` gives "token_id:123", with the bytes of that string beside it; the
        old completions of OpenAI give "bytes:\xe2\x80" for what is no UTF-8.
        """
        raw = None if data is None else bytes(data)
        if text.startswith(_ID_PREFIX) and text[len(_ID_PREFIX) :].isdecimal():
            token, raw = int(text[len(_ID_PREFIX) :]), None
        elif raw is None and text.startswith(_BYTES_PREFIX):
            raw = _unescaped(text[len(_BYTES_PREFIX) :])
        # None for a first token, about which a teacher says nothing.
        return cls(text, float("nan") if logprob is None else float(logprob), raw, token)


class TokenMap:
    """Finds the id of a token that a server names by id, bytes or string.

    Where tokens share their bytes, the one is meant that the tokenizer gives for the text: an added (special) token
    before one of the vocabulary, and that before a byte fallback token such as ``<0x41>``.

    Args:
        tokenizer: A fast tokenizer, byte-level or with byte fallback.
        vocab_size: V; ids at or above it are unknown.

    Attributes:
        vocab_size: V.
        seen: Tokens looked up.
        unmapped: Those among them that have no id.

    Raises:
        ValueError: The bytes of this kind of tokenizer's tokens are not known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self._tokenizer, self.vocab_size = tokenizer, vocab_size
        self._bytes = token_bytes(tokenizer)
        self._added = {token: added.content for token, added in tokenizer.added_tokens_decoder.items()}
        self._special = set(tokenizer.all_special_ids)
        ranked: dict[bytes, list[tuple[int, int]]] = collections.defaultdict(list)
        for token, data in self._bytes.items():
            text = str(tokenizer.convert_ids_to_tokens(token))
            rank = 0 if token in self._added else 2 if _fallback_byte(text) is not None else 1
            ranked[data].append((rank, token))
        self._by_bytes: dict[bytes, int] = {}
        for data, candidates in ranked.items():
            best = min(candidates)[0]
            tokens = [token for rank, token in candidates if rank == best]
            # Two tokens of one kind: no way to tell which is meant.
            if data and len(tokens) == 1:
                self._by_bytes[data] = tokens[0]
        self.seen = self.unmapped = 0
        self._examples: dict[str, None] = {}

    def id_of(self, token: ServerToken) -> int | None:
        """Its id in [0, V), or None, which is counted: no such token, or an id that stands for other bytes."""
        self.seen += 1
        found = self._find(token)
        if found is None or (token.id is not None and token.data and not self._spells(found, token.data)):
            self.count_unmapped(token)
            return None
        return found

    def count_unmapped(self, token: ServerToken, count: int = 1) -> None:
        """Counts entries that are lost because of a token."""
        self.unmapped += count
        if len(self._examples) < _SHOWN_EXAMPLES:
            name = repr(token.text) if token.data is None else f"{token.text!r} (bytes {token.data!r})"
            self._examples[name if token.id is None else f"{name} (id {token.id})"] = None

    @property
    def examples(self) -> list[str]:
        """A few tokens without an id."""
        return list(self._examples)

    def pieces_of(self, token: ServerToken) -> list[int] | None:
        """The ids of a token of a document; None where they are not known, which is counted.

        Usually one. llama.cpp reports the tokens that make up one character together: the bytes of all, and the id
        of the last. The tokenizer's own way to write that character is taken if it ends in that id.
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
        """Whether a server's name for a token does not contradict an id."""
        found = self._find(token)
        return (
            found is None
            or found == expected
            or (token.id is None and self._spells(found, self._bytes.get(expected, b"")))
        )

    def text_of(self, ids: list[int]) -> bytes:
        """The bytes of a text, its special tokens left out, as servers do."""
        return b"".join(self._bytes.get(token, b"") for token in ids if token not in self._special)

    def split(self, ids: list[int], reported: list[ServerToken]) -> Iterator[int]:
        """For every reported token, the place in ``ids`` of the last of the ids that make it up.

        Ends early where the two do not fit together.
        """
        if len(ids) == len(reported):
            yield from range(len(ids))
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
        # It stands for any bytes that are no UTF-8, and seldom for the token of its own that vocabularies have.
        return None if _REPLACEMENT in data else self._by_bytes.get(data)

    def _spells(self, token: int, data: bytes) -> bool:
        # Servers show special tokens or hide them.
        return token in self._added or self._bytes.get(token) == data


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """The bytes that each token id stands for in a text.

    Raises:
        ValueError: The tokenizer is neither byte-level nor with byte fallback, or not a fast one.
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
    """The printable character that stands for each byte, as in GPT-2's encoder.py."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level(text: str) -> bytes:
    if all(character in _ALPHABET for character in text):
        return bytes(_ALPHABET[character] for character in text)
    return text.encode()


def _sentence_piece(text: str) -> bytes:
    byte = _fallback_byte(text)
    return text.replace("\u2581", " ").encode() if byte is None else bytes([byte])


def _fallback_byte(text: str) -> int | None:
    """The byte of a token like ``<0x0A>``."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            pass
    return None


def _unescaped(text: str) -> bytes:
    r"""``\xe2\x80`` to bytes."""
    try:
        return text.encode("latin-1").decode("unicode_escape").encode("latin-1")
    except (UnicodeError, ValueError):
        return text.encode()
