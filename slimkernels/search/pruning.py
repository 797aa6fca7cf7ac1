"""``PruningScore``: the score of a branch by which a search keeps its leaves and hypotheses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from slimkernels.search.tree import Tree

# Computes one number for the last step of each of n branches, the higher the better; called once for all branches of
# all questions at a depth. A branch is given by the texts of its steps, without those of white space:
#     def score_steps(texts: Sequence[Sequence[str]], context: Sequence[str]) -> Sequence[float]:
#         return [float(steps[-1].strip() in question) for steps, question in zip(texts, context)]
# A scorer may also have ``settings``, a dict of JSON values that its numbers depend on, as a ``Check`` may.
StepScorer = Callable[[Sequence[Sequence[str]], Sequence[str]], Sequence[float] | np.ndarray]
Reduction = Literal["last", "min", "mean", "product"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


class PruningScore(NamedTuple):
    """The score of a branch, the higher the better.

    score = (1 - weight) * sum_logprob / num_tokens^length_penalty + weight * reduction(step scores)

    The first term is in nats per token if ``length_penalty`` is 1, the second in the scorer's own unit. A branch none
    of whose steps has a score, because they show no text, scores NaN if ``weight`` is above 0, and ranks last.

    Attributes:
        length_penalty: Exponent of the number of tokens.
        weight: Share of the step scores, in [0, 1].
        reduction: Combination of the scores of a branch's steps into one: "last" | "min" | "mean" | "product".
    """

    length_penalty: float = 1.0
    weight: float = 0.0
    reduction: Reduction = "last"

    @classmethod
    def of_header(cls, config: Mapping[str, Any]) -> PruningScore:
        """Returns the score of the search whose trace has this configuration in its header."""
        weight = config.get("score_weight", 0.0) if config.get("score_steps") else 0.0
        return cls(float(config["length_penalty"]), float(weight), config.get("score_reduction", "last"))

    def __call__(self, tree: Tree, nodes: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the score (n,) float64 of the branch that ends with each of n nodes."""
        if self.weight == 0:
            return tree.scores(nodes, self.length_penalty)
        reduced = np.array([self.reduce(tree.branch_step_scores(node)) for node in nodes], np.float64)
        if self.weight == 1:
            return reduced
        return (1 - self.weight) * tree.scores(nodes, self.length_penalty) + self.weight * reduced

    def reduce(self, step_scores: Sequence[float]) -> float:
        """Combines the scores of a branch's steps, from the first to the last; NaN without any."""
        if not step_scores:
            return math.nan
        if self.reduction == "last":
            return step_scores[-1]
        if self.reduction == "min":
            return min(step_scores)
        return math.prod(step_scores) if self.reduction == "product" else sum(step_scores) / len(step_scores)

    def ranked(self, tree: Tree, nodes: Sequence[int]) -> list[int]:
        """Returns nodes with the best branch first; ties go to the lower index, and NaN comes last."""
        order = np.lexsort((np.asarray(nodes, np.int64), -self(tree, nodes)))
        return [nodes[index] for index in order]
