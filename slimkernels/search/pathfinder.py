"""``PathFinder``: tree search over reasoning steps. Read it from ``solve`` down; nothing here knows a model."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from slimkernels.search.checks import Check, CheckedBranch, CheckedStep, RepetitionCheck
from slimkernels.search.config import PathFinderConfig
from slimkernels.search.engine import Engine, Prompt, Step, StepRequest
from slimkernels.search.selection import Candidate, Scorer, consensus, select
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

    @property
    def reasons(self) -> dict[str, int]:
        """How many nodes ended for which reason."""
        return dict(Counter(reason for reason in self.tree.reasons if reason))


class PathFinder:
    """Grows a tree of reasoning steps for every question, keeps its best branches, and selects one.

    At every depth each open leaf gets ``branching_factor`` children, all of them and of all questions in one batch.
    A child that has no text or fails a check is generated again, and cut after ``max_attempts``. Of each question the
    best ``beam`` leaves go on, and the best ``buffer_size`` hypotheses are kept. What is left at the end goes to the
    selector.

    A node's noise is keyed by the configuration's seed, the prompt, the node's path and the attempt: other questions,
    batches and pruned branches do not change it. Equal prompts have equal trees.

    Args:
        engine: The language model.
        config: How to search; by default ``PathFinderConfig()``.
        checks: Of new steps, in this order; by default a ``RepetitionCheck``. Add a ``ContradictionCheck``, which needs
            an NLI model. ``()``: none.
        selector: Scores the candidates of a question; by default ``consensus()``.

    References: Golovneva et al. 2023, "PathFinder: Guided search over multi-step reasoning paths", arXiv 2312.05180.
    """

    def __init__(
        self,
        engine: Engine,
        config: PathFinderConfig | None = None,
        *,
        checks: Sequence[Check] | None = None,
        selector: Scorer | None = None,
    ) -> None:
        self.engine = engine
        self.config = config or PathFinderConfig()
        self.checks = (RepetitionCheck(),) if checks is None else tuple(checks)
        self.selector = selector or consensus()

    def solve(self, questions: Sequence[str | Question]) -> list[Result]:
        """Searches every question; the results in the same order.

        Args:
            questions: Prompts, or prompts with their contexts.

        Returns:
            One result each, also where nothing was found.

        Raises:
            ValueError: An empty question, or one that the engine cannot take. All are looked at before the first is
                searched.
            FloatingPointError: The model gave logits that are NaN.
        """
        return [result for _, result in self.solve_each(questions)]

    def solve_each(self, questions: Sequence[str | Question]) -> Iterator[tuple[int, Result]]:
        """``solve``, a question's index and result at a time, as soon as its batch of questions is done."""
        if isinstance(questions, (str, Question)):
            raise TypeError(
                f"questions must be a sequence of questions, got one {type(questions).__name__}: [question]"
            )
        asked = [self._checked(index, question) for index, question in enumerate(questions)]
        for first in range(0, len(asked), self.config.batch_questions):
            batch = asked[first : first + self.config.batch_questions]
            yield from enumerate(self._solve_together(batch), first)

    async def solve_async(self, questions: Sequence[str | Question]) -> list[Result]:
        """``solve`` in a thread, for callers that have an event loop to keep running."""
        return await asyncio.to_thread(self.solve, questions)

    def _checked(self, index: int, question: str | Question) -> Question:
        if isinstance(question, str):
            question = Question(question)
        prompt, context = question
        if not len(prompt) or (isinstance(prompt, str) and not prompt.strip()):
            raise ValueError(f"questions[{index}] must have a prompt with text in it, got an empty one")
        try:
            self.engine.check(prompt)
        except ValueError as error:
            raise ValueError(f"questions[{index}]: {error}") from error
        if context is None:
            context = prompt if isinstance(prompt, str) else ""
        return Question(prompt, context)

    def _solve_together(self, questions: Sequence[Question]) -> list[Result]:
        config = self.config
        deadline = None if config.time_limit_s is None else time.monotonic() + config.time_limit_s
        branches = self.engine.start([question.prompt for question in questions])
        searches = [
            _Search(self.engine, config, question, branch) for question, branch in zip(questions, branches, strict=True)
        ]
        limit = "depth"
        try:
            for depth in range(config.max_depth):
                if deadline is not None and time.monotonic() >= deadline:
                    limit = "budget"
                    break
                if not self._branch(searches, depth, deadline):
                    break
                for search in searches:
                    search.prune()
            for search in searches:
                search.end(limit)
        finally:
            for search in searches:
                search.close()
        return [self._select(search) for search in searches]

    def _branch(self, searches: Sequence[_Search], depth: int, deadline: float | None) -> bool:
        """Gives every open leaf its children, in one batch; what fails is generated again, in one batch."""
        children = [child for search in searches for child in search.new_children(self.config.branching_at(depth))]
        pending = children
        for attempt in range(self.config.max_attempts):
            if attempt > 0:
                late = deadline is not None and time.monotonic() >= deadline
                pending = [] if late else _affordable([child for child in children if child.failure])
            if not pending:
                break
            self._generate(pending, depth)
            self._check(pending, depth)
        for child in children:
            child.search.add(child)
        return bool(children)

    def _generate(self, children: Sequence[_Child], depth: int) -> None:
        config = self.config
        requests = []
        for child in children:
            path = child.path
            requests.append(
                StepRequest(
                    branch=child.search.branch_of[child.parent],
                    path=path,
                    attempt=child.attempts,
                    seed=node_seed(config.seed, child.search.question.prompt, path, child.attempts),
                    temperature=config.temperature_at(depth),
                    top_k=config.top_k,
                    top_p=config.top_p,
                    max_tokens=config.max_step_tokens,
                )
            )
        embed = any(check.needs_embeddings for check in self.checks)
        for child, step in zip(children, self.engine.extend(requests, config.is_step, embed=embed), strict=True):
            child.receive(step)

    def _check(self, children: Sequence[_Child], depth: int) -> None:
        """Sets every child's ``failure``: nothing where it passes, else the first check that it fails."""
        for child in children:
            # After a whole step, an end of text alone is the end of the branch; at the root it is no answer at all.
            ends = depth > 0 and child.step.end == "end_of_text"
            child.failure = "" if child.has_text or ends else "empty"
        for check in self.checks:
            passing = [child for child in children if not child.failure and child.has_text]
            if not passing:
                return
            branches = [child.search.checked_branch(child) for child in passing]
            for child, fails in zip(passing, check(branches), strict=True):
                child.failure = check.name if fails else ""

    def _select(self, search: _Search) -> Result:
        tree = search.tree
        nodes = tree.with_status(Status.FINISHED)
        finished = bool(nodes)
        if not finished:
            nodes = [node for node in tree.with_status(Status.ENDED) if node != ROOT]
        candidates = [search.candidate(node) for node in nodes]
        scores = [float(score) for score in self.selector(candidates)] if candidates else []
        best = candidates[select(candidates, scores)] if candidates else None
        checks = tuple(check.name for check in self.checks)
        notes = () if "contradiction" in checks else ("the contradiction check was off: no NLI model was given",)
        if best is None:
            ends = Counter(reason for reason in tree.reasons if reason)
            notes += ("no branch was left: " + ", ".join(f"{count} {why}" for why, count in sorted(ends.items())),)
        return Result(
            text=best.text if best else "",
            answer=best.answer if best else None,
            finished=finished,
            node=best.node if best else None,
            candidates=candidates,
            scores=scores,
            num_tokens=search.num_tokens,
            tree=tree,
            checks=checks,
            notes=notes,
        )


