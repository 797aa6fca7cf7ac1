r"""Answers in texts: the one rule by which branches finish, candidates vote, and outputs are scored.

A text announces an answer with "the answer is", "Answer:", ``####`` or ``\boxed``. An announcement is complete if the
answer stands right behind it: ``The answer is 18, because ...``, ``Answer: 18``, ``#### 18``, ``\boxed{18}``. A branch
finishes at its first complete announcement, and ``extract`` reads the last one. "Answer:" or ``####`` in front of a
whole solution is an incomplete announcement, since nothing tells where the solution ends: it finishes no branch, and
the answer is the last one in the solution.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from slimkernels.search.answer_numbers import (
    first_number,
    is_read_whole,
    last_number,
    last_result,
    leading_number,
    plain,
    spell,
)

AnswerKind = Literal["number", "yes_no", "letter", "any"]
ANSWER_KINDS: tuple[AnswerKind, ...] = ("any", "number", "yes_no", "letter")


class Extraction(NamedTuple):
    """The answers found in a text, in canonical spelling.

    Attributes:
        strict: The announced answer; None if none was found.
        flexible: The announced answer, or else the last possible one; None if none was found.
    """

    strict: str | None
    flexible: str | None


# Characters of a line in which an announced answer is looked for: a model in a loop may write one of any length.
_MAX_LINE = 2000
_BEFORE_LINE = re.compile(r"[ \t:*=\n]*")


class _Announcement(NamedTuple):
    """A place where a text announces its answer.

    Attributes:
        marker: "boxed", "is" for "the answer is", "colon" for "Answer:", or "hashes".
        source: Text that announces it.
        start: Index behind the marker.
        end: Index at which the box, or else ``source``, ends.
    """

    marker: Literal["boxed", "is", "colon", "hashes"]
    source: str
    start: int
    end: int

    @property
    def text(self) -> str:
        """Content of the box, or all the text after the marker."""
        return self.source[self.start : self.end]

    @property
    def line(self) -> str:
        """The first line with text after the marker, since the answer may stand below it."""
        begin = self._line_begin
        return self.source[begin : min(begin + _MAX_LINE, self.end)].partition("\n")[0]

    @property
    def is_below(self) -> bool:
        """Whether that line is below the marker."""
        return self.source.find("\n", self.start, self._line_begin) >= 0

    @property
    def _line_begin(self) -> int:
        found = _BEFORE_LINE.match(self.source, self.start, self.end)
        return self.start if found is None else found.end()


class _Reader(NamedTuple):
    """The rules for answers of one kind. All take plain text and the choices.

    Attributes:
        complete: Reads the answer of a complete announcement; None if the announcement is incomplete.
        of_solution: Reads the answer of a solution behind an incomplete announcement.
        anywhere: Reads the last possible answer of a text that announces none.
    """

    complete: Callable[[_Announcement, Sequence[str]], str | None]
    of_solution: Callable[[str, Sequence[str]], str | None]
    anywhere: Callable[[str, Sequence[str]], str | None]


def extract(text: str, kind: AnswerKind, choices: Sequence[str] = ()) -> Extraction:
    """Extracts the strict and the flexible answer from a text.

    Args:
        text: Output of a model.
        kind: "number" (commas, currency signs, units, decimals, fractions, signs and their LaTeX are understood; the
            answer is a decimal or a fraction), "yes_no" (the answer is "yes" or "no"; "true" and "false" count as
            these), "letter" (the answer is the upper-case letter of a choice), or "any" (the announced text; a text
            that announces none has no answer).
        choices: Texts that the letters A, B, ... stand for, for "letter". If no letter is found, but the announced line
            or the last line names exactly one of the texts, its letter is the answer. Letters beyond the last choice
            are ignored.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    reader = _reader(kind)
    text = _own_text(plain(text), reader, choices)
    strict = _complete(text, reader, choices)
    if strict is None:
        strict = _of_solution(text, reader, choices)
    return Extraction(strict, reader.anywhere(text, choices) if strict is None else strict)


