r"""Extraction of answers from texts: strictly, where the text announces one, or flexibly, from anywhere in the text.

The strict answer is the one that follows the last "the answer is", "answer:", ``####`` or ``\boxed``. The flexible
answer is the strict one; in a text without a strict answer it is the last number, "yes" or "no", or letter. Both ignore
everything from the first question on that the model asks itself ("Q: ...").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

AnswerKind = Literal["number", "yes_no", "letter"]

_NEXT_QUESTION = re.compile(r"(?:^|\n)\s*(?:Q|Question)\s*:")
# Some models repeat the "A:" with which a prompt of the form "Q: ... A:" ends.
_OWN_PREFIX = re.compile(r"^\s*A:")
_ANNOUNCED = re.compile(r"####|\\boxed|\banswer\s+is\b|\banswer\s*:", re.IGNORECASE)
# A sign belongs to a number unless a digit, a letter or a bracket precedes it: "16-3" holds 16 and 3, not -3.
_SIGN = r"(?:(?<![\w)\]])[-+\u2212]\s?)?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    rf"{_SIGN}[$\u20ac\u00a3]?\s?(?:\\d?frac{{(?P<top>{_DECIMAL})}}{{(?P<bottom>{_DECIMAL})}}"
    rf"|(?P<first>{_DECIMAL})(?:\s?/\s?(?P<second>{_DECIMAL}))?)"
)
_YES_NO = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
# "no" counts as an answer only before punctuation or the end of a line: "no evidence" is not an answer.
_YES_NO_ALONE = re.compile(r"\b(yes|true|false)\b|\b(no)\b(?=\s*(?:[.,;:!?)*\n]|$))", re.IGNORECASE)
_YES = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_MARKED_LETTER = re.compile(r"\(([A-Za-z])\)|\b([A-Z])\b(?=\s*(?:[).:,]|\n|$))|\b(?:option|choice)\s+([A-Za-z])\b")
_LEADING_LETTER = re.compile(
    r"[\s:*\"'`{]*(?:(?:option|choice)\s+)?(?:\(([A-Za-z])\)|([A-Z])\b(?!['\u2019])|([a-z])(?=\s*(?:[).:,]|\n|$)))"
)
# Longer numbers are ignored: no answer is that long, and Python refuses to convert more than 4300 digits.
_MAX_NUMBER_LENGTH = 1000


class Extraction(NamedTuple):
    """The answers found in a text, in canonical spelling.

    Attributes:
        strict: The announced answer; None if none was found.
        flexible: The announced answer, or else the last possible one; None if none was found.
    """

    strict: str | None
    flexible: str | None


def extract(text: str, kind: AnswerKind, choices: Sequence[str] = ()) -> Extraction:
    """Extracts the strict and the flexible answer from a text.

    Args:
        text: Output of a model.
        kind: "number" (commas, currency signs, units, decimals, fractions and signs are understood; the answer is a
            decimal or a fraction), "yes_no" (the answer is "yes" or "no"; "true" and "false" count as these), or
            "letter" (the answer is the upper-case letter of a choice).
        choices: Texts that the letters A, B, ... stand for, for "letter". If no letter is found, but the announced line
            or the last line names exactly one of the texts, its letter is the answer. Letters beyond the last choice
            are ignored.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    if kind not in _FINDERS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, _FINDERS))}, got {kind!r}")
    text = _OWN_PREFIX.sub("", before_next_question(text))
    announced, anywhere = _FINDERS[kind]
    strict = None
    for marker in _ANNOUNCED.finditer(text):
        found = announced(text[marker.end() :], choices)
        strict = strict if found is None else found
    return Extraction(strict, anywhere(text, choices) if strict is None else strict)


def before_next_question(text: str) -> str:
    """Returns the text up to the first question that the model asks itself."""
    found = _NEXT_QUESTION.search(text)
    return text if found is None else text[: found.start()]


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
    """Returns the canonical spelling of a bare answer, without any text around it; None if it is not an answer."""
    answer = answer.strip()
    if kind == "number":
        value = parse_number(answer)
        return None if value is None else _spell(value)
    if kind == "yes_no":
        return _YES.get(answer.lower())
    return answer.upper() if re.fullmatch(r"[A-Za-z]", answer) else None


