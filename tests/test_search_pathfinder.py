"""Tree searches on a scripted language model, worked out by hand, and budgets on a random one."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy_engines import CharacterEngine, ScriptedEngine, find, nodes_of

from slimkernels.search import (
    PathFinder,
    PathFinderConfig,
    Question,
    Status,
    best_of_n,
    greedy,
    log_probability,
    majority_vote,
    self_consistency,
)
from slimkernels.search.question import count_repeats, node_seed

# Log-probabilities are per token: "a\n" at -1 sums to -2 over 2 tokens.
TWO_LEVELS = {
    "": [("a\n", -1.0), ("b\n", -2.0)],
    "a\n": [("c$", -1.0), ("d\n", -3.0)],
    "b\n": [("e$", -0.5), ("f\n", -4.0)],
    "a\nd\n": [("g$", -1.0), ("h$", -9.0)],
    "b\nf\n": [("i$", -1.0), ("j$", -9.0)],
}


def test_pathfinder_grows_prunes_and_selects_as_worked_out_by_hand():
    # Depth 1: open a (-1 a token) and b (-2). Depth 2: finished ac (-4/4 = -1) and be (-5/4 = -1.25), open ad
    # (-8/4 = -2) and bf (-12/4 = -3); both fit the beam, but the buffer keeps three: bf goes. Depth 3: adg
    # (-10/6) and adh (-26/6) finish; of four, adh goes.
    engine, [result] = find(TWO_LEVELS, buffer_size=3)
    assert nodes_of(result.tree) == {
        (0,): ("a\n", "EXPANDED", ""),
        (1,): ("b\n", "EXPANDED", ""),
        (0, 0): ("c", "FINISHED", "finished"),
        (0, 1): ("d\n", "EXPANDED", ""),
        (1, 0): ("e", "FINISHED", "finished"),
        (1, 1): ("f\n", "PRUNED", "pruned"),
        (0, 1, 0): ("g", "FINISHED", "finished"),
        (0, 1, 1): ("h", "PRUNED", "pruned"),
    }
    assert [candidate.text for candidate in result.candidates] == ["a\nc", "b\ne", "a\nd\ng"]
    assert result.scores == [-4.0, -5.0, -10.0]
    assert (result.text, result.finished, result.num_tokens) == ("a\nc", True, 16)
    assert result.reasons == {"finished": 3, "pruned": 2}
    assert [len(batch) for batch in engine.batches] == [2, 4, 2], "one batch a depth"
    assert engine.encoded == ["Q"], "the prompt is encoded once"


def test_pathfinder_beam_keeps_the_best_leaves():
    # With a beam of 1, b is pruned at depth 1 and nothing below it is generated.
    engine, [result] = find(TWO_LEVELS, beam=1)
    assert nodes_of(result.tree)[(1,)] == ("b\n", "PRUNED", "pruned")
    assert [len(batch) for batch in engine.batches] == [2, 2, 2]
    assert [candidate.text for candidate in result.candidates] == ["a\nc", "a\nd\ng", "a\nd\nh"]


def test_pathfinder_length_penalty_decides_who_is_kept():
    # long: -1 x 6 tokens; short: -2 x 2 tokens. Means -1 > -2, sums -6 < -4.
    script = {"": [("long.\n", -1.0), ("s\n", -2.0)], "long.\n": [("x$", -1.0)] * 2, "s\n": [("x$", -1.0)] * 2}
    by_mean = find(script, beam=1, length_penalty=1.0)[1][0]
    by_sum = find(script, beam=1, length_penalty=0.0)[1][0]
    assert nodes_of(by_mean.tree)[(1,)][1] == "PRUNED"
    assert nodes_of(by_sum.tree)[(0,)][1] == "PRUNED"


def test_pathfinder_ties_go_to_the_lower_node():
    script = {"": [("a\n", -1.0), ("b\n", -1.0)], "a\n": [("x$", -1.0), ("y$", -1.0)]}
    _, [result] = find(script, beam=1)
    assert nodes_of(result.tree)[(1,)][1] == "PRUNED"
    assert result.text == "a\nx"


def test_pathfinder_anneals_by_depth():
    engine, _ = find(TWO_LEVELS, temperature=0.8, annealing=0.5)
    assert [{request.temperature for request in batch} for batch in engine.batches] == [{0.8}, {0.4}, {0.2}]


def seeds_of(questions, **options):
    """Solves questions, and returns the seeds of each one's first children."""
    engine = ScriptedEngine({"": [("a$", -1.0), ("b$", -1.0)]})
    PathFinder(engine, PathFinderConfig(branching_factor=2, **options), checks=()).solve(questions)
    seeds = [request.seed for batch in engine.batches for request in batch]
    return [seeds[i : i + 2] for i in range(0, len(seeds), 2)]