def finishes(text: str, kind: AnswerKind, choices: Sequence[str] = ()) -> bool:
    """Returns whether a branch with this text is finished.

    It is finished if it announces an answer completely, which is then the strict answer of ``extract``, or if it asks
    itself another question ("Q: ...") after a possible answer. The arguments are those of ``extract``.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    reader = _reader(kind)
    text = plain(text)
    before = _before_next_question(text, reader, choices)
    return len(before) < len(text) or _complete(_without_questions(before), reader, choices) is not None


def before_next_question(text: str) -> str:
    """Returns the text up to the first question that the model asks itself after any other text."""
    for found in _QUESTION.finditer(text):
        if _without_questions(text[: found.start()]).strip():
            return text[: found.start()]
    return text


def same_answer(answer: str | None, reference: str, kind: AnswerKind) -> bool:
    """Returns whether an answer equals the reference; numbers are compared by value, so "1/2" equals "0.5".

    Raises:
        ValueError: ``reference`` is not an answer of this kind.
    """
    expected = canonical(reference, kind)
    if expected is None:
        raise ValueError(f"reference must be an answer of kind {kind!r}, got {reference!r}: check the data file")
    return answer is not None and canonical(answer, kind) == expected


def canonical(answer: str, kind: AnswerKind) -> str | None:
    """Returns the canonical spelling of a bare answer, without any text around it; None if it is not an answer.

    For "any", answers of equal value have the same spelling: ``$18``, ``18 dollars`` and ``18.00`` are all "18".
    """
    answer = answer.strip()
    if kind == "number":
        return _spelled(parse_number(answer))
    if kind == "yes_no":
        return _YES.get(answer.lower())
    if kind == "letter":
        return answer.upper() if re.fullmatch(r"[A-Za-z]", answer) else None
    return _canonical_text(plain(answer))


def parse_number(text: str) -> Fraction | None:
    """Returns the exact value of the first number in a text; None without one, or if it has over 1000 characters."""
    return first_number(plain(text))


def _reader(kind: AnswerKind) -> _Reader:
    if kind not in _READERS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, _READERS))}, got {kind!r}")
    return _READERS[kind]


_QUESTION = re.compile(r"(?:^|(?<=\n))[^\S\n]*(?:Q|Question)[^\S\n]*:[^\n]*")
# Some models repeat the "A:" with which a prompt of the form "Q: ... A:" ends.
_OWN_PREFIX = re.compile(r"^\s*A:")


def _own_text(text: str, reader: _Reader, choices: Sequence[str]) -> str:
    """Returns the part of a text that may hold its answer: up to the next question, and without one that it repeats."""
    return _without_questions(_before_next_question(text, reader, choices))


def _before_next_question(text: str, reader: _Reader, choices: Sequence[str]) -> str:
    """Cuts a text at its first question after a possible answer; a question before any answer repeats the prompt's."""
    end, unread, is_start = 0, "", True
    for found in _QUESTION.finditer(text):
        unread += text[end : found.start()]
        end = found.end()
        # Only text can hold an answer, and a loop of the model may hold hundreds of questions.
        if not unread.strip():
            continue
        if is_start:
            unread, is_start = _OWN_PREFIX.sub("", unread), False
        if _complete(unread, reader, choices) is not None or reader.anywhere(unread, choices) is not None:
            return text[: found.start()]
        # An answer announced at the end may follow; everything before it was read without finding an answer.
        unread = unread[unread.rstrip().rfind("\n") + 1 :]
    return text


def _without_questions(text: str) -> str:
    return _OWN_PREFIX.sub("", _QUESTION.sub("", text))


_MARKER = re.compile(
    r"\\(?:boxed|fbox)(?![A-Za-z])"
    # A heading such as "#### Final answer" announces the lines below it without a colon.
    r"|(?P<colon>\banswer\s*[:=]|(?:^|(?<=\n))[^\S\n]*\#+[^\S\n]*(?:final[^\S\n]+)?answer[^\S\n]*(?=\n))"
    r"|(?P<is>\banswer(?:\s+(?:to|for|in)\s[^\n.:;?!]{1,60}?)?\s+(?:is|was|would\s+be|should\s+be|must\s+be|equals)\b)"
    r"|(?P<hashes>\#\#\#\#)",
    re.IGNORECASE,
)
# "To see what the answer is, ..." and "once the answer is known" announce nothing.
_NOT_ANNOUNCED = re.compile(
    r"\b(?:what|whatever|whether|if|once|until|unless|when|how|why)\s+(?:[a-z]+\s+){0,3}$", re.IGNORECASE
)
_MAX_CONDITION_LENGTH = 100  # characters before "the answer is" in which it is looked for


