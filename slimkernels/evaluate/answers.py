r"""The answer in a text: strict, where the text announces it, and flexible, wherever it may be.

Strict is what follows the last "the answer is", "answer:", ``####`` or ``\boxed``. Flexible is the strict answer, or,
where there is none, the last number, "yes" or "no", or letter of the text. What follows a question that the model asks
itself ("Q: ...") belongs to no answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

AnswerKind = Literal["number", "yes_no", "letter"]

_NEXT_QUESTION = re.compile(r"(?:^|\n)\s*(?:Q|Question)\s*:")
# Asked "Q: ... A:", models begin with an "A:" of their own.
_OWN_PREFIX = re.compile(r"^\s*A:")
_ANNOUNCED = re.compile(r"####|\\boxed|\banswer\s+is\b|\banswer\s*:", re.IGNORECASE)
# A sign belongs to the number where no digit, letter or bracket stands before it: "16-3" has a 16 and a 3.
_SIGN = r"(?:(?<![\w)\]])[-+\u2212]\s?)?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    rf"{_SIGN}[$\u20ac\u00a3]?\s?(?:\\d?frac{{(?P<top>{_DECIMAL})}}{{(?P<bottom>{_DECIMAL})}}"
    rf"|(?P<first>{_DECIMAL})(?:\s?/\s?(?P<second>{_DECIMAL}))?)"
)
_YES_NO = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)
# "no" that stands for an answer, not before a noun.
_YES_NO_ALONE = re.compile(r"\b(yes|true|false)\b|\b(no)\b(?=\s*(?:[.,;:!?)*\n]|$))", re.IGNORECASE)
_YES = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_MARKED_LETTER = re.compile(r"\(([A-Za-z])\)|\b([A-Z])\b(?=\s*(?:[).:,]|\n|$))|\b(?:option|choice)\s+([A-Za-z])\b")
_LEADING_LETTER = re.compile(
    r"[\s:*\"'`{]*(?:(?:option|choice)\s+)?(?:\(([A-Za-z])\)|([A-Z])\b(?!['\u2019])|([a-z])(?=\s*(?:[).:,]|\n|$)))"
)


# A longer number is no answer, and Python reads and writes none of more than 4300 digits.
_MOST_DIGITS = 1000


class Extraction(NamedTuple):
    """The answers found in a text, in the one spelling of their kind; None: none was found."""

    strict: str | None
    flexible: str | None


def extract(text: str, kind: AnswerKind, choices: Sequence[str] = ()) -> Extraction:
    """The answer of a text.

    Args:
        text: What a model wrote.
        kind: "number" (commas, currency, units, decimals, fractions and signs are understood; the answer is a decimal
            or a fraction), "yes_no" ("yes" or "no"; true and false too), or "letter" (of a choice, upper case).
        choices: With "letter": what the letters A, B, ... stand for; a text that ends by naming exactly one of them has
            chosen it. Their number bounds the letters.

    Raises:
        ValueError: An unknown kind.
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
    """The text until it asks a question of its own."""
    found = _NEXT_QUESTION.search(text)
    return text if found is None else text[: found.start()]


def same_answer(answer: str | None, reference: str, kind: AnswerKind) -> bool:
    """Whether an answer is the reference's, numbers by value: "1,000.0" is "1000", "1/2" is "0.5".

    Raises:
        ValueError: The reference is no answer of this kind.
    """
    expected = canonical(reference, kind)
    if expected is None:
        raise ValueError(f"reference must be an answer of kind {kind!r}, got {reference!r}: check the data file")
    return answer is not None and canonical(answer, kind) == expected


def canonical(answer: str, kind: AnswerKind) -> str | None:
    """The one spelling of an answer that is written without anything around it; None where it is none."""
    answer = answer.strip()
    if kind == "number":
        value = parse_number(answer)
        return None if value is None else _spell(value)
    if kind == "yes_no":
        return _YES.get(answer.lower())
    return answer.upper() if re.fullmatch(r"[A-Za-z]", answer) else None


def parse_number(text: str) -> Fraction | None:
    """The first number in a text, exactly; None where there is none, or one of more than a thousand digits."""
    found = _NUMBER.search(text)
    return None if found is None else _value(found)


def _value(found: re.Match[str]) -> Fraction | None:
    if len(found[0]) > _MOST_DIGITS:
        return None
    top, bottom = (found["top"], found["bottom"]) if found["top"] else (found["first"], found["second"])
    value = Fraction(top.replace(",", ""))
    if bottom is not None:
        divisor = Fraction(bottom.replace(",", ""))
        # "5/0" is a 5 with something after it.
        value = value / divisor if divisor else value
    return -value if found[0][0] in "-\u2212" else value


def _spell(value: Fraction) -> str:
    """An integer, an exact decimal, or a fraction in lowest terms."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if value.denominator == 1 or rest != 1:
        return str(value)
    places = max(_count(value.denominator, 2), _count(value.denominator, 5))
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _count(number: int, prime: int) -> int:
    count = 0
    while number % prime == 0:
        number, count = number // prime, count + 1
    return count


def _first_line(text: str) -> str:
    """Of what follows an announcement; the answer may stand on the next line."""
    return text.lstrip(" :*\n").partition("\n")[0]


def _announced_number(text: str, choices: Sequence[str]) -> str | None:
    line = _first_line(text)
    # "The answer is 20 * 3 = 60."
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
    """The first word, if it is one; else the last that stands for an answer."""
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
# Of each kind: what finds it right after its announcement, and what finds it anywhere.
_FINDERS: dict[str, tuple[_Finder, _Finder]] = {
    "number": (_announced_number, _last_number),
    "yes_no": (_announced_yes_no, _any_yes_no),
    "letter": (_announced_letter, _any_letter),
}