@pytest.mark.parametrize("batch_questions", [1, 8])
def test_pathfinder_draws_a_prompt_that_is_asked_again_anew(batch_questions):
    [alone], [other] = seeds_of(["Q"]), seeds_of(["R"])
    assert alone == [node_seed(0, "Q", (child,), 0) for child in (0, 1)]
    first, between, second, third = seeds_of(
        ["Q", "R", "Q", Question("Q", "its context")], batch_questions=batch_questions
    )
    assert (first, between) == (alone, other)
    assert len({*first, *second, *third}) == 6
    # A part of the questions draws the same if it says which of the equal ones it holds.
    assert seeds_of([Question("Q", repeat=2), "Q", Question("Q", repeat=0)]) == [third, second, first]
    ids = [Question([1, 2]), Question(np.array([1, 2])), Question("1", repeat=5), Question((1, 2))]
    assert [question.repeat for question in count_repeats(ids)] == [0, 1, 5, 2]


def test_pathfinder_branching_by_depth():
    engine, _ = find({"": [("a\n", -1.0)] * 3, "a\n": [("b$", -1.0)]}, branching_factor=(3, 1), beam=3)
    assert [len(batch) for batch in engine.batches] == [3, 3]


def test_pathfinder_says_that_the_contradiction_check_is_off():
    _, [result] = find(TWO_LEVELS, checks=None)
    assert result.checks == ("repetition",)
    assert any("contradiction check was off" in note for note in result.notes)


@pytest.mark.parametrize("preset", [greedy, lambda engine: self_consistency(engine, 2), lambda e: best_of_n(e, 2)])
def test_pathfinder_does_not_mention_checks_that_were_not_asked_for(preset):
    [result] = preset(ScriptedEngine({"": [("a$", -1.0), ("b$", -1.0)]})).solve(["Q"])
    assert result.notes == ()


def test_pathfinder_returns_the_best_partial_branch_where_all_were_cut():
    script = {"": [("a\n", -1.0), ("b\n", -2.0)], "a\n": [("x\n", -1.0)] * 2, "b\n": [("x\n", -1.0)] * 2}
    _, [result] = find(script, checks=[NoX()])
    assert (result.text, result.finished) == ("a\n", False)
    assert result.notes[-1] == "no branch was left: 4 no x; this is the best partial one"
    assert [candidate.text for candidate in result.candidates] == ["a\n", "b\n"]
    _, [result] = find({"": [("x\n", -3.0), ("x x\n", -1.0)]}, checks=[NoX()])
    assert (result.text, result.finished) == ("x x\n", False)


def test_pathfinder_says_that_a_limit_ended_the_search():
    _, [result] = find(TWO_LEVELS, max_depth=1)
    assert "no branch came to its own end: 2 depth; this is the best of those that a limit ended" in result.notes


def test_pathfinder_says_how_many_children_the_token_budget_had_room_for():
    script = {"": [("a\n", -1.0), ("b\n", -2.0)], "a\n": [("c$", -1.0)], "b\n": [("d$", -1.0)]}
    _, [result] = find(script, branching_factor=8, max_tokens=46)
    assert (
        "the budget of 46 tokens had room for 2 of 8 children at depth 1, 2 of 16 children at depth 2" in result.notes
    )
    _, [result] = find({"": [("a$", -1.0), ("b$", -2.0)]}, max_tokens=60)
    assert not any("budget" in note for note in result.notes)


class NoX:
    name = "no x"

    def __call__(self, branches):
        return ["x" in branch.step.text for branch in branches]


class Miscounting(NoX):
    def __call__(self, branches):
        return [False]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"selector": "consensus"}, TypeError, r"selector must be a function .*consensus\(\), got 'consensus'"),
        ({"checks": ["repetition"]}, TypeError, "checks must be functions of branches with a name"),
        ({"checks": [lambda branches: []]}, TypeError, "checks must be functions of branches with a name"),
        ({"checks": [Miscounting()]}, ValueError, "'no x' must return one value for each of 2 branches, got 1"),
        ({"selector": lambda candidates: [1.0]}, ValueError, "scores must be one number for each of 2 candidates"),
    ],
)
def test_pathfinder_checks_the_protocols_of_checks_and_selectors(options, error, message):
    with pytest.raises(error, match=message):
        find({"": [("a$", -1.0), ("b$", -2.0)]}, **options)