def _announcements(text: str) -> Iterator[_Announcement]:
    """Yields the announcements of a text in order."""
    box_ends = None
    for found in _MARKER.finditer(text):
        if found["colon"]:
            yield _Announcement("colon", text, found.end(), len(text))
        elif found["hashes"]:
            yield _Announcement("hashes", text, found.end(), len(text))
        elif not found["is"]:
            box_ends = _brace_ends(text) if box_ends is None else box_ends
            box = _BOXED.match(text, found.end())
            if box is not None and box["word"]:
                yield _Announcement("boxed", text, *box.span("word"))
            elif box is not None and box.end() in box_ends:
                yield _Announcement("boxed", text, box.end(), box_ends[box.end()])
        elif not _NOT_ANNOUNCED.search(text, max(0, found.start() - _MAX_CONDITION_LENGTH), found.start()):
            yield _Announcement("is", text, found.end(), len(text))


# Text behind \boxed: the braces with its content, or a word without any.
_BOXED = re.compile(r" *(?:\{|(?P<word>[^\s${][^\s$]*))")


def _brace_ends(text: str) -> dict[int, int]:
    """Returns where the content of each pair of braces ends, by where it begins."""
    ends, open_at = {}, []
    for found in re.finditer(r"[{}]", text):
        if found[0] == "{":
            open_at.append(found.end())
        elif open_at:
            ends[open_at.pop()] = found.start()
    return ends


def _complete(text: str, reader: _Reader, choices: Sequence[str]) -> str | None:
    """Returns the answer of the last complete announcement."""
    for announcement in reversed(list(_announcements(text))):
        answer = reader.complete(announcement, choices)
        if answer is not None:
            return answer
    return None


def _of_solution(text: str, reader: _Reader, choices: Sequence[str]) -> str | None:
    """Returns the answer of the solution behind the last "Answer:" or hashes."""
    solutions = [found for found in _announcements(text) if found.marker in ("colon", "hashes")]
    return reader.of_solution(solutions[-1].text, choices) if solutions else None


def _spelled(value: Fraction | None) -> str | None:
    return None if value is None else spell(value)


def _complete_number(announcement: _Announcement, _: Sequence[str]) -> str | None:
    if announcement.marker == "boxed":
        result = announcement.text.rpartition("=")[2]
        if len(result) > _MAX_LINE or not is_read_whole(result):
            return None
        value = first_number(result)
        return _spelled(first_number(announcement.text) if value is None else value)
    # The announcement of a box is the box.
    if re.match(r"[\s$({]*\\(?:boxed|fbox)", announcement.line):
        return None
    found = leading_number(announcement.line, after_words=announcement.marker == "is")
    if found is None or (announcement.is_below and re.match(r"[.):]\s+\S", found.rest)):
        return None
    if announcement.marker == "is":
        return spell(found.value)
    # "Answer: 48/2 = 24 clips in May." may be the first line of a solution, and "#### 1. Add" is a heading.
    alone = not found.is_result and (found.is_alone or (announcement.marker == "colon" and found.has_remark))
    return spell(found.value) if alone else None


def _number_of_solution(text: str, _: Sequence[str]) -> str | None:
    lines = [line for line in text.splitlines() if line.strip()]
    found = leading_number(lines[0].lstrip(" \t:*=")) if len(lines) == 1 else None
    return _spelled(last_result(text) if found is None else found.value)


def _last_number(text: str, _: Sequence[str]) -> str | None:
    return _spelled(last_number(text))


