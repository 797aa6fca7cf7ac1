"""The one rule for answers, on hand-made texts: what is read from them, and where a branch finishes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.answer_cases import ANY, BANKS, LETTERS, NUMBERS, YES_NO
from support.toy_engines import ScriptedEngine, find, nodes_of

from slimkernels.evaluate.decoders import DECODERS, DecoderSettings, make_search
from slimkernels.evaluate.tasks import Sample, Task
from slimkernels.search import Candidate, PathFinderConfig, Question, majority_vote, self_consistency
from slimkernels.search.answers import canonical, extract, finishes

CASES = [
    *(("number", (), case) for case in NUMBERS),
    *(("yes_no", (), case) for case in YES_NO),
    *(("letter", BANKS, case) for case in LETTERS),
    *(("any", (), case) for case in ANY),
]


def test_the_table_has_at_least_150_cases():
    assert len(CASES) >= 150
    assert len({(kind, case.text) for kind, _, case in CASES}) == len(CASES)


@pytest.mark.parametrize(("kind", "choices", "case"), CASES, ids=lambda value: repr(value)[:60])
def test_answer_of_a_text(kind, choices, case):
    assert extract(case.text, kind, choices) == (case.strict, case.flexible)


@pytest.mark.parametrize(("kind", "choices", "case"), CASES, ids=lambda value: repr(value)[:60])
def test_branch_finishes_where_the_answer_is_announced(kind, choices, case):
    assert finishes(case.text, kind, choices) is case.finishes


LINES = st.sampled_from(sorted({line for _, _, case in CASES for line in case.text.split("\n")}))


@given(st.lists(LINES, max_size=5), st.sampled_from(["number", "yes_no", "letter", "any"]))
def test_scoring_reads_an_answer_wherever_a_branch_finishes(lines, kind):
    branch = ""
    for line in lines:
        branch += f"{line}\n"
        if finishes(branch, kind, BANKS):
            assert extract(branch, kind, BANKS).flexible is not None
            break
        assert extract(branch, kind, BANKS).strict is None or "answer" in branch.lower() or "####" in branch


BEFORE_THE_ANSWER = [
    "#### Step 1: eggs per day\n",
    "To see what the answer is, first count eggs.\n",
    "Question: how much does she make?\n",
    "The IQ: not needed.\n",
    "The answer isn't known yet.\n",
    "Answer: She first sells 48/2 = 24 eggs.\n",
]
TASK = Task("gsm8k", "number", "file", "hash", (Sample("0", "Q", "18"),), 1)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("line", BEFORE_THE_ANSWER)
def test_branch_goes_on_to_its_answer(decoder, line):
    settings = DecoderSettings(branching_factor=1, beam=1, num_chains=1)
    engine = ScriptedEngine({"": [(line, -1.0)], line: [("The answer is 18.\n", -1.0)]})
    [result] = make_search(decoder, engine, settings, TASK).solve([Question("Q", "Q")])
    assert (result.finished, result.answer, result.text) == (True, "18", f"{line}The answer is 18.\n")


@pytest.mark.parametrize("line", BEFORE_THE_ANSWER)
def test_branch_of_an_unknown_kind_goes_on_to_its_answer(line):
    script = {"": [(line, -1.0)], line: [("The answer is 18.\n", -1.0)]}
    _, [result] = find(script, branching_factor=1, max_step_tokens=60)
    assert (result.finished, result.answer) == (True, "18")


@pytest.mark.parametrize("kind", ["any", "number"])
@pytest.mark.parametrize(
    "text", ["Answer: 18\n", "So \\boxed{18}.\n", "**Answer**: 18\n", "#### 18\n", "the answer is 18\n"]
)
def test_branch_finishes_with_its_answer(kind, text):
    _, [result] = find({"": [(text, -1.0)]}, branching_factor=1, answer_kind=kind, max_step_tokens=30)
    assert (result.finished, result.answer) == (True, "18")


def test_answer_may_stand_on_the_line_after_its_announcement():
    script = {"": [("Answer:\n", -1.0)], "Answer:\n": [("18\n", -1.0)]}
    _, [result] = find(script, branching_factor=1)
    assert nodes_of(result.tree) == {(0,): ("Answer:\n", "EXPANDED", ""), (0, 0): ("18\n", "FINISHED", "finished")}
    assert result.answer == "18"


def test_number_that_a_limit_cut_off_finishes_no_branch():
    class Cut(ScriptedEngine):
        def draw(self, request, prompt, above, step_end):
            text, logprob = self.script[above][request.path[-1]]
            return text, logprob, "step" if text.endswith("\n") else "length"

    engine = Cut({"": [("The answer is 1", -1.0)], "The answer is 1": [("8.\n", -1.0)]})
    config = PathFinderConfig(branching_factor=1, max_step_tokens=15)
    [result] = self_consistency(engine, 1, config).solve(["Q"])
    assert (result.text, result.answer, result.finished) == ("The answer is 18.\n", "18", True)


def test_question_of_the_models_own_finishes_a_branch_that_has_an_answer():
    script = {"": [("So 4.\n", -1.0)], "So 4.\n": [("Q: Tom has 7 cats.\n", -1.0)]}
    _, [result] = find(script, branching_factor=1, answer_kind="number")
    assert (result.finished, result.answer) == (True, "4")


@pytest.mark.parametrize("kind", ["number", "any"])
@pytest.mark.parametrize(
    "loop",
    [
        "Q: a\n" * 10_000,
        "Q: a\nb\n" * 10_000,
        "the answer is not " * 10_000,
        "\\boxed{" * 20_000,
        "\\boxed{" * 20_000 + "}",
        "\n" * 200_000,
    ],
    ids=["questions", "asides", "denials", "open", "closed", "lines"],
)
def test_text_of_a_model_in_a_loop_is_read(kind, loop):
    # Reading them took hours where the time grew with the square or the cube of the length.
    assert extract(loop, kind).strict is None
    assert not finishes(loop, kind)
    assert extract(f"{loop}\nThe answer is 18.", kind).strict == "18"


@pytest.mark.parametrize("quotes", ['""', "''", "\u201c\u201d", "\u2018\u2019"])
@pytest.mark.parametrize("answer", ["3", "3.5", "3 legs", "Paris"])
def test_quotes_around_an_answer_are_no_part_of_it(quotes, answer):
    for end in (f"{quotes[1]}.", f".{quotes[1]}", quotes[1]):
        text = f"The answer is {quotes[0]}{answer}{end}"
        assert extract(text, "any").strict == answer, text
    assert canonical(f"{quotes[0]}{answer}{quotes[1]}", "any") == canonical(answer, "any")


def test_letter_is_read_by_the_choices_of_its_question():
    engine = ScriptedEngine({"": [("The answer is a mall.\n", -1.0)]})
    config = PathFinderConfig(branching_factor=1, answer_kind="letter")
    [result] = self_consistency(engine, 1, config).solve([Question("Q", "Q", BANKS)])
    assert (result.finished, result.answer) == (True, "D")


def test_votes_are_by_value():
    answers = ["$18", "18 dollars", "18.00", "20", "20"]
    candidates = [Candidate(n, "", answer, -1.0 * n, 1) for n, answer in enumerate(answers)]
    assert majority_vote(candidates) == [3, 3, 3, 2, 2]
    script = {"": [(f"Answer: {answer}\n", -1.0) for answer in answers]}
    [result] = self_consistency(ScriptedEngine(script), 5).solve(["Q"])
    assert canonical(result.answer, "any") == "18"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,800", "1800.0", True),
        ("\\frac{1}{2}", "0.5", True),
        ("Yes", "yes.", True),
        ("(B)", "b", True),
        ("Paris", " paris.", True),
        ("18 and 20", "18", False),
        ("10:30", "10", False),
        ("12 May 1990", "12", False),
        ("Paris", "London", False),
    ],
)
def test_answers_of_any_kind_are_compared_by_value(one, other, same):
    assert (canonical(one, "any") == canonical(other, "any")) is same


def test_configuration_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="answer_kind must be one of 'any', 'number'"):
        PathFinderConfig(answer_kind="colour")
    _, [result] = find({"": [("Answer: 18\n", -1.0)]}, branching_factor=1, answer_kind=None, max_depth=1)
    assert (result.finished, result.answer) == (False, None)


@pytest.mark.parametrize(
    ("text", "kind", "strict"),
    [
        (r"\boxed{10^5}", "number", "100000"),
        (r"\boxed{2^{10}}", "number", "1024"),
        ("The answer is 10^12.", "number", "1000000000000"),
        (r"The answer is $45^\circ$", "number", "45"),
        (r"\boxed{\frac{3}{4}}", "number", "0.75"),
        ("The answer is 1,234.50", "number", "1234.5"),
        # A part of what is written is not its value.
        (r"\boxed{\sqrt{16}}", "number", None),
        (r"\boxed{3\pi}", "number", None),
        (r"The answer is $3\pi$", "number", None),
        (r"\boxed{\frac{a}{4}}", "number", None),
        ("The answer is 12,34,567", "number", None),
        ("The answer is 1,23", "number", None),
        ("The answer is 1_000_000", "number", None),
        ("The answer is 0x10", "number", None),
        ("The answer is 1.234,50", "number", None),
        ("The answer is 9^99999", "number", None),
        ("The answer is 12:30", "any", "12:30"),
        ("The answer is 192.168.0.1", "any", "192.168.0.1"),
        ("The answer is 3 hours and 20 minutes", "any", "3 hours and 20 minutes"),
        ("The answer is neither yes nor no", "yes_no", None),
    ],
)
def test_a_number_that_goes_on_is_read_whole_or_not_at_all(text, kind, strict):
    assert extract(text, kind).strict == strict
    assert finishes(text, kind) == (strict is not None)


def test_a_choice_of_one_letter_is_not_found_in_words():
    assert extract("Answer: I don't know", "letter", tuple("ABCDEFGHIJ")).strict is None
    assert extract("Answer: B", "letter", tuple("ABCDEFGHIJ")).strict == "B"
    assert extract("Answer: 5", "letter", ("3", "5")).strict == "B"