class Chatting(ScriptedEngine):
    """An engine with a chat template, whose prompts are in angle brackets."""

    def chat_prompt(self, question):
        return None if "<" in question else f"<{question}>"


def test_pathfinder_asks_plain_questions_in_the_chat_template():
    engine = Chatting({"": [("a$", -1.0)]})
    config = PathFinderConfig(branching_factor=1)
    for chat, question, encoded in [
        (True, "Q", "<Q>"),
        (True, "<Q>", "<Q>"),
        (True, Question("Q", "Q"), "Q"),
        (False, "Q", "Q"),
    ]:
        engine.encoded.clear()
        [result] = PathFinder(engine, config, chat=chat).solve([question])
        assert engine.encoded == [encoded]
        assert result.candidates[0].context == ("Q" if "Q" in (question, question[0]) else "<Q>")


def test_pathfinder_step_of_hidden_tokens_alone_goes_on():
    class Hidden(ScriptedEngine):
        def extend(self, requests, step_end, *, embed):
            steps = super().extend(requests, step_end, embed=embed)
            return [dataclasses.replace(step, text="", end="length") if "#" in step.text else step for step in steps]

    engine = Hidden({"": [("#\n", -1.0)], "#\n": [("a$", -1.0)]})
    [result] = greedy(engine).solve(["Q"])
    assert (result.text, result.finished) == ("a", True)


def test_pathfinder_end_of_text_alone_finishes_a_chain_but_is_no_chain():
    _, [result] = find({"": [("a\n", -1.0), ("$", -1.0)], "a\n": [("$", -1.0), ("  $", -1.0)]}, beam=1)
    assert nodes_of(result.tree) == {
        (0,): ("a\n", "EXPANDED", ""),
        (1,): ("", "CUT", "empty"),
        (0, 0): ("", "FINISHED", "finished"),
        (0, 1): ("  ", "FINISHED", "finished"),
    }
    assert result.text == "a\n"


def test_pathfinder_reports_a_model_that_says_nothing():
    _, [result] = find({"": [("$", -1.0), ("$", -1.0)]})
    assert (result.text, result.finished, result.node, result.candidates) == ("", False, None, [])
    assert result.reasons == {"empty": 2}
    assert result.num_tokens == 4
    assert "no branch was left: 2 empty" in result.notes


def test_pathfinder_reports_an_unfinished_question_at_the_depth_limit():
    _, [result] = find(TWO_LEVELS, max_depth=1)
    assert (result.text, result.finished) == ("a\n", False)
    assert result.reasons == {"depth": 2}


def test_pathfinder_prefers_any_finished_branch_to_unfinished_ones():
    _, [result] = find({"": [("a\n", -1.0), ("b$", -9.0)]}, max_depth=1)
    assert (result.text, result.finished) == ("b", True)
    assert [candidate.text for candidate in result.candidates] == ["b"]


def test_pathfinder_end_marker_and_answer_pattern_finish_a_branch():
    script = {"": [("a\n", -1.0), ("b ####\n"[:-1], -1.0)], "a\n": [("answer is 12\n", -1.0), ("c\n", -1.0)]}
    fields = {"end_markers": ("####",), "answer_pattern": r"answer is (\d+)", "max_depth": 2, "max_step_tokens": 30}
    _, [result] = find(script, **fields)
    assert {path: end for path, (_, end, _) in nodes_of(result.tree).items()} == {
        (0,): "EXPANDED",
        (1,): "FINISHED",
        (0, 0): "FINISHED",
        (0, 1): "ENDED",
    }
    assert [candidate.answer for candidate in result.candidates] == [None, "12"]


