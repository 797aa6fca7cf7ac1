"""Searches that merge siblings of equal steps: worked out by hand, resumed, on a page, and on a real model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support.teachers import smollm2
from support.toy_engines import CharacterEngine, find, nodes_of

from slimkernels.search import (
    Candidate,
    PathFinder,
    PathFinderConfig,
    Status,
    TraceDamagedError,
    TransformersEngine,
    consensus,
    log_probability,
    majority_vote,
    read_trace,
)
from slimkernels.search.tree_page import tree_page

# Two of three first steps are a, in other white space. Each then ends in one answer of its own.
ENDS = [("Answer: 7$", -1.0), ("Answer: 7$", -2.0), ("x\n", -1.0)]
SCRIPT = {
    "": [("a\n", -1.0), (" a \n", -2.0), ("b\n", -3.0)],
    "a\n": ENDS,
    "b\n": [("Answer: 8$", -1.0), ("Answer: 9$", -1.0), ("y\n", -1.0)],
}
WIDE = {"branching_factor": 3, "beam": 3, "max_depth": 2}


def test_merging_adds_weights_and_spends_no_token_twice_as_worked_out_by_hand():
    engine, [result] = find(SCRIPT, **WIDE, merge_siblings=1, selector=majority_vote)
    tree = result.tree
    assert nodes_of(tree) == {
        (0,): ("a\n", "EXPANDED", ""),
        (1,): (" a \n", "MERGED", "merged"),
        (2,): ("b\n", "EXPANDED", ""),
        (0, 0): ("Answer: 7", "FINISHED", "finished"),
        (0, 1): ("Answer: 7", "MERGED", "merged"),
        (0, 2): ("x\n", "ENDED", "depth"),
        (2, 0): ("Answer: 8", "FINISHED", "finished"),
        (2, 1): ("Answer: 9", "FINISHED", "finished"),
        (2, 2): ("y\n", "ENDED", "depth"),
    }
    assert [len(batch) for batch in engine.batches] == [3, 6], "nine without merging"
    # The first step stands for two, each of its children too, and the answer 7 for two of these.
    weights = {tree.path(node): float(tree.weight[node]) for node in range(1, len(tree))}
    assert weights == {
        **{(0,): 2, (1,): 1, (2,): 1, (0, 0): 4, (0, 1): 2, (0, 2): 2},
        **{(2, 0): 1, (2, 1): 1, (2, 2): 1},
    }
    assert {tree.path(n): tree.path(tree.merged_into[n]) for n in tree.with_status(Status.MERGED)} == {
        (1,): (0,),
        (0, 1): (0, 0),
    }
    assert (result.answer, result.scores) == ("7", [4.0, 1.0, 1.0])
    assert "2 of 9 steps were merged into a sibling like them" in result.notes


def test_merging_gives_room_in_the_beam():
    script = {"": [("a\n", -1.0), ("a\n", -1.0), ("b\n", -2.0)], "a\n": ENDS, "b\n": ENDS}
    for merge, kept in ((None, {(0,), (1,)}), (1, {(0,), (2,)})):
        _, [result] = find(script, branching_factor=3, beam=2, max_depth=1, merge_siblings=merge)
        assert {result.tree.path(node) for node in result.tree.with_status(Status.ENDED)} == kept


@pytest.mark.parametrize(
    ("second", "similarity", "is_merged"),
    [
        ("We add 3.\n", 1, True),
        ("We  add 3. \n", 1, True),
        ("we add 3.\n", 1, False),
        ("Now add 3.\n", 0.9, True),  # (1 + 0.96) / 2 = 0.98
        ("Now add 3.\n", 0.99, False),
        ("Now add 4.\n", 0.9, False),  # other numbers
        ("We add 3.$", 1, False),  # finished, the other goes on
    ],
)
def test_merging_is_by_words_and_numbers_and_embeddings(second, similarity, is_merged):
    vectors = {"We add 3.": np.array([1.0, 0.0]), "Now add 3.": np.array([0.96, 0.28])}
    vectors["Now add 4."] = vectors["We add 3."]
    script = {"": [("We add 3.\n", -1.0), (second, -1.0)]}
    _, [result] = find(script, vectors=vectors, max_depth=1, merge_siblings=similarity)
    assert (len(result.tree.with_status(Status.MERGED)) == 1) == is_merged
    if similarity < 1:
        asked = []

        def embed(texts):
            asked.append(list(texts))
            return np.stack([vectors[text.strip()] for text in texts])

        _, [own] = find(script, max_depth=1, merge_siblings=similarity, merge_embed=embed)
        assert nodes_of(own.tree) == nodes_of(result.tree)
        assert asked == [["We add 3.\n", second]]


def test_merging_keeps_other_answers_apart():
    vectors = dict.fromkeys(("Answer: yes", "Answer: no", "Answer: Yes"), np.ones(2))
    script = {"": [("Answer: yes$", -1.0), ("Answer: no$", -1.0), ("Answer: Yes$", -1.0)]}
    _, [result] = find(script, vectors=vectors, branching_factor=3, merge_siblings=0.5, selector=majority_vote)
    assert [(candidate.answer, candidate.weight) for candidate in result.candidates] == [("yes", 2), ("no", 1)]
    assert result.scores == [2.0, 1.0]


@pytest.mark.parametrize("similarity", ["jaccard", "count", "f1"])
def test_weights_count_as_copies_in_votes_and_consensus(similarity):
    texts, weights = ["one two three four", "one two three", "five six seven", ""], [3, 1, 2, 2]
    merged = [Candidate(n, text, text[:3], 0.0, 1, weight=w) for n, (text, w) in enumerate(zip(texts, weights))]  # noqa: B905
    copies = [candidate._replace(weight=1) for candidate in merged for _ in range(int(candidate.weight))]
    first = [sum(weights[:n]) for n in range(len(weights))]
    for scorer in (consensus(similarity), majority_vote):
        expected = scorer(copies)
        assert scorer(merged) == pytest.approx([expected[place] for place in first])


def test_merging_counts_votes_in_an_early_stop():
    script = {"": [("Answer: 7$", -1.0), ("Answer: 7$", -2.0), ("a\n", -1.0)], "a\n": SCRIPT["b\n"]}
    _, [result] = find(script, **WIDE | {"max_depth": 3}, merge_siblings=1, stop_when_agreed=2)
    assert result.notes[-1].startswith("stopped where 2 finished branches agreed on '7'")
    assert result.notes[-1].endswith("which could have outvoted it")
    # One vote of weight 2 is no proof against branches of any weight.
    script = {"": [("Answer: 7$", -1.0), ("Answer: 7$", -2.0), ("a\n", -1.0)], "a\n": [("Answer: 8$", -1.0)]}
    fields = {"branching_factor": (3, 1), "max_depth": 2, "stop_when_agreed": 9}
    assert find(script, **fields)[1][0].saved_tokens > 0
    assert find(script, **fields, merge_siblings=1)[1][0].saved_tokens == 0


LETTERS = PathFinderConfig(
    branching_factor=4, beam=3, max_depth=4, max_step_tokens=2, batch_questions=2, answer_pattern="[ab]", seed=3
)


def letters(**fields):
    config = dataclasses.replace(LETTERS, merge_siblings=1, **fields)
    return PathFinder(CharacterEngine(-1.0), config, checks=(), selector=majority_vote)


def comparable(results):
    return [
        (nodes_of(r.tree), r.tree.weight.tolist(), r.tree.merged_into.tolist(), r._replace(tree=None, seconds=0))
        for r in results
    ]


def test_merging_goes_on_from_every_line_of_its_trace_and_in_any_batch(tmp_path):
    questions, path, cut = list("pqr"), tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    results = comparable(letters().solve(questions, trace=path))
    assert any(weight > 1 for _, weights, _, _ in results for weight in weights)
    assert comparable(letters(batch_questions=1).solve(questions)) == results
    lines = path.read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines) + 1):
        cut.write_bytes(b"".join(lines[:kept]))
        resumed = letters()
        assert comparable(resumed.solve(questions, trace=cut)) == results
        assert resumed.engine.texts == {}
    content = read_trace(path)
    for traced, (_, weights, merged_into, _) in zip(content.questions, results, strict=True):
        assert traced.progress.tree.weight.tolist() == weights
        assert traced.progress.tree.merged_into.tolist() == merged_into
    page = tree_page(content)
    assert page.count('class="label">merged<') == page.count("into child ") == path.read_bytes().count(b"merged_into")
    assert "stands for 2 branches" in page


def test_merging_into_what_is_no_sibling_is_a_damaged_trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    letters().solve(["p"], trace=path)
    path.write_bytes(path.read_bytes().replace(b'"merged_into": 1', b'"merged_into": 99'))
    with pytest.raises(TraceDamagedError, match="must be merged into an earlier child of its parent, got 99"):
        read_trace(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"merge_siblings": 1.5}, r"merge_siblings must be in \[0, 1\], or None, got 1.5"),
        ({"merge_siblings": "yes"}, "merge_siblings must be in .* got 'yes'"),
        ({"merge_embed": len}, "merge_embed has no meaning without a merge_siblings below 1"),
        ({"merge_embed": len, "merge_siblings": 1}, "merge_embed has no meaning without a merge_siblings below 1"),
    ],
)
def test_merging_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        PathFinderConfig(**fields)


def test_merging_of_a_real_model_keeps_the_steps_of_those_that_are_left():
    settings = {"branching_factor": 4, "beam": 4, "max_depth": 2, "max_step_tokens": 4, "step_delimiter": " "}
    engine = TransformersEngine(*smollm2())
    config = PathFinderConfig(**settings, temperature=0.7, seed=1)
    whole, merged = (
        PathFinder(engine, dataclasses.replace(config, merge_siblings=similarity), checks=(), chat=False).solve(
            ["One day a farmer went to"]
        )[0]
        for similarity in (None, 0.999)
    )
    tree = merged.tree
    twins = tree.with_status(Status.MERGED)
    assert twins
    for node in twins:
        assert tree.steps[node].split() == tree.steps[tree.merged_into[node]].split()
        assert node not in tree.parent
    steps = nodes_of(whole.tree)
    assert all(steps[path][0] == step for path, (step, _, _) in nodes_of(tree).items() if path in steps)
    at_depth = [node for node in range(len(tree)) if tree.depth[node] == 1 and tree.status[node] != Status.MERGED]
    assert sum(tree.weight[at_depth]) == 4
    assert log_probability(merged.candidates)
