"""Siblings whose steps are equal, or nearly so, become one node that carries their weights."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from slimkernels.search.answers import canonical
from slimkernels.search.checks import Embed, embed_texts, scaled_cosine
from slimkernels.search.question import QuestionSearch
from slimkernels.search.tree import Status

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def merge_new_siblings(
    searches: Sequence[QuestionSearch], depth: int, similarity: float, embed: Embed | None = None
) -> None:
    """Merges the new steps of a depth into the first sibling that is like them, in the order of their ordinals.

    Two siblings are alike if the words of their steps are equal, or if (1 + cos) / 2 of the steps' embeddings is at
    least ``similarity`` and the steps have the same numbers in the same order. Finished siblings must also give the
    same answer, and one that is finished is never merged with one that goes on.

    Args:
        searches: Searches of the questions.
        depth: Depth of the nodes, 1 for the root's children.
        similarity: Least similarity, in [0, 1]; 1 merges equal texts alone.
        embed: Function from n texts to embeddings (n, d), called once; None uses those of the engine.
    """
    families = [(search, family) for search in searches for family in _families(search, depth)]
    vectors: dict[str, np.ndarray] = {}
    if similarity < 1 and embed is not None:
        texts = list(dict.fromkeys(search.tree.steps[node] for search, family in families for node in family))
        vectors = dict(zip(texts, embed_texts(embed, texts), strict=True)) if texts else {}
    for search, family in families:
        kept: list[int] = []
        for node in family:
            like = (other for other in kept if _are_alike(search, other, node, similarity, vectors))
            if (into := next(like, None)) is None:
                kept.append(node)
            else:
                search.merge(node, into)


def _families(search: QuestionSearch, depth: int) -> list[list[int]]:
    """Returns the new hypotheses of each parent that has several; without open steps that show no text yet."""
    tree, families = search.tree, dict[int, list[int]]()
    for node in search.new_hypotheses(depth):
        if tree.steps[node].strip() or tree.status[node] == Status.FINISHED:
            families.setdefault(int(tree.parent[node]), []).append(node)
    return [family for family in families.values() if len(family) > 1]


def _are_alike(
    search: QuestionSearch, first: int, second: int, similarity: float, vectors: dict[str, np.ndarray]
) -> bool:
    tree, config = search.tree, search.config
    texts = tree.steps[first], tree.steps[second]
    # A step that its limit of tokens cut off goes on within its line, one of the same words that ended does not.
    if tree.status[first] != tree.status[second] or config.is_step(texts[0]) != config.is_step(texts[1]):
        return False
    if texts[0].split() == texts[1].split():
        return tree.replaces[first] == tree.replaces[second]
    if similarity == 1 or _NUMBER.findall(texts[0]) != _NUMBER.findall(texts[1]):
        return False
    if tree.status[first] == Status.FINISHED and len({_answer(search, node) for node in (first, second)}) > 1:
        return False
    left, right = (vectors.get(tree.steps[node], search.embedding(node)) for node in (first, second))
    return left is not None and right is not None and scaled_cosine(left, right) >= similarity


def _answer(search: QuestionSearch, node: int) -> object:
    answer = search.candidate(node).answer
    return None if answer is None else canonical(answer, "any")