_YES = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_OPPOSITE = {"yes": "no", "no": "yes"}
# "no" is an answer only before punctuation, a connective or the end of a line: "no evidence" is none.
_YES_NO = r"(?:(?P<not>\b(?:not|n[\u2019']t|isn[\u2019']t)\s+(?:[a-z]+ly\s+)?)?\b(?P<yes>yes|true|false)\b" + (
    r"|\b(?P<no>no)\b(?=\s*(?:[-.,;:!?)}\]\"'*\n\u2013\u2014]|$|(?:because|since|as|but|and|for|so|it|they|he|she)\b)))"
)
_ANY_YES_NO = re.compile(_YES_NO, re.IGNORECASE)
_LEADING_YES_NO = re.compile(
    r"[\s:*\"'({\[$]*(?:(?:[a-z]+ly|thus|hence|then|just|also|a|clear|that|it\s+is|it[\u2019']s|this\s+is|most)[\s,:*\"']+)*"
    + _YES_NO,
    re.IGNORECASE,
)
_UNDECIDED = re.compile(
    r"\b(?:neither|unclear|unknown|uncertain|undecided|undetermined|depends|not\s+(?:known|clear|sure))\b"
)


def _yes_no(found: re.Match[str]) -> str:
    answer = _YES[(found["yes"] or found["no"]).lower()]
    return _OPPOSITE[answer] if found["not"] else answer


def _complete_yes_no(announcement: _Announcement, _: Sequence[str]) -> str | None:
    line = announcement.line
    found = _LEADING_YES_NO.match(line)
    if announcement.marker == "hashes":
        return _yes_no(found) if found is not None and not line[found.end() :].strip(" .*!") else None
    if found is None and announcement.marker == "is" and _UNDECIDED.search(line) is None:
        found = _last(_ANY_YES_NO, line)
    return None if found is None else _yes_no(found)


def _any_yes_no(text: str, _: Sequence[str]) -> str | None:
    """Returns the first word if it is an answer, or else the last word that stands alone as one."""
    found = re.match(r"\W*" + _YES_NO, text, re.IGNORECASE) or _last(_ANY_YES_NO, text)
    return None if found is None else _yes_no(found)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    matches = list(pattern.finditer(text))
    return matches[-1] if matches else None


_LEADING_LETTER = re.compile(
    r"[\s:*\"'({\[$-]*(?P<named>(?:the\s+)?(?:correct\s+)?(?:option|choice|letter|answer)\s+)?[\"'({\[*]*"
    r"(?P<letter>[A-Za-z])(?![\w'\u2019])",
    re.IGNORECASE,
)
_LETTER_ENDS = re.compile(r"\s*[)\].:,}*]|\s+[-\u2013\u2014]|\s*[\u2013\u2014]|[\s\"'$]*$")
_LETTER_REASON = re.compile(r"\s+(?:is|because|since)\b")
_MARKED_LETTER = re.compile(
    r"(?<!\w)\(([A-Za-z])\)|\[([A-Z])\]|\b(?:[Oo]ption|[Cc]hoice)\s+\(?([A-Za-z])\b"
    r"|\b([A-Z])\b(?=\s*(?:[).:,]|\n|$)|\s+[\u2013\u2014-]\s)"
    r"|(?:^|(?<=\n))[^\S\n]*([a-z])(?=[).:](?:\s|$)|\s*(?:\n|$))"
)


def _leading_letter(line: str, choices: Sequence[str], *, alone: bool = False) -> str | None:
    """Reads the letter with which a line begins; "A bank" and "I think" begin with a word."""
    found = _LEADING_LETTER.match(line)
    if found is None:
        return None
    rest = line[found.end() :]
    if alone and rest.strip(" .:)]}*\"'$"):
        return None
    letter = found["letter"]
    ends = found["named"] or _LETTER_ENDS.match(rest) or (letter.isupper() and _LETTER_REASON.match(rest))
    is_word = letter.islower() or letter in "AI"
    if not ends and (is_word or not rest[:1].isspace()):
        return None
    return _in_range(letter, choices)


