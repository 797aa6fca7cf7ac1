"""Writes a teacher's document in a student's tokens, and finds the places at which tokens of both begin."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from slimkernels.exchange.token_bytes import (
    Pieces,
    TokenMap,
    counterparts_of_specials,
    is_in_words,
    map_tokens,
    read_pieces,
)

# A character of UTF-8 has at most three bytes after its first.
_MAX_CONTINUATION = 3


class UntranslatableError(ValueError):
    """A document that cannot be written in the student's tokens; the message is a reason without its details."""


class AlignedDocument(NamedTuple):
    """A document in the student's tokens.

    Attributes:
        input_ids: (S,) int64 ids of the student.
        place: (S,) int64, the teacher's token in which each of the student's tokens begins, as its index in the
            teacher's document.
        is_aligned: (S,) bool, whether a token of the teacher begins at the same byte.
        begins_word: (S,) bool, whether the text before the token leaves room for a new word; the row of ``TokenMap``.
        prompt_length: Number of the student's tokens that begin within the prompt.
    """

    input_ids: np.ndarray
    place: np.ndarray
    is_aligned: np.ndarray
    begins_word: np.ndarray
    prompt_length: int


class Aligner:
    """Translates token ids of a teacher's tokenizer to those of a student's, byte for byte of the text.

    A document is cut at the teacher's special tokens. Those with a counterpart (``counterparts_of_specials``) become
    it, a start of text at the beginning is replaced by the student's if the student's tokenizer adds one, and the text
    between them is encoded by the student's tokenizer. Bytes of a character that was cut in two, at the ends of a
    text, are left out.

    A token begins at the byte where the tokens before it end. The tokens of a student that changes the text (lower
    case, spaces that are dropped) begin where the part of the original text that its tokenizer names begins, with the
    dropped bytes before it.

    Args:
        teacher: Tokenizer of the teacher.
        student: Tokenizer of the student.

    Raises:
        ValueError: A tokenizer is of a kind whose bytes are not known, or the teacher's is WordPiece, from whose tokens
            the text cannot be restored.
    """

    def __init__(self, teacher: Any, student: Any) -> None:
        self._student_tokenizer = student
        self.teacher, self.student = read_pieces(teacher, "teacher"), read_pieces(student, "student")
        if self.teacher.kind == "wordpiece":
            raise ValueError(
                "the teacher's tokenizer must be byte-level BPE or SentencePiece, got WordPiece, whose tokens do not "
                "hold the text of the documents: capture a teacher with another tokenizer"
            )
        self._roles = counterparts_of_specials(self.teacher, self.student, teacher, student)
        self.map: TokenMap = map_tokens(self.teacher, self.student, self._roles, student)
        self._is_special = np.zeros(len(self.teacher.texts), bool)
        self._is_special[list(self.teacher.specials.values())] = True
        self._teacher_bos = teacher.bos_token_id
        start = student.bos_token_id
        self._student_bos = start if start is not None and student("a")["input_ids"][:1] == [start] else None
        self._space_at_start, self._space_after_special = _added_spaces(teacher, self.teacher)

    def __call__(self, input_ids: np.ndarray, prompt_length: int = 0) -> AlignedDocument:
        """Translates one document.

        Args:
            input_ids: (T,) token ids of the teacher.
            prompt_length: Number of tokens at the beginning that are a prompt; 0 if that is not known.

        Raises:
            UntranslatableError: A special token has no counterpart, a token has no text, or the text is no UTF-8.
        """
        is_special = self._is_special[input_ids]
        lengths = np.where(is_special, 1, self.teacher.lengths[input_ids])
        # A token that begins with a space which is not in the text is no token of the text.
        is_whole = np.ones(len(input_ids), bool)
        # Ids, first bytes and sizes of the student's tokens, part by part.
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        ends_in_word: list[np.ndarray] = []
        size = 0
        edges = [-1, *np.flatnonzero(is_special).tolist(), len(input_ids)]
        for before, after in itertools.pairwise(edges):
            if before >= 0:
                counterpart = self._special(int(input_ids[before]), before)
                if counterpart is not None:
                    parts.append((np.array([counterpart]), np.array([size]), np.array([1])))
                # Special tokens count as one byte, after which a word may begin.
                ends_in_word.append(np.zeros(1, bool))
                size += 1
            data = self.teacher.joined(input_ids[before + 1 : after])
            if data is None:
                raise UntranslatableError("a token of the teacher has no text")
            if data[:1] == b" " and (self._space_at_start if before < 1 else self._space_after_special):
                data = data[1:]
                lengths[before + 1] -= 1
                is_whole[before + 1] = False
            text, skipped = _whole_characters(data)
            if text:
                ids, starts, sizes = self._encode(text)
                parts.append((ids, starts + (size + skipped), sizes))
            ends_in_word.append(_ends_in_word(text, skipped, len(data)))
            size += len(data)
        if self._student_bos is not None and not (parts and parts[0][0][0] == self._student_bos):
            parts.insert(0, (np.array([self._student_bos]), np.zeros(1, np.int64), np.zeros(1, np.int64)))
        if not parts:
            raise UntranslatableError("there is no text")
        ids, starts, sizes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        ends = np.cumsum(lengths)
        begins = ends - lengths
        # The last of several tokens that begin at one byte is the one that has bytes.
        place = np.searchsorted(begins, starts, side="right") - 1
        return AlignedDocument(
            input_ids=ids,
            place=place,
            is_aligned=(begins[place] == starts) & (sizes > 0) & is_whole[place],
            begins_word=~np.concatenate([[False], *ends_in_word])[starts],
            prompt_length=int((starts < ends[prompt_length - 1]).sum()) if prompt_length else 0,
        )

    def _special(self, number: int, position: int) -> int | None:
        """Returns the student's id of a special token of the teacher, None to leave it out."""
        if number in self._roles:
            return self._roles[number]
        if position == 0 and number == self._teacher_bos:
            return self._student_bos
        raise UntranslatableError(
            f"the student's tokenizer has no {self.teacher.names[number]}: add it as a special token"
        )

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encodes a text by the student's tokenizer; returns ids, first bytes and sizes, 0 for no part of it."""
        # Text that reads like a special token is text, as it was for the teacher.
        encoded = self._student_tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        ids = np.array(encoded["input_ids"], np.int64)
        data = text.encode()
        joined = self.student.joined(ids)
        if joined in (data, b" " + data):
            sizes = self.student.lengths[ids]
            starts = np.cumsum(sizes) - sizes
            if joined != data:
                # The space before the text is not in it, so the first token is no token of the text.
                starts[1:] -= 1
                sizes[0] = 0
            return ids, starts, sizes
        ends = _byte_offsets(text)[np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)[:, 1]]
        # Offsets of a normaliser may go back.
        ends = np.maximum.accumulate(ends)
        begins = np.concatenate([[0], ends])[:-1]
        return ids, begins, ends - begins