def parse_number(text: str) -> Fraction | None:
    """Returns the exact value of the first number in a text; None without one, or if it has over 1000 characters."""
    found = _NUMBER.search(text)
    return None if found is None else _value(found)


def _value(found: re.Match[str]) -> Fraction | None:
    if len(found[0]) > _MAX_NUMBER_LENGTH:
        return None
    top, bottom = (found["top"], found["bottom"]) if found["top"] else (found["first"], found["second"])
    value = Fraction(top.replace(",", ""))
    if bottom is not None:
        divisor = Fraction(bottom.replace(",", ""))
        # "5/0" is read as 5, since division by zero has no value.
        value = value / divisor if divisor else value
    return -value if found[0][0] in "-\u2212" else value


def _spell(value: Fraction) -> str:
    """Spells a value as an integer, as an exact decimal if it has one, or else as a fraction in lowest terms."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if value.denominator == 1 or rest != 1:
        return str(value)
    places = max(_multiplicity(value.denominator, 2), _multiplicity(value.denominator, 5))
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _multiplicity(number: int, prime: int) -> int:
    """Counts how often a prime divides a number."""
    count = 0
    while number % prime == 0:
        number, count = number // prime, count + 1
    return count


def _first_line(text: str) -> str:
    """Returns the first line with text after an announcement, since the answer may stand on the next line."""
    return text.lstrip(" :*\n").partition("\n")[0]


def _announced_number(text: str, choices: Sequence[str]) -> str | None:
    line = _first_line(text)
    # In "The answer is 20 * 3 = 60." the answer is 60.
    value = parse_number(line.rpartition("=")[2])
    value = parse_number(line) if value is None else value
    return None if value is None else _spell(value)


def _last_number(text: str, choices: Sequence[str]) -> str | None:
    values = [value for found in _NUMBER.finditer(text) if (value := _value(found)) is not None]
    return _spell(values[-1]) if values else None


def _announced_yes_no(text: str, choices: Sequence[str]) -> str | None:
    found = _YES_NO.search(_first_line(text))
    return None if found is None else _YES[found[1].lower()]


def _any_yes_no(text: str, choices: Sequence[str]) -> str | None:
    """Returns the first word if it is an answer, or else the last word that stands alone as one."""
    leading = re.match(r"\W*(yes|no|true|false)\b", text, re.IGNORECASE)
    if leading is not None:
        return _YES[leading[1].lower()]
    words = [found[0].lower() for found in _YES_NO_ALONE.finditer(text)]
    return _YES[words[-1]] if words else None


def _announced_letter(text: str, choices: Sequence[str]) -> str | None:
    line = _first_line(text)
    found = _LEADING_LETTER.match(line)
    letter = _in_range(found, choices) if found is not None else None
    return _named_choice(line, choices) if letter is None else letter


def _any_letter(text: str, choices: Sequence[str]) -> str | None:
    letters = [_in_range(found, choices) for found in _MARKED_LETTER.finditer(text)]
    letters = [letter for letter in letters if letter is not None]
    if letters:
        return letters[-1]
    lines = [line for line in text.splitlines() if line.strip()]
    return _named_choice(lines[-1], choices) if lines else None


def _in_range(found: re.Match[str], choices: Sequence[str]) -> str | None:
    letter = next(filter(None, found.groups())).upper()
    return letter if ord(letter) - ord("A") < (len(choices) or 26) else None


def _named_choice(text: str, choices: Sequence[str]) -> str | None:
    named = [
        index
        for index, choice in enumerate(choices)
        if re.search(rf"(?<!\w){re.escape(choice.strip())}(?!\w)", text, re.IGNORECASE)
    ]
    return chr(ord("A") + named[0]) if len(named) == 1 else None


_Finder = Callable[[str, Sequence[str]], str | None]
# Each kind has two functions: one finds an answer right after its announcement, the other anywhere in the text.
_FINDERS: dict[str, tuple[_Finder, _Finder]] = {
    "number": (_announced_number, _last_number),
    "yes_no": (_announced_yes_no, _any_yes_no),
    "letter": (_announced_letter, _any_letter),
}
