"""Repetition and contradiction checks in searches on a scripted language model, worked out by hand."""

from __future__ import annotations

import numpy as np
from support.toy_engines import find, nodes_of

from slimkernels.search import ContradictionCheck, Question, RepetitionCheck

VECTORS = {"a": np.array([1.0, 0.0]), "again": np.array([2.0, 0.1]), "new": np.array([0.0, 1.0])}


def test_pathfinder_regenerates_a_repetition_once_then_cuts_it():
    script = {
        "": [("a\n", -1.0), ("new\n", -3.0)],
        # The first child repeats a step at one attempt, the second at two.
        "a\n": [[("again$", -1.0), ("new$", -1.0)], [("again$", -1.0), ("again$", -2.0)]],
    }
    engine, [result] = find(script, beam=1, checks=[RepetitionCheck(0.95)], vectors=VECTORS)
    assert nodes_of(result.tree) == {
        (0,): ("a\n", "EXPANDED", ""),
        (1,): ("new\n", "PRUNED", "pruned"),
        (0, 0): ("new", "FINISHED", "finished"),
        (0, 1): ("again", "CUT", "repetition"),
    }
    assert result.tree.attempts.tolist() == [0, 1, 1, 2, 2]
    assert [[(r.path, r.attempt) for r in batch] for batch in engine.batches] == [
        [((0,), 0), ((1,), 0)],
        [((0, 0), 0), ((0, 1), 0)],
        [((0, 0), 1), ((0, 1), 1)],
    ]
    # Every attempt counts: 2 + 4 tokens at first, then those of again$ twice, new$ and again$.
    assert result.num_tokens == 6 + 12 + 4 + 6
    assert result.checks == ("repetition",)


def test_pathfinder_repetition_threshold_is_the_scaled_cosine():
    # The cosine of (1, 0) and (0, 1) is 0, so the score is 0.5: it fails at 0.5 and passes just above.
    script = {"": [("a\n", -1.0)], "a\n": [("new$", -1.0)]}
    for threshold, reason in ((0.5, "repetition"), (0.501, "finished")):
        _, [result] = find(
            script, branching_factor=1, checks=[RepetitionCheck(threshold)], vectors=VECTORS, max_attempts=1
        )
        assert result.reasons == {reason: 1}


def test_pathfinder_repetition_by_an_encoder_embeds_every_step_once():
    embedded = []

    def embed(texts):
        embedded.extend(text.strip() for text in texts)
        return np.array([VECTORS[text.strip()] for text in texts])

    script = {"": [("a\n", -1.0)], "a\n": [("new\n", -1.0)], "a\nnew\n": [("again$", -1.0)]}
    check = RepetitionCheck(0.95, embed)
    _, [result] = find(script, branching_factor=1, checks=[check], max_attempts=1)
    assert result.reasons == {"repetition": 1}
    assert (result.finished, result.text) == (False, "a\nnew\n")
    assert sorted(embedded) == ["a", "again", "new"]


def contradicts_no_after_yes(pairs):
    return [1.0 if ("yes" in premise and "no" in hypothesis) else 0.0 for premise, hypothesis in pairs]


def test_pathfinder_cuts_a_contradiction_of_an_ancestor_or_of_the_context():
    script = {
        "one": {"": [("yes sun\n", -1.0)], "yes sun\n": [("no sun$", -1.0)]},
        "two": {"": [("no sun$", -1.0)]},
        "three": {"": [("maybe sun\n", -1.0)], "maybe sun\n": [("no sun$", -1.0)]},
    }
    questions = [Question("one", "?"), Question("two", "yes, the sun"), Question("three", "?")]
    check = ContradictionCheck(contradicts_no_after_yes)
    _, results = find(script, branching_factor=1, checks=[check], max_attempts=1, prompts=questions)
    assert [result.reasons for result in results] == [{"contradiction": 1}, {"contradiction": 1}, {"finished": 1}]
    assert all(
        result.checks == ("contradiction",) and not any("off" in note for note in result.notes) for result in results
    )


def test_pathfinder_contradiction_asks_in_one_batch_only_about_what_shares_words():
    asked = []

    def contradicts(pairs):
        asked.append(pairs)
        return [0.0] * len(pairs)

    script = {"": [("sun up\n", -1.0), ("sun up\n", -1.0)], "sun up\n": [("it rains$", -1.0), ("the sun sets$", -1.0)]}
    find(script, checks=[ContradictionCheck(contradicts)], prompts=[Question("Q", "moon")])
    assert asked == [[("sun up", "the sun sets")]]
    asked.clear()
    find(script, checks=[ContradictionCheck(contradicts, prefilter=False)], prompts=[Question("Q", "moon")])
    assert [len(pairs) for pairs in asked] == [1, 4]


def test_pathfinder_checks_run_in_order_and_the_first_failure_is_the_reason():
    script = {"": [("yes sun\n", -1.0)], "yes sun\n": [("no sun$", -1.0)]}
    vectors = {"yes sun": VECTORS["a"], "no sun": VECTORS["again"]}
    checks = [RepetitionCheck(0.95), ContradictionCheck(contradicts_no_after_yes)]
    for ordered, reason in ((checks, "repetition"), (checks[::-1], "contradiction")):
        _, [result] = find(script, branching_factor=1, checks=ordered, vectors=vectors, max_attempts=1)
        assert result.reasons == {reason: 1}
