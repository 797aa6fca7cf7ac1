"""Answers extracted from hand-written texts, and the equality of answers in different spellings."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimkernels.evaluate.answers import canonical, extract, parse_number, same_answer

CHOICES = ("bank", "library", "department store", "mall", "new york")
NUMBERS = [  # text, strict, flexible
    ("16 - 3 - 4 = 9.\nThe answer is 18.", "18", "18"),
    ("So she makes 9 * 2 = $18 every day.", None, "18"),
    ("The answer is $1,234.50 per week, not 7.", "1234.5", "1234.5"),
    ("#### -5", "-5", "-5"),
    ("The answer is \\boxed{\\frac{3}{4}}.", "0.75", "0.75"),
    ("the answer is: 3/9 of it", "1/3", "1/3"),
    ("The answer is 3. No: the answer is 4.", "4", "4"),
    ("The answer is 3.\n\nQ: Tom has 7 cats. How many?\nA: The answer is 7.", "3", "3"),
    ("\nA: 2 + 2 = 4\nQ: What is 5?", None, "4"),
    # A question before any answer repeats that of the prompt.
    ("Q: What is 5?\nA: The answer is 5.", "5", "5"),
    ("\n Question: 5?", None, None),
    ("16-3-4", None, "4"),
    ("It rose from 10-12.", None, "12"),
    ("It fell to \u22125 degrees", None, "-5"),
    ("- 3 apples", None, "3"),  # a bullet
    ("-3 apples", None, "-3"),
    ("about 50% of 1,000,000", None, "1000000"),
    ("He has 12,34 of them", None, "34"),
    (".5 l", None, "0.5"),
    ("18.00 dollars.", None, "18"),
    ("5/0 is undefined", None, "5"),
    ("The answer is unknown.\n7 of them", None, "7"),
    ("The answer is:\n42", "42", "42"),
    ("The answer is 20 * 3 = 60 students.", "60", "60"),
    ("The answer is 5 - 5 = 0.", "0", "0"),
    ("A: 5 apples", None, "5"),
    ("The answer is " + 5000 * "9", None, None),
    ("5 of " + 5000 * "9", None, "5"),
    ("I do not know.", None, None),
    ("", None, None),
]
YES_NO = [
    ("Ants are small.\nThe answer is no.", "no", "no"),
    ("Yes, as there is no evidence. No one knows.", None, "yes"),
    ("There is no way to tell; so yes", None, "yes"),
    ("There is no way.", None, None),
    ("Answer: False", "no", "no"),
    ("It could. The answer is definitely yes", "yes", "yes"),
    ("So the statement is true.", None, "yes"),
    ("I would say no.", None, "no"),
    ("Norway knows", None, None),
]
LETTERS = [
    ("The answer is (B).", "B", "B"),
    ("The answer is c) department store", "C", "C"),
    ("The answer is a mall.", "D", "D"),
    ("The answer is A", "A", "A"),
    ("The answer is: **E. new york**", "E", "E"),
    ("A revolving door is at a bank.", None, "A"),
    ("A person goes there. It must be option D", None, "D"),
    ("A) no, B) yes", None, "B"),
    ("The answer is (Z).", None, None),
    ("A: mall", None, "D"),
    ("bank or mall", None, None),
    ("The answer is I don't know", None, None),
]


@pytest.mark.parametrize(("text", "strict", "flexible"), NUMBERS)
def test_number(text, strict, flexible):
    assert extract(text, "number") == (strict, flexible)


@pytest.mark.parametrize(("text", "strict", "flexible"), YES_NO)
def test_yes_no(text, strict, flexible):
    assert extract(text, "yes_no") == (strict, flexible)


@pytest.mark.parametrize(("text", "strict", "flexible"), LETTERS)
def test_letter(text, strict, flexible):
    assert extract(text, "letter", CHOICES) == (strict, flexible)


@pytest.mark.parametrize(
    ("answer", "reference", "kind", "same"),
    [
        ("18.0", "18", "number", True),
        ("2125", "2,125", "number", True),
        ("1/2", "0.50", "number", True),
        ("1/3", "0.33", "number", False),
        ("-5", "5", "number", False),
        ("$7", "7 dollars", "number", True),
        (None, "5", "number", False),
        ("b", "B", "letter", True),
        ("Yes", "true", "yes_no", True),
    ],
)
def test_same_answer(answer, reference, kind, same):
    assert same_answer(answer, reference, kind) is same


def test_a_reference_that_is_no_answer_is_an_error():
    with pytest.raises(ValueError, match="reference must be an answer of kind 'number', got 'seven'"):
        same_answer("7", "seven", "number")
    with pytest.raises(ValueError, match="kind must be one of 'number', 'yes_no', 'letter', 'any', got 'colour'"):
        extract("red", "colour")


@given(st.integers(-(10**12), 10**12), st.sampled_from([1, 2, 8, 40, 125, 3, 7]))
def test_a_number_survives_its_spelling(top, bottom):
    value = Fraction(top, bottom)
    spelt = canonical(f"{value.numerator}/{value.denominator}", "number")
    assert parse_number(spelt) == value
    assert canonical(spelt, "number") == spelt
    assert extract(f"The answer is {spelt}.", "number").strict == spelt


@given(st.integers(0, 10**9), st.integers(0, 99))
def test_thousands_commas_and_decimals(whole, cents):
    assert parse_number(f"${whole:,}.{cents:02d} in all") == whole + Fraction(cents, 100)


@given(st.text(max_size=80), st.sampled_from(["number", "yes_no", "letter"]))
def test_any_text_gives_a_canonical_answer_or_none(text, kind):
    strict, flexible = extract(text, kind, CHOICES)
    for answer in (strict, flexible):
        assert answer is None or canonical(answer, kind) == answer
    assert strict is None or strict == flexible
