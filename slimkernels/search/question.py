"""The search of one question: ``Question`` in, ``QuestionSearch`` and ``Child`` while it grows, ``Result`` out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from slimkernels.search.checks import CheckedBranch, CheckedStep
from slimkernels.search.config import PathFinderConfig
from slimkernels.search.engine import Engine, Prompt, Step
from slimkernels.search.selection import Candidate
from slimkernels.search.tree import ROOT, Status, Tree


class Question(NamedTuple):
    """What to continue, and what of it the steps must not contradict.

    Attributes:
        prompt: All that the model reads: a text, or its token ids.
        context: The question alone, for the contradiction check and for scorers; None: the prompt, if it is a text.
    """

    prompt: Prompt
    context: str | None = None


class Result(NamedTuple):
    """The outcome of one question.

    Attributes:
        text: The selected branch, without the prompt; empty where there is none.
        answer: What ``answer_pattern`` found in it, or None.
        finished: Whether the selected branch came to its end by itself; False where all that was left had run into a
            limit, or where nothing was left.
        node: The selected node of ``tree``; None where nothing was left.
        candidates: What was selected from: the finished hypotheses kept, or, where there are none, the others.
        scores: The selector's score of each candidate.
        num_tokens: Generated for this question, those of cut and pruned nodes included.
        tree: Every node, with why it ended.
        checks: The names of the checks that ran; a step without text also fails without them.
        notes: What to know about the result, such as a check that is off.
        seconds: From the start of its batch of questions to its own end, interruptions left out.
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

    @property
    def reasons(self) -> dict[str, int]:
        """How many nodes ended for which reason."""
        return dict(Counter(reason for reason in self.tree.reasons if reason))


@dataclasses.dataclass
class Progress:
    """How far the search of one question has come.

    Attributes:
        tree: Its nodes.
        depth: Depths that are done.
        num_tokens: Generated so far.
        seconds: Since the start of its batch of questions, interruptions left out.
    """

    tree: Tree = dataclasses.field(default_factory=Tree)
    depth: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


class Child:
    """A node to be: generated, checked, perhaps generated again, then added to the tree."""

    def __init__(self, search: QuestionSearch, parent: int, ordinal: int) -> None:
        self.search, self.parent, self.ordinal = search, parent, ordinal
        self.path = (*search.tree.path(parent), ordinal)
        self.attempts = 0
        self.failure = ""
        self.step: Step
        self.checked: CheckedStep

    @property
    def has_text(self) -> bool:
        """Whether its step is more than white space."""
        return bool(self.step.text.strip())

    def receive(self, step: Step) -> None:
        """Takes a generated step."""
        self.search.hold(step.branch)
        self.search.progress.num_tokens += len(step.token_ids)
        self.attempts += 1
        self.step = step
        self.checked = CheckedStep(step.text, step.embedding)

    def discard(self) -> None:
        """Frees a step that failed, before it is generated again."""
        self.search.release(self.step.branch)


