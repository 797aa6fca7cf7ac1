"""Searches that stop where finished branches agree: worked out by hand, resumed, and on a real model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.teachers import smollm2
from support.toy_engines import CharacterEngine, find, nodes_of

from slimkernels.search import PathFinder, PathFinderConfig, TraceMismatchError, TransformersEngine, majority_vote
from slimkernels.search.agreement import Remainder, remainder

# Two branches answer 18 at depth 2, then all others answer 7.
LATE_SEVENS = {
    "": [("a\n", -1.0), ("b\n", -2.0)],
    "a\n": [("Answer: 18\n", -1.0), ("c\n", -1.0)],
    "b\n": [("Answer: $18.00\n", -1.0), ("d\n", -1.0)],
    "a\nc\n": [("Answer: 7\n", -1.0), ("e\n", -1.0)],
    "b\nd\n": [("Answer: 7\n", -1.0), ("f\n", -1.0)],
    "a\nc\ne\n": [("Answer: 7\n", -1.0), ("Answer: 7\n", -2.0)],
    "b\nd\nf\n": [("Answer: 7\n", -1.0), ("Answer: 7\n", -2.0)],
}
THREE_OF_FOUR = LATE_SEVENS | {"b\n": [("Answer: $18.00\n", -1.0), ("Answer: 18.0\n", -1.0)]}
LETTERS = PathFinderConfig(
    branching_factor=3, beam=3, max_depth=5, max_step_tokens=6, batch_questions=2, answer_pattern="[ab]{2}"
)


def test_agreement_stops_a_search_at_the_end_of_a_depth():
    _, [whole] = find(LATE_SEVENS, selector=majority_vote)
    assert (whole.answer, whole.num_tokens, whole.saved_tokens) == ("7", 34 + 24 + 40, 0)
    engine, [result] = find(LATE_SEVENS, selector=majority_vote, stop_when_agreed=2)
    assert (result.answer, result.finished, result.num_tokens) == ("18", True, 34)
    assert [len(batch) for batch in engine.batches] == [2, 4]
    assert nodes_of(result.tree)[0, 1] == ("c\n", "ENDED", "agreed")
    # Depths 3 and 4 give the two leaves 4 children each: 8 steps of 20 tokens, twice if all fail their checks. Two of
    # the first four are the leaves of the next depth, so at most six finish.
    assert result.saved_tokens == 320
    assert result.notes[-1] == (
        "stopped where 2 finished branches agreed on '18': at most 6 branches more, of 320 tokens, were left, which "
        "could have outvoted it"
    )


def test_agreement_of_more_branches_than_there_are_changes_nothing():
    _, [whole] = find(LATE_SEVENS, selector=majority_vote)
    _, [result] = find(LATE_SEVENS, selector=majority_vote, stop_when_agreed=7)
    assert nodes_of(result.tree) == nodes_of(whole.tree)
    assert result._replace(tree=None, seconds=0) == whole._replace(tree=None, seconds=0)


def test_agreement_stops_early_where_no_other_answer_can_win():
    fields = {"branching_factor": (2, 2, 1), "max_depth": 3, "stop_when_agreed": 9, "selector": majority_vote}
    _, [result] = find(THREE_OF_FOUR, **fields)
    assert (result.answer, result.saved_tokens) == ("18", 40)
    assert result.notes[-1].endswith("at most 1 branch more, of 40 tokens, were left, which could not have outvoted it")
    # With a buffer of four, the branch that is left could take the place of one that agrees.
    _, [result] = find(THREE_OF_FOUR, **fields, buffer_size=4)
    assert result.saved_tokens == 0


def test_agreement_counts_what_the_token_budget_allows():
    _, [result] = find(LATE_SEVENS, stop_when_agreed=2, max_tokens=34 + 3 * 20 + 1)
    assert result.saved_tokens == 60
    assert "at most 3 branches more, of 60 tokens" in result.notes[-1]


def test_agreement_at_the_last_depth_is_no_early_stop():
    _, [result] = find(LATE_SEVENS, stop_when_agreed=2, max_depth=2)
    assert result.saved_tokens == 0
    assert result.reasons == {"finished": 2, "depth": 2}


@pytest.mark.parametrize(
    ("branching", "beam", "depth", "leaves", "steps_left", "bound"),
    [
        (1, 1, 0, 1, None, Remainder(1, 4 * 10)),  # a chain finishes once
        (2, 3, 2, 1, None, Remainder(4, 6 * 10)),  # no child of depth 3 finishes, and all of depth 4
        (2, 3, 2, 1, 2, Remainder(2, 2 * 10)),
        (3, 2, 2, 2, None, Remainder(10, 12 * 10)),  # four of depth 3, six of depth 4
        (3, 2, 2, 2, 0, Remainder(0, 0)),
    ],
)
def test_agreement_bounds_what_is_left(branching, beam, depth, leaves, steps_left, bound):
    config = PathFinderConfig(
        branching_factor=branching, beam=beam, max_depth=4, max_step_tokens=10, max_attempts=1, max_tokens=None
    )
    assert remainder(config, depth, leaves, steps_left) == bound


def letters_until(agreed):
    return PathFinder(CharacterEngine(-2.0), dataclasses.replace(LETTERS, stop_when_agreed=agreed), checks=())


def test_agreement_leaves_the_same_steps_as_the_whole_search():
    questions = list("pqrstu")
    stopped, whole = letters_until(4).solve(questions), letters_until(None).solve(questions)
    assert {bool(result.saved_tokens) for result in stopped} == {True, False}
    for short, full in zip(stopped, whole, strict=True):
        steps = {full.tree.path(node): full.tree.steps[node] for node in range(len(full.tree))}
        assert all(steps[short.tree.path(node)] == short.tree.steps[node] for node in range(len(short.tree)))
        assert full.num_tokens <= short.num_tokens + short.saved_tokens


def test_agreement_goes_on_from_every_line_of_its_trace(tmp_path):
    def comparable(result):
        return nodes_of(result.tree), result._replace(tree=None, seconds=0)

    questions, path, cut = list("pqrs"), tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    results = [comparable(result) for result in letters_until(2).solve(questions, trace=path)]
    lines = path.read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines) + 1):
        cut.write_bytes(b"".join(lines[:kept]))
        assert [comparable(result) for result in letters_until(2).solve(questions, trace=cut)] == results
        assert len(cut.read_bytes().splitlines()) == len(lines)


def test_agreement_is_part_of_what_a_trace_must_share(tmp_path):
    path = Path(tmp_path, "trace.jsonl")
    letters_until(None).solve(["p"], trace=path)
    assert b"stop_when_agreed" not in path.read_bytes(), "as in the traces of earlier releases"
    with pytest.raises(TraceMismatchError, match="config stop_when_agreed is None, this search's 2"):
        letters_until(2).solve(["p"], trace=path)


@pytest.mark.parametrize("agreed", [0, -1, 1.5, "2"])
def test_agreement_refuses_other_numbers(agreed):
    with pytest.raises(ValueError, match="stop_when_agreed must be an integer of at least 1, or None, got"):
        PathFinderConfig(stop_when_agreed=agreed)


def test_agreement_needs_answers():
    with pytest.raises(ValueError, match="answer_kind or answer_pattern must say what an answer is, got None for both"):
        PathFinderConfig(stop_when_agreed=2, answer_kind=None)


def test_agreement_of_a_real_model():
    settings = {"branching_factor": 4, "beam": 4, "max_depth": 6, "max_step_tokens": 4, "step_delimiter": " "}
    settings |= {"answer_pattern": r"\b(the|a|and|of|to)\b", "temperature": 1.0, "seed": 1}
    engine = TransformersEngine(*smollm2())
    [whole], [stopped] = (
        PathFinder(engine, PathFinderConfig(**settings, stop_when_agreed=agreed), checks=(), chat=False).solve(
            ["One day a farmer went to"]
        )
        for agreed in (None, 3)
    )
    answers = [candidate.answer for candidate in stopped.candidates]
    assert max(map(answers.count, answers)) >= 3
    assert stopped.num_tokens < whole.num_tokens <= stopped.num_tokens + stopped.saved_tokens
    assert nodes_of(stopped.tree).keys() < nodes_of(whole.tree).keys()
