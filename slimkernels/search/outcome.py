"""The outcome of one question: ``Result``, and ``select_result``, which chooses among the hypotheses of its tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from slimkernels.search.checks import Check
from slimkernels.search.question import QuestionSearch
from slimkernels.search.selection import Candidate, Scorer, select
from slimkernels.search.tree import ROOT, Status, Tree


class Result(NamedTuple):
    """The outcome of one question.

    Attributes:
        text: Text of the selected branch, without the prompt. If no branch is left, that of the best partial one; empty
            if the model wrote nothing.
        answer: Answer that the text announces, by the configuration's ``answer_kind`` or ``answer_pattern``, or None.
        finished: Whether the selected branch came to its own end. False if a limit ended all branches that are left, or
            if none is left.
        node: Selected node of ``tree``; None if the model wrote nothing.
        candidates: Hypotheses given to the selector: the finished ones; if none is finished, those that a limit ended;
            if all were cut, what is left of them.
        scores: The selector's score of each candidate.
        num_tokens: Tokens generated for this question, those of cut and pruned nodes included.
        tree: Tree of all nodes, with the reason why each ended.
        checks: Names of the checks that ran. A step without text fails even if there are no checks.
        notes: Remarks that a reader of the result should know, such as a check that is off.
        seconds: Time from the start of the question's batch to the question's own end, without interruptions.
        saved_tokens: Most tokens that the search would still have generated, if ``stop_when_agreed`` stopped it; else
            0.
    """

    text: str
    answer: str | None
    finished: bool
    node: int | None
    candidates: list[Candidate]
    scores: list[float]
    num_tokens: int
    tree: Tree
    checks: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float = 0.0
    saved_tokens: int = 0

    @property
    def reasons(self) -> dict[str, int]:
        """Number of nodes that ended for each reason."""
        return self.tree.count_reasons()


def select_result(
    search: QuestionSearch, selector: Scorer, checks: Sequence[Check], engine_notes: Sequence[str]
) -> Result:
    """Selects one of the finished branches, or else of those that a limit ended, or else of those that were cut."""
    tree = search.tree
    nodes = tree.with_status(Status.FINISHED)
    finished = bool(nodes)
    if not finished:
        nodes = [node for node in tree.with_status(Status.ENDED) if node != ROOT]
    if not nodes:
        nodes = sorted(search.ranked(tree.partial_branches())[: search.config.buffer_size])
    candidates = [search.candidate(node) for node in nodes]
    scores = [float(score) for score in selector(candidates)] if candidates else []
    best = candidates[select(candidates, scores)] if candidates else None
    names = tuple(check.name for check in checks)
    # A search without any checks did not ask for this one.
    off = names and "contradiction" not in names
    notes = ("the contradiction check was off: no NLI model was given",) if off else ()
    saved_tokens, agreed = search.saved()
    notes += (*engine_notes, *search.notes(), *agreed)
    if not finished:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(tree.count_reasons().items()))
        if best is None:
            notes += (f"no branch was left: {reasons}",)
        elif tree.status[best.node] == Status.ENDED:
            notes += (f"no branch came to its own end: {reasons}; this is the best of those that a limit ended",)
        else:
            notes += (f"no branch was left: {reasons}; this is the best partial one",)
    return Result(
        text=best.text if best else "",
        answer=best.answer if best else None,
        finished=finished,
        node=best.node if best else None,
        candidates=candidates,
        scores=scores,
        num_tokens=search.progress.num_tokens,
        tree=tree,
        checks=names,
        notes=notes,
        seconds=search.progress.seconds,
        saved_tokens=saved_tokens,
    )