class _Child:
    """A node to be: generated, checked, perhaps generated again, then added to the tree."""

    def __init__(self, search: _Search, parent: int, ordinal: int) -> None:
        self.search, self.parent, self.ordinal = search, parent, ordinal
        self.path = (*search.tree.path(parent), ordinal)
        self.attempts = 0
        self.failure = ""
        self.step: Step
        self.checked: CheckedStep

    @property
    def has_text(self) -> bool:
        return bool(self.step.text.strip())

    def receive(self, step: Step) -> None:
        if self.attempts:
            self.search.release(self.step.branch)
        self.search.hold(step.branch)
        self.search.num_tokens += len(step.token_ids)
        self.attempts += 1
        self.step = step
        self.checked = CheckedStep(step.text, step.embedding)


class _Search:
    """The tree of one question, and the engine's branches of its open leaves."""

    def __init__(self, engine: Engine, config: PathFinderConfig, question: Question, branch: int) -> None:
        self.config, self.question = config, question
        self.tree = Tree()
        self.num_tokens = 0
        self.branch_of = {ROOT: branch}
        self._engine = engine
        self._held = {branch}
        self._checked: dict[int, CheckedStep] = {}

    def affordable_steps(self) -> int | None:
        """Whole steps that the token budget still allows; None: no limit."""
        if self.config.max_tokens is None:
            return None
        return (self.config.max_tokens - self.num_tokens) // self.config.max_step_tokens

    def new_children(self, factor: int) -> list[_Child]:
        """``factor`` for each open leaf; where that is too much, the better leaves' first, and a first for all first."""
        leaves = self._ranked(self.tree.with_status(Status.OPEN))
        wanted = [(leaf, ordinal) for ordinal in range(factor) for leaf in leaves][: self.affordable_steps()]
        for leaf in leaves[len(wanted) :]:
            self._close_leaf(leaf, Status.ENDED, "budget")
        return [_Child(self, leaf, ordinal) for leaf, ordinal in sorted(wanted)]

    def checked_branch(self, child: _Child) -> CheckedBranch:
        earlier = [self._checked[node] for node in self.tree.branch(child.parent)]
        return CheckedBranch(self.question.context or "", earlier, child.checked)

    def add(self, child: _Child) -> None:
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
        self._held.add(branch)

    def release(self, branch: int) -> None:
        self._held.remove(branch)
        self._engine.free(branch)

    def close(self) -> None:
        for branch in sorted(self._held):
            self.release(branch)

    def _ranked(self, nodes: Sequence[int]) -> list[int]:
        return self.tree.best(nodes, len(nodes), self.config.length_penalty)

    def _close_leaf(self, node: int, status: Status, reason: str = "") -> None:
        self.tree.mark(node, status, reason)
        if node in self.branch_of:
            self.release(self.branch_of.pop(node))


def node_seed(seed: int, prompt: Prompt, path: Sequence[int], attempt: int) -> int:
    """The int64 that keys a node's noise: of the search's seed, the prompt, the node's path and the attempt."""
    name = prompt if isinstance(prompt, str) else [int(token) for token in prompt]
    key = repr((seed, name, tuple(path), attempt)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)


def _affordable(children: Sequence[_Child]) -> list[_Child]:
    """Those of the children for which their question's token budget has a whole step."""
    taken: Counter[int] = Counter()
    affordable = []
    for child in children:
        steps = child.search.affordable_steps()
        if steps is None or taken[id(child.search)] < steps:
            taken[id(child.search)] += 1
            affordable.append(child)
    return affordable