def _complete_letter(announcement: _Announcement, choices: Sequence[str]) -> str | None:
    line = announcement.line
    if re.match(r"[\s$({]*\\(?:boxed|fbox)", line):
        return None
    hashes = announcement.marker == "hashes"
    letter = _leading_letter(line, choices, alone=hashes)
    if letter is None and (not hashes or line.strip(" .*").lower() in [choice.strip().lower() for choice in choices]):
        letter = _named_choice(line, choices)
    return letter


def _any_letter(text: str, choices: Sequence[str]) -> str | None:
    letters = [_in_range(next(filter(None, found.groups())), choices) for found in _MARKED_LETTER.finditer(text)]
    letters = [letter for letter in letters if letter is not None]
    if letters:
        return letters[-1]
    lines = [line for line in text.splitlines() if line.strip()]
    return _named_choice(lines[-1], choices) if lines else None


def _in_range(letter: str, choices: Sequence[str]) -> str | None:
    letter = letter.upper()
    return letter if ord(letter) - ord("A") < (len(choices) or 26) else None


def _named_choice(text: str, choices: Sequence[str]) -> str | None:
    named = [
        index
        for index, choice in enumerate(choices)
        # A choice that is a letter, as where the texts are elsewhere, would be found in words: the I of "I think".
        if not re.fullmatch(r"[A-Za-z]", choice.strip())
        and re.search(rf"(?<!\w){re.escape(choice.strip())}(?!\w)", text, re.IGNORECASE)
    ]
    return chr(ord("A") + named[0]) if len(named) == 1 else None


_QUOTES = "\"'\u2018\u2019\u201c\u201d"
_MAX_WORDS = 8  # more words than these behind "the answer is" are an explanation
_NO_ANSWER = re.compile(
    r"(?:not|n't|un(?:known|clear|certain|decided)|known|clear|simple|easy|obvious|correct|incorrect|wrong|right|given"
    r"|found|obtained|calculated|computed|based|derived|as\s+follows|below|above|here|i\s+(?:do|am|can)|let)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<!\d)[.;!?](?=\s|$)|[.;!?](?=\s*$)|,?\s+(?:because|since)\b|\n")


def _complete_text(announcement: _Announcement, choices: Sequence[str]) -> str | None:
    """Reads an announced answer of any kind as it is written, without the text that explains it."""
    if announcement.marker == "boxed":
        return announcement.text.strip() or None
    line = announcement.line.strip(" \t*" + _QUOTES)
    number = _complete_number(announcement, choices)
    if number is not None:
        found = leading_number(line)
        return line.rstrip(" .*!" + _QUOTES) if found is not None and found.is_alone and not found.is_result else number
    if announcement.marker == "hashes":
        return _complete_yes_no(announcement, choices) or _leading_letter(line, choices, alone=True)
    text = line[: found.start()] if (found := _SENTENCE_END.search(line)) else line
    text = text.strip(" \t*.," + _QUOTES)
    explains = text.endswith(":") or _NO_ANSWER.match(text) or "\\boxed" in text or "=" in text
    if not re.search(r"\w", text) or explains or len(text.split()) > _MAX_WORDS:
        return None
    # A sentence with numbers behind "Answer:" is the first step of a solution.
    sentence = announcement.marker == "colon" and len(text.split()) > 1 and re.search(r"\d", text)
    return None if sentence else text


def _text_of_solution(text: str, choices: Sequence[str]) -> str | None:
    number = _number_of_solution(text, choices)
    lines = [line.strip(" \t:*.") for line in text.splitlines() if line.strip(" \t:*.")]
    return lines[0] if number is None and len(lines) == 1 else number


def _canonical_text(answer: str) -> str | None:
    found = leading_number(answer)
    if found is not None and found.is_alone:
        return spell(found.value)
    bare = answer.strip(" \t\n.,;:!*()[]{}$" + _QUOTES)
    words = " ".join(bare.casefold().split())
    return _YES.get(words, words) or None


_READERS: dict[str, _Reader] = {
    "number": _Reader(_complete_number, _number_of_solution, _last_number),
    "yes_no": _Reader(_complete_yes_no, _any_yes_no, _any_yes_no),
    "letter": _Reader(_complete_letter, _any_letter, _any_letter),
    "any": _Reader(_complete_text, _text_of_solution, lambda text, choices: None),
}
