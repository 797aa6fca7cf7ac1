"""Numbers in texts: their exact values in every spelling that models write, LaTeX and Markdown included."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

# Longer numbers are ignored: no answer is that long, and Python refuses to convert more than 4300 digits.
_MAX_NUMBER_LENGTH = 1000
_GROUP_SPACES = "\u00a0\u2007\u2009\u202f"  # spaces that group the digits of a number
_REPLACED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\r\n?", r"\n"),
        (r"\{,\}", ","),
        (r"\\!", ""),
        (rf"(?<=\d)(?:\\[,;: ]|[{_GROUP_SPACES}])(?=\d{{3}}(?!\d))", ""),
        (r"\\[,;:]", " "),
        (r"\\([$%#_])", r"\1"),
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[()\[\]]", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:times|cdot)(?![A-Za-z])|\u00d7", "*"),
        (r"\\div(?![A-Za-z])|\u00f7", "/"),
        (r"\\approx(?![A-Za-z])|\u2248", "="),
        (r"[\u2212\u2013](?=\s?[$\u20ac\u00a3]?\.?[\d\\])", "-"),
        (r"\uff1a", ":"),
        (r"\*\*|__|`", ""),
        ("\u00bd", " 1/2"),
        ("\u00bc", " 1/4"),
        ("\u00be", " 3/4"),
    )
]
_UNWRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|operatorname|emph|underline)\s*\{([^{}]*)\}"
)

# A sign belongs to a number unless a digit, a letter or a bracket precedes it: "16-3" holds 16 and 3, not -3. A sign
# with a space behind it is a bullet or a dash, except after an equals sign or an opening bracket.
_SIGN = (
    r"(?:(?<![\w)\]}.%])[-+](?=[$\u20ac\u00a3]?(?:\.?\d|\\frac))"
    r"|(?:(?<==)|(?<==\s)|(?<=\())[-+]\s(?=[$\u20ac\u00a3]?(?:\.?\d|\\frac)))"
)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})?[$\u20ac\u00a3]?\s?(?P<inner_sign>(?<=[$\u20ac\u00a3])-(?=\.?\d))?"
    rf"(?:(?P<latex_whole>\d+)?\\frac\s*(?:\{{\s*(?P<top>[-+]?\s?{_DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>{_DECIMAL})\s*\}}"
    r"|(?P<top_digit>\d)\s*(?P<bottom_digit>\d))"
    r"|(?P<whole>\d+)\s+(?P<mixed_top>\d+)/(?P<mixed_bottom>\d+)(?![\d/])"
    rf"|(?P<first>{_DECIMAL})"
    r"(?:[eE](?P<power>[-+]?\d{1,3})(?!\w)|\s?\*\s?10\^(?:(?P<digit_power>\d)|\{(?P<braced_power>-?\d{1,3})\})"
    r"|\^(?:(?P<exponent>\d{1,3})(?!\d)|\{(?P<braced_exponent>-?\d{1,3})\}))?"
    rf"(?:\s?/\s?(?P<second>{_DECIMAL}))?)"
)
# Words that go on after a number, and are not its unit.
_CONNECTIVE = r"where|because|since|as|when|if|so|and|for|with|given|that|which|assuming|using|then|but|or|let"
_VERB = r"is|are|was|were|has|have|had|will|can|could|would|equals|makes?|gets?|costs?|goes|go"
_UNIT = rf"(?:\s*(?!(?:{_CONNECTIVE}|{_VERB})\b)[A-Za-z\u00b0]{{2,}}){{0,3}}\s*%?"
_OPERATOR = re.compile(rf"{_UNIT}[\s$]*([-+*/=]|x(?=\s\d))[\s$]*(?=[-\d.$\u20ac\u00a3\\])", re.IGNORECASE)
# Words that may stand between "the answer is" and its number. None of ``_NO_LEAD`` may be among them.
_LEAD = re.compile(
    r"(?:[A-Za-z'\u2019]+[\s:*\"'\u2018\u201c($]+){0,8}?(?:[A-Za-z]\w?\s*=\s*)?"
    r"(?=[-+]?\s?[$\u20ac\u00a3\\.\d])"
)
_NO_LEAD = frozenset(
    re.findall(
        r"\w+",
        "not no unknown unclear found obtained calculated computed determined derived based by from using after before "
        "when if step steps part in because since depends between either neither fewer less more greater least most "
        "than wrong incorrect question problem line equation equations of",
    )
)
_MORE = re.compile(r"\s*(?:[*/=]|[-+]\s?(?=\())\s?\(")  # an expression that goes on with a bracket is not read
# A number that goes on in a form that is not read: 1,23, 1_000, 12:30, 1.2.3, 0x10, 3\\pi, 3 hours and 20 minutes.
_UNREAD_SYMBOL = r"\\(?:pi|sqrt|frac|binom|log|ln|sin|cos|tan|infty)(?![A-Za-z])"
_GOES_ON = re.compile(
    rf"[,_:.]\d|[xX][0-9a-fA-F]+\b|\s?{_UNREAD_SYMBOL}|\^(?!\{{?\\circ)|\s+[A-Za-z]+,?\s+and\s+\d+(?:\.\d+)?\s+[A-Za-z]"
)
_VARIABLE = re.compile(r"[A-Za-z]\w?\s*=\s*")
_OPENING = re.compile(r"(?:[\s:*\"'\u2018\u201c({\[$=>\u2022]|-\s)*")
_STEP_LABEL = re.compile(r"(?:^|(?<=\n))[^\w\n]*(?:step|part|case)\s+\d+\b(?=\W*(?:[:.)\u2014-]|\n|$))", re.IGNORECASE)
_CLOSING = r"[\s*$\"'\u2019\u201d})\]]*"
_UNIT_ONLY = re.compile(rf"{_UNIT}{_CLOSING}[.!]?{_CLOSING}$")
_REMARK = re.compile(rf"{_UNIT}{_CLOSING}(?:[,;(]|\.\s|(?:{_CONNECTIVE})\b)")


class LeadingNumber(NamedTuple):
    """The number with which a line begins.

    Attributes:
        value: Value of the number, or of the result in "20 * 3 = 60".
        is_result: Whether it is the result of an expression.
        rest: Text after it.
    """

    value: Fraction
    is_result: bool
    rest: str

    @property
    def is_alone(self) -> bool:
        """Whether nothing but a unit follows."""
        return _UNIT_ONLY.match(self.rest) is not None

    @property
    def has_remark(self) -> bool:
        """Whether a remark such as ", because ..." follows."""
        return _REMARK.match(self.rest) is not None


def plain(text: str) -> str:
    """Returns a text with plain spellings in place of LaTeX's and Markdown's: thousands, fractions, signs, emphasis."""
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return _UNWRAPPED.sub(r"\1", text)


def first_number(text: str) -> Fraction | None:
    """Returns the exact value of the first number of a plain text; None without one, or if it is too long."""
    found = _NUMBER.search(text)
    return None if found is None else _value(found)


def is_read_whole(text: str) -> bool:
    """Returns whether nothing of a plain formula but its numbers makes up its value, as a root or pi would."""
    return re.search(_UNREAD_SYMBOL, _NUMBER.sub("", text)) is None


def last_number(text: str) -> Fraction | None:
    """Returns the exact value of the last number of a plain text; numbers of steps, as in "Step 2:", do not count."""
    values = list(_values(_STEP_LABEL.sub("", text)))
    return values[-1] if values else None


def last_result(text: str) -> Fraction | None:
    """Returns the value after the last equals sign of the last line of a plain text, or else its last number."""
    lines = [line for line in text.splitlines() if line.strip()]
    _, sign, after = lines[-1].rpartition("=") if lines else ("", "", "")
    found = leading_number(after) if sign else None
    return last_number(text) if found is None else found.value


def leading_number(line: str, *, after_words: bool = False) -> LeadingNumber | None:
    """Reads the number with which a line of plain text begins, or the result of the expression with which it begins.

    Args:
        line: Plain text; marks in front of it, such as bullets and brackets, are skipped.
        after_words: Whether a few words may come first, as in "therefore 18" or "that she has 18 eggs".

    Returns:
        None if the line begins with anything else, or with an expression without a result, such as "3 + 4".
    """
    start = _match_end(_OPENING, line, 0)
    if after_words:
        found = _LEAD.match(line, start)
        if found is None or _NO_LEAD & set(found[0].lower().split()):
            return None
        start = found.end()
    start = _match_end(_VARIABLE, line, start)
    sides: list[list[Fraction | None]] = [[]]
    end = start
    while True:
        number = _NUMBER.match(line, end)
        if number is None:
            break
        sides[-1].append(_value(number))
        end = number.end()
        operator = _OPERATOR.match(line, end)
        if operator is None or _NUMBER.match(line, operator.end()) is None:
            break
        if operator[1] == "=":
            sides.append([])
        end = operator.end()
    if _MORE.match(line, end) or _GOES_ON.match(line, end):
        return None
    results = [side[0] for side in sides if len(side) == 1 and side[0] is not None]
    return LeadingNumber(results[-1], len(sides) > 1, line[end:]) if results else None


def spell(value: Fraction) -> str:
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


def _values(text: str) -> Iterator[Fraction]:
    for found in _NUMBER.finditer(text):
        value = _value(found)
        if value is not None:
            yield value


def _value(found: re.Match[str]) -> Fraction | None:
    """Returns the exact value of a match of ``_NUMBER``."""
    if len(found[0]) > _MAX_NUMBER_LENGTH:
        return None
    top = found["top"] or found["top_digit"] or found["mixed_top"] or found["first"]
    bottom = found["bottom"] or found["bottom_digit"] or found["mixed_bottom"] or found["second"]
    value = Fraction(re.sub(r"[,\s]", "", top))
    exponent = found["exponent"] or found["braced_exponent"]
    if exponent:
        if abs(int(exponent)) * len(top) > _MAX_NUMBER_LENGTH or (value == 0 and int(exponent) < 0):
            return None
        value **= int(exponent)
    power = found["power"] or found["digit_power"] or found["braced_power"]
    if power:
        value *= Fraction(10) ** int(power)
    if bottom:
        divisor = Fraction(bottom.replace(",", ""))
        # "5/0" is read as 5, since division by zero has no value.
        value = value / divisor if divisor else value
    value += int(found["whole"] or found["latex_whole"] or 0)
    return -value if "-" in ((found["sign"] or "") + (found["inner_sign"] or "")) else value


def _multiplicity(number: int, prime: int) -> int:
    """Counts how often a prime divides a number."""
    count = 0
    while number % prime == 0:
        number, count = number // prime, count + 1
    return count


def _match_end(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.match(text, start)
    return start if found is None else found.end()
