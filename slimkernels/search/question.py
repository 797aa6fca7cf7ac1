"""The search of one question: ``Question``, ``QuestionSearch`` and ``Child`` while its tree grows."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from slimkernels.search.agreement import Agreement, Remainder, agreement, is_settled, remainder
from slimkernels.search.branching import share_children
from slimkernels.search.checks import CheckedBranch, CheckedStep
from slimkernels.search.config import PathFinderConfig
from slimkernels.search.engine import Engine, Prompt, Step
from slimkernels.search.selection import Candidate
from slimkernels.search.tree import ROOT, Status, Tree

AGREED = "agreed"  # the reason of leaves that an agreement ended


class QuestionError(ValueError):
    """An error for one of several questions that cannot be searched.

    Attributes:
        index: Index of the question among those of the call.
        reason: Clause that says what is wrong with it.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"questions[{index}]: {reason}")
        self.index, self.reason = index, reason


class Question(NamedTuple):
    """A prompt to continue, and the text that its steps must not contradict.

    Attributes:
        prompt: Everything that the model reads: a text, or its token ids.
        context: The question alone, for the contradiction check and for scorers. None takes the prompt if it is a text.
        choices: Texts that the letters A, B, ... stand for, if the answer is a letter.
        repeat: Number of earlier questions with the same prompt, from which this one's draws shall be independent; 0
            draws as if it were asked alone. None counts the questions of the call.
    """

    prompt: Prompt
    context: str | None = None
    choices: tuple[str, ...] = ()
    repeat: int | None = None


def count_repeats(questions: Sequence[Question]) -> list[Question]:
    """Returns the questions with every ``repeat`` of None replaced by the number of earlier ones with its prompt."""
    seen: collections.Counter[Any] = collections.Counter()
    counted = []
    for question in questions:
        prompt = plain_prompt(question.prompt)
        key = prompt if isinstance(prompt, str) else tuple(prompt)
        counted.append(question if question.repeat is not None else question._replace(repeat=seen[key]))
        seen[key] += 1
    return counted


@dataclasses.dataclass
class Progress:
    """The state of one question's search, from which it can resume.

    Attributes:
        tree: Nodes so far.
        depth: Number of depths that are complete.
        num_tokens: Tokens generated so far.
        seconds: Time since the start of the question's batch, without interruptions.
    """

    tree: Tree = dataclasses.field(default_factory=Tree)
    depth: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


class Child:
    """A future node: it is generated, checked, possibly generated again, and then added to the tree.

    Args:
        search: Search of the question.
        parent: Node to continue.
        ordinal: Rank among the parent's children, from 0.

    Attributes:
        path: Identity of the node in its tree.
        attempts: Number of times that its step was generated.
        failure: Name of the check that its step failed, "empty" for a step without text, or "".
        step: Step of the last attempt.
        checked: The same step as checks see it.
    """

    def __init__(self, search: QuestionSearch, parent: int, ordinal: int) -> None:
        self.search, self.parent, self.ordinal = search, parent, ordinal
        self.path = (*search.tree.path(parent), ordinal)
        self.attempts = 0
        self.failure = ""
        self.step: Step
        self.checked: CheckedStep

    @property
    def has_text(self) -> bool:
        """Whether the step has anything but white space."""
        return bool(self.step.text.strip())

    def receive(self, step: Step) -> None:
        """Takes a generated step."""
        self.search.hold(step.branch)
        self.search.progress.num_tokens += len(step.token_ids)
        self.attempts += 1
        self.step = step
        self.checked = CheckedStep(step.text, step.embedding)

    def discard(self) -> None:
        """Frees the branch of a failed step before the next attempt."""
        self.search.release(self.step.branch)


