"""Reads the bytes that each token of a tokenizer stands for, and finds the same token in another tokenizer."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import numpy as np

# The character by which SentencePiece writes a space.
_SPACE = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# Byte-level BPE writes these bytes as themselves, and the others, in their order, as the characters from U+0100 on.
_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTE_OF_CHARACTER = {
    256 + index: byte for index, byte in enumerate(byte for byte in range(256) if byte not in _PRINTED)
}
# Characters of Chinese, each of which is a word to WordPiece.
_CHINESE = (range(0x3400, 0x4DC0), range(0x4E00, 0xA000), range(0xF900, 0xFB00), range(0x20000, 0x2FA20))


class Pieces(NamedTuple):
    """The tokens of a tokenizer by id.

    Attributes:
        kind: Way in which tokens are written, "byte-level", "sentencepiece" or "wordpiece".
        texts: Bytes of every token; None for special tokens, for ids without a token and for all of WordPiece, whose
            tokens do not say whether a space precedes them.
        names: Every token as the vocabulary writes it; None for ids without one.
        specials: Ids of the special tokens by name.
        lengths: (V,) int64, the number of bytes of each token; 0 where ``texts`` has None.
    """

    kind: str
    texts: list[bytes | None]
    names: list[str | None]
    specials: dict[str, int]
    lengths: np.ndarray

    def joined(self, ids: np.ndarray) -> bytes | None:
        """Returns the bytes of consecutive tokens, None if one of them has none."""
        parts = [self.texts[number] for number in ids.tolist()]
        known = [part for part in parts if part is not None]
        return b"".join(known) if len(known) == len(parts) else None


def read_pieces(tokenizer: Any, role: str) -> Pieces:
    """Reads the tokens of a tokenizer.

    Args:
        tokenizer: A transformers tokenizer that the package tokenizers runs.
        role: "teacher" or "student", for errors.

    Raises:
        ValueError: The tokenizer is of another kind than the three of ``Pieces``.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = None if backend is None else _kind_of(backend)
    if backend is None or kind is None:
        decoder = None if backend is None else type(backend.decoder).__name__
        raise ValueError(
            f"the {role}'s tokenizer must be byte-level BPE, SentencePiece or WordPiece in the form of a "
            f"tokenizer.json, got {type(tokenizer).__name__} with the decoder {decoder}: the bytes of its tokens are "
            "not known"
        )
    vocab: dict[str, int] = tokenizer.get_vocab()
    size = max(vocab.values(), default=-1) + 1
    literal = backend.get_added_tokens_decoder()
    special_ids = {number for number, token in literal.items() if token.special} | set(tokenizer.all_special_ids)
    texts: list[bytes | None] = [None] * size
    names: list[str | None] = [None] * size
    for name, number in vocab.items():
        names[number] = name
        if number not in special_ids and kind != "wordpiece":
            texts[number] = name.encode() if number in literal else _bytes_of(name, kind)
    return Pieces(
        kind=kind,
        texts=texts,
        names=names,
        specials={name: number for name, number in vocab.items() if number in special_ids},
        lengths=np.array([len(text or b"") for text in texts], np.int64),
    )


def _kind_of(backend: Any) -> str | None:
    """Returns the ``kind`` of ``Pieces`` of a tokenizer of the package tokenizers, None for another one."""
    if type(backend.model).__name__ == "WordPiece":
        return "wordpiece"
    # A decoder is pickled as the part of tokenizer.json that describes it.
    decoder = "" if backend.decoder is None else json.dumps(json.loads(backend.decoder.__getstate__()))
    if '"ByteLevel"' in decoder:
        return "byte-level"
    return "sentencepiece" if json.dumps(_SPACE).strip('"') in decoder else None


def _bytes_of(name: str, kind: str) -> bytes | None:
    if kind == "byte-level":
        try:
            return name.translate(_BYTE_OF_CHARACTER).encode("latin-1")
        except UnicodeEncodeError:
            return None
    if piece := _BYTE_PIECE.fullmatch(name):
        return bytes([int(piece[1], 16)])
    return name.replace(_SPACE, " ").encode()