def test_pathfinder_token_budget_grants_whole_steps_in_turn():
    # A step may take 20 tokens. Of 46 tokens, the two steps at depth 0 take 4. The 42 left allow two steps at depth 1,
    # one for each leaf, better leaf first; they take 4. The 38 left allow one step, for the better leaf's first child.
    script = {
        "": [("a\n", -1.0), ("b\n", -2.0)],
        "a\n": [("c\n", -1.0), None],
        "b\n": [("d\n", -1.0), None],
        "a\nc\n": [("e$", -1.0), None],
    }
    engine, [result] = find(script, max_tokens=46)
    assert [[request.path for request in batch] for batch in engine.batches] == [
        [(0,), (1,)],
        [(0, 0), (1, 0)],
        [(0, 0, 0)],
    ]
    assert nodes_of(result.tree)[(1, 0)] == ("d\n", "ENDED", "budget")
    assert result.text == "a\nc\ne"


def test_pathfinder_does_not_regenerate_beyond_the_budget():
    script = {"": [[("$", -1.0), ("a$", -1.0)], [("$", -1.0), ("b$", -1.0)]]}
    engine, [result] = find(script, max_tokens=40)
    # Two tokens are spent; the 38 left allow one whole step.
    assert [len(batch) for batch in engine.batches] == [2, 1]
    assert nodes_of(result.tree) == {(0,): ("a", "FINISHED", "finished"), (1,): ("", "CUT", "empty")}


class Talkative(ScriptedEngine):
    """An engine that generates more tokens than requested, as some servers do by their own count."""

    def extend(self, requests, step_end, *, embed):
        steps = super().extend(requests, step_end, embed=embed)
        return [dataclasses.replace(step, token_ids=[0] * 30) for step in steps]


def test_pathfinder_branches_no_more_where_the_budget_is_overdrawn():
    engine = Talkative({"": [("a\n", -1.0), ("b\n", -2.0)]})
    config = PathFinderConfig(branching_factor=2, max_tokens=40, max_step_tokens=20)
    [result] = PathFinder(engine, config, checks=()).solve(["Q"])
    assert result.num_tokens == 60
    assert result.reasons == {"budget": 2}


def test_pathfinder_time_limit_ends_the_search():
    _, [result] = find(TWO_LEVELS, time_limit_s=1e-9)
    assert (result.finished, result.node) == (False, None)
    assert result.reasons == {"budget": 1}


def test_pathfinder_batches_all_questions():
    script = {"p": TWO_LEVELS, "q": {"": [("x$", -1.0), ("y$", -1.0)]}}
    engine, [first, second] = find(script, prompts=["p", "q"])
    assert [len(batch) for batch in engine.batches] == [4, 4, 4]
    assert (first.text, second.text) == ("a\nc", "x")


def test_pathfinder_presets_are_chains():
    script = {
        "": [("a\n", -1.0), ("b\n", -2.0), ("c\n", -3.0)],
        "a\n": [("= 1$", -1.0)],
        "b\n": [("= 2$", -1.0)],
        "c\n": [("= 2$", -2.0)],
    }
    config = PathFinderConfig(answer_pattern=r"= (\d)", max_step_tokens=9)
    engine = ScriptedEngine(script)
    [voted] = self_consistency(engine, 3, config).solve(["Q"])
    assert [len(batch) for batch in engine.batches] == [3, 3]
    assert {request.temperature for batch in engine.batches for request in batch} == {config.temperature}
    assert (voted.answer, voted.text, voted.scores) == ("2", "b\n= 2", [1.0, 2.0, 2.0])
    [likeliest] = best_of_n(engine, 3, config).solve(["Q"])
    assert likeliest.text == "a\n= 1"
    engine.batches.clear()
    [chain] = greedy(engine, config).solve(["Q"])
    assert [[request.temperature for request in batch] for batch in engine.batches] == [[0.0], [0.0]]
    assert chain.text == "a\n= 1"


def test_pathfinder_plan_by_hand():
    # Leaves are 1, 3 and 3, children 3, 6 and 6: fifteen steps of 10 tokens, each generated up to twice. At most three
    # leaves of two steps and six children are kept at a time.
    config = PathFinderConfig(branching_factor=(3, 2), beam=3, max_depth=3, max_step_tokens=10, batch_questions=2)
    engine = CharacterEngine()
    assert PathFinder(engine, config).plan(["p", "qq", "rrr"]) == (6, 900, 12, 3 + 2 * 120)
    limited = dataclasses.replace(config, max_tokens=45)
    assert PathFinder(engine, limited).plan(["p", "qq", "rrr"]) == (6, 135, 8, 3 + 2 * 45)
    assert engine.encoded == []