class QuestionSearch:
    """The tree of one question, and the engine's branches for its open leaves.

    Args:
        engine: Language model.
        config: Settings of the search.
        index: Index of the question among all questions.
        question: Question to search.
        progress: State to start from.

    Attributes:
        tree: The tree of ``progress``.
        branch_of: The engine's number of the branch that ends with a node, for open leaves.
    """

    def __init__(
        self, engine: Engine, config: PathFinderConfig, index: int, question: Question, progress: Progress
    ) -> None:
        self.config, self.index, self.question, self.progress = config, index, question, progress
        self.tree = progress.tree
        self.branch_of: dict[int, int] = {}
        self._engine = engine
        self._held: set[int] = set()  # all branches of the engine that are to be freed
        self._checked: dict[int, CheckedStep] = {}

    @property
    def is_open(self) -> bool:
        """Whether any leaf may still get children."""
        return bool(self.tree.with_status(Status.OPEN))

    def seed_of(self, path: Sequence[int], attempt: int) -> int:
        """Returns the int64 that keys the noise of the node at a path."""
        return node_seed(self.config.seed, self.question.prompt, path, attempt, self.question.repeat or 0)

    def start(self, branch: int) -> None:
        """Takes the engine's branch for the prompt."""
        self.hold(branch)
        self.branch_of[ROOT] = branch

    def nodes_to_replay(self) -> list[int]:
        """Returns the nodes on the branches of all open leaves, in ascending order."""
        leaves = self.tree.with_status(Status.OPEN)
        return sorted({node for leaf in leaves for node in self.tree.branch(leaf)})

    def receive_replayed(self, node: int, step: Step) -> None:
        """Takes the engine's branch for a node that is already in the tree."""
        self.hold(step.branch)
        self.branch_of[node] = step.branch
        self._checked[node] = CheckedStep(step.text, step.embedding)

    def release_expanded(self) -> None:
        """Frees the branches of nodes that are not open leaves."""
        for node in [node for node in self.branch_of if self.tree.status[node] != Status.OPEN]:
            self.release(self.branch_of.pop(node))

    def affordable_steps(self) -> int | None:
        """Returns the number of whole steps that the token budget still allows; None if there is no budget."""
        if self.config.max_tokens is None:
            return None
        # A server may have generated more than it was asked for.
        return max(0, self.config.max_tokens - self.progress.num_tokens) // self.config.max_step_tokens

    def new_children(self, factor: int) -> list[Child]:
        """Returns ``factor`` children for each open leaf, or as many in all, in the order of their leaves.

        If the token budget does not allow all of them, every leaf gets one child before any gets a second, best leaf
        first. Leaves without children are ended.
        """
        leaves = self.ranked(self.tree.with_status(Status.OPEN))
        counts = [factor] * len(leaves)
        if self.config.branching_temperature is not None:
            scores = self.config.pruning_score(self.tree, leaves)
            counts = share_children(scores, factor, self.config.branching_temperature)
        wanted = [
            (leaf, ordinal)
            for ordinal in range(max(counts))
            for leaf, count in zip(leaves, counts, strict=True)
            if ordinal < count
        ]
        affordable = wanted[: self.affordable_steps()]
        for leaf in leaves[len(affordable) :]:
            self._close_leaf(leaf, Status.ENDED, "budget")
        return [Child(self, leaf, ordinal) for leaf, ordinal in sorted(affordable)]

    def notes(self) -> tuple[str, ...]:
        """Returns what merging and the token budget changed, for the notes of the result."""
        return (*self._merged_note(), *self._budget_note())

    def _merged_note(self) -> tuple[str, ...]:
        count = len(self.tree.with_status(Status.MERGED))
        return (f"{count} of {len(self.tree) - 1} steps were merged into a sibling like them",) if count else ()

    def _budget_note(self) -> tuple[str, ...]:
        tree, depths = self.tree, []
        if self.config.max_tokens is None:
            return ()
        for depth in range(int(tree.depth.max()) + 1):
            at_depth = [node for node in range(len(tree)) if tree.depth[node] == depth]
            children = int(np.count_nonzero(np.isin(tree.parent, at_depth)))
            expanded = sum(tree.status[node] == Status.EXPANDED for node in at_depth)
            leaves = expanded + sum(tree.reasons[node] == "budget" for node in at_depth)
            wanted = leaves * self.config.branching_at(depth)
            # If no leaf was expanded, the time limit may be what ended them.
            if children < wanted and (expanded or self.config.time_limit_s is None):
                depths.append(f"{children} of {wanted} children at depth {depth + 1}")
        if not depths:
            return ()
        return (f"the budget of {self.config.max_tokens} tokens had room for {', '.join(depths)}",)

    def checked_branch(self, child: Child) -> CheckedBranch:
        """Returns a child and the steps before it as checks see them."""
        earlier = [self._checked[node] for node in self.tree.branch(child.parent)]
        return CheckedBranch(self.question.context or "", earlier, child.checked)

    def add(self, child: Child) -> None:
        """Adds a child to the tree, and marks its parent as expanded."""
        step, tree = child.step, self.tree
        if child.parent in self.branch_of:
            self._close_leaf(child.parent, Status.EXPANDED)
        node = tree.add(
            child.parent,
            child.ordinal,
            step.token_ids,
            step.text,
            step.sum_logprob,
            attempts=child.attempts,
            replaces=step.replaces,
        )
        self.branch_of[node] = step.branch
        self._checked[node] = child.checked
        if child.failure:
            self._close_leaf(node, Status.CUT, child.failure)
        elif step.end == "end_of_text" or self._is_final(child):
            self._close_leaf(node, Status.FINISHED, "finished")
        elif step.end == "context":
            self._close_leaf(node, Status.ENDED, "context")

    def _is_final(self, child: Child) -> bool:
        before = self.tree.text(child.parent)
        before = before[: max(0, len(before) - child.step.replaces)]
        complete = child.step.end == "step"
        return self.config.is_final(child.step.text, before, self.question.choices, complete=complete)

    def prune(self) -> None:
        """Prunes all but the best ``beam`` open leaves, then all but the best ``buffer_size`` hypotheses."""
        for leaf in self.ranked(self.tree.with_status(Status.OPEN))[self.config.beam :]:
            self._close_leaf(leaf, Status.PRUNED, "pruned")
        for node in self.ranked(self.tree.hypotheses())[self.config.buffer_size :]:
            self._close_leaf(node, Status.PRUNED, "pruned")

    def stop_if_agreed(self) -> None:
        """Ends the open leaves if the finished branches agree, by ``stop_when_agreed``. Call it after ``prune``."""
        leaves = self.tree.with_status(Status.OPEN)
        if self.config.stop_when_agreed is None or not leaves or self.progress.depth == self.config.max_depth:
            return
        if is_settled(self.config, self._agreement(), len(self.tree.hypotheses()), self._remainder(len(leaves))):
            self.end(AGREED)

    def _agreement(self) -> Agreement:
        candidates = [self.candidate(node) for node in self.tree.with_status(Status.FINISHED)]
        return agreement([c.answer for c in candidates], [c.weight for c in candidates])

    def _remainder(self, num_leaves: int) -> Remainder:
        return remainder(self.config, self.progress.depth, num_leaves, self.affordable_steps())

    def saved(self) -> tuple[int, tuple[str, ...]]:
        """Returns the tokens that stopping at an agreement saved at most, and a note on what it left out."""
        num_leaves = self.tree.reasons.count(AGREED)
        if num_leaves == 0:
            return 0, ()
        found, left = self._agreement(), self._remainder(num_leaves)
        # A branch that siblings are merged into has more than one vote.
        is_certain = self.config.merge_siblings is None and found.others + left.branches < found.votes
        could = "could not have" if is_certain else "could have"
        branches = f"{left.branches} branch{'' if left.branches == 1 else 'es'}"
        return left.tokens, (
            f"stopped where {found.votes:g} finished branches agreed on {found.answer!r}: at most {branches} more, of "
            f"{left.tokens} tokens, were left, which {could} outvoted it",
        )

    def end(self, reason: str) -> None:
        """Ends the leaves that are still open."""
        for leaf in self.tree.with_status(Status.OPEN):
            self._close_leaf(leaf, Status.ENDED, reason)

    def new_hypotheses(self, depth: int) -> list[int]:
        """Returns the nodes of a depth that are still hypotheses."""
        return [node for node in self.tree.hypotheses() if self.tree.depth[node] == depth]

    def embedding(self, node: int) -> np.ndarray | None:
        """Returns the embedding of a node's step, as its checks saw it; None if the engine gave none."""
        return self._checked[node].embedding

    def merge(self, node: int, into: int) -> None:
        """Merges a node into a sibling, and frees its branch."""
        self.tree.merge(node, into)
        self._close_leaf(node, Status.MERGED, "merged")

    def ranked(self, nodes: Sequence[int]) -> list[int]:
        """Returns nodes by their pruning scores, best first."""
        return self.config.pruning_score.ranked(self.tree, nodes)

    def candidate(self, node: int) -> Candidate:
        """Returns a node as selectors see it."""
        text = self.tree.text(node)
        return Candidate(
            node=node,
            text=text,
            answer=self.config.answer(text, self.question.choices),
            sum_logprob=float(self.tree.sum_logprob[node]),
            num_tokens=int(self.tree.num_tokens[node]),
            context=self.question.context or "",
            weight=float(self.tree.weight[node]),
            step_score=self.config.pruning_score.reduce(self.tree.branch_step_scores(node)),
        )

    def hold(self, branch: int) -> None:
        """Records a branch of the engine, which is to be freed."""
        self._held.add(branch)

    def release(self, branch: int) -> None:
        """Frees a branch of the engine."""
        self._held.remove(branch)
        self._engine.free(branch)

    def close(self) -> None:
        """Frees all branches of the engine."""
        for branch in sorted(self._held):
            self.release(branch)

    def _close_leaf(self, node: int, status: Status, reason: str = "") -> None:
        """Marks a node that gets no more children, and frees its branch."""
        self.tree.mark(node, status, reason)
        if node in self.branch_of:
            self.release(self.branch_of.pop(node))


def node_seed(seed: int, prompt: Prompt, path: Sequence[int], attempt: int, repeat: int = 0) -> int:
    """Returns the int64 that keys a node's noise: a hash of the search's seed, the prompt, the path and the attempt.

    Of a prompt that is asked again, the number of the ``repeat`` is hashed as well.
    """
    key = (seed, plain_prompt(prompt), tuple(path), attempt, *((repeat,) if repeat else ()))
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little", signed=True)


def plain_prompt(prompt: Prompt) -> str | list[int]:
    """Returns a prompt as a JSON value: a text, or a list of Python integers."""
    return prompt if isinstance(prompt, str) else [int(token) for token in prompt]