def is_in_words(character: str) -> bool:
    """Returns whether WordPiece goes on with a word after this character and with it."""
    return character.isalnum() and not any(ord(character) in block for block in _CHINESE)


class TokenMap(NamedTuple):
    """The ids that a teacher's tokens have in a student's vocabulary.

    Attributes:
        ids: (2, V + 1) int32 student ids of the V teacher ids, -1 where there is none, and in the last column, which
            the padding of a row reaches. Row 1 holds at places where a word may begin, row 0 within a word. They differ
            for WordPiece alone.
        is_injective: Whether no two teacher ids have the same student id.
    """

    ids: np.ndarray
    is_injective: bool

    @property
    def num_mapped(self) -> int:
        """The number of teacher ids that have a student id at some place."""
        return int((self.ids >= 0).any(0).sum())


def map_tokens(teacher: Pieces, student: Pieces, roles: dict[int, int], student_tokenizer: Any) -> TokenMap:
    """Finds the student's token for each of the teacher's.

    An ordinary token has the student's token of exactly the same bytes. WordPiece reads normalised text and cuts it at
    spaces: its token for a teacher's is that of the normalised text without spaces around it, with "##" before it
    where the text goes on with a word. A special token has the one of ``roles``.

    Args:
        teacher: Tokens of the teacher.
        student: Tokens of the student.
        roles: Student ids of the teacher's special tokens that have one.
        student_tokenizer: Tokenizer of the student.
    """
    ids = np.full((2, len(teacher.texts) + 1), -1, np.int32)
    if student.kind == "wordpiece":
        ids[:, :-1] = _wordpiece_ids(teacher, student, student_tokenizer)
    else:
        # Text is encoded by bytes only where there is no other token, so the others count where both exist.
        by_text: dict[bytes, int] = {}
        for is_byte in (True, False):
            for number, (text, name) in enumerate(zip(student.texts, student.names, strict=True)):
                if text is not None and is_byte == (_BYTE_PIECE.fullmatch(name or "") is not None):
                    by_text[text] = number
        ids[:, :-1] = [-1 if text is None else by_text.get(text, -1) for text in teacher.texts]
    for number, counterpart in roles.items():
        ids[:, number] = counterpart
    mapped = [row[row >= 0] for row in ids]
    return TokenMap(ids, all(len(np.unique(row)) == len(row) for row in mapped))


def _wordpiece_ids(teacher: Pieces, student: Pieces, tokenizer: Any) -> np.ndarray:
    """Returns the (2, V) WordPiece ids of the teacher's tokens, within a word and where one may begin."""
    backend = tokenizer.backend_tokenizer
    prefix = backend.model.continuing_subword_prefix
    ordinary = set(student.specials.values())
    vocab = {name: number for number, name in enumerate(student.names) if name and number not in ordinary}
    ids = np.full((2, len(teacher.texts)), -1, np.int32)
    for number, text in enumerate(teacher.texts):
        try:
            written = (text or b"").decode()
        except UnicodeDecodeError:
            continue
        normalised = written if backend.normalizer is None else backend.normalizer.normalize_str(written)
        word = normalised.strip()
        if not word:
            continue
        goes_on = not normalised[0].isspace() and is_in_words(word[0])
        ids[0, number] = vocab.get(prefix + word if goes_on else word, -1)
        ids[1, number] = -1 if word.startswith(prefix) else vocab.get(word, -1)
    return ids


def counterparts_of_specials(teacher: Pieces, student: Pieces, teacher_tokenizer: Any, student_tokenizer: Any) -> dict:
    """Returns the student ids of the teacher's special tokens: that of the same name, or the end of text for it."""
    roles = {number: student.specials[name] for name, number in teacher.specials.items() if name in student.specials}
    end, student_end = teacher_tokenizer.eos_token_id, student_tokenizer.eos_token_id
    if end is not None and student_end is not None:
        roles.setdefault(end, student_end)
    return roles