class QuestionSearch:
    """The tree of one question, and the engine's branches of its open leaves.

    Args:
        engine: The language model.
        config: How to search.
        index: The question's, among all.
        question: What is searched.
        progress: Where to go on.
    """

    def __init__(
        self, engine: Engine, config: PathFinderConfig, index: int, question: Question, progress: Progress
    ) -> None:
        self.config, self.index, self.question, self.progress = config, index, question, progress
        self.tree = progress.tree
        self.branch_of: dict[int, int] = {}
        self._engine = engine
        self._held: set[int] = set()
        self._checked: dict[int, CheckedStep] = {}

    @property
    def is_open(self) -> bool:
        """Whether there is a leaf that may branch."""
        return bool(self.tree.with_status(Status.OPEN))

    def start(self, branch: int) -> None:
        """Takes the engine's branch of the prompt."""
        self.hold(branch)
        self.branch_of[ROOT] = branch

    def nodes_to_replay(self) -> Iterator[int]:
        """Those that the engine must know again so that the open leaves can branch, rising."""
        leaves = self.tree.with_status(Status.OPEN)
        return iter(sorted({node for leaf in leaves for node in self.tree.branch(leaf)}))

    def replayed(self, node: int, step: Step) -> None:
        """Takes the engine's branch of a node that was in the tree."""
        self.hold(step.branch)
        self.branch_of[node] = step.branch
        self._checked[node] = CheckedStep(step.text, step.embedding)

    def release_expanded(self) -> None:
        """Frees the branches that only led to others."""
        for node in [node for node in self.branch_of if self.tree.status[node] != Status.OPEN]:
            self.release(self.branch_of.pop(node))

    def affordable_steps(self) -> int | None:
        """Whole steps that the token budget still allows; None: no limit."""
        if self.config.max_tokens is None:
            return None
        # A server may have generated more than it was asked for.
        return max(0, self.config.max_tokens - self.progress.num_tokens) // self.config.max_step_tokens

    def new_children(self, factor: int) -> list[Child]:
        """``factor`` for each open leaf; where that is too much, one for each in turn, the best leaf first."""
        leaves = self._ranked(self.tree.with_status(Status.OPEN))
        wanted = [(leaf, ordinal) for ordinal in range(factor) for leaf in leaves][: self.affordable_steps()]
        for leaf in leaves[len(wanted) :]:
            self._close_leaf(leaf, Status.ENDED, "budget")
        return [Child(self, leaf, ordinal) for leaf, ordinal in sorted(wanted)]

    def checked_branch(self, child: Child) -> CheckedBranch:
        """The child with the steps above it."""
        earlier = [self._checked[node] for node in self.tree.branch(child.parent)]
        return CheckedBranch(self.question.context or "", earlier, child.checked)

    def add(self, child: Child) -> None:
        """Makes the child a node; its parent has branched."""
        step, tree = child.step, self.tree
        if child.parent in self.branch_of:
            self._close_leaf(child.parent, Status.EXPANDED)
        node = tree.add(
            child.parent, child.ordinal, step.token_ids, step.text, step.sum_logprob, attempts=child.attempts
        )
        self.branch_of[node] = step.branch
        self._checked[node] = child.checked
        if child.failure:
            self._close_leaf(node, Status.CUT, child.failure)
        elif step.end == "end_of_text" or self.config.is_final(step.text):
            self._close_leaf(node, Status.FINISHED, "finished")
        elif step.end == "context":
            self._close_leaf(node, Status.ENDED, "context")

    def prune(self) -> None:
        """Keeps the best ``beam`` open leaves, and the best ``buffer_size`` hypotheses of all kinds."""
        leaves = self._ranked(self.tree.with_status(Status.OPEN))
        for leaf in leaves[self.config.beam :]:
            self._close_leaf(leaf, Status.PRUNED, "pruned")
        for node in self._ranked(self.hypotheses())[self.config.buffer_size :]:
            self._close_leaf(node, Status.PRUNED, "pruned")

    def hypotheses(self) -> list[int]:
        """The nodes that are kept: open leaves, finished branches, and those that a limit ended."""
        return sorted(
            node for status in (Status.OPEN, Status.FINISHED, Status.ENDED) for node in self.tree.with_status(status)
        )

    def end(self, reason: str) -> None:
        """Ends the leaves that are still open."""
        for leaf in self.tree.with_status(Status.OPEN):
            self._close_leaf(leaf, Status.ENDED, reason)

    def candidate(self, node: int) -> Candidate:
        """A node as selectors see it."""
        text = self.tree.text(node)
        return Candidate(
            node=node,
            text=text,
            answer=self.config.answer(text),
            sum_logprob=float(self.tree.sum_logprob[node]),
            num_tokens=int(self.tree.num_tokens[node]),
            context=self.question.context or "",
        )

    def hold(self, branch: int) -> None:
        """Notes a branch of the engine, to be freed."""
        self._held.add(branch)

    def release(self, branch: int) -> None:
        """Frees a branch of the engine."""
        self._held.remove(branch)
        self._engine.free(branch)

    def close(self) -> None:
        """Frees all branches of the engine."""
        for branch in sorted(self._held):
            self.release(branch)

    def _ranked(self, nodes: Sequence[int]) -> list[int]:
        return self.tree.best(nodes, len(nodes), self.config.length_penalty)

    def _close_leaf(self, node: int, status: Status, reason: str = "") -> None:
        self.tree.mark(node, status, reason)
        if node in self.branch_of:
            self.release(self.branch_of.pop(node))


def replay(searches: Sequence[QuestionSearch], engine: Engine, *, embed: bool) -> None:
    """Gives searches that were interrupted the engine's branches of their open leaves, a batch for each depth."""
    waiting = [(search, node) for search in searches for node in search.nodes_to_replay()]
    for depth in sorted({int(search.tree.depth[node]) for search, node in waiting}):
        level = [(search, node) for search, node in waiting if search.tree.depth[node] == depth]
        steps = [
            Step(
                branch=search.branch_of[int(search.tree.parent[node])],
                token_ids=search.tree.step_token_ids(node),
                text=search.tree.steps[node],
                sum_logprob=0.0,
                end="step",
            )
            for search, node in level
        ]
        for (search, node), step in zip(level, engine.replay(steps, embed=embed), strict=True):
            search.replayed(node, step)
    for search in searches:
        search.release_expanded()


def node_seed(seed: int, prompt: Prompt, path: Sequence[int], attempt: int) -> int:
    """The int64 that keys a node's noise: of the search's seed, the prompt, the node's path and the attempt."""
    name = prompt if isinstance(prompt, str) else [int(token) for token in prompt]
    key = repr((seed, name, tuple(path), attempt)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)