def _added_spaces(tokenizer: Any, pieces: Pieces) -> tuple[bool, bool]:
    """Returns whether a tokenizer puts a space before a text, at its start and after a special token."""

    def is_added(prefix: str, count: int) -> bool:
        ids = tokenizer(prefix + "a", add_special_tokens=False)["input_ids"]
        return pieces.joined(np.array(ids[count:], np.int64)) == b" a"

    special = next(iter(pieces.specials), None)
    return is_added("", 0), special is not None and is_added(special, 1)


def _ends_in_word(text: str, skipped: int, size: int) -> np.ndarray:
    """Returns for each of ``size`` bytes, of which the text begins after ``skipped``, whether a word goes on after it.

    That is so after the last byte of a character of a word; the bytes within a character are like its last.
    """
    flags = np.zeros(size, bool)
    points, inverse = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True)
    in_words = np.array([is_in_words(chr(point)) for point in points.tolist()], bool)[inverse]
    flags[skipped : skipped + len(text.encode())] = np.repeat(in_words, np.diff(_byte_offsets(text)))
    return flags


def _whole_characters(data: bytes) -> tuple[str, int]:
    """Returns the text of bytes without incomplete characters at both ends, and the number of bytes before it."""
    start = 0
    while start < min(len(data), _MAX_CONTINUATION) and data[start] & 0xC0 == 0x80:
        start += 1
    data = data[start:]
    try:
        return data.decode(), start
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            raise UntranslatableError("its bytes are no UTF-8") from error
        return data[: error.start].decode(), start


def _byte_offsets(text: str) -> np.ndarray:
    """Returns the (C + 1,) offsets in UTF-8 of the C characters of a text, and its size."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)])
