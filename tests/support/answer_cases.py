r"""Texts that models write, each with the strict and the flexible answer, and whether a branch finishes with it."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """A text and what is read from it.

    Attributes:
        text: Text of a branch.
        strict: Announced answer.
        flexible: Announced answer, or else the last possible one.
        finishes: Whether the announcement is complete, so that a branch finishes with it.
    """

    text: str
    strict: str | None
    flexible: str | None
    finishes: bool


def _complete(text: str, answer: str) -> Case:
    return Case(text, answer, answer, True)


def _solution(text: str, answer: str) -> Case:
    return Case(text, answer, answer, False)


def _unannounced(text: str, answer: str | None) -> Case:
    return Case(text, None, answer, False)


NUMBERS = [
    # The answer stands right behind its announcement.
    _complete("The answer is 18.", "18"),
    _complete("the answer is 18", "18"),
    _complete("THE ANSWER IS 18", "18"),
    _complete("So, the final answer is: 18", "18"),
    _complete("The answer is therefore 18.", "18"),
    _complete("The answer is that Janet makes $18 a day.", "18"),
    _complete("The answer to the question is 18.", "18"),
    _complete("The answer for Janet's first day is 18.", "18"),
    _complete("The answer would be 18 dollars.", "18"),
    _complete("The answer is:\n18", "18"),
    _complete("The answer is **18**.", "18"),
    _complete("The answer is *18*", "18"),
    _complete("The answer is `18`.", "18"),
    _complete("The answer is $18$.", "18"),
    _complete("The answer is \\(18\\).", "18"),
    _complete("The answer is\n\\[ 18 \\]", "18"),
    _complete("The answer is x = 18.", "18"),
    _complete("The answer is $x = 18$.", "18"),
    _complete("Answer: 18", "18"),
    _complete("Answer: 18.", "18"),
    _complete("answer:18", "18"),
    _complete("Answer = 18", "18"),
    _complete("Answer:\n18", "18"),
    _complete("Answer:\n\n18 eggs", "18"),
    _complete("**Answer**: 18", "18"),
    _complete("**Answer:** 18", "18"),
    _complete("**Answer:** **18**", "18"),
    _complete("__Answer:__ 18", "18"),
    _complete("Answer\uff1a18", "18"),
    _complete("Final answer: $18", "18"),
    _complete("### Answer: 18", "18"),
    _complete("#### Answer\n18", "18"),
    _complete("## Final Answer\n\n18", "18"),
    _complete("Answer: x = 18", "18"),
    _complete("Answer:\n- 18", "18"),
    _complete("Answer:\n* 18", "18"),
    _complete("Answer:\n\u2022 18", "18"),
    _complete("Answer: (18)", "18"),
    _complete("Answer: 18 (eighteen)", "18"),
    _complete("#### 18", "18"),
    _complete("####18", "18"),
    _complete("#### -5", "-5"),
    _complete("#### $18", "18"),
    _complete("#### 18 dollars.", "18"),
    _complete("#### 1,234", "1234"),
    _complete("Therefore \\boxed{18}.", "18"),
    _complete("\\boxed 18", "18"),
    _complete("\\fbox{18}", "18"),
    _complete("$\\boxed{x = 18}$", "18"),
    _complete("\\boxed{18\\text{ dollars}}", "18"),
    _complete("The answer is $\\boxed{18}$", "18"),
    _complete("Answer: \\boxed{18}", "18"),
    _complete("\\boxed{\\frac{3}{4}}", "0.75"),
    # What follows the answer does not change it.
    _complete("The answer is 18, because x = 3.", "18"),
    _complete("The answer is 18 because x = 3.", "18"),
    _complete("The answer is 18 where x = 7.", "18"),
    _complete("\\boxed{18} where $x = 7$", "18"),
    _complete("The answer is $\\boxed{18}$ where $x = 7$.", "18"),
    _complete("The answer is 18 (that is, 2 times n = 9).", "18"),
    _complete("The answer is 18; check: 9 * 2 = 18 and 3 + 4 = 7.", "18"),
    _complete("The answer is 18. She sells 9 eggs.", "18"),
    _complete("The answer is 18.\nIt took 3 steps.", "18"),
    _complete("The answer is 18 dollars per day for 7 days.", "18"),
    _complete("The answer is $1,234.50 per week, not 7.", "1234.5"),
    _complete("Answer: 18, since 9 * 2 = 18.", "18"),
    _complete("Answer: 18\nExplanation: 16 - 3 - 4 = 9.", "18"),
    _complete("Answer: 18. She sells 9 eggs.", "18"),
    _complete("The answer is 18 - that is all of it.", "18"),
    _complete("\\boxed{3} is wrong, so \\boxed{18}", "18"),
    _complete("The answer is 3. No: the answer is 4.", "4"),
    _complete("The answer is 18.\n\nQ: Tom has 7 cats. How many?\nA: The answer is 7.", "18"),
    # The result of an expression at the start.
    _complete("The answer is 20 * 3 = 60 students.", "60"),
    _complete("The answer is 20 students * 3 = 60 students, not x = 2.", "60"),
    _complete("The answer is $20 * 3 = $60.", "60"),
    _complete("The answer is 5 - 5 = 0.", "0"),
    _complete("The answer is 18 = 9 * 2.", "18"),
    _complete("The answer is 20 \\times 3 = 60", "60"),
    _complete("The answer is 20/3 \\approx 6.67", "6.67"),
    # Spellings of numbers.
    _complete("The answer is 9{,}500.", "9500"),
    _complete("The answer is 306,\\!956.63", "306956.63"),
    _complete("The answer is 10\\,000.", "10000"),
    _complete("The answer is 10\u2009000.", "10000"),
    _complete("The answer is 1\u202f234\u202f567.", "1234567"),
    _complete("The answer is 10\u00a0000.", "10000"),
    _complete("The answer is $\\tfrac{1}{2}$.", "0.5"),
    _complete("The answer is \\dfrac{1}{2}", "0.5"),
    _complete("The answer is \\frac{-1}{2}.", "-0.5"),
    _complete("The answer is -\\frac{1}{2}.", "-0.5"),
    _complete("The answer is \\frac12.", "0.5"),
    _complete("The answer is 2\\frac{1}{2}.", "2.5"),
    _complete("The answer is 2 1/2.", "2.5"),
    _complete("The answer is 2\u00bd hours.", "2.5"),
    _complete("The answer is \u00be", "0.75"),
    _complete("The answer is 1e5.", "100000"),
    _complete("The answer is 1.5e-3", "0.0015"),
    _complete("The answer is 2 * 10^3.", "2000"),
    _complete("The answer is $2 \\times 10^{3}$", "2000"),
    _complete("The answer is \u20135.", "-5"),
    _complete("The answer is \u22125 degrees.", "-5"),
    _complete("The answer is -$5.", "-5"),
    _complete("The answer is $-5.", "-5"),
    _complete("The answer is x = - 5.", "-5"),
    _complete("The answer is +5.", "5"),
    _complete("The answer is .5", "0.5"),
    _complete("The answer is 18.00", "18"),
    _complete("The answer is 25\\%.", "25"),
    _complete("The answer is 25%.", "25"),
    _complete("The answer is \\$18.", "18"),
    _complete("The answer is \u20ac18.", "18"),
    _complete("The answer is 3/9 of it", "1/3"),
    _complete("the answer is 18\\text{ dollars}", "18"),
    # A solution behind its announcement: nothing tells where it ends.
    _solution("Answer: Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips.", "72"),
    _solution("Answer: Natalia sold 48/2 = 24 clips in May.\n", "24"),
    _solution("Answer: 48/2 = 24 clips in May.\n48+24 = 72 clips.", "72"),
    _solution("Answer:\nShe eats 3 eggs.\n9 eggs are left, which is $18.", "18"),
    _solution("Answer:\n1. First count 16 eggs.\n2. Then 16 - 7 = 9.", "9"),
    _solution("#### Step 1: add\n3 + 4 = 7\n#### Step 2: result\nShe has 18 now.", "18"),
    _solution("#### Step 1: eggs per day\n16 - 7 = 9\n", "9"),
    _solution("#### 1. Count\n16 - 7 = 9\n", "9"),
    _solution("Answer: She has 18 apples.", "18"),
    _complete("Answer: She eats 3 of 16.\nSo 13 are left.\n#### 13", "13"),
    _complete("#### Step 1: eggs per day\n16 - 7 = 9\nThe answer is 18.", "18"),
    # Nothing is announced.
    _unannounced("So she makes 9 * 2 = $18 every day.", "18"),
    _unannounced("To see what the answer is, first count 16 eggs.", "16"),
    _unannounced("Once the answer is known, divide by 2.", "2"),
    _unannounced("The answer isn't known, maybe 7", "7"),
    _unannounced("The answer is not 7.", "7"),
    _unannounced("The answer is unknown.\n7 of them", "7"),
    _unannounced("The answer is found by adding 3 and 4.", "4"),
    _unannounced("The answer is unclear, there are 3 ways.", "3"),
    _unannounced("The IQ: not needed.", None),
    _unannounced("IQ: 120 is high", "120"),
    _unannounced("FAQ: 3 entries", "3"),
    _unannounced("Profit - $18", "18"),
    _unannounced("- 3 apples\n- 4 pears", "4"),
    _unannounced("It rose from 10\u201312.", "12"),
    _unannounced("16-3-4", "4"),
    _unannounced("She answers 18 letters.", "18"),
    _unannounced("Step 1: 16 - 7 = 9 eggs\nStep 2:", "9"),
    _unannounced("\\boxed{18", "18"),
    _unannounced("Answer:", None),
    _unannounced("The answer is", None),
    _unannounced("####", None),
    _unannounced("", None),
    # The model's own questions.
    _complete("Question: restated\nAnswer: 18", "18"),
    _complete("Question: how much does she make from 16 eggs?\nThe answer is 18.", "18"),
    _complete("Q: 16 eggs?\nA: The answer is 18.", "18"),
    _complete("The answer is 18.\nQuestion: 5?\nAnswer: 6", "18"),
    Case("\nA: 2 + 2 = 4\nQ: What is 5?", None, "4", True),
    Case("So she has 4.\n\nQ: Tom has 7. How many?\nA: The answer is 7.", None, "4", True),
    _unannounced("Question: how many of the 16 eggs are left?\n", None),
    _unannounced("\n Question: 5?", None),
]
YES_NO = [
    _complete("The answer is no.", "no"),
    _complete("The answer is definitely yes", "yes"),
    _complete("The answer is: **Yes**, because it can.", "yes"),
    _complete('The answer is "no".', "no"),
    _complete("The answer is no, as there is none.", "no"),
    _complete("The answer is no because it is too big.", "no"),
    _complete("The answer is not true", "no"),
    _complete("The answer is not false.", "yes"),
    _complete("The answer is true.", "yes"),
    _complete("The answer is, in my opinion, yes.", "yes"),
    _complete("Answer: False", "no"),
    _complete("Answer: Yes, it can.", "yes"),
    _complete("Answer:\nNo.", "no"),
    _complete("#### Yes", "yes"),
    _complete("\\boxed{\\text{No}}", "no"),
    _solution("Answer: The statement is false.", "no"),
    _unannounced("The answer is unclear, there is no evidence.", None),
    _unannounced("The answer is unknown, yes.", "yes"),
    _unannounced("The answer isn't known", None),
    _unannounced("To see what the answer is, ask: is it true", "yes"),
    _unannounced("The answer is no evidence of that", None),
    _unannounced("Yes, as there is no evidence. No one knows.", "yes"),
    _unannounced("There is no way to tell; so yes", "yes"),
    _unannounced("There is no way.", None),
    _unannounced("So the statement is true.", "yes"),
    _unannounced("So the statement is not true.", "no"),
    _unannounced("That isn't true.", "no"),
    _unannounced("Norway knows", None),
]
BANKS = ("bank", "library", "department store", "mall", "new york")
LETTERS = [
    *(
        _complete(f"Answer: {answer}", "B")
        for answer in ("\\boxed{\\text{B}}", "\\(B\\)", "[B]", "b", "(b)", "B.", "b. 4")
    ),
    *(
        _complete(f"The answer is {answer}", "B")
        for answer in ("(B).", "\\text{B}", "**B**", '"B"', "B) library", "$B$")
    ),
    *(
        _complete(f"Answer: {answer}", "B")
        for answer in ("B \u2014 a safe", "B \u2013 a safe", "B - a safe", "B: a safe")
    ),
    *(
        _complete(f"Answer: {answer}", "B")
        for answer in ("Option B is correct.", "option b", "B is correct", "B because")
    ),
    _complete("\\boxed{\\text{B}}", "B"),
    _complete("\\boxed{B}", "B"),
    _complete("\\boxed{(B)}", "B"),
    _complete("#### B", "B"),
    _complete("#### (B)", "B"),
    _complete("Answer:\n(B)", "B"),
    _complete("The answer is **E. new york**", "E"),
    _complete("The answer is a mall.", "D"),
    _complete("The answer is A", "A"),
    _complete("Answer: A bank.", "A"),
    _complete("Answer: A mall.", "D"),
    _complete("Answer: A is right.", "A"),
    _complete("The answer is c) department store", "C"),
    _unannounced("Option B is correct.", "B"),
    _unannounced("[B]", "B"),
    _unannounced("\\(B\\)", "B"),
    _unannounced("b", "B"),
    _unannounced("B \u2014 a safe", "B"),
    _unannounced("b. 4", "B"),
    _unannounced("A revolving door is at a bank.", "A"),
    _unannounced("A person goes there. It must be option D", "D"),
    _unannounced("A) no, B) yes", "B"),
    _unannounced("Take the egg(s) or item(c)", None),
    _unannounced("The answer is (Z).", None),
    _unannounced("A: mall", "D"),
    _unannounced("bank or mall", None),
    _unannounced("The answer is I don't know", None),
    _unannounced("Answer: A person's house.", None),
    _unannounced("#### A list of places", None),
]
ANY = [  # a text that announces nothing has no answer
    _complete("Answer: 18", "18"),
    _complete("So the answer is 18.", "18"),
    _complete("**Answer:** $1,800.50**", "$1,800.50"),
    _complete("#### 18\n", "18"),
    _complete("The answer is: yes\nmore", "yes"),
    _complete("Answer: Paris", "Paris"),
    _complete("The answer is Paris. It lies on the Seine.", "Paris"),
    _complete("The answer is the Eiffel Tower, because it is tall.", "the Eiffel Tower"),
    _complete("Answer:\nParis", "Paris"),
    _complete("Answer: 18 dollars", "18 dollars"),
    _complete("The answer is 18, because x = 3.", "18"),
    _complete("The answer is 20 * 3 = 60 students.", "60"),
    _complete("\\boxed{\\text{Paris}} where $x = 7$", "Paris"),
    _complete("\\boxed{18} where $x = 7$", "18"),
    _complete("Question: restated\nAnswer: 18", "18"),
    _solution("Answer: Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips.", "72"),
    _solution("#### Step 1: add\n3 + 4 = 7\n#### Step 2: result\nShe has 18 now.", "18"),
    _unannounced("To answer, we add.", None),
    _unannounced("Answer:", None),
    _unannounced("To see what the answer is, first count eggs.", None),
    _unannounced("The answer isn't known.", None),
    _unannounced("The answer is not known.", None),
    _unannounced("The answer is as follows:", None),
    _unannounced("The IQ: not needed.", None),
    _unannounced("Question: how much does she make?", None),
    _unannounced("The capital is Paris.", None),
]