def test_pathfinder_async_is_the_same():
    engine = ScriptedEngine(TWO_LEVELS)
    finder = PathFinder(engine, PathFinderConfig(branching_factor=2, beam=2), checks=(), selector=log_probability)
    assert asyncio.run(finder.solve_async(["Q"]))[0].text == finder.solve(["Q"])[0].text == "a\nc"


def test_pathfinder_frees_everything_when_the_engine_fails():
    engine = ScriptedEngine({"": [("a\n", -1.0), ("b\n", -2.0)]})  # the script ends here, with a KeyError
    with pytest.raises(KeyError):
        PathFinder(engine, PathFinderConfig(branching_factor=2)).solve(["Q"])
    assert engine.texts == {}


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (["Q", ""], r"questions\[1\]: the prompt must have text"),
        (["  \n"], r"questions\[0\]: the prompt must have text"),
        ([Question([])], r"questions\[0\]: the prompt must have text"),
        (["Q", "x" * 1000], r"questions\[1\]: the prompt must be shorter"),
    ],
)
def test_pathfinder_refuses_questions_before_it_starts(questions, message):
    engine = ScriptedEngine(TWO_LEVELS)
    with pytest.raises(ValueError, match=message):
        PathFinder(engine).solve(questions)
    assert engine.encoded == []


def test_pathfinder_refuses_one_question_in_place_of_several():
    with pytest.raises(TypeError, match="must be a sequence"):
        PathFinder(ScriptedEngine({})).solve("Why?")


def test_annealing_stays_within_the_temperatures_that_can_be_divided_by():
    cold, hot = PathFinderConfig(annealing=1e-9), PathFinderConfig(annealing=1e9)
    assert cold.temperature_at(4) == 0.8 * 1e-9**4
    # The likeliest token is what a temperature towards 0 draws.
    assert cold.temperature_at(5) == cold.temperature_at(1000) == 0.0
    assert hot.temperature_at(5) == hot.temperature_at(1000) == 2.0**126
    assert PathFinderConfig(temperature=0.0).temperature_at(3) == 0.0


@pytest.mark.parametrize(
    "field",
    [
        {"branching_factor": 0},
        {"branching_factor": ()},
        {"branching_factor": (2, 0)},
        {"beam": 0},
        {"buffer_size": 0},
        {"max_depth": 0},
        {"max_step_tokens": 0},
        {"max_tokens": 63},
        {"max_tokens": 200.0},
        {"time_limit_s": 0},
        {"step_delimiter": ""},
        {"end_markers": "stop"},
        {"end_markers": ("",)},
        {"answer_pattern": "("},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 1e-40},
        {"annealing": 0.0},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 1.1},
        {"length_penalty": -1.0},
        {"max_attempts": 0},
        {"batch_questions": 0},
    ],
)
def test_pathfinder_config_refuses(field):
    with pytest.raises(ValueError, match=f"^{next(iter(field))} must"):
        PathFinderConfig(**field)


def test_pathfinder_answer_is_the_last_and_may_be_none():
    config = PathFinderConfig(answer_pattern=r"answer: (?:(\d+)|none)")
    assert config.answer("answer: 1\nanswer: 2\n") == "2"
    assert config.answer("answer: 1\nanswer: none\n") is None
    assert PathFinderConfig(answer_pattern="yes|no").answer("no, yes") == "yes"


def test_pathfinder_seeds_differ_by_everything_that_names_a_node():
    names = [(0, "p", (0,), 0), (1, "p", (0,), 0), (0, "q", (0,), 0), (0, "p", (1,), 0), (0, "p", (0, 0), 0)]
    names += [(0, "p", (0,), 1), (0, [1, 12], (0,), 0), (0, [11, 2], (0,), 0)]
    assert len({node_seed(*name) for name in names}) == len(names)
    assert node_seed(0, np.array([1, 12]), (0,), 0) == node_seed(0, [1, 12], (0,), 0)


def config_with(branching_temperature, **fields):
    """Returns a configuration, without the temperature where nothing is shared out."""
    shares = fields["beam"] > 1 and fields["max_depth"] > 1
    factor = fields["branching_factor"]
    shares = shares and (factor if isinstance(factor, int) else factor[1]) > 1
    return PathFinderConfig(branching_temperature=branching_temperature if shares else None, **fields)


