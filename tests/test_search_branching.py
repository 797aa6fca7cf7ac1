"""Children shared out by scores: worked out by hand, any scores, and in searches, resumed and on a real model."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.teachers import smollm2
from support.toy_engines import CharacterEngine, find, nodes_of

from slimkernels.search import PathFinder, PathFinderConfig, TransformersEngine, self_consistency
from slimkernels.search.branching import share_children


@pytest.mark.parametrize(
    ("scores", "factor", "temperature", "children"),
    [
        # Four children beyond one for each: softmax(-1, -2) = (0.731, 0.269), shares 2.92 and 1.08.
        ([-1.0, -2.0], 3, 1.0, [4, 2]),
        ([-1.0, -2.0], 3, 100.0, [3, 3]),
        ([-1.0, -2.0], 3, 0.1, [5, 1]),
        # Equal scores: three children, 1.5 each, and the one that is left goes to the first.
        ([0.5, 0.5, 0.5], 2, 0.1, [2, 2, 2]),
        ([0.5, 0.5, -math.inf], 2, 0.1, [3, 2, 1]),
        ([0.5, math.nan], 4, 0.1, [7, 1]),
        ([math.nan, math.nan], 4, 0.1, [4, 4]),
        ([1e308, -1e308], 3, 1e-300, [5, 1]),
        ([-1.0, -2.0], 1, 1.0, [1, 1]),
        ([-1.0], 3, 1.0, [3]),
    ],
)
def test_children_are_shared_out_as_worked_out_by_hand(scores, factor, temperature, children):
    assert share_children(scores, factor, temperature) == children


@given(
    scores=st.lists(st.floats(-50, 5) | st.just(math.nan), min_size=1, max_size=9),
    factor=st.integers(1, 6),
    temperature=st.floats(0.01, 100),
)
@settings(deadline=None)
def test_children_are_as_many_as_without_and_more_for_better_leaves(scores, factor, temperature):
    ranked = sorted(scores, key=lambda score: -score if not math.isnan(score) else math.inf)
    children = share_children(ranked, factor, temperature)
    assert sum(children) == len(scores) * factor
    assert min(children) >= 1
    assert children == sorted(children, reverse=True)


SCRIPT = {
    "": [("a\n", -1.0), ("b\n", -2.0), ("c\n", -2.0)],
    "a\n": [("x$", -1.0)] * 5,
    "b\n": [("y$", -1.0)] * 5,
}


@pytest.mark.parametrize(("temperature", "counts"), [(None, (3, 3)), (1.0, (4, 2)), (0.1, (5, 1))])
def test_leaves_with_better_scores_get_more_children(temperature, counts):
    engine, [result] = find(SCRIPT, branching_factor=3, branching_temperature=temperature, max_depth=2)
    paths = Counter(path[0] for path in nodes_of(result.tree) if len(path) == 2)
    assert (paths[0], paths[1]) == counts
    assert [len(batch) for batch in engine.batches] == [3, 6], "as many in all"


def test_leaves_share_what_the_token_budget_allows():
    # 6 tokens are spent, and four steps of 20 have room: one for each leaf, then those of the better one.
    _, [result] = find(SCRIPT, branching_factor=3, branching_temperature=0.1, max_depth=2, max_tokens=86)
    paths = Counter(path[0] for path in nodes_of(result.tree) if len(path) == 2)
    assert (paths[0], paths[1]) == (3, 1)
    assert "the budget of 86 tokens had room for 4 of 6 children at depth 2" in result.notes


LETTERS = PathFinderConfig(branching_factor=3, beam=3, max_depth=4, max_step_tokens=4, branching_temperature=0.2)


def letters(**fields):
    return PathFinder(CharacterEngine(-2.0), dataclasses.replace(LETTERS, **fields), checks=())


def comparable(results):
    return [(nodes_of(result.tree), result._replace(tree=None, seconds=0)) for result in results]


def test_sharing_does_not_depend_on_the_batch_or_an_interruption(tmp_path):
    questions, path, cut = list("pqr"), tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    finder = letters()
    results = comparable(finder.solve(questions, trace=path))
    assert comparable(letters(batch_questions=1).solve(questions)) == results
    planned = finder.plan(questions)
    assert planned.most_rows >= max(map(len, finder.engine.batches))
    lines = path.read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines) + 1, 2):
        cut.write_bytes(b"".join(lines[:kept]))
        assert comparable(letters().solve(questions, trace=cut)) == results
    # A step depends on its path alone, so the two searches agree where both have a node.
    plain = comparable(letters(branching_temperature=None).solve(questions))
    for (nodes, _), (others, _) in zip(results, plain, strict=True):
        assert all(others[path][0] == nodes[path][0] for path in nodes.keys() & others.keys())
    assert [nodes for nodes, _ in results] != [nodes for nodes, _ in plain]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"branching_temperature": 0}, "branching_temperature must be finite and above 0, or None, got 0"),
        ({"branching_temperature": math.nan}, "branching_temperature must be finite and above 0"),
        ({"branching_temperature": 1, "beam": 1}, "branching_temperature has no meaning where no depth"),
        ({"branching_temperature": 1, "max_depth": 1}, "branching_temperature has no meaning where no depth"),
        ({"branching_temperature": 1, "branching_factor": (4, 1)}, "branching_temperature has no meaning where"),
    ],
)
def test_sharing_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        PathFinderConfig(**fields)


def test_chains_share_nothing_out():
    assert self_consistency(CharacterEngine(), 3, LETTERS).config.branching_temperature is None


def test_sharing_of_a_real_model():
    engine = TransformersEngine(*smollm2())
    config = PathFinderConfig(
        branching_factor=3, beam=2, max_depth=2, max_step_tokens=3, step_delimiter=" ", branching_temperature=0.05
    )
    [result] = PathFinder(engine, config, checks=(), chat=False).solve(["One day a farmer went to"])
    tree = result.tree
    first = [node for node in range(1, len(tree)) if tree.depth[node] == 1 and node in tree.parent]
    ranked = config.pruning_score.ranked(tree, first)
    counts = [int((tree.parent == node).sum()) for node in ranked]
    assert counts == share_children(config.pruning_score(tree, ranked), 3, 0.05)
    assert (sum(counts), counts[0] > counts[1]) == (6, True)
