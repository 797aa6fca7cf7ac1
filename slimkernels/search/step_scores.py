"""Scores of new steps by a scorer such as a process-reward model: one call for all questions at a depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slimkernels.search.pruning import StepScorer
from slimkernels.search.question import QuestionSearch


class StepScoreError(ValueError):
    """``score_steps`` raised an error, or returned something other than one finite number for each branch."""


def score_new_steps(scorer: StepScorer, searches: Sequence[QuestionSearch], depth: int) -> None:
    """Scores the steps that questions got at a depth, and keeps the scores in their trees.

    Steps without text have no score, nor have those that were cut or merged.

    Args:
        scorer: Function from branches and contexts to scores.
        searches: Searches of the questions.
        depth: Depth of the nodes, 1 for the root's children.

    Raises:
        StepScoreError: The scorer raised an error other than OSError, or returned something else than finite numbers.
    """
    new = [(search, node) for search in searches for node in search.new_hypotheses(depth)]
    asked = [(search, node) for search, node in new if search.tree.steps[node].strip()]
    if not asked:
        return
    texts = [tuple(step for step in search.tree.step_texts(node) if step.strip()) for search, node in asked]
    scores = _scores(scorer, texts, [search.question.context or "" for search, _ in asked], depth)
    for (search, node), score in zip(asked, scores, strict=True):
        search.tree.set_step_score(node, score)


def _scores(scorer: StepScorer, texts: Sequence[Sequence[str]], context: Sequence[str], depth: int) -> list[float]:
    advice = "a trace holds every depth before this one, and the same search goes on from there"
    try:
        scores = np.asarray(scorer(texts, context), np.float64)
    except OSError:
        raise  # such as a server that cannot be reached, whose message is for the user already
    except Exception as error:
        raise StepScoreError(
            f"score_steps raised {type(error).__name__} for the {len(texts)} branches of depth {depth} ({error}): "
            f"{advice}"
        ) from error
    if scores.shape != (len(texts),):
        raise StepScoreError(
            f"score_steps must return one number for each of the {len(texts)} branches of depth {depth}, got shape "
            f"{scores.shape}: {advice}"
        )
    if not np.isfinite(scores).all():
        place = int(np.argmin(np.isfinite(scores)))
        raise StepScoreError(
            f"score_steps must return finite numbers, got {scores[place]} for the step {texts[place][-1].strip()!r} of "
            f"depth {depth}: {advice}"
        )
    return scores.tolist()