CONFIGS = st.builds(
    config_with,
    branching_temperature=st.sampled_from([None, 0.1, 2.0]),
    merge_siblings=st.sampled_from([None, 1]),
    branching_factor=st.one_of(st.integers(1, 4), st.tuples(st.integers(1, 5), st.integers(1, 3))),
    beam=st.integers(1, 4),
    buffer_size=st.integers(1, 6),
    max_depth=st.integers(1, 4),
    max_step_tokens=st.integers(1, 6),
    max_tokens=st.one_of(st.none(), st.integers(6, 60)),
    max_attempts=st.integers(1, 3),
    seed=st.integers(0, 3),
    batch_questions=st.integers(1, 3),
)


class Fussy:
    """A check that fails steps by their text."""

    name = "fussy"
    needs_embeddings = False

    def __call__(self, branches):
        return ["z" in branch.step.text for branch in branches]


@given(config=CONFIGS, end_logit=st.sampled_from([-100.0, -1.0, 3.0]))
@settings(max_examples=60, deadline=None)
def test_pathfinder_never_exceeds_a_budget(config, end_logit):
    engine = CharacterEngine(end_logit)
    kept = []

    def spy(prune):
        def pruned(search):
            prune(search)
            kept.append((search.tree.with_status(Status.OPEN), search.tree.hypotheses()))

        return pruned

    from slimkernels.search.question import QuestionSearch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuestionSearch, "prune", spy(QuestionSearch.prune))
        finder = PathFinder(engine, config, checks=[Fussy()])
        planned = finder.plan(["p", "q", "r"])
        results = finder.solve(["p", "q", "r"])
    assert engine.texts == {}
    assert planned.prompt_tokens == 3
    assert planned.generated_tokens >= sum(result.num_tokens for result in results)
    assert planned.most_rows >= max(map(len, engine.batches))
    assert planned.cache_bytes >= engine.peak_tokens
    assert all(len(leaves) <= config.beam and len(all_kept) <= config.buffer_size for leaves, all_kept in kept)
    assert kept
    for prompt, result in zip("pqr", results, strict=True):
        tree = result.tree
        if config.max_tokens is not None:
            assert result.num_tokens <= config.max_tokens
        own = [len(tree.step_token_ids(node)) for node in range(1, len(tree))]
        assert sum(own) <= result.num_tokens
        assert all(1 <= length <= config.max_step_tokens for length in own)
        assert tree.depth.max() <= config.max_depth
        assert tree.attempts.max() <= config.max_attempts
        assert len(result.candidates) <= config.buffer_size
        assert not (tree.status == Status.OPEN).any()
        for node in range(1, len(tree)):
            assert (tree.reasons[node] == "") == (tree.status[node] == Status.EXPANDED)
            assert (tree.reasons[node] == "fussy") <= ("z" in tree.steps[node])
            assert tree.num_tokens[node] == len(tree.token_ids(node))
        assert prompt not in result.text


@given(config=CONFIGS, order=st.permutations("pqrs"))
@settings(max_examples=30, deadline=None)
def test_pathfinder_result_does_not_depend_on_the_other_questions(config, order):
    together = dict(zip(order, PathFinder(CharacterEngine(), config, checks=[Fussy()]).solve(order), strict=True))
    alone = dataclasses.replace(config, batch_questions=1)
    for prompt in "pqrs":
        [result] = PathFinder(CharacterEngine(), alone, checks=[Fussy()]).solve([prompt])
        assert nodes_of(result.tree) == nodes_of(together[prompt].tree)
        assert result.tree.sum_logprob.tolist() == together[prompt].tree.sum_logprob.tolist()
        assert (result.text, result.scores) == (together[prompt].text, together[prompt].scores)


def test_pathfinder_a_surviving_branch_does_not_depend_on_pruning():
    wide = PathFinderConfig(branching_factor=3, beam=9, max_depth=3, max_step_tokens=6)
    narrow = dataclasses.replace(wide, beam=2)
    trees = [PathFinder(CharacterEngine(-3.0), config, checks=()).solve(["p"])[0].tree for config in (wide, narrow)]
    steps = [{tree.path(n): (tree.steps[n], float(tree.sum_logprob[n])) for n in range(1, len(tree))} for tree in trees]
    assert set(steps[1]) < set(steps[0])
    assert all(steps[0][path] == step for path, step in steps[1].items())


def test_pathfinder_majority_vote_without_answers_falls_back_to_log_probability():
    _, [result] = find(TWO_LEVELS, selector=majority_vote)
    assert result.scores == [0.0] * len(result.scores)
    assert result.text == "a\nc"
