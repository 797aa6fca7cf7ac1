"""``PathFinder``: tree search over reasoning steps. Read it from ``solve`` down; nothing here knows a model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from slimkernels.search.checks import Check, RepetitionCheck
from slimkernels.search.config import PathFinderConfig
from slimkernels.search.engine import Engine, Prompt, StepRequest
from slimkernels.search.plan import Plan, plan
from slimkernels.search.question import Child, Progress, Question, QuestionSearch, Result, node_seed, replay
from slimkernels.search.selection import Scorer, consensus, select
from slimkernels.search.trace import Trace, header_of
from slimkernels.search.tree import ROOT, Status, Tree

# Called with a question's index and its tree when a depth is done.
OnDepth = Callable[[int, Tree], None]


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

    def solve(
        self,
        questions: Sequence[Prompt | Question],
        *,
        trace: str | os.PathLike[str] | None = None,
        on_depth: OnDepth | None = None,
    ) -> list[Result]:
        """Searches every question; the results in the same order.

        Args:
            questions: Prompts (texts, or their token ids), or prompts with their contexts.
            trace: A file that the search is written to as it goes. Where it is there, the search goes on from it, with
                the same trees and results as without the interruption.
            on_depth: Called with a question's index and its tree when a depth of it is done.

        Returns:
            One result each, also where nothing was found.

        Raises:
            ValueError: An empty question, or one that the engine cannot take. All are looked at before the first is
                searched.
            FloatingPointError: The model gave logits that are NaN.
            TraceMismatchError: The trace is that of another search: other questions, checks, model or configuration.
            TraceDamagedError, DamagedLineError, FileInUseError, ForeignFileError: As ``Trace``.
        """
        return [result for _, result in self.solve_each(questions, trace=trace, on_depth=on_depth)]

    def solve_each(
        self,
        questions: Sequence[Prompt | Question],
        *,
        trace: str | os.PathLike[str] | None = None,
        on_depth: OnDepth | None = None,
    ) -> Iterator[tuple[int, Result]]:
        """``solve``, a question's index and result at a time, as soon as its batch of questions is done."""
        asked = self._all_checked(questions)
        with contextlib.ExitStack() as stack:
            written, progress = None, lambda _: Progress()
            if trace is not None:
                header = header_of(self.engine, self.config, self.checks, asked)
                written = stack.enter_context(Trace(trace, header))
                progress = written.progress
            for first in range(0, len(asked), self.config.batch_questions):
                searches = [
                    QuestionSearch(self.engine, self.config, index, question, progress(index))
                    for index, question in enumerate(asked[first : first + self.config.batch_questions], first)
                ]
                yield from enumerate(self._solve_together(searches, written, on_depth), first)

    def plan(self, questions: Sequence[Prompt | Question]) -> Plan:
        """The most tokens and bytes that ``solve`` may take, without generating any.

        Raises:
            ValueError: As ``solve``.
        """
        asked = self._all_checked(questions)
        return plan(self.config, [self.engine.count_tokens(question.prompt) for question in asked], self.engine)

    async def solve_async(
        self,
        questions: Sequence[Prompt | Question],
        *,
        trace: str | os.PathLike[str] | None = None,
        on_depth: OnDepth | None = None,
    ) -> list[Result]:
        """``solve`` in a thread, for callers that have an event loop to keep running."""
        return await asyncio.to_thread(self.solve, questions, trace=trace, on_depth=on_depth)

    def _all_checked(self, questions: Sequence[Prompt | Question]) -> list[Question]:
        if isinstance(questions, (str, Question)):
            raise TypeError(f"questions must be a sequence, got one {type(questions).__name__}: give [question]")
        return [self._checked(index, question) for index, question in enumerate(questions)]

    def _checked(self, index: int, question: Prompt | Question) -> Question:
        if not isinstance(question, Question):
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

    def _solve_together(
        self, searches: Sequence[QuestionSearch], trace: Trace | None, on_depth: OnDepth | None
    ) -> list[Result]:
        config = self.config
        started = time.monotonic() - max(search.progress.seconds for search in searches)
        deadline = None if config.time_limit_s is None else started + config.time_limit_s
        limit = "depth"
        try:
            self._start([search for search in searches if search.is_open])
            for depth in range(config.max_depth):
                if not any(search.is_open for search in searches):
                    break
                if deadline is not None and time.monotonic() >= deadline:
                    limit = "budget"
                    break
                # A search that was interrupted may have done this depth, which others have still to do.
                growing = [search for search in searches if search.is_open and search.progress.depth == depth]
                self._branch(growing, depth, deadline)
                for search in growing:
                    search.prune()
                    search.progress.depth = depth + 1
                    search.progress.seconds = time.monotonic() - started
                    if trace is not None:
                        trace.write_depth(search)
                    if on_depth is not None:
                        on_depth(search.index, search.tree)
            for search in searches:
                search.end(limit)
        finally:
            for search in searches:
                search.close()
        results = [self._select(search) for search in searches]
        if trace is not None:
            for search, result in zip(searches, results, strict=True):
                trace.write_result(search, result)
        return results

    def _start(self, searches: Sequence[QuestionSearch]) -> None:
        """Gives searches the engine's branches of their open leaves: of new ones, their prompts."""
        if not searches:
            return
        branches = self.engine.start([search.question.prompt for search in searches])
        for search, branch in zip(searches, branches, strict=True):
            search.start(branch)
        replay(searches, self.engine, embed=self._embeds)

    @property
    def _embeds(self) -> bool:
        return any(check.needs_embeddings for check in self.checks)

    def _branch(self, searches: Sequence[QuestionSearch], depth: int, deadline: float | None) -> None:
        """Gives every open leaf its children, in one batch; what fails is generated again, in one batch."""
        children = [child for search in searches for child in search.new_children(self.config.branching_at(depth))]
        pending = children
        for attempt in range(self.config.max_attempts):
            if attempt > 0:
                late = deadline is not None and time.monotonic() >= deadline
                pending = [] if late else _affordable([child for child in children if child.failure])
                for child in pending:
                    child.discard()
            if not pending:
                break
            self._generate(pending, depth)
            self._check(pending, depth)
        for child in children:
            child.search.add(child)

    def _generate(self, children: Sequence[Child], depth: int) -> None:
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
                    stop=config.stop,
                )
            )
        steps = self.engine.extend(requests, config.is_step, embed=self._embeds)
        for child, step in zip(children, steps, strict=True):
            child.receive(step)

    def _check(self, children: Sequence[Child], depth: int) -> None:
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

    def _select(self, search: QuestionSearch) -> Result:
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
        notes += tuple(getattr(self.engine, "notes", ()))
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
            num_tokens=search.progress.num_tokens,
            tree=tree,
            checks=checks,
            notes=notes,
            seconds=search.progress.seconds,
        )


def _affordable(children: Sequence[Child]) -> list[Child]:
    """Those of the children for which their question's token budget has a whole step."""
    taken: Counter[int] = Counter()
    affordable = []
    for child in children:
        steps = child.search.affordable_steps()
        if steps is None or taken[id(child.search)] < steps:
            taken[id(child.search)] += 1
            affordable.append(child)
    return affordable
